"""The jobs that run: one a key at most, each a task that ends in a value or a reason."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from agent.errors import AgentError, Reason
from agent.manifest import Manifest
from agent.model import CacheKey, Job, Want
from agent.tally import Tally

Work = Coroutine[Any, Any, Manifest | None]


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[Manifest | None]
    tally: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a job ended: cancelled, with an error, or with what it sealed (None: it only found out
    what is to be brought). `staged`: what it proved is not sealed yet. `listed`: it had asked the
    source what the model is today."""

    want: Want
    cancelled: bool = False
    error: AgentError | None = None
    bug: BaseException | None = None
    sealed: Manifest | None = None
    staged: bool = False
    listed: bool = False


class Jobs:
    """`ended` is called, on the loop, whenever one has."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._running: dict[CacheKey, _Running] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._running

    def __bool__(self) -> bool:
        return bool(self._running)

    def keys(self) -> set[CacheKey]:
        return set(self._running)

    def tally(self, key: CacheKey) -> Tally | None:
        found = self._running.get(key)
        return found.tally if found else None

    def tallies(self) -> dict[CacheKey, Tally]:
        return {key: running.tally for key, running in self._running.items()}

    def jobs(self) -> dict[CacheKey, Job]:
        return {key: running.tally.job for key, running in self._running.items()}

    def begin(self, tally: Tally, work: Work) -> None:
        task = asyncio.create_task(work, name=f"{tally.job.stage} {tally.want.ref.uri}")
        task.add_done_callback(lambda _: self._ended())
        self._running[tally.want.key] = _Running(task, tally)

    async def cancel(self, key: CacheKey) -> None:
        """Stop it, if it still runs, and wait until it has; `take` tells how it ended."""
        if (running := self._running.get(key)) is not None:
            running.task.cancel()
            await asyncio.wait([running.task])

    async def stop(self) -> None:
        """Cancel all. What they brought is kept on the disk."""
        for running in self._running.values():
            running.task.cancel()
        if self._running:
            await asyncio.wait([running.task for running in self._running.values()])

    def take(self) -> list[Ended]:
        """Those that have ended since the last time."""
        done = [key for key, running in self._running.items() if running.task.done()]
        return [_ending(self._running.pop(key)) for key in done]


def _ending(running: _Running) -> Ended:
    want, task = running.tally.want, running.task
    if task.cancelled():
        return Ended(want=want, cancelled=True)
    error = _only(task.exception())
    if error is None:
        return Ended(
            want=want,
            sealed=task.result(),
            staged=running.tally.staged,
            listed=running.tally.lists,
        )
    if isinstance(error, AgentError):
        return Ended(want=want, error=error)
    what = f"{type(error).__name__}: {str(error)[:200]}"
    return Ended(want=want, error=AgentError(Reason.INTERNAL, what), bug=error)


def _only(error: BaseException | None) -> BaseException | None:
    """What a task group was about, where it was about one thing."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
