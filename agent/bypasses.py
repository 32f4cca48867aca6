"""Pods that went past the cache, each counted once: what is seen of a hook that does not work.

A hook that is down, slow, or has an expired certificate changes nothing (`failurePolicy: Ignore`):
pods start, and download. So the node looks at what pods download, whoever let them.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from agent.index import Index
from agent.kube.podspec import Pod
from agent.metrics import Metrics
from agent.model import cache_key
from agent.reconcile import Reconciler
from agent.status import rfc3339
from agent.usage import Offer, bypassed
from agent.words import Word, of_bypass


class Bypasses:
    """Over one open cache. `namespace` is the agent's own; `clock` gives Unix seconds."""

    def __init__(
        self,
        *,
        reconciler: Reconciler,
        index: Index,
        metrics: Metrics,
        tell: Callable[[Pod, Word], None],
        namespace: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reconciler = reconciler
        self._index = index
        self._metrics = metrics
        self._tell = tell
        self._namespace = namespace
        self._clock = clock
        self._counted: set[str] = set()
        self._since = ""
        self._offers: list[Offer] = []
        self._judged: set[str] = set()
        """With these offers: a tenant may write many URIs, and each turn is too often for them."""

    async def open(self) -> None:
        """Learn which pods were counted in an earlier life, and since when they are."""
        self._counted, since = await self._index.bypasses(self._clock())
        self._since = rfc3339(since)

    async def see(self, pods: Mapping[str, Pod], offers: Iterable[Offer]) -> None:
        """The pods of the node, by UID, and the models that its caches offer to them."""
        if (now := list(offers)) != self._offers:
            self._offers, self._judged = now, set()
        for uid in pods.keys() - self._judged - self._counted:
            found = bypassed(pods[uid], now, since=self._since)
            if found is not None:
                await self._count(pods[uid], *found)
        self._judged = set(pods)
        for uid in self._counted - pods.keys():
            self._counted.discard(uid)
            await self._index.forget_bypass(uid)

    async def _count(self, pod: Pod, uri: str, offer: Offer) -> None:
        """Written down before it is shown: who is killed in between must not count it again."""
        await self._index.record_bypass(pod.uid, self._clock())
        self._counted.add(pod.uid)
        self._metrics.pods_bypassed.inc()
        fact = self._reconciler.facts().get(cache_key(offer.uri))
        self._tell(pod, of_bypass(uri, fact, namespace=self._namespace))
