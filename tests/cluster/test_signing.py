"""The hook's certificates on a real API server: made, handed out, mended, replaced in service."""

import base64
import http.client
import json
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import (
    ACCOUNT,
    MUTATING,
    PODS,
    SECRET,
    Controller,
    Controllers,
    as_installed,
    controllers,
    lead,
    namespace,
)
from tests.cluster.identity import LEASES, install
from tests.cluster.impostor import certified
from tests.hook.pods import golden
from tests.machine import replace, until


@pytest.fixture(scope="module")
def plane(module_control_plane: Callable[..., ControlPlane]) -> ControlPlane:
    plane = module_control_plane()
    namespace(plane, "team-a")
    return plane


@pytest.fixture
def replicas(plane: ControlPlane, tmp_path: Path) -> Iterator[Controllers]:
    as_installed(plane)
    with controllers(plane, tmp_path / "controllers") as made:
        yield made


def secret(plane: ControlPlane) -> dict[str, str]:
    found: dict[str, str] = plane.request("GET", SECRET).ok().get("data") or {}
    return found


def bundle(plane: ControlPlane) -> str:
    (hook,) = plane.request("GET", MUTATING).ok()["webhooks"]
    return str(hook["clientConfig"].get("caBundle") or "")


def connected(
    plane: ControlPlane, controller: Controller
) -> tuple[http.client.HTTPSConnection, bytes]:
    """A connection, by what API servers are told to trust, and the certificate it was shown."""
    trusted = base64.b64decode(bundle(plane)).decode()
    context = ssl.create_default_context(cadata=trusted)
    made = http.client.HTTPSConnection(
        "127.0.0.1", controller.hook_port, timeout=10, context=context
    )
    made.connect()
    shown = made.sock.getpeercert(binary_form=True)
    assert isinstance(shown, bytes)
    return made, shown


def asked(connection: http.client.HTTPSConnection) -> bool:
    """Whether it answers a review on this very connection."""
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    request = {"uid": "1", "kind": kind, "operation": "CREATE", "object": {}}
    body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
    connection.request("POST", "/mutate", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    return bool(answer["response"]["allowed"])


def reviewed(plane: ControlPlane, controller: Controller) -> bool:
    """Whether the API server asks it about a pod, and is answered."""
    pod = golden("uncached-hf")

    def count() -> float:
        found = controller.metrics()
        return sum(v for name, v in found.items() if name.startswith("localmodel_hook_pods_total"))

    before = count()
    plane.request("POST", f"{PODS.format('team-a')}?dryRun=All", pod).ok()
    return count() > before


def written(plane: ControlPlane, since: int) -> set[str]:
    """The resources that controllers have written since so many lines of the audit log."""
    return {
        event["objectRef"]["resource"]
        for event in plane.audit()[since:]
        if event["user"]["username"].endswith(f":{ACCOUNT}")
        and event["verb"] not in ("get", "list", "watch")
    }


def test_the_first_start_makes_everything(plane: ControlPlane, replicas: Controllers) -> None:
    assert (secret(plane), bundle(plane)) == ({}, "")
    controller = replicas.start()
    replicas.called(controller)
    assert set(secret(plane)) == {"ca.crt", "ca.key", "tls.crt", "tls.key"}
    connection, shown = connected(plane, controller)
    assert ssl.DER_cert_to_PEM_cert(shown).encode() == base64.b64decode(secret(plane)["tls.crt"])
    assert asked(connection)
    connection.close()
    until(lambda: reviewed(plane, controller), controller.log_text)
    expiry = controller.metrics()["localmodel_hook_certificate_expiry_timestamp_seconds"]
    assert expiry > time.time() + 80 * 24 * 3600


def test_a_configuration_without_its_bundle_is_mended(
    plane: ControlPlane, replicas: Controllers
) -> None:
    controller = replicas.start(look_seconds=0.5)
    replicas.called(controller)
    before = secret(plane)
    found = plane.request("GET", MUTATING).ok()
    del found["webhooks"][0]["clientConfig"]["caBundle"]
    plane.request("PUT", MUTATING, found).ok()
    until(lambda: bundle(plane) == before["ca.crt"], controller.log_text)
    assert secret(plane) == before
    until(lambda: reviewed(plane, controller), controller.log_text)


def test_a_configuration_that_was_deleted_gets_it_again(
    plane: ControlPlane, replicas: Controllers
) -> None:
    controller = replicas.start(look_seconds=0.5)
    replicas.called(controller)
    found = plane.request("GET", MUTATING).ok()
    found["metadata"] = {"name": found["metadata"]["name"]}
    del found["webhooks"][0]["clientConfig"]["caBundle"]
    plane.request("DELETE", MUTATING).ok()
    plane.request("POST", MUTATING.rpartition("/")[0], found).ok()
    until(lambda: bundle(plane) == secret(plane)["ca.crt"], controller.log_text)


def test_applying_everything_again_takes_nothing_away(
    plane: ControlPlane, replicas: Controllers
) -> None:
    replicas.called(replicas.start())
    before, trusted = secret(plane), bundle(plane)
    install(plane)
    assert (secret(plane), bundle(plane)) == (before, trusted)


def test_a_secret_that_was_emptied_heals(plane: ControlPlane, replicas: Controllers) -> None:
    controller = replicas.start()
    replicas.called(controller)
    before = secret(plane)
    plane.request("PATCH", SECRET, {"data": None}).ok()

    def anew() -> bool:
        found = secret(plane)
        return bool(found) and bundle(plane) == found["ca.crt"] != before["ca.crt"]

    until(anew, controller.log_text)
    until(lambda: reviewed(plane, controller), controller.log_text)


def test_a_replica_that_does_not_lead_shows_what_is_new_and_drops_nobody(
    plane: ControlPlane, replicas: Controllers
) -> None:
    leader = replicas.start()
    replicas.called(leader)
    other = replicas.start()
    other.wait_ready()
    assert lead(plane) == "controller-0"
    opened = [connected(plane, one) for one in (leader, other)]
    assert opened[0][1] == opened[1][1]
    plane.request("PATCH", SECRET, {"data": {"tls.key": None}}).ok()

    def shows_another() -> bool:
        connection, shown = connected(plane, other)
        connection.close()
        return shown != opened[1][1]

    until(shows_another, other.log_text)
    sockets = [connection.sock for connection, _ in opened]
    for connection, _ in opened:
        assert asked(connection)
        assert asked(connection)
    assert [connection.sock for connection, _ in opened] == sockets  # not opened anew
    for connection, _ in opened:
        connection.close()


def test_what_somebody_else_renews_is_left_to_them(
    plane: ControlPlane, replicas: Controllers, tmp_path: Path
) -> None:
    directory = tmp_path / "tls"
    directory.mkdir()

    def put(held: Any) -> None:
        replace(directory / "tls.key", held.key)
        replace(directory / "tls.crt", held.certificate)
        found = plane.request("GET", MUTATING).ok()
        found["webhooks"][0]["clientConfig"]["caBundle"] = held.ca_bundle
        plane.request("PUT", MUTATING, found).ok()

    first, second = certified(), certified()
    put(first)
    begun = len(plane.audit())
    controller = replicas.start("--tls-dir", str(directory), look_seconds=0.5)
    replicas.call(f"https://127.0.0.1:{controller.hook_port}")
    until(lambda: reviewed(plane, controller), controller.log_text)
    put(second)
    until(lambda: reviewed(plane, controller), controller.log_text)
    assert (secret(plane), bundle(plane)) == ({}, second.ca_bundle)
    until(lambda: lead(plane) == "controller-0", controller.log_text)
    assert written(plane, begun) == {"leases"}


def test_a_directory_without_a_certificate_ends_it_and_it_says_what_to_do(
    replicas: Controllers, tmp_path: Path
) -> None:
    controller = replicas.start("--tls-dir", str(tmp_path))
    until(lambda: controller.process.poll() is not None, controller.log_text)
    assert "put tls.crt and tls.key (PEM) there" in controller.log_text()
    assert "never awaited" not in controller.log_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_another_replica_leads(
    plane: ControlPlane, replicas: Controllers, number: signal.Signals
) -> None:
    first = replicas.start()
    until(lambda: lead(plane) == "controller-0", first.log_text)
    second = replicas.start()
    second.wait_ready()
    assert lead(plane) == "controller-0"
    if number is signal.SIGTERM:
        assert first.stop() == 0
    else:
        first.kill()
        # Two minutes would be too long for a test; that they are waited for: tests/edges.
        short = {"spec": {"leaseDurationSeconds": 1}}
        plane.request("PATCH", f"{LEASES}/{ACCOUNT}", short).ok()
    until(lambda: lead(plane) == "controller-1", second.log_text)
    plane.request("PATCH", SECRET, {"data": None}).ok()  # and what a leader does, it does
    until(lambda: bundle(plane) == secret(plane).get("ca.crt"), second.log_text)
    until(lambda: second.metrics()["localmodel_controller_leader"] == 1)
