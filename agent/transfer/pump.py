"""Receive, write and hash a body.

A body that has cores to spare is moved by three threads that hand a few buffers round: the caller
receives into one while the second writes the one before and the third hashes the one before that.
All three release the GIL for nearly all of their time. Where as many bodies as cores are in flight,
they overlap with each other and each goes straight through one buffer: on two cores, eight files
were 1.4 x faster so. A body of one buffer is not worth two threads either.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol

from agent.errors import AgentError, Reason
from agent.transfer.connections import Cancellation
from agent.transfer.sink import BUFFER_BYTES, Sink
from agent.transfer.throttle import Throttle

DEPTH = 4
"""Buffers in flight a connection; more were not faster, and memory is bounded by them."""

_SLOWEST_BYTES_PER_SECOND = 1024
"""Below this over a whole stall period, a source counts as stalled though it still dribbles."""

_Filled = tuple[bytearray, int]


class Readable(Protocol):
    """Where bytes come from."""

    where: str

    def read_into(self, view: memoryview) -> int: ...


class Buffers:
    """Buffers that are used again and never given back: at most as many as were ever in flight."""

    def __init__(self) -> None:
        self._idle: list[bytearray] = []
        self._lock = threading.Lock()

    def take(self, count: int) -> list[bytearray]:
        with self._lock:
            taken = [self._idle.pop() for _ in range(min(count, len(self._idle)))]
        return taken + [bytearray(BUFFER_BYTES) for _ in range(count - len(taken))]

    def give(self, buffers: list[bytearray]) -> None:
        with self._lock:
            self._idle.extend(buffers)


class Intake:
    """Fills buffers from a body, under the bandwidth cap and the stall watchdog."""

    def __init__(
        self,
        body: Readable,
        *,
        throttle: Throttle,
        stall_seconds: float,
        cancellation: Cancellation,
    ) -> None:
        self._body = body
        self._throttle = throttle
        self._stall_seconds = stall_seconds
        self._cancellation = cancellation
        # Only the time spent waiting for the source counts: not our own cap, not a slow disk.
        self._waited = 0.0
        self._since = 0

    def read(self, view: memoryview) -> int:
        """One read; 0 at the end. Raises Stalled, Cancelled, or what the body raises."""
        self._cancellation.check()
        if self._throttle.step is not None:
            view = view[: self._throttle.step]
        begun = time.monotonic()
        count = self._body.read_into(view)
        self._watch(time.monotonic() - begun, count)
        self._cancellation.check()  # a socket that was shut looks like the end of the body
        if pause := self._throttle.take(count):
            self._cancellation.wait(pause)
        return count

    def _watch(self, seconds: float, count: int) -> None:
        self._waited += seconds
        self._since += count
        if self._waited < self._stall_seconds:
            return
        if self._since < _SLOWEST_BYTES_PER_SECOND * self._waited:
            raise AgentError(
                Reason.STALLED,
                f"{self._body.where} sent {self._since} bytes in {self._waited:.0f} s",
            )
        self._waited, self._since = 0.0, 0


class Crowd:
    """How many bodies are in flight, and whether there are cores for one more to overlap."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._count = 0
        self._lock = threading.Lock()

    @contextmanager
    def join(self) -> Iterator[bool]:
        """Whether this body may have threads of its own."""
        with self._lock:
            self._count += 1
            roomy = 2 * self._count <= self._cores
        try:
            yield roomy
        finally:
            with self._lock:
                self._count -= 1


def pump(intake: Intake, sink: Sink, buffers: Buffers, *, roomy: bool) -> None:
    """Move the rest of a file into its sink, and no more than that.

    Whatever ends it, `sink.offset` is true when this returns or raises: what arrived before a
    failure is kept. Raises SizeMismatch if the source goes on after the end of the file.
    """
    left = sink.size - sink.offset
    taken = buffers.take(DEPTH if roomy and left > BUFFER_BYTES else 1)
    try:
        if len(taken) == 1:
            _straight(intake, sink, taken[0], left)
        else:
            _Ring(sink, taken).run(intake, left)
        _expect_end(intake, sink, taken[0])
    finally:
        buffers.give(taken)
        sink.settle()


def _straight(intake: Intake, sink: Sink, buffer: bytearray, left: int) -> None:
    """Fill, write, hash. A whole buffer at a time: eight bodies on two cores come in small pieces,
    and what Python does for each piece is done under the GIL.
    """
    while left > 0:
        view, filled = memoryview(buffer)[:left], 0
        try:
            while filled < len(view) and (count := intake.read(view[filled:])):
                filled += count
        finally:  # also what came before a failure
            sink.write(view[:filled])
            sink.hash(view[:filled])
        if filled < len(view):
            return
        left -= filled


def _expect_end(intake: Intake, sink: Sink, buffer: bytearray) -> None:
    if sink.offset == sink.size and intake.read(memoryview(buffer)[:1]):
        raise AgentError(
            Reason.SIZE_MISMATCH, f"{sink.path.name} goes on after its {sink.size} bytes"
        )


class _Ring:
    """The buffers of one body: free -> filled -> written -> hashed -> free."""

    def __init__(self, sink: Sink, buffers: list[bytearray]) -> None:
        self._sink = sink
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        self._to_write: SimpleQueue[_Filled | None] = SimpleQueue()
        self._to_hash: SimpleQueue[_Filled | None] = SimpleQueue()
        # What ended a thread: whatever it is, or the others would wait for their buffers for ever.
        self._failure: BaseException | None = None
        for buffer in buffers:
            self._free.put(buffer)

    def run(self, intake: Intake, left: int) -> None:
        threads = [
            threading.Thread(target=self._write, name="write", daemon=True),
            threading.Thread(target=self._hash, name="hash", daemon=True),
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()  # may fail: a pod's number of threads is limited
                started.append(thread)
            while left > 0 and self._failure is None:
                count = self._fill(intake, left)
                if count == 0:
                    break
                left -= count
        finally:
            self._to_write.put(None)
            for thread in started:
                thread.join()
        if self._failure is not None:
            raise self._failure

    def _fill(self, intake: Intake, left: int) -> int:
        """One buffer, as full as the body allows; also when the body fails half-way."""
        buffer = self._free.get()
        view = memoryview(buffer)[:left]
        filled = 0
        try:
            while filled < len(view) and self._failure is None:
                count = intake.read(view[filled:])
                if count == 0:
                    break
                filled += count
        finally:
            if filled:
                self._to_write.put((buffer, filled))
        return filled

    def _write(self) -> None:
        while (item := self._to_write.get()) is not None:
            buffer, count = item
            if self._failure is None:
                try:
                    self._sink.write(memoryview(buffer)[:count])
                except BaseException as error:  # noqa: BLE001 - raised by `run`
                    self._failure = error
            if self._failure is None:
                self._to_hash.put(item)
            else:
                self._free.put(buffer)
        self._to_hash.put(None)

    def _hash(self) -> None:
        while (item := self._to_hash.get()) is not None:
            buffer, count = item
            self._sink.hash(memoryview(buffer)[:count])
            self._free.put(buffer)
