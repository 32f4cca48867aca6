"""The composition root: builds everything, owns the tasks, orders start and stop."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agent import __version__, disk, layout
from agent.config import Settings, listen_address
from agent.desired import Desired, DesiredDirectory
from agent.errors import AgentError, Reason
from agent.fetch import Fetcher
from agent.files import disk_errors
from agent.index import Index
from agent.metrics import Metrics
from agent.publish import Publisher, StatusDirectory
from agent.reconcile import Policy, Reconciler
from agent.server import health_app, serve_socket, serve_tcp, verbs_app
from agent.service import Service
from agent.sources import Sources
from agent.store import Store
from agent.transfer import Engine

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One open volume with everything that works on it, not turning yet."""

    store: Store
    reconciler: Reconciler
    service: Service
    metrics: Metrics


@contextlib.asynccontextmanager
async def open_cache(settings: Settings, *, sources: Sources | None = None) -> AsyncIterator[Cache]:
    """Take the volume, bring it into order. Raises Locked when another process has it."""
    store = Store(settings.root)
    await asyncio.to_thread(store.open)
    try:
        state = settings.state_directory
        await asyncio.to_thread(_make_private, state)
        async with _opened_index(state, store) as index:
            metrics = Metrics()
            metrics.watch_disk(settings.root, disk.space, disk.traffic)
            engine = Engine(
                connections=settings.connections,
                bytes_per_second=settings.max_rate,
                stall_seconds=settings.stall_seconds,
                user_agent=f"localmodel-agent/{__version__}",
            )
            fetcher = Fetcher(
                store=store, sources=sources or Sources(), engine=engine, metrics=metrics
            )
            status = None
            if settings.desired is not None:
                status = StatusDirectory(
                    settings.desired / layout.STATUS, fallback=state / layout.STATUS
                )
            reconciler = Reconciler(
                store=store,
                index=index,
                fetcher=fetcher,
                publisher=Publisher(store, metrics, status),
                metrics=metrics,
                space=partial(disk.space, settings.root),
                policy=Policy(
                    high=settings.high / 100,
                    low=settings.low / 100,
                    max_fetches=settings.max_fetches,
                ),
            )
            await reconciler.start()
            service = Service(store=store, fetcher=fetcher, reconciler=reconciler, metrics=metrics)
            try:
                yield Cache(store=store, reconciler=reconciler, service=service, metrics=metrics)
            finally:
                engine.close()
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
        names = [path.name for path in state.iterdir()]
        ours = (layout.INDEX, layout.SOCKET, layout.STATUS)
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
        await _first([loop], cache.reconciler.ready.wait())
        yield loop
    finally:
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop


async def run_agent(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, heard from the start; then keep what was begun, and return."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(_serve(settings))
    try:
        await _first([serving], stop.wait())
        _log.info("stopping: what was begun is kept")
    finally:
        serving.cancel()
        await asyncio.wait({serving})


async def _serve(settings: Settings) -> None:
    """Everything an agent is, until cancelled."""
    host, port = listen_address(settings.listen)
    async with contextlib.AsyncExitStack() as stack:
        cache = await stack.enter_async_context(open_cache(settings))
        app = health_app(cache.reconciler, cache.metrics)
        bound = await stack.enter_async_context(serve_tcp(app, host, port))
        _log.info("agent %s keeps %s, metrics on %s:%d", __version__, settings.root, host, bound)
        wishes = _wishes(settings.desired)
        # Nothing is decided before the first listing of the desired state: absence is no command.
        first = await anext(wishes)
        # The socket outlives the loop, so that who waits for a model is told why it does not come.
        await stack.enter_async_context(
            serve_socket(verbs_app(cache.service), settings.state_directory)
        )
        turns = await stack.enter_async_context(turning(cache, first))
        follow = asyncio.create_task(_follow(wishes, cache.reconciler))
        try:
            await _first([turns, follow], asyncio.Event().wait())
        finally:
            follow.cancel()


async def _wishes(directory: Path | None) -> AsyncIterator[Desired]:
    if directory is None:
        yield Desired(wants={}, names={})
        await asyncio.Event().wait()
        return
    async for desired in DesiredDirectory(directory).watch():
        yield desired


async def _follow(wishes: AsyncIterator[Desired], reconciler: Reconciler) -> None:
    async for desired in wishes:
        reconciler.desire(desired)


async def _first(tasks: Sequence[asyncio.Task[None]], event: Coroutine[Any, Any, object]) -> None:
    """Wait for an event, unless a task that should never end does: then raise what it raised."""
    waiting = asyncio.ensure_future(event)
    try:
        await asyncio.wait({*tasks, waiting}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        waiting.cancel()
