"""The claims that pods mount, on a real API server: made, kept while used, mended, removed.

kube-controller-manager does not run here: the tests bind, release and finalize as it does. All
tests share one controller; each has namespaces and node groups of its own.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.hook.volumes import volume_name
from agent.kube.client import Json
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import (
    ACCOUNT,
    PODS,
    Controller,
    bind,
    controllers,
    namespace,
)
from tests.cluster.identity import SERVING
from tests.cluster.nodes import group
from tests.machine import until

VOLUMES = "/api/v1/persistentvolumes"
CLAIMS = "/api/v1/namespaces/{}/persistentvolumeclaims"
GROUPS = f"{SERVING}/localmodelnodegroups"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def plane(module_control_plane: Callable[..., ControlPlane]) -> ControlPlane:
    made: ControlPlane = module_control_plane()
    return made


@pytest.fixture(scope="module")
def controller(
    plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Controller]:
    home: Path = tmp_path_factory.mktemp("keeper") / "controllers"
    with controllers(plane, home) as replicas:
        yield replicas.start(look_seconds=0.5).wait_ready()


class Place:
    """A namespace and a node group: their claim and its volume."""

    def __init__(self, plane: ControlPlane, space: str, name: str) -> None:
        self.plane = plane
        self.space = space
        self.group = name
        self.claim = f"{CLAIMS.format(space)}/localmodel-{name}"
        self.volume = f"{VOLUMES}/{volume_name((space, name))}"

    def label(self, value: str | None) -> None:
        change = {"metadata": {"labels": {"localmodel-agent.io/inject": value}}}
        self.plane.request("PATCH", f"/api/v1/namespaces/{self.space}", change).ok()

    def made(self) -> tuple[Json, Json]:
        """Volume and claim, once both are there and bound."""
        bind(self.plane, self.space, f"localmodel-{self.group}")
        claim = self.plane.request("GET", self.claim).ok()
        bound = {"spec": {"claimRef": {"uid": claim["metadata"]["uid"]}}}
        volume = self.plane.request("PATCH", self.volume, bound).ok()
        self._phase("Bound")
        return volume, claim

    def released(self) -> None:
        self._phase("Released")

    def available(self) -> None:
        self._phase("Available")

    def _phase(self, phase: str) -> None:
        self.plane.request("PATCH", f"{self.volume}/status", {"status": {"phase": phase}}).ok()

    def gone(self) -> bool:
        """Both, as soon as they are asked to go."""
        return all([finalized(self.plane, path) for path in (self.claim, self.volume)])

    def there(self) -> bool:
        """Both, and nobody has asked them to go."""
        answers = [self.plane.request("GET", path) for path in (self.claim, self.volume)]
        return all(
            answer.status == 200 and "deletionTimestamp" not in answer.body["metadata"]
            for answer in answers
        )

    def add_pod(self) -> str:
        claim = {"claimName": f"localmodel-{self.group}", "readOnly": True}
        spec = {
            "containers": [{"name": "main", "image": "any"}],
            "volumes": [{"name": "cache", "persistentVolumeClaim": claim}],
            "automountServiceAccountToken": False,
        }
        path = PODS.format(self.space)
        body = {"metadata": {"name": f"of-{self.group}"}, "spec": spec}
        self.plane.request("POST", path, body).ok()
        return f"{path}/of-{self.group}"

    def remove_pod(self, path: str) -> None:
        self.plane.request("DELETE", path, {"gracePeriodSeconds": 0}).ok()

    def events(self) -> list[Json]:
        listed = self.plane.request("GET", "/api/v1/namespaces/default/events").ok()["items"]
        return [
            event
            for event in listed
            if event["involvedObject"]["name"] == self.group and self.space in event["message"]
        ]


def finalized(plane: ControlPlane, path: str, uid: str = "") -> bool:
    """Whether it, or the one with this uid, has gone. What is to go loses what protects it."""
    answer = plane.request("GET", path)
    if answer.status == 404 or (uid and answer.ok()["metadata"]["uid"] != uid):
        return True
    if "deletionTimestamp" in answer.ok()["metadata"]:
        plane.request("PATCH", path, {"metadata": {"finalizers": None}})
    return False


@pytest.fixture
def place(plane: ControlPlane, controller: Controller) -> Iterator[Place]:
    """A namespace with our label, and a node group; what is left of it waits for nothing any more
    when the next test counts what waits, and who deletes."""
    name = f"gpu{next(_numbers)}"
    plane.apply(group(name, "/models"))
    namespace(plane, f"team-{name}", inject="enabled")
    made = Place(plane, f"team-{name}", name)
    yield made
    made.label(None)
    plane.request("DELETE", f"{GROUPS}/{name}")
    until(lambda: made.gone() and not waiting(controller), controller.log_text)


def waiting(controller: Controller) -> float:
    return controller.metrics()["localmodel_controller_claims_waiting"]


def test_they_are_what_the_group_says(place: Place) -> None:
    volume, claim = place.made()
    spec = place.plane.get("localmodelnodegroup", place.group)["spec"]
    wanted = spec["persistentVolumeSpec"]
    assert volume["spec"]["local"] == wanted["local"]
    assert volume["spec"]["nodeAffinity"] == wanted["nodeAffinity"]
    assert volume["spec"]["capacity"] == wanted["capacity"]
    assert volume["spec"]["mountOptions"] == ["ro"]
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    assert volume["spec"]["claimRef"]["namespace"] == place.space
    assert volume["spec"]["claimRef"]["name"] == claim["metadata"]["name"]
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert claim["spec"]["storageClassName"] == volume["spec"]["storageClassName"]
    assert claim["spec"]["resources"] == spec["persistentVolumeClaimSpec"]["resources"]


def test_they_go_with_the_label(place: Place, controller: Controller) -> None:
    place.made()
    place.label(None)
    until(place.gone, controller.log_text)


def test_they_stay_as_long_as_a_pod_mounts_them(place: Place, controller: Controller) -> None:
    place.made()
    pod = place.add_pod()
    before = waiting(controller)
    place.label(None)
    until(lambda: waiting(controller) == before + 1, controller.log_text)
    looks = _pods_listed(place.plane)
    until(lambda: _pods_listed(place.plane) >= looks + 2, controller.log_text)
    assert place.there()
    place.remove_pod(pod)
    until(place.gone, controller.log_text)
    until(lambda: waiting(controller) == before)


def test_a_pod_that_has_ended_keeps_nothing(place: Place, controller: Controller) -> None:
    place.made()
    pod = place.add_pod()
    place.plane.request("PATCH", f"{pod}/status", {"status": {"phase": "Succeeded"}}).ok()
    place.label(None)
    until(place.gone, controller.log_text)


def test_a_label_that_comes_back_in_time_keeps_them(place: Place, controller: Controller) -> None:
    _, claim = place.made()
    pod, before = place.add_pod(), waiting(controller)
    place.label(None)
    until(lambda: waiting(controller) == before + 1, controller.log_text)
    place.label("enabled")
    until(lambda: waiting(controller) == before, controller.log_text)
    place.remove_pod(pod)
    assert place.there()
    assert (
        place.plane.request("GET", place.claim).ok()["metadata"]["uid"]
        == (claim["metadata"]["uid"])
    )


def test_2_24_a_claim_that_was_deleted_by_hand_is_made_again(
    place: Place, controller: Controller
) -> None:
    """Its volume is Released then, and the new claim would stay Pending for good."""
    before, claim = place.made()
    place.plane.request("DELETE", place.claim).ok()
    until(lambda: finalized(place.plane, place.claim, claim["metadata"]["uid"]))
    place.released()

    def unbound() -> bool:
        found = place.plane.request("GET", place.volume).ok()
        return "uid" not in found["spec"]["claimRef"]

    until(unbound, controller.log_text)
    place.available()
    after, _ = place.made()
    assert after["metadata"]["uid"] == before["metadata"]["uid"]


def test_a_volume_that_was_deleted_by_hand_is_made_again(
    place: Place, controller: Controller
) -> None:
    """Its claim is Lost then, and can never be bound again."""
    volume, claim = place.made()
    place.plane.request("DELETE", place.volume).ok()
    until(lambda: finalized(place.plane, place.volume, volume["metadata"]["uid"]))
    lost = {"status": {"phase": "Lost"}}
    place.plane.request("PATCH", f"{place.claim}/status", lost).ok()
    old = claim["metadata"]["uid"]
    until(lambda: finalized(place.plane, place.claim, old), controller.log_text)
    place.made()


def test_a_group_that_was_edited_is_followed_when_no_pod_minds(
    place: Place, controller: Controller
) -> None:
    old, _ = place.made()
    pod, before = place.add_pod(), waiting(controller)
    moved = {"spec": {"persistentVolumeSpec": {"local": {"path": "/elsewhere"}}}}
    place.plane.request("PATCH", f"{GROUPS}/{place.group}", moved).ok()
    until(lambda: waiting(controller) == before + 1, controller.log_text)
    assert place.there()
    place.remove_pod(pod)

    def anew() -> bool:
        place.gone()
        found = place.plane.request("GET", place.volume)
        return found.status == 200 and found.body["metadata"]["uid"] != old["metadata"]["uid"]

    until(anew, controller.log_text)
    new, _ = place.made()
    assert new["spec"]["local"]["path"] == "/elsewhere"


def test_they_go_with_the_group(place: Place, controller: Controller) -> None:
    place.made()
    place.plane.request("DELETE", f"{GROUPS}/{place.group}").ok()
    until(place.gone, controller.log_text)


def test_what_is_somebody_elses_is_not_touched(place: Place, controller: Controller) -> None:
    theirs = Place(place.plane, f"{place.space}-theirs", place.group)
    namespace(place.plane, theirs.space)
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    body = {"metadata": {"name": f"localmodel-{place.group}"}, "spec": spec}
    made = place.plane.request("POST", CLAIMS.format(theirs.space), body).ok()
    theirs.label("enabled")
    events = until(theirs.events, controller.log_text)
    assert events[0]["reason"] == "ClaimFailed"
    assert events[0]["type"] == "Warning"
    assert "that one is not ours: rename it or remove it" in events[0]["message"]
    later = Place(place.plane, f"{place.space}-later", place.group)
    namespace(place.plane, later.space, inject="enabled")
    later.made()  # others go on
    found = place.plane.request("GET", theirs.claim).ok()
    assert found["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    theirs.label(None)
    later.label(None)
    until(lambda: finalized(place.plane, theirs.volume), controller.log_text)
    assert place.plane.request("GET", theirs.claim).ok()["metadata"] == found["metadata"]


def test_a_group_that_can_have_no_volume_holds_up_no_other(
    place: Place, controller: Controller
) -> None:
    bad = Place(place.plane, place.space, f"{place.group}-bad")
    body = group(bad.group, "/models")
    del body["spec"]["persistentVolumeSpec"]["nodeAffinity"]  # a local volume must have one
    place.plane.apply(body)
    (event,) = until(bad.events, controller.log_text)
    assert event["reason"] == "ClaimFailed"
    assert "nodeAffinity" in event["message"]

    def tries() -> int:
        codes = [event.get("responseStatus", {}).get("code") for event in place.plane.audit()]
        return codes.count(422)

    until(lambda: tries() == 3, controller.log_text)
    later = Place(place.plane, place.space, f"{place.group}-later")
    place.plane.apply(group(later.group, "/models"))
    later.made()
    assert tries() == 3  # not once for each change: the next one is due in eight seconds
    place.plane.apply(group(bad.group, "/models"))  # corrected: that is tried at once
    until(lambda: place.plane.request("GET", bad.claim).status == 200, seconds=5)
    bad.made()
    for one in (bad, later):
        place.plane.request("DELETE", f"{GROUPS}/{one.group}").ok()


def test_a_namespace_that_is_going_is_left_alone(place: Place, controller: Controller) -> None:
    place.made()
    place.plane.request("DELETE", f"/api/v1/namespaces/{place.space}").ok()
    until(place.gone, controller.log_text)
    begun = len(place.plane.audit())
    other = Place(place.plane, f"{place.space}-other", place.group)
    namespace(place.plane, other.space, inject="enabled")
    other.made()
    other.label(None)
    paths = [event["requestURI"] for event in _written(place.plane, begun)]
    assert [path for path in paths if f"/namespaces/{place.space}/" in path] == []
    assert place.events() == []


def test_an_api_server_that_was_away_costs_nothing(place: Place, controller: Controller) -> None:
    before = [one["metadata"]["uid"] for one in place.made()]
    begun = len(place.plane.audit())
    place.plane.restart_apiserver()
    later = Place(place.plane, f"{place.space}-later", place.group)
    namespace(place.plane, later.space, inject="enabled")
    later.made()
    deleted = [e["requestURI"] for e in _written(place.plane, begun) if e["verb"] == "delete"]
    assert {place.volume, place.claim}.isdisjoint(deleted)  # of other tests may be
    after = [place.plane.request("GET", path).ok() for path in (place.volume, place.claim)]
    assert [one["metadata"]["uid"] for one in after] == before
    later.label(None)


def _written(plane: ControlPlane, since: int) -> list[dict[str, Any]]:
    """What the controller has written since so many lines of the audit log."""
    return [
        event
        for event in plane.audit()[since:]
        if event["user"]["username"].endswith(f":{ACCOUNT}")
        and event["verb"] not in ("get", "list", "watch")
    ]


def _pods_listed(plane: ControlPlane) -> int:
    """How often the controller asked who mounts a claim."""
    return sum(
        event["user"]["username"].endswith(f":{ACCOUNT}")
        and event["verb"] == "list"
        and event["objectRef"]["resource"] == "pods"
        for event in plane.audit()
    )
