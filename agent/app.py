"""The composition root: builds everything, owns the tasks, orders start and stop."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path

from agent import USER_AGENT, __version__, disk, layout
from agent.arrivals import Arrivals
from agent.bypasses import Bypasses
from agent.cluster import Cluster
from agent.config import Settings, listen_address
from agent.curator import Curator
from agent.desired import DesiredDirectory
from agent.errors import AgentError, Reason
from agent.fetch import Access, Fetcher, own_access
from agent.files import disk_errors
from agent.index import Index
from agent.kube.client import Api
from agent.metrics import Metrics
from agent.model import CacheKey
from agent.processes import models_read
from agent.publish import Publisher, Status, StatusDirectory
from agent.reconcile import Policy, Reconciler
from agent.removal import InUse, unknown_use
from agent.scrub import Scrub
from agent.server import Health, health_app, serve_socket, serve_tcp, verbs_app
from agent.service import Service
from agent.sources import Sources
from agent.store import Store
from agent.tasks import first_of, until_told
from agent.threads import looking
from agent.transfer import Engine
from agent.volume import Volume, on_machine_disk
from agent.waiting import Waiting
from agent.wishes import NOTHING, Desired

_log = logging.getLogger(__name__)

_FAILED_TURNS = 3  # in a row: until then it may pass, as a disk that is busy does
_AGAIN_SECONDS = 5.0
"""How often an obstacle is looked at again, and whether the disk is still the one we opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One open volume with everything that works on it, not turning yet."""

    store: Store
    index: Index
    reconciler: Reconciler
    service: Service
    curator: Curator
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What an open cache has to do with the world around it, where there is one."""

    status: Status | None = None
    in_use: InUse | None = None
    """None: the processes of this machine are all there is to ask."""
    in_use_now: InUse | None = None
    who_uses: Callable[[CacheKey], list[str]] = lambda key: []
    access: Access = own_access
    retain_seconds: float = 7 * 86400.0


def _scrub(
    settings: Settings, *, store: Store, engine: Engine, index: Index, metrics: Metrics
) -> Scrub | None:
    if settings.scrub_days == 0:
        return None
    return Scrub(
        store=store,
        engine=engine,
        index=index,
        metrics=metrics,
        every_seconds=settings.scrub_days * 86400.0,
        clock=time.time,
    )


def _without_an_agent(settings: Settings) -> Surroundings:
    """For a command beside no agent. On a node of a cluster its pods are the users, and a command
    does not see them."""
    if settings.node_name is None:
        return Surroundings()
    return Surroundings(in_use=unknown_use, in_use_now=unknown_use)


class _Processes:
    """Who uses the models of a machine without a cluster."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: frozenset[CacheKey] = frozenset()
        self._looked_at = -inf

    async def in_use(self) -> frozenset[CacheKey]:
        """As of a few seconds ago: a look at every process costs milliseconds."""
        if time.monotonic() - self._looked_at > _AGAIN_SECONDS:
            await self.in_use_now()
        return self._seen

    async def in_use_now(self) -> frozenset[CacheKey]:
        self._seen = await looking(partial(models_read, self._root))
        self._looked_at = time.monotonic()
        return self._seen


def new_metrics(settings: Settings) -> Metrics:
    metrics = Metrics()
    metrics.watch_disk(settings.root, disk.space, disk.traffic)
    return metrics


@contextlib.asynccontextmanager
async def open_cache(
    settings: Settings,
    *,
    metrics: Metrics | None = None,
    around: Surroundings | None = None,
    sources: Sources | None = None,
) -> AsyncIterator[Cache]:
    """Take the volume, bring it into order.

    Raises Locked when another process has it, DiskMissing when its disk is not there.
    """
    metrics, around = metrics or new_metrics(settings), around or _without_an_agent(settings)
    state = settings.state_directory
    volume, store = Volume(settings.root, state), Store(settings.root)
    await asyncio.to_thread(volume.check, require_dedicated=settings.require_dedicated)
    await asyncio.to_thread(store.open)
    try:
        await asyncio.to_thread(_make_private, state)
        await asyncio.to_thread(volume.remember)
        shared = await asyncio.to_thread(on_machine_disk, settings.root)
        high, low = settings.marks(shared=shared and settings.node_name is not None)
        async with _opened_index(state, store) as index:
            engine = Engine(
                connections=settings.connections,
                bytes_per_second=settings.max_rate,
                stall_seconds=settings.stall_seconds,
                user_agent=USER_AGENT,
            )
            readers = _Processes(settings.root)
            slow = Engine(connections=1, read_bytes_per_second=settings.scrub_rate)
            fetcher = Fetcher(
                store=store,
                sources=sources or Sources(),
                engine=engine,
                metrics=metrics,
                access=around.access,
                file_policy=settings.file_policy,
            )
            reconciler = Reconciler(
                store=store,
                index=index,
                fetcher=fetcher,
                publisher=Publisher(store, metrics, around.status),
                metrics=metrics,
                space=partial(disk.space, settings.root),
                policy=Policy(
                    high=high / 100,
                    low=low / 100,
                    max_fetches=settings.max_fetches,
                    limit=settings.limit,
                    min_age_seconds=settings.min_age,
                    retain_seconds=(
                        around.retain_seconds if settings.retain is None else settings.retain
                    ),
                ),
                scrub=_scrub(settings, store=store, engine=slow, index=index, metrics=metrics),
                in_use=around.in_use or readers.in_use,
                in_use_now=around.in_use_now or readers.in_use_now,
            )
            await reconciler.start()
            service = Service(
                store=store,
                fetcher=fetcher,
                reconciler=reconciler,
                metrics=metrics,
            )
            curator = Curator(
                fetcher=fetcher, reconciler=reconciler, index=index, who_uses=around.who_uses
            )
            try:
                yield Cache(
                    store=store,
                    index=index,
                    reconciler=reconciler,
                    service=service,
                    curator=curator,
                    metrics=metrics,
                )
            finally:
                engine.close()
                slow.close()
    finally:
        store.close()


@contextlib.asynccontextmanager
async def _opened_index(state: Path, store: Store) -> AsyncIterator[Index]:
    index = Index(state / layout.INDEX, rebuild=store.entries)
    try:
        yield index
    finally:
        await index.close()


def _make_private(state: Path) -> None:
    with disk_errors(f"make the state directory {state}"):
        state.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in state.iterdir() if path.name != "lost+found"]
        ours = (
            *(layout.INDEX, layout.SOCKET, layout.STATUS, layout.KNOWN_VOLUME),
            layout.AUTHORITIES,
        )
        if not all(name.startswith(ours) for name in names):
            # `--state /tmp` must not close /tmp to everybody else.
            raise AgentError(
                Reason.INVALID_SPEC,
                f"the state directory {state} holds other things; name one of its own",
            )
        state.chmod(layout.PRIVATE_MODE)


@contextlib.asynccontextmanager
async def turning(cache: Cache, desired: Desired) -> AsyncIterator[asyncio.Task[None]]:
    """Keep the volume as desired while the block runs. The task should never end by itself."""
    cache.reconciler.desire(desired)
    loop = asyncio.create_task(cache.reconciler.run())
    try:
        await first_of([loop], cache.reconciler.tried.wait())
        if cache.reconciler.trouble is not None:
            raise cache.reconciler.trouble
        yield loop
    finally:
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop


async def run_agent(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT; then keep what was begun, and return."""
    await until_told(_serve(settings), said=": what was begun is kept")


async def _serve(settings: Settings) -> None:
    """Everything an agent is, until cancelled."""
    await (_serve_node(settings) if settings.node_name else _serve_alone(settings))


async def _serve_alone(settings: Settings) -> None:
    """Without a cluster: what a directory of YAML asks for, and what the verbs do."""
    async with contextlib.AsyncExitStack() as stack:
        around = Surroundings()
        if settings.desired is not None:
            fallback = settings.state_directory / layout.STATUS
            await asyncio.to_thread(settings.root.mkdir, parents=True, exist_ok=True)
            status = StatusDirectory(settings.desired / layout.STATUS, fallback=fallback)
            around = Surroundings(status=status)
        cache = await stack.enter_async_context(open_cache(settings, around=around))
        await _announced(stack, settings, cache.reconciler, cache.metrics)
        wishes = _wishes(settings.desired)
        # Nothing is decided before the first listing of the desired state: absence is no command.
        first = await anext(wishes)
        turns = await stack.enter_async_context(_in_service(settings, cache, first))
        follow = asyncio.create_task(_follow(wishes, cache.reconciler))
        try:
            await first_of([turns, follow], asyncio.Event().wait())
        finally:
            follow.cancel()


async def _announced(
    stack: contextlib.AsyncExitStack, settings: Settings, health: Health, metrics: Metrics
) -> None:
    host, port = listen_address(settings.listen)
    bound = await stack.enter_async_context(serve_tcp(health_app(health, metrics), host, port))
    _log.info("agent %s keeps %s, metrics on %s:%d", __version__, settings.root, host, bound)


@contextlib.asynccontextmanager
async def _in_service(
    settings: Settings, cache: Cache, desired: Desired
) -> AsyncIterator[asyncio.Task[None]]:
    """The loop and the verbs. The socket outlives the loop, so that who waits for a model is told
    why it does not come."""
    async with (
        serve_socket(verbs_app(cache.service, cache.curator.verbs), settings.state_directory),
        turning(cache, desired) as turns,
    ):
        yield turns


async def _serve_node(settings: Settings) -> None:
    """For one node of a cluster."""
    metrics = new_metrics(settings)
    api = Api(os.environ, user_agent=USER_AGENT)
    await api.open()
    cluster = Cluster(api, settings)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(api.close)
        await _announced(stack, settings, cluster, metrics)
        stack.push_async_callback(cluster.leave)
        beside = [asyncio.create_task(work) for work in cluster.work()]
        keeping = asyncio.create_task(_keep(settings, cluster, metrics))
        try:
            await first_of([keeping, *beside], asyncio.Event().wait())
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)


async def _keep(settings: Settings, cluster: Cluster, metrics: Metrics) -> None:
    """Manage the cache whenever nothing is in the way; say what is, when something is."""
    await cluster.listed()
    while True:
        obstacle = cluster.obstacle()
        if obstacle is None:
            try:
                obstacle = await _manage(settings, cluster, metrics)
            except AgentError as error:
                obstacle = error
        cluster.refuse(obstacle)
        await cluster.woken(_AGAIN_SECONDS)


async def _manage(settings: Settings, cluster: Cluster, metrics: Metrics) -> AgentError:
    """Until something is in the way; that is returned, or raised where the disk said so."""
    around = Surroundings(
        status=cluster,
        in_use=cluster.in_use,
        in_use_now=cluster.in_use_now,
        who_uses=cluster.who_uses,
        access=cluster.access,
        retain_seconds=0.0,
    )
    async with open_cache(settings, metrics=metrics, around=around) as cache:
        arrivals = Arrivals(reconciler=cache.reconciler, index=cache.index, metrics=metrics)
        await arrivals.open()
        bypasses = Bypasses(
            reconciler=cache.reconciler,
            index=cache.index,
            metrics=metrics,
            tell=cluster.tell_pod,
            namespace=settings.pod_namespace,
        )
        await bypasses.open()
        waiting = Waiting(cache.reconciler, cluster.tell_pod)
        cluster.manages(cache.reconciler, arrivals)
        try:
            desired, users = cluster.desired(), cluster.users()
            async with _in_service(settings, cache, desired) as turns:
                while (obstacle := cluster.obstacle()) is None:
                    if (now := cluster.desired()) != desired:
                        desired = now
                        cache.reconciler.desire(desired)
                    cache.reconciler.look_every(cluster.look_seconds)
                    await looking(cache.store.check)
                    if (seen := cluster.users()) != users:
                        users = seen
                        cache.reconciler.wake()  # somebody who left may have been the last
                    await arrivals.see(users)
                    await bypasses.see(cluster.pods(), cluster.offers())
                    waiting.see(cluster.naming(), desired)
                    if cache.reconciler.failed_turns >= _FAILED_TURNS and cache.reconciler.trouble:
                        raise cache.reconciler.trouble
                    await first_of([turns], cluster.woken(_AGAIN_SECONDS))
                return obstacle
        finally:
            await cluster.last_word()
            cluster.manages(None)


async def _wishes(directory: Path | None) -> AsyncIterator[Desired]:
    if directory is None:
        yield NOTHING
        await asyncio.Event().wait()
        return
    async for desired in DesiredDirectory(directory).watch():
        yield desired


async def _follow(wishes: AsyncIterator[Desired], reconciler: Reconciler) -> None:
    async for desired in wishes:
        reconciler.desire(desired)
