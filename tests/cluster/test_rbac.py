"""The rules that we ship against the calls that the agent makes, as the API server logged them."""

from typing import Any

from tests.cluster.identity import JOBS, KSERVE, NAMESPACE, SERVICE_ACCOUNT
from tests.cluster.nodes import Node, storage_container
from tests.cluster.rules import Call, calls, granted, refused
from tests.conftest import URI
from tests.machine import until

RARE: set[Call] = {("", "events", "patch")}
"""An Event is counted up when it comes again minutes later: longer than a test."""
LAST: Call = ("coordination.k8s.io", "leases", "update")
"""Renewed after forty seconds, and given up at the end."""


def rules(node: Node) -> list[dict[str, Any]]:
    cluster = node.plane.get("clusterrole", SERVICE_ACCOUNT)["rules"]
    roles = [
        rule
        for name, namespace in (
            (SERVICE_ACCOUNT, NAMESPACE),
            (f"{SERVICE_ACCOUNT}-credentials", JOBS),
            (f"{SERVICE_ACCOUNT}-configuration", KSERVE),
        )
        for rule in node.plane.get("role", name, "-n", namespace)["rules"]
    ]
    found: list[dict[str, Any]] = cluster + roles
    return found


def asked(node: Node) -> list[dict[str, Any]]:
    """What the audit log has of this node's agent."""
    key = "authentication.kubernetes.io/node-name"
    return [
        event
        for event in node.plane.audit()
        if event["user"].get("extra", {}).get(key) == [node.name]
    ]


def test_every_rule_is_used_and_every_call_is_allowed(node: Node) -> None:
    reference = {"name": "not-there", "key": "x", "optional": True}
    variable = {"name": "X", "valueFrom": {"configMapKeyRef": reference}}
    container = storage_container(f"of-{node.name}", "hf://a/", variable)
    node.plane.apply(container)
    node.want_entries(
        {"modelName": "tiny", "sourceModelUri": URI},
        # What is broken is told by an Event; what is named is read.
        {"modelName": "a", "sourceModelUri": "hf://a/b", "serviceAccountName": "not-there"},
        {"modelName": "b", "sourceModelUri": "hf://b/c", "storage": {"key": "not-there"}},
    )
    agent = node.start()
    node.wait_words(agent, tiny="ModelDownloaded", a="ModelDownloadError", b="ModelDownloadError")
    wanted = granted(rules(node))
    until(lambda: wanted - RARE <= calls(asked(node)) | {LAST}, agent.log_text)
    assert agent.stop() == 0
    assert LAST in calls(asked(node))
    assert calls(asked(node)) <= wanted
    assert refused(asked(node)) == []


def test_9_1_1_what_it_watches_is_about_its_own_node(node: Node) -> None:
    """RBAC cannot say so, and the agent does not ask for more (design D16)."""
    node.want(tiny=URI)
    agent = node.start()
    node.wait_words(agent, tiny="ModelDownloaded")
    assert agent.stop() == 0
    uris = [e["requestURI"] for e in asked(node) if e["verb"] in ("list", "watch")]
    for resource, selector in (
        ("/pods?", f"fieldSelector=spec.nodeName%3D{node.name}"),
        ("/localmodelnodes?", f"fieldSelector=metadata.name%3D{node.name}"),
    ):
        about = [uri.replace("=" + node.name, "%3D" + node.name) for uri in uris if resource in uri]
        assert about
        assert [uri for uri in about if selector not in uri] == []
