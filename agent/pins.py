"""What an operator keeps, whatever room is needed: one empty file a key (design D2).

A file, because it must outlive the index, and because it can be made with `touch` on a node whose
agent does not run.
"""

import os
from pathlib import Path

from agent import layout, trees
from agent.files import disk_errors
from agent.model import CacheKey


class Pins:
    """The pins of the volume at `root`."""

    def __init__(self, root: Path) -> None:
        self._directory = root / layout.PINS

    def all(self) -> frozenset[CacheKey]:
        names = trees.names(self._directory)
        return frozenset(CacheKey(name) for name in names if layout.is_key(name))

    def add(self, key: CacheKey) -> None:
        with disk_errors(f"pin {key}"):
            self._directory.mkdir(exist_ok=True)
            (self._directory / key).touch(layout.NOTE_MODE)
            self._sync()

    def remove(self, key: CacheKey) -> None:
        with disk_errors(f"unpin {key}"):
            (self._directory / key).unlink(missing_ok=True)
            self._sync()

    def _sync(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
