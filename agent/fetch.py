"""One model, from its URI to its seal: list, bring what is missing, prove, publish. Cancellable.

Whatever ends it, what arrived is kept in the ingest; the next call hashes what it finds and goes on
behind it. So resuming after a crash, mending a damaged model and a plain download are one path.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from agent import manifest
from agent.catalog import Versions
from agent.errors import AgentError, Reason
from agent.examine import Findings, by_name, examine, refuse
from agent.files import version_here
from agent.links import Copies, Links, Suspected, each
from agent.manifest import Manifest
from agent.metrics import Metrics
from agent.model import (
    CacheKey,
    Digest,
    FilePolicy,
    Listing,
    Locator,
    RemoteFile,
    Stage,
    Want,
)
from agent.proven import Proven
from agent.ratelimits import RateLimits
from agent.sources import OWN, SCHEMES, Given, Source, Sources
from agent.sources.base import pin
from agent.store import Store
from agent.tally import Tally
from agent.threads import changing, looking
from agent.transfer import Engine, FileJob
from agent.unpack import Unpacker
from agent.verify import damaged

_log = logging.getLogger(__name__)

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
        self._proven = Proven()
        self._access = access
        self._limits = RateLimits()
        self._file_policy = file_policy
        self._unpacker = Unpacker(store, engine, proven=self._note_proven)
        self.suspected: Suspected = lambda key, paths: None
        self._links = Links(
            store,
            engine,
            metrics=metrics,
            proven=self._proven,
            suspected=lambda key, paths: self.suspected(key, paths),
        )
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
        await self._links.link_all(listing, counts)

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
            place = self._store.tree(proven.ref.key) / file.path
            self._proven.note(place, file.sha256, version=ready[file.path])

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

        await each(listing.files, one)
        return digests

    def _note_proven(self, path: Path, digest: str, found_at: Path) -> None:
        self._proven.note(path, digest, version=version_here(found_at))

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
        here = await self._links.link(listing, file, copies, beside=beside, tally=tally)
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
        self._proven.forget(self._store.archive(key))
        return digests

    async def _archive(
        self, source: Source, listing: Listing, archive: RemoteFile, tally: Tally
    ) -> RemoteFile:
        """Bring the archive of a listing; the same with the SHA-256 of what was brought."""
        path = self._store.archive(listing.key)
        digest = self._proven.digest(path, await looking(lambda: version_here(path)))
        if digest is not None:
            tally.add(archive.size, 0)
        else:
            digest = await self._receive(source, listing, archive, path, tally)
            await looking(partial(self._note_proven, path, digest, path))
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
        await self._links.link_all(found, tally)

    async def _found(self, path: Path, version: str, file: RemoteFile) -> str | None:
        """The digest of a file that is in the tree already; None if it must be brought.

        What an earlier life wrote is believed only after a hash, and only where a digest was
        promised: without one there is nothing to compare it with.
        """
        known = self._proven.digest(path, version)
        if known is not None or file.digest is None:
            return known
        digest = await self._engine.hash(path, size=file.size, promised=file.digest)
        if digest is not None:
            self._proven.note(path, digest, version=version)
        return digest

    def _versions(self, proven: Manifest) -> Versions:
        return self._proven.versions(self._store.tree(proven.ref.key), proven)

    def _forget(self, proven: Manifest) -> None:
        tree = self._store.tree(proven.ref.key)
        self._proven.forget(*(tree / file.path for file in proven.files))

    async def damaged(self, found: Manifest) -> list[str]:
        """Hash every byte of a sealed model; the paths that are not what was sealed."""
        bad = await damaged(self._engine, self._store.model(found.ref.key), found)
        self._metrics.verifications.labels(kind="hash", result="damaged" if bad else "ok").inc()
        return bad


def scheme(want: Want) -> str:
    """The label of a source, of a closed set: a wish may name any scheme."""
    scheme, separator, _ = want.ref.uri.partition("://")
    if not separator:
        return "file"
    return scheme if scheme in SCHEMES else "other"
