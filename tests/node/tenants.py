"""Namespaces of users on the real node, and the predictor pods that KServe would make in them.

KServe itself does not run there: the pods are those that its webhook made of real services
(`tests/hook/data`), with images that this node has. The initializer's is a stand-in: at KServe's
path it has a script that downloads from the hub by itself, as the real one would.
"""

import shutil
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agent.model import cache_key
from tests.fakes.hub import Hub
from tests.hook.pods import golden
from tests.machine import until
from tests.node.archive import pack
from tests.node.installation import GROUP
from tests.node.node import BUSYBOX, Node
from tests.node.objects import PATIENCE, SLEEP, Pod, claim, volume
from tests.node.packages import CACHE, made_once, run, unpacked

INITIALIZER = "localhost/storage-initializer:dev"
ENTRYPOINT = "storage-initializer/scripts/initializer-entrypoint"
SERVER = "kserve-container"
CLAIM = f"localmodel-{GROUP}"

_DOWNLOADS = """\
#!/bin/sh
# What KServe's own initializer does: each `URI DESTINATION` from its origin into its place.
set -e
while [ $# -gt 1 ]; do
    for file in $FILES; do
        mkdir -p "$2/$(dirname "$file")"
        wget -q -O "$2/$file" "$ORIGIN/${1#hf://}/resolve/main/$file"
    done
    echo "downloaded $1"
    shift 2
done
"""


def initializer_image() -> Path:
    def make(archive: Path) -> None:
        packages = unpacked("busybox-static")
        with TemporaryDirectory() as directory:
            programs, script = Path(directory, "bin"), Path(directory, ENTRYPOINT)
            programs.mkdir()
            script.parent.mkdir(parents=True)
            busybox = Path(shutil.copy(packages / "bin/busybox", programs))
            for applet in set(run(busybox, "--list").split()) - {busybox.name}:
                (programs / applet).symlink_to(busybox.name)
            script.write_text(_DOWNLOADS)
            script.chmod(0o755)
            pack(archive, INITIALIZER, Path(directory), entrypoint=[f"/{ENTRYPOINT}"])

    return made_once(CACHE / f"initializer-{zlib.crc32(_DOWNLOADS.encode()):x}.tar", make)


class Tenant:
    """A namespace of a team, labelled for the cache."""

    def __init__(
        self, node: Node, hub: Hub, name: str, *, restricted: bool = False, label: bool = True
    ) -> None:
        self.node = node
        self.name = name
        self._hub = hub
        labels = {"localmodel-agent.io/inject": "enabled"} if label else {}
        if restricted:
            labels["pod-security.kubernetes.io/enforce"] = "restricted"
        metadata = {"name": name, "labels": labels}
        node.plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        path = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        until(lambda: node.plane.request("GET", path).status == 200, "no ServiceAccount")

    def wait_claim(self) -> None:
        """Until the controllers have made the claim of the group, and it is bound."""
        path = f"/api/v1/namespaces/{self.name}/persistentvolumeclaims/{CLAIM}"

        def bound() -> bool:
            answer = self.node.plane.request("GET", path)
            return answer.status == 200 and answer.body["status"].get("phase") == "Bound"

        until(bound, lambda: self.node.plane.kubectl("get", "pv,pvc", "-A"), seconds=PATIENCE)
        time.sleep(1)  # until both controllers have heard of it, too: a watch takes milliseconds

    def predictor(
        self,
        name: str,
        uri: str,
        files: Iterable[str],
        *,
        annotations: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The pod of an InferenceService with this storageUri, for a cluster without this model."""
        pod = golden("uncached-hf")
        self._here(pod, name)
        pod["metadata"]["annotations"] |= dict(annotations or {})
        (initializer,) = pod["spec"]["initContainers"]
        initializer |= {"image": INITIALIZER, "imagePullPolicy": "Never", "resources": {}}
        initializer["args"][0] = uri
        initializer["env"] = [
            {"name": "ORIGIN", "value": self._hub.endpoint},
            {"name": "FILES", "value": " ".join(files)},
        ]
        return pod

    def rewritten(self, name: str, uri: str, claim_name: str) -> dict[str, Any]:
        """The pod as KServe made it onto a claim of its own."""
        pod = golden("cached-hf")
        self._here(pod, name)
        notes = pod["metadata"]["annotations"]
        kserve = "internal.serving.kserve.io"
        old = notes[f"{kserve}/localmodel-sourceuri"]
        notes |= {
            f"{kserve}/localmodel-sourceuri": uri,
            f"{kserve}/localmodel-pvc-name": claim_name,
        }
        (source,) = [v for v in pod["spec"]["volumes"] if v["name"] == "kserve-pvc-source"]
        source["persistentVolumeClaim"]["claimName"] = claim_name
        for mount in pod["spec"]["containers"][0]["volumeMounts"]:
            if "subPath" in mount:
                mount["subPath"] = mount["subPath"].replace(cache_key(old), cache_key(uri))
        return pod

    def _here(self, pod: dict[str, Any], name: str) -> None:
        del pod["metadata"]["generateName"]
        pod["metadata"] |= {"name": name, "namespace": self.name}
        pod["spec"] |= {"terminationGracePeriodSeconds": 1, "automountServiceAccountToken": False}
        pod["spec"]["securityContext"] = {"runAsUser": 12345, "runAsGroup": 12345}
        (server,) = pod["spec"]["containers"]
        server |= {
            **{"image": BUSYBOX, "imagePullPolicy": "Never", "resources": {}},
            **{"command": ["sh", "-c", SLEEP], "args": []},
        }
        server.pop("readinessProbe", None)

    def create(self, pod: Mapping[str, Any]) -> Pod:
        path = f"/api/v1/namespaces/{self.name}/pods"
        self.node.plane.request("POST", path, dict(pod)).ok()
        return Pod(self.node, pod["metadata"]["name"], self.name)

    def remove(self, pod: Pod) -> None:
        self.node.plane.kubectl("delete", "pod", pod.name, "-n", self.name, "--wait=true")

    def close(self) -> None:
        self.node.plane.kubectl("delete", "namespace", self.name, "--wait=false")


def tree(pod: Pod, path: str = "/mnt/models") -> dict[str, str]:
    """The SHA-256 of every file that its server sees below a path, by name."""
    script = 'cd "$1" && find -L . -type f | sort | xargs sha256sum'
    lines = pod.run("sh", "-c", script, "sh", path, container=SERVER).splitlines()
    return {name.removeprefix("./"): digest for digest, name in map(str.split, lines)}


def claim_of_kserve(tenant: Tenant, name: str) -> None:
    """The volume and claim that KServe's controller makes for an InferenceService."""
    made = volume(f"{name}-{tenant.name}", Path("/models"))
    wanted = claim(name)
    wanted["metadata"]["namespace"] = tenant.name
    wanted["spec"]["volumeName"] = made["metadata"]["name"]
    plane = tenant.node.plane
    plane.apply(made, wanted)
    path = f"/api/v1/namespaces/{tenant.name}/persistentvolumeclaims/{name}"
    until(lambda: plane.request("GET", path).ok()["status"].get("phase") == "Bound", "not bound")
