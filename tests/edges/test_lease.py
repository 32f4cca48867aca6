"""The Lease while its server misbehaves. What it is when all is well: the cluster contract."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiohttp import web

from agent.errors import Reason
from agent.kube import lease as lease_module
from agent.kube.client import ApiError, Json
from agent.kube.lease import Lease
from tests.contracts.cluster_contract import (
    LEASES,
    NAMESPACE,
    Noting,
    Ticks,
    a_holder,
    a_lease,
    eventually,
    held,
    opened,
    running,
)
from tests.contracts.test_cluster import FakeWorld
from tests.fakes.cluster import FakeCluster


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeWorld]:
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.02)
    monkeypatch.setattr(lease_module, "_RETRY_SECONDS", 0.02)
    async with FakeCluster(tmp_path).serving() as cluster:
        yield FakeWorld(cluster)


@pytest.fixture
async def api(world: FakeWorld) -> AsyncIterator[Noting]:
    async with opened(world) as api:
        yield api


async def test_nothing_is_known_before_the_server_has_answered(
    world: FakeWorld, api: Noting
) -> None:
    world.cluster.faults.refuse = True
    lease = a_holder(world, api, "a/me")
    async with running(lease.run()):
        await eventually(lambda: api.count("GET") >= 3)
        assert not lease.answered.is_set()
        world.cluster.faults.refuse = False
        await eventually(lambda: held(lease))


async def test_who_holds_it_goes_on_while_the_server_is_away(world: FakeWorld, api: Noting) -> None:
    """Nobody else can take it without a server either."""
    lease = a_holder(world, api, "a/me")
    async with running(lease.run()):
        await eventually(lambda: held(lease))
        world.cluster.faults.refuse = True
        asked = len(api.asked)
        await eventually(lambda: len(api.asked) > asked + 3)
        assert held(lease)
        world.cluster.faults.refuse = False
        renewed = api.answered
        await eventually(lambda: api.answered > renewed)
        assert held(lease)


async def test_who_lost_it_meanwhile_learns_it_when_the_server_is_back(
    world: FakeWorld, api: Noting
) -> None:
    lease = a_holder(world, api, "a/me")
    async with running(lease.run()):
        await eventually(lambda: held(lease))
        world.cluster.faults.refuse = True
        await world.put(f"{LEASES}/{world.node}", a_lease(world, "a/other"))
        world.cluster.faults.refuse = False
        await eventually(lambda: not held(lease))
        refusal = lease.obstacle()
        assert refusal is not None
        assert refusal.reason is Reason.OTHER_AGENT


@pytest.mark.parametrize("status", [409, 429, 500, 503])
async def test_an_answer_that_is_no_success_is_asked_again(
    world: FakeWorld, api: Noting, status: int
) -> None:
    world.cluster.faults.answers = [(status, {})] * 3
    lease = a_holder(world, api, "a/me")
    async with running(lease.run()):
        await eventually(lambda: held(lease))
        assert not world.cluster.faults.answers


async def test_one_that_is_deleted_is_made_again(world: FakeWorld, api: Noting) -> None:
    lease = a_holder(world, api, "a/me")
    async with running(lease.run()):
        await eventually(lambda: held(lease))
        await world.delete(f"{LEASES}/{world.node}")
        await eventually(lambda: world.cluster.object(f"{LEASES}/{world.node}") is not None)
        assert held(lease)


async def test_of_two_that_begin_together_one_holds_it(world: FakeWorld, api: Noting) -> None:
    async with opened(world) as other:
        one, two = a_holder(world, api, "a/one"), a_holder(world, other, "a/two")
        async with running(one.run(), two.run()):
            await eventually(lambda: one.answered.is_set() and two.answered.is_set())
            assert held(one) != held(two)


async def test_an_empty_lease_is_free(world: FakeWorld, api: Noting) -> None:
    """Somebody made it by hand: all its fields are optional."""
    body = {"metadata": {"name": world.node, "namespace": NAMESPACE}}
    await world.put(f"{LEASES}/{world.node}", body)
    lease = a_holder(world, api, "a/me")
    async with running(lease.run()):
        await eventually(lambda: held(lease))


async def test_one_without_a_duration_lasts_as_long_as_ours(world: FakeWorld, api: Noting) -> None:
    body = {"metadata": {"name": world.node}, "spec": {"holderIdentity": "a/other"}}
    await world.put(f"{LEASES}/{world.node}", body)
    ticks = Ticks()
    lease = a_holder(world, api, "a/me", ticks=ticks)
    async with running(lease.run()):
        await eventually(lambda: api.count("GET") >= 2)
        assert not held(lease)
        ticks.now += 121
        await eventually(lambda: held(lease))


async def test_a_release_that_fails_is_no_failure(world: FakeWorld, api: Noting) -> None:
    lease: Lease = a_holder(world, api, "a/me")
    await lease.release()  # never held
    assert api.asked == []
    async with running(lease.run()):
        await eventually(lambda: held(lease))
    world.cluster.faults.refuse = True
    await lease.release()
    world.cluster.faults.refuse = False
    found = await world.get(f"{LEASES}/{world.node}")
    assert found["spec"]["holderIdentity"] == "a/me"


async def test_conflicts_without_end_are_no_tight_loop(
    world: FakeWorld, api: Noting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_RETRY_SECONDS", 5.0)
    world.cluster.faults.instead = _refusing(409)
    lease = a_holder(world, api, "a/me")
    async with running(lease.run()):
        await eventually(lambda: api.count("POST") == 2)
        await asyncio.sleep(3 * lease_module._CONFLICT_SECONDS)
        assert api.count("POST") == 2
        assert not lease.answered.is_set()


def _refusing(status: int) -> Callable[[web.Request], web.Response | None]:
    """Refuses every write of a Lease."""

    def answer(request: web.Request) -> web.Response | None:
        return web.json_response({}, status=status) if request.method != "GET" else None

    return answer


def test_no_server_makes_it_wait_until_it_has_ended(world: FakeWorld, api: Noting) -> None:
    lease = a_holder(world, api, "a/me")
    assert lease._delay(ApiError(429, "busy", retry_after=60.0)) == lease_module._LONGEST_SECONDS
    assert lease._delay(ApiError(429, "busy", retry_after=7.0)) == 7.0
    assert lease_module._LONGEST_SECONDS < lease_module.DURATION_SECONDS / 3


META = {"name": "node-1", "resourceVersion": "1"}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"spec": "x", "metadata": {}},
        {"spec": None, "metadata": None},
        {"spec": "x", "metadata": META},
        {"spec": None, "metadata": META},
        {"spec": {"holderIdentity": {"a": 1}, "leaseTransitions": "x"}, "metadata": META},
        {"spec": {"holderIdentity": "a/other", "leaseDurationSeconds": "x"}, "metadata": META},
    ],
    ids=repr,
)
async def test_an_answer_that_does_not_name_us_holds_nothing(
    world: FakeWorld, api: Noting, answer: Json
) -> None:
    world.cluster.faults.instead = lambda request: web.json_response(answer)
    lease = a_holder(world, api, "a/me")
    async with running(lease.run()):
        await eventually(lambda: len(api.asked) > 5)
        assert not held(lease)
        await lease.release()
        world.cluster.faults.instead = lambda request: None
        await eventually(lambda: held(lease))
