"""Answers of an API server, or of what answers in its place, that are not what was asked for."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agent.kube.client import Api, ApiError
from tests.contracts.cluster_contract import NODES, Noting, opened
from tests.contracts.test_cluster import FakeWorld
from tests.fakes.cluster import FakeCluster

NODE = f"{NODES}/node-1"
META = {"name": "node-1", "resourceVersion": "1"}

Ask = Callable[[Api], Awaitable[Any]]
ONE: dict[str, Ask] = {
    "get": lambda api: api.get(NODE),
    "create": lambda api: api.create(NODES, {}),
    "replace": lambda api: api.replace(NODE, {}),
    "patch": lambda api: api.patch(NODE, {}),
}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[FakeWorld]:
    async with FakeCluster(tmp_path).serving() as cluster:
        yield FakeWorld(cluster)


@pytest.fixture
async def api(world: FakeWorld) -> AsyncIterator[Noting]:
    async with opened(world) as api:
        yield api


def says(world: FakeWorld, text: str, status: int = 200, **headers: str) -> None:
    def answer(request: web.Request) -> web.Response:
        return web.Response(
            text=text, status=status, headers=headers, content_type="application/json"
        )

    world.cluster.faults.instead = answer


NO_OBJECTS = [
    "",
    "null",
    "[]",
    "{}",
    "<html>",
    "[" * 100_000,
    '{"metadata": null}',
    '{"metadata": "x"}',
    '{"metadata": {}}',
    '{"metadata": {"name": "n"}}',
    '{"metadata": {"name": "", "resourceVersion": "1"}}',
    '{"metadata": {"name": "n", "resourceVersion": ""}}',
    '{"metadata": {"name": "n", "resourceVersion": 1}}',
    '{"metadata": {"name": ["n"], "resourceVersion": "1"}}',
    '{"metadata": {"name": "n", "resourceVersion": "1"}, "spec": "x"}',
    '{"metadata": {"name": "n", "resourceVersion": "1"}, "spec": [1]}',
]


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: text[:70])
@pytest.mark.parametrize("ask", ONE.values(), ids=ONE)
async def test_what_is_no_object_is_a_failure(
    world: FakeWorld, api: Noting, ask: Ask, text: str
) -> None:
    says(world, text)
    with pytest.raises(ApiError) as caught:
        await ask(api)
    assert caught.value.status == 0
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("spec", ["", ', "spec": null', ', "spec": {}'])
async def test_an_object_needs_no_spec(world: FakeWorld, api: Noting, spec: str) -> None:
    says(world, '{"metadata": {"name": "n", "resourceVersion": "1"}' + spec + "}")
    for ask in ONE.values():
        assert (await ask(api))["metadata"]["name"] == "n"


@pytest.mark.parametrize(
    "text",
    [
        *NO_OBJECTS,
        '{"items": []}',
        '{"items": [], "metadata": {}}',
        '{"items": [], "metadata": {"resourceVersion": 1}}',
        '{"metadata": {"resourceVersion": "1"}}',
        '{"items": {}, "metadata": {"resourceVersion": "1"}}',
        '{"items": [7], "metadata": {"resourceVersion": "1"}}',
        '{"items": [{}], "metadata": {"resourceVersion": "1"}}',
        '{"items": [{"metadata": {"name": 7}}], "metadata": {"resourceVersion": "1"}}',
    ],
    ids=lambda text: text[:70],
)
async def test_what_is_no_list_is_not_an_empty_one(
    world: FakeWorld, api: Noting, text: str
) -> None:
    says(world, text)
    with pytest.raises(ApiError) as caught:
        await api.list(NODES)
    assert caught.value.status == 0


@pytest.mark.parametrize(
    ("said", "waited"),
    [("7", 7.0), ("0", 0.0), ("99999", 60.0), ("9" * 4000, 60.0), ("-1", None), ("soon", None)],
)
async def test_a_server_may_ask_for_a_minute_and_no_more(
    world: FakeWorld, api: Noting, said: str, waited: float | None
) -> None:
    says(world, "{}", status=429, **{"Retry-After": said})
    with pytest.raises(ApiError) as caught:
        await api.list(NODES)
    assert caught.value.retry_after_seconds == waited


async def test_a_refusal_in_words_that_nobody_can_read(world: FakeWorld, api: Noting) -> None:
    for text in ("[" * 100_000, "", "7", "null"):
        says(world, text, status=500)
        with pytest.raises(ApiError) as caught:
            await api.get(NODE)
        assert caught.value.status == 500
        assert len(caught.value.message) <= 1000
