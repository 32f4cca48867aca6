"""The models of one volume: begin, seal, reopen, retire, recover (design D2, D3).

The file system is the truth. A name under `models/` with its manifest *means* complete, because it
got there by the steps of `seal` and no others. Nothing here knows where bytes come from, that there
is an index, or what time it is. Every method is synchronous and meant for a worker thread; one
owner a volume, held by `lock`.
"""

import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from agent import layout, manifest
from agent.errors import AgentError, Reason
from agent.files import Files, disk_errors
from agent.manifest import Manifest
from agent.model import (
    CacheKey,
    Digest,
    Entry,
    Ingest,
    Listing,
    ModelRef,
    RemoteFile,
)
from agent.recover import Fix, Found, recover


class Store:
    """One volume. `root` is the directory that the serving pods' volume points at."""

    def __init__(self, root: Path, files: Files | None = None) -> None:
        self.root = root
        self._files = files or Files()
        self._lock: int | None = None

    # -- the volume ---------------------------------------------------------------------------

    def open(self) -> None:
        """Take the volume for this process and make its directories.

        Raises Locked when another agent has it, ReadOnly or PermissionDenied when it cannot be
        written.
        """
        with disk_errors(f"prepare the cache directory {self.root}"):
            if not self.root.is_dir():
                self.root.mkdir(parents=True, mode=layout.DIRECTORY_MODE)
            self._files.make_directory(self.root / layout.HIDDEN, layout.DIRECTORY_MODE)
            self._take_lock()
            for name, mode in (
                (layout.MODELS, layout.DIRECTORY_MODE),
                (layout.MANIFESTS, layout.DIRECTORY_MODE),
                (layout.PROGRESS, layout.DIRECTORY_MODE),
                (layout.PINS, layout.DIRECTORY_MODE),
                (layout.INGEST, layout.PRIVATE_MODE),
                (layout.TRASH, layout.PRIVATE_MODE),
            ):
                self._files.make_directory(self.root / name, mode)
            self._files.sync_directory(self.root / layout.HIDDEN)
            self._files.sync_directory(self.root)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        path = self.root / layout.LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise AgentError(
                Reason.LOCKED,
                f"another agent (process {holder or 'unknown'}) already manages {self.root}",
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor

    # -- looking ------------------------------------------------------------------------------

    def model(self, key: CacheKey) -> Path:
        """Where a sealed model is."""
        return self.root / layout.model(key)

    def manifest(self, key: CacheKey) -> Manifest | None:
        """The manifest of a sealed model; None if there is none, or none that can be read."""
        return _read_manifest(self.root / layout.manifest(key))

    def manifests(self) -> Iterator[tuple[CacheKey, Manifest, float]]:
        """Every sealed model with the time of its last use, Unix seconds, in the order of keys."""
        for name in _names(self.root / layout.MANIFESTS):
            path = self.root / layout.MANIFESTS / name
            if layout.is_key(name) and (found := _read_manifest(path)) is not None:
                key = CacheKey(name)
                if found.ref.key == key and self.model(key).is_dir():
                    yield key, found, path.stat().st_mtime

    def entries(self) -> list[Entry]:
        return [found.entry(last_used=used) for _, found, used in self.manifests()]

    def damage(self, key: CacheKey, found: Manifest) -> list[str]:
        """The paths of a sealed model that are missing, of another size or not regular files.

        A look at the names only, cheap enough for every minute; wrong bytes of the right size are
        found by hashing.
        """
        root = self.model(key)
        return [file.path for file in found.files if not _is_file(root / file.path, file.size)]

    def ingests(self) -> dict[CacheKey, Ingest]:
        """What was begun and is not sealed, with how much of it is there."""
        result = {}
        for name in _names(self.root / layout.INGEST):
            if layout.is_key(name) and (listing := self.listing(CacheKey(name))) is not None:
                result[listing.key] = Ingest(
                    ref=listing.ref,
                    revision=listing.revision,
                    total=listing.bytes,
                    done=sum(self._written(listing.key, file) for file in listing.files),
                )
        return result

    def _written(self, key: CacheKey, file: RemoteFile) -> int:
        for path in (self.tree(key) / file.path, self.partial(key) / file.path):
            try:
                return min(path.lstat().st_size, file.size)
            except OSError:
                continue
        return 0

    def listing(self, key: CacheKey) -> Listing | None:
        """The pinned listing of an ingest; None if there is none, or none that can be read."""
        try:
            listing = _listing_from_json((self._ingest(key) / layout.LISTING).read_bytes())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return listing if listing.key == key else None

    def tree(self, key: CacheKey) -> Path:
        """Where the proven files of an ingest are."""
        return self._ingest(key) / layout.TREE

    def partial(self, key: CacheKey) -> Path:
        """Where the unproven files of an ingest are."""
        return self._ingest(key) / layout.PARTIAL

    def _ingest(self, key: CacheKey) -> Path:
        return self.root / layout.ingest(key)

    # -- an ingest ----------------------------------------------------------------------------

    def begin(self, listing: Listing) -> None:
        """Pin a listing and make the directories of its files.

        An ingest of the same revision is continued; of another one it is begun anew, keeping the
        files whose size and promise did not change: they are re-hashed like all that is found.
        """
        layout.check_paths(file.path for file in listing.files)
        with disk_errors(f"begin {listing.ref.uri}"):
            previous = self.listing(listing.key)
            if previous is not None and previous != listing:
                self._forget_the_changed(previous, listing)
            ingest = self._ingest(listing.key)
            self._files.make_directory(ingest, layout.PRIVATE_MODE)
            for name in (layout.TREE, layout.PARTIAL):
                self._files.make_directory(ingest / name, layout.DIRECTORY_MODE)
                for directory in _directories(listing):
                    self._files.make_directory(ingest / name / directory, layout.DIRECTORY_MODE)
            # The listing comes last: with it, the tree beside it is the one being built.
            data = json.dumps(asdict(listing), indent=1).encode()
            self._files.replace_file(ingest / layout.LISTING, data, 0o600)

    def _forget_the_changed(self, previous: Listing, listing: Listing) -> None:
        """Before another listing is pinned: drop what it does not name, or names otherwise."""
        same = {file.path: file for file in listing.files if file.digest is not None}
        kept = {file.path for file in previous.files if same.get(file.path) == file}
        for file in previous.files:
            if file.path not in kept:
                self._files.unlink(self.tree(listing.key) / file.path)
                self._files.unlink(self.partial(listing.key) / file.path)
        for name in (self.tree(listing.key), self.partial(listing.key)):
            _prune(name)

    def promote(self, key: CacheKey, path: str) -> None:
        """A partial file was proven and fsynced: give it its name in the tree."""
        with disk_errors(f"keep {path}"):
            self._files.rename(self.partial(key) / path, self.tree(key) / path)

    def discard(self, key: CacheKey, path: str) -> None:
        """A file of the tree turned out wrong: it is fetched again, from nothing."""
        with disk_errors(f"discard {path}"):
            self._files.unlink(self.tree(key) / path)

    def seal(self, sealed: Manifest) -> None:
        """Publish a proven ingest (design D3). Every file in it is fsynced already.

        Each step leaves a state that `recover` knows. Raises ForeignDirectory when something that
        is not ours is in the way.
        """
        key = sealed.ref.key
        manifests = self.root / layout.MANIFESTS
        tree, target = self.tree(key), self.model(key)
        with disk_errors(f"seal {sealed.ref.uri}"):
            self._drop_unlisted(tree, {file.path for file in sealed.files})
            text = manifest.render(sealed).encode()
            self._files.write(self.root / layout.sealing(key), text, layout.NOTE_MODE)
            for directory in _tree_directories(tree):
                self._files.sync_directory(directory)
            self._files.sync_directory(manifests)
            try:
                self._files.rename(tree, target)  # also over an empty one that kubelet made
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise AgentError(
                    Reason.FOREIGN_DIRECTORY, f"{target} exists and is not ours"
                ) from error
            self._files.sync_directory(target.parent)
            self._files.sync_directory(self._ingest(key))
            self._files.rename(self.root / layout.sealing(key), self.root / layout.manifest(key))
            self._files.sync_directory(manifests)
            self._files.unlink(self.root / layout.progress(key))
            self._drop_ingest(key)

    def _drop_unlisted(self, tree: Path, listed: set[str]) -> None:
        """A model holds exactly the upstream files, whatever was put into its directory."""
        for directory, _, names in os.walk(tree):
            for name in names:
                path = Path(directory, name)
                if str(path.relative_to(tree)) not in listed:
                    self._files.unlink(path)
        _prune(tree)

    def reopen(self, key: CacheKey) -> None:
        """Take a sealed model off offer and back into an ingest, to be re-hashed and mended.

        The reverse of `seal`: listing, manifest away, rename. A pod that has the directory mounted
        goes on seeing it, and sees the mended file when it takes its name.
        """
        with disk_errors(f"withdraw {key}"):
            found = self.manifest(key) or _read_manifest(self.root / layout.sealing(key))
            if self.listing(key) is None:
                if found is None:
                    raise AgentError(Reason.CONFLICT, f"{key} has no manifest to be mended by")
                data = json.dumps(asdict(found.listing()), indent=1).encode()
                self._files.make_directory(self._ingest(key), layout.PRIVATE_MODE)
                self._files.replace_file(self._ingest(key) / layout.LISTING, data, 0o600)
                self._files.sync_directory(self.root / layout.INGEST)
            self._files.unlink(self.root / layout.manifest(key))
            self._files.sync_directory(self.root / layout.MANIFESTS)
            self._files.rename(self.model(key), self.tree(key))
            self._files.sync_directory(self.root / layout.MODELS)
            self._files.sync_directory(self._ingest(key))

    # -- retire -------------------------------------------------------------------------------

    def begin_retire(self, key: CacheKey) -> None:
        """Take a model off offer. The caller then looks once more who uses it."""
        with disk_errors(f"retire {key}"):
            self._files.rename(self.root / layout.manifest(key), self.root / layout.retiring(key))
            self._files.sync_directory(self.root / layout.MANIFESTS)

    def cancel_retire(self, key: CacheKey) -> None:
        """Somebody came: put it back on offer."""
        with disk_errors(f"keep {key}"):
            self._files.rename(self.root / layout.retiring(key), self.root / layout.manifest(key))
            self._files.sync_directory(self.root / layout.MANIFESTS)

    def finish_retire(self, key: CacheKey) -> None:
        """Nobody came: to the trash, whose bytes `sweep` gives back."""
        with disk_errors(f"retire {key}"):
            self._files.rename(self.model(key), self._in_trash(key))
            self._files.sync_directory(self.root / layout.MODELS)
            self._files.sync_directory(self.root / layout.TRASH)
            self._files.unlink(self.root / layout.retiring(key))
            self._files.sync_directory(self.root / layout.MANIFESTS)

    def sweep(self) -> int:
        """Unlink what is in the trash, one tree after the other; how many trees went.

        One worker does this: sequential unlinking beats parallel on ext4 and XFS, and must not
        compete with downloads.
        """
        count = 0
        for name in _names(self.root / layout.TRASH):
            with disk_errors(f"unlink the retired {name}"):
                self._files.remove_tree(self.root / layout.TRASH / name)
                count += 1
        return count

    def _in_trash(self, key: CacheKey) -> Path:
        return self.root / layout.TRASH / f"{key}.{secrets.token_hex(4)}"

    def _drop_ingest(self, key: CacheKey) -> None:
        """By rename, so that a crash leaves a whole ingest or none."""
        if self._ingest(key).exists():
            self._files.rename(self._ingest(key), self._in_trash(key))

    # -- notes for others ---------------------------------------------------------------------

    def write_progress(self, key: CacheKey, line: str) -> None:
        """Replace the progress line atomically. Not fsynced: it means nothing after a crash."""
        target = self.root / layout.progress(key)
        aside = target.with_name(f".{key}.new")
        with disk_errors("write progress"):
            aside.write_text(line + "\n")
            aside.chmod(layout.NOTE_MODE)
            aside.replace(target)

    def clear_progress(self, key: CacheKey) -> None:
        with disk_errors("clear progress"):
            self._files.unlink(self.root / layout.progress(key))

    def touch(self, key: CacheKey, when: float) -> None:
        """Mirror the last use, Unix seconds, so that losing the index loses no LRU order."""
        with disk_errors("note the last use"):
            os.utime(self.root / layout.manifest(key), (when, when))

    # -- start --------------------------------------------------------------------------------

    def recover(self) -> list[CacheKey]:
        """Bring what an earlier life left into one of the known states; the foreign directories.

        Safe at any time before work begins, and twice.
        """
        foreign = []
        with disk_errors("recover the cache"):
            for key, found in self._found().items():
                for fix in recover(found):
                    if fix is Fix.REPORT_FOREIGN:
                        foreign.append(key)
                    else:
                        self._fix(key, fix)
            for name in _names(self.root / layout.PROGRESS):
                self._files.unlink(self.root / layout.PROGRESS / name)
        return foreign

    def _found(self) -> dict[CacheKey, Found]:
        notes: dict[CacheKey, set[str]] = {}
        for name in _names(self.root / layout.MANIFESTS):
            if (known := layout.key_of_manifest(name)) is not None:
                notes.setdefault(known[0], set()).add(known[1])
        names = {*_names(self.root / layout.MODELS), *_names(self.root / layout.INGEST)}
        keys = {CacheKey(name) for name in names if layout.is_key(name)} | set(notes)
        return {key: self._found_of(key, notes.get(key, set())) for key in sorted(keys)}

    def _found_of(self, key: CacheKey, notes: set[str]) -> Found:
        def readable(path: str) -> bool:
            found = _read_manifest(self.root / path)
            return found is not None and found.ref.key == key

        ours = {"manifest": layout.manifest(key), "retiring": layout.retiring(key)}
        good = {note for note, path in ours.items() if note in notes and readable(path)}
        return Found(
            manifest="manifest" in good,
            sealing="sealing" in notes and readable(layout.sealing(key)),
            retiring="retiring" in good,
            unreadable=bool((notes & set(ours)) - good),
            directory=any(True for _ in _names(self.model(key))),
            listing=self.listing(key) is not None,
            tree=self.tree(key).is_dir(),
            ingest=self._ingest(key).is_dir(),
        )

    def _fix(self, key: CacheKey, fix: Fix) -> None:
        act: dict[Fix, Callable[[], None]] = {
            Fix.RESTORE_MANIFEST: lambda: self.cancel_retire(key),
            Fix.DROP_RETIRING: lambda: self._drop_note(layout.retiring(key)),
            Fix.WITHDRAW_MANIFEST: lambda: self._drop_note(layout.manifest(key)),
            Fix.DROP_SEALING: lambda: self._drop_note(layout.sealing(key)),
            Fix.REOPEN: lambda: self.reopen(key),
            Fix.SALVAGE: lambda: self._salvage(key),
            Fix.DROP_INGEST: lambda: self._drop_ingest(key),
        }
        act[fix]()

    def _salvage(self, key: CacheKey) -> None:
        self._files.make_directory(self._ingest(key), layout.PRIVATE_MODE)
        self._files.rename(self.model(key), self.tree(key))

    def _drop_note(self, path: str) -> None:
        self._files.unlink(self.root / path)
        self._files.sync_directory(self.root / layout.MANIFESTS)


def _names(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_file(path: Path, size: int) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _read_manifest(path: Path) -> Manifest | None:
    try:
        return manifest.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, AgentError):
        return None


def _directories(listing: Listing) -> Iterable[str]:
    """Every directory of the listing's paths, parents first."""
    found: set[str] = set()
    for file in listing.files:
        parts = file.path.split("/")
        found.update("/".join(parts[:n]) for n in range(1, len(parts)))
    return sorted(found)


def _tree_directories(root: Path) -> list[Path]:
    return [Path(directory) for directory, _, _ in os.walk(root, topdown=False)]


def _prune(root: Path) -> None:
    """Remove directories that hold nothing (any more), but not the root."""
    for directory in _tree_directories(root):
        if directory != root and not any(directory.iterdir()):
            directory.rmdir()


def _listing_from_json(data: bytes) -> Listing:
    raw = json.loads(data)
    ref = raw["ref"]
    return Listing(
        ref=ModelRef(uri=ref["uri"], include=tuple(ref["include"]), exclude=tuple(ref["exclude"])),
        revision=raw["revision"],
        files=tuple(
            RemoteFile(
                path=file["path"],
                size=file["size"],
                origin=file["origin"],
                digest=None if file["digest"] is None else Digest(**file["digest"]),
                version=file["version"],
            )
            for file in raw["files"]
        ),
    )
