"""The promises of `plan`, each in words of its own: none asks the implementation for its order."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import inf
from random import Random
from typing import TypeVar

from hypothesis import event, given
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
    Fetch,
    Ingest,
    Job,
    ModelRef,
    Plan,
    Resolve,
    Stage,
    Volume,
    Want,
    Withdraw,
)
from agent.plan import plan
from tests.core.simulation import Simulation
from tests.core.worlds import (
    World,
    bytes_of,
    ceiling,
    evictable,
    many,
    missing,
    removable,
    room,
    running,
    to_come,
    worlds,
)

_V = TypeVar("_V")


def _keys(decided: Plan, *kinds: type[Action]) -> list[CacheKey]:
    """The keys of the actions of these kinds, in the order of the plan."""
    return [action.key for action in decided.actions if isinstance(action, kinds)]


def _victims(world: World, decided: Plan) -> list[CacheKey]:
    """What is evicted for room, in the order of the plan: not what goes because it left."""
    return [key for key in _keys(decided, Evict) if key not in removable(world)]


def _fetched_bytes(decided: Plan) -> int:
    return sum(action.bytes for action in decided.actions if isinstance(action, Fetch))


def _blocked(decided: Plan, why: Blocked) -> set[CacheKey]:
    return {key for key, block in decided.blocked.items() if block.why is why}


def _committed(world: World) -> int:
    """What will be on the disk when all is done that was begun."""
    return ceiling(world.volume) - room(world)


# -- eviction -----------------------------------------------------------------------------------


@many
@given(worlds())
def test_what_is_wanted_is_never_evicted(world: World) -> None:
    assert not set(_keys(world.plan(), Evict)) & set(world.desired)


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
    for key in _victims(world, world.plan()):
        age = world.now - world.actual.entries[key].sealed_at
        assert age >= world.volume.min_age_seconds


@many
@given(worlds())
def test_what_is_damaged_or_worked_on_is_never_evicted(world: World) -> None:
    busy = world.actual.damaged | set(world.actual.jobs)
    assert not set(_keys(world.plan(), Evict)) & busy


@many
@given(worlds())
def test_an_eviction_frees_what_it_says_and_that_is_something(world: World) -> None:
    """What left goes also if that frees nothing."""
    for action in world.plan().actions:
        if isinstance(action, Evict):
            assert action.bytes == world.actual.entries[action.key].bytes
            assert action.bytes > 0 or action.key in removable(world)


@many
@given(worlds())
def test_survivors_were_used_later_than_victims(world: World) -> None:
    """Least recently used first; of those used together, the one sealed first."""
    victims = set(_victims(world, world.plan()))
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
    victims = _victims(world, world.plan())
    used = [world.actual.entries[key].last_used for key in victims]
    assert all(earlier <= later for earlier, later in pairwise(used))


@many
@given(worlds())
def test_without_the_last_victim_it_would_not_have_been_enough(world: World) -> None:
    decided = world.plan()
    victims = _victims(world, decided)
    if not victims:
        return
    freed = bytes_of(world, victims[:-1])
    low = int(world.volume.capacity * world.volume.low)
    above_low = room(world) < 0 and room(world) + freed < ceiling(world.volume) - low
    too_little = room(world) + freed < _fetched_bytes(decided)
    assert above_low or too_little


@many
@given(worlds())
def test_above_the_high_mark_victims_go_down_to_the_low_mark(world: World) -> None:
    """As far as there are any."""
    if room(world) >= 0:
        return
    victims = _victims(world, world.plan())
    remains = _committed(world) - bytes_of(world, victims)
    low = int(world.volume.capacity * world.volume.low)
    assert remains <= low or set(victims) == set(evictable(world))


@many
@given(worlds())
def test_nothing_is_evicted_below_the_high_mark_unless_something_begins(world: World) -> None:
    """So with too few victims for a want, none goes: half an eviction helps nobody."""
    decided = world.plan()
    if room(world) >= 0 and not _keys(decided, Fetch):
        assert _victims(world, decided) == []


# -- what left the desired state ------------------------------------------------------------------


@many
@given(worlds())
def test_exactly_what_left_and_nothing_keeps_goes(world: World) -> None:
    """Whole or begun, however young it is, and whether room is short or not."""
    decided, whole = world.plan(), world.actual.entries.keys()
    left = removable(world)
    event("some left" if left else "none left")
    assert set(_keys(decided, Evict)) - evictable(world).keys() == left & whole
    assert set(_keys(decided, Abandon)) == left - whole


@many
@given(worlds())
def test_of_unknown_use_nothing_that_left_goes(world: World) -> None:
    unknown = replace(world, actual=replace(world.actual, in_use=None))
    assert _keys(unknown.plan(), Evict, Abandon) == []


@many
@given(worlds())
def test_what_is_used_or_wanted_again_is_neither_evicted_nor_abandoned(world: World) -> None:
    gone = set(_keys(world.plan(), Evict, Abandon))
    assert not gone & (set(world.desired) | (world.actual.in_use or set()))


@many
@given(worlds())
def test_what_nobody_said_may_go_is_no_victim(world: World) -> None:
    assert not set(_victims(world, world.plan())) & world.actual.kept


@many
@given(worlds())
def test_what_never_was_desired_is_not_abandoned(world: World) -> None:
    assert set(_keys(world.plan(), Abandon)) <= world.actual.left


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
    assert not (world.actual.left - set(world.desired) - used) & (there | actual.begun)


# -- room ---------------------------------------------------------------------------------------


@many
@given(worlds())
def test_what_begins_fits_below_the_high_mark(world: World) -> None:
    """With what runs, what is being unlinked and what is evicted for it."""
    decided = world.plan()
    if _fetched_bytes(decided) == 0:
        return
    volume = world.volume
    planned = volume.used - volume.reclaiming + to_come(world) + _fetched_bytes(decided)
    assert planned - bytes_of(world, _keys(decided, Evict)) <= volume.capacity * volume.high


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
    for key in _blocked(decided, Blocked.INSUFFICIENT_CAPACITY):
        ahead = sum(
            action.bytes
            for action in decided.actions
            if isinstance(action, Fetch)
            and world.desired[action.key].priority >= world.desired[key].priority
        )
        possible = room(world) + bytes_of(world, evictable(world)) - ahead
        assert world.actual.ingests[key].remaining > possible


@many
@given(worlds())
def test_what_is_larger_than_the_volume_is_said_to_be_and_nothing_else_is(world: World) -> None:
    decided = world.plan()
    refused = _blocked(decided, Blocked.LARGER_THAN_VOLUME)
    for key in missing(world) & set(world.actual.ingests):
        ingest = world.actual.ingests[key]
        too_large = ingest.total > ceiling(world.volume) and ingest.remaining > 0
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
        states = (ready, working, key in begun, key in withdrawn, key in decided.blocked)
        assert sum(states) == 1, (key, states)
    assert set(begun) | set(decided.blocked) <= missing(world)


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
    """Used or not, wanted or not; unless a job is on it already."""
    damaged = world.actual.damaged - set(world.actual.jobs)
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
    """Never is no time to wake at."""
    decided = world.plan()
    times = {world.actual.attempts[key].retry_at for key in _blocked(decided, Blocked.BACKING_OFF)}
    event("permanent" if inf in times else "in time" if times else "none")
    assert decided.wake_at == min(times - {inf}, default=None)


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
    before = max(ceiling(world.volume), _committed(world))
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
    """And an ingest that left gives up its name, not its bytes: they are not counted on."""
    old, kept = _entry("old", 30, last_used=9.0, sealed_at=1e6), _entry("kept", 20)
    new = _ingest("new", 60)
    decided = plan(
        {new.ref.key: Want(ref=new.ref)},
        Actual(
            entries={entry.key: entry for entry in (old, kept)},
            ingests={new.ref.key: new, _ref("begun").key: _ingest("begun", 90, 10)},
            in_use=frozenset(),
            left=frozenset((old.key, _ref("begun").key, _ref("never here").key)),
        ),
        Volume(capacity=100, free=40, high=0.9, low=0.7),
        now=1e6,
    )
    going: list[Evict | Abandon] = [Evict(old.key, 30), Abandon(_ref("begun").key)]
    going.sort(key=lambda action: action.key)
    assert decided.actions == (*going, Fetch(new.ref.key, 60))


def test_what_left_is_evicted_once_also_where_room_is_short() -> None:
    old = _entry("old", 40)
    actual = Actual(
        entries={old.key: old}, in_use=frozenset(), left=frozenset({old.key}), kept=frozenset()
    )
    decided = plan({}, actual, Volume(capacity=100, free=0, high=0.5, low=0.4), now=1e6)
    assert decided.actions == (Evict(old.key, 40),)


def test_all_that_left_goes_in_the_order_of_keys_also_what_frees_nothing() -> None:
    old = [_entry(name, size) for size, name in enumerate("abcdefgh")]
    actual = Actual(
        entries={entry.key: entry for entry in old},
        in_use=frozenset(),
        left=frozenset(entry.key for entry in old),
    )
    decided = plan({}, actual, Volume(capacity=100, free=72), now=1e6)
    assert _keys(decided, Evict) == sorted(entry.key for entry in old)


def test_nothing_is_something_to_do_for_an_empty_node() -> None:
    assert plan({}, Actual(entries={}), Volume(capacity=0, free=0), now=0.0) == Plan()
