"""Five warnings, each where it is due and nowhere else."""

from dataclasses import replace
from typing import Any

import pytest

from agent.hook.advice import advise
from agent.hook.world import Group, World
from agent.model import cache_key
from tests.hook.pods import BUCKET, LLAMA, LLAMA_70B, QWEN, WORLD, cases, golden

GIB = 1024**3
KEY = cache_key(LLAMA)


def _pod(**container: Any) -> dict[str, Any]:
    gpu = {"limits": {"nvidia.com/gpu": "1", "memory": "48Gi"}}
    server = {"name": "main", "image": "vllm/vllm-openai:v1", "resources": gpu, **container}
    return {"spec": {"containers": [server, {"name": "sidecar", "image": "busybox"}]}}


def _advise(
    pod: dict[str, Any], world: World = WORLD, *, group: str = "gpu1", namespace: str = "team-a"
) -> tuple[str, ...]:
    return advise(pod, world, keys=[KEY], group=group, namespace=namespace)


def _said(pod: dict[str, Any], **world: Any) -> tuple[str, ...]:
    return _advise(pod, replace(WORLD, **world))


def test_a_good_pod_is_told_nothing() -> None:
    assert _said(_pod()) == ()


def test_triton_without_resources_gets_exactly_one_warning_with_its_fix() -> None:
    """The recorded pod: `resources: {}` became the runtime's 1 CPU and 2Gi."""
    (said,) = _said(golden("triton-vllm"))
    assert "container kserve-container has 2Gi of memory and no GPU" in said
    assert "Stub process is not healthy" in said
    assert "set resources.limits" in said


@pytest.mark.parametrize(
    ("resources", "warned"),
    [
        ({}, True),
        ({"requests": {"memory": "64Gi"}}, True),
        ({"limits": {"memory": "2Gi"}}, True),
        ({"limits": {"memory": "what"}}, True),
        ({"limits": {"memory": "2049Mi"}}, False),
        ({"limits": {"amd.com/gpu": 1}}, False),
    ],
)
def test_resources(resources: dict[str, Any], warned: bool) -> None:
    world = {"groups": {"gpu1": Group(name="gpu1", selector=None)}, "nodes": ()}
    assert bool(_said(_pod(resources=resources), **world)) is warned


@pytest.mark.parametrize(
    ("begun", "mounts", "warned"),
    [
        ({"args": ["--tensor-parallel-size=4"]}, [], True),
        ({"args": ["--tensor-parallel-size", "2"]}, [], True),
        ({"command": ["sh", "-c", "vllm serve /mnt/models -tp 8"]}, [], True),
        ({"args": ["-tp", "1" * 5000]}, [], True),
        ({"args": ["--tensor-parallel-size=1"]}, [], False),
        ({"args": []}, [], False),
        ({"args": ["--tensor-parallel-size=4"]}, [{"mountPath": "/dev/shm/"}], False),
    ],
)
def test_shared_memory(begun: dict[str, Any], mounts: list[Any], warned: bool) -> None:
    said = _said(_pod(**begun, volumeMounts=mounts))
    assert bool(said) is warned
    assert all("64 MiB of /dev/shm" in one and "medium: Memory" in one for one in said)


@pytest.mark.parametrize(
    ("directory", "warned"),
    [
        ({"sizeLimit": "12Gi"}, True),
        ({"sizeLimit": "16Gi"}, False),
        ({}, False),
        ({"sizeLimit": "1Gi", "medium": "Memory"}, False),
    ],
)
def test_a_directory_that_is_smaller_than_the_model(
    directory: dict[str, str], warned: bool
) -> None:
    pod = _pod()
    pod["spec"]["volumes"] = [{"name": "models", "emptyDir": directory}, {"name": "other"}]
    said = _said(pod, sizes={KEY: 16 * GIB})
    assert bool(said) is warned
    assert all("may hold 12Gi, and the model has 16Gi" in one for one in said)


def test_a_gpu_that_no_node_of_the_group_has() -> None:
    pod = _pod(resources={"limits": {"amd.com/gpu": 1, "memory": "48Gi"}})
    (said,) = _said(pod)
    assert said.startswith("no node of the group gpu1 has any amd.com/gpu, which the pod asks for;")
    assert _said(pod, nodes=()) == (), "who knows what an autoscaler will bring"
    assert _advise(pod, group="") == ()


def test_a_model_that_fits_nowhere() -> None:
    sizes = {KEY: 140 * GIB}
    (said,) = _said(_pod(), sizes=sizes, capacity={"a": 80 * GIB, "b": 100 * GIB})
    assert "the model has 140Gi" in said
    assert "more than 100Gi" in said
    assert _said(_pod(), sizes=sizes, capacity={"a": 80 * GIB, "b": 200 * GIB}) == ()
    assert _said(_pod(), sizes=sizes) == ()


def _modelmesh(*mounts: dict[str, str], claim: str = "") -> dict[str, Any]:
    """A runtime of ModelMesh: a puller loads into what the server reads."""
    models = {"name": "models-dir", "mountPath": "/models"}
    volumes: list[Any] = [{"name": "models-dir", "emptyDir": {"sizeLimit": "1536Mi"}}]
    if claim:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": claim}})
    return {
        "metadata": {"labels": {"modelmesh-service": "modelmesh-serving"}},
        "spec": {
            "containers": [
                {"name": "mlserver", "volumeMounts": [models]},
                {"name": "puller", "volumeMounts": [models, *mounts]},
            ],
            "volumes": volumes,
        },
    }


def _of_modelmesh(pod: dict[str, Any], namespace: str = "team-a") -> tuple[str, ...]:
    sizes = {
        cache_key(LLAMA): 16 * GIB,
        cache_key(LLAMA_70B): 140 * GIB,
        cache_key(BUCKET): GIB,
        cache_key(QWEN): 200 * GIB,
    }
    world = replace(WORLD, sizes=sizes)
    return advise(pod, world, keys=(), group="", namespace=namespace)


def test_modelmesh_is_told_of_the_largest_model_that_it_may_be_asked_for() -> None:
    (said,) = _of_modelmesh(_modelmesh())
    assert said == (
        "emptyDir models-dir may hold 1.5Gi, and the cached model llama-3-3-70b has 140Gi:"
        " the pod is evicted then; mount the claim localmodel-gpu1:"
        " `localmodel show NAME -o json` prints the storage stanza"
    )
    (said,) = _of_modelmesh(_modelmesh(), namespace="team-b")
    assert "qwen2-5-7b has 200Gi" in said, "its own namespace's counts, another's does not"


def test_modelmesh_that_mounts_the_cache_is_told_nothing() -> None:
    mount = {"name": "claim", "mountPath": "/cache"}
    assert _of_modelmesh(_modelmesh(mount, claim="localmodel-gpu1")) == ()
    assert _of_modelmesh(_modelmesh(mount, claim="localmodel-other")) != (), "not of ours"
    assert _of_modelmesh(_modelmesh(claim="localmodel-gpu1")) != (), "named, and mounted nowhere"
    small = _modelmesh()
    small["spec"]["volumes"][0]["emptyDir"]["sizeLimit"] = "150Gi"
    assert _of_modelmesh(small) == ()
    other = _modelmesh()
    other["metadata"]["labels"] = {"app": "x"}
    assert _of_modelmesh(other) == ()


def test_every_warning_fits_with_its_fix() -> None:
    """Names as long as they may be: kubectl shows 256 characters."""
    name = "n" * 63
    pod = _modelmesh()
    server = pod["spec"]["containers"][0]
    server |= {"name": name, "image": "vllm", "args": ["-tp=8"]}
    server["resources"] = {"limits": {"memory": "1.5Gi"}}
    pod["spec"]["containers"].append(
        {"name": "x", "resources": {"limits": {f"{'e' * 253}/{name}": "1"}}}
    )
    pod["spec"]["volumes"][0]["name"] = name
    group, cache = "g" * 253, "c" * 253
    world = replace(
        WORLD,
        caches=(replace(WORLD.caches[0], name=cache, groups=(group,)),),
        groups={group: Group(name=group, selector=None)},
        sizes={KEY: 1023 * GIB},
        capacity={"a": 1022 * GIB},
    )
    said = [*_advise(pod, world, group=group), *advise(
        pod, world, keys=(), group="", namespace="team-a"
    )]  # fmt: skip
    fixes = ("of the predictor", "Memory there", "storage stanza", "sizeLimit", "group", "limit")
    assert all(any(one.endswith(fix) for one in said) for fix in fixes)
    assert [one for one in said if len(one) > 256] == []


@pytest.mark.parametrize("case", list(cases()))
def test_the_recorded_pods_are_told_little(case: str) -> None:
    """A warning that everybody gets is read by nobody."""
    said = _advise(golden(case))
    assert len(said) <= 1, said
