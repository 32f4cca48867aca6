"""Credentials that must lead to a model that is here already: tried, kept, tried again."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path

import pytest

from agent.errors import AgentError, Reason
from agent.index import Index
from agent.model import CacheKey, ModelRef, Want, cache_key
from agent.proofs import Proofs

URI = "hf://acme/tiny"
HERE = frozenset({cache_key(URI)})
ONE, TWO = Want(ref=ModelRef(uri=URI), access="one"), Want(ref=ModelRef(uri=URI), access="two")
REFUSED = AgentError(Reason.UNAUTHORIZED, "the token is not known")
AWAY = AgentError(Reason.API_SERVER, "no answer")


class World:
    """Proofs over an index on a disk; `failures` are by what a want names."""

    def __init__(self, path: Path) -> None:
        self.index = Index(path, rebuild=list)
        self.failures: dict[str, BaseException] = {}
        self.asked: list[str] = []
        self.now = 1000.0
        self.woken = asyncio.Event()
        self.held: asyncio.Event | None = None
        self.proofs = Proofs(
            self.index,
            self._prove,
            changed=self.woken.set,
            clock=lambda: self.now,
            dice=lambda: 0.0,
        )

    async def _prove(self, want: Want) -> None:
        self.asked.append(want.access)
        if self.held is not None:
            await self.held.wait()
        if (failure := self.failures.get(want.access)) is not None:
            raise failure

    async def turn(
        self, guarded: Mapping[str, Want], here: frozenset[CacheKey] = HERE
    ) -> dict[str, Reason | None]:
        """Whole turns of the loop, until nothing happens any more; the doubts."""
        for _ in range(10):
            await self.proofs.turn(guarded, here)
            await asyncio.sleep(0.003)
        found = self.proofs.doubts()
        return {name: attempt.reason if attempt else None for name, attempt in found.items()}


@asynccontextmanager
async def living(path: Path) -> AsyncIterator[World]:
    world = World(path)
    await world.index.open()
    await world.proofs.open()
    try:
        yield world
    finally:
        await world.proofs.stop()
        await world.index.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with living(tmp_path / "index.sqlite3") as world:
        yield world


async def test_each_cache_shows_its_own_once(world: World) -> None:
    guarded = {"a/x": ONE, "b/x": TWO}
    world.held = asyncio.Event()
    assert await world.turn(guarded) == {"a/x": None, "b/x": None}
    world.held.set()
    assert await world.turn(guarded) == {}
    assert await world.turn(guarded) == {}
    assert sorted(world.asked) == ["one", "two"]
    assert world.woken.is_set()


async def test_who_is_refused_stays_in_doubt_and_is_tried_again(world: World) -> None:
    guarded = {"a/x": ONE, "b/x": TWO}
    world.failures["two"] = REFUSED
    assert await world.turn(guarded) == {"b/x": Reason.UNAUTHORIZED}
    asked = len(world.asked)
    assert await world.turn(guarded) == {"b/x": Reason.UNAUTHORIZED}
    assert len(world.asked) == asked, "not before its time"
    due = world.proofs.next_at
    assert 0 < due - world.now <= 60
    del world.failures["two"]
    world.now = due + 0.1
    assert await world.turn(guarded) == {}


async def test_a_restart_and_an_outage_take_nothing_back(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    async with living(path) as world:
        assert await world.turn({"a/x": ONE}) == {}
    async with living(path) as world:
        world.failures = {"one": AWAY, "two": AWAY}
        assert await world.turn({"a/x": ONE}) == {}
        assert world.asked == []
        # Other credentials are others, also under the same name.
        assert await world.turn({"a/x": TWO}) == {"a/x": Reason.API_SERVER}
        # And the object may be away for a moment: KServe's controller makes it anew.
        assert await world.turn({}) == {}
        assert await world.turn({"a/x": ONE}) == {}


async def test_what_is_not_here_is_not_asked_for(world: World) -> None:
    assert await world.turn({"a/x": ONE}, frozenset()) == {"a/x": None}
    assert world.asked == []


async def test_a_model_that_has_gone_wakes_nobody(world: World) -> None:
    """A try that is due and cannot be made would turn the loop as fast as it goes."""
    world.failures["one"] = REFUSED
    await world.turn({"a/x": ONE})
    world.now += 3600
    assert await world.turn({"a/x": ONE}, frozenset()) == {"a/x": None}
    assert world.proofs.next_at == inf
    assert await world.turn({"a/x": ONE}) == {"a/x": Reason.UNAUTHORIZED}


async def test_a_clock_that_was_set_back_puts_nothing_off_for_years(world: World) -> None:
    world.failures["one"] = REFUSED
    await world.turn({"a/x": ONE})
    del world.failures["one"]
    world.now -= 1e8
    assert await world.turn({"a/x": ONE}) == {}


async def test_credentials_that_change_during_a_try_are_tried_themselves(world: World) -> None:
    world.held = asyncio.Event()
    await world.turn({"a/x": ONE})
    await world.turn({"a/x": TWO})
    world.failures["two"] = REFUSED
    world.held.set()
    assert await world.turn({"a/x": TWO}) == {"a/x": Reason.UNAUTHORIZED}
    assert await world.turn({"a/x": ONE}) == {}
    assert world.asked == ["one", "two", "one"]


async def test_no_more_than_four_at_once(world: World) -> None:
    world.held = asyncio.Event()
    guarded = {f"a/{n}": Want(ref=ModelRef(uri=URI), access=str(n)) for n in range(20)}
    await world.turn(guarded)
    assert len(world.asked) == 4
    world.held.set()
    assert await world.turn(guarded) == {}
    assert len(world.asked) == 20


async def test_a_bug_is_a_reason_and_not_the_end(world: World) -> None:
    world.failures["one"] = RuntimeError("oops")
    assert await world.turn({"a/x": ONE}) == {"a/x": Reason.INTERNAL}


async def test_what_a_cache_names_is_kept_as_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    async with living(path) as world:
        await world.turn({"a/x": Want(ref=ModelRef(uri=URI), access='{"token": "sesame"}')})
        assert len(await world.index.access_proofs()) == 1
    assert not any(b"sesame" in file.read_bytes() for file in tmp_path.iterdir())
