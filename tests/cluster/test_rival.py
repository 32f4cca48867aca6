"""`--mode standalone` beside KServe's own local model controller: it keeps nothing, and says so.

There is no KServe here: its Lease is all that the controller sees of it.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from agent.rival import LEASE
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import (
    ACCOUNT,
    SECRET,
    Controller,
    Controllers,
    as_installed,
    controllers,
    namespace,
)
from tests.cluster.identity import KSERVE, NAMESPACE
from tests.cluster.nodes import group
from tests.machine import until

LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{KSERVE}/leases"
RIVAL = f"{LEASES}/{LEASE}"


@pytest.fixture(scope="module")
def plane(module_control_plane: Callable[..., ControlPlane]) -> ControlPlane:
    plane = module_control_plane(overlay="standalone")
    plane.apply(group("gpu1", "/models"))
    return plane


@pytest.fixture
def replicas(plane: ControlPlane, tmp_path: Path) -> Iterator[Controllers]:
    as_installed(plane)
    try:
        with controllers(plane, tmp_path / "controllers") as made:
            yield made
    finally:
        plane.request("DELETE", RIVAL)


def rival(plane: ControlPlane, *, seconds: int) -> None:
    """KServe's controller has just renewed its Lease, which lasts so long."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    spec = {"holderIdentity": "kserve-x", "leaseDurationSeconds": seconds, "renewTime": now}
    plane.request("POST", LEASES, {"metadata": {"name": LEASE}, "spec": spec}).ok()


def leads(controller: Controller) -> bool:
    return controller.metrics()["localmodel_controller_leader"] == 1


def test_it_keeps_nothing_beside_kserves_controller_until_that_has_gone(
    plane: ControlPlane, replicas: Controllers
) -> None:
    rival(plane, seconds=3600)
    controller = replicas.start(mode="standalone", look_seconds=0.5)
    until(lambda: controller.said("KServe's own local model controller runs"))
    status, why = controller.get("/readyz")
    assert status == 503
    assert "kserve-x" in why
    assert "apply the overlay kserve, or remove KServe's" in why
    path = f"/api/v1/namespaces/{NAMESPACE}/events"

    def told() -> list[Any]:
        found = plane.request("GET", path).ok()["items"]
        return [one for one in found if one["reason"] == "OtherAgent"]

    event = until(told, controller.log_text)[0]
    assert event["involvedObject"]["name"] == ACCOUNT
    assert event["involvedObject"]["kind"] == "Deployment"
    assert not leads(controller)
    assert not plane.request("GET", SECRET).ok().get("data")
    plane.request("DELETE", RIVAL).ok()
    replicas.called(controller)  # it makes certificates now
    controller.wait_ready()
    until(lambda: leads(controller), controller.log_text)


def test_it_stops_when_kserves_controller_comes(plane: ControlPlane, replicas: Controllers) -> None:
    controller = replicas.start(mode="standalone", look_seconds=0.5)
    replicas.called(controller)
    controller.wait_ready()
    rival(plane, seconds=3600)
    until(lambda: controller.get("/readyz")[0] == 503, controller.log_text)
    until(lambda: not leads(controller), controller.log_text)
    plane.request("PATCH", SECRET, {"data": None}).ok()
    namespace(plane, "team-beside", inject="enabled")
    until(lambda: len(_looks(plane)) > 2, controller.log_text)
    assert not plane.request("GET", SECRET).ok().get("data")
    claims = "/api/v1/namespaces/team-beside/persistentvolumeclaims"
    assert plane.request("GET", claims).ok()["items"] == []
    plane.request("DELETE", RIVAL).ok()
    until(lambda: len(plane.request("GET", claims).ok()["items"]) == 1, controller.log_text)


def _looks(plane: ControlPlane) -> list[Any]:
    """Looks at the Lease since it was last written."""
    found = [e for e in plane.audit() if e.get("objectRef", {}).get("name") == LEASE]
    since = max(i for i, event in enumerate(found) if event["verb"] == "create")
    return found[since:]


def test_a_lease_that_nobody_renews_is_no_obstacle(
    plane: ControlPlane, replicas: Controllers
) -> None:
    rival(plane, seconds=1)
    controller = replicas.start(mode="standalone", look_seconds=0.5)
    replicas.called(controller)
    controller.wait_ready()


def test_beside_kserve_it_does_not_ask(plane: ControlPlane, replicas: Controllers) -> None:
    rival(plane, seconds=3600)
    controller = replicas.start(mode="kserve")
    replicas.called(controller)
    controller.wait_ready()
    assert [event["verb"] for event in _looks(plane)] == ["create"]


def test_without_the_right_to_ask_it_keeps_nothing(
    plane: ControlPlane, replicas: Controllers
) -> None:
    """Nobody knows then who else writes."""
    role = f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{ACCOUNT}-standalone"
    before = plane.request("GET", role).ok()
    plane.request("PATCH", role, {"rules": []}).ok()
    token = plane.token(ACCOUNT, NAMESPACE)
    until(lambda: plane.request("GET", RIVAL, token=token).status == 403)
    controller = replicas.start(mode="standalone", look_seconds=0.5)
    until(lambda: controller.said("cannot tell whether KServe's own controller runs"))
    plane.request("PATCH", role, {"rules": before["rules"]}).ok()
    replicas.called(controller)
    controller.wait_ready()
