"""What a node's side of a cluster makes of the objects it watches, for who looks at its pods."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.cluster import Cluster
from agent.config import Settings
from agent.kube import podspec
from agent.kube.client import Api, Json
from agent.model import cache_key
from agent.usage import Offer
from agent.words import Word
from tests.cluster.nodes import cache, local_model_node
from tests.contracts.cluster_contract import eventually, running
from tests.fakes.cluster import FakeCluster

SERVING = "/apis/serving.kserve.io/v1alpha1"
PODS = "/api/v1/namespaces/team/pods"
URI = "hf://acme/tiny"
KEY = cache_key(URI)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    async with FakeCluster(tmp_path).serving() as serving:
        yield serving


@pytest.fixture
async def cluster(server: FakeCluster, tmp_path: Path) -> AsyncIterator[Cluster]:
    api = Api({"KUBECONFIG": str(server.kubeconfig)}, user_agent="test")
    await api.open()
    try:
        made = Cluster(api, Settings(root=tmp_path / "cache", node_name="n"))
        async with running(*made.work()):
            await made.listed()
            yield made
    finally:
        await api.close()


def pod(phase: str = "Pending", **annotations: str) -> Json:
    claim = {"name": "cache", "persistentVolumeClaim": {"claimName": "localmodel-gpu"}}
    mount = {"name": "cache", "mountPath": "/mnt/localmodel"}
    server = {"name": "server", "volumeMounts": [mount] if annotations else []}
    return {
        "metadata": {"annotations": annotations},
        "spec": {"nodeName": "n", "containers": [server], "volumes": [claim]},
        "status": {"phase": phase},
    }


async def test_pods_that_name_models_are_those_that_have_not_ended(
    server: FakeCluster, cluster: Cluster
) -> None:
    note: dict[str, Any] = {podspec.KEYS: KEY}
    await server.put(f"{PODS}/waits", pod(**note))
    await server.put(f"{PODS}/runs", pod("Running", **note))
    await server.put(f"{PODS}/ended", pod("Succeeded", **note))
    await server.put(f"{PODS}/other", pod())
    await eventually(lambda: len(cluster.pods()) == 3)
    named = {found.name: (found.started, keys) for found, keys in cluster.naming().values()}
    assert named == {"waits": (False, frozenset({KEY})), "runs": (True, frozenset({KEY}))}
    assert set(cluster.naming()) <= set(cluster.pods()), "both by UID"


async def test_a_node_offers_what_its_entries_have_caches_for(
    server: FakeCluster, cluster: Cluster
) -> None:
    entries = [
        {"modelName": "a", "sourceModelUri": URI},
        {"modelName": "b", "sourceModelUri": "s3://b/m", "namespace": "team"},
        {"modelName": "left", "sourceModelUri": "hf://acme/left"},
    ]
    await server.put(f"{SERVING}/localmodelnodes/n", local_model_node("n", *entries))
    first = await server.put(f"{SERVING}/localmodelcaches/a", cache("a", URI, []))
    await eventually(lambda: len(cluster.offers()) == 1)
    found = cache("b", "s3://b/m", [])
    path = f"{SERVING}/namespaces/team/localmodelnamespacecaches/b"
    second = await server.put(path, {**found, "kind": "LocalModelNamespaceCache"})
    await eventually(lambda: len(cluster.offers()) == 2)
    created = [made["metadata"]["creationTimestamp"] for made in (first, second)]
    assert cluster.offers() == [
        Offer(uri=URI, namespace="", since=created[0]),
        Offer(uri="s3://b/m", namespace="team", since=created[1]),
    ]


async def test_what_a_pod_is_told_stands_beside_it(server: FakeCluster, cluster: Cluster) -> None:
    await server.put(f"{PODS}/waits", pod(**{podspec.KEYS: KEY}))
    await eventually(cluster.pods)
    ((uid, found),) = cluster.pods().items()
    cluster.tell_pod(found, Word(kind="Warning", reason="NotAskedFor", message="nobody does"))
    events = "/api/v1/namespaces/team/events"
    await eventually(lambda: server.get(events)["items"])
    (event,) = server.get(events)["items"]
    about = {"apiVersion": "v1", "kind": "Pod", "name": "waits", "uid": uid, "namespace": "team"}
    assert event["involvedObject"] == about
    assert (event["type"], event["reason"]) == ("Warning", "NotAskedFor")
