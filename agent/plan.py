"""What to do next, from all that is known (aesthetics 2.5). Pure: no clock, no disk, no order.

Called again after every change; it remembers nothing, so it can be wrong only about now. Order of
decisions: stop what nobody wants, take damaged models off offer, remove what left the desired
state, make room where the file system is above its high mark, serve missing wants by priority.
"""

from collections.abc import Iterable, Mapping
from math import inf

from agent.model import (
    Abandon,
    Action,
    Actual,
    Attempt,
    Block,
    Blocked,
    CacheKey,
    Cancel,
    Entry,
    Evict,
    Fetch,
    Ingest,
    Job,
    Plan,
    Resolve,
    Volume,
    Want,
    Withdraw,
    quantity,
)


def plan(desired: Mapping[CacheKey, Want], actual: Actual, volume: Volume, *, now: float) -> Plan:
    """Decide for one volume. `now` is Unix seconds.

    Properties (tests/core/test_plan.py): nothing wanted, used, young or of unknown use is evicted;
    at most one action a key; what is begun fits; nothing is evicted in vain; every want is exactly
    one of ready, running, begun, taken off offer or blocked; carrying plans out reaches quiescence.
    """
    return _Planner(desired, actual, volume, now).run()


class _Planner:
    """One run of `plan`: the facts, and the actions and room so far."""

    def __init__(
        self, desired: Mapping[CacheKey, Want], actual: Actual, volume: Volume, now: float
    ) -> None:
        self.desired = desired
        self.actual = actual
        self.volume = volume
        self.now = now
        self.actions: list[Action] = []
        self.blocked: dict[CacheKey, Block] = {}
        self.wake_at = inf
        # Only what keeps running counts: a cancelled job gives its slot and its room back.
        running = [job for key, job in actual.jobs.items() if key in desired]
        self.slots = max(0, volume.max_fetches - len(running))
        self.ceiling = int(volume.capacity * volume.high)
        reserved = sum(self._to_come(job) for job in running)
        self.room = self.ceiling - volume.used - reserved + volume.reclaiming
        self.victims = self._victims()

    def run(self) -> Plan:
        self._cancel_the_unwanted()
        self._withdraw_the_damaged()
        self._remove_what_left()
        self._drain_to_the_low_mark()
        for want in self._missing_wants():
            self._serve(want)
        return Plan(
            actions=tuple(self.actions),
            blocked=self.blocked,
            wake_at=self.wake_at if self.wake_at < inf else None,
        )

    def _to_come(self, job: Job) -> int:
        """The bytes that a running job will still write.

        `job.remaining` is what it has not proven yet. Of that, what an ingest had already when the
        job began is only hashed again: reserving it would count it twice, and evict for it.
        """
        ingest = self.actual.ingests.get(job.key)
        bounds = (job.remaining, None if ingest is None else ingest.remaining)
        return min((bound for bound in bounds if bound is not None), default=0)

    def _cancel_the_unwanted(self) -> None:
        for key in sorted(self.actual.jobs):
            if key not in self.desired:
                self.actions.append(Cancel(key))

    def _withdraw_the_damaged(self) -> None:
        """At once, used or not: wrong bytes on offer are the worst state there is."""
        for key in sorted(self.actual.damaged):
            if key in self.actual.entries and key not in self.actual.jobs:
                self.actions.append(Withdraw(key))

    def _remove_what_left(self) -> None:
        """What its users took out of the desired state goes at once, unless a pod still reads it.

        Its age does not matter: this is no guess about who may come, somebody has said so.
        """
        used = self.actual.in_use
        for key in sorted(self.actual.left - set(self.desired) - set(self.actual.jobs)):
            entry = self.actual.entries.get(key)
            if used is None or key in used or key in self.actual.damaged:
                continue
            if entry is not None:
                self.actions.append(Evict(key, entry.bytes))
                self.room += entry.bytes
                self.victims = [victim for victim in self.victims if victim.key != key]
            elif key in self.actual.ingests or key in self.actual.begun:
                self.actions.append(Abandon(key))

    def _victims(self) -> list[Entry]:
        """What may be evicted, least recently used first. What frees nothing is no victim."""
        used = self.actual.in_use
        if used is None:
            return []
        old = self.now - self.volume.min_age_seconds
        return sorted(
            (
                entry
                for key, entry in self.actual.entries.items()
                if key not in self.desired
                and key not in used
                and key not in self.actual.kept
                and key not in self.actual.damaged
                and key not in self.actual.jobs
                and entry.sealed_at <= old
                and entry.bytes > 0
            ),
            key=lambda entry: (entry.last_used, entry.sealed_at, entry.key),
        )

    def _evict(self, victims: Iterable[Entry]) -> None:
        for entry in victims:
            self.actions.append(Evict(entry.key, entry.bytes))
            self.victims.remove(entry)
            self.room += entry.bytes

    def _drain_to_the_low_mark(self) -> None:
        if self.room >= 0:
            return
        slack = self.ceiling - int(self.volume.capacity * self.volume.low)
        self._evict(_just_enough(self.victims, slack - self.room))

    def _missing_wants(self) -> list[Want]:
        missing = (
            want
            for key, want in self.desired.items()
            if key not in self.actual.jobs and key not in self.actual.entries
        )
        return sorted(missing, key=lambda want: (-want.priority, want.key))

    def _serve(self, want: Want) -> None:
        """Begin one missing want, or say why not."""
        key = want.key
        attempt = self.actual.attempts.get(key)
        if attempt is not None and attempt.retry_at > self.now:
            self._back_off(attempt)
            return
        if self.slots == 0:
            self._block(key, Blocked.QUEUED, f"waits for one of {self.volume.max_fetches} slots")
            return
        ingest = self.actual.ingests.get(key)
        if ingest is None:
            self.slots -= 1
            self.actions.append(Resolve(key))
            return
        self._begin(key, ingest)

    def _begin(self, key: CacheKey, ingest: Ingest) -> None:
        """Fetch what is missing of a known listing, evicting just enough, or say what is short."""
        if ingest.remaining == 0:
            # All of it is here and must only be proven: that needs no room, whatever the marks say.
            self._fetch(key, 0)
            return
        if ingest.total > self.ceiling:
            self._block(
                key,
                Blocked.LARGER_THAN_VOLUME,
                f"needs {quantity(ingest.total)}; this volume may hold {quantity(self.ceiling)} of"
                f" {quantity(self.volume.capacity)}",
            )
            return
        short = ingest.remaining - self.room
        victims = _just_enough(self.victims, short)
        if short > sum(entry.bytes for entry in victims):
            # Half an eviction helps nobody. A smaller want behind this one may still begin.
            self._block(
                key,
                Blocked.INSUFFICIENT_CAPACITY,
                f"needs {quantity(ingest.remaining)} more; {quantity(max(0, self.room))} are free"
                " below the high mark and"
                f" {quantity(sum(entry.bytes for entry in self.victims))} could be evicted",
            )
            return
        self._evict(victims)
        self._fetch(key, ingest.remaining)

    def _fetch(self, key: CacheKey, size: int) -> None:
        self.room -= size
        self.slots -= 1
        self.actions.append(Fetch(key, size))

    def _back_off(self, attempt: Attempt) -> None:
        self._block(attempt.key, Blocked.BACKING_OFF, attempt.message)
        self.wake_at = min(self.wake_at, attempt.retry_at)

    def _block(self, key: CacheKey, why: Blocked, message: str) -> None:
        self.blocked[key] = Block(why=why, message=message)


def _just_enough(victims: Iterable[Entry], short: int) -> list[Entry]:
    """The first of the victims, in their order, that free `short` bytes; all if they do not."""
    chosen: list[Entry] = []
    for entry in victims:
        if short <= 0:
            break
        chosen.append(entry)
        short -= entry.bytes
    return chosen
