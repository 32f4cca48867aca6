"""HTTP faces: metrics and health for the cluster, the verbs for a node's operator, the hook.

    TCP   /metrics /healthz /readyz          read by Prometheus and kubelet
    TLS   POST /mutate, POST /validate       the admission hook, asked by the API server
    Unix  GET /v1                                            whether somebody is there
          GET /v1/models, POST /v1/pull, POST /v1/verify     newline-delimited JSON events
          POST /v1/{why,plan,pin,unpin,evict}

The socket is in a directory of mode 0700: whoever may open it may have the agent download things.
"""

import asyncio
import contextlib
import json
import logging
import os
import ssl
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from agent import __version__, layout
from agent.curator import Verb
from agent.doorman import Doorman
from agent.errors import AgentError, Reason
from agent.events import Event
from agent.hook.review import Answer
from agent.metrics import HookMetrics, Metrics
from agent.service import Service

_STALE_SECONDS = 180.0
"""A loop that finished no turn for so long is not healthy: they come every 30 s at the latest."""

_REVIEW_BYTES = 8 * 1024**2
"""An API server takes objects of 3 MiB; of an update it sends two."""

_BODY_SECONDS = 5.0
"""Until a review is here as a whole: who asks waits three, or ten for a cache."""

_SMALL_BYTES = 256 * 1024
_MOST_LARGE = 4
"""Larger reviews are read so many at a time: a pod has some 10 KiB, and one of 8 MiB as a Python
object takes ten times that."""

MOST_CONNECTIONS = 512
"""Of the hook: an API server has one for each pod that is being created, 200 at most by default."""

_TLS_READ_BYTES = 16 * 1024
"""What asyncio reads of a TLS connection at once, one record. Its own 256 KiB are taken for every
connection, before its handshake, and freed by the garbage collector only: 1500 took 310 MiB."""

_SHUTDOWN_SECONDS = 1.0  # of the ten that a pod has

_SOCKET_NAME_MAX = 107  # bytes in sockaddr_un


class _NoNoise(logging.Filter):
    """What is no HTTP is answered with 400, and is no bug of ours: a port scan fills no log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


_http_log = logging.getLogger("agent.server.http")
_http_log.addFilter(_NoNoise())


def socket_address(state: Path) -> tuple[str, int | None]:
    """The name of the socket for bind and connect, and a descriptor to close afterwards.

    A path longer than a socket's name may be is reached through the descriptor of its directory.
    """
    path = state / layout.SOCKET
    if len(os.fsencode(path)) <= _SOCKET_NAME_MAX:
        return str(path), None
    directory = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    return f"/proc/self/fd/{directory}/{layout.SOCKET}", directory


class Health(Protocol):
    """What the probes ask."""

    @property
    def turned_at(self) -> float:
        """When the loop last turned, monotonic seconds."""

    def not_ready(self) -> str | None:
        """Why not, in a line; None when ready."""


def health_app(
    health: Health, metrics: Metrics | HookMetrics, clock: Callable[[], float] = time.monotonic
) -> web.Application:
    """What anybody on the network may ask."""

    async def exposition(_: web.Request) -> web.Response:
        body = await asyncio.to_thread(generate_latest, metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        age = clock() - health.turned_at
        if age > _STALE_SECONDS:
            return web.Response(status=503, text=f"no turn of the loop for {age:.0f} s\n")
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if (why := health.not_ready()) is not None:
            return web.Response(status=503, text=f"{why}\n")
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get("/metrics", exposition)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


def hook_app(
    mutate: Callable[[bytes], Awaitable[Answer]],
    validate: Callable[[bytes], Awaitable[Answer]],
    metrics: HookMetrics,
) -> web.Application:
    """What the API server asks."""

    large = asyncio.Semaphore(_MOST_LARGE)

    def answering(
        answer: Callable[[bytes], Awaitable[Answer]],
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handler(request: web.Request) -> web.Response:
            async with contextlib.AsyncExitStack() as held:
                raw = await _review(request, held, large)
                with metrics.seconds.labels(path=request.path).time():
                    try:
                        found = await answer(raw)
                    except ValueError as error:
                        raise web.HTTPBadRequest(text=f"{error}\n") from error
                return web.Response(body=found.body, content_type="application/json")

        return handler

    app = web.Application()
    app.router.add_post("/mutate", answering(mutate))
    app.router.add_post("/validate", answering(validate))
    return app


async def _review(
    request: web.Request, held: contextlib.AsyncExitStack, large: asyncio.Semaphore
) -> bytes:
    """The body of a request. `held` is what a large one holds until it is answered."""
    body, waited = bytearray(), False
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for data in request.content.iter_any():
                body += data
                if len(body) > _REVIEW_BYTES:
                    raise web.HTTPRequestEntityTooLarge(_REVIEW_BYTES, len(body))
                if len(body) > _SMALL_BYTES and not waited:
                    await held.enter_async_context(large)
                    waited = True
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="the review does not come\n") from None
    except (ConnectionError, ClientError, web.RequestPayloadError):
        raise web.HTTPBadRequest(text="the review is cut off\n") from None
    return bytes(body)


def verbs_app(service: Service, curation: Mapping[str, Verb]) -> web.Application:
    """What the operator on the node may ask."""

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": __version__})

    async def models(request: web.Request) -> web.StreamResponse:
        return await _stream(request, service.models())

    async def pull(request: web.Request) -> web.StreamResponse:
        return await _stream(request, service.pull(await _body(request)))

    async def verify(request: web.Request) -> web.StreamResponse:
        return await _stream(request, service.verify(await _body(request)))

    app = web.Application()
    app.router.add_get("/v1", version)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/pull", pull)
    app.router.add_post("/v1/verify", verify)
    for name, verb in curation.items():
        app.router.add_post(f"/v1/{name}", _curating(verb))
    return app


def _curating(verb: Verb) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await _stream(request, verb(await _body(request)))

    return handler


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="the body must be a JSON object\n")
    return body


async def _stream(request: web.Request, events: AsyncGenerator[Event, None]) -> web.StreamResponse:
    """Send events as they come. A client that went away ends the verb."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    with contextlib.suppress(ConnectionResetError):
        await response.prepare(request)
        async with contextlib.aclosing(events):
            async for event in events:
                await response.write(json.dumps(event).encode() + b"\n")
        await response.write_eof()
    return response


@contextlib.asynccontextmanager
async def serve_tcp(
    app: web.Application,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    most: int = 128,
) -> AsyncIterator[int]:
    """Serve until the block ends; the port that was bound. `most` is how many connections there
    may be at once."""
    runner = web.AppRunner(
        app, access_log=None, logger=_http_log, shutdown_timeout=_SHUTDOWN_SECONDS
    )
    await runner.setup()
    try:
        try:
            listening = Doorman(host, port, most=most)
        except OSError as error:
            message = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise AgentError(Reason.INVALID_SPEC, message) from error
        if tls is not None:
            SSLProtocol.max_size = _TLS_READ_BYTES
        await web.SockSite(runner, listening, ssl_context=tls).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def serve_socket(app: web.Application, state: Path) -> AsyncIterator[None]:
    """Serve the verbs in the state directory. The lock on the volume says that nobody else does."""
    name, directory = socket_address(state)
    (state / layout.SOCKET).unlink(missing_ok=True)
    ours = 0
    # aiohttp cancels a handler whose client went away only if told to; a pull nobody watches
    # any more is to be cancelled.
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_SECONDS
    )
    await runner.setup()
    try:
        await web.UnixSite(runner, name).start()
        ours = (state / layout.SOCKET).stat().st_ino
        yield
    finally:
        await runner.cleanup()
        with contextlib.suppress(OSError):  # aiohttp has removed it, or somebody else did
            if (state / layout.SOCKET).stat().st_ino == ours:
                (state / layout.SOCKET).unlink()
        if directory is not None:
            os.close(directory)
