"""A misbehaving origin in front of anything that gives whole files: a web server, an object store.

    with Origin(files({"/model.gguf": data})) as origin:
        origin.fault("*/model.gguf", Corrupt(offset=5), times=1)

    with Origin(in_front_of(store.endpoint)) as origin:
        ...  # signatures stay good: the request goes on with the Host it came with

Every fault of `tests.fakes.faults` but the listing's own; ranges and `If-Match` as the hub's.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import TypeAlias

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from tests.fakes.delivery import Answer, Delivery, Listener, Request, fault_for
from tests.fakes.faults import Bytes, Fault, Faults

Ask: TypeAlias = Callable[[web.BaseRequest], Awaitable[Answer]]

_HOP = frozenset({"connection", "transfer-encoding", "content-length", "date", "server"})


def files(contents: Mapping[str, bytes]) -> Ask:
    """A web server with these files, by path."""

    async def answer(request: web.BaseRequest) -> Answer:
        data = contents.get(request.path)
        if data is None:
            return Answer(404, {})
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return Answer(200, {"ETag": f'"{etag}"'}, Bytes(data), file=request.path, serves_file=True)

    return answer


def in_front_of(endpoint: str) -> Ask:
    """What this server answers. Of a file it is asked for all, and `Origin` cuts out the range."""

    async def answer(request: web.BaseRequest) -> Answer:
        kept = {"range", "if-match"}
        headers = {k: v for k, v in request.headers.items() if k.lower() not in kept}
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                request.method,
                URL(f"{endpoint}{request.raw_path}", encoded=True),
                headers=headers,
                skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
                allow_redirects=False,
            ) as found,
        ):
            said = CIMultiDict((k, v) for k, v in found.headers.items() if k.lower() not in _HOP)
            body = Bytes(await found.read())
            is_file = request.method == "GET" and "X-Amz-Signature" in request.query_string
            if request.method == "HEAD":
                body = Bytes(bytes(int(found.headers.get("Content-Length", 0))))
            return Answer(
                found.status,
                said,
                body,
                file=request.path if is_file else "",
                serves_file=is_file and found.status == 200,
            )

    return answer


class Origin:
    """One port on loopback, on a thread of its own."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._faults = Faults()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self.port = 0
        self.requests: list[Request] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(self, glob: str, fault: Fault, *, times: int | None = None) -> None:
        """As `Hub.fault`; a file's name here is the path of its URL."""
        self._faults.add(glob, fault, times=times)

    def __enter__(self) -> Origin:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        listener = Listener(self._handle, None)
        self.port = await listener.listen("127.0.0.1", 0)
        self._started.set()
        await self._stop.wait()
        await listener.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = Request(request.method, "hub", request.path, request.headers.get("Range"), None)
        self.requests.append(asked)
        answer = await self._ask(request)
        asked.file = answer.file
        fault = fault_for(self._faults, request, answer, request.path)
        return await Delivery(request, asked).send(answer, fault)
