"""A node on which plans are carried out, turn by turn, and nothing goes wrong any more.

Bytes are counted as a disk would: what is fetched uses them, what is evicted gives them back one
turn later, when it is unlinked.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from agent.model import (
    Abandon,
    Action,
    Actual,
    CacheKey,
    Cancel,
    Entry,
    Evict,
    Exchange,
    Fetch,
    Ingest,
    Plan,
    Resolve,
    Withdraw,
)
from tests.core.worlds import World, given_back, running, to_come

_V = TypeVar("_V")

_IDLE = 12
"""Wakings with nothing to do, after which nothing will ever be done: no world has more times."""


class Simulation:
    """One world, changed by its own plans."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.evicted: set[CacheKey] = set()
        self.fetched: set[CacheKey] = set()
        self.peak = 0

    def settle(self, turns: int) -> Plan:
        """Turn until nothing is to be done and nothing runs; the last plan."""
        turns += _IDLE
        idle = 0
        for _ in range(turns):
            decided = self.world.plan()
            for action in decided.actions:
                self._apply(action)
            self.peak = max(self.peak, self.world.volume.used - self.world.volume.reclaiming)
            if not decided.actions and not running(self.world):
                idle += 1
                # Who waits for room is woken every hour, for as long as it waits.
                if decided.wake_at is None or idle > _IDLE:
                    return decided
                self.world = replace(self.world, now=decided.wake_at)
            self._pass_time({action.key for action in decided.actions})
        raise AssertionError(f"not at rest after {turns} turns: {self.world}")

    def _pass_time(self, begun: set[CacheKey]) -> None:
        """What was retired is unlinked, and jobs of earlier turns end."""
        self._volume(free=self.world.volume.reclaiming, reclaiming=-self.world.volume.reclaiming)
        for key in set(running(self.world)) - begun:
            self._finish(key)
        self.world = replace(self.world, now=self.world.now + 1)

    def _apply(self, action: Action) -> None:
        actual, key = self.world.actual, action.key
        match action:
            case Cancel():
                self._change(jobs=_without(actual.jobs, key))
            case Resolve():
                self._list(key)
            case Fetch(_, size):
                assert key in actual.ingests
                self.fetched.add(key)
                self._seal(key, size)
            case Evict(_, size, _):
                assert size == given_back(self.world, {key})
                self.evicted.add(key)
                self._change(entries=_without(actual.entries, key))
                self._volume(reclaiming=size)
            case Withdraw():
                self._withdraw(actual.entries[key])
            case Abandon():
                self._abandon(key)
            case Exchange():
                self._change(
                    staged=actual.staged - {key},
                    outdated=actual.outdated - {key},
                    ingests=_without(actual.ingests, key),
                )

    def _list(self, key: CacheKey) -> None:
        want, total = self.world.desired[key], self.world.sizes[key]
        ingest = Ingest(ref=want.ref, revision="r", total=total, done=0)
        self._change(ingests={**self.world.actual.ingests, key: ingest})

    def _seal(self, key: CacheKey, written: int) -> None:
        actual, now = self.world.actual, self.world.now
        ingest = actual.ingests[key]
        if key in actual.entries:
            self._volume(free=-written)
            whole = replace(ingest, done=ingest.total)
            self._change(
                staged=actual.staged | {key},
                ingests={**actual.ingests, key: whole},
                attempts=_without(actual.attempts, key),
            )
            return
        entry = Entry(
            ref=ingest.ref,
            revision=ingest.revision,
            fingerprint="sha256:00",
            bytes=ingest.total,
            files=1,
            sealed_at=now,
            last_used=now,
            shared=ingest.shared,
        )
        self._volume(free=-written)
        self._change(
            entries={**actual.entries, key: entry},
            ingests=_without(actual.ingests, key),
            attempts=_without(actual.attempts, key),
        )

    def _withdraw(self, entry: Entry) -> None:
        """A third of it was gone."""
        actual, lost = self.world.actual, entry.bytes // 3
        ingest = Ingest(ref=entry.ref, revision="r", total=entry.bytes, done=entry.bytes - lost)
        self._volume(free=lost)
        self._change(
            entries=_without(actual.entries, entry.key),
            damaged=actual.damaged - {entry.key},
            ingests={**actual.ingests, entry.key: ingest},
        )

    def _abandon(self, key: CacheKey) -> None:
        """Unlinked at once, as far as `free` can tell: it was never reserved."""
        actual, before = self.world.actual, self.world
        ingest = actual.ingests.get(key)
        self._change(ingests=_without(actual.ingests, key), begun=actual.begun - {key})
        self._volume(free=given_back(before, {key}) if ingest else 0)

    def _finish(self, key: CacheKey) -> None:
        actual = self.world.actual
        job = actual.jobs[key]
        written = to_come(self._only(key))
        self._change(jobs=_without(actual.jobs, key))
        if key in actual.entries:  # it was verified, and is whole
            self._change(damaged=actual.damaged - {key})
        elif job.total is None and key not in actual.ingests:
            self._list(key)
        else:
            self._seal(key, written)

    def _only(self, key: CacheKey) -> World:
        jobs = {key: self.world.actual.jobs[key]}
        return replace(self.world, actual=replace(self.world.actual, jobs=jobs))

    def _change(self, **facts: object) -> None:
        changed: Actual = replace(self.world.actual, **facts)  # type: ignore[arg-type]  # by name
        self.world = replace(self.world, actual=changed)

    def _volume(self, *, free: int = 0, reclaiming: int = 0) -> None:
        volume = self.world.volume
        self.world = replace(
            self.world,
            volume=replace(
                volume, free=volume.free + free, reclaiming=volume.reclaiming + reclaiming
            ),
        )


def _without(facts: Mapping[CacheKey, _V], key: CacheKey) -> dict[CacheKey, _V]:
    return {k: v for k, v in facts.items() if k != key}
