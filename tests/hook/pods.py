"""Pods as KServe's own webhook and controllers made them (`data/`), and a world to admit them in.

Recorded from the AdmissionReviews of a hook behind KServe's. The groups are gpu1 (A100) and gpu2
(H100), local volumes each.
"""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from agent.hook.scheduling import Node
from agent.hook.world import Cache, Group, World

DATA = Path(__file__).parent / "data"
PRODUCT = "nvidia.com/gpu.product"
LLAMA = "hf://meta-llama/Llama-3.1-8B-Instruct"
LLAMA_70B = "hf://meta-llama/Llama-3.3-70B-Instruct"
QWEN = "hf://Qwen/Qwen2.5-7B-Instruct"
BUCKET = "s3://bucket/models"
ENTRYPOINT = ("/storage-initializer/scripts/initializer-entrypoint",)


def selector(product: str) -> dict[str, Any]:
    expression = {"key": PRODUCT, "operator": "In", "values": [product]}
    return {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}


def node(name: str, product: str) -> Node:
    return Node(name=name, labels={PRODUCT: product}, extended=frozenset({"nvidia.com/gpu"}))


A100, H100 = "NVIDIA-A100-SXM4-80GB", "NVIDIA-H100-80GB-HBM3"

WORLD = World(
    caches=(
        Cache(name="llama-3-1-8b", uri=LLAMA, groups=("gpu1",)),
        Cache(name="llama-3-3-70b", uri=LLAMA_70B, groups=("gpu1", "gpu2")),
        Cache(name="bucket-models", uri=BUCKET, groups=("gpu1",)),
        Cache(name="qwen2-5-7b", namespace="team-b", uri=QWEN, groups=("gpu1",)),
    ),
    groups={
        "gpu1": Group(name="gpu1", selector=selector(A100)),
        "gpu2": Group(name="gpu2", selector=selector(H100)),
    },
    nodes=(node("a", A100), node("b", A100)),
    claims=frozenset(
        (space, group) for space in ("team-a", "team-b") for group in ("gpu1", "gpu2")
    ),
    inject=frozenset({"team-a", "team-b"}),
    live=frozenset({"a", "b"}),
    entrypoints={"storage-initializer": ENTRYPOINT},
    job_namespace="kserve-localmodel-jobs",
)
"""Only A100 nodes: whoever asks for a GPU can be nowhere else."""

MIXED = (*WORLD.nodes, node("h", H100))


@cache
def _recorded() -> dict[str, Any]:
    return _parts("kserve-pods.yaml") | _parts("kserve-pods-extra.yaml")


@cache
def _services() -> dict[str, Any]:
    return _parts("kserve-services.yaml")


def _parts(name: str) -> dict[str, Any]:
    found = {}
    for part in (DATA / name).read_text().split("# case: ")[1:]:
        head, _, body = part.partition("\n")
        found[head.partition(" ")[0]] = yaml.safe_load(body)
    return found


def golden(case: str) -> dict[str, Any]:
    """A recorded pod; the caller's to change."""
    pod: dict[str, Any] = copy.deepcopy(_recorded()[case])
    return pod


def recorded_service(case: str) -> dict[str, Any]:
    """The service that it came of; not to be changed."""
    found: dict[str, Any] = _services()[case]
    return found


def cases() -> Iterator[str]:
    yield from _recorded()


def plain(**notes: str) -> dict[str, Any]:
    """A pod of a Deployment of vLLM, as its template makes it, with annotations of ours."""
    named = {
        f"localmodel-agent.io/{name.replace('_', '-')}": value for name, value in notes.items()
    }
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    mount = {"name": "x", "mountPath": "/x"}
    return {
        "metadata": {"namespace": "team-a", "annotations": named},
        "spec": {
            "containers": [
                {"name": "vllm", "image": "vllm/vllm-openai", "resources": gpu},
                {"name": "sidecar", "image": "busybox", "volumeMounts": [mount]},
            ],
            "volumes": [{"name": "x", "emptyDir": {}}],
        },
    }
