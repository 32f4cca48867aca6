"""What the API server says to one node, and what the node says back (design D15, D16).

Seven watches, a Lease, a status, Events, a list of the node's pods before a model goes, and what a
cache names of credentials; nothing else is ever asked of the API server. The cache itself is kept
by `reconcile`, which does not know that there is a cluster.
"""

import asyncio
import hashlib
import logging
import socket
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from math import inf
from typing import Any

from agent import __version__, disk, layout, usage
from agent.access import Access
from agent.arrivals import Arrivals
from agent.authorities import Authorities
from agent.config import Settings
from agent.errors import AgentError, Reason
from agent.kserve import KServe
from agent.kube import parse, podspec
from agent.kube.client import Api
from agent.kube.events import Recorder, Subject
from agent.kube.lease import Lease
from agent.kube.nodestatus import compose, disk_numbers
from agent.kube.parse import CacheMeta, Group, NodeObject
from agent.kube.podspec import Pod
from agent.kube.watch import Watch
from agent.kube.writer import StatusWriter
from agent.model import CacheKey
from agent.phases import Phase
from agent.publish import Body
from agent.reconcile import Reconciler
from agent.sources import scheme_of
from agent.tasks import flagged
from agent.usage import Offer
from agent.wishes import Desired, of_node
from agent.words import Word

_log = logging.getLogger(__name__)

_ORPHAN_SECONDS = 2.0
"""How long an entry waits for its cache, whose annotations may say which bytes are wanted. The two
come by different watches, milliseconds apart."""

_SETTLE_SECONDS = 2.0
_LAST_WORD_SECONDS = 3.0  # of the thirty that a pod has
_SERVING = f"/apis/{parse.GROUP}/{parse.VERSION}"
_OTHERS = frozenset({Reason.OTHER_AGENT, Reason.LOCKED})
_REASONS = frozenset(reason.value for reason in Reason)


class Cluster:
    """One node's side of a cluster."""

    def __init__(
        self,
        api: Api,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        assert settings.node_name is not None
        self._api = api
        self._settings = settings
        self._clock = clock
        self._ticks = ticks
        self._me = _identity(settings)
        self._loop = asyncio.get_running_loop()
        self._flag = asyncio.Event()
        self._reconciler: Reconciler | None = None
        self._arrivals: Arrivals | None = None
        self._bodies: Mapping[str, Body] = {}
        self._disk: dict[str, int] | None = None
        self._refusal: AgentError | None = None
        self._seen_groups: set[str] = set()
        self._orphans: dict[str, float] = {}
        self._confirmed: set[str] = set()
        self._changed_at = -inf
        node = settings.node_name
        self._node = Watch(
            api,
            f"{_SERVING}/localmodelnodes",
            parse=parse.node,
            changed=self._node_changed,
            params={"fieldSelector": f"metadata.name={node}"},
        )
        self._on_node = {"fieldSelector": f"spec.nodeName={node}"}
        self._pods = Watch(
            api, "/api/v1/pods", parse=podspec.pod, changed=self.wake, params=self._on_node
        )
        self._groups: Watch[Group] = Watch(
            api, f"{_SERVING}/localmodelnodegroups", parse=parse.group, changed=self.wake
        )
        self._caches = self._metadata("localmodelcaches", "LocalModelCache")
        # KServe 0.17 and older has no such kind.
        self._namespace_caches = self._metadata(
            "localmodelnamespacecaches", "LocalModelNamespaceCache", none_on=(404,)
        )
        self._kserve = KServe(api, namespace=settings.kserve_namespace, changed=self.wake)
        self._lease = Lease(
            api,
            settings.pod_namespace,
            node,
            holder=self._me,
            gone=self._is_gone,
            changed=self.wake,
        )
        self._writer = StatusWriter(
            api, node, compose=self._compose, contested=self._tell_of_another_writer
        )
        self._recorder = Recorder(api, node=node)
        self.access = self._access().given

    def _access(self) -> Access:
        return Access(
            self._api,
            config_namespace=self._settings.kserve_namespace,
            watched=self._kserve.read,
            authorities=Authorities(self._settings.state_directory / layout.AUTHORITIES).file,
        )

    def _metadata(
        self, plural: str, kind: str, *, none_on: Collection[int] = ()
    ) -> Watch[CacheMeta]:
        return Watch(
            self._api,
            f"{_SERVING}/{plural}",
            parse=lambda raw: parse.cache_meta(raw, kind),
            changed=self.wake,
            metadata_only=True,
            none_on=none_on,
        )

    @property
    def _watches(self) -> tuple[Watch[Any], ...]:
        ours = (self._node, self._pods, self._groups, self._caches, self._namespace_caches)
        return *ours, *self._kserve.watches

    def work(self) -> list[Coroutine[Any, Any, None]]:
        """Everything that goes on beside the cache, each until cancelled."""
        others = (self._writer.run(), self._recorder.run())
        return [*(watch.run() for watch in self._watches), self._hold_the_lease(), *others]

    async def _hold_the_lease(self) -> None:
        await self._pods.listed.wait()  # else nobody can tell whether the last holder is gone
        await self._lease.run()

    async def last_word(self) -> None:
        """Say what has not been said yet, while it is known: the cache is about to be closed."""
        try:
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await self._writer.flush()
        except (AgentError, TimeoutError) as error:
            _log.info("the last status is not written: %s", error)

    async def leave(self) -> None:
        """Let the next agent in."""
        await self._lease.release()

    # -- hearing ------------------------------------------------------------------------------

    async def listed(self) -> None:
        """Wait until every list has arrived once, and it is known whose node this is: before that,
        absence means nothing."""
        for watch in self._watches:
            await watch.listed.wait()
        await self._lease.answered.wait()

    def _is_gone(self, holder: str) -> bool:
        """Whether another holder of the Lease has left the node; a stale list knows nothing."""
        fresh = self._pods.current and not self._pods.unreadable
        return fresh and usage.holder_is_gone(holder, self._pods.objects)

    def wake(self) -> None:
        self._flag.set()

    async def woken(self, seconds: float) -> None:
        """Wait for a change, or so long."""
        await flagged(self._flag, seconds)
        self._writer.changed()

    def _node_changed(self) -> None:
        self._changed_at = self._ticks()
        self._writer.seen(self._object)
        self.wake()

    @property
    def _object(self) -> NodeObject | None:
        return next(iter(self._node.objects.values()), None)

    @property
    def _served(self) -> str:
        return usage.served_at(str(self._settings.root), self._pods.objects.values(), self._me)

    def desired(self) -> Desired:
        metas = (*self._caches.objects.values(), *self._namespace_caches.objects.values())
        caches = {(meta.namespace, meta.name): meta for meta in metas}
        return of_node(
            self._object,
            caches,
            self._groups.objects,
            unconfirmed=self._unconfirmed(caches),
            check=scheme_of,
            served=self._served,
            containers=self._kserve.containers,
        )

    @property
    def look_seconds(self) -> float | None:
        """How often KServe wants the models to be looked at; None where it does not say."""
        return self._kserve.look_seconds

    def _unconfirmed(self, caches: Mapping[tuple[str, str], CacheMeta]) -> set[str]:
        """Entries without a cache, for as long as its watch may just not have heard of it yet.

        Once it is sure that there is none, it stays so: a watch that breaks later must not take
        away what is being downloaded.
        """
        now = self._ticks()
        entries = self._object.entries if self._object else ()
        known = {entry.name for entry in entries if (entry.namespace, entry.model) in caches}
        self._confirmed &= {entry.name for entry in entries}
        self._confirmed |= known
        waiting = [entry for entry in entries if entry.name not in self._confirmed]
        if any(entry.name not in self._orphans for entry in waiting):
            self._loop.call_later(_ORPHAN_SECONDS + 0.1, self.wake)
        self._orphans = {entry.name: self._orphans.get(entry.name, now) for entry in waiting}
        for entry in waiting:
            watch = self._namespace_caches if entry.namespace else self._caches
            if watch.current and now - self._orphans[entry.name] >= _ORPHAN_SECONDS:
                self._confirmed.add(entry.name)
        return self._orphans.keys() - self._confirmed

    def obstacle(self) -> AgentError | None:
        """Why this agent must not manage the cache now."""
        return usage.rival(self._pods.objects.values()) or self._lease.obstacle()

    # -- who uses what ------------------------------------------------------------------------

    async def in_use(self) -> frozenset[CacheKey] | None:
        """The models in use by the pods of the node, as far as the watch has heard."""
        if not self._pods.current or self._pods.unreadable:
            return None
        return self._all_keys(self._pods.objects)

    async def in_use_now(self) -> frozenset[CacheKey] | None:
        """The same by a list of its own, by quorum; None where the server cannot answer."""
        try:
            page = await self._api.list("/api/v1/pods", self._on_node)
            pods = {raw["metadata"]["uid"]: podspec.pod(raw) for raw in page["items"] or ()}
        except (AgentError, LookupError, TypeError, AttributeError, ValueError) as error:
            _log.warning("nobody can tell who uses the models: %s", error)
            return None
        return self._all_keys(pods)

    def users(self) -> dict[str, frozenset[CacheKey]]:
        """The models that each pod uses, by UID, of those that have not ended."""
        return self._keys(self.pods())

    def pods(self) -> dict[str, Pod]:
        """The pods of the node that have not ended, by UID."""
        return {pod.uid: pod for pod in self._pods.objects.values() if not pod.finished}

    def naming(self) -> dict[str, tuple[Pod, frozenset[CacheKey]]]:
        """Those of them that name models, with these: not who mounts a whole cache."""
        served, pods = self._served, self.pods()
        named = {u: usage.keys_of(p, present=(), groups=(), served=served) for u, p in pods.items()}
        return {uid: (pods[uid], keys) for uid, keys in named.items() if keys}

    def offers(self) -> list[Offer]:
        """The models that caches offer to the pods of this node."""
        entries = self._object.entries if self._object else ()
        return [
            Offer(uri=entry.uri, namespace=entry.namespace, since=meta.created)
            for entry in entries
            if (meta := self._meta(entry.name)) is not None
        ]

    def who_uses(self, key: CacheKey) -> list[str]:
        """The pods of the node that use a model, as far as the watch has heard."""
        named = {pod.uid: pod for pod in self._pods.objects.values()}
        return sorted(
            f"pod {named[uid].namespace}/{named[uid].name}"
            + ("" if key in named[uid].keys else ", which mounts the whole cache")
            for uid, keys in self.users().items()
            if key in keys
        )

    def _all_keys(self, pods: Mapping[str, Pod]) -> frozenset[CacheKey]:
        return frozenset().union(*self._keys(pods).values())

    def _keys(self, pods: Mapping[str, Pod]) -> dict[str, frozenset[CacheKey]]:
        present = self._reconciler.present() if self._reconciler else ()
        # A group that goes leaves its pods; entries may go on naming it.
        self._seen_groups.update(self._groups.objects)
        entries = self._object.entries if self._object else ()
        self._seen_groups.update(entry.group for entry in entries if entry.group)
        served = self._served
        return {
            uid: usage.keys_of(pod, present=present, groups=self._seen_groups, served=served)
            for uid, pod in pods.items()
        }

    # -- saying -------------------------------------------------------------------------------

    def manages(self, reconciler: Reconciler | None, arrivals: Arrivals | None = None) -> None:
        """The cache is open; None: not any more."""
        self._reconciler, self._arrivals = reconciler, arrivals
        if reconciler is None:
            return
        if self._refusal is not None:
            _log.info("manages the cache")
        self._refusal = None

    def refuse(self, obstacle: AgentError) -> None:
        """Nothing is managed, and this is why."""
        before, self._refusal = self._refusal, obstacle
        if before is None or before.message != obstacle.message:
            _log.warning("does not manage the cache: %s", obstacle.message)
            self._tell_the_node("Warning", obstacle.reason, obstacle.message)
        self._writer.changed()

    def not_ready(self) -> str | None:
        """Why this agent is not ready, for its probe; None when it is."""
        if self._refusal is not None:
            return f"{self._refusal.reason}: {self._refusal.message}"
        if self._reconciler is None:
            failures = {watch.failure for watch in self._watches} | {self._lease.failure}
            return "; ".join(["waits for the API server", *sorted(failures - {""})])
        return self._reconciler.not_ready()

    @property
    def turned_at(self) -> float:
        """When the loop last turned, monotonic; without a cache there is none to turn."""
        return self._reconciler.turned_at if self._reconciler else time.monotonic()

    def write(self, bodies: Mapping[str, Body]) -> None:
        """The models as they are now. Called on a thread that may wait for the disk."""
        space = disk.space(self._settings.root)
        reserved = sum(
            body["bytes"] - body["downloadedBytes"]
            for body in bodies.values()
            if body["state"] in (Phase.FETCHING, Phase.VERIFYING)
        )
        numbers = disk_numbers(space, limit=self._limit(space.capacity), reserved=reserved)
        self._loop.call_soon_threadsafe(self._said, dict(bodies), numbers)

    def _limit(self, capacity: int) -> int:
        """What the cache may take: by the high mark, by --limit, by its node groups."""
        bounds = [capacity]
        if self._reconciler is not None:
            policy = self._reconciler.policy
            bounds.append(int(capacity * policy.high))
            bounds += [policy.limit] if policy.limit is not None else []
        groups = {entry.group for entry in self._object.entries} if self._object else set()
        known = [group for group in self._groups.objects.values() if group.name in groups]
        limits = [group.limit for group in known if group.limit is not None]
        if limits and len(limits) == len(groups):  # one without a limit is bounded by the disk
            bounds.append(sum(limits))
        return min(bounds)

    def _said(self, bodies: dict[str, Body], numbers: dict[str, int]) -> None:
        for name, body in bodies.items():
            self._tell_of_change(name, self._bodies.get(name, {}), body)
        self._bodies = bodies
        # Others write to the disk too, all the time: a hundredth of it is worth a word.
        old = self._disk
        if old is None or old["reserved"] != numbers["reserved"] or _moved(old, numbers):
            self._disk = numbers
        self._writer.changed()

    def _compose(self, node: NodeObject) -> dict[str, Any] | None:
        """None where it is not ours to write: another agent of ours does.

        Beside KServe's agent, and while a command has the cache, only the conditions are ours: of
        the models nothing has become untrue.
        """
        refusal = self._refusal
        if self._lease.obstacle() is not None:
            return None
        if refusal is None and (self._reconciler is None or not self._reconciler.ready.is_set()):
            return None
        names = [*(entry.name for entry in node.entries), *(name for name, _ in node.refused)]
        fresh = self._ticks() - self._changed_at < _SETTLE_SECONDS
        if refusal is None and fresh and not self._bodies.keys() >= set(names):
            return None  # a new entry: the turn that is coming knows what to say of it
        status = compose(
            names,
            self._bodies,
            obstacle=refusal,
            disk=self._disk,
            hits=self._arrivals.hits if self._arrivals else 0,
            misses=self._arrivals.misses if self._arrivals else 0,
            version=__version__,
            before=node.status,
            now=self._clock(),
        )
        if refusal is not None and refusal.reason in _OTHERS:
            return {"conditions": status["conditions"]}
        return status

    def _tell_of_change(self, name: str, before: Body, now: Body) -> None:
        """One Event for a model that came, and for each failure, on its cache and on the node."""
        reason, state = now.get("reason"), now["state"]
        if (state, reason, now.get("retryAt")) == (
            before.get("state"),
            before.get("reason"),
            before.get("retryAt"),
        ):
            return
        if reason in _REASONS:
            self._tell(name, "Warning", Reason(reason), now.get("message", ""))
        elif state == Phase.ADOPTING and before.get("state") != Phase.ADOPTING:
            message = f"{now['uri']} at {now['path']}: {now['message']}"
            self._tell(name, "Normal", Phase.ADOPTING, message)
        elif state == Phase.READY and before.get("state") not in (None, Phase.READY):
            message = f"{now['uri']} is on offer at {now['path']}, {now['bytes']} bytes"
            self._tell(name, "Normal", Phase.READY, message)
            if warning := now.get("warning"):
                self._tell(name, "Warning", Reason.UNSAFE_FILES, warning)

    def _tell(self, name: str, kind: Any, reason: Reason | Phase, message: str) -> None:
        self._tell_the_node(kind, reason, f"{name}: {message}", topic=name)
        meta = self._meta(name)
        if meta is not None:
            node = f"node {self._settings.node_name}: {message}"
            subject = Subject(meta.kind, meta.namespace, meta.name, meta.uid)
            self._recorder.say(subject, kind, reason.value, node)

    def tell_pod(self, pod: Pod, word: Word) -> None:
        subject = Subject("Pod", pod.namespace, pod.name, pod.uid, api="v1")
        self._recorder.say(subject, word.kind, word.reason, word.message)

    def _meta(self, name: str) -> CacheMeta | None:
        """The cache of an entry's name; None while it is not known."""
        watch = self._namespace_caches if "/" in name else self._caches
        return watch.objects.get(name)

    def _tell_the_node(
        self, kind: Any, reason: Reason | Phase, message: str, *, topic: str = ""
    ) -> None:
        found = self._object
        if found is not None and self._settings.node_name is not None:
            subject = Subject("LocalModelNode", "", self._settings.node_name, found.uid)
            self._recorder.say(subject, kind, reason.value, message, topic=topic)

    def _tell_of_another_writer(self) -> None:
        message = "somebody else writes the status of this LocalModelNode too; it is written less"
        _log.warning("%s", message)
        self._tell_the_node("Warning", Reason.OTHER_AGENT, message)


def _moved(old: Mapping[str, int], new: Mapping[str, int]) -> bool:
    step = new["capacity"] // 100
    return any(abs(new[name] - old[name]) > step for name in new)


def _identity(settings: Settings) -> str:
    """Who holds the Lease: our pod; outside of one, this cache of this machine."""
    if settings.pod_name:
        return f"{settings.pod_namespace}/{settings.pod_name}"
    root = hashlib.sha256(str(settings.root).encode()).hexdigest()[:8]
    return f"{socket.gethostname()}-{root}"
