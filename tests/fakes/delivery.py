"""One HTTP answer over one connection, the way its fault wants it; and a port that can be closed.

Used by the hub and by `tests.fakes.origin`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from aiohttp import web

from tests.fakes.faults import (
    Body,
    Bytes,
    Dribble,
    Fault,
    Faults,
    File,
    IgnoreRange,
    PartialAs200,
    Reset,
    Slow,
    Stall,
    Status,
    Truncate,
    applies,
    spoil,
)

Origin: TypeAlias = Literal["hub", "cdn"]
Handler: TypeAlias = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

# Sendfile in slices: long enough to cost nothing, short enough that `bytes_sent` is a live figure.
# asyncio does not say how far a cancelled sendfile got, so a slice is also what may go uncounted.
_SLICE = 8 << 20

_EMPTY = Bytes(b"")


@dataclass(slots=True)
class Request:
    """One request as the server saw it. Copies handed out by `Hub.requests` do not change."""

    method: str
    origin: Origin
    path: str
    """Path of the URL, still percent-encoded, without the query."""
    range: str | None
    authorization: str | None
    file: str = ""
    """The repo file it was about, `owner/name/path`, also on the CDN; empty for API calls."""
    status: int = 0
    """0 until there is an answer."""
    bytes_sent: int = 0
    """Bytes of body handed to the kernel, counted *before* they leave: a client that has read
    them all will find them here. Lowered again for what a lost connection did not take; exact to
    8 MiB for an answer cut off by `Hub.stop`, exact otherwise."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a healthy server would say."""

    status: int
    headers: Mapping[str, str]
    body: Body = _EMPTY
    file: str = ""
    """As in `Request.file`."""
    serves_file: bool = False
    """The body is that file, so ranges and file faults apply; not so for redirects and errors."""


def requested(request: web.BaseRequest, answer: Answer, size: int) -> range | None:
    """The bytes asked for: None means all of them, an empty range that there are none such.

    A header that is malformed, or asks for several ranges, is ignored, as RFC 9110 permits.
    """
    header = request.headers.get("Range", "")
    if not answer.serves_file or request.method != "GET" or not header.startswith("bytes="):
        return None
    condition = request.headers.get("If-Range")
    if condition is not None and condition != answer.headers["ETag"]:
        return None
    first, dash, last = header.removeprefix("bytes=").strip().partition("-")
    if not dash or not (first + last).isdecimal():
        return None
    if not first:
        return range(max(0, size - int(last)), size)
    stop = min(size, int(last) + 1) if last else size
    if last and int(last) < int(first):
        return None
    return range(int(first), stop)


def _fails_precondition(request: web.BaseRequest, answer: Answer) -> bool:
    condition: str | None = request.headers.get("If-Match")
    if condition is None or not answer.serves_file or condition.strip() == "*":
        return False
    accepted = {tag.strip() for tag in condition.split(",")}
    return answer.headers["ETag"] not in accepted


class Delivery:
    """Sends one answer over one connection, the way its fault wants it."""

    def __init__(self, request: web.BaseRequest, record: Request) -> None:
        self._request = request
        self._record = record
        self._loop = asyncio.get_running_loop()

    async def send(self, answer: Answer, fault: Fault | None) -> web.StreamResponse:
        if isinstance(fault, Status):
            answer = replace(
                answer,
                status=fault.code,
                headers=fault.headers,
                body=Bytes(fault.body),
                serves_file=False,
            )
        elif _fails_precondition(self._request, answer):
            answer = Answer(412, answer.headers)
        body = spoil(answer.body, fault)
        wanted = requested(self._request, answer, body.size)
        if isinstance(fault, IgnoreRange):
            wanted = None
        status, headers, span = answer.status, dict(answer.headers), range(body.size)
        if wanted is not None and not wanted:
            status, span = 416, wanted
            headers["Content-Range"] = f"bytes */{body.size}"
        elif wanted is not None:
            status, span = 200 if isinstance(fault, PartialAs200) else 206, wanted
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{body.size}"
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = len(span)
        self._record.status = status
        await response.prepare(self._request)
        if self._request.method != "HEAD":
            await self._deliver(response, body, span, fault)
        with suppress(ConnectionError):  # Some faults have closed the connection by now.
            await response.write_eof()
        return response

    async def _deliver(
        self, response: web.StreamResponse, body: Body, span: range, fault: Fault | None
    ) -> None:
        match fault:
            case Truncate(after):
                await self._write(response, body, span[:after])
                self._transport().close()
            case Reset(after):
                await self._write(response, body, span[:after])
                await self._reset()
            case Stall(after):
                await self._write(response, body, span[:after])
                await self._loop.create_future()  # Until cancelled: the client or the hub leaves.
            case Dribble(rate):
                await self._trickle(response, body, span, rate=rate, piece=1)
            case Slow(rate):
                piece = max(1, min(rate // 20, 1 << 20))
                await self._trickle(response, body, span, rate=rate, piece=piece)
            case _:
                await self._write(response, body, span)

    async def _write(self, response: web.StreamResponse, body: Body, span: range) -> None:
        if span and isinstance(body, File):
            await self._sendfile(body, span)
            return
        for offset in range(span.start, span.stop, _SLICE):
            await self._write_piece(response, body, offset, min(_SLICE, span.stop - offset))

    async def _write_piece(
        self, response: web.StreamResponse, body: Body, offset: int, count: int
    ) -> None:
        data = body.read(offset, count)
        self._record.bytes_sent += len(data)
        await response.write(data)

    async def _sendfile(self, body: File, span: range) -> None:
        """Let the kernel do it: aiohttp's `FileResponse` would too, but insists on its own ETag."""
        transport = self._transport()
        with body.path.open("rb", buffering=0) as file:
            for offset in range(span.start, span.stop, _SLICE):
                count = min(_SLICE, span.stop - offset)
                self._record.bytes_sent += count
                file.seek(offset)
                try:
                    await self._loop.sendfile(transport, file, offset, count)
                except BaseException:
                    self._record.bytes_sent -= offset + count - file.tell()
                    raise

    async def _trickle(
        self, response: web.StreamResponse, body: Body, span: range, *, rate: int, piece: int
    ) -> None:
        """Pieces against a schedule, so that late wake-ups do not add up to a slower line."""
        began = self._loop.time()
        for offset in range(span.start, span.stop, piece):
            count = min(piece, span.stop - offset)
            due = began + (offset - span.start + count) / rate
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            await self._write_piece(response, body, offset, count)

    async def _reset(self) -> None:
        transport = self._transport()
        # Anything still queued here would be dropped rather than sent before the reset.
        transport.set_write_buffer_limits(0)
        while transport.get_write_buffer_size() and not transport.is_closing():
            await asyncio.sleep(0.001)
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()

    def _transport(self) -> asyncio.Transport:
        transport = self._request.transport
        if not isinstance(transport, asyncio.Transport):
            raise ConnectionResetError("the client has left")
        return transport


class Listener:
    """One port. Closing drops its connections: a client that does not read must not hold it."""

    def __init__(self, handler: Handler, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        # Handlers die with their connection, so a stalled answer does not outlive its client.
        self._server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        self._handler = handler
        self._answering: set[asyncio.Task[Any]] = set()
        self._listening: asyncio.Server | None = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._answering.add(request.task)
        try:
            return await self._handler(request)
        finally:
            self._answering.discard(request.task)

    async def listen(self, host: str, port: int) -> int:
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(
            self._server, host, port, backlog=1024, reuse_address=True, ssl=self._tls
        )
        bound: int = self._listening.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        if self._listening is None:
            return
        self._listening.close()
        # First the handlers, then their transports: one that loses its transport in the middle of
        # a sendfile trips over CPython's own bookkeeping (`InvalidStateError` in the log).
        answering = tuple(self._answering)
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)
        for connection in self._server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await self._server.shutdown(timeout=1.0)
        await self._listening.wait_closed()


def fault_for(faults: Faults, request: web.BaseRequest, answer: Answer, path: str) -> Fault | None:
    """The oldest that would be seen in this answer."""
    wanted = requested(request, answer, answer.body.size)
    span = range(answer.body.size) if wanted is None else wanted
    return faults.take(
        url_path=path,
        file=answer.file if answer.serves_file and request.method == "GET" else "",
        fits=lambda fault: applies(fault, span=span, ranged=wanted is not None),
    )
