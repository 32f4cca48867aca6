"""KServe's configuration, heard of by watches: absent, forbidden, changed."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agent.kserve import KServe
from agent.kube.client import Api
from agent.kube.credentials import CONFIG_MAP, Kind, Need
from tests.contracts.cluster_contract import SERVING, Noting, eventually, nothing, opened, running
from tests.contracts.test_cluster import FakeWorld
from tests.fakes.cluster import FakeCluster

MAPS = "/api/v1/namespaces/kserve/configmaps"
CONFIG = Need(Kind.CONFIG_MAP, "kserve", CONFIG_MAP)
CONTAINERS = f"{SERVING}/clusterstoragecontainers"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[FakeWorld]:
    async with FakeCluster(tmp_path).serving() as cluster:
        yield FakeWorld(cluster)


@pytest.fixture
async def api(world: FakeWorld) -> AsyncIterator[Noting]:
    async with opened(world) as api:
        yield api


def config(**local_model: Any) -> dict[str, Any]:
    return {"metadata": {"name": CONFIG_MAP}, "data": {"localModel": json.dumps(local_model)}}


@asynccontextmanager
async def heard(api: Api) -> AsyncIterator[KServe]:
    found = KServe(api, namespace="kserve", changed=nothing)
    async with running(*(watch.run() for watch in found.watches)):
        for watch in found.watches:
            await watch.listed.wait()
        yield found


async def test_9_1_10_the_config_map_is_watched_and_not_polled(
    api: Noting, world: FakeWorld
) -> None:
    await world.put(f"{MAPS}/{CONFIG_MAP}", config(jobNamespace="jobs"))
    await world.put(f"{MAPS}/another", {"data": {"localModel": "{}"}})
    async with heard(api) as kserve:
        assert kserve.read(CONFIG) == (True, {"data": config(jobNamespace="jobs")["data"]})
        await world.put(f"{MAPS}/{CONFIG_MAP}", config(jobNamespace="others"))
        await eventually(lambda: "others" in str(kserve.read(CONFIG)))
        await world.delete(f"{MAPS}/{CONFIG_MAP}")
        await eventually(lambda: kserve.read(CONFIG) == (True, None))
    assert sum(method == "GET" for method, *_ in api.asked) == 2  # one list each
    assert all(params["fieldSelector"] == f"metadata.name={CONFIG_MAP}"
               for _, path, params in api.asked if path == MAPS)  # fmt: skip


async def test_9_1_10_without_it_kserves_defaults_hold_and_it_is_said_once(
    api: Noting, world: FakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with heard(api) as kserve:
        assert kserve.read(CONFIG) == (True, None)
        assert kserve.look_seconds is None
        await world.put(f"{CONTAINERS}/b", {"spec": {}})
        await eventually(lambda: kserve.containers["items"])
    assert caplog.text.count("its defaults hold") == 1


@pytest.mark.parametrize("status", [403, 404])
async def test_what_is_not_ours_to_read_is_as_if_it_were_not_there(
    api: Noting, world: FakeWorld, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await world.put(f"{MAPS}/{CONFIG_MAP}", config(jobNamespace="jobs"))

    def refuse(request: web.Request) -> web.Response | None:
        body = {"kind": "Status", "code": status, "message": "no"}
        return web.json_response(body, status=status)

    world.cluster.faults.instead = refuse
    async with heard(api) as kserve:
        assert kserve.read(CONFIG) == (True, None)
        assert kserve.containers == {"items": []}
    assert caplog.text.count("its defaults hold") == 1


async def test_containers_are_in_the_order_of_their_names_and_without_what_others_write(
    api: Noting, world: FakeWorld
) -> None:
    for name in ("b", "a"):
        await world.put(f"{CONTAINERS}/{name}", {"spec": {"n": name}, "status": {"x": 1}})
    async with heard(api) as kserve:
        await world.put(f"{CONTAINERS}/a", {"spec": {"n": "new"}, "disabled": True})
        expected = [
            {"metadata": {"name": "a"}, "spec": {"n": "new"}, "disabled": True},
            {"metadata": {"name": "b"}, "spec": {"n": "b"}, "disabled": None},
        ]
        await eventually(lambda: kserve.containers == {"items": expected})
        assert kserve.read(Need(Kind.STORAGE_CONTAINERS)) == (True, kserve.containers)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [(10, 10.0), (0, None), (-5, None), ("60", None), (True, None), (2**40, None), (None, None)],
)
async def test_9_1_8_how_often_kserve_wants_models_to_be_looked_at(
    api: Noting, world: FakeWorld, written: object, seconds: float | None
) -> None:
    made = config(reconcilationFrequencyInSecs=written, enabled=False, disableVolumeManagement=True)
    await world.put(f"{MAPS}/{CONFIG_MAP}", made)
    async with heard(api) as kserve:
        assert kserve.look_seconds == seconds


async def test_a_config_map_that_nobody_can_read_asks_for_no_period(
    api: Noting, world: FakeWorld
) -> None:
    await world.put(f"{MAPS}/{CONFIG_MAP}", {"data": {"localModel": "{"}})
    async with heard(api) as kserve:
        assert kserve.look_seconds is None


async def test_other_objects_are_not_watched(api: Noting) -> None:
    async with heard(api) as kserve:
        for need in (
            Need(Kind.CONFIG_MAP, "elsewhere", CONFIG_MAP),
            Need(Kind.CONFIG_MAP, "kserve", "another"),
            Need(Kind.SECRET, "kserve", CONFIG_MAP),
        ):
            assert kserve.read(need) == (False, None)
