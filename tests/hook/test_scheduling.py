"""Which nodes a pod allows: the scheduler's rules, one by one (kubernetes.io, assigning pods)."""

from typing import Any

import pytest

from agent.hook.scheduling import Node, allowed, selects

NODE = Node(
    name="a",
    labels={"gpu": "a100", "count": "8", "zone": ""},
    taints=(
        {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
        {"key": "soft", "effect": "PreferNoSchedule"},
    ),
    extended=frozenset({"nvidia.com/gpu"}),
)
TOLERATED = [{"key": "nvidia.com/gpu", "operator": "Exists"}]


def _expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"key": key, "operator": operator, **({"values": list(values)} if values else {})}


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        (_expression("gpu", "In", "h100", "a100"), True),
        (_expression("gpu", "In", "h100"), False),
        (_expression("absent", "In", "x"), False),
        (_expression("gpu", "NotIn", "h100"), True),
        (_expression("gpu", "NotIn", "a100"), False),
        (_expression("absent", "NotIn", "x"), True),
        (_expression("zone", "Exists"), True),
        (_expression("absent", "Exists"), False),
        (_expression("absent", "DoesNotExist"), True),
        (_expression("gpu", "DoesNotExist"), False),
        (_expression("count", "Gt", "7"), True),
        (_expression("count", "Gt", "8"), False),
        (_expression("count", "Lt", "9"), True),
        (_expression("gpu", "Gt", "1"), False),
        (_expression("count", "Gt", "many"), False),
        (_expression("absent", "Gt", "1"), False),
        (_expression("gpu", "Like", "a*"), False),
    ],
)
def test_an_expression(expression: dict[str, Any], holds: bool) -> None:
    term = {"matchExpressions": [expression]}
    assert selects({"nodeSelectorTerms": [term]}, NODE) is holds


def test_terms_are_alternatives_and_each_must_hold_whole() -> None:
    good, bad = _expression("gpu", "Exists"), _expression("absent", "Exists")
    assert not selects({"nodeSelectorTerms": [{"matchExpressions": [good, bad]}]}, NODE)
    either = [{"matchExpressions": [bad]}, {"matchExpressions": [good]}]
    assert selects({"nodeSelectorTerms": either}, NODE)
    named = {"matchFields": [_expression("metadata.name", "In", "a")]}
    assert selects({"nodeSelectorTerms": [named]}, NODE)
    assert not selects({"nodeSelectorTerms": [{**named, "matchExpressions": [bad]}]}, NODE)
    empty: tuple[Any, ...] = (None, {}, {"nodeSelectorTerms": []}, {"nodeSelectorTerms": [{}]})
    for nothing in empty:
        assert not selects(nothing, NODE)


@pytest.mark.parametrize(
    ("spec", "fits"),
    [
        ({}, True),
        ({"nodeSelector": {"gpu": "a100"}}, True),
        ({"nodeSelector": {"gpu": "a100", "absent": ""}}, False),
        ({"nodeName": "a"}, True),
        ({"nodeName": "b"}, False),
        ({"containers": [{"resources": {"limits": {"nvidia.com/gpu": "1"}}}]}, True),
        ({"containers": [{"resources": {"limits": {"nvidia.com/gpu": 0, "cpu": "1"}}}]}, True),
        ({"initContainers": [{"resources": {"limits": {"amd.com/gpu": 1}}}]}, False),
        ({"containers": [{"resources": {"limits": {"hugepages-2Mi": "1Gi"}}}]}, True),
    ],
)
def test_a_pod(spec: dict[str, Any], fits: bool) -> None:
    assert _allows({"tolerations": TOLERATED, **spec}) is fits


def test_required_affinity_and_not_preferred() -> None:
    term = {"matchExpressions": [_expression("absent", "Exists")]}
    for kind, fits in (
        ("requiredDuringSchedulingIgnoredDuringExecution", False),
        ("preferredDuringSchedulingIgnoredDuringExecution", True),
    ):
        affinity = {"nodeAffinity": {kind: {"nodeSelectorTerms": [term]}}}
        assert _allows({"tolerations": TOLERATED, "affinity": affinity}) is fits


@pytest.mark.parametrize(
    ("toleration", "fits"),
    [
        ({"operator": "Exists"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Equal", "value": "present"}, True),
        ({"key": "nvidia.com/gpu", "value": "present"}, True),
        ({"key": "nvidia.com/gpu", "value": "other"}, False),
        ({"key": "nvidia.com/gpu"}, False),
        ({"key": "other", "operator": "Exists"}, False),
        ({"value": "present"}, False),
    ],
)
def test_taints(toleration: dict[str, str], fits: bool) -> None:
    assert _allows({"tolerations": [toleration]}) is fits
    assert not _allows({})


def _allows(spec: dict[str, Any]) -> bool:
    return allowed(spec, [NODE]) == {NODE.name}
