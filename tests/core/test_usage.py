"""What the pods of a node mean to its cache. Pods are objects as the API server shows them."""

from typing import Any

import pytest

from agent import usage
from agent.errors import Reason
from agent.kube import podspec
from agent.model import CacheKey

KEY = CacheKey("0123456789abcdef")
OTHER = CacheKey("fedcba9876543210")
SEALED = (KEY, OTHER)
SERVED = "/models"
CLAIM = {"persistentVolumeClaim": {"claimName": "tiny-gpu"}}
KSERVE_AGENT = {"control-plane": "kserve-localmodelnode-agent"}
OURS = {"app.kubernetes.io/name": "localmodel-agent"}
JOB = {"model": "tiny", "node": "n"}


def pod(
    *mounts: dict[str, Any],
    volume: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    phase: str = "Running",
    name: str = "p",
    owner: str = "ReplicaSet",
    kind: str = "containers",
) -> podspec.Pod:
    """A pod with one volume, `v`, and a container for each of its mounts."""
    containers = [
        {"name": f"c{number}", "volumeMounts": [{"name": "v", "mountPath": "/mnt", **mount}]}
        for number, mount in enumerate(mounts)
    ]
    return podspec.pod(
        {
            "metadata": {
                "name": name,
                "namespace": "default",
                "uid": f"uid-{name}",
                "labels": labels,
                "annotations": annotations,
                "ownerReferences": [{"kind": owner}],
            },
            "spec": {"volumes": [{"name": "v", **(volume or CLAIM)}], kind: containers},
            "status": {"phase": phase},
        }
    )


def on_host(path: str) -> dict[str, Any]:
    return {"hostPath": {"path": path}}


def keys(found: podspec.Pod) -> frozenset[CacheKey]:
    return usage.keys_of(found, present=SEALED, groups=["gpu"], served=SERVED)


NOTHING: frozenset[CacheKey] = frozenset()
ONE, ALL = frozenset({KEY}), frozenset(SEALED)


@pytest.mark.parametrize(
    ("mount", "used"),
    [
        ({"subPath": f"models/{KEY}"}, ONE),
        ({"subPath": f"models/{KEY}/"}, ONE),  # KServe writes it so
        ({"subPath": f"models/{KEY}/deep/er"}, ONE),
        ({"subPath": f"models//{KEY}/./deep"}, ONE),
        ({"subPathExpr": f"models/{KEY}"}, ONE),
        ({"subPathExpr": f"models/{KEY}/$(REVISION)"}, ONE),
        ({"subPathExpr": "models/$(MODEL)"}, ALL),  # it may be any
        ({"subPathExpr": "models/0123$(REST)"}, ALL),
        ({"subPathExpr": "$(ANY)/x"}, ALL),
        ({"subPathExpr": "logs/$(POD_NAME)"}, NOTHING),
        ({}, ALL),
        ({"subPath": ""}, ALL),
        ({"subPath": "."}, ALL),
        ({"subPath": "models"}, ALL),
        ({"subPath": "models/"}, ALL),
        ({"subPath": "models/not-a-key"}, NOTHING),
        ({"subPath": "logs"}, NOTHING),
        ({"subPath": ".localmodel/manifests"}, NOTHING),
    ],
)
@pytest.mark.parametrize("kind", ["containers", "initContainers", "ephemeralContainers"])
def test_a_mount_of_a_claim(kind: str, mount: dict[str, Any], used: frozenset[CacheKey]) -> None:
    assert keys(pod(mount, kind=kind)) == used


def test_a_whole_claim_of_something_else_uses_nothing() -> None:
    other = {"persistentVolumeClaim": {"claimName": "results"}}
    assert keys(pod({}, volume=other)) == NOTHING
    # But who mounts a key by its name means a model, whatever the claim is called.
    assert keys(pod({"subPath": f"models/{KEY}"}, volume=other)) == ONE


@pytest.mark.parametrize("volume", [{"emptyDir": {}}, {"configMap": {"name": "models"}}, {}])
def test_other_volumes_use_nothing(volume: dict[str, Any]) -> None:
    assert keys(pod({"subPath": f"models/{KEY}"}, volume={"x": {}, **volume})) == NOTHING


@pytest.mark.parametrize(
    ("note", "used"),
    [
        (KEY, ONE),
        (f"{KEY},{OTHER}", ALL),
        (f" {OTHER} , {KEY} ", ALL),
        ("nonsense", ALL),  # nobody knows what was meant
        (f"{KEY},nonsense", ALL),
        ("", ALL),
    ],
)
def test_the_hook_says_which_models_of_a_whole_claim(note: str, used: frozenset[CacheKey]) -> None:
    assert keys(pod({}, annotations={podspec.KEYS: note})) == used


def test_who_mounts_no_claim_uses_no_model_whatever_it_says() -> None:
    forged = pod({}, volume={"x": {}, "emptyDir": {}}, annotations={podspec.KEYS: KEY})
    assert keys(forged) == NOTHING


def test_the_hook_adds_to_what_is_mounted_by_name() -> None:
    both = pod({"subPath": f"models/{KEY}"}, annotations={podspec.KEYS: OTHER})
    assert keys(both) == ALL


@pytest.mark.parametrize(
    ("path", "mount", "used"),
    [
        ("/models", {}, ALL),
        ("/models/", {}, ALL),
        ("//models//", {}, ALL),
        ("/models/models", {}, ALL),
        (f"/models/models/{KEY}", {}, ONE),
        (f"/models/models//{KEY}/deep/", {}, ONE),
        ("/models", {"subPath": f"models/{KEY}"}, ONE),
        ("/models", {"subPathExpr": "models/$(MODEL)"}, ALL),
        ("/", {"subPath": f"models/models/{KEY}"}, ONE),
        ("/models/.localmodel", {}, NOTHING),
        ("/models-of-others", {}, NOTHING),
        ("/", {}, NOTHING),  # a node exporter reads no models
        ("/mnt", {}, NOTHING),
    ],
)
def test_a_directory_of_the_node(path: str, mount: dict[str, Any], used: object) -> None:
    assert keys(pod(mount, volume=on_host(path))) == used


def test_two_containers_with_different_directories_at_the_same_path() -> None:
    raw = {
        "metadata": {"name": "p", "uid": "u"},
        "spec": {
            "volumes": [
                {"name": "theirs", "hostPath": {"path": "/etc"}},
                {"name": "ours", "hostPath": {"path": f"/models/models/{KEY}"}},
            ],
            "containers": [
                {"volumeMounts": [{"name": "theirs", "mountPath": "/mnt"}]},
                {"volumeMounts": [{"name": "ours", "mountPath": "/mnt"}]},
            ],
        },
    }
    assert keys(podspec.pod(raw)) == ONE


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended_uses_nothing(phase: str) -> None:
    assert keys(pod({}, phase=phase)) == NOTHING
    assert keys(pod({}, phase="Pending")) == ALL


def kserve_agent() -> podspec.Pod:
    return pod({}, volume=on_host("/models"), labels=KSERVE_AGENT, name="agent", owner="DaemonSet")


def test_agents_are_no_users() -> None:
    assert keys(pod({}, volume=on_host("/models"), labels=OURS)) == NOTHING
    assert keys(kserve_agent()) == NOTHING


def test_a_pod_that_waits_for_a_model_uses_it_before_it_is_there() -> None:
    waits = pod({"subPath": f"models/{KEY}"})
    assert usage.keys_of(waits, present=(), groups=["gpu"], served=SERVED) == ONE


@pytest.mark.parametrize(
    ("claim", "whole"),
    [
        ("localmodel-gpu", True),  # ours
        ("tiny-gpu", True),  # KServe's
        ("left-the-spec-gpu", True),
        ("tiny-cpu", False),
        ("gpu", False),
        ("gpu-results", False),
    ],
)
def test_claims_are_ours_and_kserves(claim: str, whole: bool) -> None:
    mounts = pod({}, volume={"persistentVolumeClaim": {"claimName": claim}})
    assert keys(mounts) == (ALL if whole else NOTHING)
    assert usage.keys_of(mounts, present=SEALED, groups=(), served=SERVED) == NOTHING


@pytest.mark.parametrize(
    ("name", "labels", "mount", "used"),
    [
        ("kserve-pvc-source", {}, {}, ALL),
        ("kserve-pvc-source", {}, {"subPathExpr": "$(MODEL)"}, ALL),
        ("kserve-pvc-source", {}, {"subPath": f"models/{KEY}/"}, ONE),
        ("kserve-pvc-source", {}, {"subPath": "results"}, NOTHING),
        ("v", {"internal.serving.kserve.io/localmodel": "tiny"}, {}, ALL),
        ("v", {"model": "tiny"}, {}, NOTHING),
    ],
)
def test_who_mounts_as_kserve_does_uses_all_though_the_group_is_gone(
    name: str, labels: dict[str, str], mount: dict[str, Any], used: frozenset[CacheKey]
) -> None:
    found = pod({"name": name, **mount}, volume={**CLAIM, "name": name}, labels=labels)
    assert usage.keys_of(found, present=SEALED, groups=(), served=SERVED) == used


def test_of_a_pod_of_kserves_the_hook_says_which_models_too() -> None:
    found = pod(
        {"name": "kserve-pvc-source"},
        volume={**CLAIM, "name": "kserve-pvc-source"},
        annotations={podspec.KEYS: KEY},
    )
    assert usage.keys_of(found, present=SEALED, groups=(), served=SERVED) == ONE


# -- who else is here ---------------------------------------------------------------------------


def kserve_source(
    name: str, labels: dict[str, str], phase: str = "Running", *, owner: str = "Job"
) -> podspec.Pod:
    raw = {
        "metadata": {
            "name": name,
            "namespace": "jobs",
            "uid": name,
            "labels": labels,
            "ownerReferences": [{"kind": owner}],
        },
        "spec": {"volumes": [{"name": "kserve-pvc-source", **CLAIM}]},
        "status": {"phase": phase},
    }
    return podspec.pod(raw)


def test_nobody_else_is_no_obstacle() -> None:
    assert usage.rival([]) is None
    # A pod that KServe rewrote has the volume of that name too, without a Job's labels.
    others = [pod({}, labels=OURS), pod({}), kserve_source("serves", {"model": "tiny"})]
    assert usage.rival(others) is None


def test_labels_alone_make_no_rival() -> None:
    """They are anybody's to set, and would stop the node's cache."""
    others = [
        kserve_source("serves", JOB, owner="ReplicaSet"),
        pod({}, labels=KSERVE_AGENT, volume=on_host("/models")),
        pod({}, labels=KSERVE_AGENT, owner="DaemonSet"),
    ]
    assert usage.rival(others) is None


def test_kserves_agent_is_named_before_its_downloads() -> None:
    found = usage.rival([kserve_source("job", JOB), kserve_agent()])
    assert found is not None
    assert found.reason is Reason.OTHER_AGENT
    assert "default/agent" in found.message
    assert "DaemonSet" in found.message


def test_downloads_that_kserve_began_are_named_and_end() -> None:
    found = usage.rival([kserve_source(f"job-{number}", JOB) for number in range(9)])
    assert found is not None
    assert "jobs/job-0, jobs/job-1, jobs/job-2, jobs/job-3, jobs/job-4" in found.message
    assert "job-5" not in found.message
    assert usage.rival([kserve_source("job", JOB, phase) for phase in ("Succeeded", "Failed")]) is (
        None
    )


# -- ourselves ----------------------------------------------------------------------------------


def test_the_cache_is_where_our_own_pod_mounts_it() -> None:
    mine = pod({"mountPath": "/models"}, volume=on_host("/data/models/"), name="me")
    other = pod({"mountPath": "/models"}, volume=on_host("/elsewhere"), name="other")
    assert usage.served_at("/models", [other, mine], "default/me") == "/data/models"
    assert usage.served_at("/cache", [other, mine], "default/me") == "/cache"
    assert usage.served_at("/models", [other], "default/me") == "/models"
    assert usage.served_at("/models", [], "me") == "/models"


def test_the_holder_of_a_lease_is_gone_with_its_pod() -> None:
    pods = {"a/alive": pod({}), "a/ended": pod({}, phase="Failed")}
    assert not usage.holder_is_gone("a/alive", pods)
    assert usage.holder_is_gone("a/ended", pods)
    assert usage.holder_is_gone("a/nobody", pods)
    assert not usage.holder_is_gone("a-laptop-0123", pods), "no pod: only time tells"
    assert not usage.holder_is_gone("", pods)
