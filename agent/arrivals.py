"""Hits are counted where pods start (design D9): each pod once, on the node that it came to."""

import time
from collections.abc import Callable, Iterable, Mapping

from agent.index import Index
from agent.metrics import RESULTS, Metrics, Result
from agent.model import CacheKey
from agent.reconcile import Reconciler


class Arrivals:
    """Counts pods over one open cache."""

    def __init__(
        self,
        *,
        reconciler: Reconciler,
        index: Index,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reconciler = reconciler
        self._index = index
        self._metrics = metrics
        self._clock = clock
        self._ticks = ticks
        self._counted: set[str] = set()
        self._counts: dict[str, int] = {}
        self._using: dict[str, frozenset[CacheKey]] = {}
        self._waiting: dict[tuple[str, CacheKey], tuple[Result, float]] = {}

    async def open(self) -> None:
        """Learn which pods were counted in an earlier life."""
        self._counted, self._counts = await self._index.pods()

    @property
    def hits(self) -> int:
        return self._counts.get("hit", 0)

    @property
    def misses(self) -> int:
        """Pods that had to wait or to go without: what an operator would like to be none."""
        return self._counts.get("joined", 0) + self._counts.get("miss", 0)

    async def see(self, pods: Mapping[str, frozenset[CacheKey]]) -> None:
        """The pods of the node now, by UID, with the models that each uses; those that have ended
        are not among them."""
        for uid, keys in pods.items():
            # What is half way gone is looked at again when that is decided.
            going = any(map(self._reconciler.retiring, keys))
            if keys and uid not in self._counted and not going:
                await self._count(uid, keys)
        for uid in self._counted - set(pods):
            self._counted.discard(uid)
            await self._index.forget_pod(uid)
        gone = self._using.keys() - pods.keys()
        for uid in gone:  # it read its model until now
            await self._touch(self._using.pop(uid))
            for waiting in [key for key in self._waiting if key[0] == uid]:
                del self._waiting[waiting]
        self._using.update({uid: keys for uid, keys in pods.items() if keys})
        self._served()

    async def _count(self, uid: str, keys: frozenset[CacheKey]) -> None:
        """A pod is a hit if all that it uses is on offer.

        Written down before it is shown: who is killed in between must not count it once more.
        """
        results = {key: await self._result(key) for key in sorted(keys)}
        worst = max(results.values(), key=RESULTS.index)
        await self._index.record_pod(uid, worst, self._clock())
        self._counted.add(uid)
        self._counts[worst] = self._counts.get(worst, 0) + 1
        for key, result in results.items():
            self._metrics.requests.labels(result=result).inc()
            size = self._size(key)
            self._metrics.request_bytes.labels(result=result).inc(size)
            self._waiting[uid, key] = result, self._ticks()
            if result == "hit":
                await self._touch([key], uses=1)

    async def _result(self, key: CacheKey) -> Result:
        if await self._reconciler.look(key) or await self._reconciler.look_beside(key):
            return "hit"
        return "joined" if self._reconciler.on_its_way(key) else "miss"

    def _size(self, key: CacheKey) -> int:
        facts = self._reconciler.facts().get(key)
        if facts is None:
            return 0
        known = facts.entry.bytes if facts.entry else 0
        return known or (facts.ingest.total if facts.ingest else 0)

    def _served(self) -> None:
        """Note how long those have waited whose model is on offer now."""
        for (uid, key), (result, since) in list(self._waiting.items()):
            if result == "hit" or key in self._reconciler.sealed():
                del self._waiting[uid, key]
                self._metrics.pod_wait_seconds.labels(result=result).observe(self._ticks() - since)

    async def _touch(self, keys: Iterable[CacheKey], *, uses: int = 0) -> None:
        for key in keys:
            if key in self._reconciler.sealed():
                await self._reconciler.use(key, uses=uses)
