"""Which pods the API server asks the hook about, by the shipped matchConditions and selectors.

A pod without a model costs nothing and fears nothing: the hook never hears of it. A pod that the
hook would have something to say about, it must hear of.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent.hook.admission import mutate
from agent.hook.decisions import Skip, Why
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import MUTATING, PODS, namespace
from tests.cluster.identity import JOBS, NAMESPACE
from tests.cluster.impostor import Impostor, Review, certified, review_of
from tests.hook.pods import WORLD, cases, golden, plain
from tests.machine import until


class Counting:
    """A hook that has nothing to say, and notes the pods that it is asked about."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self.names: list[str] = []

    def answer(self, review: Review) -> tuple[int, str, bytes]:
        self.names.append(review["request"]["object"]["metadata"]["name"])
        return 200, "application/json", review_of(review, allowed=True)

    def hears_of(self, pod: dict[str, Any], space: str = "team-a") -> bool:
        name = f"pod-{len(self.names)}"
        body = {**pod, "metadata": {**pod["metadata"], "name": name, "namespace": space}}
        body["spec"] = {**body["spec"], "serviceAccountName": "default"}
        before = len(self.names)
        self._plane.request("POST", f"{PODS.format(space)}?dryRun=All", body).ok()
        assert set(self.names[before:]) <= {name}
        return len(self.names) > before


@pytest.fixture(scope="module")
def hook(module_control_plane: Callable[..., ControlPlane]) -> Iterator[Counting]:
    plane = module_control_plane()
    for space in ("team-a", JOBS, NAMESPACE, "kube-system"):
        namespace(plane, space)
    counting, held = Counting(plane), certified()
    with Impostor(held, counting.answer).serving() as impostor:
        found = plane.request("GET", MUTATING).ok()
        config = {"url": f"{impostor.url}/mutate", "caBundle": held.ca_bundle}
        found["webhooks"][0]["clientConfig"] = config
        plane.request("PUT", MUTATING, found).ok()
        until(lambda: counting.hears_of(golden("uncached-hf")))
        yield counting


@pytest.mark.parametrize("case", list(cases()))
def test_the_recorded_pods(hook: Counting, case: str) -> None:
    pod = golden(case)
    decision = mutate(pod, WORLD, namespace=pod["metadata"]["namespace"])
    if isinstance(decision, Skip) and decision.why is Why.DISABLED:
        assert not hook.hears_of(pod)
    elif not (isinstance(decision, Skip) and decision.why is Why.NOT_OURS):
        assert hook.hears_of(pod)
    elif case in ("pvc", "oci", "oci-native"):
        assert not hook.hears_of(pod)


def test_a_pod_without_a_model(hook: Counting) -> None:
    assert not hook.hears_of(plain())
    bare = {"metadata": {}, "spec": {"containers": [{"name": "main", "image": "any"}]}}
    assert not hook.hears_of(bare)
    other = plain()
    other["metadata"]["annotations"] = {"localmodel-agent.io/sourcecode": "x", "a": "b"}
    other["metadata"]["labels"] = {"app": "x"}
    assert not hook.hears_of(other)


@pytest.mark.parametrize("notes", [{"source": "hf://a/b"}, {"source.draft": "hf://a/b"}])
def test_a_pod_that_names_its_model(hook: Counting, notes: dict[str, str]) -> None:
    assert hook.hears_of(plain(**notes))
    assert hook.hears_of(plain(**notes, disable="false"))


@pytest.mark.parametrize("label", ["internal.serving.kserve.io/localmodel", "modelmesh-service"])
def test_a_pod_with_a_label(hook: Counting, label: str) -> None:
    pod = plain()
    pod["metadata"]["labels"] = {label: "x"}
    assert hook.hears_of(pod)


def test_a_pod_that_opts_out(hook: Counting) -> None:
    assert not hook.hears_of(plain(source="hf://a/b", disable="true"))
    for value in ("true", "false", ""):  # KServe looks only whether it is there
        pod = golden("uncached-hf")
        pod["metadata"]["annotations"]["serving.kserve.io/disable-localmodel"] = value
        assert not hook.hears_of(pod)


@pytest.mark.parametrize("space", [JOBS, NAMESPACE, "kube-system"])
def test_a_namespace_that_is_none_of_ours(hook: Counting, space: str) -> None:
    assert not hook.hears_of(golden("uncached-hf"), space)
