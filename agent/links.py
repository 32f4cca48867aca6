"""Names in an ingest for files that the volume has already: no byte of them is brought (design D5).

Of other models, or of what another agent left in this one's place. Each is hashed before its name
is given: pods may be able to write into it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from agent.errors import AgentError, Reason
from agent.files import version_here
from agent.metrics import Metrics
from agent.model import CacheKey, Listing, RemoteFile
from agent.proven import Proven
from agent.store import Store
from agent.tally import Tally
from agent.threads import changing, looking
from agent.transfer import Engine

Copies = dict[tuple[str, int], list[tuple[CacheKey, str]]]
"""Where sealed models have a file, by its SHA-256 and size (`Catalog.copies`)."""

Suspected = Callable[[CacheKey, list[str]], None]
"""Told, on the loop, of files of a sealed model, or of what another agent left in the place of one,
whose bytes turned out wrong."""

# What one file's failure says about all others too: going on would only repeat it.
_HOPELESS = frozenset(
    {Reason.DISK_FULL, Reason.READ_ONLY, Reason.PERMISSION_DENIED, Reason.DISK_ERROR}
)

_HASHES = 5  # of one file, while others give it names

_Give = Callable[[CacheKey, str, Path], bool]
"""`Store.link`, or `Store.adopt`."""


class Links:
    """Of one store. What is linked is noted as `proven`."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        *,
        metrics: Metrics,
        proven: Proven,
        suspected: Suspected,
    ) -> None:
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._proven = proven
        self._suspected = suspected
        # Versions of files that cannot be linked: a hash of them would be in vain once more.
        self._unlinkable: set[str] = set()

    async def link_all(self, listing: Listing, tally: Tally) -> None:
        """Whatever is here of a listing, so that room is reserved for the rest only."""
        foreign = await looking(lambda: self._store.foreign(listing.key))
        if foreign is not None and foreign.obstacle:
            return  # whatever is built, it could not take that place
        beside = foreign is not None
        copies = await looking(self._store.copies)
        files = [file for file in listing.files if beside or _places(file, copies)]

        async def one(file: RemoteFile) -> None:
            # What is there already is hashed by `fetch`, and replaced only if it is wrong.
            if await looking(lambda: self._store.version(listing.key, file.path)) is None:
                await self.link(listing, file, copies, beside=beside, tally=tally)

        if files:
            tally.verify()
            await each(files, one)

    async def link(
        self, listing: Listing, file: RemoteFile, copies: Copies, *, beside: bool, tally: Tally
    ) -> str | None:
        """The digest of a file that has its name now; None if it must be brought. `beside`: another
        agent left something in this model's place.

        Of that, where the source promises nothing, the size is all there is to compare: the
        manifest says so (`-`), as of any file of such a source.
        """
        adopt, link = self._store.adopt, self._store.link
        adopted, linked = self._metrics.adopted_bytes, self._metrics.linked_bytes
        places = [(listing.key, file.path, adopt, adopted)] if beside else []
        places += [(key, path, link, linked) for key, path in _places(file, copies)]
        for key, path, give, counter in places:
            if (digest := await self._give(listing, file, key, path, give)) is not None:
                tally.link(file.size)
                counter.inc(file.size)
                return digest
        return None

    async def _give(
        self, listing: Listing, file: RemoteFile, key: CacheKey, path: str, give: _Give
    ) -> str | None:
        """Link a file that has a model's place, and whose every byte was hashed just now; its
        digest."""
        source = self._store.model(key) / path
        version = await looking(lambda: version_here(source))
        if version is None or version in self._unlinkable:
            return None
        try:
            digest = await self._hashed(source, file)
        except AgentError:  # not to be read: its own model's trouble, this one is fetched
            return None
        if digest is None:
            # Of another version, it was retired or mended while we read.
            if await looking(lambda: version_here(source)) == version:
                self._suspected(key, [path])
            return None
        if not await changing(lambda: give(listing.key, file.path, source)):
            self._unlinkable.add(version)
            return None
        target = self._store.tree(listing.key) / file.path
        # Not the very file that was hashed?
        if await looking(lambda: self._store.version(listing.key, file.path)) != version:
            await changing(lambda: self._store.discard(listing.key, file.path))
            return None
        self._proven.note(target, digest, version=version)
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


async def each(files: Iterable[RemoteFile], act: Callable[[RemoteFile], Awaitable[None]]) -> None:
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


def _places(file: RemoteFile, copies: Copies) -> list[tuple[CacheKey, str]]:
    """Where the promised bytes are. A git blob name is none that a manifest could be asked by."""
    if file.digest is None or file.digest.algorithm != "sha256":
        return []
    return copies.get((file.digest.hex, file.size), [])


def _ctime(path: Path) -> int | None:
    """When anything of a file changed last, nanoseconds; None if there is no such file."""
    try:
        return path.lstat().st_ctime_ns
    except OSError:
        return None
