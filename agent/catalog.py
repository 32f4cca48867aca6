"""What is on a volume, looked at and never changed: whoever may read it may ask (design D2).

The file system is the truth. A name under `models/` with its manifest *means* complete, because it
got there by the steps of `Store.seal` and no others. Every method is synchronous and meant for a
worker thread, and may run beside all that the volume's owner does.
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from agent import layout, manifest, pinned, trees
from agent.errors import AgentError, Reason
from agent.files import disk_errors, version_at
from agent.foreign import Seen, judge, unreadable
from agent.manifest import Manifest
from agent.model import CacheKey, Entry, Foreign, Ingest, Listing, RemoteFile
from agent.recover import Fix, Found, recover

Versions = Mapping[str, str]
"""What the files of an ingest are, by path (`Catalog.version`)."""

OFFERED = frozenset({"manifest", "retiring"})  # notes beside a directory that was once whole

_NOTES: Mapping[str, Callable[[CacheKey], str]] = {
    "manifest": layout.manifest,
    "sealing": layout.sealing,
    "retiring": layout.retiring,
}


class Catalog:
    """One volume. `root` is the directory that the serving pods' volume points at."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # -- looking ------------------------------------------------------------------------------

    def model(self, key: CacheKey) -> Path:
        """Where a sealed model is."""
        return self.root / layout.model(key)

    def manifest(self, key: CacheKey) -> Manifest | None:
        """The manifest of a sealed model; None if there is none, or none that can be read."""
        found = self._note(layout.manifest(key), key)
        return None if found is None else found[0]

    def manifests(self) -> Iterator[tuple[CacheKey, Manifest, float]]:
        """Every sealed model with the time of its last use, Unix seconds, in the order of keys.

        May run beside everything else: the manifest is read first and the directory looked at
        second, the reverse of how `Store.seal` makes them and the order in which a retire takes
        them.
        """
        for name in trees.names(self.root / layout.MANIFESTS):
            if layout.is_key(name):
                key = CacheKey(name)
                found = self._note(layout.manifest(key), key)
                if found is not None and trees.is_directory(self.model(key)):
                    yield key, *found

    def _note(self, path: str, key: CacheKey) -> tuple[Manifest, float] | None:
        """A manifest under any of its names, if it can be read and speaks of this very key."""
        found = _read_manifest(self.root / path)
        return found if found is not None and found[0].ref.key == key else None

    def entries(self) -> list[Entry]:
        return [found.entry(last_used=used) for _, found, used in self.manifests()]

    def damage(self, key: CacheKey, found: Manifest) -> list[str]:
        """The paths of a sealed model that are missing, of another size, not regular files, or
        written after the seal.

        The manifest's own path is among them if it is gone: without it nobody knows of the offer.
        A look at the names only, cheap enough for every minute; bytes that went bad by themselves
        are found by hashing.
        """
        model = self.model(key)
        wrong = dict.fromkeys([*trees.not_whole(model, found), *trees.written_to(model, found)])
        return [*wrong] if self._note(layout.manifest(key), key) else [layout.manifest(key), *wrong]

    def shared(self, key: CacheKey, found: Manifest) -> frozenset[tuple[int, int]]:
        """Inode and size in bytes of the files of a sealed model that have another name elsewhere:
        in a second model, an ingest, the trash. Evicting this one does not give those bytes back.
        """
        return trees.shared(self.model(key), found)

    def copies(self) -> dict[tuple[str, int], list[tuple[CacheKey, str]]]:
        """Where sealed models have a file, as model and path in it, by its SHA-256 and size."""
        copies: dict[tuple[str, int], list[tuple[CacheKey, str]]] = {}
        for key, found, _ in self.manifests():
            for file in found.files:
                copies.setdefault((file.sha256, file.size), []).append((key, file.path))
        return copies

    def ingests(self) -> dict[CacheKey, Ingest]:
        """What was begun and is not sealed, with how much of it is there."""
        names = (name for name in trees.names(self.root / layout.INGEST) if layout.is_key(name))
        listings = (self.listing(CacheKey(name)) for name in names)
        return {found.key: self._begun(found) for found in listings if found is not None}

    def _begun(self, listing: Listing) -> Ingest:
        there = [found for file in listing.files if (found := self._written(listing.key, file))]
        done, total = sum(size for size, _ in there), listing.bytes
        if listing.archive is not None and self.is_complete(listing):
            total -= listing.archive.size  # nothing is to be unpacked any more
        elif listing.archive is not None:
            done += min(trees.size(self.archive(listing.key)), listing.archive.size)
        return Ingest(
            ref=listing.ref,
            revision=listing.revision,
            total=total,
            done=done,
            shared=frozenset(linked for _, linked in there if linked is not None),
        )

    def is_complete(self, listing: Listing) -> bool:
        """Whether all files of a listing are in the tree of its ingest, by their sizes."""
        tree = self.tree(listing.key)
        return bool(listing.files) and all(
            trees.is_file(tree / file.path, file.size) for file in listing.files
        )

    def salvaged(self) -> list[CacheKey]:
        """Files of ours whose manifest was damaged (`Store.recover`), and that nobody has asked for
        yet.

        `Store.begin` takes them over, to be re-hashed; `Store.abandon` gives them up. Only the
        caller knows whether a pod still reads them.
        """
        keys = (
            CacheKey(name) for name in trees.names(self.root / layout.INGEST) if layout.is_key(name)
        )
        return [key for key in keys if self._is_salvage(key)]

    def _is_salvage(self, key: CacheKey) -> bool:
        return self.listing(key) is None and any(trees.files_below(self.tree(key)))

    def _written(
        self, key: CacheKey, file: RemoteFile
    ) -> tuple[int, tuple[int, int] | None] | None:
        """The bytes of a file that are there, and its inode and size where another model has it."""
        for path in (self.tree(key) / file.path, self.partial(key) / file.path):
            try:
                found = path.lstat()
            except OSError:
                continue
            linked = (found.st_ino, found.st_size) if found.st_nlink > 1 else None
            return min(found.st_size, file.size), linked
        return None

    def listing(self, key: CacheKey) -> Listing | None:
        """The pinned listing of an ingest; None if there is none, or none that can be read."""
        try:
            listing = pinned.parse((self._ingest(key) / layout.LISTING).read_bytes())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return listing if listing.key == key else None

    def tree(self, key: CacheKey) -> Path:
        """Where the proven files of an ingest are."""
        return self._ingest(key) / layout.TREE

    def partial(self, key: CacheKey) -> Path:
        """Where the unproven files of an ingest are."""
        return self._ingest(key) / layout.PARTIAL

    def version(self, key: CacheKey, path: str) -> str | None:
        """A token for the bytes of a file in the tree of an ingest; None if there is no such file.

        Raises DiskError where a link leads to it: a pod may have put one there, whose mount of a
        model goes on through its repair.
        """
        return version_at(self.tree(key) / path, self._ingest(key))

    def versions(self, sealed: Manifest) -> Versions:
        """Those of all files that are to be sealed."""
        found = {file.path: self.version(sealed.ref.key, file.path) for file in sealed.files}
        return {path: version for path, version in found.items() if version is not None}

    def check_unchanged(self, sealed: Manifest, proven: Versions) -> None:
        """Raise DiskError for a file that somebody wrote into after it was proven.

        One that is shared is in reach of the pods that mount the other model.
        """
        now = self.versions(sealed)
        for file in sealed.files:
            if file.path not in proven or now.get(file.path) != proven[file.path]:
                raise changed(file.path, sealed)

    def archive(self, key: CacheKey) -> Path:
        """Where the archive is that the files of an ingest come in."""
        return self._ingest(key) / layout.ARCHIVE

    def _ingest(self, key: CacheKey) -> Path:
        return self.root / layout.ingest(key)

    def _replaced(self, key: CacheKey) -> Path:
        return self._ingest(key) / layout.REPLACED

    # -- what is not ours -----------------------------------------------------------------------

    def foreign(self, key: CacheKey, *, user: int | None = None) -> Foreign | None:
        """What is known of a directory in this place that this agent never made; None: there is
        none. A look at names and sizes, compared with the pinned listing, if there is one. `user`
        is who would take it over, if not this process's."""
        model = self.model(key)
        notes = {note for note, path in _NOTES.items() if os.path.lexists(self.root / path(key))}
        if notes & OFFERED or not trees.is_directory(model):
            return None
        try:
            if Fix.REPORT_FOREIGN not in recover(self._found_of(key, notes)):
                return None  # empty, or ours and half way
            with disk_errors(f"look through {model}"):
                found = list(trees.everything_below(model))
                volume = (self.root / layout.MODELS).lstat().st_dev
        except AgentError as error:
            return Foreign(obstacle=unreadable(error.message))
        seen = [self._seen(key, path, there, volume) for path, there in found]
        return judge(
            str(model), seen, self.listing(key), user=os.geteuid() if user is None else user
        )

    def _seen(self, key: CacheKey, path: str, found: os.stat_result, volume: int) -> Seen:
        is_file = stat.S_ISREG(found.st_mode)
        return Seen(
            path=path,
            size=found.st_size if is_file else None,
            owner=found.st_uid,
            inode=found.st_ino,
            names=found.st_nlink if is_file else 1,
            mounted=found.st_dev != volume,
            replaced=is_file and self._is_replaced(key, path, found.st_ino),
        )

    def _is_replaced(self, key: CacheKey, path: str, inode: int) -> bool:
        """Whether another file was begun in place of this one: it had turned out wrong."""
        if os.path.lexists(self.partial(key) / path):
            return True
        try:
            return (self.tree(key) / path).lstat().st_ino != inode
        except OSError:
            return False

    def strangers(self) -> list[str]:
        """Names among the models that no key has, as KServe <= 0.17 gave them."""
        found = trees.names(self.root / layout.MODELS)
        return [name for name in found if not layout.is_key(name)]

    # -- as `recover` wants it ------------------------------------------------------------------

    def _found_of(self, key: CacheKey, notes: set[str]) -> Found:
        good = {note for note in notes if self._note(_NOTES[note](key), key) is not None}
        directory = trees.is_directory(self.model(key)) and bool(trees.names(self.model(key)))
        # A salvage waits for somebody to ask for it, and a pod may be reading it: no debris.
        offered = notes & OFFERED
        waits = self._is_salvage(key) and not (directory and offered)
        return Found(
            manifest="manifest" in good,
            sealing="sealing" in good,
            retiring="retiring" in good,
            unreadable=bool(offered - good),
            directory=directory,
            listing=self.listing(key) is not None,
            tree=self.tree(key).is_dir(),
            ingest=self._ingest(key).is_dir() and not waits,
            replaced=trees.is_directory(self._replaced(key)),
        )


def changed(path: str, sealed: Manifest) -> AgentError:
    return AgentError(
        Reason.DISK_ERROR,
        f"{path} of {sealed.ref.uri} changed on the disk after it was proven",
    )


def _read_manifest(path: Path) -> tuple[Manifest, float] | None:
    """With the time it was last touched: of this very file, whoever renames it meanwhile."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return manifest.parse(file.read()), os.fstat(file.fileno()).st_mtime
    except (OSError, UnicodeDecodeError, AgentError):
        return None
