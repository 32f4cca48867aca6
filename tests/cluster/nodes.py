"""The real agent as one node's agent on the real API server, under the shipped ServiceAccount."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml

from agent import layout
from agent.model import cache_key
from tests.cluster.control_plane import ControlPlane
from tests.cluster.identity import NAMESPACE, SERVING, AgentOnNode
from tests.cluster.proxy import Proxy
from tests.machine import DEADLINE, Agent, Machine, until

GROUP = "gpu"


class Node:
    """One node: its objects, its disk, and its agent once it is started."""

    def __init__(self, plane: ControlPlane, identity: AgentOnNode, machine: Machine) -> None:
        self.plane = plane
        self.identity = identity
        self.machine = machine
        self.name = identity.node
        self.group = f"{GROUP}-{self.name}"
        self._extra: dict[str, str] = {}

    @property
    def environment(self) -> dict[str, str]:
        return {
            "KUBECONFIG": str(self.identity.kubeconfig),
            "NODE_NAME": self.name,
            "POD_NAME": self.identity.pod,
            "POD_NAMESPACE": NAMESPACE,
            **self._extra,
        }

    def start(self, *flags: str, environment: Mapping[str, str] | None = None) -> Agent:
        return self.machine.agent(*flags, environment={**self.environment, **(environment or {})})

    @contextmanager
    def behind_a_proxy(self) -> Iterator[Proxy]:
        """From now on the agent that is started talks through this."""
        with Proxy(self.plane.url, self.plane.authority.crt).serving() as proxy:
            config = yaml.safe_load(self.identity.kubeconfig.read_text())
            config["clusters"][0]["cluster"] = {"server": proxy.url}
            path = self.machine.home / "proxy.kubeconfig"
            path.write_text(yaml.safe_dump(config))
            self._extra = {"KUBECONFIG": str(path)}
            yield proxy

    # -- pods -----------------------------------------------------------------------------------

    def add_pod(
        self,
        name: str,
        *,
        uri: str | None = None,
        labels: Mapping[str, str] | None = None,
        owner: str = "ReplicaSet",
        namespace: str = "default",
        keys: str | None = None,
        downloads: str | None = None,
    ) -> str:
        """A pod object on this node, as KServe rewrites it if it serves a model; its path. Or as
        the hook wraps it, with these `keys`; or as nobody changed it, with its initializer."""
        # What kube-controller-manager would have made.
        account = {"metadata": {"name": "default"}}
        self.plane.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", account)
        path = f"/api/v1/namespaces/{namespace}/pods"
        body = pod(name, self.name, uri=uri, labels=labels, owner=owner)
        if keys is not None:
            body["metadata"]["annotations"] = {"localmodel-agent.io/keys": keys}
            claim = {"claimName": f"localmodel-{self.group}", "readOnly": True}
            body["spec"]["volumes"] = [{"name": "cache", "persistentVolumeClaim": claim}]
            mount = {"name": "cache", "mountPath": "/mnt/localmodel", "readOnly": True}
            body["spec"]["containers"][0]["volumeMounts"] = [mount]
        if downloads is not None:
            arguments = [downloads, "/mnt/models"]
            initializer = {"name": "storage-initializer", "image": "any", "args": arguments}
            body["spec"]["initContainers"] = [initializer]
        self.plane.request("POST", path, body).ok()
        return f"{path}/{name}"

    def remove_pod(self, path: str) -> None:
        self.plane.request("DELETE", path, {"gracePeriodSeconds": 0}).ok()

    # -- what KServe's controller would write ---------------------------------------------------

    def make_group(self, path: str | None = None, **annotations: str) -> None:
        """The node group, its volumes at `path`: at our cache unless a test says so. Annotations
        are by their name behind our prefix, `_` for `-`."""
        made = group(self.group, path or str(self.machine.root))
        made["metadata"]["annotations"] = {
            f"localmodel-agent.io/{name.replace('_', '-')}": value
            for name, value in annotations.items()
        }
        self.plane.apply(made)

    def want(self, **models: str) -> None:
        """Make the LocalModelNode ask for exactly these: its name and URI."""
        entries = [
            {"modelName": name, "sourceModelUri": uri, "nodeGroup": self.group}
            for name, uri in models.items()
        ]
        self.want_entries(*entries)

    def want_entries(self, *entries: Mapping[str, Any]) -> None:
        self.plane.apply(local_model_node(self.name, *entries))

    # -- what an operator reads -----------------------------------------------------------------

    def object(self) -> dict[str, Any]:
        answer = self.plane.request("GET", f"{SERVING}/localmodelnodes/{self.name}")
        found: dict[str, Any] = answer.ok()
        return found

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.object().get("status") or {}
        return found

    def words(self) -> dict[str, str]:
        """KServe's map."""
        found: dict[str, str] = self.status().get("modelStatus") or {}
        return found

    def condition(self, kind: str) -> dict[str, Any]:
        conditions = self.status().get("conditions") or []
        return next((found for found in conditions if found["type"] == kind), {})

    def wait_words(self, agent: Agent, within: float = DEADLINE, /, **words: str) -> None:
        """Until the status says exactly this; `within` in seconds."""
        until(
            lambda: self.words() == words,
            lambda: f"{self.object()}\n{agent.log_text()}",
            seconds=within,
        )

    def wait_condition(self, agent: Agent, kind: str, status: str, reason: str) -> dict[str, Any]:
        def holds() -> dict[str, Any]:
            found = self.condition(kind)
            as_wanted = (found.get("status"), found.get("reason")) == (status, reason)
            return found if as_wanted else {}

        return until(holds, lambda: f"{self.object()}\n{agent.log_text()}")

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The Events about this LocalModelNode, or about what has this name in `default`."""
        listed = self.plane.request("GET", "/api/v1/namespaces/default/events").ok()
        about = name or self.name
        return [e for e in listed["items"] if e["involvedObject"].get("name") == about]

    def wait_event(self, agent: Agent, name: str, reason: str) -> dict[str, Any]:
        """Until one about a pod in `default` has this reason; the only one."""

        def found() -> list[dict[str, Any]]:
            return [event for event in self.events(name) if event["reason"] == reason]

        (event,) = until(found, lambda: f"{self.events(name)}\n{agent.log_text()}")
        return event


def group(name: str, path: str) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelNodeGroup",
        "metadata": {"name": name},
        "spec": {
            "storageLimit": "10Gi",
            "persistentVolumeSpec": {
                "accessModes": ["ReadWriteOnce"],
                "capacity": {"storage": "10Gi"},
                "local": {"path": path},
                "storageClassName": "local-storage",
                "nodeAffinity": {
                    "required": {
                        "nodeSelectorTerms": [
                            {
                                "matchExpressions": [
                                    {"key": "gpu", "operator": "In", "values": ["yes"]}
                                ]
                            }
                        ]
                    }
                },
            },
            "persistentVolumeClaimSpec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "10Gi"}},
                "storageClassName": "local-storage",
            },
        },
    }


def pod(
    name: str, node: str, *, uri: str | None, labels: Mapping[str, str] | None, owner: str
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "nodeName": node,
        "containers": [{"name": "kserve-container", "image": "server"}],
        "tolerations": [{"operator": "Exists"}],
        "serviceAccountName": "default",
        "automountServiceAccountToken": False,
    }
    if uri is not None:
        claim = {"claimName": "tiny-gpu"}
        spec["volumes"] = [{"name": "kserve-pvc-source", "persistentVolumeClaim": claim}]
        spec["containers"][0]["volumeMounts"] = [
            {
                "name": "kserve-pvc-source",
                "mountPath": "/mnt/models",
                "subPath": f"{layout.model(cache_key(uri))}/",
                "readOnly": True,
            }
        ]
    if owner == "DaemonSet":
        spec["volumes"] = [{"name": "models", "hostPath": {"path": "/models"}}]
    reference = {"apiVersion": "v1", "kind": owner, "name": "owner", "uid": "some-uid"}
    metadata = {"name": name, "labels": dict(labels or {}), "ownerReferences": [reference]}
    return {"metadata": metadata, "spec": spec}


def local_model_node(name: str, *entries: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelNode",
        "metadata": {"name": name},
        "spec": {"localModels": list(entries)},
    }


def cache(name: str, uri: str, groups: list[str], **annotations: str) -> dict[str, Any]:
    """A LocalModelCache; annotations by their name behind our prefix, `_` for `-`."""
    notes = {f"localmodel-agent.io/{k.replace('_', '-')}": v for k, v in annotations.items()}
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelCache",
        "metadata": {"name": name, "annotations": notes},
        "spec": {"sourceModelUri": uri, "modelSize": "1Gi", "nodeGroups": groups},
    }


def storage_container(name: str, prefix: str, *env: Mapping[str, Any]) -> dict[str, Any]:
    """A ClusterStorageContainer for the downloads of URIs that begin so."""
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ClusterStorageContainer",
        "metadata": {"name": name},
        "spec": {
            "workloadType": "localModelDownloadJob",
            "supportedUriFormats": [{"prefix": prefix}],
            "container": {"name": "storage-initializer", "image": "any", "env": list(env)},
        },
    }
