"""The real controller beside the real API server: under the shipped account, called by the shipped
webhook configuration, on loopback."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from tests import leaks
from tests.cluster.control_plane import ControlPlane
from tests.cluster.identity import LEASES, NAMESPACE
from tests.machine import REPOSITORY, Server, replace, until

ACCOUNT = "localmodel-controller"
REGISTRATION = "/apis/admissionregistration.k8s.io/v1"
MUTATING = f"{REGISTRATION}/mutatingwebhookconfigurations/localmodel-hook"
VALIDATING = f"{REGISTRATION}/validatingwebhookconfigurations/localmodel-hook"
PODS = "/api/v1/namespaces/{}/pods"
SECRET = f"/api/v1/namespaces/{NAMESPACE}/secrets/localmodel-hook"


class Controller(Server):
    """One replica."""

    @functools.cached_property
    def hook_port(self) -> int:
        def bound() -> int:
            assert self.process.poll() is None, self.log_text()
            found = self.said("the hook answers on 127.0.0.1:")
            return int(found[0].rpartition(":")[2]) if found else 0

        return until(bound, self.log_text)

    def wait_ready(self) -> "Controller":
        until(lambda: self.get("/readyz")[0] == 200, self.log_text)
        return self


class Controllers:
    """Replicas on one API server, and which of them it calls."""

    def __init__(self, plane: ControlPlane, home: Path) -> None:
        self.plane = plane
        self.home = home
        home.mkdir()
        token = home / "token"
        replace(token, plane.token(ACCOUNT, NAMESPACE))
        self._kubeconfig = plane.token_kubeconfig(home / "kubeconfig", token)
        self._running: list[Controller] = []

    def start(
        self, *flags: str, mode: str = "kserve", look_seconds: float | None = None
    ) -> Controller:
        """`look_seconds`: the leader looks that often at what no watch tells."""
        number = len(self._running)
        path = self.home / f"controller-{number}.log"
        arguments = [
            *(sys.executable, "-m", *_program(look_seconds), "--mode", mode),
            *("--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"),
            *("--names", "127.0.0.1", "--drain-seconds", "0", *flags),
        ]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "KUBECONFIG": str(self._kubeconfig),
            "POD_NAME": f"controller-{number}",
            "POD_NAMESPACE": NAMESPACE,
        }
        with path.open("wb") as log:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env=environment,
            )
        made = Controller(process, path)
        self._running.append(made)
        return made

    def called(self, controller: Controller) -> None:
        """From now on the API server calls this one, by the shipped configuration."""
        self.call(f"https://127.0.0.1:{controller.hook_port}")
        until(self._trusted, controller.log_text)

    def call(self, base: str) -> None:
        for path in (MUTATING, VALIDATING):
            until(lambda path=path: self._redirected(path, base), path)  # type: ignore[misc]

    def _redirected(self, path: str, base: str) -> bool:
        """Not if a controller wrote it meanwhile."""
        if (answer := self.plane.request("GET", path)).status == 404:
            return True
        found = answer.ok()
        for hook in found["webhooks"]:
            config = hook["clientConfig"]
            config["url"] = f"{base}/{config['url'].rpartition('/')[2]}"
        written = self.plane.request("PUT", path, found)
        return written.status != 409 and bool(written.ok())

    def _trusted(self) -> bool:
        secret = self.plane.request("GET", SECRET).ok().get("data") or {}
        found = [self.plane.request("GET", path) for path in (MUTATING, VALIDATING)]
        hooks = [hook for one in found if one.status != 404 for hook in one.ok()["webhooks"]]
        return all(h["clientConfig"].get("caBundle") == secret.get("ca.crt") for h in hooks)

    def close(self) -> None:
        for controller in self._running:
            if controller.process.poll() is None:
                leaks.check("/metrics", controller.get("/metrics")[1])
                controller.kill()
            text = controller.log_text()
            assert "Traceback" not in text, text
            assert "never retrieved" not in text, text
            leaks.check("a controller's log", text)


def _program(look_seconds: float | None) -> tuple[str, ...]:
    if look_seconds is None:
        return "agent", "controller"
    return "tests.cluster.hurried", str(look_seconds)


@contextmanager
def controllers(plane: ControlPlane, home: Path) -> Iterator[Controllers]:
    made = Controllers(plane, home)
    try:
        yield made
    finally:
        made.close()


def ready_node(plane: ControlPlane, name: str, **labels: str) -> None:
    """A Node that is Ready with a GPU, and the Lease of its agent."""
    body = {"metadata": {"name": name, "labels": labels}}
    plane.request("POST", "/api/v1/nodes", body).ok()
    status = {
        "conditions": [{"type": "Ready", "status": "True"}],
        "allocatable": {"nvidia.com/gpu": "1", "cpu": "8"},
    }
    plane.request("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}).ok()
    taints = {"spec": {"taints": None}}  # the API server adds not-ready, a controller removes it
    plane.request("PATCH", f"/api/v1/nodes/{name}", taints).ok()
    beat(plane, name)


def beat(plane: ControlPlane, name: str) -> None:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    spec = {"holderIdentity": "agent", "leaseDurationSeconds": 120, "renewTime": now}
    plane.request("POST", LEASES, {"metadata": {"name": name}, "spec": spec}).ok()


def namespace(plane: ControlPlane, name: str, **labels: str) -> None:
    marks = {f"localmodel-agent.io/{key}": value for key, value in labels.items()}
    plane.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": marks}}
    )
    account = {"metadata": {"name": "default"}}
    plane.request("POST", f"/api/v1/namespaces/{name}/serviceaccounts", account)


def bind(plane: ControlPlane, space: str, name: str) -> None:
    """What kube-controller-manager would do."""
    path = f"/api/v1/namespaces/{space}/persistentvolumeclaims/{name}"
    until(lambda: plane.request("GET", path).status == 200, "no claim")
    plane.request("PATCH", f"{path}/status", {"status": {"phase": "Bound"}}).ok()


def lead(plane: ControlPlane) -> str:
    """The pod that the controllers' Lease names, "" for none."""
    spec = plane.request("GET", f"{LEASES}/{ACCOUNT}").ok().get("spec") or {}
    return str(spec.get("holderIdentity") or "").rpartition("/")[2]


def as_installed(plane: ControlPlane) -> None:
    """What the controllers write is as the manifests leave it: empty."""
    plane.request("PATCH", SECRET, {"data": None}).ok()
    plane.request("PATCH", f"{LEASES}/{ACCOUNT}", {"spec": None}).ok()
    for path in (MUTATING, VALIDATING):
        if (answer := plane.request("GET", path)).status == 404:
            continue
        found = answer.ok()
        for hook in found["webhooks"]:
            hook["clientConfig"].pop("caBundle", None)
        plane.request("PUT", path, found).ok()
