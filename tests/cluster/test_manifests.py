"""What we ship, really created on a real API server; and what its pod may and may not."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from agent.config import ControllerSettings, Mode
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import ACCOUNT
from tests.cluster.identity import NAMESPACE, SERVICE_ACCOUNT, make_kserves_namespaces
from tests.machine import REPOSITORY

OVERLAYS = sorted(path.name for path in (REPOSITORY / "daemonset/overlays").iterdir())
OWNER = 64000


@pytest.fixture
def pod(control_plane: ControlPlane, node_name: str) -> dict[str, Any]:
    """What the API server made of the template, as the DaemonSet's controller would send it."""
    daemonset = control_plane.get("daemonset", SERVICE_ACCOUNT, "-n", NAMESPACE)
    template = daemonset["spec"]["template"]
    template["metadata"]["name"] = f"template-{node_name}"
    template["spec"]["nodeName"] = node_name
    path = f"/api/v1/namespaces/{NAMESPACE}/pods"
    answer = control_plane.request("POST", path, {**template, "kind": "Pod", "apiVersion": "v1"})
    made: dict[str, Any] = answer.ok()["spec"]
    assert answer.warnings == ()
    return made


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_created(
    private_control_plane: Callable[..., ControlPlane], overlay: str
) -> None:
    plane = private_control_plane(installed=False)
    make_kserves_namespaces(plane)
    manifests = REPOSITORY / "daemonset/overlays" / overlay
    wanted = list(yaml.safe_load_all(plane.kubectl("kustomize", manifests)))
    made = plane.kubectl("apply", "-k", manifests).splitlines()
    assert len(made) == len(wanted)
    assert all(line.endswith(" created") for line in made), made
    # Not what a second apply says: of some kinds that is "configured", whatever there is.
    assert plane.kubectl("diff", "-k", manifests) == ""
    plane.kubectl("delete", "-k", manifests, "--wait=false")


@pytest.mark.parametrize(
    "policy", ["localmodel-agent-own-node", "localmodel-controller-own-volumes"]
)
def test_the_policies_compile_against_our_types(control_plane: ControlPlane, policy: str) -> None:
    answer = control_plane.get("validatingadmissionpolicy", policy)
    assert answer["spec"]["failurePolicy"] == "Fail"
    assert "expressionWarnings" not in answer.get("status", {}).get("typeChecking", {})


@pytest.mark.parametrize("part", ["base", "controller"])
def test_the_code_that_needs_a_rule_is_named_and_there(part: str) -> None:
    text = (REPOSITORY / "daemonset" / part / "rbac.yaml").read_text()
    rules = text.count("  - apiGroups: [")
    named = re.findall(r"# (agent/\S+\.py):", text)
    assert len(named) == rules
    assert [path for path in named if not (REPOSITORY / path).is_file()] == []


def test_the_agent_is_nobody(pod: dict[str, Any]) -> None:
    (agent,) = pod["containers"]
    assert agent["securityContext"] == {
        "runAsUser": OWNER,
        "runAsGroup": OWNER,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_prepare_is_root_with_three_capabilities(pod: dict[str, Any]) -> None:
    (prepare,) = pod["initContainers"]
    context = prepare["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN", "FOWNER", "DAC_OVERRIDE"]}
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert f"--owner={OWNER}:{OWNER}" in prepare["args"]
    assert "--adopt" in prepare["args"]


def test_the_pod_shares_nothing_else_with_its_host(pod: dict[str, Any]) -> None:
    assert pod["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert not [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    paths = [volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume]
    assert paths == ["/models", "/var/lib/localmodel-agent"]


def test_only_the_agent_has_the_token(pod: dict[str, Any]) -> None:
    where = "/var/run/secrets/kubernetes.io/serviceaccount"
    mounts = {
        container["name"]: [mount["mountPath"] for mount in container["volumeMounts"]]
        for container in pod["initContainers"] + pod["containers"]
    }
    assert [name for name, paths in mounts.items() if where in paths] == ["agent"]


def test_the_cache_has_the_same_path_everywhere(pod: dict[str, Any]) -> None:
    for container in pod["initContainers"] + pod["containers"]:
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == "models"]
        assert mount["mountPath"] == "/models"
        assert mount["mountPropagation"] == "HostToContainer"
        assert {"name": "LOCALMODEL_ROOT", "value": "/models"} in container["env"]


def test_requests_are_explicit_and_cpu_is_not_limited(pod: dict[str, Any]) -> None:
    for container in pod["initContainers"] + pod["containers"]:
        resources = container["resources"]
        assert set(resources["requests"]) == {"cpu", "memory"}
        assert set(resources["limits"]) == {"memory"}


def test_it_goes_where_kserves_agent_goes_and_onto_gpu_nodes(pod: dict[str, Any]) -> None:
    assert pod["nodeSelector"] == {"kserve/localmodel": "worker"}
    tolerated = {one["key"] for one in pod["tolerations"] if one["operator"] == "Exists"}
    assert {"nvidia.com/gpu", "amd.com/gpu"} <= tolerated
    assert 0 < pod["priority"] < 2_000_000_000  # the class was found; system's are above


def test_the_probes_ask_what_the_agent_serves(pod: dict[str, Any]) -> None:
    (agent,) = pod["containers"]
    assert agent["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert agent["readinessProbe"]["httpGet"]["path"] == "/readyz"
    (port,) = agent["ports"]
    assert port["name"] == agent["livenessProbe"]["httpGet"]["port"] == "metrics"
    assert f"--listen=:{port['containerPort']}" in agent["args"]


# -- the controller ------------------------------------------------------------------------------


@pytest.fixture
def controller(control_plane: ControlPlane) -> dict[str, Any]:
    """Its Deployment, as the API server has it."""
    found: dict[str, Any] = control_plane.get("deployment", ACCOUNT, "-n", NAMESPACE)
    return found


def test_the_controller_satisfies_the_restricted_standard(
    control_plane: ControlPlane, controller: dict[str, Any]
) -> None:
    name = "restricted-controller"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": name, "labels": labels}
    control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    account = {"metadata": {"name": ACCOUNT}}
    control_plane.request("POST", f"/api/v1/namespaces/{name}/serviceaccounts", account)
    template = controller["spec"]["template"]
    template["metadata"]["name"] = "template"
    path = f"/api/v1/namespaces/{name}/pods?dryRun=All"
    answer = control_plane.request("POST", path, template)
    answer.ok()
    assert answer.warnings == ()
    template["spec"]["containers"][0]["securityContext"]["runAsNonRoot"] = False
    assert "violates PodSecurity" in control_plane.request("POST", path, template).message


def test_the_controller_is_nobody(controller: dict[str, Any]) -> None:
    spec = controller["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "runAsUser": OWNER,
        "runAsGroup": OWNER,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "volumes" not in spec
    assert "initContainers" not in spec


def test_one_controller_answers_whatever_is_drained_or_rolled_out(
    control_plane: ControlPlane, controller: dict[str, Any]
) -> None:
    spec = controller["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    budget = control_plane.get("poddisruptionbudget", ACCOUNT, "-n", NAMESPACE)["spec"]
    assert budget["minAvailable"] == 1
    assert budget["selector"] == spec["selector"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    drain = ControllerSettings(mode=Mode.KSERVE).drain_seconds
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > drain + 2


def test_the_service_leads_to_the_hook(
    control_plane: ControlPlane, controller: dict[str, Any]
) -> None:
    service = control_plane.get("service", "localmodel-hook", "-n", NAMESPACE)["spec"]
    template = controller["spec"]["template"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [(port["port"], port["targetPort"]) for port in service["ports"]] == [(443, "hook")]
    assert f"--listen=:{ports['hook']}" in container["args"]
    assert f"--health-listen=:{ports['metrics']}" in container["args"]
    assert container["readinessProbe"]["httpGet"] == {
        **{"path": "/readyz", "port": "metrics", "scheme": "HTTP"}
    }


def test_the_hook_is_called_last_and_stops_nobody(control_plane: ControlPlane) -> None:
    configuration = control_plane.get("mutatingwebhookconfiguration", "localmodel-hook")
    assert configuration["metadata"]["name"] > "inferenceservice.serving.kserve.io"
    (hook,) = configuration["webhooks"]
    assert (hook["failurePolicy"], hook["timeoutSeconds"]) == ("Ignore", 3)
    assert (hook["reinvocationPolicy"], hook["sideEffects"]) == ("IfNeeded", "None")
    (rule,) = hook["rules"]
    assert (rule["operations"], rule["resources"]) == (["CREATE"], ["pods"])
    assert hook["matchConditions"]
