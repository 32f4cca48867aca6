"""The models of one volume: begin, seal, reopen, retire, recover (design D2, D3).

What is there is for `catalog` to say. Nothing here knows where bytes come from, that there is an
index, or what time it is. Every method is synchronous and meant for a worker thread; one owner a
volume, held by `lock`.
"""

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from agent import layout, manifest, pinned, trees
from agent.catalog import OFFERED, Catalog, Versions, changed
from agent.errors import AgentError, Reason
from agent.files import Files, disk_errors
from agent.lock import Lock
from agent.manifest import Manifest
from agent.model import CacheKey, Listing
from agent.recover import Fix, Found, recover
from agent.trash import Trash

_NO_LINK = frozenset(  # no fault of the disk: the file is brought as if nobody had it
    {
        errno.EPERM,
        errno.EXDEV,
        errno.EMLINK,
        errno.ENOENT,  # retired meanwhile
        errno.EOPNOTSUPP,
        errno.ENOSYS,
    }
)

DIRECTORIES = (  # of a volume, with their modes
    (layout.MODELS, layout.DIRECTORY_MODE),
    (layout.MANIFESTS, layout.DIRECTORY_MODE),
    (layout.PROGRESS, layout.DIRECTORY_MODE),
    (layout.PINS, layout.DIRECTORY_MODE),
    (layout.INGEST, layout.PRIVATE_MODE),
    (layout.TRASH, layout.PRIVATE_MODE),
)


class Store(Catalog):
    """One volume, and what its one owner does to it."""

    def __init__(self, root: Path, files: Files | None = None) -> None:
        super().__init__(root)
        self._files = files or Files()
        self._lock: Lock | None = None
        self._trash = Trash(root / layout.TRASH, self._files)

    # -- the volume ---------------------------------------------------------------------------

    def open(self) -> None:
        """Take the volume for this process and make its directories.

        Raises Locked when another agent has it, ReadOnly or PermissionDenied when it cannot be
        written.
        """
        with disk_errors(f"prepare the cache directory {self.root}"):
            if not self.root.is_dir():
                self.root.parent.mkdir(parents=True, exist_ok=True)
                self._files.make_directory(self.root, layout.DIRECTORY_MODE)
            self._files.make_directory(self.root / layout.HIDDEN, layout.DIRECTORY_MODE)
            self._lock = Lock(self.root / layout.LOCK)
            try:
                self._make_directories()
            except BaseException:
                self.close()  # or the next try would find the volume locked, by ourselves
                raise

    def _make_directories(self) -> None:
        for name, mode in DIRECTORIES:
            self._files.make_directory(self.root / name, mode)
        self._files.sync_directory(self.root / layout.HIDDEN)
        self._files.sync_directory(self.root)

    def _mend_directories(self) -> None:
        """Somebody may remove one under us: that must not fail every seal until a restart."""
        if not all((self.root / name).is_dir() for name, _ in DIRECTORIES):
            self._make_directories()

    def check(self) -> None:
        """Raises DiskMissing when the directory is no longer the volume that was opened."""
        with disk_errors(f"look at the cache directory {self.root}"):
            if self._lock is not None and not self._lock.is_on(self.root):
                raise AgentError(
                    Reason.DISK_MISSING,
                    f"another file system is mounted at {self.root} than the one that was opened",
                )

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # -- an ingest ----------------------------------------------------------------------------

    def begin(self, listing: Listing) -> None:
        """Pin a listing and make the directories of its files.

        An ingest of the same listing is continued. Of another one, or of a salvage, only those
        files are kept that a re-hash can prove against the new promise. Beside a directory that is
        not ours, too: `exchange` takes its place. Raises ForeignDirectory before the first byte
        when something else is in the way.
        """
        layout.check_paths(file.path for file in listing.files)
        if listing.archive is not None:  # its name becomes a line of the manifest
            layout.check_paths([listing.archive.path])
        key = listing.key
        with disk_errors(f"begin {listing.ref.uri}"):
            self._mend_directories()
            self._settle(key)
            _refuse_odd(self.model(key))
            previous = self.listing(key)
            kept = pinned.worth_keeping(previous, listing)
            self._files.make_directory(self._ingest(key), layout.PRIVATE_MODE)
            if not pinned.keeps_archive(previous, listing):
                self._files.unlink(self.archive(key))
            for top in (self.tree(key), self.partial(key)):
                # Of an archive that nobody has looked into, any file of the tree may be one: a
                # model that is being mended, and a pod that reads it, keep theirs until then.
                if listing.files or top != self.tree(key):
                    self._keep_only(top, kept)
                self._files.make_directory(top, layout.DIRECTORY_MODE)
                for directory in trees.parents(file.path for file in listing.files):
                    mode = layout.DIRECTORY_MODE
                    self._files.make_directory(top / directory, mode, below=top)
            # The listing comes last: with it, the tree beside it is the one being built. Without
            # the tree, it would say after a power cut that what has the model's place is ours.
            if previous != listing:
                self._files.sync_directory(self._ingest(key))
                self._pin(listing)

    def _settle(self, key: CacheKey) -> None:
        """A seal of this very life may have failed half way: the repair that a start would make.

        Not beside a model that is on offer or on its way out: there the ingest is a newer revision.
        """
        notes = self._notes().get(key, set())
        found = self._found_of(key, notes)
        if not ((found.manifest or found.retiring) and found.directory):
            self._repair(key, found, notes)

    def _pin(self, listing: Listing) -> None:
        ingest = self._ingest(listing.key)
        self._files.make_directory(ingest, layout.PRIVATE_MODE)
        data = pinned.render(listing)
        self._files.replace_file(ingest / layout.LISTING, data, 0o600)
        self._files.sync_directory(self.root / layout.INGEST)

    def _keep_only(self, top: Path, kept: set[str]) -> None:
        """Unlink what is not named, whatever it is, and the directories that hold nothing then."""
        for path in list(trees.files_below(top)):
            if str(path.relative_to(top)) not in kept:
                self._files.unlink(path, below=top)
        for directory in trees.directories_below(top):
            if directory != top and not any(directory.iterdir()):
                self._files.remove_directory(directory, below=top)

    def abandon(self, key: CacheKey) -> None:
        """Give up what was begun, or salvaged, and is not sealed; `sweep` gives the bytes back.

        A directory whose manifest is there is left alone, even if that cannot be read.
        """
        with disk_errors(f"abandon {key}"):
            offered = bool(self._notes().get(key, set()) & OFFERED)
            if not offered:
                self._settle(key)  # a seal that failed half way left its directory in place
            if not offered and trees.is_directory(self._replaced(key)):
                self._drop_all_but_the_replaced(key)
            else:
                self._drop_ingest(key)
            self._files.unlink(self.root / layout.progress(key))

    def _drop_all_but_the_replaced(self, key: CacheKey) -> None:
        """Something newer is in its place, and not ours either: a human is to choose.

        The listing goes first: without a tree beside it, it would say that the newer one is ours.
        """
        self._files.unlink(self._ingest(key) / layout.LISTING)
        self._files.sync_directory(self._ingest(key))
        for top in (self.tree(key), self.partial(key)):
            if trees.is_directory(top):
                self._trash.take(top, key)

    def promote(self, key: CacheKey, path: str) -> None:
        """A partial file was proven and fsynced: give it its name in the tree."""
        with disk_errors(f"keep {path}"):
            proven, place = self.partial(key) / path, self.tree(key) / path
            self._files.rename(proven, place, below=self._ingest(key))

    def link(self, key: CacheKey, path: str, source: Path) -> bool:
        """Give a file of a sealed model a second name, in the tree of an ingest.

        False where that cannot be and it is to be fetched. What had arrived of it goes: it is not
        needed any more. Like that of `promote`, the name is durable with the seal.
        """
        with disk_errors(f"link {path}"):
            if not trees.is_reached(self.root / layout.MODELS, source):
                return False
            try:
                self._files.link(source, self.tree(key) / path, below=self._ingest(key))
            except OSError as error:
                if error.errno in _NO_LINK:
                    return False
                raise
            self._files.unlink(self.partial(key) / path)
            return True

    def adopt(self, key: CacheKey, path: str, source: Path) -> bool:
        """The same for a file of a directory that somebody else left, and may have left to the page
        cache."""
        return self.settle(source) and self.link(key, path, source)

    def settle(self, source: Path) -> bool:
        """Fsync what others may have written into a file of a model. False: no link is made of it,
        since something else than real directories leads there."""
        with disk_errors(f"settle {source}"):
            if not trees.is_reached(self.root / layout.MODELS, source):
                return False
            with suppress(FileNotFoundError):
                self._files.sync_file(source)
            return True

    def discard(self, key: CacheKey, path: str) -> None:
        """A file of the tree turned out wrong: it is fetched again, from nothing.

        Other models that share it keep theirs.
        """
        with disk_errors(f"discard {path}"):
            self._files.unlink(self.tree(key) / path, below=self._ingest(key))

    def drop_archive(self, key: CacheKey) -> None:
        """All of it is unpacked and proven: it is not needed any more."""
        with disk_errors("remove an archive"):
            self._files.unlink(self.archive(key))

    def seal(self, sealed: Manifest, proven: Versions | None = None) -> None:
        """Publish a proven ingest (design D3). Every file in it is fsynced already.

        `proven` is what every file was when it was proven; by default, what it is now. Each step
        leaves a state that `recover` knows. Raises ForeignDirectory when something that is not ours
        is in the way, DiskError when a file is not what was proven.
        """
        key = sealed.ref.key
        tree, target = self.tree(key), self.model(key)
        with disk_errors(f"seal {sealed.ref.uri}"):
            ready = self._make_ready(sealed, proven)
            try:
                self.check_unchanged(sealed, ready)
                self._files.rename(tree, target)  # also over an empty one that kubelet made
            except (OSError, AgentError):
                # Never leave the note beside a directory that is not ours: without the ingest, it
                # would say that it is.
                self._files.unlink(self.root / layout.sealing(key))
                _refuse_foreign(target)
                raise
            self._offer(key)

    def make_ready(self, sealed: Manifest, proven: Versions | None = None) -> Versions:
        """Do all of a seal that takes time, and may still be undone, before `exchange`.

        `proven` as for `seal`. Returns what every file is now: its time may be another.
        """
        with disk_errors(f"make {sealed.ref.uri} ready"):
            return self._make_ready(sealed, proven)

    def cancel_ready(self, key: CacheKey) -> None:
        """Somebody came: what is in its place stays there."""
        with disk_errors(f"keep {key}"):
            self._drop_note(layout.sealing(key))

    def exchange(self, sealed: Manifest, ready: Versions | None = None) -> None:
        """Publish what was made ready, in the place of a directory that is not ours.

        That one is lost only once ours is on offer: killed before, `recover` puts it back. Between
        the two renames nothing has the name; there is no wait between them. Raises DiskError when a
        file is not what `make_ready` left (`ready`; by default, what it is now).
        """
        key = sealed.ref.key
        target, aside = self.model(key), self._replaced(key)
        if trees.is_directory(aside):
            raise AgentError(
                Reason.FOREIGN_DIRECTORY, f"{aside} has lost its place to {target}; move one away"
            )
        with disk_errors(f"put {key} in its place"):
            try:
                self.check_unchanged(sealed, self.versions(sealed) if ready is None else ready)
            except AgentError:
                self._drop_note(layout.sealing(key))  # not beside what is not ours
                raise
            self._files.rename(target, aside)
            try:
                self._files.rename(self.tree(key), target)
            except OSError:
                self._files.rename(aside, target)
                self._files.unlink(self.root / layout.sealing(key))
                raise
            self._offer(key)

    def _make_ready(self, sealed: Manifest, proven: Versions | None) -> Versions:
        tree = self.tree(sealed.ref.key)
        ready = self._make_exact(tree, sealed, proven)
        self._note_sealing(sealed)
        for directory in trees.directories_below(tree):
            self._files.sync_directory(directory)
        self._files.sync_directory(self.root / layout.MANIFESTS)
        return ready

    def _offer(self, key: CacheKey) -> None:
        """It has its place: now its manifest. What is left of the ingest goes after that."""
        self._files.sync_directory(self.root / layout.MODELS)
        self._files.sync_directory(self._ingest(key))
        self._publish(key)
        with suppress(OSError):  # it is published: what is left over is for `recover`
            self._files.unlink(self.root / layout.progress(key))
            self._drop_ingest(key)

    def _publish(self, key: CacheKey) -> None:
        note, offer = self.root / layout.sealing(key), self.root / layout.manifest(key)
        self._files.rename(note, offer)
        try:
            self._files.sync_directory(offer.parent)
        except OSError:
            with suppress(OSError):  # whoever is told that it failed must find it so
                self._files.rename(offer, note)
            raise

    def _make_exact(self, tree: Path, sealed: Manifest, proven: Versions | None) -> Versions:
        """A model holds exactly the upstream files, whatever was done to its directory.

        Modes too: an fsGroup makes what kubelet finds writable, and a killed mkdir leaves the
        umask's. And times: what is later than the seal counts as written to (`damage`), and a clock
        that was set back must not make that of every file. Nor may it be hidden of a file that was
        written to: what is not `proven` keeps its time.
        """
        below = self._ingest(sealed.ref.key)
        self._keep_only(tree, {file.path for file in sealed.files})
        if wrong := trees.not_whole(tree, sealed):
            raise changed(wrong[0], sealed)
        ready = dict(self.versions(sealed) if proven is None else proven)
        for file in sealed.files:
            self._files.set_mode(tree / file.path, layout.FILE_MODE, below=below)
        for path in trees.written_to(tree, sealed):
            if self.version(sealed.ref.key, path) != ready.get(path):
                raise changed(path, sealed)
            self._files.backdate(tree / path, sealed.sealed_at, below=below)
            ready[path] = self.version(sealed.ref.key, path) or ""
        for directory in trees.directories_below(tree):
            self._files.set_mode(directory, layout.DIRECTORY_MODE, below=below)
        return ready

    def _note_sealing(self, sealed: Manifest) -> None:
        data = manifest.render(sealed).encode()
        self._files.write(self.root / layout.sealing(sealed.ref.key), data, layout.NOTE_MODE)

    def reopen(self, key: CacheKey, known: Manifest | None = None) -> None:
        """Take a sealed model off offer and back into an ingest, to be re-hashed and mended.

        `known` is what was sealed, where the caller remembers it: the manifest may be gone as well.

        The reverse of `seal`: listing, manifest away, rename. A pod that has the directory mounted
        goes on seeing it, and sees the mended file when it takes its name.
        """
        with disk_errors(f"withdraw {key}"):
            self._mend_directories()
            found = self._note(layout.manifest(key), key)
            if found is not None or known is not None:
                # What was begun beside it, of another revision, has no place of its own. It goes
                # first: with the manifest away, its tree would make this directory look foreign.
                self._drop_ingest(key)
            if self.listing(key) is None:
                found = found or self._note(layout.sealing(key), key)
                sealed = found[0] if found is not None else known
                if sealed is None:
                    raise AgentError(Reason.CONFLICT, f"{key} has no manifest to be mended by")
                self._pin(sealed.listing())
            self._drop_note(layout.manifest(key))
            if trees.is_directory(self.model(key)):
                self._files.rename(self.model(key), self.tree(key))
                self._files.sync_directory(self.root / layout.MODELS)
            else:  # somebody removed it, or put something else in its place: all is to be fetched
                self._files.make_directory(self.tree(key), layout.DIRECTORY_MODE)
            self._files.sync_directory(self._ingest(key))

    # -- retire -------------------------------------------------------------------------------

    def begin_retire(self, key: CacheKey) -> None:
        """Take a model off offer. The caller then looks once more who uses it.

        Each of the three steps may be repeated after it failed.
        """
        with disk_errors(f"retire {key}"):
            gone = not os.path.lexists(self.model(key))
            self._move_note(layout.manifest(key), layout.retiring(key), done=gone)

    def cancel_retire(self, key: CacheKey) -> None:
        """Somebody came: put it back on offer."""
        with disk_errors(f"keep {key}"):
            self._move_note(layout.retiring(key), layout.manifest(key))

    def finish_retire(self, key: CacheKey) -> None:
        """Nobody came: to the trash, whose bytes `sweep` gives back."""
        with disk_errors(f"retire {key}"):
            ours = (self.root / layout.retiring(key)).exists()
            if ours and os.path.lexists(self.model(key)):  # not by way of a symlink
                self._trash.take(self.model(key), key)
            self._files.sync_directory(self.root / layout.MODELS)
            self._files.sync_directory(self.root / layout.TRASH)
            self._drop_note(layout.retiring(key))

    def _move_note(self, source: str, target: str, *, done: bool = False) -> None:
        try:
            self._files.rename(self.root / source, self.root / target)
        except FileNotFoundError:
            if not done and not (self.root / target).exists():
                raise
        self._files.sync_directory(self.root / layout.MANIFESTS)

    def sweep(self) -> int:
        """Give back the bytes of what was retired; how many trees went."""
        return self._trash.sweep()

    def _drop_ingest(self, key: CacheKey) -> None:
        if self._ingest(key).exists():
            self._trash.take(self._ingest(key), key)

    # -- notes for others ---------------------------------------------------------------------

    def write_progress(self, key: CacheKey, line: str) -> None:
        """Replace the progress line atomically. Not fsynced: it means nothing after a crash."""
        target = self.root / layout.progress(key)
        aside = target.with_name(f".{key}.new")
        with disk_errors("write progress"):
            # A download must not fail for a directory that somebody removed.
            self._files.make_directory(target.parent, layout.DIRECTORY_MODE)
            aside.write_text(line + "\n")
            aside.chmod(layout.NOTE_MODE)
            aside.replace(target)

    def clear_progress(self, key: CacheKey) -> None:
        with disk_errors("clear progress"):
            self._files.unlink(self.root / layout.progress(key))

    def touch(self, key: CacheKey, when: float) -> None:
        """Mirror the last use, Unix seconds, so that losing the index loses no LRU order.

        A model that was retired meanwhile has no use to note.
        """
        with disk_errors("note the last use"), suppress(FileNotFoundError):
            os.utime(self.root / layout.manifest(key), (when, when))

    # -- start --------------------------------------------------------------------------------

    def recover(self) -> list[CacheKey]:
        """Bring what an earlier life left into one of the known states.

        Returns the keys whose place stays as it is: foreign, or not to be read or mended now.

        Safe at any time before work begins, and twice.
        """
        left = []
        with disk_errors("recover the cache"):
            notes = self._notes()
            for key in self._keys(notes):
                known = notes.get(key, set())
                try:
                    with disk_errors(f"recover {key}"):
                        foreign = self._repair(key, self._found_of(key, known), known)
                except AgentError:
                    foreign = True  # one directory that cannot be read must not stop all others
                if foreign:
                    left.append(key)
            for name in trees.names(self.root / layout.PROGRESS):
                self._files.unlink(self.root / layout.PROGRESS / name)
        return left

    def _repair(self, key: CacheKey, found: Found, notes: set[str]) -> bool:
        """Carry out the fixes for one key; whether something that is not ours has its place."""
        fixes = recover(found)
        for fix in fixes:
            if fix is not Fix.REPORT_FOREIGN:
                self._fix(key, fix)
        if "sealing" in notes and not found.sealing:
            self._drop_note(layout.sealing(key))  # cut off while it was written: it says nothing
        return Fix.REPORT_FOREIGN in fixes or trees.is_odd(self.model(key))

    def _notes(self) -> dict[CacheKey, set[str]]:
        """By key, which of "manifest", "sealing", "retiring" are there."""
        notes: dict[CacheKey, set[str]] = {}
        for name in trees.names(self.root / layout.MANIFESTS):
            if (known := layout.key_of_manifest(name)) is not None:
                notes.setdefault(known[0], set()).add(known[1])
        return notes

    def _keys(self, notes: Iterable[CacheKey]) -> list[CacheKey]:
        names = {*trees.names(self.root / layout.MODELS), *trees.names(self.root / layout.INGEST)}
        return sorted({CacheKey(name) for name in names if layout.is_key(name)} | set(notes))

    def _fix(self, key: CacheKey, fix: Fix) -> None:
        act: dict[Fix, Callable[[], None]] = {
            Fix.RESTORE_MANIFEST: lambda: self.cancel_retire(key),
            Fix.DROP_RETIRING: lambda: self._drop_note(layout.retiring(key)),
            Fix.WITHDRAW_MANIFEST: lambda: self._drop_note(layout.manifest(key)),
            Fix.DROP_SEALING: lambda: self._drop_note(layout.sealing(key)),
            Fix.REOPEN: lambda: self.reopen(key),
            Fix.SALVAGE: lambda: self._salvage(key),
            Fix.PUT_BACK: lambda: self._put_back(key),
            Fix.DROP_INGEST: lambda: self._drop_ingest(key),
        }
        act[fix]()

    def _salvage(self, key: CacheKey) -> None:
        self._files.make_directory(self._ingest(key), layout.PRIVATE_MODE)
        self._files.sync_directory(self.root / layout.INGEST)
        self._files.rename(self.model(key), self.tree(key))
        self._files.sync_directory(self._ingest(key))
        self._files.sync_directory(self.root / layout.MODELS)

    def _put_back(self, key: CacheKey) -> None:
        # Beside a tree, it can never be taken for ours.
        self._files.make_directory(self.tree(key), layout.DIRECTORY_MODE)
        self._files.sync_directory(self._ingest(key))
        self._files.rename(self._replaced(key), self.model(key))
        self._files.sync_directory(self.root / layout.MODELS)
        self._files.sync_directory(self._ingest(key))

    def _drop_note(self, path: str) -> None:
        self._files.unlink(self.root / path)
        self._files.sync_directory(self.root / layout.MANIFESTS)


def _refuse_foreign(target: Path) -> None:
    """Raise ForeignDirectory for anything but nothing, or an empty directory."""
    if trees.is_odd(target) or trees.names(target):
        raise _not_ours(target)


def _refuse_odd(target: Path) -> None:
    """Raise ForeignDirectory for what is no directory: not even `exchange` takes its place."""
    if trees.is_odd(target):
        raise _not_ours(target)


def _not_ours(target: Path) -> AgentError:
    return AgentError(Reason.FOREIGN_DIRECTORY, f"{target} exists and is not ours")
