"""Several files at once, each with its retries. The only part of `transfer` that awaits.

Threads do the moving (see the package's docstring); this schedules them. The seam for ranges
inside one file is `_attempt`: it owns one connection and the frontier of one sink.
"""

import asyncio
import contextlib
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agent import threads
from agent.backoff import Dice, in_place_delay
from agent.errors import AgentError, Reason
from agent.layout import ArchiveKind
from agent.model import Digest, HttpLocator, Locator, RemoteFile
from agent.transfer import archives
from agent.transfer.archives import Target
from agent.transfer.connections import Cancellation, Cancelled, Connections
from agent.transfer.exchange import Body, Exchange
from agent.transfer.local import LocalBody
from agent.transfer.pump import Buffers, Crowd, Intake, Readable, pump
from agent.transfer.sink import Sink, hash_file
from agent.transfer.throttle import Throttle

_T = TypeVar("_T")

_PROGRESS_BYTES = 8 * 1024 * 1024
"""A try that moved this much was a good one: the count of failures in a row begins anew."""

_WRONG_BYTES = frozenset({Reason.SIZE_MISMATCH, Reason.DIGEST_MISMATCH})

_ABANDON_SECONDS = 5.0
"""How long a cancelled thread may take to notice: only one stuck in connect, DNS or a hung disk
takes longer, and its sink is closed to it by then."""


@dataclass(slots=True, kw_only=True)
class FileJob:
    """One file to bring. `on_bytes(done, received)` gets the change of either, from any thread."""

    path: Path
    size: int
    promised: Digest | None
    locate: Callable[[], Awaitable[Locator]]
    on_bytes: Callable[[int, int], None]
    on_retry: Callable[[AgentError], None]


class Engine:
    """Moves files for the whole node.

    `connections` bounds the files in flight and with them the memory: DEPTH buffers each.
    `bytes_per_second` caps them together, `read_bytes_per_second` what is only hashed.
    `stall_seconds` without a byte, or with next to none, is
    a failure of the try.
    """

    def __init__(
        self,
        *,
        connections: int = 8,
        bytes_per_second: int | None = None,
        read_bytes_per_second: int | None = None,
        stall_seconds: float = 30.0,
        connect_seconds: float = 8.0,
        user_agent: str = "localmodel-agent",
        dice: Dice = random.random,
    ) -> None:
        self._slots = asyncio.Semaphore(connections)
        self._stall_seconds = stall_seconds
        self._throttle = Throttle(bytes_per_second)
        self._reading = Throttle(read_bytes_per_second)
        self._buffers = Buffers()
        self._crowd = Crowd(os.cpu_count() or 1)
        self._dice = dice
        self._connections = Connections(
            connect_seconds=connect_seconds, stall_seconds=stall_seconds, keep=2 * connections
        )  # a hub's file takes two: the hub, and where it redirects to
        self._exchange = Exchange(self._connections, user_agent)

    def close(self) -> None:
        self._connections.close()

    async def fetch(self, job: FileJob) -> str:
        """Bring one file, or the rest of it, and prove it; its SHA-256.

        The proven file stays at `job.path`, fsynced. Raises AgentError when trying again now is
        pointless; what arrived is kept.
        """
        async with self._slots:
            sink = Sink(job.path, size=job.size, promised=job.promised)
            tally = _Tally(job.on_bytes)
            try:
                await self._in_thread(lambda cancellation: self._resume(sink, tally, cancellation))
                return await self._persist(job, sink, tally)
            finally:
                sink.close()

    async def reach(self, locator: Locator, *, size: int) -> None:
        """Ask for the last byte of a file, as a download would. Raises AgentError if it is not
        given. Not behind the downloads: it is over at once."""

        def work(cancellation: Cancellation) -> None:
            with self._open(locator, size - 1, size, cancellation):
                pass

        await self._in_thread(work)

    async def hash(self, path: Path, *, size: int, promised: Digest | None) -> str | None:
        """The SHA-256 of a file that is there, if it is of that size and keeps the promise."""

        def work(cancellation: Cancellation) -> str | None:
            with self._buffer() as buffer:
                return hash_file(
                    path,
                    size=size,
                    promised=promised,
                    buffer=buffer,
                    cancellation=cancellation,
                    throttle=self._reading,
                )

        async with self._slots:
            return await self._in_thread(work)

    async def contents(self, path: Path, kind: ArchiveKind, *, most_bytes: int) -> list[RemoteFile]:
        """What is in an archive, hashed; nothing is written. See `archives.contents`."""

        def work(cancellation: Cancellation) -> list[RemoteFile]:
            with self._buffer() as buffer:
                return archives.contents(
                    path,
                    kind,
                    most_bytes=most_bytes,
                    buffer=buffer,
                    cancellation=cancellation,
                )

        async with self._slots:
            return await self._in_thread(work)

    async def unpack(
        self,
        path: Path,
        kind: ArchiveKind,
        targets: Mapping[str, Sequence[Target]],
        *,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Write these files of an archive; fsynced and proven. See `archives.unpack`."""

        def work(cancellation: Cancellation) -> None:
            with self._buffer() as buffer:
                archives.unpack(
                    path,
                    kind,
                    targets,
                    buffer=buffer,
                    cancellation=cancellation,
                    on_bytes=on_bytes,
                )

        async with self._slots:
            # It gives files their names: the next job of the same model must not begin before.
            await self._in_thread(work, patience=None)

    async def _persist(self, job: FileJob, sink: Sink, tally: "_Tally") -> str:
        """Try until the file is proven or the reason says that it is enough."""
        locator = await job.locate()
        # Failures in a row; wrong bytes on an account of their own, which progress does not clear:
        # each of them costs a whole download.
        failures: Counter[bool] = Counter()
        relocated, mark = False, sink.offset
        while True:
            try:
                return await self._in_thread(
                    lambda cancellation: self._attempt(sink, tally, locator, cancellation)  # noqa: B023 - awaited before the next turn
                )
            except AgentError as error:
                mark = min(mark, sink.offset)  # a restart begins from nothing
                if sink.offset - mark >= _PROGRESS_BYTES:
                    relocated, mark = False, sink.offset
                    failures[False] = 0
                if error.reason is Reason.LINK_EXPIRED and not relocated:
                    relocated = True
                    locator = await job.locate()
                    continue
                wrong = error.reason in _WRONG_BYTES
                failures[wrong] += 1
                delay = in_place_delay(error, failures[wrong], self._dice)
                if delay is None:
                    raise
                job.on_retry(error)
                await asyncio.sleep(delay)

    def _resume(self, sink: Sink, tally: "_Tally", cancellation: Cancellation) -> None:
        with self._buffer() as buffer:
            sink.resume(buffer, cancellation)
        tally.settle(sink.offset)

    def _attempt(
        self, sink: Sink, tally: "_Tally", locator: Locator, cancellation: Cancellation
    ) -> str:
        """One connection, from the frontier to the end and the proof. Runs in a thread."""
        try:
            if sink.offset < sink.size:
                self._move(sink, tally, locator, cancellation)
            return sink.prove()
        except AgentError as error:
            if error.reason in _WRONG_BYTES and sink.offset == sink.size:
                sink.restart()  # wrong bytes are good for nothing, a resume least
            raise
        finally:
            tally.settle(sink.offset)

    def _move(
        self, sink: Sink, tally: "_Tally", locator: Locator, cancellation: Cancellation
    ) -> None:
        with self._open(locator, sink.offset, sink.size, cancellation) as body:
            if body.start != sink.offset:
                sink.restart()
                tally.settle(sink.offset)
            intake = Intake(
                _Counted(body, tally),
                throttle=self._throttle,
                stall_seconds=self._stall_seconds,
                cancellation=cancellation,
            )
            with self._crowd.join() as roomy:
                pump(intake, sink, self._buffers, roomy=roomy)
        if sink.offset < sink.size:
            raise AgentError(
                Reason.NETWORK, f"{body.where} ended after {sink.offset} of {sink.size} bytes"
            )

    @contextlib.contextmanager
    def _open(
        self, locator: Locator, start: int, size: int, cancellation: Cancellation
    ) -> Iterator[Body | LocalBody]:
        if isinstance(locator, HttpLocator):
            with self._exchange.get(
                locator, start=start, size=size, cancellation=cancellation
            ) as body:
                yield body
        else:
            with contextlib.closing(LocalBody(locator, start=start)) as local:
                yield local

    @contextlib.contextmanager
    def _buffer(self) -> Iterator[bytearray]:
        taken = self._buffers.take(1)
        try:
            yield taken[0]
        finally:
            self._buffers.give(taken)

    async def _in_thread(
        self, work: Callable[[Cancellation], _T], *, patience: float | None = _ABANDON_SECONDS
    ) -> _T:
        """Run in a thread that a cancelled await interrupts and then waits for, so many seconds."""
        cancellation = Cancellation()
        done = threads.begin(lambda: work(cancellation))
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            cancellation.cancel()
            await asyncio.wait({done}, timeout=patience)
            # Seen, now or whenever: Cancelled, or a failure that came too late to matter.
            done.add_done_callback(lambda settled: settled.exception())
            raise
        except Cancelled as error:  # only our own cancel raises it
            raise asyncio.CancelledError from error


class _Tally:
    """What `on_bytes` was told of one file. What came and was not kept is taken back."""

    def __init__(self, on_bytes: Callable[[int, int], None]) -> None:
        self._on_bytes = on_bytes
        self._done = 0

    def receive(self, count: int) -> None:
        self._done += count
        self._on_bytes(count, count)

    def settle(self, offset: int) -> None:
        """No attempt is running, and this much of the file is in its place."""
        change, self._done = offset - self._done, offset
        if change:
            self._on_bytes(change, 0)


class _Counted:
    """A body that reports what was received of it."""

    def __init__(self, body: Readable, tally: _Tally) -> None:
        self.where = body.where
        self._body = body
        self._tally = tally

    def read_into(self, view: memoryview) -> int:
        count = self._body.read_into(view)
        if count:
            self._tally.receive(count)
        return count
