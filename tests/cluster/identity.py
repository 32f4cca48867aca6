"""The shipped objects on a control plane, and who the agent is there: never admin.

An `AgentOnNode` has what kubelet would give the agent's pod: a token of the shipped ServiceAccount
that is bound to a pod on its node. The pod is an object only; nothing runs in it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from tests.cluster.control_plane import Answer, ControlPlane
from tests.cluster.kserve_crds import kserve_crds, storage_containers_crd
from tests.machine import REPOSITORY, replace, until

NAMESPACE = "localmodel-system"
KSERVE = "kserve"
JOBS = "kserve-localmodel-jobs"
SERVICE_ACCOUNT = "localmodel-agent"
POLICY = "localmodel-agent-own-node"
SERVING = "/apis/serving.kserve.io/v1alpha1"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"


@dataclass(frozen=True, slots=True)
class AgentOnNode:
    """The agent's identity on one node."""

    plane: ControlPlane
    node: str
    pod: str
    token_file: Path
    kubeconfig: Path

    @classmethod
    def create(cls, plane: ControlPlane, node: str) -> Self:
        """Make the Node, the pod on it, its token, and a kubeconfig that names the token's file."""
        plane.request("POST", "/api/v1/nodes", {"metadata": {"name": node}}).ok()
        pod = f"{SERVICE_ACCOUNT}-{node}"
        plane.request(
            "POST",
            f"/api/v1/namespaces/{NAMESPACE}/pods",
            {
                "metadata": {"name": pod, "labels": {"app.kubernetes.io/name": SERVICE_ACCOUNT}},
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": SERVICE_ACCOUNT,
                    "containers": [{"name": "agent", "image": "localmodel-agent:dev"}],
                },
            },
        ).ok()
        token_file = plane.directory / f"{node}.token"
        kubeconfig = plane.token_kubeconfig(plane.directory / f"{node}.kubeconfig", token_file)
        identity = cls(plane, node, pod, token_file, kubeconfig)
        identity.rotate()
        return identity

    @property
    def token(self) -> str:
        return self.token_file.read_text()

    def rotate(self) -> str:
        """Put a new token into the file, at once, as kubelet does; the old one stays valid."""
        replace(self.token_file, self.plane.token(SERVICE_ACCOUNT, NAMESPACE, self.pod))
        return self.token

    def request(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """One request as this agent."""
        return self.plane.request(method, path, body, token=self.token, **options)


def make_kserves_namespaces(plane: ControlPlane) -> None:
    """As KServe's own installation leaves them."""
    for name in (JOBS, KSERVE):
        plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


def install(plane: ControlPlane, *, kserve: bool = False, overlay: str = "kserve") -> None:
    """Our CRDs, or KServe's own, and everything of the overlay, until all of it is in force."""
    if kserve:
        plane.apply(*kserve_crds())
    else:
        plane.kubectl("apply", "--server-side", "-k", REPOSITORY / "crds")
    plane.apply(storage_containers_crd())
    until(lambda: _established(plane), "the CRDs")
    make_kserves_namespaces(plane)
    manifests = plane.kubectl("kustomize", REPOSITORY / "daemonset/overlays" / overlay)
    plane.apply(*map(_hook_on_loopback, yaml.safe_load_all(manifests)))
    # RBAC and admission read their rules by watch, policies once a second: until they refuse for
    # the reason we ship, a test could be let through, or be refused for another reason.
    unbound = plane.token(SERVICE_ACCOUNT, NAMESPACE)
    lease = {"metadata": {"name": "nobody"}}

    def refused() -> bool:
        return POLICY in plane.request("POST", f"{LEASES}?dryRun=All", lease, token=unbound).message

    until(refused, f"the policy {POLICY}")


def _established(plane: ControlPlane) -> bool:
    """Not by `kubectl wait`, which ends with an error where a CRD has no status yet."""
    crds = plane.request("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions").ok()
    return all(
        any(
            (one["type"], one["status"]) == ("Established", "True")
            for one in crd.get("status", {}).get("conditions") or ()
        )
        for crd in crds["items"]
    )


def _hook_on_loopback(manifest: dict[str, Any]) -> dict[str, Any]:
    """There is no pod behind the Service: nobody answers, until a test starts who does."""
    for hook in manifest.get("webhooks", ()):
        path = hook["clientConfig"].pop("service")["path"]
        hook["clientConfig"] = {"url": f"https://127.0.0.1:9{path}"}
    return manifest
