"""The promises of `plan`, each in words of its own: none asks the implementation for its order."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import inf
from random import Random
from typing import TypeVar

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from agent.model import (
    Abandon,
    Action,
    Actual,
    Blocked,
    CacheKey,
    Cancel,
    Entry,
    Evict,
    Exchange,
    Fetch,
    Foreign,
    Ingest,
    Job,
    ModelRef,
    Plan,
    Resolve,
    Stage,
    Volume,
    Want,
    Why,
    Withdraw,
)
from agent.plan import plan
from tests.core.simulation import Simulation
from tests.core.worlds import (
    HOUR,
    NOW,
    World,
    ceiling,
    departed,
    evictable,
    expired,
    given_back,
    idle,
    leftovers,
    many,
    missing,
    outdated,
    removable,
    room,
    room_in_limit,
    room_of_group,
    room_on_disk,
    running,
    starved,
    worlds,
)

_V = TypeVar("_V")


def _keys(decided: Plan, *kinds: type[Action]) -> list[CacheKey]:
    """The keys of the actions of these kinds, in the order of the plan."""
    return [action.key for action in decided.actions if isinstance(action, kinds)]


def _victims(world: World, decided: Plan) -> list[CacheKey]:
    """What goes for room, whole or begun, in the order of the plan: not what goes for good."""
    return [key for key in _keys(decided, Evict, Abandon) if key not in removable(world)]


def _evicted(world: World, decided: Plan) -> list[CacheKey]:
    """The victims that were whole."""
    return [key for key in _victims(world, decided) if key in world.actual.entries]


def _of(world: World, group: str) -> set[CacheKey]:
    """The keys that a node group asks for."""
    return {key for key, want in world.desired.items() if group in want.groups}


def _is_plain(world: World) -> bool:
    """Nothing but the marks and the limit of the volume says who goes."""
    return not world.volume.group_limits and not any(
        entry.shared for entry in world.actual.entries.values()
    )


def _held(world: World, key: CacheKey) -> int:
    """The bytes of a victim, as its node group counts them."""
    actual = world.actual
    return actual.entries[key].bytes if key in actual.entries else actual.ingests[key].done


def _expires(world: World) -> set[CacheKey]:
    return {key for key, want in world.desired.items() if want.on_demand and want.ttl_seconds}


def _fetched_bytes(decided: Plan) -> int:
    return sum(action.bytes for action in decided.actions if isinstance(action, Fetch))


def _blocked(decided: Plan, why: Blocked) -> set[CacheKey]:
    return {key for key, block in decided.blocked.items() if block.why is why}


def _committed(world: World) -> int:
    """What will be on the disk when all is done that was begun."""
    return ceiling(world.volume) - room_on_disk(world)


# -- eviction -----------------------------------------------------------------------------------


@many
@given(worlds())
def test_what_is_always_wanted_is_never_evicted(world: World) -> None:
    eager = {key for key, want in world.desired.items() if not want.on_demand}
    assert not set(_keys(world.plan(), Evict)) & eager


@many
@given(worlds())
def test_what_somebody_waits_for_or_pinned_is_never_evicted(world: World) -> None:
    pinned = {key for key, want in world.desired.items() if want.pinned} & set(world.actual.entries)
    kept = world.actual.demanded | world.actual.pinned | pinned
    assert not set(_keys(world.plan(), Evict, Abandon)) & kept


@many
@given(worlds())
def test_what_a_pod_uses_is_never_evicted(world: World) -> None:
    assert not set(_keys(world.plan(), Evict)) & (world.actual.in_use or set())


@many
@given(worlds())
def test_unknown_use_evicts_nothing(world: World) -> None:
    unknown = replace(world, actual=replace(world.actual, in_use=None))
    assert _keys(unknown.plan(), Evict) == []


@many
@given(worlds())
def test_what_was_sealed_a_moment_ago_is_never_evicted(world: World) -> None:
    for key in _evicted(world, world.plan()):
        age = world.now - world.actual.entries[key].sealed_at
        assert age >= world.volume.min_age_seconds


@many
@given(worlds())
def test_what_is_damaged_or_worked_on_is_never_evicted(world: World) -> None:
    busy = world.actual.damaged | set(world.actual.jobs)
    assert not set(_keys(world.plan(), Evict)) & busy


@many
@given(worlds())
def test_what_goes_frees_what_it_says_and_no_victim_goes_in_vain(world: World) -> None:
    """What goes for good goes also if that frees nothing."""
    gone: dict[CacheKey, int] = {
        action.key: action.bytes
        for action in world.plan().actions
        if isinstance(action, Evict | Abandon)
    }
    assert sum(gone.values()) == given_back(world, gone)
    for key in gone.keys() - removable(world):
        if not world.volume.group_limits:
            assert given_back(world, gone.keys() - {key}) < given_back(world, gone)


@many
@given(worlds())
def test_it_is_said_why_a_model_goes(world: World) -> None:
    for action in world.plan().actions:
        if isinstance(action, Evict):
            assert (action.why is Why.LEFT) == (action.key in departed(world))
            assert (action.why is Why.EXPIRED) == (action.key in expired(world))


@many
@given(worlds())
def test_survivors_were_used_later_than_victims(world: World) -> None:
    """Least recently used first; of those used together, the one sealed first."""
    assume(_is_plain(world))
    victims = set(_evicted(world, world.plan()))
    survivors = evictable(world).keys() - victims

    def rank(key: CacheKey) -> tuple[float, float]:
        entry = world.actual.entries[key]
        return entry.last_used, entry.sealed_at

    for victim in victims:
        for survivor in survivors:
            assert rank(victim) <= rank(survivor)


@many
@given(worlds())
def test_victims_go_in_the_order_of_their_last_use(world: World) -> None:
    assume(not world.volume.group_limits)
    victims = _evicted(world, world.plan())
    used = [world.actual.entries[key].last_used for key in victims]
    assert all(earlier <= later for earlier, later in pairwise(used))


@many
@given(worlds())
def test_what_is_only_begun_goes_before_what_is_whole(world: World) -> None:
    decided = world.plan()
    assume(not world.volume.group_limits)
    if _evicted(world, decided):
        gone = set(_victims(world, decided))  # but for what would free nothing
        assert given_back(world, gone | leftovers(world)) == given_back(world, gone)


@many
@given(worlds())
def test_without_the_last_victim_it_would_not_have_been_enough(world: World) -> None:
    assume(not world.volume.group_limits)
    decided = world.plan()
    victims = _victims(world, decided)
    if not victims:
        return
    freed = given_back(world, victims[:-1])
    low = int(world.volume.capacity * world.volume.low)
    above_low = (
        room_on_disk(world) < 0 and room_on_disk(world) + freed < ceiling(world.volume) - low
    ) or room_in_limit(world) + freed < 0
    too_little = room(world) + freed < _fetched_bytes(decided)
    assert above_low or too_little


@many
@given(worlds())
def test_above_the_high_mark_victims_go_down_to_the_low_mark(world: World) -> None:
    """As far as there are any."""
    victims = _victims(world, world.plan())
    freed = given_back(world, victims)
    low = int(world.volume.capacity * world.volume.low)
    down = room_on_disk(world) >= 0 or room_on_disk(world) + freed >= ceiling(world.volume) - low
    within = room_in_limit(world) + freed >= 0
    everything = evictable(world).keys() | leftovers(world)
    assert (down and within) or freed == given_back(world, everything)


@many
@given(worlds())
def test_nothing_is_evicted_below_the_high_mark_unless_something_begins(world: World) -> None:
    """So with too few victims for a want, none goes: half an eviction helps nobody."""
    decided = world.plan()
    if room(world) >= 0 and not _keys(decided, Fetch):
        assert _victims(world, decided) == []


@many
@given(worlds())
def test_a_victim_of_a_groups_limit_is_of_that_group(world: World) -> None:
    """Where there is room enough on the disk, nobody else's model goes for it."""
    decided = world.plan()
    if room(world) >= _fetched_bytes(decided) and world.volume.group_limits:
        assert set(_victims(world, decided)) <= _of(world, "g")


# -- what left the desired state ------------------------------------------------------------------


@many
@given(worlds())
def test_exactly_what_left_and_nothing_keeps_goes(world: World) -> None:
    """Whole or begun, however young it is, and whether room is short or not."""
    decided, whole = world.plan(), world.actual.entries.keys()
    left = removable(world)
    event("some left" if left else "none left")
    assert set(_keys(decided, Evict)) - evictable(world).keys() == left & whole
    assert set(_keys(decided, Abandon)) - leftovers(world) == left - whole


@many
@given(worlds())
def test_of_unknown_use_nothing_that_left_goes(world: World) -> None:
    unknown = replace(world, actual=replace(world.actual, in_use=None))
    assert _keys(unknown.plan(), Evict, Abandon) == []


@many
@given(worlds())
def test_what_is_used_or_wanted_again_is_neither_evicted_nor_abandoned(world: World) -> None:
    gone = set(_keys(world.plan(), Evict, Abandon))
    eager = {key for key, want in world.desired.items() if not want.on_demand}
    assert not gone & (eager | (world.actual.in_use or set()))


@many
@given(worlds())
def test_what_nobody_said_may_go_is_no_victim(world: World) -> None:
    assert not set(_victims(world, world.plan())) & world.actual.kept


@many
@given(worlds())
def test_what_never_was_desired_is_abandoned_for_room_only(world: World) -> None:
    assert set(_keys(world.plan(), Abandon)) <= world.actual.left.keys() | leftovers(world)


@many
@given(worlds())
def test_what_left_is_gone_when_all_is_carried_out(world: World) -> None:
    """But for what a pod uses. The damaged is taken off offer first, and jobs are stopped."""
    node = Simulation(world)
    node.settle(turns=6 * len(world.sizes) + 6)
    used = world.actual.in_use
    if used is None:
        return
    actual = node.world.actual
    there = actual.entries.keys() | actual.ingests.keys()
    kept = set(world.desired) | used | world.actual.demanded | world.actual.pinned
    assert not (world.actual.left.keys() - kept) & (there | actual.begun)


# -- room ---------------------------------------------------------------------------------------


@many
@given(worlds())
def test_what_begins_fits_below_the_high_mark(world: World) -> None:
    """With what runs, what is being unlinked and what is evicted for it."""
    decided = world.plan()
    if _fetched_bytes(decided) == 0:
        return
    gone = given_back(world, set(_keys(decided, Evict, Abandon)) - removable(world))
    assert _fetched_bytes(decided) <= room(world) + gone


@many
@given(worlds())
def test_what_begins_fits_into_the_limit_of_its_node_group(world: World) -> None:
    decided = world.plan()
    for group in world.volume.group_limits:
        of = _of(world, group)
        begun = sum(a.bytes for a in decided.actions if isinstance(a, Fetch) and a.key in of)
        gone = sum(_held(world, key) for key in of & set(_keys(decided, Evict, Abandon)))
        event("begun in a limited group" if begun else "nothing begun")
        assert begun == 0 or begun <= room_of_group(world, group) + gone


@many
@given(worlds())
def test_a_fetch_reserves_exactly_what_is_missing(world: World) -> None:
    for action in world.plan().actions:
        if isinstance(action, Fetch):
            ingest = world.actual.ingests[action.key]
            assert action.bytes == ingest.total - ingest.done


@many
@given(worlds())
def test_what_is_blocked_on_space_does_not_fit(world: World) -> None:
    """Even if all that may go went, beside what was served before it."""
    decided = world.plan()
    assume(not world.volume.group_limits)
    for key in _blocked(decided, Blocked.INSUFFICIENT_CAPACITY):
        if "room is kept" in decided.blocked[key].message:
            continue
        ahead = sum(
            action.bytes
            for action in decided.actions
            if isinstance(action, Fetch)
            and world.desired[action.key].priority >= world.desired[key].priority
        )
        may_go = evictable(world).keys() | leftovers(world)
        possible = room(world) + given_back(world, may_go) - ahead
        assert world.actual.ingests[key].remaining > possible


@many
@given(worlds())
def test_what_is_larger_than_the_volume_is_said_to_be_and_nothing_else_is(world: World) -> None:
    decided = world.plan()
    refused = _blocked(decided, Blocked.LARGER_THAN_VOLUME)
    for key in missing(world) & set(world.actual.ingests):
        ingest = world.actual.ingests[key]
        limits = [ceiling(world.volume), world.volume.limit or ceiling(world.volume)]
        groups = world.desired[key].groups & world.volume.group_limits.keys()
        limits += [world.volume.group_limits[group] for group in groups]
        too_large = ingest.total > min(limits) and ingest.remaining > 0
        assert (key in refused) <= too_large
        assert not (too_large and key in _keys(decided, Fetch))
        assert not (too_large and key in _blocked(decided, Blocked.INSUFFICIENT_CAPACITY))


@many
@given(worlds())
def test_what_is_all_there_is_never_blocked_on_space(world: World) -> None:
    """It must only be proven: above the high mark too, and on a volume that has shrunk."""
    decided = world.plan()
    short = _blocked(decided, Blocked.INSUFFICIENT_CAPACITY)
    for key in short | _blocked(decided, Blocked.LARGER_THAN_VOLUME):
        assert world.actual.ingests[key].remaining > 0


# -- the wants ----------------------------------------------------------------------------------


@many
@given(worlds())
def test_at_most_one_action_a_key(world: World) -> None:
    keys = [action.key for action in world.plan().actions]
    assert len(keys) == len(set(keys))


@many
@given(worlds())
def test_every_want_is_in_exactly_one_state(world: World) -> None:
    decided, actual = world.plan(), world.actual
    begun, withdrawn = _keys(decided, Resolve, Fetch), _keys(decided, Withdraw)
    for key in world.desired:
        working = key in actual.jobs
        ready = key in actual.entries and key not in actual.damaged and not working
        waits = key in idle(world)
        tried = actual.attempts.get(key)
        refused = key in actual.damaged and tried is not None and tried.retry_at > world.now
        waits = waits or (refused and not working and key not in withdrawn)
        refreshing = key in begun or key in decided.blocked
        ready = ready and not (refreshing and key in outdated(world))
        states = (ready, working, key in begun, key in withdrawn, key in decided.blocked, waits)
        assert sum(states) == 1, (key, states)
    assert set(begun) | set(decided.blocked) <= missing(world)


@many
@given(worlds())
def test_a_newer_revision_takes_its_place_exactly_where_nobody_uses_the_old_one(
    world: World,
) -> None:
    used, actual = world.actual.in_use, world.actual
    free = set() if used is None else actual.staged - used - set(actual.jobs) - actual.damaged
    event("exchanged" if free else "none")
    assert set(_keys(world.plan(), Exchange)) == free


@many
@given(worlds())
def test_the_source_is_asked_only_where_the_size_is_unknown(world: World) -> None:
    decided = world.plan()
    assert not set(_keys(decided, Resolve)) & set(world.actual.ingests)
    assert set(_keys(decided, Fetch)) <= set(world.actual.ingests)


@many
@given(worlds())
def test_jobs_that_nobody_wants_are_cancelled_and_no_others(world: World) -> None:
    assert set(_keys(world.plan(), Cancel)) == set(world.actual.jobs) - set(world.desired)


@many
@given(worlds())
def test_what_is_damaged_goes_off_offer_at_once(world: World) -> None:
    """Used or not, wanted or not; unless a job is on it already, or the disk has just refused."""
    attempts = world.actual.attempts
    refused = {key for key, tried in attempts.items() if world.now < tried.retry_at < inf}
    damaged = world.actual.damaged - set(world.actual.jobs) - refused
    assert set(_keys(world.plan(), Withdraw)) == damaged


@many
@given(worlds())
def test_no_more_than_max_fetches_run_and_no_slot_stays_idle(world: World) -> None:
    decided = world.plan()
    begun = len(_keys(decided, Resolve, Fetch))
    slots = max(0, world.volume.max_fetches - len(running(world)))
    assert begun <= slots
    if _blocked(decided, Blocked.QUEUED):
        assert begun == slots


@many
@given(worlds())
def test_the_queue_respects_priority(world: World) -> None:
    """Nothing begins before a want of higher priority that waits for a slot, or for room that the
    lower one took."""
    decided = world.plan()
    begun = _keys(decided, Resolve, Fetch)
    for waiting in _blocked(decided, Blocked.QUEUED):
        for key in begun:
            assert world.desired[key].priority >= world.desired[waiting].priority


@many
@given(worlds())
def test_exactly_the_failed_whose_time_has_not_come_back_off(world: World) -> None:
    waiting = {
        key
        for key in missing(world) & set(world.actual.attempts)
        if world.actual.attempts[key].retry_at > world.now
    }
    assert _blocked(world.plan(), Blocked.BACKING_OFF) == waiting


@many
@given(worlds())
def test_it_wakes_at_the_earliest_retry(world: World) -> None:
    """Never is no time to wake at; and something may expire, or starve, before."""
    decided = world.plan()
    damaged = world.actual.damaged & world.actual.attempts.keys() & world.actual.entries.keys()
    waiting = _blocked(decided, Blocked.BACKING_OFF) | (damaged - world.actual.jobs.keys())
    later = {world.actual.attempts[key].retry_at for key in waiting}
    times = {time for time in later if time > world.now}
    event("permanent" if inf in times else "in time" if times else "none")
    assert decided.wake_at is None or world.now < decided.wake_at < inf
    for time in times - {inf}:
        assert decided.wake_at is not None
        assert decided.wake_at <= time
    if not (world.actual.left or world.actual.waiting or _expires(world)):
        assert decided.wake_at == min(times - {inf}, default=None)


@many
@given(worlds(), st.sampled_from((-1.0, 0.0)))
def test_it_wakes_when_something_is_to_go(world: World, early: float) -> None:
    """What goes at some time does not go before, and its time is not slept through."""
    actual = world.actual
    later = removable(replace(world, now=world.now + HOUR + early)) - removable(world)
    if later - actual.left.keys() - _expires(world):
        raise AssertionError("the worlds know another cause")
    if later:
        wake_at = world.plan().wake_at
        assert wake_at is not None
        assert wake_at <= world.now + HOUR + early


# -- the whole ----------------------------------------------------------------------------------


@many
@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_of_the_facts_does_not_matter(world: World, random: Random) -> None:
    def shuffled(facts: Mapping[CacheKey, _V]) -> dict[CacheKey, _V]:
        keys = list(facts)
        random.shuffle(keys)
        return {key: facts[key] for key in keys}

    actual = replace(
        world.actual,
        entries=shuffled(world.actual.entries),
        ingests=shuffled(world.actual.ingests),
        jobs=shuffled(world.actual.jobs),
        attempts=shuffled(world.actual.attempts),
    )
    actual = replace(actual, left=shuffled(actual.left), waiting=shuffled(actual.waiting))
    other = replace(world, desired=shuffled(world.desired), actual=actual)
    assert other.plan() == world.plan()
    assert list(other.plan().blocked) == list(world.plan().blocked)


@many
@given(worlds())
def test_carrying_plans_out_comes_to_rest(world: World) -> None:
    """Within a few turns a key, and with no want left that could be served."""
    node = Simulation(world)
    last = node.settle(turns=6 * len(world.sizes) + 6)
    for key in world.desired:
        if key in node.world.actual.entries:
            assert key not in node.world.actual.damaged
            continue
        if key in idle(node.world):
            continue
        why = last.blocked[key].why
        assert why is not Blocked.QUEUED or world.volume.max_fetches == 0
        assert why is not Blocked.BACKING_OFF or world.actual.attempts[key].retry_at == inf


@many
@given(worlds())
def test_without_new_wants_nothing_is_both_evicted_and_fetched(world: World) -> None:
    """Design D7: no churn, however long it goes on."""
    node = Simulation(world)
    node.settle(turns=6 * len(world.sizes) + 6)
    assert not node.evicted & node.fetched


@many
@given(worlds())
def test_carrying_plans_out_never_fills_the_disk(world: World) -> None:
    """Above the high mark it stays only where it was, or where running jobs had to take it."""
    node = Simulation(world)
    running_to_come = given_back(world, removable(world))
    before = max(ceiling(world.volume), _committed(world) + running_to_come)
    node.settle(turns=6 * len(world.sizes) + 6)
    assert node.peak <= before


# -- single worlds, where a choice or a trap has a name -------------------------------------------


def _ref(name: str) -> ModelRef:
    return ModelRef(uri=f"hf://acme/{name}")


def _entry(name: str, size: int, *, last_used: float = 0.0, sealed_at: float = 0.0) -> Entry:
    return Entry(
        ref=_ref(name),
        revision="r",
        fingerprint="sha256:00",
        bytes=size,
        files=1,
        sealed_at=sealed_at,
        last_used=last_used,
    )


def _ingest(name: str, total: int, done: int = 0) -> Ingest:
    return Ingest(ref=_ref(name), revision="r", total=total, done=done)


def _job(name: str, stage: Stage, total: int | None = None, done: int = 0) -> Job:
    return Job(key=_ref(name).key, stage=stage, total=total, done=done)


def _plan(
    *,
    wants: Mapping[str, int],
    free: int,
    entries: tuple[Entry, ...] = (),
    ingests: tuple[Ingest, ...] = (),
    jobs: tuple[Job, ...] = (),
    reclaiming: int = 0,
) -> Plan:
    """On a volume of 100 bytes, 90 of them below the high mark and 70 below the low one."""
    return plan(
        {_ref(name).key: Want(ref=_ref(name), priority=level) for name, level in wants.items()},
        Actual(
            entries={entry.key: entry for entry in entries},
            ingests={ingest.ref.key: ingest for ingest in ingests},
            jobs={job.key: job for job in jobs},
            in_use=frozenset(),
        ),
        Volume(capacity=100, free=free, reclaiming=reclaiming, high=0.9, low=0.7),
        now=1e6,
    )


def test_a_small_want_may_begin_although_a_large_one_before_it_waits_for_space() -> None:
    """The named choice of aesthetics 2.12: throughput. Else one giant idles the whole node."""
    decided = _plan(
        wants={"large": 9, "small": 0},
        free=50,
        ingests=(_ingest("large", 80), _ingest("small", 30)),
    )
    assert decided.actions == (Fetch(_ref("small").key, 30),)
    assert decided.blocked[_ref("large").key].why is Blocked.INSUFFICIENT_CAPACITY


def test_a_block_gives_the_numbers() -> None:
    kept = _entry("kept", 5)
    decided = _plan(wants={"large": 0}, free=50, entries=(kept,), ingests=(_ingest("large", 80),))
    message = decided.blocked[_ref("large").key].message
    assert message.startswith("needs 80 more; 40 are free")
    assert message.endswith("5 could be evicted")


def test_what_is_being_unlinked_is_not_evicted_a_second_time() -> None:
    """After an Evict, statvfs shows the bytes until the last unlink: used 97, but 20 are going."""
    kept = _entry("kept", 40)
    assert _plan(wants={}, free=3, reclaiming=20, entries=(kept,)).actions == ()
    assert _plan(wants={}, free=3, entries=(kept,)).actions == (Evict(kept.key, 40),)


def test_a_resumed_download_reserves_what_is_missing_and_not_its_size() -> None:
    """It hashes 55 of 60 bytes again, which are on the disk: 80 used, 5 to come, no eviction."""
    kept = _entry("kept", 25)
    decided = _plan(
        wants={"resumed": 0},
        free=20,
        entries=(kept,),
        ingests=(_ingest("resumed", 60, 55),),
        jobs=(_job("resumed", Stage.VERIFYING, 60),),
    )
    assert decided.actions == ()


def test_a_job_that_has_not_said_its_size_yet_reserves_what_its_ingest_lacks() -> None:
    decided = _plan(
        wants={"begun": 0, "next": 0},
        free=50,
        ingests=(_ingest("begun", 30), _ingest("next", 20)),
        jobs=(_job("begun", Stage.RESOLVING),),
    )
    assert decided.blocked[_ref("next").key].why is Blocked.INSUFFICIENT_CAPACITY


def test_a_cancelled_job_gives_back_its_slots_and_its_room_at_once() -> None:
    old, older = _job("old", Stage.FETCHING, 40), _job("older", Stage.RESOLVING)
    for jobs in ((old, older), (older, old)):
        decided = _plan(
            wants={"new": 0},
            free=50,
            ingests=(_ingest("old", 40), _ingest("new", 40)),
            jobs=jobs,
        )
        cancels = sorted((old.key, older.key))
        assert decided.actions == (*map(Cancel, cancels), Fetch(_ref("new").key, 40))


def test_a_cancelled_key_is_not_evicted_in_the_same_breath() -> None:
    kept = _entry("kept", 40)
    decided = _plan(wants={}, free=3, entries=(kept,), jobs=(_job("kept", Stage.VERIFYING, 40),))
    assert decided.actions == (Cancel(kept.key),)


def test_the_room_that_draining_made_is_used_without_another_eviction() -> None:
    """97 used, the older goes: 57 used, so 33 fit below the high mark and the newer stays."""
    older, newer = _entry("older", 40, last_used=1.0), _entry("newer", 40, last_used=2.0)
    decided = _plan(wants={"new": 0}, free=3, entries=(newer, older), ingests=(_ingest("new", 33),))
    assert decided.actions == (Evict(older.key, 40), Fetch(_ref("new").key, 33))


def test_the_last_use_counts_before_the_age_and_the_age_before_the_name() -> None:
    """Names, ages and uses each would give another order."""
    names = sorted("abcde", key=lambda name: _ref(name).key)
    facts = ((4, 1.0, 9.0), (3, 2.0, 3.0), (2, 2.0, 4.0), (0, 3.0, 0.0), (1, 3.0, 0.0))
    expected = [
        _entry(names[number], 20, last_used=used, sealed_at=sealed)
        for number, used, sealed in facts
    ]
    for entries in (tuple(expected), tuple(reversed(expected))):
        decided = _plan(wants={"all": 0}, free=0, entries=entries, ingests=(_ingest("all", 90),))
        assert _keys(decided, Evict) == [entry.key for entry in expected]


def test_an_empty_model_is_not_evicted_to_make_room() -> None:
    empty, full = _entry("empty", 0), _entry("full", 40, last_used=1.0)
    assert _plan(wants={}, free=0, entries=(empty, full)).actions == (Evict(full.key, 40),)


def test_a_resume_asks_room_for_the_rest_only() -> None:
    """40 bytes below the high mark are enough for the missing half of 60."""
    decided = _plan(wants={"half": 0}, free=50, ingests=(_ingest("half", 60, 30),))
    assert decided.actions == (Fetch(_ref("half").key, 30),)


def test_what_is_all_there_begins_above_the_high_mark() -> None:
    """Somebody else filled the disk while we were down: proving what is here takes no room."""
    decided = _plan(wants={"here": 0}, free=1, ingests=(_ingest("here", 99, 99),))
    assert decided.actions == (Fetch(_ref("here").key, 0),)


def test_what_left_makes_room_before_anything_is_evicted_for_it() -> None:
    old, kept = _entry("old", 30, last_used=9.0, sealed_at=1e6), _entry("kept", 20)
    new = _ingest("new", 60)
    decided = plan(
        {new.ref.key: Want(ref=new.ref)},
        Actual(
            entries={entry.key: entry for entry in (old, kept)},
            ingests={new.ref.key: new, _ref("begun").key: _ingest("begun", 90, 10)},
            in_use=frozenset(),
            left=dict.fromkeys((old.key, _ref("begun").key, _ref("never here").key), 0.0),
        ),
        Volume(capacity=100, free=40, high=0.9, low=0.7),
        now=1e6,
    )
    going: list[Evict | Abandon] = [
        Evict(old.key, 30, Why.LEFT),
        Abandon(_ref("begun").key, 10),
    ]
    going.sort(key=lambda action: action.key)
    assert decided.actions == (*going, Fetch(new.ref.key, 60))


def test_what_left_is_evicted_once_also_where_room_is_short() -> None:
    old = _entry("old", 40)
    actual = Actual(
        entries={old.key: old}, in_use=frozenset(), left={old.key: 0.0}, kept=frozenset()
    )
    decided = plan({}, actual, Volume(capacity=100, free=0, high=0.5, low=0.4), now=1e6)
    assert decided.actions == (Evict(old.key, 40, Why.LEFT),)


def test_all_that_left_goes_in_the_order_of_keys_also_what_frees_nothing() -> None:
    old = [_entry(name, size) for size, name in enumerate("abcdefgh")]
    actual = Actual(
        entries={entry.key: entry for entry in old},
        in_use=frozenset(),
        left={entry.key: 0.0 for entry in old},
    )
    decided = plan({}, actual, Volume(capacity=100, free=72), now=1e6)
    assert _keys(decided, Evict) == sorted(entry.key for entry in old)


def test_nothing_is_something_to_do_for_an_empty_node() -> None:
    assert plan({}, Actual(entries={}), Volume(capacity=0, free=0), now=0.0) == Plan()


# -- who has waited for long ----------------------------------------------------------------------


@many
@given(worlds())
def test_room_is_kept_only_for_one_who_has_waited_for_an_hour_and_can_get_it(world: World) -> None:
    decided = world.plan()
    behind = {key for key, block in decided.blocked.items() if "room is kept" in block.message}
    if not behind:
        return
    ahead = _blocked(decided, Blocked.INSUFFICIENT_CAPACITY) & starved(world) - behind
    assert ahead
    for key in behind:
        first = max(world.desired[other].priority for other in ahead)
        assert world.desired[key].priority <= first


def _starving(*, since: float, used_by_pod: bool) -> Plan:
    """A large want is short of 30 bytes that something on demand holds; a small one would fit."""
    large, small, held = _ingest("large", 70), _ingest("small", 20), _entry("held", 40)
    wants = {i.ref.key: Want(ref=i.ref) for i in (large, small)}
    wants[held.key] = Want(ref=held.ref, on_demand=used_by_pod)
    return plan(
        wants,
        Actual(
            entries={held.key: held},
            ingests={large.ref.key: large, small.ref.key: small},
            in_use=frozenset({held.key}) if used_by_pod else frozenset(),
            waiting={large.ref.key: since},
        ),
        Volume(capacity=100, free=60, high=0.9, low=0.7),
        now=1e6,
    )


def test_who_has_waited_for_an_hour_gets_the_next_room() -> None:
    small, large = _ref("small").key, _ref("large").key
    early = _starving(since=1e6 - 3599, used_by_pod=True)
    assert _keys(early, Fetch) == [small]
    assert early.wake_at == 1e6 + 1
    late = _starving(since=1e6 - 3600, used_by_pod=True)
    assert late.actions == ()
    assert "evicted" in late.blocked[large].message
    assert "the next room is kept for hf://acme/large" in late.blocked[small].message
    assert late.wake_at == 1e6 + 3600
    assert _keys(_starving(since=1e6 - 7200, used_by_pod=True), Fetch) == [small]
    assert _starving(since=1e6 - 3 * 3600, used_by_pod=True).actions == ()


def test_who_can_never_get_room_keeps_nobody_waiting() -> None:
    """What holds it is always wanted: only another desired state could make that room."""
    decided = _starving(since=1e6 - 3600, used_by_pod=False)
    assert _keys(decided, Fetch) == [_ref("small").key]


# -- limits and sharing ---------------------------------------------------------------------------


def test_a_limit_holds_although_the_disk_has_room() -> None:
    kept, new = _entry("kept", 40), _ingest("new", 30)
    actual = Actual(entries={kept.key: kept}, ingests={new.ref.key: new}, in_use=frozenset())
    volume = Volume(capacity=1000, free=900, limit=60)
    decided = plan({new.ref.key: Want(ref=new.ref)}, actual, volume, now=1e6)
    assert decided.actions == (Evict(kept.key, 40), Fetch(new.ref.key, 30))


OLD = _ref("old")
_KEEPS: dict[str, tuple[dict[str, object], dict[str, object] | None]] = {
    "a pod may be counted before it mounts anything": ({"demanded": frozenset({OLD.key})}, None),
    "a pod uses it": ({"in_use": frozenset({OLD.key})}, None),
    "an operator pinned it": ({"pinned": frozenset({OLD.key})}, None),
    "its cache pins it": ({}, {"on_demand": True, "pinned": True}),
    "it is always wanted": ({}, {}),
    "a newer revision is to take its place": (
        {"outdated": frozenset({OLD.key}), "staged": frozenset({OLD.key})},
        {"on_demand": True},
    ),
    "nobody knows yet whether it left": ({"kept": frozenset({OLD.key})}, None),
    "it is found damaged": ({"damaged": frozenset({OLD.key})}, None),
}


@pytest.mark.parametrize("why", _KEEPS)
def test_the_least_recently_used_is_no_victim_if(why: str) -> None:
    facts, asked = _KEEPS[why]
    old, newer, new = _entry("old", 40), _entry("newer", 40, last_used=9.0), _ingest("new", 30)
    actual = Actual(
        entries={entry.key: entry for entry in (old, newer)},
        ingests={new.ref.key: new},
        in_use=frozenset(),
    )
    actual = replace(actual, **facts)  # type: ignore[arg-type]
    wants = {new.ref.key: Want(ref=new.ref)}
    if asked is not None:
        wants[old.key] = Want(ref=old.ref, **asked)  # type: ignore[arg-type]
    decided = plan(wants, actual, Volume(capacity=1000, free=900, limit=80), now=1e6)
    assert OLD.key not in _keys(decided, Evict)
    assert _keys(decided, Evict) == [newer.key]


@pytest.mark.parametrize("where", ["in_use", "demanded", "kept", "pinned"])
def test_what_is_begun_is_no_victim_if_somebody_may_want_it(where: str) -> None:
    """Half of a model goes before any whole one, but for those."""
    begun, entry, new = _ingest("begun", 40, done=40), _entry("whole", 40), _ingest("new", 30)
    actual = Actual(
        entries={entry.key: entry},
        ingests={begun.ref.key: begun, new.ref.key: new},
        in_use=frozenset(),
    )
    wants, volume = {new.ref.key: Want(ref=new.ref)}, Volume(capacity=1000, free=900, limit=80)
    decided = plan(wants, actual, volume, now=1e6)
    assert _keys(decided, Evict, Abandon) == [begun.ref.key]
    actual = replace(actual, **{where: frozenset({begun.ref.key})})  # type: ignore[arg-type]
    assert _keys(plan(wants, actual, volume, now=1e6), Evict, Abandon) == [entry.key]


def test_what_would_free_nothing_is_no_victim() -> None:
    """A model of empty files."""
    empty, idle_one, new = _entry("empty", 0), _entry("idle", 40, last_used=9.0), _ingest("new", 30)
    actual = Actual(
        entries={entry.key: entry for entry in (empty, idle_one)},
        ingests={new.ref.key: new},
        in_use=frozenset(),
    )
    wants = {new.ref.key: Want(ref=new.ref)}
    decided = plan(wants, actual, Volume(capacity=1000, free=900, limit=40), now=1e6)
    assert decided.actions == (Evict(idle_one.key, 40), Fetch(new.ref.key, 30))


def test_what_has_arrived_of_a_download_is_no_room_below_a_limit() -> None:
    """The job has all of it; the ingest was looked at before."""
    coming, new = replace(_ingest("coming", 40), done=0), _ingest("new", 30)
    job = Job(key=coming.ref.key, stage=Stage.FETCHING, total=40, done=40)
    actual = Actual(
        entries={},
        ingests={coming.ref.key: coming, new.ref.key: new},
        jobs={job.key: job},
        in_use=frozenset(),
    )
    wants = {ref.key: Want(ref=ref) for ref in (coming.ref, new.ref)}
    decided = plan(wants, actual, Volume(capacity=1000, free=900, limit=60), now=1e6)
    assert decided.actions == ()
    assert decided.blocked[new.ref.key].why is Blocked.INSUFFICIENT_CAPACITY


def test_the_message_names_what_is_narrow() -> None:
    new = _ingest("new", 30)
    kept = _entry("kept", 40)
    actual = Actual(entries={kept.key: kept}, ingests={new.ref.key: new}, in_use=None)
    wants = {new.ref.key: Want(ref=new.ref, groups=frozenset({"a100"}))}
    limited = plan(wants, actual, Volume(capacity=1000, free=900, limit=60), now=1e6)
    assert "20 are free below the limit" in limited.blocked[new.ref.key].message
    groups = {"a100": 45}
    wants[kept.key] = Want(ref=kept.ref, groups=frozenset({"a100"}))
    volume = Volume(capacity=1000, free=900, group_limits=groups)
    of_group = plan(wants, actual, volume, now=1e6).blocked[new.ref.key].message
    assert of_group == "needs 30 more; the node group a100 may hold 45 here"


def test_a_group_at_its_limit_gives_up_its_own_and_nobody_elses() -> None:
    old, mine = _entry("old", 40), _entry("mine", 40, last_used=9.0)
    new = _ingest("new", 30)
    group = frozenset({"g"})
    decided = plan(
        {
            new.ref.key: Want(ref=new.ref, groups=group),
            mine.key: Want(ref=mine.ref, groups=group, on_demand=True),
        },
        Actual(
            entries={old.key: old, mine.key: mine},
            ingests={new.ref.key: new},
            in_use=frozenset(),
        ),
        Volume(capacity=1000, free=900, group_limits={"g": 50}),
        now=1e6,
    )
    assert decided.actions == (Evict(mine.key, 40), Fetch(new.ref.key, 30))


def test_what_a_wanted_model_shares_is_not_counted_on() -> None:
    """A fine-tune of 50 bytes, 40 of them its base's: evicting it would free 10, and 30 are short.
    So the next one goes, and the fine-tune stays."""
    shared = frozenset({(7, 40)})
    base = replace(_entry("base", 45), shared=shared)
    tuned = replace(_entry("tuned", 50, last_used=1.0), shared=shared)
    other = _entry("other", 30, last_used=2.0)
    new = _ingest("new", 30)
    decided = plan(
        {new.ref.key: Want(ref=new.ref), base.key: Want(ref=base.ref)},
        Actual(
            entries={entry.key: entry for entry in (base, tuned, other)},
            ingests={new.ref.key: new},
            in_use=frozenset(),
        ),
        Volume(capacity=100, free=10, high=0.9, low=0.7),
        now=1e6,
    )
    assert decided.actions == (Evict(tuned.key, 10), Evict(other.key, 30), Fetch(new.ref.key, 30))


def test_two_that_share_everything_go_together_or_not_at_all() -> None:
    shared = frozenset({(7, 40)})
    one = replace(_entry("one", 40), shared=shared)
    two = replace(_entry("two", 40, last_used=1.0), shared=shared)
    three = _entry("three", 40, last_used=2.0)
    new = _ingest("new", 40)
    actual = Actual(
        entries={entry.key: entry for entry in (one, two, three)},
        ingests={new.ref.key: new},
        in_use=frozenset(),
    )
    wants = {new.ref.key: Want(ref=new.ref)}
    volume = Volume(capacity=100, free=10, high=0.9, low=0.7)
    both = plan(wants, actual, volume, now=1e6)
    assert both.actions == (Evict(one.key, 0), Evict(two.key, 40), Fetch(new.ref.key, 40))
    used = plan(wants, replace(actual, in_use=frozenset({two.key})), volume, now=1e6)
    assert used.actions == (Evict(three.key, 40), Fetch(new.ref.key, 40))


# -- on demand ------------------------------------------------------------------------------------


def test_what_is_fetched_on_demand_waits_for_somebody_to_ask() -> None:
    want = Want(ref=_ref("model"), on_demand=True)
    volume = Volume(capacity=100, free=100)
    idle_plan = plan({want.key: want}, Actual(entries={}, in_use=frozenset()), volume, now=1e6)
    assert idle_plan == Plan()
    asked = Actual(entries={}, in_use=frozenset(), demanded=frozenset({want.key}))
    assert plan({want.key: want}, asked, volume, now=1e6).actions == (Resolve(want.key),)


def test_a_ttl_counts_from_the_last_use_and_wakes_in_time() -> None:
    kept = _entry("kept", 10, last_used=1e6 - 50)
    actual = Actual(entries={kept.key: kept}, in_use=frozenset())
    volume = Volume(capacity=100, free=90)

    def decided(ttl: float, *, on_demand: bool = True) -> Plan:
        want = Want(ref=kept.ref, on_demand=on_demand, ttl_seconds=ttl)
        return plan({kept.key: want}, actual, volume, now=1e6)

    assert decided(50).actions == (Evict(kept.key, 10, Why.EXPIRED),)
    assert decided(51) == Plan(wake_at=1e6 + 1)
    assert decided(50, on_demand=False) == Plan()


# -- what another agent left ---------------------------------------------------------------------


def _beside(
    foreign: Foreign | None,
    *,
    done: int = 0,
    in_use: frozenset[CacheKey] | None = frozenset(),
    **facts: object,
) -> Plan:
    """One eager want whose place somebody else's directory has, listed, on a disk that is full."""
    ref = _ref("left")
    ingest = Ingest(ref=ref, revision="r", total=100, done=done)
    beside = {} if foreign is None else {ref.key: foreign}
    given = {"ingests": {ref.key: ingest}, "foreign": beside, **facts}
    return plan(
        {ref.key: Want(ref=ref)},
        Actual(entries={}, in_use=in_use, **given),  # type: ignore[arg-type]  # by name
        Volume(capacity=100, free=0, high=1.0),
        now=NOW,
    )


def test_what_is_all_linked_needs_no_room() -> None:
    assert _beside(Foreign(lacking=frozenset()), done=100).actions == (Fetch(_ref("left").key, 0),)


def test_what_only_a_human_can_clear_takes_no_room_and_no_slot() -> None:
    decided = _beside(Foreign(lacking=frozenset(), obstacle="another user's"), done=100)
    assert decided.actions == ()
    block = decided.blocked[_ref("left").key]
    assert (block.why, block.message) == (Blocked.FOREIGN_DIRECTORY, "another user's")


@pytest.mark.parametrize("in_use", [frozenset(), None, frozenset({_ref("left").key})])
def test_what_is_proven_takes_its_place_exactly_when_nobody_uses_it(
    in_use: frozenset[CacheKey] | None,
) -> None:
    key = _ref("left").key
    staged = frozenset({key})
    decided = _beside(Foreign(lacking=frozenset()), done=100, in_use=in_use, staged=staged)
    assert decided.actions == ((Exchange(key),) if in_use == frozenset() else ())
    assert decided.blocked == {}
    gone = _beside(None, done=100, in_use=in_use, staged=staged)
    assert gone.actions == (Exchange(key),), "an empty place is nobody's"


def test_what_is_served_already_waits_behind_what_is_not() -> None:
    left, absent = _ref("left"), _ref("absent")
    wants = {left.key: Want(ref=left, priority=9), absent.key: Want(ref=absent)}
    foreign = {left.key: Foreign(lacking=frozenset())}
    volume = Volume(capacity=100, free=100, max_fetches=1)
    actual = Actual(entries={}, foreign=foreign)
    assert plan(wants, actual, volume, now=NOW).actions == (Resolve(absent.key),)
    differs = Actual(entries={}, foreign={left.key: Foreign(lacking=frozenset({"f"}))})
    assert plan(wants, differs, volume, now=NOW).actions == (Resolve(left.key),)


def test_what_is_fetched_on_demand_is_adopted_unasked_and_fetched_when_asked() -> None:
    ref, volume = _ref("left"), Volume(capacity=100, free=100)
    wants = {ref.key: Want(ref=ref, on_demand=True)}
    for foreign, actions in (
        (Foreign(), (Resolve(ref.key),)),
        (Foreign(lacking=frozenset()), (Resolve(ref.key),)),
        (Foreign(lacking=frozenset({"f"})), ()),
    ):
        actual = Actual(entries={}, foreign={ref.key: foreign})
        assert plan(wants, actual, volume, now=NOW).actions == actions


def test_a_link_to_what_another_agent_left_frees_nothing_and_counts_once() -> None:
    """Of a limit of 150, one model of 100 is taken, though it has two names."""
    left, new = _ref("left"), _ref("new")
    file = frozenset({(1, 100)})
    foreign = Foreign(bytes=100, shared=file, lacking=frozenset())
    linked = Ingest(ref=left, revision="r", total=100, done=100, shared=file)
    for size, fits in ((50, True), (51, False)):
        actual = Actual(
            entries={},
            ingests={left.key: linked, new.key: Ingest(ref=new, revision="r", total=size, done=0)},
            foreign={left.key: foreign},
            in_use=frozenset(),
        )
        volume = Volume(capacity=1000, free=900, limit=150)
        decided = plan({new.key: Want(ref=new)}, actual, volume, now=NOW)
        assert decided.actions == ((Fetch(new.key, size),) if fits else ())
