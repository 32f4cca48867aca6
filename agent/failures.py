"""What failed, and when each is tried again. Written down before it is shown: the next life must
know what this one refused."""

from collections.abc import Callable
from dataclasses import replace
from math import inf

from agent.backoff import LONGEST_SECONDS, Dice, next_attempt
from agent.errors import AgentError, Reason
from agent.index import Index
from agent.known import Known
from agent.model import Attempt, CacheKey, Want

# These reasons say that the pinned listing is not to be trusted any more.
_LIST_AGAIN = frozenset(
    {
        *(Reason.SOURCE_CHANGED, Reason.FILE_NOT_FOUND, Reason.SIZE_MISMATCH),
        # Of an archive: a better one may be there by then.
        *(Reason.BAD_ARCHIVE, Reason.UNSAFE_PATH, Reason.EMPTY_LISTING),
    }
)


class Failures:
    """The `attempts` of what is known. Only the loop calls what waits."""

    def __init__(
        self, known: Known, index: Index, *, clock: Callable[[], float], dice: Dice
    ) -> None:
        self._known = known
        self._index = index
        self._clock = clock
        self._dice = dice
        self._list_again: set[CacheKey] = set()
        self._forgiven: set[CacheKey] = set()
        self._failing: dict[CacheKey, Attempt] = {}

    async def open(self) -> dict[CacheKey, Attempt]:
        """Learn those of an earlier life. Returns all, also what is tried again at once."""
        found = await self._index.attempts()
        # A restart is a reason to try what would otherwise never be tried again.
        self._known.attempts = {k: a for k, a in found.items() if a.retry_at != inf}
        self._list_again = {k for k, a in found.items() if a.reason in _LIST_AGAIN}
        return found

    async def note(self, *failures: tuple[Want, AgentError]) -> None:
        """A pull or a changed wish that comes while it is written down forgives it (`forgive`)."""
        self._failing = {want.key: self._next_attempt(want, error) for want, error in failures}
        for attempt in list(self._failing.values()):
            await self._index.record_attempt(attempt)
        self._known.attempts |= self._failing
        self._failing = {}

    def forgive(self, key: CacheKey) -> None:
        """A changed wish, or somebody who asks by name: tried again now, whatever failed before."""
        before = self._known.attempts.pop(key, None) or self._failing.pop(key, None)
        if before is not None:
            self._forgiven.add(key)

    async def forget_the_forgiven(self) -> None:
        while self._forgiven:
            await self._index.forgive(self._forgiven.pop())

    def listed(self, key: CacheKey) -> None:
        """The source was asked again, and its answer is pinned."""
        self._list_again.discard(key)

    def is_to_be_listed(self, key: CacheKey) -> bool:
        """Whether the source must be asked again before anything is fetched."""
        return key in self._list_again

    def attempts(self) -> dict[CacheKey, Attempt]:
        """All that are known. A clock that was wrong when one failed must not put the next try off
        for years."""
        latest = self._clock() + LONGEST_SECONDS
        return {
            key: attempt
            if attempt.retry_at == inf or attempt.retry_at <= latest
            else replace(attempt, retry_at=latest)
            for key, attempt in self._known.attempts.items()
        }

    def _next_attempt(self, want: Want, error: AgentError) -> Attempt:
        if error.reason in _LIST_AGAIN:
            self._list_again.add(want.key)
        before = self._known.attempts.get(want.key)
        return next_attempt(want.key, before, error, now=self._clock(), dice=self._dice)
