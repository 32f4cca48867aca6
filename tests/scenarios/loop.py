"""Agents that live and die, one after the other, on one disk: for tests of what outlives them.

A `Life` is one agent from start to end, in this process: the disk is real, so are loop, index and
transfer; the source, the clock, the users and who else takes space are the test's. The next life
takes over all that is not the agent's own.
"""

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

from agent import layout, manifest
from agent.files import Files
from agent.model import Actual, CacheKey, Plan, Space, Want
from agent.model import Volume as Numbers
from agent.plan import plan
from agent.store import Store
from agent.wishes import Desired
from tests.edges.volume import Killed, Mortal, files_below, on_offer
from tests.scenarios.volume import Volume

REST_SECONDS = 30.0
"""In which a loop without new stimuli must have come to rest."""


class Fuse(Mortal):
    """A file system that its user can use up to a verb, and then never again: dead is dead."""

    def __init__(self, real: Files | None = None) -> None:
        super().__init__(None, "before", real)
        self.blown = False
        self._verb = threading.RLock()

    def arm(self, verbs: int, how: str) -> None:
        self.at, self.how = len(self.steps) + verbs, how

    def _step(
        self, what: str, act: Callable[[], None], torn: Callable[[], None] | None = None
    ) -> None:
        with self._verb:
            if self.blown:
                raise Killed(f"dead: {what}")
            try:
                super()._step(what, act, torn)
            except Killed:
                self.blown = True
                raise


@dataclass(frozen=True, slots=True)
class Decision:
    """What one turn was told and what it decided."""

    actual: Actual
    volume: Numbers
    plan: Plan


@contextmanager
def decisions(heard: Callable[[Decision], None]) -> Iterator[None]:
    """Hear of every plan that a loop of this process makes."""

    def listening(
        desired: Mapping[CacheKey, Want], actual: Actual, volume: Numbers, *, now: float
    ) -> Plan:
        decided = plan(desired, actual, volume, now=now)
        heard(Decision(actual, volume, decided))
        return decided

    with patch("agent.reconcile.plan", listening):
        yield


class Life(Volume):
    """One agent. `before` is the life whose disk, world and wishes it takes over."""

    def __init__(
        self,
        home: Path,
        *,
        root: Path | None = None,
        before: "Life | None" = None,
        fuse: Fuse | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(home, store=Store(root or home / "cache", fuse), **settings)
        self.fuse = fuse
        self.desired = Desired(wants={}, names={})
        self.foreign = 0
        """Bytes of the file system that somebody else has taken."""
        self.reported: set[CacheKey] = set()
        """Keys that were there when this agent was told that a pod uses them."""
        if before is not None:
            self.source, self.now, self.users = before.source, before.now, before.users
            self.capacity, self.foreign = before.capacity, before.foreign
            self.desired, self.reported = before.desired, before.reported

    async def _in_use(self) -> frozenset[CacheKey] | None:
        used = self.users()
        notes = (layout.manifest, layout.retiring)
        for key in used or ():
            there = any((self.store.root / note(key)).exists() for note in notes)
            if there and self.store.model(key).is_dir():
                self.reported.add(key)
        return used

    def _space(self) -> Space:
        used = self.foreign + self.bytes_in(*TOPS)
        return Space(capacity=self.capacity, free=max(0, self.capacity - used))

    async def begin(self) -> None:
        """As the agent does it: nothing is decided before the first wishes are known."""
        self.store.open()
        try:
            await self.reconciler.start()
        except BaseException:
            await self._close()
            raise
        self.reconciler.desire(self.desired)
        self.loop = asyncio.create_task(self.reconciler.run())

    async def end(self) -> None:
        """However it ends: told to, or killed at one of its verbs."""
        assert self.loop is not None
        self.loop.cancel()
        with suppress(asyncio.CancelledError, BaseExceptionGroup, Killed):
            await self.loop
        await self._close()
        if self.fuse is None or not self.fuse.blown:
            assert not self.witness.illegal, self.witness.illegal
            assert self.metrics.illegal_transitions._value.get() == 0

    async def _close(self) -> None:
        await self.index.close()
        self._engine.close()
        self._slow.close()
        self.store.close()

    def wish(self, wants: Mapping[CacheKey, Want]) -> None:
        self.desired = Desired(wants=dict(wants), names={})
        self.reconciler.desire(self.desired)

    def bytes_in(self, *names: str) -> int:
        """As a disk counts: a file with two names is there once."""
        return sum(size for size, _ in inodes_below(*(self.store.root / n for n in names)).values())


TOPS = (layout.INGEST, layout.INGEST, layout.MODELS, layout.INGEST, layout.TRASH)
"""In an order in which nothing is missed that is renamed while this looks, as `statvfs` misses
nothing: to its place in the ingest, to its seal, back to be mended, to the trash."""


def inodes_below(*tops: Path) -> dict[int, tuple[int, int]]:
    """Size and allocated bytes of every file, by inode."""
    found = {}
    for path in chain.from_iterable(map(files_below, tops)):
        with suppress(FileNotFoundError):
            there = path.lstat()
            found[there.st_ino] = there.st_size, there.st_blocks * 512
    return found


def offered(root: Path) -> dict[CacheKey, frozenset[tuple[str, str]]]:
    """Path and SHA-256 of every file of everything on offer: as it lies there, not as it is said to
    be. The manifest must say the same."""
    found = {}
    for key in on_offer(root):
        top = root / layout.model(key)
        lies = {str(path.relative_to(top)): _sha256(path) for path in files_below(top)}
        said = manifest.parse((root / layout.manifest(key)).read_text())
        assert lies == {file.path: file.sha256 for file in said.files}, said.ref.uri
        found[key] = frozenset(lies.items())
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def meddle(directory: Path, how: str) -> None:
    """What people do to files: `directory`, `file`, `truncate`, `write`."""
    files = sorted(files_below(directory), key=lambda path: -path.stat().st_size)
    largest = files[0]
    if how == "directory":
        for path in files:
            path.unlink()
        for name, _, _ in os.walk(directory, topdown=False):
            Path(name).rmdir()
    elif how == "file":
        largest.unlink()
    elif how == "truncate":
        os.truncate(largest, largest.stat().st_size // 2)
    else:
        largest.chmod(0o644)
        with largest.open("r+b") as file:
            file.write(bytes(10))
        largest.chmod(0o444)
