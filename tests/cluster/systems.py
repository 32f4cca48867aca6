"""A system of tests/systems on a real API server: what its users apply, its nodes, and its pods.

Nobody runs here but the API server and our controller. What others would do is done by hand: Nodes
become Ready, Leases are renewed, claims are bound, agents say what they hold.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from agent.model import claim_name
from tests.cluster.control_plane import Answer, ControlPlane
from tests.cluster.controllers import PODS, Controller, bind, ready_node
from tests.cluster.identity import LEASES, SERVING
from tests.cluster.nodes import local_model_node
from tests.hook.patches import check_only_ours
from tests.machine import REPOSITORY, until

FILES = REPOSITORY / "tests/systems"
DISABLE = "serving.kserve.io/disable-localmodel"
_VOLUMES = ("/api/v1/persistentvolumeclaims", "/api/v1/persistentvolumes")
_OUTCOMES = "localmodel_hook_pods_total "
_MADE_UP = ("name", "uid", "creationTimestamp", "managedFields", "generation", "resourceVersion")
_WARNING = re.compile(r'299 - "(.*)"')

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A pod as it is stored, what kubectl prints after `Warning: `, and the metric's label. `plain`
    is the pod as it would be stored if there were no hook, `path` where it is."""

    path: str
    pod: Json
    warnings: tuple[str, ...]
    outcome: str
    plain: Json

    @property
    def spec(self) -> Json:
        found: Json = self.pod["spec"]
        return found

    @property
    def claims(self) -> dict[str, Json]:
        """What it mounts of claims, by the volume's name."""
        return claims(self.pod)

    def note(self, name: str) -> str:
        return str(self.pod["metadata"].get("annotations", {}).get(f"localmodel-agent.io/{name}"))

    def mounts(self, container: str) -> dict[str, Json]:
        """By their path."""
        found = [*self.spec.get("initContainers", ()), *self.spec["containers"]]
        (one,) = (c for c in found if c["name"] == container)
        return {mount["mountPath"]: mount for mount in one["volumeMounts"]}


class System:
    """One file of tests/systems; a namespace and groups that no other has."""

    def __init__(self, plane: ControlPlane, controller: Controller, name: str) -> None:
        self.plane = plane
        self.controller = controller
        self.objects: list[Json] = list(yaml.safe_load_all((FILES / f"{name}.yaml").read_text()))
        self.namespace: str = self.named("Namespace")["metadata"]["name"]
        self._nodes: list[str] = []
        self._spaces: list[str] = []

    def named(self, kind: str, name: str | None = None) -> Json:
        (found,) = (
            copy.deepcopy(one)
            for one in self.objects
            if one["kind"] == kind and name in (None, one["metadata"]["name"])
        )
        return found

    def at(self, root: Path) -> None:
        """The cache of its nodes is in this directory."""
        for one in self.objects:
            if one["kind"] == "LocalModelNodeGroup":
                one["spec"]["persistentVolumeSpec"]["local"]["path"] = str(root)

    # -- what users do --------------------------------------------------------------------------

    def apply(self, *, but: str = "") -> None:
        """All of the file, but what has that name; then its claims are bound.

        Node groups first: the hook refuses a cache of a group that it has not seen, and sees one
        some milliseconds after `kubectl apply` went on.
        """
        wanted = [one for one in self.objects if one["metadata"]["name"] != but]
        groups = [one for one in wanted if one["kind"] in ("Namespace", "LocalModelNodeGroup")]
        self.add_namespace(self.namespace)
        self._kubectl_apply(groups)
        self.bind(self.namespace)
        self._kubectl_apply(wanted)

    def add(self, *objects: Json) -> None:
        self._kubectl_apply(objects)

    def add_namespace(self, name: str) -> None:
        """With the label that asks for claims; no token is mounted into its pods, which would have
        another name in each."""
        labels = {"localmodel-agent.io/inject": "enabled"}
        meta = {"name": name, "labels": labels}
        account = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "default", "namespace": name},
            "automountServiceAccountToken": False,
        }
        self.plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": meta}, account)
        self._spaces.append(name)

    def _kubectl_apply(self, objects: Any) -> None:
        text = yaml.safe_dump_all(objects)
        self.plane.kubectl("apply", "-f", "-", input=text)

    # -- what others do -------------------------------------------------------------------------

    def bind(self, namespace: str) -> None:
        for one in self.objects:
            if one["kind"] == "LocalModelNodeGroup":
                bind(self.plane, namespace, claim_name(one["metadata"]["name"]))

    def add_node(self, name: str, **labels: str) -> None:
        """Ready, with a GPU and a living agent. Labels by `__` for `/` and `_` for `.`; without
        any, those that the file's only node group selects."""
        found = {key.replace("__", "/").replace("_", "."): value for key, value in labels.items()}
        ready_node(self.plane, name, **(found or self._selected()))
        self._nodes.append(name)

    def taint(self, node: str, key: str) -> None:
        """As clusters keep other pods from their GPU nodes."""
        body = {"spec": {"taints": [{"key": key, "effect": "NoSchedule"}]}}
        self.plane.request("PATCH", f"/api/v1/nodes/{node}", body).ok()

    def without_gpu(self, node: str) -> None:
        status = {"status": {"allocatable": {"nvidia.com/gpu": None}}}
        self.plane.request("PATCH", f"/api/v1/nodes/{node}/status", status).ok()

    def relabel(self, name: str, labels: Mapping[str, str]) -> None:
        body = {"metadata": {"labels": dict(labels)}}
        self.plane.request("PATCH", f"/api/v1/nodes/{name}", body).ok()

    def _selected(self) -> dict[str, str]:
        volume = self.named("LocalModelNodeGroup")["spec"]["persistentVolumeSpec"]
        (term,) = volume["nodeAffinity"]["required"]["nodeSelectorTerms"]
        return {one["key"]: one["values"][0] for one in term["matchExpressions"]}

    def beat(self, name: str, *, seconds: int) -> None:
        """The agent of this node renews its Lease, for so long."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"renewTime": now, "leaseDurationSeconds": seconds}
        self.plane.request("PATCH", f"{LEASES}/{name}", {"spec": spec}).ok()

    def hold(self, node: str, **sizes: int) -> None:
        """The agent of this node says that it has these caches of the file, with their bytes."""
        names = {name.replace("_", "-"): size for name, size in sizes.items()}
        caches = {name: self.named("LocalModelCache", name)["spec"] for name in names}
        entries = [
            {
                "modelName": name,
                "sourceModelUri": spec["sourceModelUri"],
                "nodeGroup": spec["nodeGroups"][0],
            }
            for name, spec in caches.items()
        ]
        self.plane.apply(local_model_node(node, *entries))
        status = {
            "modelStatus": dict.fromkeys(names, "ModelDownloaded"),
            "models": {name: {"state": "Ready", "bytes": size} for name, size in names.items()},
        }
        path = f"{SERVING}/localmodelnodes/{node}"
        self.plane.request("PATCH", f"{path}/status", {"status": status}).ok()

    # -- what becomes of pods -------------------------------------------------------------------

    def admitted(self, pod: Json, outcome: str, *, saying: str = "") -> Admitted:
        """The pod, created, once this becomes of it; `saying` is in one of its warnings. What has
        just been done has not reached the controller yet: until then it is asked without effect."""

        def settled() -> bool:
            answer, found = self._asked(pod, "?dryRun=All")
            answer.ok()
            return found == outcome and saying in " ".join(_texts(answer))

        until(settled, lambda: f"{self._asked(pod, '?dryRun=All')}\n{self.controller.log_text()}")
        answer, found = self._asked(pod)
        path = f"{PODS.format(_space(pod))}/{answer.ok()['metadata']['name']}"
        stored = self.plane.request("GET", path).ok()
        made = Admitted(path, _kept(stored), _texts(answer), found, self._plain(pod))
        assert found == outcome
        if outcome == "Patched":
            check_only_ours(made.plain, made.pod)
        else:
            assert made.pod == made.plain
        return made

    def _asked(self, pod: Json, query: str = "") -> tuple[Answer, str]:
        """With what the controller counted for it; "" if it was not asked."""
        before = self._outcomes()
        answer = self.plane.request("POST", PODS.format(_space(pod)) + query, pod)
        counted = {
            name: count - before.get(name, 0)
            for name, count in self._outcomes().items()
            if count != before.get(name, 0)
        }
        assert sum(counted.values()) <= 1, counted
        return answer, next(iter(counted), "")

    def _outcomes(self) -> dict[str, float]:
        return {
            name.removeprefix(_OUTCOMES): value
            for name, value in self.controller.metrics().items()
            if name.startswith(_OUTCOMES)
        }

    def _plain(self, pod: Json) -> Json:
        """What the API server makes of it alone: of those that opt out the hook is not asked."""
        alone = copy.deepcopy(pod)
        alone["metadata"].setdefault("annotations", {}).setdefault(DISABLE, "true")
        answer, asked = self._asked(alone, "?dryRun=All")
        assert not asked
        made = _kept(answer.ok())
        if DISABLE not in pod["metadata"].get("annotations", {}):
            del made["metadata"]["annotations"][DISABLE]
            if "annotations" not in pod["metadata"]:
                del made["metadata"]["annotations"]
        return made

    # -- the end --------------------------------------------------------------------------------

    def remove(self) -> None:
        """What another system would see. Caches after pods: none goes that is used."""
        for space in self._spaces:
            self._delete(PODS.format(space), {"gracePeriodSeconds": 0})
            self._delete(f"{SERVING}/namespaces/{space}/localmodelnamespacecaches")
        for name in self._nodes:
            self._delete(f"/api/v1/nodes/{name}")
            self._delete(f"{LEASES}/{name}")
        for kind in ("localmodelnodes", "localmodelcaches", "localmodelnodegroups"):
            self._delete(f"{SERVING}/{kind}")
        until(self._released, self.controller.log_text)

    def _released(self) -> bool:
        """The controller deletes claims and volumes; their finalizers are those of others."""
        left = [one for path in _VOLUMES for one in self._items(path)]
        for path, metadata in left:
            if "deletionTimestamp" in metadata and metadata.get("finalizers"):
                gone = {"metadata": {"finalizers": None}}
                self.plane.request("PATCH", f"{path}/{metadata['name']}", gone)
        return not left

    def _items(self, path: str) -> list[tuple[str, Json]]:
        listed = self.plane.request("GET", path).ok()["items"]
        base, _, kind = path.rpartition("/")
        return [
            (f"{base}/namespaces/{meta['namespace']}/{kind}" if "namespace" in meta else path, meta)
            for meta in (one["metadata"] for one in listed)
        ]

    def _delete(self, path: str, body: Json | None = None) -> None:
        self.plane.request("DELETE", path, body).ok()


def claims(pod: Json) -> dict[str, Json]:
    return {
        volume["name"]: volume["persistentVolumeClaim"]
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }


def _kept(pod: Json) -> Json:
    """Without what is made for each request."""
    found = copy.deepcopy(pod)
    for name in _MADE_UP:
        found["metadata"].pop(name, None)
    del found["status"]
    return found


def _texts(answer: Answer) -> tuple[str, ...]:
    found = (_WARNING.fullmatch(one) for one in answer.warnings)
    return tuple(one[1].replace('\\"', '"') for one in found if one)


def _space(pod: Json) -> str:
    return str(pod["metadata"]["namespace"])
