"""What a token of the agent can do on a real API server, and above all what it cannot (design D11).

The tokens are bound to pods on nodes, as kubelet's are. Every refusal here is the API server's.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.control_plane import Answer, ControlPlane
from tests.cluster.identity import (
    LEASES,
    NAMESPACE,
    POLICY,
    SERVICE_ACCOUNT,
    SERVING,
    AgentOnNode,
)
from tests.machine import until

JOBS = "kserve-localmodel-jobs"
NODES = f"{SERVING}/localmodelnodes"
PENDING = {"status": {"modelStatus": {"a": "ModelDownloadPending"}}}


def serving(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    head = {"apiVersion": "serving.kserve.io/v1alpha1", "kind": kind, "metadata": {"name": name}}
    return {**head, "spec": spec}


def lease(name: str, holder: str = "pod") -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"holderIdentity": holder}}


def denied_by_policy(answer: Answer) -> bool:
    return answer.status == 403 and POLICY in answer.message


def denied_by_role(answer: Answer) -> bool:
    return answer.status == 403 and "cannot" in answer.message and POLICY not in answer.message


@pytest.fixture
def own(agent_on_node: AgentOnNode) -> AgentOnNode:
    """Node A."""
    create_node(agent_on_node.plane, agent_on_node.node)
    return agent_on_node


@pytest.fixture
def other(control_plane: ControlPlane, node_name: str) -> str:
    """Node B, with its LocalModelNode and its Lease."""
    name = f"{node_name}-b"
    create_node(control_plane, name)
    control_plane.request("POST", LEASES, lease(name)).ok()
    return name


@pytest.fixture
def unbound(control_plane: ControlPlane) -> str:
    """A token of the same ServiceAccount that no pod has: it names no node."""
    return control_plane.token(SERVICE_ACCOUNT, NAMESPACE)


def create_node(plane: ControlPlane, name: str) -> None:
    plane.request("POST", NODES, serving("LocalModelNode", name, localModels=[])).ok()


def test_it_writes_the_status_of_its_own_node(own: AgentOnNode) -> None:
    own.request("PATCH", f"{NODES}/{own.node}/status", PENDING).ok()


def test_it_cannot_write_the_status_of_another_node(own: AgentOnNode, other: str) -> None:
    assert denied_by_policy(own.request("PATCH", f"{NODES}/{other}/status", PENDING))
    assert "status" not in own.plane.get("lmn", other)


def test_it_creates_and_renews_its_own_lease(own: AgentOnNode) -> None:
    own.request("POST", LEASES, lease(own.node)).ok()
    found = own.request("GET", f"{LEASES}/{own.node}").ok()
    found["spec"]["holderIdentity"] = "another"
    own.request("PUT", f"{LEASES}/{own.node}", found).ok()


def test_it_cannot_create_the_lease_of_another_node(own: AgentOnNode) -> None:
    assert denied_by_policy(own.request("POST", LEASES, lease(f"{own.node}-forged")))


def test_it_cannot_let_the_server_choose_the_name_of_a_lease(own: AgentOnNode) -> None:
    chosen = {"metadata": {"generateName": own.node}, "spec": {}}
    assert denied_by_policy(own.request("POST", LEASES, chosen))


def test_it_cannot_renew_the_lease_of_another_node(own: AgentOnNode, other: str) -> None:
    found = own.request("GET", f"{LEASES}/{other}").ok()
    found["spec"]["holderIdentity"] = "forged"
    assert denied_by_policy(own.request("PUT", f"{LEASES}/{other}", found))


def test_it_cannot_delete_a_lease(own: AgentOnNode, other: str) -> None:
    assert denied_by_role(own.request("DELETE", f"{LEASES}/{other}"))


@pytest.mark.parametrize("namespace", ["kube-node-lease", "kube-system", "default"])
def test_it_cannot_write_leases_elsewhere(own: AgentOnNode, namespace: str) -> None:
    path = LEASES.replace(NAMESPACE, namespace)
    assert denied_by_role(own.request("POST", path, lease(own.node)))


def test_a_token_without_a_node_writes_nothing(own: AgentOnNode, unbound: str) -> None:
    plane = own.plane
    status = f"{NODES}/{own.node}/status"
    assert denied_by_policy(plane.request("PATCH", status, PENDING, token=unbound))
    assert denied_by_policy(plane.request("POST", LEASES, lease(own.node), token=unbound))


def test_a_token_dies_with_its_pod(own: AgentOnNode) -> None:
    stolen = own.token
    own.plane.kubectl("delete", "pod", own.pod, "-n", NAMESPACE, "--force", "--grace-period=0")
    pods = f"/api/v1/pods?fieldSelector=spec.nodeName={own.node}"
    # Cached for ten seconds by the server, so only a token that it has not seen is refused at once.
    assert own.plane.request("GET", pods, token=stolen).status == 401


def test_the_policy_is_for_the_agent_alone(control_plane: ControlPlane, node_name: str) -> None:
    """KServe's controller and people write LocalModelNodes and Leases of any name."""
    create_node(control_plane, node_name)
    control_plane.request("POST", LEASES, lease(node_name)).ok()


def test_a_role_that_was_widened_is_still_held_to_its_node(
    private_control_plane: Callable[..., ControlPlane],
) -> None:
    plane = private_control_plane()
    own = AgentOnNode.create(plane, "a")
    for name in ("a", "b"):
        create_node(plane, name)
        plane.request("POST", LEASES, lease(name)).ok()
    account = f"--serviceaccount={NAMESPACE}:{SERVICE_ACCOUNT}"
    plane.kubectl(
        "create", "clusterrolebinding", "too-much", "--clusterrole=cluster-admin", account
    )
    until(lambda: own.request("GET", "/api/v1/secrets").status == 200)
    for path in (f"{NODES}/b", f"{LEASES}/b"):
        assert denied_by_policy(own.request("PATCH", path, {"metadata": {"labels": {"x": "y"}}}))
        assert denied_by_policy(own.request("DELETE", path))
    assert denied_by_policy(
        own.request("POST", NODES, serving("LocalModelNode", "c", localModels=[]))
    )
    own.request("DELETE", f"{NODES}/a").ok()


def test_9_1_3_it_cannot_change_what_it_should_hold(own: AgentOnNode) -> None:
    change = {"spec": {"localModels": [{"modelName": "x", "sourceModelUri": "hf://x/x"}]}}
    assert denied_by_role(own.request("PATCH", f"{NODES}/{own.node}", change))
    made = serving("LocalModelNode", f"{own.node}-new", localModels=[])
    assert denied_by_role(own.request("POST", NODES, made))
    assert denied_by_role(own.request("DELETE", f"{NODES}/{own.node}"))


def test_of_the_job_namespace_it_reads_a_secret_by_name_and_lists_none(own: AgentOnNode) -> None:
    secrets = f"/api/v1/namespaces/{JOBS}/secrets"
    made = {"metadata": {"name": f"secret-{own.node}"}, "stringData": {"token": "hidden"}}
    own.plane.request("POST", secrets, made).ok()
    own.request("GET", f"{secrets}/secret-{own.node}").ok()
    for path in (secrets, f"{secrets}?watch=1&timeoutSeconds=1"):
        assert denied_by_role(own.request("GET", path))
    assert denied_by_role(own.request("DELETE", f"{secrets}/secret-{own.node}"))


@pytest.mark.parametrize("namespace", [NAMESPACE, "kserve", "default", "kube-system"])
def test_it_cannot_read_a_secret(own: AgentOnNode, namespace: str) -> None:
    secrets = f"/api/v1/namespaces/{namespace}/secrets"
    made = {"metadata": {"name": f"secret-{own.node}"}, "stringData": {"token": "hidden"}}
    own.plane.request("POST", secrets, made).ok()
    for path in (f"{secrets}/secret-{own.node}", secrets, f"{secrets}?watch=1&timeoutSeconds=1"):
        assert denied_by_role(own.request("GET", path))


def test_it_cannot_list_the_secrets_of_all_namespaces(own: AgentOnNode) -> None:
    assert denied_by_role(own.request("GET", "/api/v1/secrets"))


@pytest.mark.parametrize(
    "plural", ["localmodelcaches", "namespaces/default/localmodelnamespacecaches"]
)
def test_it_cannot_write_or_delete_a_cache(own: AgentOnNode, plural: str) -> None:
    kind = "LocalModelCache" if plural == "localmodelcaches" else "LocalModelNamespaceCache"
    spec = {"sourceModelUri": "hf://acme/a", "modelSize": 1, "nodeGroups": ["gpu"]}
    path = f"{SERVING}/{plural}"
    own.plane.request("POST", path, serving(kind, own.node, **spec)).ok()
    assert denied_by_role(own.request("DELETE", f"{path}/{own.node}"))
    assert denied_by_role(own.request("DELETE", path))
    assert denied_by_role(own.request("PATCH", f"{path}/{own.node}", {"spec": {"modelSize": 2}}))
    assert denied_by_role(own.request("PATCH", f"{path}/{own.node}/status", {"status": {}}))


def test_it_cannot_write_node_groups(own: AgentOnNode) -> None:
    path = f"{SERVING}/localmodelnodegroups"
    spec = {"storageLimit": 1, "persistentVolumeSpec": {}, "persistentVolumeClaimSpec": {}}
    group = serving("LocalModelNodeGroup", own.node, **spec)
    own.plane.request("POST", path, group).ok()
    moved = {"spec": {"persistentVolumeSpec": {"local": {"path": "/"}}}}
    assert denied_by_role(own.request("PATCH", f"{path}/{own.node}", moved))
    assert denied_by_role(own.request("DELETE", f"{path}/{own.node}"))
    assert denied_by_role(own.request("POST", path, group))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{SERVICE_ACCOUNT}/token"),
        ("POST", f"/api/v1/namespaces/{NAMESPACE}/pods"),
        ("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/any"),
        ("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps"),
        ("GET", "/api/v1/nodes"),
        ("GET", f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets"),
        ("GET", "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"),
    ],
)
def test_what_else_it_cannot(own: AgentOnNode, method: str, path: str) -> None:
    assert denied_by_role(own.request(method, path, {} if method == "POST" else None))


@pytest.mark.parametrize(
    "path",
    [
        f"{NODES}?fieldSelector=metadata.name=NODE",
        "/api/v1/pods?fieldSelector=spec.nodeName=NODE",
        f"{SERVING}/localmodelnodegroups",
        f"{SERVING}/localmodelcaches",
        f"{SERVING}/localmodelnamespacecaches",
    ],
)
def test_it_lists_and_watches_what_it_needs(own: AgentOnNode, path: str) -> None:
    path = path.replace("NODE", own.node)
    own.request("GET", path).ok()
    watch = "&watch=1&timeoutSeconds=1" if "?" in path else "?watch=1&timeoutSeconds=1"
    assert own.request("GET", path + watch).status == 200


def test_it_tells_of_events_wherever_its_objects_are(own: AgentOnNode) -> None:
    for namespace in ("default", "kube-public"):
        path = f"/api/v1/namespaces/{namespace}/events"
        event = {
            "metadata": {"name": f"event-{own.node}"},
            "involvedObject": {"kind": "LocalModelNode", "name": own.node, "namespace": namespace},
            "reason": "DiskMissing",
        }
        own.request("POST", path, event).ok()
        own.request("PATCH", f"{path}/event-{own.node}", {"count": 2}).ok()
