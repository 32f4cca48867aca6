"""One model, from its URI to its seal: list, bring what is missing, prove, publish. Cancellable.

Whatever ends it, what arrived is kept in the ingest; the next call hashes what it finds and goes on
behind it. So resuming after a crash, mending a damaged model and a plain download are one path.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path

from agent import manifest
from agent.errors import AgentError, Reason
from agent.examine import Findings, by_name, examine, refuse
from agent.files import version_of
from agent.layout import is_one_line
from agent.manifest import Manifest, SealedFile
from agent.metrics import Metrics
from agent.model import (
    CacheKey,
    Digest,
    FilePolicy,
    Job,
    Listing,
    Locator,
    RemoteFile,
    Stage,
    Want,
)
from agent.ratelimits import RateLimits
from agent.sources import OWN, SCHEMES, Given, Source, Sources
from agent.sources.base import pin
from agent.store import Store, Versions
from agent.threads import changing, looking
from agent.transfer import Engine, FileJob
from agent.unpack import Unpacker

_log = logging.getLogger(__name__)

# What one file's failure says about all others too: going on would only repeat it.
_HOPELESS = frozenset(
    {Reason.DISK_FULL, Reason.READ_ONLY, Reason.PERMISSION_DENIED, Reason.DISK_ERROR}
)

_HASHES = 5  # of one file, while others give it names

Copies = dict[tuple[str, int], list[tuple[CacheKey, str]]]
"""Where sealed models have a file, by its SHA-256 and size (`Store.copies`)."""


_Link = Callable[[CacheKey, str, Path], bool]
"""`Store.link`, or `Store.adopt`."""


class Tally:
    """How far one model is. Written by transfer threads, read by the loop."""

    def __init__(
        self, want: Want, *, stage: Stage, total: int | None = None, staged: bool = False
    ) -> None:
        """`staged`: what it brings is not sealed by this job, but waits beside what has its
        place."""
        self.want = want
        self.total = total
        self.staged = staged
        self.received = 0
        self.linked = 0
        self.begun_at = time.monotonic()
        self.lists = stage is Stage.RESOLVING
        self._stage = stage
        self._done = 0
        self._lock = threading.Lock()

    def add(self, done: int, received: int) -> None:
        """Bytes in place (negative when they turned out wrong), and bytes off the wire."""
        with self._lock:
            self._done += done
            self.received += received
            if received:
                self._stage = Stage.FETCHING

    def link(self, size: int) -> None:
        """Bytes that another model had already. Whether they are in place is told by `add`."""
        with self._lock:
            self.linked += size

    def verify(self) -> None:
        """What is here already is being read and hashed."""
        with self._lock:
            self._stage = Stage.VERIFYING

    @property
    def job(self) -> Job:
        return Job(key=self.want.key, stage=self._stage, total=self.total, done=self._done)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun_at


Access = Callable[[Want], Awaitable[Given]]
"""What a source is to work with for one model."""


async def own_access(want: Want) -> Given:
    return OWN


class Fetcher:
    """Brings models into one store."""

    def __init__(
        self,
        *,
        store: Store,
        sources: Sources,
        engine: Engine,
        metrics: Metrics,
        access: Access = own_access,
        file_policy: FilePolicy = FilePolicy.WARN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._sources = sources
        self._engine = engine
        self._metrics = metrics
        self._clock = clock
        # What this life proved: (inode, size, time) and digest of a file of an ingest. Without it,
        # one file that stays wrong would have its whole model hashed again at every try.
        self._proven: dict[Path, tuple[str | None, str]] = {}
        # Versions of files that cannot be linked: a hash of them would be in vain once more.
        self._unlinkable: set[str] = set()
        self._access = access
        self._limits = RateLimits()
        self._file_policy = file_policy
        self._unpacker = Unpacker(store, engine, proven=self._note_proven)
        self.suspected: Callable[[CacheKey, list[str]], None] = lambda key, paths: None
        """Called, on the loop, with files of a sealed model, or of what another agent left in the
        place of one, whose bytes turned out wrong."""
        self.listed: Callable[[CacheKey], None] = lambda key: None
        """Called, on the loop, when a listing has been pinned."""

    def check(self, want: Want) -> None:
        """Raise InvalidSpec or Unsupported for a URI that no source can ever list."""
        self._sources.of(want.ref.uri).check(want.ref)

    async def today(self, want: Want) -> Listing:
        """What the source has today; nothing is kept of it."""
        source = await self._source(want)
        return await self._listed(source, want)

    async def prove(self, want: Want) -> None:
        """Raise AgentError unless the want's own credentials would bring it today: its listing, and
        a byte of its largest file. A hub lists to everybody what it gives to few."""
        source = await self._source(want)
        listing = await self._listed(source, want)
        file = listing.archive or max(listing.files, key=lambda file: file.size)
        if file.size:
            await self._engine.reach(await source.locate(listing, file), size=file.size)

    async def _listed(self, source: Source, want: Want) -> Listing:
        async with self._limits.heeding(source.host(want.ref)):
            return await source.list(want.ref)

    async def _source(self, want: Want) -> Source:
        """With the credentials of this moment. Raises Unsupported, Unauthorized, Forbidden."""
        return self._sources.of(want.ref.uri, await self._access(want))

    async def resolve(self, want: Want, tally: Tally | None = None) -> None:
        """Ask the source what the model is today, and pin the answer in the store.

        What another agent left in its place, and what other models have of it, is linked now, so
        that room is reserved for the rest only. The tally counts it.
        """
        counts = tally or Tally(want, stage=Stage.RESOLVING)
        listing = await self.today(want)
        await changing(lambda: self._store.begin(listing))
        self.listed(want.key)
        await self._link_what_is_here(listing, counts)

    async def _link_what_is_here(self, listing: Listing, tally: Tally) -> None:
        """So that room is reserved for the rest only."""
        foreign = await looking(lambda: self._store.foreign(listing.key))
        if foreign is not None and foreign.obstacle:
            return  # whatever is built, it could not take that place
        if foreign is not None:
            await self._adopt_all(listing, tally)
        await self._share_all(listing, tally)

    async def fetch(self, tally: Tally) -> Manifest | None:
        """Bring and prove every file of the pinned listing, then seal, or leave it staged beside
        what it is to take the place of. Raises AgentError.

        None where more is to be brought than was known, so that room must be found for it first.
        """
        want = tally.want
        source = await self._source(want)
        listing = await changing(lambda: self._pinned(want))
        policy = want.file_policy or self._file_policy
        self._judge(policy, by_name(policy, (file.path for file in listing.files)))
        tally.total = listing.bytes
        if listing.archive is None:
            digests = await self._files(source, listing, tally)
        elif (unpacked := await self._unpacked(source, listing, listing.archive, tally)) is None:
            return None
        else:
            digests = unpacked
        sealed = manifest.seal(listing, digests, sealed_at=int(self._clock()))
        expected = want.expect_fingerprint
        if expected is not None and sealed.fingerprint != expected:
            raise AgentError(
                Reason.FINGERPRINT_MISMATCH,
                f"{want.ref.uri} at {listing.revision} is {sealed.fingerprint}, not {expected}",
            )
        sealed = await self._examined(sealed, policy)
        if not tally.staged:
            await self.seal(sealed)
        self._metrics.download_done(scheme(want), size=sealed.bytes, seconds=tally.seconds)
        return sealed

    async def _examined(self, proven: Manifest, policy: FilePolicy) -> Manifest:
        """The same with what is to be said of its files. Raises UnsafeFiles."""
        paths = [file.path for file in proven.files]
        found = await looking(lambda: examine(policy, self._store.tree(proven.ref.key), paths))
        self._judge(policy, found)
        for warning in found.values():
            _log.info("%s: %s", proven.ref.uri, warning, extra={"key": proven.ref.key})
        return replace(proven, warnings=tuple(found.values()))

    def _judge(self, policy: FilePolicy, found: Findings) -> None:
        for kind in found:
            self._metrics.unsafe_models.labels(kind=kind, policy=policy.value).inc()
        refuse(policy, found)

    async def check_proven(self, proven: Manifest) -> None:
        """Raise DiskError if what `fetch` has proven was written into since."""
        await looking(lambda: self._store.check_unchanged(proven, self._versions(proven)))

    async def seal(self, proven: Manifest) -> None:
        """Publish what `fetch` has proven, if it is still what was proven. Raises DiskError."""
        await self.check_proven(proven)
        await changing(lambda: self._store.seal(proven, self._versions(proven)))
        self._forget(proven)

    async def make_ready(self, proven: Manifest) -> None:
        """All of a seal that may still be undone (`Store.make_ready`). Raises DiskError."""
        await self.check_proven(proven)
        versions = self._versions(proven)
        ready = await changing(lambda: self._store.make_ready(proven, versions))
        for file in proven.files:
            self._proven[self._place(proven, file)] = (ready[file.path], file.sha256)

    async def exchange(self, proven: Manifest) -> None:
        """Put what was made ready in the place of what another agent left. Raises DiskError."""
        await changing(lambda: self._store.exchange(proven, self._versions(proven)))
        self._forget(proven)

    def _pinned(self, want: Want) -> Listing:
        listing = self._store.listing(want.key)
        if listing is None:
            raise AgentError(Reason.SOURCE_CHANGED, f"{want.ref.uri} is to be listed again")
        self._store.begin(listing)  # after a crash or a repair, directories may be missing
        return listing

    async def _files(self, source: Source, listing: Listing, tally: Tally) -> dict[str, str]:
        """The SHA-256 of every file, by path."""
        key = listing.key

        async def bring(file: RemoteFile) -> str:
            proven, partial = (
                self._store.tree(key) / file.path,
                self._store.partial(key) / file.path,
            )
            digest = await self._receive(source, listing, file, partial, tally)
            # Noted before the rename, which changes nothing of it: who can write into the tree
            # might put another in its place after that.
            await looking(lambda: self._note_proven(proven, digest, partial))
            await changing(lambda: self._store.promote(key, file.path))
            return digest

        return await self._here_or(bring, listing, tally)

    async def _here_or(
        self,
        otherwise: Callable[[RemoteFile], Awaitable[str | None]],
        listing: Listing,
        tally: Tally,
    ) -> dict[str, str]:
        """The SHA-256 by path: of what need not be brought, and what is said of each other file."""
        digests: dict[str, str] = {}
        copies = await looking(self._store.copies)
        beside = await looking(lambda: self._store.foreign(listing.key)) is not None

        async def one(file: RemoteFile) -> None:
            digest = await self._here(listing, file, copies, beside, tally)
            digest = await otherwise(file) if digest is None else digest
            if digest is not None:
                digests[file.path] = digest

        await _each(listing.files, one)
        return digests

    def _note_proven(self, path: Path, digest: str, found_at: Path) -> None:
        self._proven[path] = (_version(found_at), digest)

    async def _here(
        self, listing: Listing, file: RemoteFile, copies: Copies, beside: bool, tally: Tally
    ) -> str | None:
        """The digest of a file that need not be brought; of a wrong one, nothing is left."""
        key, proven = listing.key, self._store.tree(listing.key) / file.path
        version = await looking(lambda: self._store.version(key, file.path))
        if version is not None:
            if (digest := await self._found(proven, version, file)) is not None:
                tally.add(file.size, 0)
                return digest
            await changing(lambda: self._store.discard(key, file.path))
            # By now, a model that had the same wrong file may have been mended.
            copies = await looking(self._store.copies)
        here = await self._adopt(listing, file, tally) if beside else None
        if here is None:
            here = await self._share(listing, file, copies, tally)
        if here is not None:
            tally.add(file.size, 0)
        return here

    async def _receive(
        self, source: Source, listing: Listing, file: RemoteFile, path: Path, tally: Tally
    ) -> str:
        """Bring one file of the source, or what is missing of it, and prove it."""
        host = source.host(listing.ref)

        async def locate() -> Locator:
            await self._limits.pause(host)
            return await source.locate(listing, file)

        received_bytes = self._metrics.download_bytes.labels(source=scheme(tally.want))

        def on_bytes(done: int, received: int) -> None:
            tally.add(done, received)
            received_bytes.inc(received)

        def on_retry(error: AgentError) -> None:
            self._limits.heed(host, error)
            self._metrics.retries.labels(source=scheme(tally.want), reason=error.reason.value).inc()

        job = FileJob(
            path=path,
            size=file.size,
            promised=file.digest,
            locate=locate,
            on_bytes=on_bytes,
            on_retry=on_retry,
        )
        try:
            return await self._engine.fetch(job)
        except AgentError as error:
            self._limits.heed(host, error)
            raise

    # -- archives -----------------------------------------------------------------------------

    async def _unpacked(
        self, source: Source, listing: Listing, archive: RemoteFile, tally: Tally
    ) -> dict[str, str] | None:
        """The SHA-256 of every file that comes in an archive, by path, once they are all there.

        None where the archive was only looked into, so that room can be found for what is in it; or
        where it is needed again, and no room was.
        """
        key = listing.key
        if not listing.files:
            await self._look_inside(source, listing, archive, tally)
            return None
        no_room = await looking(lambda: self._store.is_complete(listing))
        missing: list[RemoteFile] = []

        async def note(file: RemoteFile) -> None:
            missing.append(file)

        digests = await self._here_or(note, listing, tally)
        if missing and no_room:
            return None
        if missing:
            opened = await self._archive(source, listing, archive, tally)
            digests |= await self._unpacker.unpack(
                key, opened, missing, on_bytes=lambda size: tally.add(size, 0)
            )
        await changing(lambda: self._store.drop_archive(key))
        self._proven.pop(self._store.archive(key), None)
        return digests

    async def _archive(
        self, source: Source, listing: Listing, archive: RemoteFile, tally: Tally
    ) -> RemoteFile:
        """Bring the archive of a listing; the same with the SHA-256 of what was brought."""
        path = self._store.archive(listing.key)
        version = await looking(lambda: _version(path))
        known = self._proven.get(path)
        if known is not None and version is not None and known[0] == version:
            digest = known[1]
            tally.add(archive.size, 0)
        else:
            digest = await self._receive(source, listing, archive, path, tally)
            await looking(lambda: self._note_proven(path, digest, path))
        return replace(archive, digest=Digest("sha256", digest))

    async def _look_inside(
        self, source: Source, listing: Listing, archive: RemoteFile, tally: Tally
    ) -> None:
        """Pin what is in the archive of a listing, and link what is here of it already."""
        opened = await self._archive(source, listing, archive, tally)
        tally.verify()
        found = replace(
            pin(listing.ref, listing.revision, await self._unpacker.contents(listing.key, opened)),
            archive=opened,
        )
        await changing(lambda: self._store.begin(found))
        await self._link_what_is_here(found, tally)

    async def _found(self, path: Path, version: str, file: RemoteFile) -> str | None:
        """The digest of a file that is in the tree already; None if it must be brought.

        What an earlier life wrote is believed only after a hash, and only where a digest was
        promised: without one there is nothing to compare it with.
        """
        known = self._proven.get(path)
        if known is not None and known[0] == version:
            return known[1]
        if file.digest is None:
            return None
        digest = await self._engine.hash(path, size=file.size, promised=file.digest)
        if digest is not None:
            self._proven[path] = (version, digest)
        return digest

    async def _adopt_all(self, listing: Listing, tally: Tally) -> None:
        async def one(file: RemoteFile) -> None:
            if await looking(lambda: self._store.version(listing.key, file.path)) is None:
                await self._adopt(listing, file, tally)

        tally.verify()
        await _each(listing.files, one)

    async def _adopt(self, listing: Listing, file: RemoteFile, tally: Tally) -> str | None:
        """The digest of a file that another agent left and that keeps the promise, linked.

        Where the source promises nothing, its size is all there is to compare: the manifest says so
        (`-`), as of any file of such a source.
        """
        digest = await self._link(listing, file, listing.key, file.path, self._store.adopt)
        if digest is not None:
            tally.link(file.size)
            self._metrics.adopted_bytes.inc(file.size)
        return digest

    async def _share_all(self, listing: Listing, tally: Tally) -> None:
        copies = await looking(self._store.copies)

        async def one(file: RemoteFile) -> None:
            # What is there already is hashed by `fetch`, and replaced only if it is wrong.
            if await looking(lambda: self._store.version(listing.key, file.path)) is None:
                await self._share(listing, file, copies, tally)

        files = [file for file in listing.files if _places(file, copies)]
        if files:
            tally.verify()
            await _each(files, one)

    async def _share(
        self, listing: Listing, file: RemoteFile, copies: Copies, tally: Tally
    ) -> str | None:
        """The digest of a file that another model had, and that is now in the tree of this one as
        well; None if it must be brought (design D5)."""
        for key, path in _places(file, copies):
            if (digest := await self._link(listing, file, key, path, self._store.link)) is not None:
                tally.link(file.size)
                self._metrics.linked_bytes.inc(file.size)
                return digest
        return None

    async def _link(
        self, listing: Listing, file: RemoteFile, key: CacheKey, path: str, link: _Link
    ) -> str | None:
        """Link a file that has a model's place, and whose every byte was hashed just now; its
        digest."""
        source = self._store.model(key) / path
        version = await looking(lambda: _version(source))
        if version is None or version in self._unlinkable:
            return None
        try:
            digest = await self._hashed(source, file)
        except AgentError:  # not to be read: its own model's trouble, this one is fetched
            return None
        if digest is None:
            # Of another version, it was retired or mended while we read.
            if await looking(lambda: _version(source)) == version:
                self.suspected(key, [path])
            return None
        if not await changing(lambda: link(listing.key, file.path, source)):
            self._unlinkable.add(version)
            return None
        target = self._store.tree(listing.key) / file.path
        # Not the very file that was hashed?
        if await looking(lambda: self._store.version(listing.key, file.path)) != version:
            await changing(lambda: self._store.discard(listing.key, file.path))
            return None
        self._proven[target] = (version, digest)
        return digest

    async def _hashed(self, source: Path, file: RemoteFile) -> str | None:
        """The digest of a file that pods may be able to write into, if it keeps the promise.

        Fsynced first: into a page that is mapped and dirty already, more can be written without
        a new time. Bytes that were written during the hash are told by the ctime, which nobody can
        set, even where the mtime was put back. Another name for the file, or one less, changes
        the ctime as well: so it is hashed again, and given up where that goes on.
        """
        for _ in range(_HASHES):
            await changing(lambda: self._store.settle(source))
            before = await looking(lambda: _ctime(source))
            digest = await self._engine.hash(source, size=file.size, promised=file.digest)
            if digest is None or await looking(lambda: _ctime(source)) == before:
                return digest
        raise AgentError(Reason.SOURCE_CHANGED, f"{source} changed each time that it was hashed")

    def _versions(self, proven: Manifest) -> Versions:
        """What its files were when they were proven."""
        known = {file.path: self._proven.get(self._place(proven, file)) for file in proven.files}
        return {path: found[0] for path, found in known.items() if found and found[0]}

    def _place(self, proven: Manifest, file: SealedFile) -> Path:
        return self._store.tree(proven.ref.key) / file.path

    def _forget(self, proven: Manifest) -> None:
        for file in proven.files:
            self._proven.pop(self._place(proven, file), None)

    async def damaged(self, found: Manifest) -> list[str]:
        """Hash every byte of a sealed model; the paths that are not what was sealed."""
        bad = await damaged(self._engine, self._store.model(found.ref.key), found)
        self._metrics.verifications.labels(kind="hash", result="damaged" if bad else "ok").inc()
        return bad


def _places(file: RemoteFile, copies: Copies) -> list[tuple[CacheKey, str]]:
    """Where the promised bytes are. A git blob name is none that a manifest could be asked by."""
    if file.digest is None or file.digest.algorithm != "sha256":
        return []
    return copies.get((file.digest.hex, file.size), [])


async def _each(files: Iterable[RemoteFile], act: Callable[[RemoteFile], Awaitable[None]]) -> None:
    """Act on all files at once, and raise the first failure when all have ended.

    One file's failure does not stop the others, unless it is the disk's: bytes that come now need
    not come after the back-off.
    """
    failures: list[AgentError] = []

    async def one(file: RemoteFile) -> None:
        try:
            await act(file)
        except AgentError as error:
            failures.append(error)
            if error.reason in _HOPELESS:
                raise

    try:
        async with asyncio.TaskGroup() as group:
            # The largest first: the last connection busy should not be on a whole shard.
            for file in sorted(files, key=lambda file: -file.size):
                group.create_task(one(file))
    except* AgentError:
        pass  # in `failures`, like those that did not stop the group
    if failures:
        raise failures[0]


async def damaged(engine: Engine, root: Path, found: Manifest) -> list[str]:
    """The paths below `root` that are not what the manifest says, byte for byte, in its order.

    Behind them what the manifest does not name: who loads by pattern would load that too.
    """

    async def whole(file: SealedFile) -> bool:
        found = await engine.hash(root / file.path, size=file.size, promised=None)
        return found == file.sha256

    results = await asyncio.gather(*(whole(file) for file in found.files))
    bad = [file.path for file, good in zip(found.files, results, strict=True) if not good]
    return bad + await looking(lambda: _strays(root, {file.path for file in found.files}))


def _strays(root: Path, named: set[str]) -> list[str]:
    """Files and symlinks below `root` without a name in the manifest, fit to be printed."""
    found = set()
    for directory, directories, names in os.walk(root):
        links = (name for name in directories if Path(directory, name).is_symlink())
        found |= {str(Path(directory, name).relative_to(root)) for name in (*names, *links)}
    return [path if is_one_line(path) else ascii(path) for path in sorted(found - named)]


def _version(path: Path) -> str | None:
    """None if there is no such file."""
    try:
        return version_of(path.lstat())
    except OSError:
        return None


def _ctime(path: Path) -> int | None:
    """When anything of a file changed last, nanoseconds; None if there is no such file."""
    try:
        return path.lstat().st_ctime_ns
    except OSError:
        return None


def scheme(want: Want) -> str:
    """The label of a source, of a closed set: a wish may name any scheme."""
    scheme, separator, _ = want.ref.uri.partition("://")
    if not separator:
        return "file"
    return scheme if scheme in SCHEMES else "other"
