"""Ways for a server to misbehave, as values, and the bodies they spoil.

A fault is a small frozen value from a closed set; `Faults` remembers which ones are switched on
and for which requests. Nothing here touches a socket: `tests.fakes.hub` reads the value and acts.
The kinds fall into five groups by *what* they change:

=====================  ===========================================================================
the whole answer       `Status`
the bytes themselves   `Short`, `Long`, `Corrupt` (a different but self-consistent body)
the range served       `IgnoreRange`, `PartialAs200`
the delivery           `Truncate`, `Reset`, `Stall`, `Dribble`, `Slow` (headers tell the truth)
the listing            `WrongListing`
=====================  ===========================================================================
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeAlias

__all__ = [
    "Body",
    "Bytes",
    "Corrupt",
    "Dribble",
    "Fault",
    "Faults",
    "File",
    "IgnoreRange",
    "Long",
    "PartialAs200",
    "Reset",
    "Short",
    "Slow",
    "Stall",
    "Status",
    "Truncate",
    "WrongListing",
    "applies",
    "matches",
    "spoil",
]

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this status instead, for example 429 with `Retry-After`."""

    code: int
    headers: Mapping[str, str] = field(default_factory=lambda: _NO_HEADERS)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Truncate:
    """Promise the full length, send `after` bytes of the answer, close in good order (FIN)."""

    after: int


@dataclass(frozen=True, slots=True)
class Short:
    """Serve the file without its last `by` bytes, with headers that agree."""

    by: int


@dataclass(frozen=True, slots=True)
class Long:
    """Serve the file with `by` zero bytes appended, with headers that agree."""

    by: int


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Flip the byte at `offset` of the file; answers whose range leaves it out stay intact."""

    offset: int


@dataclass(frozen=True, slots=True)
class Stall:
    """Send `after` bytes, then nothing, with the connection open until one side leaves."""

    after: int


@dataclass(frozen=True, slots=True)
class Dribble:
    """One byte at a time: never idle long enough for a read timeout, never done either."""

    bytes_per_second: int


@dataclass(frozen=True, slots=True)
class Slow:
    """An honest but slow line, in pieces of a twentieth of a second; the rate is per answer."""

    bytes_per_second: int


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """Answer a range request with 200 and the whole body, as the standard allows."""


@dataclass(frozen=True, slots=True)
class PartialAs200:
    """Answer a range request with the right bytes and `Content-Range`, but status 200."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Send `after` bytes, then reset the connection (RST). What the client has not yet taken from
    the wire dies with it, so it sees *at most* `after` bytes."""

    after: int


@dataclass(frozen=True, slots=True)
class WrongListing:
    """List the file with a size that is `size_delta` off; its bytes are served unchanged."""

    size_delta: int


Fault: TypeAlias = (
    Status
    | Truncate
    | Short
    | Long
    | Corrupt
    | Stall
    | Dribble
    | Slow
    | IgnoreRange
    | PartialAs200
    | Reset
    | WrongListing
)


def applies(fault: Fault, *, span: range, ranged: bool) -> bool:
    """Whether `fault` would be visible in an answer carrying the bytes `span`.

    A fault that would not be seen must not be used up, or `times=1` would depend on luck.
    """
    match fault:
        case WrongListing():
            return False
        case IgnoreRange() | PartialAs200():
            return ranged
        case Corrupt(offset):
            return offset in span
        case _:
            return True


def matches(glob: str, *, url_path: str, file: str) -> bool:
    """Whether `glob` means this request: a leading slash says URL path, otherwise repo file.

    `file` is `owner/name/path/in/repo`, or empty where no file is concerned. A glob may leave the
    repository out: `*.safetensors` and `config.json` mean the file in any repository.
    """
    if glob.startswith("/"):
        return fnmatchcase(url_path, glob)
    if not file:
        return False
    path = file.split("/", 2)[-1]
    return fnmatchcase(file, glob) or fnmatchcase(path, glob)


class Faults:
    """The faults switched on, oldest first; the first that fits a request is the one it gets."""

    def __init__(self) -> None:
        # Switched on by the test's thread, used up by the server's.
        self._lock = threading.Lock()
        self._rules: list[_Rule] = []

    def add(self, glob: str, fault: Fault, *, times: int | None) -> None:
        with self._lock:
            self._rules.append(_Rule(glob, fault, times))

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def take(self, *, url_path: str, file: str, fits: Callable[[Fault], bool]) -> Fault | None:
        """The fault for this request, counted as used; None if it is to be served well."""
        if not self._rules:  # The fault-free path is benchmarked: no lock, no matching.
            return None
        with self._lock:
            for rule in self._rules:
                if not matches(rule.glob, url_path=url_path, file=file) or not fits(rule.fault):
                    continue
                if rule.left is not None:
                    rule.left -= 1
                    if rule.left <= 0:
                        self._rules.remove(rule)
                return rule.fault
        return None


@dataclass(slots=True, eq=False)
class _Rule:
    glob: str
    fault: Fault
    left: int | None
    """Requests it is still good for; None means for ever."""


class Body(Protocol):
    """Bytes that can be read at any place, so a range never reads what it does not serve."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, count: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class File:
    """A file on disk, the one kind of body the kernel can send by itself."""

    path: Path
    size: int

    def read(self, offset: int, count: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(count)


@dataclass(frozen=True, slots=True)
class Bytes:
    """An answer made up on the spot."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, count: int) -> bytes:
        return self.data[offset : offset + count]


@dataclass(frozen=True, slots=True)
class _Resized:
    body: Body
    size: int

    def read(self, offset: int, count: int) -> bytes:
        count = max(0, min(count, self.size - offset))
        return self.body.read(offset, count).ljust(count, b"\0")


@dataclass(frozen=True, slots=True)
class _Flipped:
    body: Body
    offset: int

    @property
    def size(self) -> int:
        return self.body.size

    def read(self, offset: int, count: int) -> bytes:
        data = bytearray(self.body.read(offset, count))
        if offset <= self.offset < offset + len(data):
            data[self.offset - offset] ^= 0xFF
        return bytes(data)


def spoil(body: Body, fault: Fault | None) -> Body:
    """`body` as `fault` would have it; unchanged by faults that are not about the bytes."""
    match fault:
        case Short(by):
            return _Resized(body, max(0, body.size - by))
        case Long(by):
            return _Resized(body, body.size + by)
        case Corrupt(offset):
            return _Flipped(body, offset)
        case _:
            return body
