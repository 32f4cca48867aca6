"""What we ship, installed on the real node as the README says, and what is to be seen of it."""

import os
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import yaml

from agent import layout
from agent.model import cache_key
from tests.cluster.control_plane import KubectlError
from tests.cluster.identity import NAMESPACE, make_kserves_namespaces
from tests.fakes.hub import Hub
from tests.machine import REPOSITORY, until
from tests.node.host import NAME
from tests.node.image import NAME as IMAGE
from tests.node.node import STATE, Node, on_host
from tests.node.objects import PATIENCE

AGENT = "localmodel-agent"
CONTROLLER = "localmodel-controller"
OWNER = 64000
GROUP = "gpu"
"""The node group of `crds/examples`, whose only node this is."""


class Agent:
    """The agent's pod, whichever it is now, and what it says in its LocalModelNode."""

    def __init__(self, node: Node, hub: Hub) -> None:
        self.node = node
        self.hub = hub
        self._wanted: dict[str, str] = {}

    def pods(self, name: str = AGENT) -> list[dict[str, Any]]:
        label = f"app.kubernetes.io/name={name}"
        found: list[dict[str, Any]] = self.node.plane.get("pods", "-n", NAMESPACE, "-l", label)[
            "items"
        ]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def wait_ready(self) -> dict[str, Any]:
        """Until there is a ready one; which."""

        def ready() -> dict[str, Any]:
            for pod in self.pods():
                for condition in pod["status"].get("conditions", []):
                    if (condition["type"], condition["status"]) == ("Ready", "True"):
                        return pod
            return {}

        return until(ready, self.describe, seconds=PATIENCE)

    def want(self, name: str, repo: str) -> Path:
        """Have KServe's controller ask for one more model; the directory where it should be."""
        uri = f"hf://{repo}"
        self._wanted[name] = uri
        self._ask()
        return on_host("/models") / layout.model(cache_key(uri))

    def forget(self, name: str) -> None:
        """Have the controller not ask for it any more."""
        del self._wanted[name]
        self._ask()

    def _ask(self) -> None:
        models = [
            {"modelName": name, "sourceModelUri": uri, "nodeGroup": GROUP}
            for name, uri in self._wanted.items()
        ]
        self.node.plane.apply(
            {
                "apiVersion": "serving.kserve.io/v1alpha1",
                "kind": "LocalModelNode",
                "metadata": {"name": NAME},
                "spec": {"localModels": models},
            }
        )

    def status(self) -> dict[str, str]:
        found = self.node.plane.get("localmodelnode", NAME)
        return dict(found.get("status", {}).get("modelStatus", {}))

    def wait_downloaded(self, name: str, *, seconds: float = PATIENCE) -> None:
        until(lambda: self.status().get(name) == "ModelDownloaded", self.describe, seconds=seconds)

    def wait_controllers(self) -> None:
        """Until both are ready."""

        def ready() -> bool:
            found = self.node.plane.get("deployment", CONTROLLER, "-n", NAMESPACE)
            return bool(found["status"].get("readyReplicas") == 2)

        until(ready, self.describe_controllers, seconds=PATIENCE)

    def describe_controllers(self) -> str:
        plane = self.node.plane
        parts = [plane.kubectl("get", "pods,events", "-n", NAMESPACE)]
        for pod in self.pods(CONTROLLER):
            parts.append(plane.kubectl("logs", pod["metadata"]["name"], "-n", NAMESPACE))
        return "\n".join(parts)

    def verb(self, *arguments: str) -> str:
        """What a verb in the agent's pod prints, whether it is so or not."""
        pod = self.wait_ready()["metadata"]["name"]
        command = ("localmodel", *arguments)
        try:
            return self.node.plane.kubectl(
                "exec", pod, "-n", NAMESPACE, "-c", "agent", "--", *command
            )
        except KubectlError as error:
            return str(error)

    def metric(self, name: str) -> float:
        """Of the agent, by the address that Prometheus would ask."""
        address = self.wait_ready()["status"]["podIP"]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{address}:9810/metrics", timeout=10) as page:
            text = page.read().decode()
        (line,) = [line for line in text.splitlines() if line.split(" ")[0] == name]
        return float(line.split()[1])

    def process(self) -> psutil.Process:
        """The agent's, as the host sees it."""
        found = [
            process
            for process in psutil.process_iter(["cmdline", "uids"])
            if process.info["uids"].real == OWNER
            and "agent" in (process.info["cmdline"] or ())[1:3]
        ]
        (agent,) = found
        return agent

    def describe(self) -> str:
        """For the message of a test that waits in vain."""
        plane = self.node.plane
        parts = [plane.kubectl("describe", "daemonsets,pods", "-n", NAMESPACE)]
        for pod in self.pods():
            name, status = pod["metadata"]["name"], pod["status"]
            for one in status.get("initContainerStatuses", []) + status.get(
                "containerStatuses", []
            ):
                if "containerID" in one:
                    parts.append(plane.kubectl("logs", name, "-n", NAMESPACE, "-c", one["name"]))
        parts.append(plane.kubectl("get", "localmodelnodes", "-o", "yaml"))
        return "\n".join(parts)


def install(node: Node, hub: Hub, image: Path) -> Agent:
    """CRDs, the node group, and the overlay with our image and the hub's address."""
    node.load(image)
    plane = node.plane
    plane.kubectl("apply", "--server-side", "-k", REPOSITORY / "crds")
    plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    group = REPOSITORY / "crds/examples/localmodelnodegroup.yaml"
    plane.kubectl("apply", "--server-side", "-f", group)
    plane.kubectl("label", "node", NAME, "kserve/localmodel=worker")
    make_kserves_namespaces(plane)
    plane.kubectl("apply", "--server-side", "-k", _overlay(hub))
    agent = Agent(node, hub)
    agent.wait_ready()
    return agent


def _overlay(hub: Hub) -> Path:
    """The shipped overlay with our image, and the hub in the agent's environment."""
    directory = STATE / "overlay"
    directory.mkdir()
    endpoint = {"name": "HF_ENDPOINT", "value": hub.endpoint}
    patch = [{"op": "add", "path": "/spec/template/spec/containers/0/env/-", "value": endpoint}]
    name, _, tag = IMAGE.rpartition(":")
    kustomization = {
        "resources": [os.path.relpath(REPOSITORY / "daemonset/overlays/kserve", directory)],
        "images": [{"name": "localmodel-agent", "newName": name, "newTag": tag}],
        "patches": [{"target": {"kind": "DaemonSet"}, "patch": yaml.safe_dump(patch)}],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return directory
