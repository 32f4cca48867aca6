"""Five warnings, each where it is due and nowhere else."""

from dataclasses import replace
from typing import Any

import pytest

from agent.hook.advice import advise
from agent.hook.world import Group
from agent.model import cache_key
from tests.hook.pods import LLAMA, WORLD, cases, golden

GIB = 1024**3
KEY = cache_key(LLAMA)


def _pod(**container: Any) -> dict[str, Any]:
    gpu = {"limits": {"nvidia.com/gpu": "1", "memory": "48Gi"}}
    server = {"name": "main", "image": "vllm/vllm-openai:v1", "resources": gpu, **container}
    return {"spec": {"containers": [server, {"name": "sidecar", "image": "busybox"}]}}


def _said(pod: dict[str, Any], **world: Any) -> tuple[str, ...]:
    return advise(pod, replace(WORLD, **world), [KEY], "gpu1")


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
    assert _said(pod) == ("no node of the group gpu1 has any amd.com/gpu, which the pod asks for",)
    assert _said(pod, nodes=()) == (), "who knows what an autoscaler will bring"
    assert advise(pod, WORLD, [KEY], "") == ()


def test_a_model_that_fits_nowhere() -> None:
    sizes = {KEY: 140 * GIB}
    (said,) = _said(_pod(), sizes=sizes, capacity={"a": 80 * GIB, "b": 100 * GIB})
    assert "the model has 140Gi" in said
    assert "more than 100Gi" in said
    assert _said(_pod(), sizes=sizes, capacity={"a": 80 * GIB, "b": 200 * GIB}) == ()
    assert _said(_pod(), sizes=sizes) == ()


@pytest.mark.parametrize("case", list(cases()))
def test_the_recorded_pods_are_told_little(case: str) -> None:
    """A warning that everybody gets is read by nobody."""
    said = advise(golden(case), WORLD, [KEY], "gpu1")
    assert len(said) <= 1, said
