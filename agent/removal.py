"""Taking models away (design D3): off offer first, then a last look at who uses it, then its bytes.

Half way everything can still be undone: whoever comes between the plan and the removal keeps the
model. The bytes are unlinked by one worker, and count as reclaimed until it is done.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from agent.errors import AgentError
from agent.model import CacheKey
from agent.store import Store
from agent.threads import changing, looking

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 60.0

InUse = Callable[[], Awaitable[frozenset[CacheKey] | None]]


async def unknown_use() -> frozenset[CacheKey] | None:
    """Without a cluster nobody can list the users of a model: so none is ever evicted."""
    return None


class Removal:
    """Of one volume. `swept` is called when bytes have been given back."""

    def __init__(self, store: Store, in_use_now: InUse, swept: Callable[[], None]) -> None:
        self._store = store
        self._in_use_now = in_use_now
        self._swept = swept
        self._trash = asyncio.Event()
        self.retiring: set[CacheKey] = set()
        """Off offer, and not yet decided."""
        self.reclaiming = 0
        """Bytes that were retired and are not unlinked yet."""
        self._given_back = asyncio.Event()
        self._given_back.set()

    async def retire(
        self, key: CacheKey, size: int, *, still: Callable[[], Awaitable[bool]]
    ) -> bool:
        """False: somebody came, or nobody can tell, or it may not go any more (`still`); it is on
        offer as before."""
        if not await self.is_unused(key):  # most who come have come before it was off offer
            return False
        self.retiring.add(key)
        try:
            await changing(lambda: self._store.begin_retire(key))
            unused = False
            try:
                unused = await self.is_unused(key) and await still()
            finally:  # also where nobody can tell
                if not unused:
                    await changing(lambda: self._store.cancel_retire(key))
            if not unused:
                return False
            await changing(lambda: self._store.finish_retire(key))
        finally:
            self.retiring.discard(key)
        self._reclaim(size)
        return True

    async def is_unused(self, key: CacheKey) -> bool:
        """Not only as far as a watch has heard; False where nobody can tell."""
        used = await self._in_use_now()
        return used is not None and key not in used

    async def abandon(self, key: CacheKey, size: int) -> None:
        """Give up what was begun and is not sealed: so many bytes."""
        await changing(lambda: self._store.abandon(key))
        self._reclaim(size)

    def _reclaim(self, size: int) -> None:
        self.reclaiming += size
        if size:
            self._given_back.clear()
        self.sweep_soon()

    async def given_back(self) -> None:
        """Return when nothing is left to be unlinked, or it cannot be. A plan counts those bytes as
        room: who writes before that would fill the disk above its mark, by as much."""
        await self._given_back.wait()

    def sweep_soon(self) -> None:
        self._trash.set()

    async def run(self) -> None:
        """The one worker that unlinks; until cancelled."""
        while True:
            await self._trash.wait()
            self._trash.clear()
            promised = self.reclaiming
            try:
                await looking(self._store.sweep)  # may be cut off anywhere
            except AgentError as error:
                _log.warning("%s", error.message)
                # And at once where something else is retired: one tree must not hold up all others.
                asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._trash.set)
            self._unlinked(promised)  # what cannot be unlinked does not come back
            self._swept()

    def _unlinked(self, size: int) -> None:
        self.reclaiming -= size
        if self.reclaiming == 0:
            self._given_back.set()
