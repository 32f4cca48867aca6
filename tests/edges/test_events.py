"""Events that cannot be sent, and too many of them. What they are: the cluster contract."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.kube import events
from agent.kube.events import Recorder, Subject
from tests.contracts.cluster_contract import (
    Noting,
    Ticks,
    events_of,
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


def subject(name: str) -> Subject:
    return Subject("LocalModelNode", "", name, f"uid-{name}")


async def test_one_that_is_refused_is_a_log_line_and_stops_no_other(
    world: FakeWorld, api: Noting, caplog: pytest.LogCaptureFixture
) -> None:
    world.cluster.faults.answers = [(403, {})]
    recorder = Recorder(api, node=world.node)
    async with running(recorder.run()):
        recorder.say(subject("a"), "Warning", "Gated", "a")
        recorder.say(subject("b"), "Warning", "Gated", "b")
        await eventually(lambda: api.answered == 1)
    assert "an Event is lost" in caplog.text
    assert not await events_of(world, "default", "a")
    assert len(await events_of(world, "default", "b")) == 1


async def test_one_that_was_lost_is_made_when_it_is_said_again(
    world: FakeWorld, api: Noting
) -> None:
    clock = Ticks()
    world.cluster.faults.answers = [(503, {})]
    recorder = Recorder(api, node=world.node, clock=clock)
    async with running(recorder.run()):
        recorder.say(subject("a"), "Warning", "Gated", "first")
        await eventually(lambda: not world.cluster.faults.answers)
        await settled()
        clock.now += 61
        recorder.say(subject("a"), "Warning", "Gated", "second")
        await eventually(lambda: api.answered == 1)
    (event,) = await events_of(world, "default", "a")
    assert event["message"] == "second"


async def test_too_many_at_once_are_dropped_and_said_to_be(
    world: FakeWorld, api: Noting, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    recorder = Recorder(api, node=world.node)
    for number in range(events._QUEUE + 1):
        recorder.say(subject(str(number)), "Normal", "Ready", f"message {number}")
    assert f"message {events._QUEUE}" in caplog.text
    assert f"message {events._QUEUE - 1}" not in caplog.text


async def test_a_long_message_is_cut_and_a_long_name_still_makes_a_name(
    world: FakeWorld, api: Noting
) -> None:
    """The server refuses Events of more than a kilobyte, and names of more than 253 characters."""
    recorder, name = Recorder(api, node=world.node), "n" * 253
    async with running(recorder.run()):
        recorder.say(subject(name), "Warning", "Gated", "m" * 5000)
        await eventually(lambda: api.answered == 1)
    (event,) = await events_of(world, "default", name)
    assert len(event["metadata"]["name"]) <= 253
    assert len(event["message"]) <= 1024


async def test_reasons_and_objects_are_events_of_their_own(world: FakeWorld, api: Noting) -> None:
    recorder = Recorder(api, node=world.node)
    async with running(recorder.run()):
        recorder.say(subject("a"), "Warning", "Gated", "x")
        recorder.say(subject("a"), "Warning", "DiskFull", "x")
        recorder.say(subject("b"), "Warning", "Gated", "x")
        await eventually(lambda: api.answered == 3)
    assert len(await events_of(world, "default", "a")) == 2
    assert len(await events_of(world, "default", "b")) == 1


async def test_what_is_remembered_is_bounded(
    world: FakeWorld, api: Noting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_REMEMBERED", 3)
    recorder = Recorder(api, node=world.node)
    async with running(recorder.run()):
        for name in "abcde":
            recorder.say(subject(name), "Normal", "Ready", "x")
        await eventually(lambda: api.answered == 5)
        assert len(recorder._told) == 3
