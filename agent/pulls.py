"""Who waits for a model, beside the desired state, and the answers they get."""

import asyncio
from collections.abc import Container
from dataclasses import dataclass, field

from agent.errors import AgentError, Reason
from agent.known import Known
from agent.model import CacheKey, Entry, Want
from agent.tally import Tally


@dataclass(slots=True)
class Pull:
    """A model that somebody waits for. Ends at the first failure."""

    want: Want
    done: asyncio.Future[Entry]
    waiting: int = 0
    tallies: list[Tally] = field(default_factory=list)

    @property
    def received(self) -> int:
        """Bytes that came for this model since it is waited for, and of the download it joined."""
        return sum(tally.received for tally in self.tallies)

    @property
    def linked(self) -> int:
        """Bytes that other models had already, in the same jobs."""
        return sum(tally.linked for tally in self.tallies)


class Pulls:
    """The pulls without an answer: one a key at most, shared by all who wait for it."""

    def __init__(self) -> None:
        self._open: dict[CacheKey, Pull] = {}

    def wants(self) -> dict[CacheKey, Want]:
        return {key: pull.want for key, pull in self._open.items()}

    def join(self, want: Want, running: Tally | None) -> Pull:
        """One more who waits. `running` is the job that is on it already. Raises Conflict."""
        pull = self._open.get(want.key)
        if pull is not None and pull.want != want:
            raise AgentError(
                Reason.CONFLICT,
                f"{want.ref.uri} is being pulled with another expected fingerprint; wait for it",
            )
        if pull is None:
            pull = Pull(want, asyncio.get_running_loop().create_future())
            # Whoever waited may be gone: that is no reason to complain at exit.
            pull.done.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._open[want.key] = pull
            if running is not None:
                pull.tallies.append(running)
        pull.waiting += 1
        return pull

    def leave(self, pull: Pull) -> None:
        """One less; a pull that nobody waits for is no want any more."""
        pull.waiting -= 1
        if pull.waiting == 0 and self._open.get(pull.want.key) is pull:
            del self._open[pull.want.key]

    def begun(self, tally: Tally) -> None:
        """A job began: who waits for its model counts its bytes."""
        if (pull := self._open.get(tally.want.key)) is not None:
            pull.tallies.append(tally)

    def answer(self, known: Known, running: Container[CacheKey]) -> None:
        """End the waits that have an answer. A want that is only queued keeps waiting."""
        for key, pull in list(self._open.items()):
            entry, refusal = known.whole(key), known.refusal(key)
            if entry is not None:
                pull.done.set_result(entry)
            elif refusal is not None and key not in running:
                pull.done.set_exception(refusal)
            else:
                continue
            del self._open[key]

    def refuse_all(self, error: AgentError) -> None:
        for pull in self._open.values():
            pull.done.set_exception(error)
        self._open.clear()
