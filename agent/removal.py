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
        self.reclaiming = 0
        """Bytes that were retired and are not unlinked yet."""

    async def retire(self, key: CacheKey, size: int) -> bool:
        """False: somebody came, or nobody can tell; it is on offer as before."""
        await changing(lambda: self._store.begin_retire(key))
        used = None
        try:
            used = await self._in_use_now()
        finally:  # also where nobody can tell
            if used is None or key in used:
                await changing(lambda: self._store.cancel_retire(key))
        if used is None or key in used:
            return False
        await changing(lambda: self._store.finish_retire(key))
        self.reclaiming += size
        self.sweep_soon()
        return True

    async def abandon(self, key: CacheKey) -> None:
        """Give up what was begun and is not sealed."""
        await changing(lambda: self._store.abandon(key))
        self.sweep_soon()

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
            self.reclaiming -= promised
            self._swept()
