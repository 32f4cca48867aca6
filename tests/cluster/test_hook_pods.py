"""What the hook makes of a pod, judged by the API server: accepted, and only our part is new.

A hook is called after the defaults were set, and its tests patch pods from before that. So each pod
goes both ways here: patched and then defaulted, defaulted and then patched, must be the same pod.
`HOOK_EXAMPLES=1000` looks longer at generated pods.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings

from agent.hook.admission import mutate
from agent.hook.decisions import Mutation, Skip, Why
from agent.hook.patch import applied
from agent.hook.world import World
from agent.model import cache_key
from tests.cluster.control_plane import Answer, ControlPlane
from tests.hook.generated import generated_pods, named_pods
from tests.hook.patches import check_only_ours
from tests.hook.pods import LLAMA, WORLD, cases, golden

NEARER = replace(WORLD, holders={cache_key(LLAMA): frozenset({"a"})})
"""One of the two nodes has the model: the pod is asked to prefer it."""

_EXAMPLES = int(os.environ.get("HOOK_EXAMPLES", "40"))


@pytest.fixture(scope="module")
def plane(control_plane: ControlPlane) -> ControlPlane:
    """With the namespaces of the pods, and one that admits only what satisfies `restricted`."""
    accounts = {str(golden(case)["spec"]["serviceAccountName"]) for case in cases()}
    for name in ("team-a", "team-b", "restricted"):
        labels = {"pod-security.kubernetes.io/enforce": name} if name == "restricted" else {}
        meta = {"name": name, "labels": labels}
        control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        for account in accounts:
            control_plane.apply(
                {
                    "apiVersion": "v1",
                    "kind": "ServiceAccount",
                    "metadata": {"namespace": name, "name": account},
                    # Its volume would have another random name in each answer.
                    "automountServiceAccountToken": False,
                }
            )
    return control_plane


def judged(plane: ControlPlane, pod: dict[str, Any]) -> Answer:
    """Everything that the API server does with a pod at its creation, but keeping it."""
    path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods"
    metadata = {"name": "judged", **pod["metadata"]}
    body = {"apiVersion": "v1", "kind": "Pod", **pod, "metadata": metadata}
    return plane.request("POST", f"{path}?dryRun=All&fieldValidation=Strict", body)


def kept(answer: Answer) -> dict[str, Any]:
    """The pod as it would be stored, without what is made for each request."""
    pod: dict[str, Any] = answer.ok()
    for name in ("uid", "creationTimestamp", "managedFields", "generation"):
        pod["metadata"].pop(name, None)
    del pod["status"]
    return pod


def helped(plane: ControlPlane, pod: dict[str, Any], world: World) -> dict[str, Any] | None:
    """The patched pod, if it is patched, held against everything that is promised of it."""
    space = pod["metadata"]["namespace"]
    plain = judged(plane, pod)
    defaulted = kept(plain)
    decision = mutate(pod, world, namespace=space)
    if isinstance(decision, Skip):
        assert mutate(defaulted, world, namespace=space) == decision
        return None
    after: dict[str, Any] = applied(pod, decision.patch)
    answer = judged(plane, after)
    stored = kept(answer)
    assert answer.warnings == plain.warnings
    check_only_ours(pod, after)
    for one in (after, stored):
        assert mutate(one, world, namespace=space) == Skip(why=Why.DONE)
    of_defaulted = mutate(defaulted, world, namespace=space)
    assert isinstance(of_defaulted, Mutation), of_defaulted
    assert applied(defaulted, of_defaulted.patch) == stored
    return after


@pytest.mark.parametrize("case", list(cases()))
def test_the_recorded_pods_are_accepted_with_their_patch(plane: ControlPlane, case: str) -> None:
    for world in (WORLD, NEARER):
        helped(plane, golden(case), world)
    assert judged(plane, golden(case)).warnings == ()


def _restricted(pod: dict[str, Any]) -> dict[str, Any]:
    """The same pod, with what the strictest Pod Security Standard asks of it."""
    spec = pod["spec"]
    spec["securityContext"] |= {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        dropped = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        container["securityContext"] = container.get("securityContext", {}) | dropped
    return pod


@pytest.mark.parametrize(
    "case", ["uncached-hf", "storage-uris", "storage-uris-apart", "cached-hf", "llmisvc-cached"]
)
def test_what_is_restricted_stays_restricted(plane: ControlPlane, case: str) -> None:
    pod = _restricted(golden(case))
    after = helped(plane, pod, NEARER)
    assert after is not None
    for one in (pod, after):
        one["metadata"]["namespace"] = "restricted"
        judged(plane, one).ok()
    after["spec"]["hostNetwork"] = True
    assert "violates PodSecurity" in judged(plane, after).message


@given(pod=generated_pods())
@settings(
    max_examples=_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_whatever_pod_comes_a_valid_one_leaves(plane: ControlPlane, pod: dict[str, Any]) -> None:
    assume(helped(plane, pod, NEARER) is not None)


@pytest.mark.parametrize("name", list(named_pods()))
def test_no_wish_makes_a_pod_invalid(plane: ControlPlane, name: str) -> None:
    """What annotations and mounts may say, so that our answer to it would be refused."""
    pod, expected = named_pods()[name]
    after = helped(plane, pod, WORLD)
    assert (after is not None) is expected
