"""From an archive in an ingest to proven files in its tree (design D3, kserve.md 5.3)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from agent import layout
from agent.disk import space
from agent.model import CacheKey, RemoteFile
from agent.store import Store
from agent.threads import looking
from agent.transfer import Engine, Target


class Unpacker:
    """Of one store. `proven` is told, in any thread, of each file that is to have its place now,
    with its SHA-256, and where it is until then."""

    def __init__(
        self, store: Store, engine: Engine, *, proven: Callable[[Path, str, Path], None]
    ) -> None:
        self._store = store
        self._engine = engine
        self._proven = proven

    async def contents(self, key: CacheKey, archive: RemoteFile) -> list[RemoteFile]:
        """What is in the archive of an ingest, hashed. Raises BadArchive, UnsafePath."""
        most = (await looking(lambda: space(self._store.root))).capacity
        path = self._store.archive(key)
        return await self._engine.contents(path, _kind(archive), most_bytes=most)

    async def unpack(
        self,
        key: CacheKey,
        archive: RemoteFile,
        missing: Sequence[RemoteFile],
        *,
        on_bytes: Callable[[int], None],
    ) -> dict[str, str]:
        """Write what is missing and give it its names; its SHA-256 by path."""
        origins = {file.path: file.origin for file in missing}
        if not all(origins.values()):  # a manifest does not know what is a link to what
            origins |= {file.path: file.origin for file in await self.contents(key, archive)}
        digests: dict[str, str] = {}
        targets: dict[str, list[Target]] = {}
        for file in missing:
            target = self._target(key, file, digests.__setitem__)
            targets.setdefault(origins[file.path] or file.path, []).append(target)
        path = self._store.archive(key)
        await self._engine.unpack(path, _kind(archive), targets, on_bytes=on_bytes)
        return digests

    def _target(self, key: CacheKey, file: RemoteFile, told: Callable[[str, str], None]) -> Target:
        assert file.digest is not None  # of the first reading, or of the manifest
        digest, partial = file.digest, self._store.partial(key) / file.path

        def proven() -> None:
            self._proven(self._store.tree(key) / file.path, digest.hex, partial)
            self._store.promote(key, file.path)
            told(file.path, digest.hex)

        return Target(
            path=partial,
            size=file.size,
            promised=digest,
            proven=proven,
        )


def _kind(archive: RemoteFile) -> layout.ArchiveKind:
    kind = layout.archive_kind(archive.path)
    assert kind is not None  # else its source would not have packed it
    return kind
