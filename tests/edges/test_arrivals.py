"""Pods are counted where they start: each once, by its worst model, over restarts too."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from agent.arrivals import Arrivals
from agent.index import Index
from agent.metrics import RESULTS, Metrics
from agent.model import CacheKey, Entry, Ingest, ModelRef, cache_key
from agent.reconcile import Reconciler
from agent.status import Facts

READY, BEGUN, ABSENT, DAMAGED = (f"hf://acme/{name}" for name in ("ready", "begun", "no", "bad"))
SIZE = 1000


class Cache:
    """What a Reconciler would say and be told."""

    def __init__(self) -> None:
        self.on_offer = {cache_key(READY), cache_key(DAMAGED)}
        self.damaged = {cache_key(DAMAGED)}
        self.coming = {cache_key(BEGUN)}
        self.going: set[CacheKey] = set()
        self.left: set[CacheKey] = set()
        self.used: list[tuple[CacheKey, int]] = []

    def sealed(self) -> set[CacheKey]:
        return self.on_offer - self.damaged

    async def look(self, key: CacheKey) -> bool:
        return key in self.sealed()

    async def look_beside(self, key: CacheKey) -> bool:
        return key in self.left

    def on_its_way(self, key: CacheKey) -> bool:
        return key in self.coming

    async def use(self, key: CacheKey, *, uses: int = 1) -> None:
        self.used.append((key, uses))

    def retiring(self, key: CacheKey) -> bool:
        return key in self.going

    def facts(self) -> dict[CacheKey, Facts]:
        found = {}
        for uri in (READY, BEGUN):
            ref = ModelRef(uri=uri)
            entry = Entry(
                ref=ref,
                revision="r",
                fingerprint="sha256:00",
                bytes=SIZE,
                files=1,
                sealed_at=0.0,
                last_used=0.0,
            )
            ingest = Ingest(ref=ref, revision="r", total=SIZE, done=1)
            there = ref.key in self.on_offer
            found[ref.key] = Facts(
                key=ref.key,
                ref=ref,
                wanted=True,
                entry=entry if there else None,
                ingest=None if there else ingest,
            )
        return found


class Node:
    """Arrivals over one cache, with the clock in a test's hand."""

    def __init__(self, cache: Cache, index: Index) -> None:
        self.cache = cache
        self.now = 50.0
        self.metrics = Metrics()
        self.arrivals = Arrivals(
            reconciler=cast(Reconciler, cache),
            index=index,
            metrics=self.metrics,
            ticks=lambda: self.now,
        )

    async def see(self, **pods: str | list[str]) -> None:
        """Pods by UID, with the URIs they use."""
        await self.arrivals.see(
            {
                uid: frozenset(map(cache_key, [uris] if isinstance(uris, str) else uris))
                for uid, uris in pods.items()
            }
        )

    def value(self, name: str, result: str) -> float:
        found = self.metrics.registry.get_sample_value(f"localmodel_{name}", {"result": result})
        assert found is not None
        return found

    def counted(self) -> dict[str, float]:
        """Models asked for, by result."""
        return {result: self.value("requests_total", result) for result in RESULTS}


@asynccontextmanager
async def node(home: Path, cache: Cache | None = None) -> AsyncIterator[Node]:
    index = Index(home / "index.sqlite3", rebuild=lambda: ())
    await index.open()
    try:
        made = Node(cache or Cache(), index)
        await made.arrivals.open()
        yield made
    finally:
        await index.close()


@pytest.mark.parametrize(
    ("uris", "result"),
    [
        (READY, "hit"),
        (BEGUN, "joined"),
        (ABSENT, "miss"),
        (DAMAGED, "miss"),
        ([READY, BEGUN], "joined"),
        ([READY, ABSENT], "miss"),
        ([BEGUN, ABSENT, READY], "miss"),
    ],
)
async def test_a_pod_is_as_good_as_its_worst_model(tmp_path: Path, uris: Any, result: str) -> None:
    async with node(tmp_path) as found:
        await found.see(a=uris)
        assert found.arrivals.hits == (result == "hit")
        assert found.arrivals.misses == (result != "hit")
        models = [uris] if isinstance(uris, str) else uris
        assert sum(found.counted().values()) == len(models)
        assert found.counted()[result] == 1


async def test_what_another_agent_left_is_a_hit_that_nobody_waited_for(tmp_path: Path) -> None:
    async with node(tmp_path) as found:
        found.cache.left = {cache_key(ABSENT)}
        await found.see(a=ABSENT)
        assert (found.arrivals.hits, found.arrivals.misses) == (1, 0)
        assert found.value("pod_wait_seconds_count", "hit") == 1
        assert found.value("pod_wait_seconds_sum", "hit") == 0


async def test_a_pod_is_counted_once_also_over_a_restart(tmp_path: Path) -> None:
    async with node(tmp_path) as found:
        for _ in range(3):
            await found.see(a=READY, b=ABSENT)
        assert (found.arrivals.hits, found.arrivals.misses) == (1, 1)
    async with node(tmp_path) as found:
        assert (found.arrivals.hits, found.arrivals.misses) == (1, 1), "before any pod is seen"
        await found.see(a=READY, b=ABSENT, c=READY)
        assert (found.arrivals.hits, found.arrivals.misses) == (2, 1)
        assert found.counted() == {"hit": 1, "joined": 0, "miss": 0}


async def test_the_numbers_outlive_their_pods(tmp_path: Path) -> None:
    async with node(tmp_path) as found:
        await found.see(a=READY)
        await found.see()
        await found.see(b=READY)
    async with node(tmp_path) as found:
        assert found.arrivals.hits == 2
        # The same UID never comes again; a row that is gone is no reason to grow.
        await found.see()
    async with node(tmp_path) as found:
        assert (await found.arrivals._index.pods())[0] == set()


async def test_pods_that_use_no_model_are_not_counted_until_they_do(tmp_path: Path) -> None:
    async with node(tmp_path) as found:
        await found.see(a=[])
        assert found.counted() == {"hit": 0, "joined": 0, "miss": 0}
        await found.see(a=READY)
        assert found.counted() == {"hit": 1, "joined": 0, "miss": 0}


async def test_a_model_that_is_half_way_gone_is_counted_when_that_is_decided(
    tmp_path: Path,
) -> None:
    async with node(tmp_path) as found:
        found.cache.going = {cache_key(READY)}
        await found.see(a=READY)
        assert found.arrivals.hits + found.arrivals.misses == 0
        found.cache.going.clear()
        await found.see(a=READY)
        assert (found.arrivals.hits, found.arrivals.misses) == (1, 0)


async def test_arrivals_and_departures_are_uses(tmp_path: Path) -> None:
    key = cache_key(READY)
    async with node(tmp_path) as found:
        await found.see(a=READY)
        assert found.cache.used == [(key, 1)]
        await found.see(a=READY)
        assert found.cache.used == [(key, 1)]
        await found.see()
        assert found.cache.used == [(key, 1), (key, 0)], "read until now, and no other use"
    # One that was counted in an earlier life, and leaves in this one.
    async with node(tmp_path) as found:
        await found.see(b=READY)
    async with node(tmp_path) as found:
        await found.see(b=READY)
        await found.see()
        assert found.cache.used == [(key, 0)]


async def test_what_is_not_on_offer_is_not_used(tmp_path: Path) -> None:
    async with node(tmp_path) as found:
        await found.see(a=[BEGUN, ABSENT, DAMAGED])
        await found.see()
        assert found.cache.used == []


async def test_how_long_pods_wait_is_noted_when_their_model_is_on_offer(tmp_path: Path) -> None:
    async with node(tmp_path) as found:
        await found.see(a=READY, b=BEGUN, c=BEGUN, d=ABSENT)
        assert found.value("pod_wait_seconds_count", "hit") == 1
        assert found.value("pod_wait_seconds_sum", "hit") == 0
        found.now += 30
        await found.see(a=READY, b=BEGUN, d=ABSENT)  # one gave up
        found.cache.on_offer.add(cache_key(BEGUN))
        found.now += 10
        for _ in range(2):
            await found.see(a=READY, b=BEGUN, d=ABSENT)
        assert found.value("pod_wait_seconds_count", "joined") == 1
        assert found.value("pod_wait_seconds_sum", "joined") == 40
        assert found.value("pod_wait_seconds_count", "miss") == 0
        found.cache.on_offer.add(cache_key(ABSENT))
        found.now += 5
        await found.see(a=READY, b=BEGUN, d=ABSENT)
        assert found.value("pod_wait_seconds_sum", "miss") == 45


async def test_bytes_are_those_of_the_models_asked_for(tmp_path: Path) -> None:
    async with node(tmp_path) as found:
        await found.see(a=READY, b=READY, c=BEGUN, d=ABSENT)
        sizes = {result: found.value("request_bytes_total", result) for result in RESULTS}
        assert sizes == {"hit": 2 * SIZE, "joined": SIZE, "miss": 0}
