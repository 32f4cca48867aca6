"""Our CRDs on a real API server, and KServe's own beside them."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.control_plane import Answer, ControlPlane, KubectlError
from tests.cluster.identity import SERVING
from tests.machine import REPOSITORY

NODES = f"{SERVING}/localmodelnodes"
CACHES = f"{SERVING}/localmodelcaches"
GROUPS = f"{SERVING}/localmodelnodegroups"
NOW = "2026-01-01T00:00:00Z"

STATUS: dict[str, Any] = {
    "modelStatus": {"a": "ModelDownloaded", "team/b": "ModelDownloading"},
    "models": {
        "a": {
            "state": "Ready",
            "revision": "4f5c",
            "fingerprint": "sha256:00",
            "bytes": 2**40,
            "downloadedBytes": 2**40,
            "source": "hf://acme/a",
            "startedAt": NOW,
            "readyAt": NOW,
            "lastUsed": NOW,
            "pinned": True,
        },
        "team/b": {
            "state": "Fetching",
            "reason": "RateLimited",
            "message": "slow down",
            "retryAt": NOW,
        },
    },
    "disk": {"capacity": "1.8Ti", "limit": "500Gi", "used": 7, "free": "1.4Ti", "reserved": "2Gi"},
    "hits": 7,
    "misses": 1,
    "agentVersion": "0.1.0",
    "summary": {"ready": "1/2", "downloading": 1, "hitPercent": "87%"},
    "conditions": [
        {"type": name, "status": status, "reason": reason, "message": "", "lastTransitionTime": NOW}
        for name, status, reason in (("Ready", "True", "AsWanted"), ("Degraded", "False", "Well"))
    ],
}


def node(name: str, **more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelNode",
        "metadata": {"name": name},
        "spec": {"localModels": [{"modelName": "a", "sourceModelUri": "hf://acme/a"}]},
        **more,
    }


def cache(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelCache",
        "metadata": {"name": name},
        "spec": {
            "sourceModelUri": "hf://acme/a",
            "modelSize": "1Gi",
            "nodeGroups": ["gpu"],
            **spec,
        },
    }


def create_node(plane: ControlPlane, name: str) -> None:
    plane.request("POST", NODES, node(name)).ok()


def write_status(plane: ControlPlane, name: str, status: dict[str, Any]) -> Answer:
    return plane.request("PATCH", f"{NODES}/{name}/status", {"status": status})


def test_the_examples_are_accepted(control_plane: ControlPlane) -> None:
    examples = REPOSITORY / "crds/examples"
    create = ("create", "--validate=strict", "--dry-run=server", "-f", examples, "-o", "name")
    kinds = {line.partition(".")[0] for line in control_plane.kubectl(*create).splitlines()}
    assert kinds == {
        "localmodelcache",
        "localmodelnamespacecache",
        "localmodelnode",
        "localmodelnodegroup",
    }


@pytest.mark.parametrize(
    ("short", "kind"),
    [
        ("lmc", "localmodelcaches"),
        ("lmnc", "localmodelnamespacecaches"),
        ("lmn", "localmodelnodes"),
        ("lmng", "localmodelnodegroups"),
    ],
)
def test_short_names(control_plane: ControlPlane, short: str, kind: str) -> None:
    assert control_plane.get("--all-namespaces", short)["kind"] == "List"
    named = control_plane.kubectl("api-resources", "--categories=localmodel", "--no-headers")
    assert any(line.split()[:2] == [kind, short] for line in named.splitlines())


def test_get_shows_how_a_node_does(control_plane: ControlPlane, node_name: str) -> None:
    create_node(control_plane, node_name)
    write_status(control_plane, node_name, STATUS).ok()
    header, row = control_plane.kubectl("get", "lmn", node_name).splitlines()
    assert header.split() == [
        "NAME",
        "READY",
        "DOWNLOADING",
        "USED",
        "LIMIT",
        "FREE",
        "HIT%",
        "AGE",
    ]
    assert row.split()[:-1] == [node_name, "1/2", "1", "7", "500Gi", "1.4Ti", "87%"]
    wide = control_plane.kubectl("get", "lmn", node_name, "-o", "wide").splitlines()[1]
    assert wide.split()[-2:] == ["Well", "0.1.0"]


def test_get_shows_a_group_and_its_path(control_plane: ControlPlane) -> None:
    volume = {"persistentVolumeSpec": {"hostPath": {"path": "/mnt/fast"}}}
    spec = {"storageLimit": 10, "persistentVolumeClaimSpec": {}, **volume}
    control_plane.apply(
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "LocalModelNodeGroup",
            "metadata": {"name": "columns"},
            "spec": spec,
            "status": {"used": "1Gi"},
        }
    )
    _, row = control_plane.kubectl("get", "lmng", "columns").splitlines()
    assert row.split()[:4] == ["columns", "10", "1Gi", "/mnt/fast"]


def test_wait_for_the_condition(control_plane: ControlPlane, node_name: str) -> None:
    create_node(control_plane, node_name)
    waited = ("wait", "--for=condition=Ready", f"lmn/{node_name}")
    with pytest.raises(KubectlError, match="timed out"):
        control_plane.kubectl(*waited, "--timeout=1s")
    write_status(control_plane, node_name, STATUS).ok()
    assert "condition met" in control_plane.kubectl(*waited, "--timeout=30s")


def test_the_whole_status_is_kept(control_plane: ControlPlane, node_name: str) -> None:
    create_node(control_plane, node_name)
    answer = write_status(control_plane, node_name, STATUS)
    assert answer.ok()["status"] == STATUS
    assert answer.warnings == ()
    gone = {"modelStatus": {"a": None}, "models": {"a": None}}
    left = write_status(control_plane, node_name, gone).ok()["status"]
    assert list(left["models"]) == list(left["modelStatus"]) == ["team/b"]


def test_a_word_that_kserve_does_not_know_is_refused(
    control_plane: ControlPlane, node_name: str
) -> None:
    create_node(control_plane, node_name)
    answer = write_status(control_plane, node_name, {"modelStatus": {"a": "ModelCurious"}})
    assert answer.status == 422
    assert "modelStatus.a: Unsupported value" in answer.message


def test_the_uri_of_a_cache_never_changes(control_plane: ControlPlane) -> None:
    control_plane.request("POST", CACHES, cache("fixed")).ok()
    change = {"spec": {"sourceModelUri": "hf://acme/b"}}
    answer = control_plane.request("PATCH", f"{CACHES}/fixed", change)
    assert (answer.status, "StorageUri is immutable" in answer.message) == (422, True)
    control_plane.request("PATCH", f"{CACHES}/fixed", {"spec": {"modelSize": 2**30}}).ok()


@pytest.mark.parametrize("spec", [{"modelSize": "large"}, {"nodeGroups": []}, {"storage": 1}])
def test_what_a_cache_may_not_be(control_plane: ControlPlane, spec: dict[str, Any]) -> None:
    assert control_plane.request("POST", CACHES, cache("wrong", **spec)).status == 422


def test_status_and_spec_are_written_apart(control_plane: ControlPlane, node_name: str) -> None:
    made = control_plane.request("POST", NODES, node(node_name, status=STATUS)).ok()
    assert "status" not in made
    change = {"spec": {"localModels": []}, "status": {"hits": 1}}
    by_status = control_plane.request("PATCH", f"{NODES}/{node_name}/status", change).ok()
    assert (by_status["spec"], by_status["status"]) == (made["spec"], {"hits": 1})
    change["status"] = {"hits": 2}
    by_spec = control_plane.request("PATCH", f"{NODES}/{node_name}", change).ok()
    assert (by_spec["spec"], by_spec["status"]) == ({"localModels": []}, {"hits": 1})


def test_the_status_of_a_group_is_written_with_it(control_plane: ControlPlane) -> None:
    path = f"{GROUPS}/written"
    spec = {"storageLimit": "1Gi", "persistentVolumeSpec": {}, "persistentVolumeClaimSpec": {}}
    made = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelNodeGroup",
        "metadata": {"name": "written"},
        "spec": spec,
    }
    control_plane.request("POST", GROUPS, made).ok()
    assert control_plane.request("PATCH", f"{path}/status", {"status": {"used": 1}}).status == 404
    written = control_plane.request("PATCH", path, {"status": {"used": 1}}).ok()
    assert written["status"] == {"used": 1}


def test_kserves_own_crds_prune_what_is_ours(
    private_control_plane: Callable[..., ControlPlane],
) -> None:
    plane = private_control_plane(kserve=True)
    create_node(plane, "a")
    answer = write_status(plane, "a", STATUS)
    assert answer.ok()["status"] == {"modelStatus": STATUS["modelStatus"]}
    assert any("status.models" in warning for warning in answer.warnings)
    with pytest.raises(KubectlError, match="doesn't have a resource type"):
        plane.kubectl("get", "lmn")
