"""One file through the engine, with all it told on the way: what the transfer tests share."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.errors import AgentError, Reason
from agent.model import Digest, HttpLocator, Locator
from agent.transfer import Engine, FileJob
from tests.fakes.hub import Hub

REPO = "acme/tiny"


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(data).hexdigest())


def git_sha1(data: bytes) -> Digest:
    return Digest("git-sha1", hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


@contextmanager
def an_engine(**options: Any) -> Iterator[Engine]:
    """Impatient with stalls, and never waiting between tries: these dice make every delay zero,
    and take a second off what a Retry-After asks for.
    """
    engine = Engine(**{"stall_seconds": 0.3, "dice": lambda: -1.0, **options})
    try:
        yield engine
    finally:
        engine.close()


@dataclass
class Download:
    """What should come from where, and what happened."""

    url: str
    path: Path
    size: int
    promised: Digest | None
    headers: Mapping[str, str] = field(default_factory=dict)
    react: Callable[[AgentError], None] = lambda error: None
    where: Callable[[], Locator] | None = None
    located: int = 0
    done: int = 0
    received: int = 0
    retries: list[AgentError] = field(default_factory=list)

    @classmethod
    def of(cls, url: str, path: Path, data: bytes, **options: Any) -> Download:
        return cls(url, path, len(data), **{"promised": sha256(data), **options})

    async def run(self, engine: Engine) -> str:
        """Whatever comes of it, what was reported as done is what is on disk."""
        self.done = 0
        job = FileJob(
            path=self.path,
            size=self.size,
            promised=self.promised,
            locate=self._locate,
            on_bytes=self._on_bytes,
            on_retry=self._on_retry,
        )
        try:
            # Nothing here takes long: a bug must not hang the suite.
            async with asyncio.timeout(60):
                return await engine.fetch(job)
        finally:
            assert self.done == (self.path.stat().st_size if self.path.exists() else 0)

    async def fail(self, engine: Engine) -> AgentError:
        try:
            digest = await self.run(engine)
        except AgentError as error:
            return error
        raise AssertionError(f"it came: {digest}, after {self.retries}")

    @property
    def reasons(self) -> list[Reason]:
        """Why it was tried again, each time."""
        return [error.reason for error in self.retries]

    async def _locate(self) -> Locator:
        self.located += 1
        if self.where is not None:
            return self.where()
        return HttpLocator(url=self.url, headers=self.headers)

    def _on_bytes(self, done: int, received: int) -> None:
        self.done += done
        self.received += received

    def _on_retry(self, error: AgentError) -> None:
        self.retries.append(error)
        self.react(error)


def url_of(hub: Hub, name: str) -> str:
    return f"{hub.endpoint}/{REPO}/resolve/main/{name}"


def ranges(hub: Hub) -> list[str | None]:
    """The Range of every GET that a body answered."""
    return [r.range for r in hub.requests if r.status in (200, 206)]
