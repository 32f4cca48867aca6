"""A watch while its server misbehaves: nothing is lost, and nothing is asked in a tight loop.

What it is when all is well: the cluster contract. Pauses are counted and not waited for.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agent.kube import watch as watch_module
from agent.kube.client import Api, ApiError, Json
from agent.kube.watch import Watch
from tests.contracts.cluster_contract import (
    CACHES,
    NODES,
    Noting,
    Ticks,
    eventually,
    nothing,
    opened,
    running,
)
from tests.contracts.test_cluster import FakeWorld
from tests.fakes.cluster import FakeCluster

PATH = f"{NODES}/node-1"
GOOD = {"metadata": {"name": "x", "resourceVersion": "500"}}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[FakeWorld]:
    async with FakeCluster(tmp_path).serving() as cluster:
        yield FakeWorld(cluster)


@pytest.fixture
async def api(world: FakeWorld) -> AsyncIterator[Noting]:
    async with opened(world) as api:
        yield api


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those that a watch made; each takes no time, and after thirty it stays."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)
        await (wait(0) if len(found) < 30 else asyncio.Event().wait())

    wait = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", _only_there(sleep, wait))
    return found


def _only_there(
    sleep: Callable[[float], Any], wait: Callable[[float], Any]
) -> Callable[[float], Any]:
    """The pauses of a watch, and not those of the test."""

    async def chosen(seconds: float) -> None:
        task = asyncio.current_task()
        ours = task is not None and "Watch.run" in repr(task.get_coro())
        await (sleep if ours else wait)(seconds)

    return chosen


def a_watch(api: Api, path: str = NODES, **options: Any) -> Watch[Json]:
    options = {"changed": nothing, "dice": lambda: 0.5, **options}
    return Watch(api, path, parse=dict, **options)


def every_watch(text: str) -> Callable[[web.Request], web.Response | None]:
    def answer(request: web.Request) -> web.Response | None:
        watched = request.query.get("watch") == "1"
        return web.Response(text=text, content_type="application/json") if watched else None

    return answer


def event(kind: object, raw: object) -> str:
    return json.dumps({"type": kind, "object": raw}) + "\n"


NO_EVENTS = {
    "an empty object": "{}\n",
    "null": "null\n",
    "a number": "7\n",
    "a text": '"x"\n',
    "a page": "<html>\n",
    "deep": "[" * 100_000 + "]" * 100_000 + "\n",
    "no type": '{"object": {}}\n',
    "an unknown type": event("CHANGED", GOOD),
    "no object": '{"type": "ADDED"}\n',
    "no version": event("ADDED", {"metadata": {"name": "x"}}),
    "a null version": event("ADDED", {"metadata": {"name": "x", "resourceVersion": None}}),
    "an empty version": event("BOOKMARK", {"metadata": {"resourceVersion": ""}}),
    "a strange version": event("BOOKMARK", {"metadata": {"resourceVersion": {"a": 1}}}),
    "a strange name": event("ADDED", {"metadata": {"name": ["x"], "resourceVersion": "1"}}),
    "no name": event("DELETED", {"metadata": {"resourceVersion": "1"}}),
    "ERROR 410": event("ERROR", {"code": 410, "message": "gone"}),
    "ERROR 500": event("ERROR", {"code": 500, "message": "no"}),
    "a strange ERROR": event("ERROR", {"code": "410", "message": ["x"]}),
    "an empty ERROR": event("ERROR", None),
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in NO_EVENTS.items()])
async def test_what_is_no_event_is_a_failure_and_waits_ever_longer(
    world: FakeWorld, api: Noting, pauses: list[float], text: str
) -> None:
    await world.put(PATH, {})
    world.cluster.faults.instead = every_watch(text)
    watch = a_watch(api)
    async with running(watch.run()):
        await eventually(lambda: len(pauses) == 30)
        assert watch.objects.keys() == {"node-1"}, "what is known stays known"
    assert pauses[:3] == [0.5, 1.0, 2.0]
    assert pauses[-1] == watch_module._CAP_SECONDS
    assert pauses == sorted(pauses)


async def test_one_that_ends_at_once_each_time_waits_ever_longer_too(
    world: FakeWorld, api: Noting, pauses: list[float]
) -> None:
    """It is no failure: what a proxy that closes idle watches has not told is not known to be old.
    But for that it must not be long."""
    world.cluster.faults.instead = every_watch("")
    watch = a_watch(api)
    async with running(watch.run()):
        await eventually(lambda: len(pauses) == 30)
        assert watch.current
    assert pauses[:5] == [0.5, 1.0, 2.0, 4.0, 5.0]
    assert set(pauses[5:]) == {5.0}
    assert api.count("GET") == 1


@pytest.mark.parametrize(
    "text", [event("BOOKMARK", {"metadata": {"resourceVersion": "500"}}), event("ADDED", GOOD)]
)
async def test_an_event_ends_the_failures_in_a_row(
    world: FakeWorld, api: Noting, pauses: list[float], text: str
) -> None:
    def answer(request: web.Request) -> web.Response | None:
        return every_watch(text if len(pauses) >= 5 else "{}\n")(request)

    world.cluster.faults.instead = answer
    watch = a_watch(api)
    async with running(watch.run()):
        await eventually(lambda: len(pauses) == 30)
        assert watch.current
        assert watch.failure == ""
    assert pauses[:5] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert set(pauses[5:]) == {0.25}


@pytest.mark.parametrize("text", ["", "{}\n"])
async def test_one_that_has_lasted_ends_them_however_it_ends(
    world: FakeWorld, api: Noting, pauses: list[float], text: str
) -> None:
    """Nothing happens on most of them for hours, and something on the way closes them."""
    ticks = Ticks()

    def answer(request: web.Request) -> web.Response | None:
        ticks.now += 6.0
        return every_watch(text)(request)

    world.cluster.faults.instead = answer
    async with running(a_watch(api, ticks=ticks).run()):
        await eventually(lambda: len(pauses) == 30)
    assert max(pauses) <= 0.5


# -- a kind that may not be there -----------------------------------------------------------------


async def test_a_kind_that_was_there_is_gone_after_minutes_and_not_at_once(
    world: FakeWorld, api: Noting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(watch_module, "_CAP_SECONDS", 0.001)
    ticks = Ticks()
    await world.put(f"{CACHES}/a", {})
    watch = a_watch(api, CACHES, none_on=(404,), ticks=ticks)

    async def asked(status: int, times: int = 3) -> None:
        before = len(api.asked)
        world.cluster.faults.instead = _refusing(status)
        await eventually(lambda: len(api.asked) >= before + times)

    async with running(watch.run()):
        await watch.listed.wait()
        await world.cluster.forget()  # ends the watch
        await asked(404)
        await eventually(lambda: not watch.current)
        ticks.now += 299
        await asked(404)
        assert watch.objects.keys() == {"a"}
        await asked(500)  # not in a row
        ticks.now += 299
        await asked(404)
        assert watch.objects.keys() == {"a"}
        ticks.now += 301
        await eventually(lambda: not watch.objects)
        assert watch.current


def _refusing(status: int) -> Callable[[web.Request], web.Response | None]:
    return lambda request: web.json_response({"message": "as the test says"}, status=status)


async def test_one_404_takes_nothing_away(world: FakeWorld, api: Noting) -> None:
    await world.put(f"{CACHES}/a", {})
    watch = a_watch(api, CACHES, none_on=(404,))
    async with running(watch.run()):
        await watch.listed.wait()
        watch._failed(ApiError(404, "404 page not found"))
        assert watch.objects.keys() == {"a"}
        assert not watch.current
