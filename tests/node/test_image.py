"""The image that our Dockerfile makes: what is in it, and that it needs nothing of its root."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from agent import __version__
from tests.machine import until
from tests.node.image import NAME
from tests.node.node import Node

_MEGABYTE = 1_000_000


class Archive:
    """A `docker save` archive, read."""

    def __init__(self, path: Path) -> None:
        with tarfile.open(path) as archive:

            def member(name: str) -> Any:
                found = archive.extractfile(name)
                assert found is not None
                return found

            manifest = json.load(member("manifest.json"))[0]
            self.config: dict[str, Any] = json.load(member(manifest["Config"]))["config"]
            self.layers: list[dict[str, int]] = []
            for name in manifest["Layers"]:
                with tarfile.open(fileobj=member(name)) as layer:
                    self.layers.append({one.name: one.size for one in layer})


@pytest.fixture(scope="module")
def archive(agent_image: Path) -> Archive:
    return Archive(agent_image)


def test_its_user_is_a_number_and_its_command_is_the_agent(archive: Archive) -> None:
    assert archive.config["User"] == "64000:64000"
    assert archive.config["Entrypoint"] == ["localmodel"]
    assert archive.config["Cmd"] == ["agent"]
    assert archive.config["Labels"]["org.opencontainers.image.title"] == "localmodel-agent"


def test_nothing_in_it_compiles_or_installs(archive: Archive) -> None:
    _, *ours = archive.layers
    tool = re.compile(r"(^|/)(pip|pip3|cc|gcc|c\+\+|g\+\+|ld|make|cargo|go)$")
    assert [path for layer in archive.layers for path in layer if tool.search(path)] == []
    tests = re.compile(r"/site-packages/(pytest|mypy|ruff|hypothesis|hatchling)($|[/-])")
    assert [path for layer in ours for path in layer if tests.search(path)] == []


def test_a_new_version_of_the_agent_is_a_small_layer_on_a_large_one(archive: Archive) -> None:
    _, *without, dependencies, agent = [sum(layer.values()) for layer in archive.layers]
    assert sum(without) < 0.1 * _MEGABYTE
    assert dependencies < 210 * _MEGABYTE  # 13 of them for the hook's certificates
    assert agent < 3 * _MEGABYTE


def test_it_runs_with_nothing_a_pod_can_take_away(node: Node, agent_image: Path) -> None:
    """kubelet itself checks `runAsNonRoot`; the file system is read-only, no mount at all."""
    node.load(agent_image)
    node.plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "image", "namespace": "default"},
            "spec": {
                "automountServiceAccountToken": False,
                "restartPolicy": "Never",
                "containers": [
                    {
                        "name": "image",
                        "image": NAME,
                        "imagePullPolicy": "Never",
                        "command": ["sh", "-ec", "id -u; localmodel --version; ! touch /tmp/x"],
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                            "readOnlyRootFilesystem": True,
                            "runAsNonRoot": True,
                        },
                    }
                ],
            },
        }
    )

    def ended() -> bool:
        phase = node.plane.get("pod", "image")["status"]["phase"]
        return phase in ("Succeeded", "Failed")

    until(ended, lambda: node.plane.kubectl("describe", "pod", "image"))
    printed = node.plane.kubectl("logs", "image").splitlines()
    assert printed[0] == "64000"
    assert __version__ in printed[1]
    assert node.plane.get("pod", "image")["status"]["phase"] == "Succeeded", printed
    node.plane.kubectl("delete", "pod", "image", "--wait=false")
