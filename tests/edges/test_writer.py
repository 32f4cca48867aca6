"""The status while its server misbehaves. When it is written, and what: the cluster contract."""

import copy
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from agent.errors import RULES, Reason
from agent.kube import parse, writer
from agent.kube.client import ApiError, Json
from tests.cluster.nodes import local_model_node
from tests.contracts.cluster_contract import (
    DOWNLOADED,
    DOWNLOADING,
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


# -- what the server does not keep, or refuses ----------------------------------------------------


CONDITION = {"type": "Ready", "status": "False", "reason": "R", "message": "", "since": "1"}


def _drops(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older kind of ours: without a summary, and without the revisions of models."""
    store = world.cluster.patch

    async def patch(path: str, body: Json) -> Json:
        kept = copy.deepcopy(body)
        kept["status"].pop("summary", None)
        for model in (kept["status"].get("models") or {}).values():
            (model or {}).pop("revision", None)
        return await store(path, kept)

    monkeypatch.setattr(world.cluster, "patch", patch)


async def test_a_field_that_an_older_kind_drops_is_not_offered_for_an_hour(
    world: FakeWorld, api: Noting, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    _drops(world, monkeypatch)
    model = {"state": "Ready", "revision": "1"}
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED}, models={"a": model}, summary={"ready": "1/1"})
        await status.written(1)
        for _ in range(5):
            status.ticks.now += 100
            await status.say()
        assert api.count("PATCH") == 1
        # Another model has none either, and of what is kept everything is said.
        both = {"a": model, "b": {"state": "Failed", "revision": "2"}}
        await status.say(words={"a": DOWNLOADED, "b": ERROR}, models=both)
        await status.written(2)
        assert api.bodies("PATCH")[1]["status"] == {
            "modelStatus": {"b": ERROR},
            "models": {"b": {"state": "Failed"}},
        }
        status.ticks.now += 3600  # the kind may have been brought up to date
        await status.say()
        await status.written(3)
        assert api.bodies("PATCH")[2]["status"]["summary"] == {"ready": "1/1"}
    assert not status.contested


@pytest.mark.parametrize("code", [400, 422])
async def test_a_status_with_a_field_that_is_refused_still_says_what_kserve_reads(
    world: FakeWorld,
    api: Noting,
    status: Status,
    code: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    world.cluster.faults.answers = [(code, {})]
    bad = {"a": {"state": "Fetching", "bytes": 10**20}}
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADING}, models=bad, conditions=[CONDITION], hits=1)
        await eventually(lambda: api.count("PATCH") == 1)
        status.ticks.now += 3
        await eventually(lambda: "for an hour, only" in caplog.text)
        status.writer.changed()
        await status.written(1)
        assert api.bodies("PATCH")[1] == {
            "status": {"modelStatus": {"a": DOWNLOADING}, "conditions": [CONDITION]}
        }
        for _ in range(5):
            status.ticks.now += 100
            await status.say(hits=2)
        assert api.count("PATCH") == 2
        await status.say(words={"a": DOWNLOADED}, models={}, conditions=[CONDITION])
        await status.written(2)
        status.ticks.now += 3600
        await status.say(hits=3)
        await status.written(3)
        assert api.bodies("PATCH")[3]["status"] == {"models": {}, "hits": 3}


@pytest.mark.parametrize("wrong", [{"conditions": None}, {"models": {"a": {"state": "Nonsense"}}}])
async def test_who_undoes_anything_of_ours_is_corrected_ever_more_seldom(
    world: FakeWorld, api: Noting, status: Status, wrong: Json
) -> None:
    async with running(status.writer.run()):
        models = {"a": {"state": "Ready"}}
        await status.say(words={"a": DOWNLOADED}, models=models, conditions=[CONDITION])
        await status.written(1)
        for _ in range(100):
            status.ticks.now += 2.1
            status.saw(await world.patch(status.path, {"status": wrong}))
            await settled()
            await eventually(lambda: api.answered == api.count("PATCH"))
            await settled()
        assert status.contested == [True]
        assert api.count("PATCH") < 10


async def test_what_is_not_ours_to_write_is_no_contest(
    world: FakeWorld, api: Noting, status: Status
) -> None:
    """Beside KServe's agent only the conditions are ours."""
    async with running(status.writer.run()):
        await status.say(conditions=[CONDITION])
        await status.written(1)
        for number in range(6):
            status.ticks.now += 100
            theirs: Json = {"modelStatus": {"a": (DOWNLOADED, ERROR)[number % 2]}}
            status.saw(await world.patch(status.path, {"status": theirs}))
            await settled()
        assert api.count("PATCH") == 1
    assert not status.contested


async def test_a_server_that_changes_our_words_is_written_to_ever_more_seldom(
    world: FakeWorld, api: Noting, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A webhook, say. What KServe reads is never given up."""
    store = world.cluster.patch

    async def patch(path: str, body: Json) -> Json:
        return await store(path, {"status": {"modelStatus": {"a": ERROR}}})

    monkeypatch.setattr(world.cluster, "patch", patch)
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED})
        for _ in range(100):
            status.ticks.now += 2.1
            await status.say()
            await eventually(lambda: api.answered == api.count("PATCH"))
            await settled()
        assert 3 < api.count("PATCH") < 10
    assert status.contested == [True]


# -- what is not on offer any more ----------------------------------------------------------------


async def test_a_model_that_is_not_on_offer_any_more_is_said_at_once(
    world: FakeWorld, api: Noting, status: Status
) -> None:
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED, "b": DOWNLOADING})
        await status.written(1)
        await status.say(words={"a": DOWNLOADED, "b": ERROR})
        assert api.count("PATCH") == 1, "this one can wait two seconds"
        await status.say(words={"a": DOWNLOADING, "b": ERROR})
        await status.written(2)
        words = {"a": DOWNLOADING, "b": ERROR}
        assert api.bodies("PATCH")[1]["status"]["modelStatus"] == words


async def test_also_where_somebody_else_writes_the_status_too(
    world: FakeWorld, api: Noting, status: Status
) -> None:
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED})
        for number in range(1, 8):
            await status.written(number)
            status.ticks.now += 130
            status.saw(await world.patch(status.path, {"status": {"modelStatus": {"a": ERROR}}}))
        await status.written(8)
        await status.say(words={"a": DOWNLOADING})
        await status.written(9)
        # It says of itself what is not true: that is a contest, and corrected as one.
        lie = await world.patch(status.path, {"status": {"modelStatus": {"a": DOWNLOADED}}})
        status.saw(lie)
        await status.say()
        assert api.count("PATCH") == 9
        status.ticks.now += 130
        await status.say()
        await status.written(10)


# -- answers that are none ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"metadata": None},
        {"metadata": {"name": "n", "resourceVersion": "1"}, "spec": "x"},
        {"metadata": {"name": "n", "resourceVersion": "1"}, "spec": {"localModels": "abc"}},
        {"metadata": {"name": "n", "resourceVersion": "1"}, "status": [1]},
    ],
    ids=repr,
)
async def test_an_answer_that_is_no_node_is_a_failure(
    world: FakeWorld, api: Noting, status: Status, answer: Json
) -> None:
    def gateway(request: web.Request) -> web.Response | None:
        return web.json_response(answer) if request.method == "PATCH" else None

    world.cluster.faults.instead = gateway
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED})
        await eventually(lambda: api.count("PATCH") == 1)
        world.cluster.faults.instead = lambda request: None

        def true_at_last() -> bool:
            status.ticks.now += 3
            status.writer.changed()
            return _words(world) == {"a": DOWNLOADED}

        await eventually(true_at_last)


async def test_a_404_for_the_old_object_does_not_forget_the_new_one(
    world: FakeWorld, api: Noting, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch may tell of the new one while the answer about the old one is on its way."""
    await world.delete(f"{NODES}/{world.node}")
    found = await world.put(f"{NODES}/{world.node}", local_model_node(world.node))
    answered, patch = False, api.patch

    async def late(path: str, body: Json) -> Json:
        nonlocal answered
        if not answered:
            answered = True
            status.writer.seen(parse.node(found))
            raise ApiError(404, "localmodelnodes not found")
        return await patch(path, body)

    monkeypatch.setattr(api, "patch", late)
    async with running(status.writer.run()):
        await status.say(words={"a": DOWNLOADED})
        status.ticks.now += 100
        await status.written(1)
    assert parse.node(await world.get(f"{NODES}/{world.node}")).status == status.says
