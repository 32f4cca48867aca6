"""Models that somebody wants away now, whatever the marks say, and who waits to hear of it."""

import asyncio
from collections.abc import Callable, Mapping

from agent.errors import AgentError, Reason
from agent.model import Actual, CacheKey, Volume, Want
from agent.victims import keeps
from agent.why import KEPT


class Outcasts:
    """Asked by anybody, answered by the loop. `asked` wakes it."""

    def __init__(self, asked: Callable[[], None]) -> None:
        self._asked = asked
        self._answers: dict[CacheKey, asyncio.Future[int]] = {}
        self._stopped: AgentError | None = None

    @property
    def keys(self) -> frozenset[CacheKey]:
        return frozenset(self._answers)

    async def evict(self, key: CacheKey) -> int:
        """Wait until it is gone; the bytes that this frees. Raises Kept with what keeps it."""
        if self._stopped is not None:
            raise self._stopped
        if key not in self._answers:
            answer = asyncio.get_running_loop().create_future()
            # Whoever asked may be gone: that is no reason to complain at exit.
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._answers[key] = answer
        self._asked()
        return await asyncio.shield(self._answers[key])

    def gone(self, key: CacheKey, freed: int) -> None:
        if (answer := self._answers.get(key)) is not None:
            answer.set_result(freed)

    def answer(
        self, wants: Mapping[CacheKey, Want], actual: Actual, volume: Volume, now: float
    ) -> None:
        """After a turn that saw all this: whoever is not gone by now is kept, and why."""
        for key in actual.outcast:  # others came during this turn, and wait for the next
            answer = self._answers.pop(key)
            if answer.done():
                continue
            entry = actual.entries.get(key)
            kept = entry and keeps(key, wants, actual, volume, now)
            why = KEPT[kept] if kept else "it is in use, or nobody can tell now; try again"
            if entry is None:
                absent = f"{key} is not on offer here; see localmodel ls"
                answer.set_exception(AgentError(Reason.INVALID_SPEC, absent))
            else:
                answer.set_exception(AgentError(Reason.KEPT, f"{entry.ref.uri}: {why}"))
        if self._answers:
            self._asked()

    def refuse_all(self, error: AgentError, *, for_good: bool = False) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        self._answers.clear()
        if for_good:
            self._stopped = error
