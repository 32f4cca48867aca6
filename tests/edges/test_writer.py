"""The status while its server misbehaves. When it is written, and what: the cluster contract."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.errors import RULES, Reason
from agent.kube import parse, writer
from agent.kube.client import ApiError, Json
from tests.cluster.nodes import local_model_node
from tests.contracts.cluster_contract import (
    DOWNLOADED,
    ERROR,
    NODES,
    Noting,
    Status,
    eventually,
    opened,
    running,
    settled,
)
from tests.contracts.test_cluster import FakeWorld
from tests.fakes.cluster import FakeCluster


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[FakeWorld]:
    async with FakeCluster(tmp_path).serving() as cluster:
        yield FakeWorld(cluster)


@pytest.fixture
async def api(world: FakeWorld) -> AsyncIterator[Noting]:
    async with opened(world) as api:
        yield api


@pytest.fixture
async def status(world: FakeWorld, api: Noting, monkeypatch: pytest.MonkeyPatch) -> Status:
    monkeypatch.setattr(writer, "_delay", lambda error, failures: 0.01)
    return await Status.of(world, api)


@pytest.mark.parametrize("code", [0, 409, 429, 500, 503])
async def test_a_refused_write_is_made_again_and_says_what_is_true_then(
    world: FakeWorld, api: Noting, status: Status, code: int
) -> None:
    world.cluster.faults.answers = [(code, {})] * 2 if code else []
    world.cluster.faults.refuse = not code
    async with running(status.writer.run()):
        await status.say(words={"a": ERROR})
        await eventually(lambda: api.count("PATCH") == 1)
        await status.say(words={"a": DOWNLOADED})
        world.cluster.faults.refuse = False

        def true_at_last() -> bool:
            status.ticks.now += 1
            status.writer.changed()
            return _words(world) == {"a": DOWNLOADED}

        await eventually(true_at_last)
    assert not world.cluster.faults.answers


def _words(world: FakeWorld) -> object:
    found = world.cluster.object(f"{NODES}/{world.node}") or {}
    return (found.get("status") or {}).get("modelStatus")


def test_failures_wait_ever_longer_and_as_long_as_they_are_told() -> None:
    rule, error = RULES[Reason.API_SERVER], ApiError(503, "no")
    delays = [writer._delay(error, failures) for failures in range(1, 100)]
    assert delays == sorted(delays)
    assert delays[-1] == rule.cap_seconds
    assert writer._delay(ApiError(429, "no", retry_after=99.0), 1) == 99.0
    assert writer._delay(ApiError(429, "no", retry_after=0.0), 1) == delays[0]


async def test_another_object_of_the_same_name_is_written_from_the_start(
    world: FakeWorld, api: Noting, status: Status
) -> None:
    """It was deleted and made again: what was said of the old one says nothing of it."""
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED})
        await status.written(1)
        await world.delete(f"{NODES}/{world.node}")
        status.writer.seen(None)
        again: Json = await world.put(f"{NODES}/{world.node}", local_model_node(world.node))
        status.ticks.now += 100
        status.writer.seen(parse.node(again))
        await status.written(2)
    assert _words(world) == {"a": DOWNLOADED}
    assert not status.contested


async def test_an_older_object_that_comes_late_is_no_news(
    world: FakeWorld, api: Noting, status: Status
) -> None:
    old = parse.node(await world.get(f"{NODES}/{world.node}"))
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED})
        await status.written(1)
        status.ticks.now += 100
        status.writer.seen(old)
        await settled()
        assert api.count("PATCH") == 1
    assert not status.contested


async def test_contests_are_forgotten_after_a_while(
    world: FakeWorld, api: Noting, status: Status
) -> None:
    """Somebody who tries something by hand once an hour is no second agent."""
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED})
        await status.written(1)
        for number in range(2, 8):
            status.ticks.now += 3600
            wrong = await world.patch(status.path, {"status": {"modelStatus": {"a": ERROR}}})
            status.writer.seen(parse.node(wrong))
            await status.written(number)
    assert not status.contested


async def test_a_spec_that_changes_is_no_contest(
    world: FakeWorld, api: Noting, status: Status
) -> None:
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED})
        await status.written(1)
        for number in range(6):
            changed = await world.get(f"{NODES}/{world.node}")
            changed["spec"] = {"localModels": [{"modelName": str(number)}]}
            status.writer.seen(parse.node(await world.put(f"{NODES}/{world.node}", changed)))
            await settled()
        assert api.count("PATCH") == 1
    assert not status.contested
