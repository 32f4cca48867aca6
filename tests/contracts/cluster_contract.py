"""What every API server keeps, the fake one included, as far as `agent.kube` asks.

Run on the fake by tests/contracts/test_cluster.py, on a real one by tests/cluster/test_contract.py.
A `World` is one API server with the means of another client to change what is on it. Times are
injected; nothing here waits for a clock but for what the server itself measures.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agent.errors import Reason
from agent.kube import client as client_module
from agent.kube import lease as lease_module
from agent.kube import parse, podspec
from agent.kube import watch as watch_module
from agent.kube.client import Api, ApiError, Json
from agent.kube.events import Recorder, Subject
from agent.kube.lease import Lease
from agent.kube.parse import NodeObject
from agent.kube.watch import Watch
from agent.kube.writer import StatusWriter
from tests.cluster.nodes import cache, local_model_node, pod
from tests.machine import DEADLINE

SERVING = "/apis/serving.kserve.io/v1alpha1"
NODES = f"{SERVING}/localmodelnodes"
CACHES = f"{SERVING}/localmodelcaches"
NAMESPACE = "localmodel-system"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
MAPS = "/api/v1/namespaces/default/configmaps"
URI = "hf://acme/tiny"
DOWNLOADED, DOWNLOADING, ERROR = "ModelDownloaded", "ModelDownloading", "ModelDownloadError"


class World(ABC):
    """One API server. `node` is a name that nobody else uses; it begins the names of all else."""

    node: str
    kubeconfig: Path
    """Ours: of one who may do what the agent may."""

    @abstractmethod
    async def get(self, path: str) -> Json: ...

    @abstractmethod
    async def put(self, path: str, body: Mapping[str, Any]) -> Json:
        """Create or replace, as another client."""

    @abstractmethod
    async def patch(self, path: str, body: Json) -> Json: ...

    @abstractmethod
    async def delete(self, path: str) -> None: ...

    @abstractmethod
    def revoke(self) -> None:
        """Our token is refused from now on."""

    @abstractmethod
    def rotate(self) -> None:
        """Put another token into our file."""


class OtherWorld(World):
    """An API server with KServe's own kinds, where we may do all: it can be made to forget."""

    @abstractmethod
    async def forget(self) -> None:
        """What happened until now cannot be watched any more."""

    def revoke(self) -> None:
        raise NotImplementedError

    def rotate(self) -> None:
        raise NotImplementedError


class Noting(Api):
    """The real client; it notes what is asked: list and get are `GET`."""

    def __init__(self, world: World) -> None:
        environment = {"KUBECONFIG": str(world.kubeconfig)}
        super().__init__(environment, user_agent="localmodel-agent/contract")
        self.asked: list[tuple[str, str, Json]] = []
        self.answered = 0

    def count(self, method: str) -> int:
        return sum(asked[0] == method for asked in self.asked)

    def bodies(self, method: str) -> list[Json]:
        return [body for asked, _, body in self.asked if asked == method]

    async def get(self, path: str) -> Json:
        self.asked.append(("GET", path, {}))
        return await super().get(path)

    async def list(
        self, path: str, params: Mapping[str, str] | None = None, *, metadata: str = ""
    ) -> Json:
        self.asked.append(("GET", path, dict(params or {})))
        return await super().list(path, params, metadata=metadata)

    async def create(self, path: str, body: Json) -> Json:
        return await self._note("POST", path, body, super().create(path, body))

    async def replace(self, path: str, body: Json) -> Json:
        return await self._note("PUT", path, body, super().replace(path, body))

    async def patch(self, path: str, body: Json) -> Json:
        return await self._note("PATCH", path, body, super().patch(path, body))

    async def watch(
        self, path: str, params: Mapping[str, str], *, metadata: str = ""
    ) -> AsyncGenerator[Json, None]:
        self.asked.append(("WATCH", path, dict(params)))
        async for event in super().watch(path, params, metadata=metadata):
            yield event

    async def _note(self, method: str, path: str, body: Json, work: Any) -> Json:
        self.asked.append((method, path, body))
        answer: Json = await work
        self.answered += 1
        return answer


class Ticks:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """These go on meanwhile; one that ends by itself has failed."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        yield
        assert not [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def eventually(condition: Callable[[], object], what: str = "") -> None:
    end = asyncio.get_running_loop().time() + DEADLINE
    while not condition():
        assert asyncio.get_running_loop().time() < end, what or condition
        await asyncio.sleep(0.01)


async def settled() -> None:
    """Everything that needs no server and no clock has been done."""
    for _ in range(20):
        await asyncio.sleep(0)


def entries(*models: str) -> list[dict[str, str]]:
    return [{"modelName": model, "sourceModelUri": URI} for model in models]


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of the client alone are short."""
    monkeypatch.setattr(watch_module, "_FIRST_SECONDS", 0.02)
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease_module, "_RETRY_SECONDS", 0.05)


@pytest.mark.usefixtures("hurry")
class ClusterContract:
    """Subclasses give the fixtures `world` and `other_world`."""

    @pytest.fixture
    async def api(self, world: World) -> AsyncIterator[Noting]:
        async with opened(world) as api:
            yield api

    @pytest.fixture
    async def other_api(self, other_world: OtherWorld) -> AsyncIterator[Noting]:
        async with opened(other_world) as api:
            yield api

    # -- lists and watches ----------------------------------------------------------------------

    async def test_what_is_there_and_what_changes_is_seen(self, world: World, api: Noting) -> None:
        path = f"{NODES}/{world.node}"
        await world.put(path, local_model_node(world.node, *entries("a")))
        changes: list[set[str]] = []
        watch = own_node(api, world, lambda: changes.append(set(watch.objects)))
        assert not watch.listed.is_set()
        assert not watch.current
        async with running(watch.run()):
            await watch.listed.wait()
            assert watch.current
            assert names_of(watch) == ["a"]
            await world.put(path, local_model_node(world.node, *entries("a", "b")))
            await eventually(lambda: names_of(watch) == ["a", "b"])
            await world.delete(path)
            await eventually(lambda: not watch.objects)
            # Another node's is none of ours, before and after what happens next.
            other = f"{world.node}-other"
            await world.put(f"{NODES}/{other}", local_model_node(other, *entries("x")))
            await world.put(path, local_model_node(world.node, *entries("c")))
            await eventually(lambda: names_of(watch) == ["c"])
        assert {name for seen in changes for name in seen} == {world.node}
        assert api.count("GET") == 1

    async def test_nothing_there_is_a_list_too(self, world: World, api: Noting) -> None:
        watch = own_node(api, world)
        async with running(watch.run()):
            await watch.listed.wait()
            assert not watch.objects
            await world.put(f"{NODES}/{world.node}", local_model_node(world.node))
            await eventually(lambda: world.node in watch.objects)

    async def test_the_pods_of_one_node(self, world: World, api: Noting) -> None:
        selected = {"fieldSelector": f"spec.nodeName={world.node}"}
        watch = Watch(api, "/api/v1/pods", parse=podspec.pod, changed=nothing, params=selected)
        await world.put(pod_path(world, "mine"), a_pod(world, "mine"))
        async with running(watch.run()):
            await watch.listed.wait()
            assert pods_of(world, watch) == ["mine"]
            await world.put(pod_path(world, "far"), a_pod(world, "far", node="elsewhere"))
            await world.put(pod_path(world, "also"), a_pod(world, "also"))
            await eventually(lambda: pods_of(world, watch) == ["also", "mine"])
            await world.delete(pod_path(world, "mine"))
            await eventually(lambda: pods_of(world, watch) == ["also"])
        found = watch.objects[f"default/{world.node}-also"]
        assert (found.namespace, found.finished) == ("default", False)

    async def test_metadata_only_holds_no_spec(self, world: World, api: Noting) -> None:
        first, second = (f"{world.node}-{name}" for name in ("first", "second"))
        await world.put(f"{CACHES}/{first}", cache(first, URI, ["gpu"], priority="1"))
        watch: Watch[Json] = Watch(api, CACHES, parse=dict, changed=nothing, metadata_only=True)
        async with running(watch.run()):
            await watch.listed.wait()
            assert first in watch.objects
            await world.put(f"{CACHES}/{second}", cache(second, URI, ["gpu"], priority="2"))
            await eventually(lambda: second in watch.objects)
        for name, priority in ((first, "1"), (second, "2")):
            assert "spec" not in watch.objects[name]
            found = parse.cache_meta(watch.objects[name], "LocalModelCache")
            assert found.annotations == {"localmodel-agent.io/priority": priority}
            assert found.uid
            assert found.created

    async def test_a_long_list_comes_page_by_page(
        self, world: World, api: Noting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client_module, "_PAGE", 2)
        names = {f"{world.node}-{number}" for number in range(5)}
        for name in names:
            await world.put(f"{CACHES}/{name}", cache(name, URI, ["gpu"]))
        watch: Watch[Json] = Watch(api, CACHES, parse=dict, changed=nothing, metadata_only=True)
        async with running(watch.run()):
            await watch.listed.wait()
            assert names <= watch.objects.keys()
        assert api.count("GET") >= 3

    async def test_a_watch_that_the_server_ends_goes_on_where_it_was(
        self, world: World, api: Noting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watch_module, "_WATCH_SECONDS", (1, 1))
        watch = own_node(api, world)
        path = f"{NODES}/{world.node}"
        async with running(watch.run()):
            for number in range(3):
                # One that comes while a watch is on and those that come between two.
                await world.put(path, local_model_node(world.node, *entries(f"m{number}")))
                await eventually(lambda: names_of(watch) == [f"m{number}"])  # noqa: B023
                seen = api.count("WATCH")
                await eventually(lambda: api.count("WATCH") > seen)  # noqa: B023
        assert api.count("GET") == 1

    async def test_what_the_server_has_forgotten_is_listed_again(
        self, other_world: OtherWorld, other_api: Noting
    ) -> None:
        watch: Watch[Json] = Watch(
            other_api, MAPS, parse=lambda raw: raw.get("data") or {}, changed=nothing
        )
        gone, kept, new = (f"{other_world.node}-{name}" for name in ("gone", "kept", "new"))
        for name in (gone, kept):
            await other_world.put(f"{MAPS}/{name}", a_map(name, "1"))
        async with running(watch.run()):
            await watch.listed.wait()
            assert {f"default/{gone}", f"default/{kept}"} <= watch.objects.keys()
        assert other_api.count("GET") == 1
        await other_world.delete(f"{MAPS}/{gone}")
        await other_world.put(f"{MAPS}/{kept}", a_map(kept, "2"))
        await other_world.put(f"{MAPS}/{new}", a_map(new, "1"))
        await other_world.forget()
        async with running(watch.run()):
            await eventually(lambda: f"default/{new}" in watch.objects)
            assert f"default/{gone}" not in watch.objects
            assert watch.objects[f"default/{kept}"] == {"is": "2"}
            assert watch.listed.is_set()
            assert watch.current
        assert other_api.count("GET") == 2

    async def test_a_kind_that_does_not_exist(
        self, other_world: OtherWorld, other_api: Noting
    ) -> None:
        path = f"{SERVING}/nosuchthings"
        absent: Watch[Json] = Watch(other_api, path, parse=dict, changed=nothing, none_on=(404,))
        needed: Watch[Json] = Watch(other_api, path, parse=dict, changed=nothing)
        async with running(absent.run(), needed.run()):
            await absent.listed.wait()
            assert absent.objects == {}
            await eventually(lambda: other_api.count("GET") >= 4)  # the other one asks again
            assert not needed.listed.is_set()
            assert not needed.current

    async def test_one_object_that_cannot_be_understood_stops_no_other(
        self, world: World, api: Noting
    ) -> None:
        names = [f"{world.node}-{number}" for number in range(3)]

        def picky(raw: Json) -> str:
            if raw["metadata"]["labels"]["good"] != "yes":
                raise ValueError("bad")
            return "good"

        def labelled(name: str, good: str) -> Json:
            body = cache(name, URI, ["gpu"])
            body["metadata"]["labels"] = {"good": good}
            return body

        for name, good in zip(names, ("yes", "no", "yes"), strict=True):
            await world.put(f"{CACHES}/{name}", labelled(name, good))
        watch = Watch(api, CACHES, parse=picky, changed=nothing, metadata_only=True)
        mine = set(names)
        async with running(watch.run()):
            await watch.listed.wait()
            assert watch.objects.keys() & mine == {names[0], names[2]}
            assert watch.unreadable & mine == {names[1]}
            for name, good in zip(names, ("no", "yes", "yes"), strict=True):
                await world.put(f"{CACHES}/{name}", labelled(name, good))
            await eventually(lambda: watch.unreadable & mine == {names[0]})
            await eventually(lambda: watch.objects.keys() & mine == set(names[1:]))
            await world.delete(f"{CACHES}/{names[0]}")
            await eventually(lambda: not watch.unreadable & mine)

    # -- writes ---------------------------------------------------------------------------------

    async def test_a_null_removes_exactly_its_key(self, world: World, api: Noting) -> None:
        path = await a_node(world)
        words = {"a": DOWNLOADED, "b": DOWNLOADING, "c": ERROR}
        before = await api.patch(path, {"status": {"modelStatus": words}})
        assert before["status"]["modelStatus"] == words
        after = await api.patch(path, {"status": {"modelStatus": {"b": None, "none": None}}})
        assert after["status"]["modelStatus"] == {"a": DOWNLOADED, "c": ERROR}
        assert after["spec"] == before["spec"]
        await api.patch(path, {"spec": {"localModels": []}})  # the status, and nothing else
        assert (await world.get(f"{NODES}/{world.node}"))["spec"] == before["spec"]

    async def test_a_patch_that_changes_nothing_is_no_version(
        self, world: World, api: Noting
    ) -> None:
        path = await a_node(world)
        patch: Json = {"status": {"modelStatus": {"a": DOWNLOADED}}}
        versions = [(await api.patch(path, patch))["metadata"]["resourceVersion"] for _ in "123"]
        assert len(set(versions)) == 1
        assert parse.node(await world.get(f"{NODES}/{world.node}")).version == versions[0]

    async def test_who_comes_second_is_refused(self, world: World, api: Noting) -> None:
        body = a_lease(world, "one")
        first = await api.create(LEASES, body)
        with pytest.raises(ApiError) as caught:
            await api.create(LEASES, body)
        assert caught.value.status == 409
        first["spec"]["holderIdentity"] = "two"
        await api.replace(f"{LEASES}/{world.node}", first)
        first["spec"]["holderIdentity"] = "three"
        with pytest.raises(ApiError) as caught:
            await api.replace(f"{LEASES}/{world.node}", first)
        assert caught.value.status == 409
        found = await api.get(f"{LEASES}/{world.node}")
        assert found["spec"]["holderIdentity"] == "two"

    async def test_what_is_not_there_is_not_found(self, world: World, api: Noting) -> None:
        with pytest.raises(ApiError) as caught:
            await api.get(f"{LEASES}/{world.node}")
        assert caught.value.status == 404
        assert caught.value.reason is Reason.API_SERVER
        assert f"{LEASES}/{world.node}" in caught.value.message

    async def test_a_token_that_is_refused_is_read_again(self, world: World, api: Noting) -> None:
        path = await a_node(world)
        await api.patch(path, {"status": {"modelStatus": {"a": DOWNLOADING}}})
        world.revoke()
        with pytest.raises(ApiError) as caught:
            await api.patch(path, {"status": {"modelStatus": {"a": ERROR}}})
        assert caught.value.status == 401
        assert caught.value.reason is Reason.FORBIDDEN
        world.rotate()
        found = await api.patch(path, {"status": {"modelStatus": {"a": DOWNLOADED}}})
        assert found["status"]["modelStatus"] == {"a": DOWNLOADED}
        watch = own_node(api, world)
        async with running(watch.run()):
            await watch.listed.wait()

    # -- the Lease ------------------------------------------------------------------------------

    async def test_a_lease_is_taken_and_renewed(self, world: World, api: Noting) -> None:
        lease = a_holder(world, api, "a/one")
        assert not held(lease)
        async with running(lease.run()):
            await eventually(lambda: held(lease))
            await eventually(lambda: api.count("PUT") >= 2)
        spec = (await api.get(f"{LEASES}/{world.node}"))["spec"]
        assert (spec["holderIdentity"], spec["leaseDurationSeconds"]) == ("a/one", 120)
        assert spec["renewTime"] > spec["acquireTime"]
        assert spec["leaseTransitions"] == 0

    async def test_a_lease_is_refused_while_its_holder_renews(
        self, world: World, api: Noting
    ) -> None:
        ticks = Ticks()
        async with opened(world) as other_api:
            one = a_holder(world, api, "a/one")
            two = a_holder(world, other_api, "a/two", ticks=ticks)
            async with running(one.run()):
                await eventually(lambda: held(one))
                async with running(two.run()):
                    for _ in range(4):  # in sum far more than it lasts
                        renewed = api.answered
                        await eventually(lambda: api.answered > renewed + 1)  # noqa: B023
                        looked = other_api.count("GET")
                        await eventually(lambda: other_api.count("GET") > looked + 1)  # noqa: B023
                        ticks.now += 100
                        assert held(one)
            refusal = two.obstacle()
            assert refusal is not None
            assert refusal.reason is Reason.OTHER_AGENT
            assert "a/one" in refusal.message
            assert other_api.count("PUT") == 0

    async def test_a_lease_is_taken_when_it_has_ended_by_our_own_clock(
        self, world: World, api: Noting
    ) -> None:
        """Whatever its holder's clock said."""
        ticks = Ticks()
        await world.put(f"{LEASES}/{world.node}", a_lease(world, "a/dead"))
        lease = a_holder(world, api, "a/me", ticks=ticks)
        async with running(lease.run()):
            await eventually(lambda: api.count("GET") >= 2)
            ticks.now += 120
            looked = api.count("GET")
            await eventually(lambda: api.count("GET") > looked + 1)
            assert api.count("PUT") == 0
            ticks.now += 1
            await eventually(lambda: held(lease))
        spec = (await api.get(f"{LEASES}/{world.node}"))["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("a/me", 8)

    async def test_a_lease_is_taken_at_once_when_its_holder_is_gone(
        self, world: World, api: Noting
    ) -> None:
        await world.put(f"{LEASES}/{world.node}", a_lease(world, "a/dead"))
        gone: set[str] = set()
        lease = a_holder(world, api, "a/me", gone=gone.__contains__)
        async with running(lease.run()):
            await eventually(lambda: api.count("GET") >= 2)
            assert lease.obstacle() is not None
            gone.add("a/dead")
            await eventually(lambda: held(lease))

    async def test_a_lease_that_is_lost_is_not_held(self, world: World, api: Noting) -> None:
        """Somebody with the right to do so gave it to another: no two manage one node."""
        lease = a_holder(world, api, "a/me")
        async with running(lease.run()):
            await eventually(lambda: held(lease))
            await world.put(f"{LEASES}/{world.node}", a_lease(world, "a/other"))
            await eventually(lambda: lease.obstacle() is not None)
        assert (await api.get(f"{LEASES}/{world.node}"))["spec"]["holderIdentity"] == "a/other"

    async def test_a_lease_is_released_at_the_end(self, world: World, api: Noting) -> None:
        one, two = a_holder(world, api, "a/one"), a_holder(world, api, "a/two")
        async with running(one.run()):
            await eventually(lambda: held(one))
        await two.release()  # not its own to give up
        assert (await api.get(f"{LEASES}/{world.node}"))["spec"]["holderIdentity"] == "a/one"
        await one.release()
        assert not (await api.get(f"{LEASES}/{world.node}"))["spec"].get("holderIdentity")
        async with running(two.run()):
            await eventually(lambda: held(two))
            await one.release()  # too late: it is another's
        assert (await api.get(f"{LEASES}/{world.node}"))["spec"]["holderIdentity"] == "a/two"

    # -- Events ---------------------------------------------------------------------------------

    async def test_events_stand_beside_their_object(self, world: World, api: Noting) -> None:
        recorder = Recorder(api, node=world.node)
        on_node = Subject("LocalModelNode", "", world.node, f"uid-{world.node}")
        on_cache = Subject("LocalModelNamespaceCache", NAMESPACE, f"{world.node}-c", "uid-c")
        on_pod = Subject("Pod", NAMESPACE, f"{world.node}-p", "uid-p", api="v1")
        async with running(recorder.run()):
            recorder.say(on_node, "Warning", "DiskMissing", "it is away")
            recorder.say(on_cache, "Normal", "Ready", "it is here")
            recorder.say(on_pod, "Normal", "ModelReady", "it is here")
            await eventually(lambda: api.answered == 3)
        (event,) = await events_of(world, "default", world.node)
        assert (event["reason"], event["type"], event["count"]) == ("DiskMissing", "Warning", 1)
        assert event["message"] == "it is away"
        assert event["source"] == {"component": "localmodel-agent", "host": world.node}
        (event,) = await events_of(world, NAMESPACE, f"{world.node}-c")
        assert event["involvedObject"]["namespace"] == NAMESPACE
        assert event["involvedObject"]["apiVersion"] == "serving.kserve.io/v1alpha1"
        (event,) = await events_of(world, NAMESPACE, f"{world.node}-p")
        about = event["involvedObject"]
        assert (about["kind"], about["apiVersion"], about["uid"]) == ("Pod", "v1", "uid-p")

    async def test_the_same_event_is_counted_up_once_a_minute(
        self, world: World, api: Noting
    ) -> None:
        clock = Ticks()
        recorder = Recorder(api, node=world.node, clock=clock)
        subject = Subject("LocalModelNode", "", world.node, f"uid-{world.node}")

        async def say(message: str, answers: int) -> None:
            recorder.say(subject, "Warning", "Gated", message)
            await eventually(lambda: api.answered >= answers)
            await settled()

        async with running(recorder.run()):
            for message in ("first", "second", "third"):
                await say(message, 1)
            assert len(api.asked) == 1
            clock.now += 61
            await say("fourth", 2)
            (event,) = await events_of(world, "default", world.node)
            assert (event["count"], event["message"]) == (4, "fourth")
            assert event["lastTimestamp"] > event["firstTimestamp"]
            # The server forgets Events after an hour.
            await world.delete(f"/api/v1/namespaces/default/events/{event['metadata']['name']}")
            clock.now += 61
            await say("fifth", 3)
            (event,) = await events_of(world, "default", world.node)
            assert (event["count"], event["message"]) == (1, "fifth")
            clock.now += 3001
            await say("sixth", 4)
            assert len(await events_of(world, "default", world.node)) == 2

    # -- the status -----------------------------------------------------------------------------

    async def test_the_first_change_goes_out_at_once_and_followers_share_a_write(
        self, world: World, api: Noting
    ) -> None:
        status = await Status.of(world, api)
        async with running(status.writer.run()):
            await status.say(words={"a": DOWNLOADING})
            await status.written(1)
            await status.say(words={"a": DOWNLOADED})
            await status.say(words={"a": DOWNLOADED, "b": DOWNLOADING})
            status.ticks.now += 1.9
            await status.say(words={"a": DOWNLOADED, "b": DOWNLOADED})
            assert api.count("PATCH") == 1
            status.ticks.now += 0.2
            await status.say()
            await status.written(2)
            assert api.bodies("PATCH")[1]["status"]["modelStatus"] == {
                "a": DOWNLOADED,
                "b": DOWNLOADED,
            }
            # Long quiet: again at once.
            status.ticks.now += 1000
            await status.say(words={})
            await status.written(3)
            await status.say()
            assert api.count("PATCH") == 3, "nothing new to say"
        found = (await world.get(f"{NODES}/{world.node}"))["status"]
        assert found.get("modelStatus", {}) == {}

    async def test_how_far_it_is_goes_out_once_a_minute(self, world: World, api: Noting) -> None:
        status = await Status.of(world, api)
        async with running(status.writer.run()):
            await status.say(words={"a": DOWNLOADING}, models={"a": {"state": "Fetching"}})
            await status.written(1)
            for done in range(1, 6):
                status.ticks.now += 11
                await status.say(models={"a": {"state": "Fetching", "downloadedBytes": done}})
            assert api.count("PATCH") == 1
            status.ticks.now += 5
            await status.say()
            await status.written(2)
            assert api.bodies("PATCH")[1] == {"status": {"models": {"a": {"downloadedBytes": 5}}}}
            # What matters takes it along, and does not wait for it.
            status.ticks.now += 3
            done_now = {"a": {"state": "Ready", "downloadedBytes": 9}}
            await status.say(words={"a": DOWNLOADED}, models=done_now)
            await status.written(3)

    async def test_the_last_word_is_said_whatever_the_time(self, world: World, api: Noting) -> None:
        status = await Status.of(world, api)
        async with running(status.writer.run()):
            await status.say(words={"a": DOWNLOADING})
            await status.written(1)
            await status.say(words={"a": DOWNLOADED})
        await status.writer.flush()
        await status.writer.flush()
        assert api.count("PATCH") == 2
        found = parse.node(await world.get(f"{NODES}/{world.node}"))
        assert found.status["modelStatus"] == {"a": DOWNLOADED}

    async def test_nothing_is_written_of_what_is_not_ours_to_write(
        self, world: World, api: Noting
    ) -> None:
        status = await Status.of(world, api)
        async with running(status.writer.run()):
            await status.say(nothing=True)
            status.writer.seen(None)
            await status.say(words={"a": DOWNLOADED})
            assert api.count("PATCH") == 0

    async def test_a_status_that_cannot_be_written_is_written_later(
        self, world: World, api: Noting
    ) -> None:
        status = await Status.of(world, api)
        await world.delete(f"{NODES}/{world.node}")
        async with running(status.writer.run()):
            await status.say(words={"a": DOWNLOADED})
            await eventually(lambda: api.count("PATCH") == 1)
            found = await world.put(f"{NODES}/{world.node}", local_model_node(world.node))
            status.ticks.now += 100
            status.writer.seen(parse.node(found))
            await status.written(1)
        assert parse.node(await world.get(f"{NODES}/{world.node}")).status == status.says

    async def test_who_writes_it_too_is_corrected_ever_more_seldom_and_reported(
        self, world: World, api: Noting
    ) -> None:
        status = await Status.of(world, api)

        async def somebody_writes(word: str) -> None:
            wrong: Json = {"status": {"modelStatus": {"a": word, "zombie": DOWNLOADED}}}
            found = await world.patch(status.path, wrong)
            status.writer.seen(parse.node(found))
            await settled()

        async with running(status.writer.run()):
            await status.say(words={"a": DOWNLOADED})
            await status.written(1)
            for number in (2, 3):
                status.ticks.now += 60
                await somebody_writes(ERROR)
                await status.written(number)
            assert api.bodies("PATCH")[-1]["status"] == {
                "modelStatus": {"a": DOWNLOADED, "zombie": None}
            }
            assert not status.contested
            status.ticks.now += 10
            await somebody_writes(ERROR)
            assert status.contested == [True]
            assert api.count("PATCH") == 3, "at the third time it waits sixteen seconds"
            status.ticks.now += 7
            await status.say()
            await status.written(4)
        found = parse.node(await world.get(f"{NODES}/{world.node}"))
        assert found.status["modelStatus"] == {"a": DOWNLOADED}

    async def test_our_own_writes_are_no_contest(self, world: World, api: Noting) -> None:
        """Also where the watch shows them late, or before the answer."""
        status = await Status.of(world, api)
        watch: Watch[NodeObject] = own_node(
            api, world, lambda: status.writer.seen(watch.objects.get(world.node))
        )
        async with running(watch.run(), status.writer.run()):
            await watch.listed.wait()
            for number in range(6):
                status.ticks.now += 100
                await status.say(words={"a": (DOWNLOADED, ERROR)[number % 2]})
                await status.written(number + 1)
            version = parse.node(await world.get(f"{NODES}/{world.node}")).version
            await eventually(lambda: watch.objects[world.node].version == version)
        assert not status.contested

    async def test_what_the_servers_kind_drops_is_not_offered_again(
        self, other_world: OtherWorld, other_api: Noting
    ) -> None:
        status = await Status.of(other_world, other_api)
        condition = {"type": "Ready", "status": "True", "reason": "R", "message": ""}
        condition["lastTransitionTime"] = "2026-01-01T00:00:00Z"
        async with running(status.writer.run()):
            await status.say(words={"a": DOWNLOADING}, conditions=[condition], hits=1)
            await status.written(1)
            for hits in (2, 3):
                status.ticks.now += 100
                await status.say(hits=hits)
            assert other_api.count("PATCH") == 1
            await status.say(words={"a": DOWNLOADED})
            await status.written(2)
        assert other_api.bodies("PATCH")[1] == {"status": {"modelStatus": {"a": DOWNLOADED}}}
        found = parse.node(await other_world.get(f"{NODES}/{other_world.node}"))
        assert found.status == {"modelStatus": {"a": DOWNLOADED}}


class Status:
    """A StatusWriter with its levers."""

    def __init__(self, world: World, api: Noting, node: NodeObject) -> None:
        self.ticks = Ticks()
        self.contested: list[bool] = []
        self.says: dict[str, Any] = {}
        self.path = f"{NODES}/{world.node}/status"
        self._api = api
        self._nothing = False
        self.writer = StatusWriter(
            api,
            world.node,
            compose=lambda node: None if self._nothing else dict(self.says),
            contested=lambda: self.contested.append(True),
            ticks=self.ticks,
        )
        self.writer.seen(node)

    def saw(self, found: Json) -> None:
        """What the watch would show."""
        self.writer.seen(parse.node(found))

    @classmethod
    async def of(cls, world: World, api: Noting) -> Status:
        found = await world.put(f"{NODES}/{world.node}", local_model_node(world.node))
        return cls(world, api, parse.node(found))

    async def say(
        self, *, words: dict[str, str] | None = None, nothing: bool = False, **fields: Any
    ) -> None:
        """Something more is to be said; until the writer has decided what to do about it."""
        self.says |= fields if words is None else {**fields, "modelStatus": words}
        self._nothing = nothing
        self.writer.changed()
        await settled()

    async def written(self, times: int) -> None:
        await eventually(lambda: self._api.answered == times, f"{self._api.asked}")
        await settled()
        assert self._api.count("PATCH") >= times


@asynccontextmanager
async def opened(world: World) -> AsyncIterator[Noting]:
    api = Noting(world)
    await api.open()
    try:
        yield api
    finally:
        await api.close()


def held(lease: Lease) -> bool:
    return lease.answered.is_set() and lease.obstacle() is None


def nothing() -> None:
    """For a watch whose changes a test looks at itself."""


def own_node(api: Api, world: World, changed: Callable[[], None] = nothing) -> Watch[NodeObject]:
    selected = {"fieldSelector": f"metadata.name={world.node}"}
    return Watch(api, NODES, parse=parse.node, changed=changed, params=selected)


def names_of(watch: Watch[NodeObject]) -> list[str]:
    return [entry.name for node in watch.objects.values() for entry in node.entries]


async def a_node(world: World) -> str:
    """An empty LocalModelNode; the path of its status."""
    await world.put(f"{NODES}/{world.node}", local_model_node(world.node, *entries("a")))
    return f"{NODES}/{world.node}/status"


def pod_path(world: World, name: str) -> str:
    return f"/api/v1/namespaces/default/pods/{world.node}-{name}"


def a_pod(world: World, name: str, *, node: str | None = None) -> Json:
    return pod(f"{world.node}-{name}", node or world.node, uri=URI, labels=None, owner="ReplicaSet")


def pods_of(world: World, watch: Watch[podspec.Pod]) -> list[str]:
    """Those that a test made; the agent's own pod may be there too."""
    prefix = f"default/{world.node}-"
    return sorted(name.removeprefix(prefix) for name in watch.objects if name.startswith(prefix))


def a_map(name: str, value: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"is": value},
    }


def a_lease(world: World, holder: str) -> Json:
    """Of a holder whose clock is far from ours."""
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": world.node, "namespace": NAMESPACE},
        "spec": {
            "holderIdentity": holder,
            "leaseDurationSeconds": 120,
            "leaseTransitions": 7,
            "acquireTime": "1999-01-01T00:00:00.000000Z",
            "renewTime": "2099-01-01T00:00:00.000000Z",
        },
    }


def a_holder(
    world: World,
    api: Api,
    holder: str,
    *,
    ticks: Callable[[], float] | None = None,
    gone: Callable[[str], bool] = lambda holder: False,
) -> Lease:
    return Lease(
        api,
        NAMESPACE,
        world.node,
        holder=holder,
        gone=gone,
        changed=nothing,
        ticks=ticks or Ticks(),
    )


async def events_of(world: World, namespace: str, name: str) -> list[Json]:
    listed = await world.get(f"/api/v1/namespaces/{namespace}/events")
    return [event for event in listed["items"] if event["involvedObject"]["name"] == name]
