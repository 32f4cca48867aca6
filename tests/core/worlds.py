"""Worlds for `plan`: all it is told, generated with a bias toward trouble.

Uniform worlds prove nothing: almost all have room, so hardly anything is ever fetched *and* evicted
(2.5 % and 0.7 % in a prototype, and half of the planted bugs survived it). Here the disk is sized
around what is on it, last uses tie, wants are missing with known sizes, and the clock stands on
the edges of ages and retries. `python -m tests.core.count_actions` shows what comes of it.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, inf

from hypothesis import Phase, settings
from hypothesis import strategies as st

from agent.errors import Reason
from agent.model import (
    Actual,
    Attempt,
    CacheKey,
    Entry,
    Foreign,
    Ingest,
    Job,
    ModelRef,
    Plan,
    Stage,
    Volume,
    Want,
)
from agent.plan import plan

NOW = 1_000_000.0
MIN_AGE = 600.0
HOUR = 3600.0
SHARED = (7, 5)
"""The inode and the size of a file that several models have, wherever any has one."""

LARGEST = 200

_EXAMPLES = os.environ.get("PLAN_EXAMPLES")

many = settings(
    max_examples=int(_EXAMPLES or "150"),
    deadline=None,
    # The mutation script sets it, and wants to know whether a test fails, not how simply.
    phases=[phase for phase in Phase if not (_EXAMPLES and phase is Phase.shrink)],
)
"""For the properties."""

_SIZES = st.sampled_from((10, 20, 30, 40, 5, 10, 20, 1, 0, LARGEST))
_AGES = st.sampled_from((9e4, 8e4, 7e4, MIN_AGE, MIN_AGE + 1, MIN_AGE - 1, 0.0))
_ATTEMPTS = st.sampled_from((-100.0, 0.0, 1.0, 60.0, inf))
_SPARE = st.sampled_from((*range(-15, 40, 3), 1000))
_ROLES = st.sampled_from(
    ("kept",) * 5
    + ("known",) * 8
    + ("held",) * 3
    + ("unknown", "running", "leftover", "unwanted job", "left", "left")
)


def _one_in(number: int) -> st.SearchStrategy[bool]:
    return st.sampled_from((False,) * (number - 1) + (True,))


@dataclass(frozen=True, slots=True)
class World:
    """The arguments of one call, and what the sources would answer to a Resolve."""

    desired: dict[CacheKey, Want]
    actual: Actual
    volume: Volume
    now: float
    sizes: dict[CacheKey, int]

    def plan(self) -> Plan:
        return plan(self.desired, self.actual, self.volume, now=self.now)


@dataclass(slots=True)
class _Draft:
    """A world being drawn, key by key."""

    draw: st.DrawFn
    desired: dict[CacheKey, Want]
    entries: dict[CacheKey, Entry]
    ingests: dict[CacheKey, Ingest]
    jobs: dict[CacheKey, Job]
    attempts: dict[CacheKey, Attempt]
    damaged: set[CacheKey]
    left: dict[CacheKey, float]
    demanded: set[CacheKey]
    waiting: dict[CacheKey, float]
    stale: set[CacheKey]
    foreign: dict[CacheKey, Foreign]
    sizes: dict[CacheKey, int]

    def add(self, ref: ModelRef, role: str) -> None:
        size = self.sizes[ref.key] = self.draw(_SIZES)
        if role in ("held", "known", "unknown", "running"):
            self._ask(ref)
        if role in ("kept", "held"):
            self._seal(ref, size)
        elif role in ("known", "leftover"):
            self._begin(ref, size)
        elif role in ("running", "unwanted job"):
            self._run(ref, size)
        elif role == "left":
            self._leave(ref, size)
        if role in ("known", "unknown", "held") and self.draw(_one_in(5)):
            self._fail(ref.key)
        if role in ("known", "unknown") and self.draw(_one_in(8)):
            # Somebody else's, which the agent cannot take over. What it can is in test_plan.py.
            foreign = Foreign(bytes=0, lacking=frozenset({"f"}), obstacle="another user's")
            self.foreign[ref.key] = foreign
        if role in ("known", "unknown") and self.draw(_one_in(4)):
            self.waiting[ref.key] = NOW - self.draw(
                st.sampled_from((HOUR, HOUR - 1, 2 * HOUR, 3 * HOUR))
            )

    def _ask(self, ref: ModelRef) -> None:
        on_demand = self.draw(_one_in(4))
        ages = (None, None, 9e4, 10.0, 11.0, 9.0)
        self.desired[ref.key] = Want(
            ref=ref,
            priority=self.draw(st.sampled_from((0, 0, 0, 1, -1))),
            on_demand=on_demand,
            pinned=self.draw(_one_in(8)),
            ttl_seconds=self.draw(st.sampled_from(ages)),
            groups=self.draw(st.sampled_from((frozenset[str](), frozenset({"g"})))),
        )
        if on_demand and self.draw(st.booleans()):
            self.demanded.add(ref.key)

    def _leave(self, ref: ModelRef, size: int) -> None:
        """Asked for once, and not any more; or again, or a job is on it, or nothing is there."""
        self.left[ref.key] = NOW + self.draw(st.sampled_from((-60.0, 0.0, -1.0, -HOUR, HOUR)))
        there = self.draw(
            st.sampled_from(("sealed", "sealed", "begun", "stale", "both", "running", "none"))
        )
        if there in ("sealed", "both"):
            self._seal(ref, size)
        if there in ("begun", "both"):
            self._begin(ref, size)
        if there == "running":
            self._run(ref, size)
        if there == "stale":  # begun, by a listing that is not to be used again
            self.stale.add(ref.key)
        if self.draw(_one_in(6)):
            self.desired[ref.key] = Want(ref=ref)

    def _seal(self, ref: ModelRef, size: int) -> None:
        self.entries[ref.key] = Entry(
            ref=ref,
            revision="r",
            fingerprint="sha256:00",
            bytes=size,
            files=1,
            sealed_at=NOW - self.draw(_AGES),
            last_used=NOW - self.draw(st.sampled_from((0.0, 10.0, 20.0))),
        )
        trouble = self.draw(st.sampled_from(("none",) * 12 + ("damaged", "damaged", "verified")))
        if trouble == "none" and size >= SHARED[1] and self.draw(_one_in(5)):
            self.entries[ref.key] = replace(self.entries[ref.key], shared=frozenset({SHARED}))
        if trouble != "none":
            self.damaged.add(ref.key)
        if trouble == "verified":  # a job has it already: nothing else may touch it
            self.jobs[ref.key] = Job(key=ref.key, stage=Stage.VERIFYING, total=size, done=size)

    def _begin(self, ref: ModelRef, size: int) -> None:
        done = self.draw(st.sampled_from((0, size // 2, size // 2, size)))
        linked = done >= SHARED[1] and self.draw(_one_in(6))
        self.ingests[ref.key] = Ingest(
            ref=ref,
            revision="r",
            total=size,
            done=done,
            shared=frozenset({SHARED} if linked else ()),
        )

    def _run(self, ref: ModelRef, size: int) -> None:
        if self.draw(st.booleans()):
            self.jobs[ref.key] = Job(key=ref.key, stage=Stage.RESOLVING)
            return
        self._begin(ref, size)
        stage = self.draw(st.sampled_from((Stage.FETCHING, Stage.VERIFYING)))
        done = self.draw(st.sampled_from((0, size // 2, size)))
        self.jobs[ref.key] = Job(key=ref.key, stage=stage, total=size, done=done)

    def _fail(self, key: CacheKey) -> None:
        self.attempts[key] = Attempt(
            key=key,
            count=1,
            reason=Reason.NETWORK,
            message="no route",
            retry_at=NOW + self.draw(_ATTEMPTS),
        )

    def written(self) -> int:
        """What is on the disk of ours, as far as the nouns say."""
        sealed = sum(entry.bytes for entry in self.entries.values())
        models: list[Entry | Ingest] = [*self.entries.values(), *self.ingests.values()]
        holders = sum(bool(model.shared) for model in models)
        sealed -= SHARED[1] * max(0, holders - 1)
        return sealed + sum(ingest.done for ingest in self.ingests.values())

    def in_use(self) -> frozenset[CacheKey] | None:
        if self.draw(_one_in(12)):
            return None
        # Also of what is only begun: a pod may wait for it.
        there = [*self.entries, *self.ingests.keys() - self.entries.keys()]
        return frozenset(key for key in sorted(there) if self.draw(_one_in(6)))

    def volume(self) -> Volume:
        """Mostly sized around what is on it, so that some of what is asked for does not fit."""
        high, low = self.draw(st.sampled_from(((0.95, 0.9), (0.78, 0.72), (0.5, 0.25), (1.0, 0.9))))
        reclaiming = self.draw(st.sampled_from((0, 0, 0, 0, 7, 40)))
        foreign = self.draw(st.sampled_from((0, 0, 7, 100)))
        used = self.written() + reclaiming + foreign
        spare = self.draw(_SPARE)
        bounds = [None, None, None, None, self.written() + self.draw(_SPARE)]
        group = {"g": self.draw(st.sampled_from((30, 60, 100)))} if self.draw(_one_in(4)) else {}
        capacity = max(used, ceil((used + spare) / high))
        return Volume(
            capacity=capacity,
            free=capacity - used,
            reclaiming=reclaiming,
            high=high,
            low=low,
            max_fetches=self.draw(st.sampled_from((2, 3, 1, 4, 2, 3, 1, 0))),
            min_age_seconds=MIN_AGE,
            limit=self.draw(st.sampled_from(bounds)),
            group_limits=group,
        )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    draft = _Draft(draw, {}, {}, {}, {}, {}, set(), {}, set(), {}, set(), {}, {})
    for number, role in enumerate(draw(st.lists(_ROLES, min_size=2, max_size=9))):
        draft.add(ModelRef(uri=f"hf://acme/{number}"), role)
    in_use = draft.in_use()
    held = draft.entries.keys() & draft.desired.keys() - draft.damaged
    outdated = frozenset(key for key in sorted(held) if draw(st.booleans()))
    actual = Actual(
        entries=draft.entries,
        damaged=frozenset(draft.damaged),
        ingests=draft.ingests,
        jobs=draft.jobs,
        attempts=draft.attempts,
        in_use=in_use,
        left=draft.left,
        kept=frozenset(key for key in draft.entries if draw(_one_in(8))),
        begun=frozenset(draft.stale | draft.ingests.keys()),
        demanded=frozenset(draft.demanded | (in_use or set())),
        pinned=frozenset(key for key in draft.entries if draw(_one_in(9))),
        waiting=draft.waiting,
        foreign=draft.foreign,
        outdated=outdated,
        staged=frozenset(key for key in sorted(outdated) if not draw(_one_in(4))),
    )
    return World(draft.desired, actual, draft.volume(), NOW, draft.sizes)


# -- what the rules say about a world, in words of their own ----------------------------------


def ceiling(volume: Volume) -> int:
    return int(volume.capacity * volume.high)


def running(world: World) -> dict[CacheKey, Job]:
    """The jobs that go on: the others are cancelled at once."""
    return {key: job for key, job in world.actual.jobs.items() if key in world.desired}


def to_come(world: World) -> int:
    """The bytes that running jobs will still write: not what an ingest has already."""
    total = 0
    for key, job in running(world).items():
        ingest = world.actual.ingests.get(key)
        if job.total is not None:
            unproven = max(0, job.total - job.done)
            total += unproven if ingest is None else min(unproven, ingest.remaining)
        elif ingest is not None:
            total += ingest.remaining
    return total


def promised(world: World) -> int:
    """What running jobs will have added to what their ingests were last seen to hold: of a limit,
    what has arrived since then is taken as well."""
    total = 0
    for key, job in running(world).items():
        ingest = world.actual.ingests.get(key)
        if ingest is not None:
            total += ingest.total - ingest.done
        elif job.total is not None:
            total += max(0, job.total - job.done)
    return total


def room(world: World) -> int:
    """Bytes that may be begun before any eviction for it; negative above the high mark or the
    limit. What left or expired goes whether room is short or not: its bytes count as free."""
    return min(room_on_disk(world), room_in_limit(world))


def room_on_disk(world: World) -> int:
    volume = world.volume
    here = ceiling(volume) - volume.used + volume.reclaiming - to_come(world)
    return here + given_back(world, removable(world))


def room_in_limit(world: World) -> int:
    """A large number where there is no limit."""
    actual, limit = world.actual, world.volume.limit
    if limit is None:
        return 10**9
    ours = sum(entry.bytes for entry in actual.entries.values())
    ours += sum(ingest.done for ingest in actual.ingests.values())
    models: list[Entry | Ingest] = [*actual.entries.values(), *actual.ingests.values()]
    ours -= SHARED[1] * max(0, sum(bool(model.shared) for model in models) - 1)
    return limit - ours - promised(world) + given_back(world, removable(world))


def room_of_group(world: World, group: str) -> int:
    """What the models of a node group may still take, before anything of them goes."""
    left = world.volume.group_limits[group]
    for key, want in world.desired.items():
        if group not in want.groups:
            continue
        if key in world.actual.entries:
            left -= world.actual.entries[key].bytes
            continue
        ingest = world.actual.ingests.get(key)
        left -= ingest.done if ingest else 0
        if key in running(world):
            jobs = {key: world.actual.jobs[key]}
            left -= promised(replace(world, actual=replace(world.actual, jobs=jobs)))
    return left


def given_back(world: World, keys: Iterable[CacheKey]) -> int:
    """What the disk gives back if all of these go, whole or begun: a file that one of several
    models has lives on in the others."""
    actual, gone = world.actual, set(keys)
    total, kept = 0, False
    for key in actual.entries.keys() | actual.ingests.keys():
        entry, ingest = actual.entries.get(key), actual.ingests.get(key)
        if entry is not None:
            if key in gone:
                total += entry.bytes - sum(size for _, size in entry.shared)
            kept |= key not in gone and bool(entry.shared)
        if ingest is not None:
            goes = key in gone and entry is None  # what is begun beside a sealed model stays
            if goes:
                total += ingest.done - sum(size for _, size in ingest.shared)
            kept |= not goes and bool(ingest.shared)
    shares = any(
        facts[key].shared
        for facts in (actual.entries, actual.ingests)
        for key in gone & facts.keys()
        if facts is actual.entries or key not in actual.entries
    )
    return total + (SHARED[1] if shares and not kept else 0)


def _needed(world: World) -> frozenset[CacheKey]:
    """What somebody reads, waits for or has pinned."""
    actual = world.actual
    pinned = {key for key, want in world.desired.items() if want.pinned}
    return actual.demanded | (actual.in_use or frozenset()) | actual.pinned | pinned


def removable(world: World) -> set[CacheKey]:
    """What goes for good, whole or begun, and nothing keeps: whatever its age. It left the desired
    state and the time is over for which it is kept; or nobody used it for too long."""
    return departed(world) | expired(world)


def departed(world: World) -> set[CacheKey]:
    actual = world.actual
    there = set(actual.entries) | set(actual.ingests) | actual.begun
    over = {key for key, until in actual.left.items() if until <= world.now}
    kept = set(world.desired) | set(actual.jobs) | actual.damaged | _needed(world)
    return (over & there) - kept if actual.in_use is not None else set()


def expired(world: World) -> set[CacheKey]:
    actual = world.actual
    if actual.in_use is None:
        return set()
    return {
        key
        for key, want in world.desired.items()
        if want.on_demand
        and want.ttl_seconds is not None
        and key in actual.entries
        and key not in actual.damaged | _needed(world) | actual.staged
        and key not in actual.jobs
        and world.now - actual.entries[key].last_used >= want.ttl_seconds
        and world.now - actual.entries[key].sealed_at >= want.ttl_seconds
    }


def evictable(world: World) -> dict[CacheKey, Entry]:
    """What may be a victim at all; not what goes anyway."""
    actual = world.actual
    if actual.in_use is None:
        return {}
    wanted = {key for key, want in world.desired.items() if not want.on_demand}
    kept = wanted | actual.damaged | actual.kept | set(actual.jobs) | _needed(world)
    kept |= actual.staged
    return {
        key: entry
        for key, entry in actual.entries.items()
        if key not in kept | removable(world)
        and entry.bytes > 0
        and world.now - entry.sealed_at >= world.volume.min_age_seconds
    }


def leftovers(world: World) -> set[CacheKey]:
    """What was begun and nobody waits for now: the first to go."""
    actual = world.actual
    if actual.in_use is None:
        return set()
    wanted = {key for key, want in world.desired.items() if not want.on_demand}
    needed = actual.demanded | actual.in_use | actual.pinned
    kept = wanted | actual.kept | needed | set(actual.jobs) | set(actual.entries)
    begun = {key for key, ingest in actual.ingests.items() if ingest.done > 0}
    return begun - kept - removable(world)


def missing(world: World) -> set[CacheKey]:
    """Wanted now, not sealed and not being worked on."""
    there = set(world.actual.entries) | set(world.actual.jobs)
    fresh = outdated(world) - set(world.actual.jobs)
    return {key for key in world.desired if key not in there | idle(world)} | fresh


def outdated(world: World) -> set[CacheKey]:
    """On offer, and to be asked for again."""
    waits = {k for k, w in world.desired.items() if w.on_demand} - world.actual.demanded
    return set(world.actual.outdated - world.actual.staged - world.actual.damaged) - waits


def idle(world: World) -> set[CacheKey]:
    """Fetched on demand, and nobody asks."""
    there = set(world.actual.entries) | set(world.actual.jobs) | world.actual.demanded
    return {key for key, want in world.desired.items() if want.on_demand and key not in there}


def starved(world: World) -> set[CacheKey]:
    """Short of room for an hour, or for three, or five."""
    waited = {key: world.now - since for key, since in world.actual.waiting.items()}
    return {key for key, seconds in waited.items() if int(seconds // HOUR) in (1, 3, 5)}
