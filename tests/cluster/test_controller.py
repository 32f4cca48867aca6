"""The controller on a real API server: pods that are created there come out as it wants them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.model import cache_key
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import (
    PODS,
    Controllers,
    bind,
    controllers,
    namespace,
    ready_node,
)
from tests.cluster.identity import SERVING
from tests.cluster.nodes import cache, group
from tests.hook.pods import golden
from tests.machine import until

URI = "hf://meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture
def plane(private_control_plane: Any) -> ControlPlane:
    made: ControlPlane = private_control_plane()
    return made


@pytest.fixture
def replicas(plane: ControlPlane, tmp_path: Path) -> Iterator[Controllers]:
    with controllers(plane, tmp_path / "controllers") as made:
        yield made


def test_a_pod_that_kserve_made_starts_from_the_cache(
    plane: ControlPlane, replicas: Controllers
) -> None:
    plane.apply(group("gpu1", "/models"), cache("llama", URI, ["gpu1"]))
    ready_node(plane, "a", gpu="yes")
    namespace(plane, "team-a", inject="enabled")
    controller = replicas.start()
    replicas.called(controller)
    bind(plane, "team-a", "localmodel-gpu1")
    made = until(lambda: patched(plane), controller.log_text)
    assert made["metadata"]["annotations"]["localmodel-agent.io/keys"] == cache_key(URI)
    assert made["spec"]["volumes"][-1]["persistentVolumeClaim"]["claimName"] == "localmodel-gpu1"
    assert controller.metrics()["localmodel_hook_pods_total Patched"] >= 1


def patched(plane: ControlPlane, query: str = "?dryRun=All", name: str = "p") -> dict[str, Any]:
    """A pod of KServe's as it would be stored, if the hook changed it; {} if not."""
    pod = golden("uncached-hf")
    pod["metadata"] |= {"name": name}
    del pod["metadata"]["generateName"]
    made: dict[str, Any] = plane.request("POST", f"{PODS.format('team-a')}{query}", pod).ok()
    return made if "localmodel-agent.io/injected" in made["metadata"]["annotations"] else {}


def test_a_claim_of_a_group_as_it_was_is_given_to_no_new_pod(
    plane: ControlPlane, replicas: Controllers
) -> None:
    """A pod uses it, so it stays: its volume would hold others on the nodes of the old selector."""
    plane.apply(group("gpu1", "/models"), cache("llama", URI, ["gpu1"]))
    ready_node(plane, "a", gpu="yes")
    namespace(plane, "team-a", inject="enabled")
    controller = replicas.start()
    replicas.called(controller)
    bind(plane, "team-a", "localmodel-gpu1")
    until(lambda: patched(plane), controller.log_text)
    assert patched(plane, query="")
    plane.apply(group("gpu1", "/elsewhere"))
    until(lambda: not patched(plane, name="q"), controller.log_text)
    claim = "/api/v1/namespaces/team-a/persistentvolumeclaims/localmodel-gpu1"
    assert "deletionTimestamp" not in plane.request("GET", claim).ok()["metadata"]


def test_beside_kserve_the_caches_of_namespaces_are_looked_at_and_no_others(
    plane: ControlPlane, replicas: Controllers
) -> None:
    """KServe's own webhook is for cluster caches, and its manifests register none for these."""
    controller = replicas.start()
    replicas.called(controller)
    namespace(plane, "team-a")
    made = cache("lost", URI, ["nowhere"])
    theirs = {**made, "kind": "LocalModelNamespaceCache"}
    path = f"{SERVING}/namespaces/team-a/localmodelnamespacecaches?dryRun=All"

    def refused() -> bool:
        answer = plane.request("POST", path, theirs)
        return answer.status == 403 and "there is no LocalModelNodeGroup" in answer.message

    until(refused, controller.log_text)
    plane.request("POST", f"{SERVING}/localmodelcaches?dryRun=All", made).ok()
