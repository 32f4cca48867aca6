"""One model, from its URI to its seal: list, bring what is missing, prove, publish. Cancellable.

Whatever ends it, what arrived is kept in the ingest; the next call hashes what it finds and goes on
behind it. So resuming after a crash, mending a damaged model and a plain download are one path.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent import manifest
from agent.errors import AgentError, Reason
from agent.files import version_of
from agent.layout import is_one_line
from agent.manifest import Manifest, SealedFile
from agent.metrics import Metrics
from agent.model import Job, Listing, Locator, RemoteFile, Stage, Want
from agent.sources import SCHEMES, Source, Sources
from agent.store import Store
from agent.threads import changing, looking
from agent.transfer import Engine, FileJob

# What one file's failure says about all others too: going on would only repeat it.
_HOPELESS = frozenset(
    {Reason.DISK_FULL, Reason.READ_ONLY, Reason.PERMISSION_DENIED, Reason.DISK_ERROR}
)


class Tally:
    """How far one model is. Written by transfer threads, read by the loop."""

    def __init__(self, want: Want, *, stage: Stage, total: int | None = None) -> None:
        self.want = want
        self.total = total
        self.received = 0
        self.begun_at = time.monotonic()
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

    @property
    def job(self) -> Job:
        return Job(key=self.want.key, stage=self._stage, total=self.total, done=self._done)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun_at


class Fetcher:
    """Brings models into one store."""

    def __init__(
        self,
        *,
        store: Store,
        sources: Sources,
        engine: Engine,
        metrics: Metrics,
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

    def check(self, want: Want) -> None:
        """Raise InvalidSpec or Unsupported for a URI that no source can ever list."""
        self._sources.of(want.ref.uri).check(want.ref)

    async def resolve(self, want: Want) -> None:
        """Ask the source what the model is today, and pin the answer in the store."""
        listing = await self._sources.of(want.ref.uri).list(want.ref)
        await changing(lambda: self._store.begin(listing))

    async def fetch(self, tally: Tally) -> Manifest:
        """Bring and prove every file of the pinned listing, then seal. Raises AgentError."""
        want = tally.want
        source = self._sources.of(want.ref.uri)
        listing = await changing(lambda: self._pinned(want))
        tally.total = listing.bytes
        digests = await self._files(source, listing, tally)
        sealed = manifest.seal(listing, digests, sealed_at=int(self._clock()))
        expected = want.expect_fingerprint
        if expected is not None and sealed.fingerprint != expected:
            raise AgentError(
                Reason.FINGERPRINT_MISMATCH,
                f"{want.ref.uri} at {listing.revision} is {sealed.fingerprint}, not {expected}",
            )
        await changing(lambda: self._store.seal(sealed))
        self._forget(listing)
        self._metrics.download_done(scheme(want), size=listing.bytes, seconds=tally.seconds)
        return sealed

    def _pinned(self, want: Want) -> Listing:
        listing = self._store.listing(want.key)
        if listing is None:
            raise AgentError(Reason.SOURCE_CHANGED, f"{want.ref.uri} is to be listed again")
        self._store.begin(listing)  # after a crash or a repair, directories may be missing
        return listing

    async def _files(self, source: Source, listing: Listing, tally: Tally) -> dict[str, str]:
        """The SHA-256 of every file, by path.

        One file's failure does not stop the others, unless it is the disk's: bytes that come now
        need not come after the back-off.
        """
        digests: dict[str, str] = {}
        failures: list[AgentError] = []

        async def one(file: RemoteFile) -> None:
            try:
                digests[file.path] = await self._file(source, listing, file, tally)
            except AgentError as error:
                failures.append(error)
                if error.reason in _HOPELESS:
                    raise

        try:
            async with asyncio.TaskGroup() as group:
                # The largest first: the last connection busy should not be on a whole shard.
                for file in sorted(listing.files, key=lambda file: -file.size):
                    group.create_task(one(file))
        except* AgentError:
            pass  # in `failures`, like those that did not stop the group
        if failures:
            raise failures[0]
        return digests

    async def _file(self, source: Source, listing: Listing, file: RemoteFile, tally: Tally) -> str:
        key, proven = listing.key, self._store.tree(listing.key) / file.path
        if (version := await looking(lambda: _version(proven))) is not None:
            if (digest := await self._found(proven, version, file)) is not None:
                tally.add(file.size, 0)
                return digest
            await changing(lambda: self._store.discard(key, file.path))

        async def locate() -> Locator:
            return await source.locate(listing, file)

        received_bytes = self._metrics.download_bytes.labels(source=scheme(tally.want))

        def on_bytes(done: int, received: int) -> None:
            tally.add(done, received)
            received_bytes.inc(received)

        def on_retry(error: AgentError) -> None:
            self._metrics.retries.labels(source=scheme(tally.want), reason=error.reason.value).inc()

        digest = await self._engine.fetch(
            FileJob(
                path=self._store.partial(key) / file.path,
                size=file.size,
                promised=file.digest,
                locate=locate,
                on_bytes=on_bytes,
                on_retry=on_retry,
            )
        )
        await changing(lambda: self._store.promote(key, file.path))
        self._proven[proven] = (await looking(lambda: _version(proven)), digest)
        return digest

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
        return await self._engine.hash(path, size=file.size, promised=file.digest)

    def _forget(self, listing: Listing) -> None:
        tree = self._store.tree(listing.key)
        for file in listing.files:
            self._proven.pop(tree / file.path, None)

    async def damaged(self, found: Manifest) -> list[str]:
        """Hash every byte of a sealed model; the paths that are not what was sealed."""
        bad = await damaged(self._engine, self._store.model(found.ref.key), found)
        self._metrics.verifications.labels(kind="hash", result="damaged" if bad else "ok").inc()
        return bad


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


def scheme(want: Want) -> str:
    """The label of a source, of a closed set: a wish may name any scheme."""
    scheme, separator, _ = want.ref.uri.partition("://")
    if not separator:
        return "file"
    return scheme if scheme in SCHEMES else "other"
