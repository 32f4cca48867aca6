"""Who has shown that his own credentials lead to a model that is here already (design D12).

Several caches of one URI share its bytes, and one's credentials brought them. A cache of a
namespace that names credentials is said to be here only once these have been given the model's
listing and a byte of it: a wrong token is told to its owner, and not hidden by another's right one.

One proof is enough. It is kept in the index under the cache's name, with a digest of what the cache
names, so that neither a restart nor a source or an API server that is away takes back what was
proven. Who names other credentials proves them anew; after an index was lost, all do.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Container, Mapping
from dataclasses import dataclass
from math import inf

from agent.backoff import LONGEST_SECONDS, Dice, next_attempt
from agent.errors import AgentError, Reason
from agent.index import Index
from agent.model import Attempt, CacheKey, Want

_log = logging.getLogger(__name__)

_AT_ONCE = 4

Prove = Callable[[Want], Awaitable[None]]
"""Ask the source of a want, with the want's own credentials. Raises AgentError."""


@dataclass(slots=True)
class _Try:
    credentials: str
    task: asyncio.Task[None] | None = None
    failed: Attempt | None = None


class Proofs:
    """Of one volume. `changed` is called, on the loop, when a try has ended."""

    def __init__(
        self,
        index: Index,
        prove: Prove,
        *,
        changed: Callable[[], None],
        clock: Callable[[], float],
        dice: Dice,
    ) -> None:
        self._index = index
        self._prove = prove
        self._changed = changed
        self._clock = clock
        self._dice = dice
        self._guarded: Mapping[str, Want] = {}
        self._proven: dict[str, str] = {}
        self._tries: dict[str, _Try] = {}
        self._gate = asyncio.Semaphore(_AT_ONCE)

    async def open(self) -> None:
        """Learn what was proven in an earlier life."""
        self._proven = await self._index.access_proofs()

    async def stop(self) -> None:
        tasks = [tried.task for tried in self._tries.values() if tried.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._tries.clear()

    # -- asking -------------------------------------------------------------------------------

    def doubts(self) -> dict[str, Attempt | None]:
        """The caches that have not shown it, with the last failure where there was one."""
        return {
            name: tried.failed if (tried := self._tries.get(name)) else None
            for name, want in self._guarded.items()
            if not self._is_proven(name, want)
        }

    @property
    def next_at(self) -> float:
        """When the next try is due, Unix seconds."""
        failed = (tried.failed for tried in self._tries.values() if tried.task is None)
        return min((attempt.retry_at for attempt in failed if attempt), default=inf)

    def _is_proven(self, name: str, want: Want) -> bool:
        return self._proven.get(name) == _credentials(want)

    # -- the loop -----------------------------------------------------------------------------

    async def turn(self, guarded: Mapping[str, Want], here: Container[CacheKey]) -> None:
        """Learn from the tries that ended, and begin those that are due: of models that are here or
        on their way. Of others their own download says what is wrong."""
        self._guarded = guarded
        for name, tried in list(self._tries.items()):
            want = guarded.get(name)
            if want is None or want.key not in here or _credentials(want) != tried.credentials:
                if tried.task is not None:
                    tried.task.cancel()
                del self._tries[name]
            elif tried.task is not None and tried.task.done():
                await self._settle(name, want, tried, tried.task)
        for name, want in guarded.items():
            if want.key in here and not self._is_proven(name, want):
                self._begin(name, want)

    def _begin(self, name: str, want: Want) -> None:
        tried = self._tries.setdefault(name, _Try(_credentials(want)))
        # A clock that was set back must not put it off for years.
        left = tried.failed.retry_at - self._clock() if tried.failed else 0.0
        waits = 0.0 < left <= LONGEST_SECONDS or left == inf
        if tried.task is None and not waits:
            tried.task = asyncio.create_task(self._try(want), name=f"proof of {name}")
            tried.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # seen, also where nobody asks any more
        self._changed()

    async def _try(self, want: Want) -> None:
        async with self._gate:
            await self._prove(want)

    async def _settle(self, name: str, want: Want, tried: _Try, task: asyncio.Task[None]) -> None:
        tried.task, error = None, task.exception()
        if error is None:
            await self._record(name, tried.credentials)
            return
        if not isinstance(error, AgentError):
            _log.error("the credentials of %s cannot be tried", name, exc_info=error)
            error = AgentError(Reason.INTERNAL, f"{type(error).__name__}: {str(error)[:200]}")
        tried.failed = next_attempt(
            want.key, tried.failed, error, now=self._clock(), dice=self._dice
        )
        _log.warning("the credentials of %s are not proven: %s", name, error.message)

    async def _record(self, name: str, credentials: str) -> None:
        self._proven[name] = credentials
        self._tries.pop(name, None)
        await self._index.record_access_proof(name, credentials, self._clock())


def _credentials(want: Want) -> str:
    """Which credentials it names. A digest: parameters of a cache may hold a secret."""
    return hashlib.sha256(want.access.encode()).hexdigest()
