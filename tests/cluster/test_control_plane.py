"""The control plane itself: what the other tests here take for granted."""

from collections.abc import Callable

from tests.cluster.control_plane import Answer, ControlPlane, version
from tests.cluster.identity import NAMESPACE, SERVICE_ACCOUNT, AgentOnNode

WATCH = "/api/v1/namespaces?watch=1&timeoutSeconds=1&resourceVersion="


def types(watched: Answer) -> list[str]:
    """Of the events of a watch that ended."""
    return [event["type"] for event in watched.body or ()]


def gone(watched: Answer) -> bool:
    """Either answer of a server that no longer knows the revision."""
    return watched.status == 410 or [event["object"].get("code") for event in watched.ok()] == [410]


def test_the_version_is_the_one_asked_for(control_plane: ControlPlane) -> None:
    assert control_plane.request("GET", "/version").ok()["gitVersion"] == version()


def test_an_agents_token_is_bound_to_its_node(agent_on_node: AgentOnNode) -> None:
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
    user = agent_on_node.request("POST", path, asked).ok()["status"]["userInfo"]
    assert user["username"] == f"system:serviceaccount:{NAMESPACE}:{SERVICE_ACCOUNT}"
    assert user["extra"]["authentication.kubernetes.io/node-name"] == [agent_on_node.node]


def test_kubectl_follows_a_rotated_token_file(
    agent_on_node: AgentOnNode, control_plane: ControlPlane
) -> None:
    old = agent_on_node.token
    assert agent_on_node.rotate() != old
    whoami = ("auth", "whoami", "-o=jsonpath={.status.userInfo.username}")
    assert control_plane.kubectl(*whoami, user=agent_on_node.kubeconfig).endswith(SERVICE_ACCOUNT)


def test_who_asked_is_in_the_audit_log(agent_on_node: AgentOnNode) -> None:
    path = f"/api/v1/nodes/{agent_on_node.node}"
    assert agent_on_node.request("GET", path).status == 403
    (event,) = [
        event
        for event in agent_on_node.plane.audit()
        if event["requestURI"] == path and "serviceaccount" in event["user"]["username"]
    ]
    assert (event["verb"], event["responseStatus"]["code"]) == ("get", 403)


def test_a_killed_api_server_comes_back_with_its_data(
    private_control_plane: Callable[..., ControlPlane],
) -> None:
    plane = private_control_plane(installed=False)
    plane.kubectl("create", "namespace", "kept")
    url, pid = plane.url, plane.apiserver_pid
    plane.restart_apiserver()
    assert plane.url == url
    assert plane.apiserver_pid != pid
    assert plane.get("namespace", "kept")["metadata"]["name"] == "kept"


def test_a_watch_from_before_the_compaction_is_gone_after_a_restart(
    private_control_plane: Callable[..., ControlPlane],
) -> None:
    plane = private_control_plane(installed=False)
    old = plane.get("namespace", "default")["metadata"]["resourceVersion"]
    plane.compact()
    assert "ERROR" not in types(plane.request("GET", WATCH + old))  # out of its watch cache
    plane.restart_apiserver()
    assert gone(plane.request("GET", WATCH + old))


def test_without_a_watch_cache_it_is_gone_at_once(
    private_control_plane: Callable[..., ControlPlane],
) -> None:
    plane = private_control_plane(installed=False, flags=["--watch-cache=false"])
    old = plane.get("namespace", "default")["metadata"]["resourceVersion"]
    plane.compact()
    assert gone(plane.request("GET", WATCH + old))
