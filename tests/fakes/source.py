"""A source whose world is a test's to arrange: models, delays, failures.

    source = FakeSource(tmp_path / "origin")
    source.add("fake://tiny", {"config.json": b"{}", "model.safetensors": weights})
    source.fail("list", AgentError(Reason.NETWORK, "no route"), times=2)
    with source.held("locate"):
        ...  # whoever locates now, waits

    Sources({"fake": lambda environment: source})

It keeps the contract that the real ones keep (`tests/contracts/source_contract.py`). The bytes lie
in files, so the engine brings them as it brings those of `file://`.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from agent.errors import AgentError, Reason
from agent.files import version_of
from agent.model import Digest, Listing, Locator, ModelRef, PathLocator, RemoteFile
from agent.sources.base import is_archive, pack, pin

Operation = Literal["list", "locate"]

_URI = re.compile(r"fake://([a-z0-9-]+)")


class FakeSource:
    """Holds what was added, at the revision that follows from it. For one event loop."""

    def __init__(self, root: Path, *, promise: bool = True) -> None:
        self._root = root
        self._promise = promise
        self._models: dict[str, tuple[str, tuple[RemoteFile, ...]]] = {}
        self._failures: dict[Operation, list[AgentError]] = {"list": [], "locate": []}
        self._always: dict[Operation, AgentError | None] = {"list": None, "locate": None}
        self._seconds: dict[Operation, float] = {"list": 0.0, "locate": 0.0}
        self._held: dict[Operation, asyncio.Event | None] = {"list": None, "locate": None}
        self.calls: list[tuple[Operation, str]] = []
        """What was asked, in order: the URI that was listed, or the path that was located."""

    # What it holds

    def add(self, uri: str, files: Mapping[str, bytes]) -> str:
        """Hold exactly these files under this URI from now on; the revision."""
        digest = hashlib.sha256()
        for path, data in sorted(files.items()):
            digest.update(b"%s\0%d\0%s" % (path.encode(), len(data), data))
        revision = digest.hexdigest()[:40]
        described = []
        for path, data in files.items():
            place = self._root / revision / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.write_bytes(data)
            promised = Digest("sha256", hashlib.sha256(data).hexdigest())
            described.append(
                RemoteFile(
                    path=path,
                    size=len(data),
                    origin=path,
                    digest=promised if self._promise else None,
                    version=version_of(place.stat()),
                )
            )
        self._models[uri] = (revision, tuple(described))
        return revision

    def describe(self, uri: str, files: Iterable[RemoteFile]) -> None:
        """List these, whatever they are; they cannot be located."""
        self._models[uri] = ("0" * 40, tuple(files))

    def place(self, uri: str, path: str) -> Path:
        """Where the bytes of a file lie, to spoil them."""
        return self._root / self._models[uri][0] / path

    # How it behaves

    def fail(self, operation: Operation, error: AgentError, *, times: int | None = None) -> None:
        """Raise this the next `times` times, or (None) until `mend`."""
        if times is None:
            self._always[operation] = error
        else:
            self._failures[operation] += [error] * times

    def mend(self) -> None:
        for operation in self._failures:
            self._failures[operation].clear()
            self._always[operation] = None

    def slow(self, operation: Operation, seconds: float) -> None:
        self._seconds[operation] = seconds

    @contextmanager
    def held(self, operation: Operation) -> Iterator[None]:
        """Nobody gets past this operation before the block ends."""
        event = self._held[operation] = asyncio.Event()
        try:
            yield
        finally:
            self._held[operation] = None
            event.set()

    # The contract

    def check(self, ref: ModelRef) -> None:
        if not _URI.fullmatch(ref.uri):
            raise AgentError(Reason.INVALID_SPEC, f"{ref.uri!r} must be fake://name")

    def host(self, ref: ModelRef) -> str:
        return ""  # its failures are told one by one

    async def list(self, ref: ModelRef) -> Listing:
        self.check(ref)
        await self._behave("list", ref.uri)
        if ref.uri not in self._models:
            raise AgentError(Reason.REPOSITORY_NOT_FOUND, f"{ref.uri} was not added")
        revision, files = self._models[ref.uri]
        return (
            pack(ref, revision, files[0])
            if is_archive([file.path for file in files])
            else pin(ref, revision, files)
        )

    async def locate(self, listing: Listing, file: RemoteFile) -> Locator:
        await self._behave("locate", file.path)
        path = self._root / listing.revision / file.path
        return PathLocator(path=str(path), version=file.version)

    async def _behave(self, operation: Operation, about: str) -> None:
        self.calls.append((operation, about))
        held = self._held[operation]
        if held is not None:
            await held.wait()
        if self._seconds[operation]:
            await asyncio.sleep(self._seconds[operation])
        if self._failures[operation]:
            raise self._failures[operation].pop(0)
        always = self._always[operation]
        if always is not None:
            raise always
