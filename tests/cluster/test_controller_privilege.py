"""What the controller asks for is what it may, and what a stolen token of its cannot (design D11).

Every refusal here is the API server's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.kube.client import Json
from tests.cluster.control_plane import Answer, ControlPlane
from tests.cluster.controllers import (
    ACCOUNT,
    MUTATING,
    REGISTRATION,
    Controllers,
    as_installed,
    bind,
    controllers,
    namespace,
    ready_node,
)
from tests.cluster.identity import JOBS, KSERVE, LEASES, NAMESPACE, SERVING
from tests.cluster.nodes import cache, group
from tests.cluster.rules import Call, calls, granted, refused
from tests.machine import until

POLICY = "localmodel-controller-own-volumes"
VOLUMES = "/api/v1/persistentvolumes"
CLAIMS = "/api/v1/namespaces/team-a/persistentvolumeclaims"
SECRETS = f"/api/v1/namespaces/{NAMESPACE}/secrets"

RARE: set[Call] = {("", "events", "patch")}
"""An Event is counted up when it comes again minutes later: longer than a test."""


@pytest.fixture(scope="module")
def plane(module_control_plane: Callable[..., ControlPlane]) -> ControlPlane:
    plane = module_control_plane(overlay="standalone")
    namespace(plane, "team-a")
    return plane


# -- what it asks for ----------------------------------------------------------------------------


def rules(plane: ControlPlane) -> list[Json]:
    found: list[Json] = [
        *plane.get("clusterrole", ACCOUNT)["rules"],
        *plane.get("role", ACCOUNT, "-n", NAMESPACE)["rules"],
    ]
    return found


def standalone_rules(plane: ControlPlane) -> list[Json]:
    return [*rules(plane), *plane.get("clusterrole", f"{ACCOUNT}-standalone")["rules"]]


def asked(plane: ControlPlane, since: int) -> list[dict[str, Any]]:
    user = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"
    return [event for event in plane.audit()[since:] if event["user"]["username"] == user]


def do_everything(plane: ControlPlane, replicas: Controllers) -> None:
    """Whatever makes a controller ask for something: also what is rare."""
    controller = replicas.start(mode="standalone", look_seconds=0.5)
    replicas.called(controller)
    plane.apply(group("gpu1", "/models"), cache("llama", "hf://a/b", ["gpu1"]))
    one = {"name": "gone", "namespace": "team-a"}
    status = {"status": {"inferenceServices": [one], "llmInferenceServices": [one]}}
    plane.request("PATCH", f"{SERVING}/localmodelcaches/llama/status", status).ok()
    asks = ("serving.kserve.io", "inferenceservices", "get")

    def asked_for() -> bool:
        plane.request("DELETE", f"{SERVING}/localmodelcaches/llama?dryRun=All").ok()
        return asks in calls(asked(plane, 0))

    until(asked_for, controller.log_text)
    namespace(plane, "team-b", inject="enabled")
    bind(plane, "team-b", "localmodel-gpu1")
    (volume,) = plane.request("GET", VOLUMES).ok()["items"]
    path = f"{VOLUMES}/{volume['metadata']['name']}"
    plane.request("PATCH", f"{path}/status", {"status": {"phase": "Released"}}).ok()
    bad = group("bad", "/models")
    del bad["spec"]["persistentVolumeSpec"]["nodeAffinity"]
    plane.apply(bad)
    # The second time is told by an Event.
    until(lambda: len(controller.said("no claim of the node group bad")) > 1, controller.log_text)

    def mended() -> bool:
        events = [e for e in asked(plane, 0) if e["verb"] == "patch"]
        return "persistentvolumes" in {e["objectRef"]["resource"] for e in events}

    until(mended, controller.log_text)
    for name in ("gpu1", "bad"):
        plane.request("DELETE", f"{SERVING}/localmodelnodegroups/{name}").ok()
    claim = f"{CLAIMS.replace('team-a', 'team-b')}/localmodel-gpu1"

    def going() -> bool:
        for one in (claim, path):
            answer = plane.request("GET", one)
            if answer.status == 200 and "deletionTimestamp" in answer.body["metadata"]:
                plane.request("PATCH", one, {"metadata": {"finalizers": None}})
        return plane.request("GET", path).status == 404

    until(going, controller.log_text)


def test_every_rule_is_used_and_every_call_is_allowed(plane: ControlPlane, tmp_path: Path) -> None:
    as_installed(plane)
    begun = len(plane.audit())
    wanted = granted(standalone_rules(plane))
    with controllers(plane, tmp_path / "controllers") as replicas:
        do_everything(plane, replicas)
        until(
            lambda: wanted - RARE <= calls(asked(plane, begun)),
            lambda: str(wanted - calls(asked(plane, begun))),
        )
    # Where KServe is not, nothing is said of its ConfigMap: test_beside_kserve.
    configuration = ("", "configmaps", "list")
    assert calls(asked(plane, begun)) - {configuration} <= wanted
    told = [uri for uri in refused(asked(plane, begun)) if f"/{KSERVE}/configmaps" not in uri]
    assert told == []


def test_beside_kserve(private_control_plane: Callable[..., ControlPlane], tmp_path: Path) -> None:
    """Only KServe's configuration is read in KServe's namespace, and nothing is refused."""
    plane = private_control_plane(kserve=True)
    with controllers(plane, tmp_path / "controllers") as replicas:
        replicas.called(replicas.start())
    its = granted(plane.get("role", "localmodel-agent-configuration", "-n", KSERVE)["rules"])
    assert calls(asked(plane, 0)) <= granted(rules(plane)) | its
    assert refused(asked(plane, 0)) == []


# -- what a token of it cannot -------------------------------------------------------------------


@pytest.fixture(scope="module")
def stolen(plane: ControlPlane) -> Callable[..., Answer]:
    """One request with it."""
    token = plane.token(ACCOUNT, NAMESPACE)

    def ask(method: str, path: str, body: Any = None) -> Answer:
        return plane.request(method, path, body, token=token)

    # Policies are in force some time after they were written.
    body = volume("other", "localmodel-x")
    until(lambda: POLICY in ask("POST", f"{VOLUMES}?dryRun=All", body).message)
    return ask


Ask = Callable[..., Answer]
MANAGED = {"app.kubernetes.io/managed-by": "localmodel-agent"}


_BY = "ValidatingAdmissionPolicy"


def by_role(answer: Answer) -> bool:
    return answer.status == 403 and "cannot" in answer.message and _BY not in answer.message


def by_policy(answer: Answer) -> bool:
    return answer.status == 403 and f"{_BY} '{POLICY}'" in answer.message


def volume(name: str, claim: str, **labels: str) -> Json:
    body = group("any", "/models")["spec"]["persistentVolumeSpec"]
    reference = {"kind": "PersistentVolumeClaim", "namespace": "team-a", "name": claim}
    metadata = {"name": name, "labels": labels or MANAGED}
    return {"metadata": metadata, "spec": {**body, "claimRef": reference}}


def claim(name: str, **labels: str) -> Json:
    body = group("any", "/models")["spec"]["persistentVolumeClaimSpec"]
    return {"metadata": {"name": name, "labels": labels or MANAGED}, "spec": body}


def test_its_own_volumes_and_claims_it_may_write(stolen: Ask) -> None:
    """So what is refused below is refused for its name, label or claim."""
    stolen("POST", f"{VOLUMES}?dryRun=All", volume("localmodel-x", "localmodel-x")).ok()
    stolen("POST", f"{CLAIMS}?dryRun=All", claim("localmodel-x")).ok()


def test_it_makes_no_secret_and_reads_no_other(plane: ControlPlane, stolen: Ask) -> None:
    made = {"metadata": {"name": "theirs"}, "stringData": {"token": "hidden"}}
    plane.request("POST", SECRETS, made).ok()
    for space in (NAMESPACE, JOBS, "default", "kube-system"):
        path = f"/api/v1/namespaces/{space}/secrets"
        assert by_role(stolen("POST", path, made))
        assert by_role(stolen("GET", path))
        assert by_role(stolen("GET", f"{path}/theirs"))
        assert by_role(stolen("GET", f"{path}?watch=1&timeoutSeconds=1"))
    assert by_role(stolen("PUT", f"{SECRETS}/theirs", made))
    assert by_role(stolen("DELETE", f"{SECRETS}/localmodel-hook"))
    assert by_role(stolen("GET", "/api/v1/secrets"))


def test_it_forges_no_lease_of_a_node(plane: ControlPlane, stolen: Ask) -> None:
    """Pods would be sent to nodes whose agent is dead."""
    ready_node(plane, "a")
    forged = {"metadata": {"name": "b"}, "spec": {"holderIdentity": "forged"}}
    assert by_role(stolen("POST", LEASES, forged))
    found = stolen("GET", LEASES).ok()["items"]
    (theirs,) = [lease for lease in found if lease["metadata"]["name"] == "a"]
    assert by_role(stolen("PUT", f"{LEASES}/a", {**theirs, **{"spec": forged["spec"]}}))
    assert by_role(stolen("PATCH", f"{LEASES}/a", {"spec": forged["spec"]}))
    assert by_role(stolen("DELETE", f"{LEASES}/a"))


@pytest.mark.parametrize(
    "kind",
    [
        "mutatingwebhookconfigurations",
        "validatingwebhookconfigurations",
        "validatingadmissionpolicies",
        "validatingadmissionpolicybindings",
    ],
)
def test_it_writes_no_other_configuration(stolen: Ask, kind: str) -> None:
    path = f"{REGISTRATION}/{kind}"
    body = {"metadata": {"name": "other"}}
    assert by_role(stolen("POST", path, body))
    assert by_role(stolen("GET", path))
    for name in ("other", POLICY):
        assert by_role(stolen("PUT", f"{path}/{name}", {"metadata": {"name": name}}))
        assert by_role(stolen("DELETE", f"{path}/{name}"))
    assert by_role(stolen("DELETE", f"{path}/localmodel-hook"))


@pytest.mark.parametrize(
    "made",
    [
        volume("other", "localmodel-x"),
        volume("localmodel-x", "other"),
        volume("localmodel-x", "localmodel-x", team="a"),
        {**volume("localmodel-x", ""), "spec": group("g", "/m")["spec"]["persistentVolumeSpec"]},
    ],
)
def test_it_makes_no_volume_but_ours(stolen: Ask, made: Json) -> None:
    assert by_policy(stolen("POST", VOLUMES, made))


def test_it_lets_nobody_else_choose_a_name(stolen: Ask) -> None:
    made = volume("", "localmodel-x")
    made["metadata"] = {"generateName": "other-", "labels": MANAGED}
    assert by_policy(stolen("POST", VOLUMES, made))


def test_it_makes_no_claim_but_ours(stolen: Ask) -> None:
    for made in (claim("other"), claim("localmodel-x", team="a")):
        assert by_policy(stolen("POST", CLAIMS, made))


@pytest.mark.parametrize("name", ["theirs", "localmodel-of-somebody-else"])
def test_it_touches_nobody_elses(plane: ControlPlane, stolen: Ask, name: str) -> None:
    """Neither by deleting it, nor by giving it to another, nor by calling it ours first."""
    plane.request("POST", VOLUMES, volume(name, "theirs", team="a")).ok()
    plane.request("POST", CLAIMS, claim(name, team="a")).ok()
    for path in (f"{VOLUMES}/{name}", f"{CLAIMS}/{name}"):
        assert by_policy(stolen("DELETE", path))
    ours = {"metadata": {"labels": MANAGED}, "spec": {"claimRef": {"name": "localmodel-x"}}}
    assert by_policy(stolen("PATCH", f"{VOLUMES}/{name}", {"metadata": ours["metadata"]}))
    assert by_policy(stolen("PATCH", f"{VOLUMES}/{name}", ours))
    assert by_role(stolen("PATCH", f"{CLAIMS}/{name}", {"metadata": ours["metadata"]}))
    for path in (VOLUMES, CLAIMS):
        assert by_role(stolen("DELETE", path))  # all of them at once


@pytest.mark.parametrize(
    "path",
    [
        f"{SERVING}/localmodelnodegroups",
        f"{SERVING}/localmodelcaches",
        f"{SERVING}/localmodelnodes",
        f"{SERVING}/namespaces/team-a/localmodelnamespacecaches",
        "/api/v1/nodes",
        "/api/v1/namespaces",
        "/api/v1/namespaces/team-a/pods",
        "/api/v1/namespaces/team-a/configmaps",
        f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts",
        f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments",
        f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets",
        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    ],
)
def test_what_else_it_does_not_write(stolen: Ask, path: str) -> None:
    body = {"metadata": {"name": "any"}}
    assert by_role(stolen("POST", path, body))
    assert by_role(stolen("PUT", f"{path}/any", body))
    assert by_role(stolen("PATCH", f"{path}/any", {"metadata": {"labels": {"x": "y"}}}))
    assert by_role(stolen("PATCH", f"{path}/any/status", {"status": {}}))
    assert by_role(stolen("DELETE", f"{path}/any"))


def test_it_has_no_token_of_another(stolen: Ask) -> None:
    for name in (ACCOUNT, "localmodel-agent", "default"):
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{name}/token"
        assert by_role(stolen("POST", path, {"spec": {}}))


def test_its_own_configuration_it_may_write_and_not_remove(stolen: Ask) -> None:
    found = stolen("GET", MUTATING).ok()
    stolen("PUT", f"{MUTATING}?dryRun=All", found).ok()
    assert by_role(stolen("DELETE", MUTATING))
