"""What to do next, from all that is known (aesthetics 2.5). Pure: no clock, no disk, no order.

Called again after every change; it remembers nothing, so it can be wrong only about now. Order of
decisions: stop what nobody wants, take damaged models off offer, remove what left the desired
state or has expired, make room where the marks or the limit are exceeded, serve missing wants by
priority.
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
    Evict,
    Exchange,
    Fetch,
    Ingest,
    Job,
    Kept,
    Plan,
    Resolve,
    Volume,
    Want,
    Why,
    Withdraw,
    quantity,
)
from agent.victims import Links, Victim, keeps, victims

STARVED_SECONDS = 3600.0
"""Whoever has been short of room for so long gets the next room that there is (aesthetics 2.12),
for as long again; then others for as long, and so on: what it waits for may never end."""


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
        models = (actual.entries, actual.ingests, actual.foreign)
        self.links = Links([one for kind in models for one in kind.values()])
        reserved = sum(self._to_come(job) for job in running)
        ours = sum(entry.bytes for entry in actual.entries.values()) - self.links.saved
        ours += sum(ingest.done for ingest in actual.ingests.values())
        ours += sum(foreign.bytes for foreign in actual.foreign.values())
        self.room_on_disk = self.ceiling - volume.used - reserved + volume.reclaiming
        self.room_in_limit = (
            inf if volume.limit is None else volume.limit - ours - sum(map(self._promised, running))
        )
        self.group_room = {group: self._group_room(group) for group in volume.group_limits}
        self.victims = victims(desired, actual, volume, now)
        self.kept_for: Want | None = None

    def run(self) -> Plan:
        self._cancel_the_unwanted()
        self._withdraw_the_damaged()
        self._remove_what_left()
        self._remove_the_expired()
        self._remove_the_outcast()
        self._drain()
        self._exchange_the_staged()
        for want in self._missing_wants():
            self._serve(want)
        return Plan(
            actions=tuple(self.actions),
            blocked=self.blocked,
            wake_at=self.wake_at if self.wake_at < inf else None,
        )

    @property
    def room(self) -> int:
        """Bytes that may still be begun: the narrower of the high mark and the limit."""
        return int(min(self.room_on_disk, self.room_in_limit))

    def _group_room(self, group: str) -> int:
        """What the models that this group asks for may still take."""
        room = self.volume.group_limits[group]
        for key, want in self.desired.items():
            if group in want.groups:
                room -= self._held(key)
        return room

    def _held(self, key: CacheKey) -> int:
        """The bytes of one model: there, or reserved for it."""
        entry, ingest = self.actual.entries.get(key), self.actual.ingests.get(key)
        if entry is not None:
            return entry.bytes
        job = self.actual.jobs.get(key)
        return (ingest.done if ingest is not None else 0) + (self._promised(job) if job else 0)

    def _to_come(self, job: Job) -> int:
        """The bytes that a running job will still write.

        `job.remaining` is what it has not proven yet. Of that, what an ingest had already when the
        job began is only hashed again: reserving it would count it twice, and evict for it.
        """
        ingest = self.actual.ingests.get(job.key)
        bounds = (job.remaining, None if ingest is None else ingest.remaining)
        return min((bound for bound in bounds if bound is not None), default=0)

    def _promised(self, job: Job) -> int:
        """What a running job adds to what its ingest held when that was last looked at: of a limit,
        what has arrived since then is taken as much as what is still to come."""
        ingest = self.actual.ingests.get(job.key)
        return (job.remaining or 0) if ingest is None else ingest.remaining

    def _cancel_the_unwanted(self) -> None:
        for key in sorted(self.actual.jobs):
            if key not in self.desired:
                self.actions.append(Cancel(key))

    def _withdraw_the_damaged(self) -> None:
        """At once, used or not: wrong bytes on offer are the worst state there is. Where the disk
        refused that, when it is to be tried again."""
        for key in sorted(self.actual.damaged):
            if key not in self.actual.entries or key in self.actual.jobs:
                continue
            failed = self.actual.attempts.get(key)
            if failed is None or failed.retry_at == inf or self._is_time(failed.retry_at):
                self.actions.append(Withdraw(key))

    def _remove_what_left(self) -> None:
        """What its users took out of the desired state goes, at the end of the time that it is
        kept, unless a pod still reads it.

        Its age does not matter: this is no guess about who may come, somebody has said so.
        """
        there = self.actual.entries.keys() | self.actual.ingests.keys() | self.actual.begun
        gone = self.actual.left.keys() - self.desired.keys() - self.actual.jobs.keys()
        for key in sorted(gone & there):
            if self._may_be_removed(key) and self._is_time(self.actual.left[key]):
                self._remove(key, Why.LEFT)

    def _remove_the_expired(self) -> None:
        """What is fetched on demand goes when nobody has used it for as long as was said."""
        mortal = [
            key
            for key, want in self.desired.items()
            if want.ttl_seconds is not None and want.on_demand
        ]
        for key in sorted(self.actual.entries.keys() & mortal):
            want, entry = self.desired[key], self.actual.entries[key]
            assert want.ttl_seconds is not None
            busy = key in self.actual.jobs or key in self.actual.staged
            if busy or want.pinned or not self._may_be_removed(key):
                continue
            if self._is_time(max(entry.last_used, entry.sealed_at) + want.ttl_seconds):
                self._remove(key, Why.EXPIRED)

    def _remove_the_outcast(self) -> None:
        """What an operator wants to be gone; whoever asked hears why, where it is not."""
        for key in sorted(self.actual.outcast & self.actual.entries.keys()):
            going = any(action.key == key for action in self.actions)
            if not going and self._keeps(key) in (None, Kept.YOUNG, Kept.UNCONFIRMED):
                self._remove(key, Why.ASKED)

    def _keeps(self, key: CacheKey) -> Kept | None:
        return keeps(key, self.desired, self.actual, self.volume, self.now)

    def _may_be_removed(self, key: CacheKey) -> bool:
        actual = self.actual
        needed = actual.in_use is None or key in actual.in_use or key in actual.demanded
        return not needed and key not in actual.pinned and key not in actual.damaged

    def _is_time(self, when: float) -> bool:
        """Whether a moment has come; else to look again then."""
        if when > self.now:
            self.wake_at = min(self.wake_at, when)
        return when <= self.now

    def _remove(self, key: CacheKey, why: Why) -> None:
        entry = self.actual.entries.get(key)
        self.victims = [victim for victim in self.victims if victim.key != key]
        if entry is not None:
            freed = self.links.drop(entry)
            self.actions.append(Evict(key, freed, why))
            self._freed(freed)
        else:
            begun = self.actual.ingests.get(key)
            shared = begun.shared if begun is not None else frozenset()
            self._abandon(Victim(key, begun.done if begun is not None else 0, shared))

    def _abandon(self, victim: Victim) -> None:
        freed = self.links.drop(victim)
        self.actions.append(Abandon(victim.key, freed))
        self._freed(freed)

    def _freed(self, size: int) -> None:
        self.room_on_disk += size
        self.room_in_limit += size

    def _evict(self, chosen: Iterable[Victim]) -> None:
        for victim in chosen:
            self.victims.remove(victim)
            for group in victim.groups & self.group_room.keys():
                self.group_room[group] += victim.bytes
            if victim.sealed:
                freed = self.links.drop(victim)
                self.actions.append(Evict(victim.key, freed))
                self._freed(freed)
            else:
                self._abandon(victim)

    def _drain(self) -> None:
        """Above the high mark down to the low one, above the limit down to the limit."""
        short = 0 if self.room_in_limit >= 0 else int(-self.room_in_limit)
        if self.room_on_disk < 0:
            slack = self.ceiling - int(self.volume.capacity * self.volume.low)
            short = max(short, slack - self.room_on_disk)
        if short > 0:
            chosen, _ = self.links.just_enough(self.victims, short)
            self._evict(chosen)

    def _exchange_the_staged(self) -> None:
        """What is proven takes the place of an older revision, or of a directory that is not ours,
        when nobody uses that; else it waits. An empty place is nobody's."""
        used, actual = self.actual.in_use, self.actual
        for key in sorted(actual.staged & self.desired.keys()):
            busy = key in actual.jobs or key in actual.damaged
            empty = key not in actual.entries and key not in actual.foreign
            if not busy and (empty or (used is not None and key not in used)):
                self.actions.append(Exchange(key))

    def _missing_wants(self) -> list[Want]:
        actual = self.actual
        absent = self.desired.keys() - actual.entries.keys() - actual.staged
        outdated = actual.outdated - actual.staged - actual.damaged
        wants = [self.desired[key] for key in (absent | outdated) - actual.jobs.keys()]
        return sorted(
            filter(self._is_due, wants),
            key=lambda want: (
                self._is_adoptable(want),  # in the background: it is served as it is
                -want.priority,
                not self._is_starved(want),
                want.key,
            ),
        )

    def _is_adoptable(self, want: Want) -> bool:
        foreign = self.actual.foreign.get(want.key)
        return foreign is not None and foreign.may_be_whole

    def _is_due(self, want: Want) -> bool:
        """What is here already is taken over unasked."""
        demanded = not want.on_demand or want.key in self.actual.demanded
        return demanded or self._is_adoptable(want)

    def _is_starved(self, want: Want) -> bool:
        return self._times_waited(want) % 2 == 1

    def _times_waited(self, want: Want) -> int:
        waited = self.now - self.actual.waiting.get(want.key, self.now)
        return max(0, int(waited // STARVED_SECONDS))

    def _serve(self, want: Want) -> None:
        """Begin one missing want, or say why not."""
        key = want.key
        attempt = self.actual.attempts.get(key)
        if attempt is not None and attempt.retry_at > self.now:
            self._back_off(attempt)
            return
        foreign = self.actual.foreign.get(key)
        if foreign is not None and foreign.obstacle and key in self.actual.ingests:
            # It was listed, and so compared. No room is made for what could not take its place.
            self._block(key, Blocked.FOREIGN_DIRECTORY, foreign.obstacle)
            return
        if self.slots == 0:
            self._block(key, Blocked.QUEUED, f"waits for one of {self.volume.max_fetches} slots")
            return
        ingest = self.actual.ingests.get(key)
        if ingest is not None:
            self._begin(want, ingest)
            return
        # Whatever its cache says of its size: KServe never looked at that, and it may be wrong.
        self.slots -= 1
        self.actions.append(Resolve(key))

    def _begin(self, want: Want, ingest: Ingest) -> None:
        """Fetch what is missing of a known listing, evicting just enough, or say what is short."""
        chosen = self._room_for(want, ingest.total, ingest.remaining)
        if chosen is not None:
            self._evict(chosen)
            self._fetch(want, ingest.remaining)

    def _room_for(self, want: Want, total: int, need: int) -> list[Victim] | None:
        """Who must go for so many bytes; None, with a block, where that is not enough."""
        if need == 0:
            # All of it is here and must only be proven: that needs no room, whatever the marks say.
            return []
        bounds = [self.ceiling, self.volume.limit, *self._limits(want)]
        most = min(bound for bound in bounds if bound is not None)
        if total > most:
            self._block(
                want.key,
                Blocked.LARGER_THAN_VOLUME,
                f"needs {quantity(total)}; this volume may hold {quantity(most)} of"
                f" {quantity(self.volume.capacity)}",
            )
            return None
        if self.kept_for is not None:
            uri = self.kept_for.ref.uri
            self._block(
                want.key,
                Blocked.INSUFFICIENT_CAPACITY,
                f"needs {quantity(need)} more; the next room is kept for {uri}, which has waited"
                " for more than an hour",
            )
            return None
        return self._chosen(want, need)

    def _limits(self, want: Want) -> list[int]:
        groups = want.groups & self.group_room.keys()
        return [self.volume.group_limits[group] for group in groups]

    def _chosen(self, want: Want, need: int) -> list[Victim] | None:
        """Just enough victims, first those of a node group that has reached its own limit."""
        chosen: list[Victim] = []
        for group in sorted(want.groups & self.group_room.keys()):
            short = need - self.group_room[group]
            for victim in self.victims:
                if short > 0 and group in victim.groups and victim not in chosen:
                    chosen.append(victim)
                    short -= victim.bytes
            if short > 0:
                limit = quantity(self.volume.group_limits[group])
                self._starve(want, need, f"the node group {group} may hold {limit} here")
                return None
        chosen, freed = self.links.just_enough(self.victims, need - self.room, chosen=chosen)
        if need - self.room > freed:
            # Half an eviction helps nobody. A smaller want behind this one may still begin.
            mark = "the high mark" if self.room_on_disk <= self.room_in_limit else "the limit"
            could = self.links.just_enough(self.victims, self.volume.capacity)[1]
            self._starve(
                want,
                need,
                f"{quantity(max(0, self.room))} are free below {mark} and {quantity(could)}"
                " could be evicted",
            )
            return None
        return chosen

    def _starve(self, want: Want, need: int, message: str) -> None:
        """Block for want of room; from some time on, nobody else gets what room there is."""
        self._block(
            want.key, Blocked.INSUFFICIENT_CAPACITY, f"needs {quantity(need)} more; {message}"
        )
        if self._is_starved(want) and need <= self._room_in_time(want):
            self.kept_for = want
        if (since := self.actual.waiting.get(want.key)) is not None:
            self._is_time(since + STARVED_SECONDS * (1 + self._times_waited(want)))

    def _room_in_time(self, asking: Want) -> int:
        """The room there may be without a change of the desired state: once pods have ended. An
        older revision of the very model makes no room for the newer one."""
        for_good = (
            key
            for key in self.actual.entries
            if key in self.actual.pinned
            or key == asking.key
            or ((want := self.desired.get(key)) is not None and (not want.on_demand or want.pinned))
        )
        stays = sum(self.actual.entries[key].bytes for key in for_good)
        everything = sum(entry.bytes for entry in self.actual.entries.values())
        return self.room + everything - stays

    def _fetch(self, want: Want, size: int) -> None:
        self._freed(-size)
        for group in want.groups & self.group_room.keys():
            self.group_room[group] -= size
        self.slots -= 1
        self.actions.append(Fetch(want.key, size))

    def _back_off(self, attempt: Attempt) -> None:
        self._block(attempt.key, Blocked.BACKING_OFF, attempt.message)
        self.wake_at = min(self.wake_at, attempt.retry_at)

    def _block(self, key: CacheKey, why: Blocked, message: str) -> None:
        self.blocked[key] = Block(why=why, message=message)
