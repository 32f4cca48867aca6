"""What tests put on the node: a cache volume with its claim, and pods that look into it."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cluster.control_plane import KubectlError
from tests.machine import until
from tests.node.host import NAME
from tests.node.node import BUSYBOX, Node

PATIENCE = 60.0
"""Seconds. kubelet tries again after up to 15 of them, and the machine may be busy."""

SLEEP = "trap exit TERM; while :; do sleep 0.1; done"
"""A server that ends at once when it is told to."""


def volume(name: str, path: Path, *, mount_options: Sequence[str] = ()) -> dict[str, Any]:
    """A local PersistentVolume on the node, as KServe makes them for a node group."""
    on_the_node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NAME]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "1Gi"},
            "local": {"path": str(path)},
            "mountOptions": list(mount_options),
            "nodeAffinity": {
                "required": {"nodeSelectorTerms": [{"matchExpressions": [on_the_node]}]}
            },
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "local-storage",
        },
    }


def claim(name: str) -> dict[str, Any]:
    """The claim on the volume of the same name."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": "local-storage",
            "volumeName": name,
        },
    }


def container(name: str, script: str, mounts: Mapping[str, str]) -> dict[str, Any]:
    """busybox running a script; `mounts` are sub-paths of the claim by where they are mounted."""
    return {
        "name": name,
        "image": BUSYBOX,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", script],
        "volumeMounts": [
            {
                "name": "cache",
                "mountPath": at,
                "readOnly": True,
                **({"subPath": sub} if sub else {}),
            }
            for at, sub in mounts.items()
        ],
    }


class Pod:
    """A pod, and what became of it."""

    def __init__(self, node: Node, name: str, namespace: str = "default") -> None:
        self.name = name
        self.namespace = namespace
        self._plane = node.plane

    def get(self) -> dict[str, Any]:
        found: dict[str, Any] = self._plane.request(
            "GET", f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        ).ok()
        return found

    def container(self, name: str = "server") -> dict[str, Any]:
        """The status of one container; empty while there is none."""
        status = self.get()["status"]
        both = status.get("initContainerStatuses", []) + status.get("containerStatuses", [])
        return next((one for one in both if one["name"] == name), {})

    def waits_for(self, name: str = "server") -> str:
        """The reason why a container does not run, as `kubectl get pods` shows it."""
        return str(self.container(name).get("state", {}).get("waiting", {}).get("reason", ""))

    def events(self, reason: str) -> list[str]:
        """The messages of its events with that reason, as often as they came."""
        query = f"fieldSelector=involvedObject.name={self.name},reason={reason}"
        path = f"/api/v1/namespaces/{self.namespace}/events?{query}"
        found = self._plane.request("GET", path).ok()
        return [one["message"] for one in found["items"] for _ in range(one.get("count") or 1)]

    def wait_running(
        self, name: str = "server", *, restarts: int = 0, seconds: float = PATIENCE
    ) -> "Pod":
        def runs() -> bool:
            status = self.container(name)
            assert status.get("restartCount", 0) <= restarts, status
            return "running" in status.get("state", {}) and status["restartCount"] == restarts

        until(runs, self.describe, seconds=seconds)
        return self

    def run(self, *command: str, container: str = "server") -> str:
        """What a command prints in it."""
        return self._plane.kubectl(
            "exec", self.name, "-n", self.namespace, "-c", container, "--", *command
        )

    def log(self, container: str, *flags: str) -> str:
        return self._plane.kubectl("logs", self.name, "-n", self.namespace, "-c", container, *flags)

    def end(self) -> None:
        """Have its server end, and so be started again."""
        with suppress(KubectlError):  # the container may be gone before the command has ended
            self.run("kill", "1")

    def describe(self) -> str:
        return self._plane.kubectl("describe", "pod", self.name, "-n", self.namespace)


class Lab:
    """One test's volume, claim and pods, all named after the test; `close` removes them."""

    def __init__(self, node: Node, name: str, path: Path) -> None:
        self.node = node
        self.name = name
        self.path = path
        """The volume's directory on the host; made by the test."""
        self._made: list[dict[str, Any]] = []

    def apply(self, *objects: dict[str, Any]) -> None:
        self._made += objects
        self.node.plane.apply(*objects)

    def bind(self, *, mount_options: Sequence[str] = ()) -> None:
        """Make the volume and its claim, until they are bound."""
        self.apply(volume(self.name, self.path, mount_options=mount_options), claim(self.name))
        self.wait_bound()

    def wait_bound(self) -> None:
        def phase() -> str:
            return str(self.node.plane.get("pvc", self.name)["status"].get("phase"))

        until(lambda: phase() == "Bound", phase)

    def pod(
        self,
        *containers: dict[str, Any],
        read_only: bool,
        init: Sequence[dict[str, Any]] = (),
        security: Mapping[str, Any] | None = None,
    ) -> Pod:
        """A pod with the claim; `read_only` is that of its volume, not of its mounts."""
        name = f"{self.name}-{len(self._made)}"
        source = {"claimName": self.name, "readOnly": read_only}
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": "default"},
                "spec": {
                    "automountServiceAccountToken": False,
                    "terminationGracePeriodSeconds": 1,
                    "securityContext": dict(security or {}),
                    "initContainers": list(init),
                    "containers": list(containers),
                    "volumes": [{"name": "cache", "persistentVolumeClaim": source}],
                },
            }
        )
        return Pod(self.node, name)

    def close(self) -> None:
        """Pods first: a claim is not gone before they are."""
        for made in reversed(self._made):
            kind, metadata = made["kind"], made["metadata"]
            try:
                self.node.plane.kubectl(
                    "delete", kind, metadata["name"], "-n", metadata.get("namespace", "default"),
                    "--ignore-not-found", "--wait=false",
                )  # fmt: skip
            except KubectlError as error:
                raise AssertionError(f"{json.dumps(made)}: {error}") from error
