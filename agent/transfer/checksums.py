"""The hashes that a source may have promised. A manifest's own SHA-256 is always computed besides.

CRCs are awscrt's: 30 GiB/s where the standard library has no CRC64NVME and CRC32C at all. It is
loaded when the first file is promised by one: an agent without such a source does not pay for it.
"""

import hashlib
import importlib
from collections.abc import Callable
from typing import Protocol

from agent.model import Algorithm


class Hash(Protocol):
    """As of hashlib."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Crc:
    """`step(data, before)` is the checksum of all until now; its hex has as many digits as bits."""

    def __init__(self, step: Callable[[memoryview, int], int], bits: int) -> None:
        self._step = step
        self._digits = bits // 4
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = self._step(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:0{self._digits}x}"


def promised_hash(algorithm: Algorithm, size: int) -> Hash:
    """A new hash of a file of that size."""
    match algorithm:
        case "sha256":
            return hashlib.sha256()
        case "git-sha1":
            return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        case "md5":
            return hashlib.md5(usedforsecurity=False)
        case "crc32" | "crc32c":
            return _Crc(_awscrt(algorithm), 32)
        case "crc64nvme":
            return _Crc(_awscrt(algorithm), 64)


def _awscrt(name: str) -> Callable[[memoryview, int], int]:
    step: Callable[[memoryview, int], int] = getattr(
        importlib.import_module("awscrt.checksums"), name
    )
    return step
