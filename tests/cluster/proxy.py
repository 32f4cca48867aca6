"""A way to the API server on which a test can put obstacles.

Plain HTTP in, the real server's TLS out: what arrives there is what the agent sent, token included.
"""

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

_HOP = frozenset({"host", "connection", "transfer-encoding", "content-length", "content-encoding"})
"""Of one connection; the last too, because what comes out of `aiohttp` is decoded."""


class Proxy:
    """Counts requests, and does what its attributes say. They may be set at any time."""

    def __init__(self, url: str, authority: Path) -> None:
        self._url = url
        self._tls = ssl.create_default_context(cafile=str(authority))
        self.requests: Counter[str] = Counter()
        """By method, `WATCH` for a watch."""
        self.lists: Counter[str] = Counter()
        """Reads that are no watch, by path."""
        self.watch_seconds: float | None = None
        """Close every watch after so long."""
        self.answers: list[tuple[str, int, dict[str, str]]] = []
        """Methods, statuses and headers with which the next requests are refused."""
        self.revoked: set[str] = set()
        """Tokens that are not accepted any more."""
        self.holds_watches = False
        """Answer watches with 503."""
        self.mute = ""
        """Say nothing on watches of a path that holds this: they stay open, and are late."""
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self) -> Iterator["Proxy"]:
        loop = asyncio.new_event_loop()
        started, stop = threading.Event(), asyncio.Event()
        work = self._serve(started, stop)
        thread = threading.Thread(target=loop.run_until_complete, args=[work], daemon=True)
        thread.start()
        assert started.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(10)
            assert not thread.is_alive()
            loop.close()

    async def _serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            started.set()
            await stop.wait()
            await runner.cleanup()
        await asyncio.sleep(0.2)  # transports close in a turn of the loop of their own

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        watched = request.query.get("watch") == "1"
        self.requests["WATCH" if watched else request.method] += 1
        if request.method == "GET" and not watched:
            self.lists[request.path] += 1
        if request.headers.get("Authorization", "").partition(" ")[2] in self.revoked:
            return web.json_response({"kind": "Status", "message": "revoked"}, status=401)
        if watched and self.holds_watches:
            return web.json_response({"kind": "Status", "message": "held"}, status=503)
        if self.answers and self.answers[0][0] == request.method and not watched:
            _, status, headers = self.answers.pop(0)
            body: dict[str, Any] = {"kind": "Status", "code": status, "message": "as the test says"}
            return web.json_response(body, status=status, headers=headers)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        try:
            answer = await self._session.request(
                request.method,
                self._url + request.raw_path,
                headers=headers,
                data=await request.read(),
            )
        except aiohttp.ClientError:
            if request.transport is not None:
                request.transport.abort()
            raise
        async with answer:
            passed = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
            response = web.StreamResponse(status=answer.status, headers=passed)
            await response.prepare(request)
            with suppress(TimeoutError, aiohttp.ClientError, ConnectionResetError):
                async with asyncio.timeout(self.watch_seconds if watched else None):
                    async for data in answer.content.iter_any():
                        while watched and self.mute and self.mute in request.path:
                            await asyncio.sleep(0.05)
                        await response.write(data)
            return response
