"""What another agent left in the places of wanted models: looked at, doubted, taken over.

It is served as it is until all that it should be lies proven beside it (`fetch`), and is then
replaced as a whole, when no pod uses it: never written into, never lost before ours is on offer.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from agent.fetch import Fetcher
from agent.manifest import Manifest
from agent.model import CacheKey, Foreign
from agent.removal import Removal
from agent.store import Store
from agent.threads import changing, looking


class Adoption:
    """Of one volume."""

    def __init__(self, store: Store, fetcher: Fetcher, removal: Removal) -> None:
        self._store = store
        self._fetcher = fetcher
        self._removal = removal
        self._wrong: dict[CacheKey, frozenset[str]] = {}

    async def look(self, keys: Iterable[CacheKey]) -> dict[CacheKey, Foreign]:
        """The places of these models that somebody else's directories have, as they are now."""
        seen = await looking(lambda: {key: self._store.foreign(key) for key in keys})
        found = {key: foreign for key, foreign in seen.items() if foreign is not None}
        self._wrong = {key: wrong for key, wrong in self._wrong.items() if key in found}
        return {key: self._doubted(key, foreign) for key, foreign in found.items()}

    def _doubted(self, key: CacheKey, foreign: Foreign) -> Foreign:
        if foreign.lacking is None or key not in self._wrong:
            return foreign
        return replace(foreign, lacking=foreign.lacking | self._wrong[key])

    def doubt(self, key: CacheKey, paths: Iterable[str]) -> None:
        """The bytes of these files are wrong, though their sizes are right. Remembered until other
        files were begun in their place, which says it, too."""
        self._wrong[key] = self._wrong.get(key, frozenset()) | frozenset(paths)

    async def exchange(self, proven: Manifest, still: Callable[[], Awaitable[bool]]) -> bool:
        """Take the place. False: somebody uses it, or nobody can tell, or it may not be taken any
        more (`still`); nothing was changed."""
        key = proven.ref.key
        if not await self._removal.is_unused(key):
            return False
        await self._fetcher.make_ready(proven)  # takes its time; so they are asked once more
        unused = False
        try:
            unused = await self._removal.is_unused(key) and await still()
        finally:
            if not unused:
                await changing(lambda: self._store.cancel_ready(key))
        if unused:
            await self._fetcher.exchange(proven)
        return unused
