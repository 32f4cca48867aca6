"""Whatever becomes of the hook, pods start, and as they would have (`failurePolicy: Ignore`).

And what that policy does not cover: an answer that the API server can read is obeyed.
"""

import base64
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.certificates import Held
from tests.cluster.control_plane import Answer, ControlPlane
from tests.cluster.controllers import (
    MUTATING,
    PODS,
    bind,
    controllers,
    namespace,
    ready_node,
)
from tests.cluster.impostor import Impostor, Review, certified, closed_port, review_of
from tests.cluster.nodes import cache, group
from tests.hook.pods import golden
from tests.machine import until

URI = "hf://meta-llama/Llama-3.1-8B-Instruct"
WITHIN = 3.0 + 4.0
"""Seconds: `timeoutSeconds` of the configuration, and a busy machine."""

Respond = Callable[[Review], tuple[int, str, bytes]]


@pytest.fixture(scope="module")
def plane(module_control_plane: Callable[..., ControlPlane]) -> ControlPlane:
    plane = module_control_plane()
    plane.apply(group("gpu1", "/models"), cache("llama", URI, ["gpu1"]))
    ready_node(plane, "a", gpu="yes")
    namespace(plane, "team-a", inject="enabled")
    return plane


@pytest.fixture(scope="module")
def shipped(plane: ControlPlane) -> dict[str, Any]:
    """The configuration as it was installed, to be written again and again."""
    found: dict[str, Any] = plane.request("GET", MUTATING).ok()
    return found


@pytest.fixture(scope="module")
def untouched(plane: ControlPlane, shipped: dict[str, Any]) -> dict[str, Any]:
    """What becomes of the pod where there is no configuration of a hook at all."""
    with configured(plane, None):
        return kept(created(plane))


@contextmanager
def configured(plane: ControlPlane, body: dict[str, Any] | None) -> Iterator[None]:
    """This configuration alone, None for none; afterwards none."""
    plane.request("DELETE", MUTATING)
    try:
        if body is not None:
            made = {**body, "metadata": {"name": body["metadata"]["name"]}}
            plane.request("POST", MUTATING.rpartition("/")[0], made).ok()
        yield
    finally:
        plane.request("DELETE", MUTATING)


def calling(shipped: dict[str, Any], case: str, url: str, bundle: str) -> dict[str, Any]:
    """The shipped configuration with somebody to call; its hook is named by the case, so that the
    API server's metrics tell one case from another."""
    (hook,) = shipped["webhooks"]
    config = {"url": f"{url}/mutate", "caBundle": bundle}
    named = {**hook, "name": f"{case}.localmodel-agent.io", "clientConfig": config}
    return {**shipped, "webhooks": [named]}


def created(plane: ControlPlane) -> Answer:
    """A pod is created, and goes again."""
    pod = golden("uncached-hf")
    del pod["metadata"]["generateName"]
    pod["metadata"]["name"] = "p"
    pod["spec"]["automountServiceAccountToken"] = False  # its volume has a random name
    path = PODS.format("team-a")
    begun = time.monotonic()
    answer = plane.request("POST", path, pod)
    assert time.monotonic() - begun < WITHIN
    if answer.status == 201:
        plane.request("DELETE", f"{path}/p", {"gracePeriodSeconds": 0}).ok()
    return answer


def kept(answer: Answer) -> dict[str, Any]:
    """Everything that is the pod's own."""
    made: dict[str, Any] = answer.ok()
    for name in ("uid", "creationTimestamp", "managedFields", "resourceVersion", "generation"):
        made["metadata"].pop(name, None)
    return made


def samples(plane: ControlPlane, name: str, case: str) -> dict[str, float]:
    """The API server's own metric of this hook, by its other labels."""
    text = plane.request("GET", "/metrics").ok()
    lines = [line for line in text.splitlines() if line.startswith((f"# TYPE {name} ", name))]
    return {
        " ".join(v for k, v in sorted(sample.labels.items()) if k != "name"): sample.value
        for family in text_string_to_metric_families("\n".join(lines) + "\n")
        for sample in family.samples
        if sample.labels.get("name") == f"{case}.localmodel-agent.io"
    }


def failed_open(plane: ControlPlane, case: str) -> float:
    found = samples(plane, "apiserver_admission_webhook_fail_open_count", case)
    return found.get("admit", 0.0)


def check_started_as_ever(plane: ControlPlane, untouched: dict[str, Any], case: str) -> None:
    """Whatever goes on, no pod is held up or changed; and at last, the API server says why."""

    def told() -> bool:
        answer = created(plane)
        assert kept(answer) == untouched
        assert json.dumps(kept(answer)["spec"]) == json.dumps(untouched["spec"])
        return failed_open(plane, case) > 0

    until(told, lambda: f"{case}: no failure is counted")


# -- nobody, and too late ------------------------------------------------------------------------


def test_nobody_answers(
    plane: ControlPlane, shipped: dict[str, Any], untouched: dict[str, Any]
) -> None:
    body = calling(shipped, "refused", closed_port(), certified().ca_bundle)
    with configured(plane, body):
        check_started_as_ever(plane, untouched, "refused")


def test_the_answer_comes_too_late(
    plane: ControlPlane, shipped: dict[str, Any], untouched: dict[str, Any]
) -> None:
    def slow(review: Review) -> tuple[int, str, bytes]:
        time.sleep(10)
        return allowed(review, patch=[])

    with standing_in(plane, shipped, "slow", slow) as impostor:
        check_started_as_ever(plane, untouched, "slow")
        assert impostor.asked


def test_a_controller_that_hangs(
    plane: ControlPlane, shipped: dict[str, Any], untouched: dict[str, Any], tmp_path: Path
) -> None:
    """Its kernel goes on to accept connections."""
    with (
        configured(plane, shipped),
        controllers(plane, tmp_path / "controllers") as replicas,
    ):
        controller = replicas.start()
        replicas.called(controller)
        bind(plane, "team-a", "localmodel-gpu1")

        def helped() -> bool:
            notes = created(plane).ok()["metadata"]["annotations"]
            return "localmodel-agent.io/injected" in notes

        until(helped, controller.log_text)
        before = failed_open(plane, "pods")
        controller.process.send_signal(signal.SIGSTOP)
        try:
            assert kept(created(plane)) == untouched
            assert failed_open(plane, "pods") == before + 1
        finally:
            controller.process.send_signal(signal.SIGCONT)
        until(helped, controller.log_text)


# -- what is no answer ---------------------------------------------------------------------------

JSON = "application/json"


def allowed(review: Review, *, patch: Any, **response: Any) -> tuple[int, str, bytes]:
    encoded = base64.b64encode(json.dumps(patch).encode()).decode()
    body = review_of(review, allowed=True, patchType="JSONPatch", patch=encoded, **response)
    return 200, JSON, body


MARK = [{"op": "add", "path": "/metadata/labels/forged", "value": "yes"}]

GARBAGE: dict[str, Respond] = {
    "empty": lambda _: (200, JSON, b""),
    "no-json": lambda _: (200, JSON, b"\x00\xff no JSON"),
    "html": lambda _: (200, "text/html", b"<html><body>Welcome to nginx!</body></html>"),
    "another-kind": lambda _: (200, JSON, b'{"apiVersion": "v1", "kind": "Pod"}'),
    "no-response": lambda _: (
        *(200, JSON),
        b'{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}',
    ),
    "another-uid": lambda review: allowed(review, patch=MARK, uid="another"),
    "another-version": lambda review: (
        *(200, JSON),
        allowed(review, patch=MARK)[2].replace(b"k8s.io/v1", b"k8s.io/v9"),
    ),
    "a-merge-patch": lambda review: allowed(review, patch=MARK, patchType="MergePatch"),
    "a-patch-in-no-base64": lambda review: allowed(review, patch=MARK, **{"patch": "!"}),
    "500": lambda review: (500, *allowed(review, patch=MARK)[1:]),
    "404": lambda _: (404, "text/plain", b"404: Not Found"),
    "gigantic": lambda _: (200, JSON, b"[" * (64 * 1024**2)),
}


@contextmanager
def standing_in(
    plane: ControlPlane,
    shipped: dict[str, Any],
    case: str,
    respond: Respond,
    held: Held | None = None,
    bundle: str = "",
) -> Iterator[Impostor]:
    held = held or certified()
    with Impostor(held, respond).serving() as impostor:
        body = calling(shipped, case, impostor.url, bundle or held.ca_bundle)
        with configured(plane, body):
            yield impostor


@pytest.mark.parametrize("case", list(GARBAGE))
def test_garbage(
    plane: ControlPlane, shipped: dict[str, Any], untouched: dict[str, Any], case: str
) -> None:
    with standing_in(plane, shipped, case, GARBAGE[case]) as impostor:
        check_started_as_ever(plane, untouched, case)
        assert impostor.asked


def test_an_honest_answer_is_obeyed(plane: ControlPlane, shipped: dict[str, Any]) -> None:
    """So the tests above say something: the same way, with nothing wrong, changes the pod."""
    with standing_in(plane, shipped, "honest", partial(allowed, patch=MARK)):
        until(lambda: created(plane).ok()["metadata"].get("labels", {}).get("forged") == "yes")
    assert failed_open(plane, "honest") == 0


# -- certificates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "held", "trusted"),
    [
        ("expired", certified(days_ago=91), None),
        ("another-authority", certified(), certified()),
        ("another-name", certified("localmodel-hook.elsewhere.svc"), None),
    ],
)
def test_a_certificate_that_is_not_to_be_trusted(
    plane: ControlPlane,
    shipped: dict[str, Any],
    untouched: dict[str, Any],
    case: str,
    held: Held,
    trusted: Held | None,
) -> None:
    respond = partial(allowed, patch=MARK)
    bundle = (trusted or held).ca_bundle
    with standing_in(plane, shipped, case, respond, held, bundle) as impostor:
        check_started_as_ever(plane, untouched, case)
        assert impostor.asked == 0


# -- what `Ignore` does not cover ----------------------------------------------------------------

OBEYED: dict[str, tuple[Respond, int]] = {
    "it-does-not-apply": (
        partial(allowed, patch=[{"op": "replace", "path": "/spec/nowhere/0", "value": 1}]),
        500,
    ),
    "it-makes-no-pod": (
        partial(allowed, patch=[{"op": "replace", "path": "/spec/containers", "value": 7}]),
        500,
    ),
    "it-makes-no-valid-pod": (
        partial(allowed, patch=[{"op": "replace", "path": "/spec/containers", "value": []}]),
        422,
    ),
    "neither-allowed-nor-not": (lambda review: (200, JSON, review_of(review)), 400),
}


@pytest.mark.parametrize("case", list(OBEYED))
def test_a_readable_answer_counts_however_wrong(
    plane: ControlPlane, shipped: dict[str, Any], case: str
) -> None:
    """The API server refuses the pod: only a call that fails is ignored. So a patch of ours must
    always apply, and leave a valid pod: that is held against the same API server, pod for pod, in
    test_hook_pods."""
    respond, status = OBEYED[case]
    with standing_in(plane, shipped, case, respond):
        until(lambda: created(plane).status == status, lambda: str(created(plane)))
    assert failed_open(plane, case) == 0
    told = samples(plane, "apiserver_admission_webhook_rejection_count", case)
    assert bool(told) is (status != 422)  # validation refuses that one, and blames nobody
