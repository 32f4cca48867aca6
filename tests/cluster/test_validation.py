"""What kubectl says of caches where the shipped hook validates them (the overlay standalone)."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.model import cache_key
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import PODS, controllers, namespace
from tests.cluster.identity import SERVING
from tests.cluster.nodes import cache, group
from tests.machine import until

CACHES = f"{SERVING}/localmodelcaches"


@pytest.fixture(scope="module")
def plane(
    module_control_plane: Callable[..., ControlPlane], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """With two groups, and one controller that validates."""
    plane = module_control_plane(overlay="standalone")
    plane.apply(group("gpu1", "/models"), group("gpu2", "/models"))
    small = {"spec": {"storageLimit": "5Gi"}}
    plane.request("PATCH", f"{SERVING}/localmodelnodegroups/gpu1", small).ok()
    namespace(plane, "team-a")
    home: Path = tmp_path_factory.mktemp("standalone") / "controllers"
    with controllers(plane, home) as replicas:
        controller = replicas.start(mode="standalone")
        replicas.called(controller)
        assert controller.metrics()["localmodel_hook_validations_total Refused"] == 0
        # In force: caches of no group are refused.
        refused = [yaml.safe_dump(cache("nobody", "hf://no/body", ["nowhere"]))]

        def answers() -> bool:
            return "there is no" in create(plane, *refused, dry_run=True)

        until(answers, controller.log_text)
        yield plane


def create(plane: ControlPlane, *texts: str, dry_run: bool = False) -> str:
    flags = ["--dry-run=server"] if dry_run else []
    return plane.told("create", "-f", "-", *flags, input="---\n".join(texts))


def written(name: str, uri: str, groups: list[str], **spec: Any) -> str:
    made = cache(name, uri, groups)
    made["spec"] |= spec
    return yaml.safe_dump(made)


# -- what kubectl says ---------------------------------------------------------------------------


def test_what_is_well_formed_is_created_without_a_word(plane: ControlPlane) -> None:
    told = create(plane, written("fine", "hf://fine/model", ["gpu1", "gpu2"]))
    assert told == "localmodelcache.serving.kserve.io/fine created"


def test_an_unknown_group_is_refused(plane: ControlPlane) -> None:
    told = create(plane, written("lost", "hf://lost/model", ["gpu1", "gpu7"]))
    assert 'admission webhook "caches.localmodel-agent.io" denied the request' in told
    assert "there is no LocalModelNodeGroup gpu7; there are: gpu1, gpu2" in told
    assert "Create it first, or correct spec.nodeGroups" in told
    assert plane.request("GET", f"{CACHES}/lost").status == 404


def test_a_group_and_its_cache_are_applied_at_once(plane: ControlPlane) -> None:
    """The hook hears of the group by watch, a little later than it is asked about the cache. Here
    the group itself comes later: what is refused is looked at again after a second."""
    made = cache("together", "hf://together/model", ["late"])
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(plane.request, "POST", CACHES, made)
        time.sleep(0.3)
        late = group("late", "/models")
        plane.request("POST", f"{SERVING}/localmodelnodegroups", late).ok()
        asked.result().ok()
    plane.request("DELETE", f"{CACHES}/together").ok()
    plane.request("DELETE", f"{SERVING}/localmodelnodegroups/late").ok()


def test_a_namespaces_cache_is_held_to_the_same(plane: ControlPlane) -> None:
    body = cache("lost", "hf://lost/model", ["gpu7"])
    body["kind"] = "LocalModelNamespaceCache"
    body["metadata"]["namespace"] = "team-a"
    assert "there is no LocalModelNodeGroup gpu7" in create(plane, yaml.safe_dump(body))


def test_what_is_too_large_for_one_group_is_warned_of(plane: ControlPlane) -> None:
    told = create(plane, written("big", "hf://big/model", ["gpu1", "gpu2"], modelSize="7Gi"))
    assert "Warning: modelSize 7Gi is more than the storageLimit of gpu1 5Gi" in told
    assert told.startswith("localmodelcache.serving.kserve.io/big created")


def test_what_is_too_large_for_all_is_refused(plane: ControlPlane) -> None:
    told = create(plane, written("huge", "hf://huge/model", ["gpu1", "gpu2"], modelSize="70Gi"))
    assert "modelSize 70Gi is more than the storageLimit of every node group" in told
    assert plane.request("GET", f"{CACHES}/huge").status == 404


def test_two_caches_of_one_uri_are_refused(plane: ControlPlane) -> None:
    create(plane, written("first", "hf://twice/model", ["gpu1"]))
    second = written("second", "hf://twice/model", ["gpu2"])
    until(lambda: "LocalModelCache first has the same" in create(plane, second, dry_run=True))
    assert "add the node groups to that one" in create(plane, second)


def test_a_mistyped_field_is_told_of(plane: ControlPlane) -> None:
    """kubectl refuses it by the schema; who goes around that is warned, as the field is dropped."""
    text = written("typo", "hf://typo/model", ["gpu2"], nodeGroup="gpu1")
    assert 'unknown field "spec.nodeGroup"' in create(plane, text)
    told = plane.told("apply", "--validate=ignore", "-f", "-", input=text)
    assert "spec.nodeGroup (gpu1) is no field and says nothing; did you mean nodeGroups?" in told
    assert "typo created" in told


def test_an_update_is_held_to_what_it_changes(plane: ControlPlane) -> None:
    create(plane, written("edited", "hf://edited/model", ["gpu2"]))
    assert "there is no LocalModelNodeGroup gpu7" in plane.told(
        *("patch", "lmc", "edited", "--type=merge"),
        *("-p", '{"spec": {"nodeGroups": ["gpu2", "gpu7"]}}'),
    )
    told = plane.told("annotate", "lmc", "edited", "localmodel-agent.io/policy=sometimes")
    assert "denied the request" in told
    assert "annotated" in plane.told("annotate", "lmc", "edited", "team=a")


# -- deletions -----------------------------------------------------------------------------------


def delete(plane: ControlPlane, name: str) -> str:
    return plane.told("delete", "lmc", name, "--wait=false")


def test_a_cache_that_a_pod_relies_on_stays(plane: ControlPlane) -> None:
    create(plane, written("relied", "hf://relied/model", ["gpu2"]))
    note = {"localmodel-agent.io/keys": cache_key("hf://relied/model")}
    mount = {"name": "cache", "mountPath": "/mnt/localmodel"}
    volume = {"name": "cache", "persistentVolumeClaim": {"claimName": "localmodel-gpu2"}}
    main = {"name": "main", "image": "any", "volumeMounts": [mount]}
    spec = {"containers": [main], "volumes": [volume]}
    pods = PODS.format("team-a")
    body = {"metadata": {"name": "user", "annotations": note}, "spec": spec}
    plane.request("POST", pods, body).ok()
    told = delete(plane, "relied")
    assert "relied is in use by pod team-a/user: delete these, or give them another model" in told
    plane.request("PATCH", f"{pods}/user/status", {"status": {"phase": "Failed"}}).ok()
    assert "deleted" in delete(plane, "relied")
    assert plane.request("GET", f"{CACHES}/relied").status == 404


def services_crd() -> dict[str, Any]:
    """As much of KServe's InferenceServices as is needed to have one."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": anything}}}
    names = {"kind": "InferenceService", "plural": "inferenceservices"}
    version = {"name": "v1beta1", "served": True, "storage": True, "schema": schema}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "inferenceservices.serving.kserve.io"},
        "spec": {
            "group": "serving.kserve.io",
            "names": names,
            "scope": "Namespaced",
            "versions": [version],
        },
    }


def used_by(plane: ControlPlane, name: str, **services: list[dict[str, str]]) -> None:
    create(plane, written(name, f"hf://{name}/model", ["gpu2"]))
    status = {"status": services}
    plane.request("PATCH", f"{CACHES}/{name}/status", status).ok()


def test_a_cache_whose_services_are_no_kind_here_goes(plane: ControlPlane) -> None:
    """KServe was here once."""
    used_by(plane, "old", llmInferenceServices=[{"name": "x", "namespace": "team-a"}])
    assert "deleted" in delete(plane, "old")


def test_a_cache_stays_while_a_service_uses_it(plane: ControlPlane) -> None:
    plane.apply(services_crd())
    services = "/apis/serving.kserve.io/v1beta1/namespaces/team-a/inferenceservices"
    label = {"internal.serving.kserve.io/localmodel": "served"}
    head = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService"}
    body = {**head, "metadata": {"name": "llm", "labels": label}, "spec": {}}
    until(lambda: plane.request("POST", services, body).status in (201, 409))
    gone = {"name": "gone", "namespace": "team-a"}
    used_by(plane, "served", inferenceServices=[gone, {"name": "llm", "namespace": "team-a"}])
    told = delete(plane, "served")
    assert "served is in use by InferenceService team-a/llm: delete these" in told
    plane.request("DELETE", f"{services}/llm").ok()
    assert "deleted" in delete(plane, "served")  # though its status still names both


def test_a_finalizer_can_always_be_taken_away(plane: ControlPlane) -> None:
    """Whatever has become of the groups, the size and the other caches meanwhile."""
    plane.apply(group("gpu3", "/models"))
    made = cache("finished", "hf://finished/model", ["gpu3"])
    made["metadata"]["finalizers"] = ["serving.kserve.io/localmodel-finalizer"]
    until(lambda: "created" in create(plane, yaml.safe_dump(made)))
    plane.request("DELETE", f"{SERVING}/localmodelnodegroups/gpu3").ok()
    assert "deleted" in delete(plane, "finished")
    assert plane.request("GET", f"{CACHES}/finished").status == 200
    assert "patched" in plane.told(
        *("patch", "lmc", "finished", "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
    )
    assert plane.request("GET", f"{CACHES}/finished").status == 404
