"""The replay of the bench evicts what `plan` would, one by one, and no more than its bound says."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import event, given, settings
from hypothesis import strategies as st

from agent.model import Actual, CacheKey, Entry, Evict, Fetch, Ingest, ModelRef, Volume, Want
from agent.plan import plan
from bench.replay import Ours, Trace, _intervals, bound, ours

_MODELS = [ModelRef(uri=f"hf://bench/{number}") for number in range(8)]
_SIZES = st.lists(st.integers(1, 12), min_size=len(_MODELS), max_size=len(_MODELS))
# Several requests in one second tie: then sealed_at and the key decide.
_REQUESTS = st.lists(
    st.tuples(st.sampled_from((0, 0, 1, 5)), st.integers(0, len(_MODELS) - 1)), max_size=60
)
_many = settings(max_examples=400, deadline=None)


class _Planned:
    """A disk that asks `plan` at every request: wanted until it is there, then nobody's."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: dict[CacheKey, Entry] = {}

    def ask(self, ref: ModelRef, size: int, now: float) -> list[CacheKey] | None:
        ingest = Ingest(ref=ref, revision="1", total=size, done=0)
        used = sum(entry.bytes for entry in self.entries.values())
        decided = plan(
            desired={ref.key: Want(ref=ref)},
            actual=Actual(
                entries=self.entries,
                ingests={} if ref.key in self.entries else {ref.key: ingest},
                in_use=frozenset(),
            ),
            volume=Volume(
                capacity=self.capacity,
                free=self.capacity - used,
                high=1.0,
                low=1.0,
                max_fetches=1,
                min_age_seconds=0.0,
            ),
            now=now,
        )
        if ref.key in self.entries:
            assert decided.actions == ()
            self.entries[ref.key] = replace(self.entries[ref.key], last_used=now)
            return None
        evicted = [action.key for action in decided.actions if isinstance(action, Evict)]
        for key in evicted:
            del self.entries[key]
        if any(isinstance(action, Fetch) for action in decided.actions):
            self.entries[ref.key] = Entry(
                ref=ref,
                revision="1",
                fingerprint="",
                bytes=size,
                files=1,
                sealed_at=now,
                last_used=now,
            )
        return evicted


@_many
@given(sizes=_SIZES, requests=_REQUESTS, capacity=st.integers(5, 40))
def test_it_evicts_what_plan_evicts_in_its_order(
    sizes: Sequence[int], requests: Sequence[tuple[int, int]], capacity: int
) -> None:
    replay, planned, now = Ours(capacity), _Planned(capacity), 1000.0
    for later, number in requests:
        now += later
        ref = _MODELS[number]
        expected = planned.ask(ref, sizes[number], now)
        assert replay.ask(ref.key, sizes[number], now) == expected
        event("hit" if expected is None else f"evicts {min(len(expected), 3)}")


@_many
@given(
    sizes=_SIZES,
    requests=st.lists(st.integers(0, len(_MODELS) - 1), min_size=1, max_size=60),
    capacity=st.integers(1, 60),
)
def test_it_hits_no_more_than_anything_can(
    sizes: Sequence[int], requests: Sequence[int], capacity: int
) -> None:
    trace = Trace(requests=requests, sizes=sizes, alive=sum(sizes))
    found, most = ours(trace, capacity), bound(trace, _intervals(trace), capacity)
    assert found.requests <= most.requests + 1e-9
    assert found.bytes <= most.bytes + 1e-9
