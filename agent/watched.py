"""The hook's world, kept up to date by watches: nothing is asked for while a pod waits (design D8).

Whatever changes only marks its part as stale; the next question makes that part anew. What changes
often, the models of each node, is kept node by node.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from agent.hook import objects, volumes
from agent.hook.objects import Heartbeat, Holding
from agent.hook.scheduling import Node
from agent.hook.world import Group, World
from agent.kserve import KServe
from agent.kube import parse
from agent.kube.client import Api, Json
from agent.kube.watch import Watch
from agent.model import CacheKey
from agent.unchanged import Unchanged

T = TypeVar("T")

Part = Literal["caches", "groups", "nodes", "holdings", "leases", "inject", "claims", "volumes"]

_SERVING = f"/apis/{parse.GROUP}/{parse.VERSION}"
_BEAT_SECONDS = 1.0
_SKEW_SECONDS = 300.0
"""How far the clock of a node may be behind ours. Only for a Lease that we have seen no renewal of
yet: an agent that died yesterday must not count as alive because we have just started."""

_OURS = {"labelSelector": "=".join(volumes.MANAGED)}
_INJECT = {"labelSelector": f"{parse.ANNOTATIONS}/inject=enabled"}


class Watched:
    """Everything that the hook and the volumes are decided from."""

    def __init__(
        self,
        api: Api,
        *,
        namespace: str,
        kserve_namespace: str,
        entrypoints: Mapping[str, tuple[str, ...]],
        changed: Callable[[Part], None],
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """`namespace` is that of the agents' Leases; `changed` is told what has changed."""
        self._api = api
        self._changed = changed
        self._clock = clock
        self._ticks = ticks
        self._stale: set[Part] = set()
        self._beat_at = -_BEAT_SECONDS
        self._beats: dict[str, Unchanged[Heartbeat]] = {}
        self._taken: dict[str, Holding] = {}
        self._holders: dict[CacheKey, frozenset[str]] = {}
        self._sizes: dict[CacheKey, int] = {}
        self._capacity: dict[str, int] = {}
        self._world = World(
            entrypoints=entrypoints,
            holders=self._holders,
            sizes=self._sizes,
            capacity=self._capacity,
        )
        self.kserve = KServe(api, namespace=kserve_namespace, changed=partial(self._mark, "caches"))
        self._caches = self._watch("caches", f"{_SERVING}/localmodelcaches", objects.cache)
        self._namespace_caches = self._watch(
            "caches", f"{_SERVING}/localmodelnamespacecaches", objects.cache, none_on=(404,)
        )
        self.groups = self._watch("groups", f"{_SERVING}/localmodelnodegroups", objects.group)
        self._nodes: Watch[Node | None] = self._watch("nodes", "/api/v1/nodes", objects.node)
        self._holdings = self._watch("holdings", f"{_SERVING}/localmodelnodes", objects.holding)
        self._leases = self._watch(
            "leases", f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases",
            objects.heartbeat,
        )  # fmt: skip
        self._namespaces = self._watch(
            "inject", "/api/v1/namespaces", objects.is_staying, params=_INJECT, metadata_only=True
        )
        self.claims = self._watch(
            "claims", "/api/v1/persistentvolumeclaims", volumes.claim, params=_OURS
        )
        self.volumes = self._watch(
            "volumes", "/api/v1/persistentvolumes", volumes.volume, params=_OURS
        )

    def _watch(self, part: Part, path: str, read: Callable[[Json], T], **options: Any) -> Watch[T]:
        return Watch(self._api, path, parse=read, changed=partial(self._mark, part), **options)

    @property
    def watches(self) -> tuple[Watch[Any], ...]:
        return (
            *(self._caches, self._namespace_caches, self.groups, self._nodes, self._holdings),
            *(self._leases, self._namespaces, self.claims, self.volumes),
            *self.kserve.watches,
        )

    @property
    def listed(self) -> bool:
        """Whether every list has arrived once: before that, absence means nothing."""
        return all(watch.listed.is_set() for watch in self.watches)

    @property
    def failures(self) -> list[str]:
        """What each watch failed with last, of those that have not come since."""
        return sorted({watch.failure for watch in self.watches} - {""})

    @property
    def injected(self) -> frozenset[str]:
        """The namespaces with our label."""
        return frozenset(name for name, there in self._namespaces.objects.items() if there)

    @property
    def kept(
        self,
    ) -> tuple[Iterable[Group], frozenset[str], Iterable[volumes.Claim], Iterable[volumes.Volume]]:
        """What `hook.volumes` plans and offers from: node groups, namespaces, claims, volumes."""
        groups, claims, made = self.groups.objects, self.claims.objects, self.volumes.objects
        return groups.values(), self.injected, claims.values(), made.values()

    @property
    def world(self) -> World:
        """As it is now."""
        stale, self._stale = self._stale, set()
        changes: dict[str, Any] = {}
        if "caches" in stale:
            found = (*self._caches.objects.values(), *self._namespace_caches.objects.values())
            changes["caches"] = objects.usable(found, self.kserve.containers)
            changes["job_namespace"] = self.kserve.job_namespace
        if "groups" in stale:
            changes["groups"] = dict(self.groups.objects)
        if "nodes" in stale:
            changes["nodes"] = tuple(node for node in self._nodes.objects.values() if node)
        if stale & {"claims", "volumes", "groups", "inject"}:
            changes["claims"] = volumes.offered(*self.kept)
        if "inject" in stale:
            changes["inject"] = self.injected
        if "holdings" in stale:
            self._take_holdings()
        if "leases" in stale or self._ticks() - self._beat_at >= _BEAT_SECONDS:
            live = self._live()
            if live != self._world.live:
                changes["live"] = live
        if changes:
            self._world = replace(self._world, **changes)
        return self._world

    def _mark(self, part: Part) -> None:
        self._stale.add(part)
        self._changed(part)

    def _take_holdings(self) -> None:
        """Of the nodes that have changed. `World` shares these maps with threads that read them, so
        a set in them is replaced, and never changed."""
        found = self._holdings.objects
        for name in self._taken.keys() | found.keys():
            old, new = self._taken.get(name, _NOTHING), found.get(name, _NOTHING)
            if old is new:
                continue
            for key in old.keys - new.keys:
                self._holders[key] = self._holders[key] - {name}
            for key in new.keys - old.keys:
                self._holders[key] = self._holders.get(key, frozenset()) | {name}
            self._sizes.update(new.sizes)
            if new.capacity is None:
                self._capacity.pop(name, None)
            else:
                self._capacity[name] = new.capacity
        self._taken = dict(found)

    def _live(self) -> frozenset[str]:
        """The nodes whose agent has renewed its Lease within its time."""
        now = self._beat_at = self._ticks()
        found = self._leases.objects
        self._beats = {
            name: self._beats.get(name) or Unchanged(beat, now - self._age(beat))
            for name, beat in found.items()
        }
        return frozenset(
            name.rpartition("/")[2]
            for name, beat in found.items()
            if self._beats[name].seconds(beat, now) <= beat.seconds and beat.holder
        )

    def _age(self, beat: Heartbeat) -> float:
        """Seconds since its renewal for certain, of one that we see for the first time."""
        return max(0.0, self._clock() - beat.renewed_at - _SKEW_SECONDS)


_NOTHING = Holding()
