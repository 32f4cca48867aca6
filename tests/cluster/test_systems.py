"""Systems that people serve models with (tests/systems), on a real API server with the real
controller behind the shipped webhook configuration: what their pods are when they are stored.

KServe's controllers do not run here: tests/cluster/predictors.py has the pods that they make.
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.model import cache_key
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import PODS, Controller, controllers
from tests.cluster.identity import AgentOnNode
from tests.cluster.kserve_crds import service_crds
from tests.cluster.nodes import Node
from tests.cluster.predictors import (
    of_deployment,
    of_modelmesh,
    of_triton,
    of_uri,
    on_openshift,
    the_recorded,
)
from tests.cluster.systems import DISABLE, Admitted, System, claims
from tests.conftest import FILES
from tests.fakes.hub import Hub
from tests.hook.pods import A100, H100, PRODUCT, QWEN, recorded_service
from tests.machine import files_of, machine, until

OURS, MOUNT = "localmodel-cache", "/mnt/localmodel"
GIB = 1024**3
GPU = {"limits": {"nvidia.com/gpu": "1", "cpu": "8", "memory": "48Gi"}}

Json = dict[str, Any]


@pytest.fixture(scope="module")
def plane(module_control_plane: Callable[..., ControlPlane]) -> ControlPlane:
    made = module_control_plane()
    made.apply(*service_crds())
    made.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    return made


@pytest.fixture(scope="module")
def controller(
    plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Controller]:
    with controllers(plane, tmp_path_factory.mktemp("systems") / "controllers") as replicas:
        # Between two tests their claims go: not a quarter of a minute after the last look.
        made = replicas.start(look_seconds=1.0).wait_ready()
        replicas.called(made)
        yield made


@pytest.fixture
def system(plane: ControlPlane, controller: Controller) -> Iterator[Callable[[str], System]]:
    """By the name of its file; one in a test."""
    made: list[System] = []

    def make(name: str) -> System:
        made.append(System(plane, controller, name))
        return made[0]

    yield make
    for one in made:
        one.remove()


# -- what is true of every system ------------------------------------------------------------------


def check_wrapped(found: Admitted, group: str, server: str, *uris: str) -> None:
    """It starts from the cache of the group, and would start without it."""
    assert found.claims[OURS] == {"claimName": f"localmodel-{group}", "readOnly": True}
    assert found.note("keys").split(",") == sorted(map(cache_key, uris))
    whole = {"name": OURS, "mountPath": MOUNT, "readOnly": True}
    assert found.mounts("storage-initializer")[MOUNT] == whole
    assert found.mounts(server)[MOUNT] == whole
    script = found.spec["initContainers"][0]["command"][2]
    assert all(cache_key(uri) in script for uri in uris)
    assert "exec /storage-initializer/scripts/initializer-entrypoint" in script


def check_shared(system: System, pod: Json, *, holder: str, other: str) -> None:
    """Of a pod that was helped: what holds for it whatever it is. `holder` has said that it has all
    of its models, `other` is the second node of the group."""
    _check_prefers(system, pod, holder)
    _check_opts_out(system, pod)
    _check_waits_for_agents(system, pod, other)


def _check_prefers(system: System, pod: Json, holder: str) -> None:
    """The node that has the models, and requires nothing that it did not require before."""
    name = {"key": "metadata.name", "operator": "In", "values": [holder]}
    term = {"weight": 50, "preference": {"matchFields": [name]}}

    assert "affinity" not in pod["spec"]

    def preferring() -> Json:
        found: Json = system.admitted(pod, "Patched").spec.get("affinity", {})
        return found

    found = until(preferring, f"no preference for {holder}")
    preferred = {"preferredDuringSchedulingIgnoredDuringExecution": [term]}
    assert found == {"nodeAffinity": preferred}


def _check_opts_out(system: System, pod: Json) -> None:
    for name, value, outcome in (
        (DISABLE, "any value", ""),
        ("localmodel-agent.io/disable", "true", ""),
        ("storage.kserve.io/readonly", "false", "Writes"),
    ):
        out = copy.deepcopy(pod)
        out["metadata"].setdefault("annotations", {})[name] = value
        found = system.admitted(out, outcome)
        assert not [warning for warning in found.warnings if "cache" in warning]


def _check_waits_for_agents(system: System, pod: Json, node: str) -> None:
    """While a node of the group has none, the pod could come there and wait for good."""
    system.beat(node, seconds=1)
    found = system.admitted(pod, "NoAgent", saying=node)
    assert (
        f"not from the node's cache: a node of the group has no living agent: {node};"
        " look at the agent's pods on these nodes"
    ) in found.warnings
    system.beat(node, seconds=120)
    system.admitted(pod, "Patched")


# -- vLLM ------------------------------------------------------------------------------------------


def test_an_inference_service_with_a_uri(system: Callable[[str], System]) -> None:
    chat = system("vllm")
    chat.apply()
    chat.add_node("chat-1")
    chat.add_node("chat-2")
    service = chat.named("InferenceService")
    pod = the_recorded("uncached-hf", service)
    found = chat.admitted(pod, "Patched")
    uri = service["spec"]["predictor"]["model"]["storageUri"]
    check_wrapped(found, "chat-gpus", "kserve-container", uri)
    assert found.warnings == ()
    assert "affinity" not in found.spec, "no node has it yet"
    chat.hold("chat-1", llama_3_1_8b=16 * GIB)
    check_shared(chat, pod, holder="chat-1", other="chat-2")


def test_the_same_service_where_kserve_gives_it_the_claim(
    system: Callable[[str], System],
) -> None:
    """KServe's claim is mounted as it was, and can no more be written to."""
    chat = system("vllm")
    chat.apply()
    service = chat.named("InferenceService")
    of_llm = recorded_service("llmisvc-cached")
    of_llm = {**of_llm, "metadata": {"name": "llama-llm", "namespace": "chat"}}
    for pod in (
        the_recorded("cached-hf", service, gpu1="chat-gpus"),
        the_recorded("llmisvc-cached", of_llm, gpu1="chat-gpus"),
    ):
        found = chat.admitted(pod, "Patched")
        claim = {"claimName": "llama-3-1-8b-chat-gpus"}
        assert claims(found.plain) == {"kserve-pvc-source": claim}
        assert found.claims == {"kserve-pvc-source": {**claim, "readOnly": True}}
        assert found.warnings == ()
        assert found.note("keys") == cache_key("hf://meta-llama/Llama-3.1-8B-Instruct")


def test_an_llm_inference_service(system: Callable[[str], System]) -> None:
    """Of which no label and no annotation says what it is."""
    chat = system("vllm")
    chat.apply()
    chat.add_node("chat-1")
    chat.add_node("chat-2")
    service = chat.named("LLMInferenceService")
    pod = the_recorded("llmisvc", service)
    found = chat.admitted(pod, "Patched")
    check_wrapped(found, "chat-gpus", "main", service["spec"]["model"]["uri"])
    assert found.warnings == ()
    chat.hold("chat-2", mistral_7b=15 * GIB)
    check_shared(chat, pod, holder="chat-2", other="chat-1")


def test_a_cache_of_a_namespace_is_for_its_pods_alone(system: Callable[[str], System]) -> None:
    chat = system("vllm")
    chat.apply()
    chat.add_namespace("chat-guests")
    chat.bind("chat-guests")
    chat.add_node("chat-1")
    spec = {"sourceModelUri": QWEN, "modelSize": "15Gi", "nodeGroups": ["chat-gpus"]}
    chat.add(
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "LocalModelNamespaceCache",
            "metadata": {"name": "qwen", "namespace": "chat"},
            "spec": spec,
        }
    )
    service = chat.named("InferenceService")
    service["spec"]["predictor"]["model"]["storageUri"] = QWEN
    pod = of_uri(service)
    check_wrapped(chat.admitted(pod, "Patched"), "chat-gpus", "kserve-container", QWEN)
    service["metadata"]["namespace"] = "chat-guests"
    assert chat.admitted(of_uri(service), "NoCache").warnings == ()
    theirs = the_recorded("uncached-hf", {**chat.named("InferenceService")})
    theirs["metadata"]["namespace"] = "chat-guests"
    chat.admitted(theirs, "Patched")  # the cluster's caches are theirs, too


# -- two kinds of nodes ----------------------------------------------------------------------------


def test_a_model_on_two_kinds_of_nodes(system: Callable[[str], System]) -> None:
    research = system("a100-and-h100")
    research.apply()
    research.add_node("r1", nvidia_com__gpu_product=A100)
    research.add_node("r2", nvidia_com__gpu_product=A100)
    uri = research.named("LocalModelCache")["spec"]["sourceModelUri"]
    either = of_uri(research.named("InferenceService", "any"))
    first = research.admitted(either, "Patched")
    check_wrapped(first, "a100", "kserve-container", uri)

    research.relabel("r1", {PRODUCT: H100})  # while that pod is there
    left = research.admitted(either, "OtherNodes", saying="r1")
    assert left.warnings == (
        "not from the node's cache: it could run on nodes outside of the group, and does not name"
        " the group: r1; set the annotation serving.kserve.io/nodegroup, or a nodeSelector",
    )
    big = of_uri(research.named("InferenceService", "big"))
    check_wrapped(research.admitted(big, "Patched"), "h100", "kserve-container", uri)

    for product, group in ((A100, "a100"), (H100, "h100")):
        pod = copy.deepcopy(either)
        pod["spec"]["nodeSelector"] = {PRODUCT: product}
        check_wrapped(research.admitted(pod, "Patched"), group, "kserve-container", uri)
        pod = copy.deepcopy(either)
        expression = {"key": PRODUCT, "operator": "In", "values": [product]}
        terms = {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
        node = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
        pod["spec"]["affinity"] = {"nodeAffinity": node}
        check_wrapped(research.admitted(pod, "Patched"), group, "kserve-container", uri)

    research.relabel("r2", {PRODUCT: H100})
    check_wrapped(research.admitted(either, "Patched"), "h100", "kserve-container", uri)
    still = research.plane.request("GET", first.path).ok()
    assert still["spec"] == first.spec, "what was made before keeps its claim"


# -- OpenShift AI ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_openshift_ai(system: Callable[[str], System], slash: str) -> None:
    """A connection: which model it is stands in the initializer's arguments alone."""
    granite = system("openshift-ai")
    granite.apply()
    for name in ("granite-1", "granite-2"):
        granite.add_node(name)
        granite.taint(name, "nvidia.com/gpu")
    granite.add_node("granite-cpu", node_kubernetes_io__instance_type="m5.xlarge")
    granite.without_gpu("granite-cpu")
    uri = granite.named("LocalModelCache")["spec"]["sourceModelUri"]
    pod = on_openshift(granite.named("InferenceService"), uri=uri + slash)
    found = granite.admitted(pod, "Patched")
    check_wrapped(found, "rhoai-gpus", "kserve-container", uri)
    assert found.warnings == ()
    assert found.spec["initContainers"][0]["args"] == [uri + slash, "/mnt/models"]
    assert f"{uri}{slash})" in found.spec["initContainers"][0]["command"][2]
    granite.hold("granite-2", granite_7b=14 * GIB)
    check_shared(granite, pod, holder="granite-2", other="granite-1")
    pod["spec"]["hostNetwork"] = True
    refused = granite.plane.request("POST", PODS.format("granite"), pod)
    assert "violates PodSecurity" in refused.message, "the namespace enforces nothing"


# -- Triton ----------------------------------------------------------------------------------------


def test_triton_with_its_models_from_two_places(system: Callable[[str], System]) -> None:
    triton = system("triton")
    triton.apply(but="triton-repository")
    triton.add_node("triton-1")
    triton.add_node("triton-2")
    service = triton.named("InferenceService")
    pod = of_triton(service)
    repository, weights = (pair["uri"] for pair in service["spec"]["predictor"]["storageUris"])

    one = triton.admitted(pod, "Patched")
    check_wrapped(one, "triton-gpus", "kserve-container", weights)
    assert repository not in one.spec["initContainers"][0]["command"][2], "not ours to link"
    assert one.spec["initContainers"][0]["args"] == [
        *(repository, "/mnt/models/repository"),
        *(weights, "/mnt/models/weights"),
    ]
    assert one.warnings == (
        "container kserve-container has 2Gi of memory and no GPU, as where nothing is asked for:"
        ' vLLM then ends with "Stub process is not healthy"; set resources.limits (nvidia.com/gpu,'
        " memory) of the predictor",
    )

    triton.add(triton.named("LocalModelCache", "triton-repository"))
    service["spec"]["predictor"]["triton"]["resources"] = GPU
    pod = of_triton(service)

    def both() -> Admitted | None:
        found = triton.admitted(pod, "Patched")
        return found if cache_key(repository) in found.note("keys") else None

    two = until(both)
    assert two is not None
    check_wrapped(two, "triton-gpus", "kserve-container", repository, weights)
    assert two.warnings == ()
    triton.hold("triton-1", qwen_weights=15 * GIB, triton_repository=1)
    check_shared(triton, pod, holder="triton-1", other="triton-2")


# -- ModelMesh -------------------------------------------------------------------------------------


def test_modelmesh_is_told_of_the_claim_that_its_namespace_has(
    system: Callable[[str], System],
) -> None:
    mesh = system("modelmesh")
    path = "/api/v1/namespaces/{}/persistentvolumeclaims/localmodel-mesh-nodes"
    unlabelled = mesh.named("Namespace")
    del unlabelled["metadata"]["labels"]
    mesh.plane.apply(unlabelled)
    mesh.add_namespace("mesh-labelled")
    mesh.add(mesh.named("LocalModelNodeGroup"))
    mesh.bind("mesh-labelled")
    assert mesh.plane.request("GET", path.format("mesh")).status == 404
    mesh.apply()
    claim = mesh.plane.request("GET", path.format("mesh")).ok()["spec"]
    assert claim["volumeName"].startswith("localmodel-mesh-nodes-")

    mesh.add_node("mesh-1")
    mesh.hold("mesh-1", sentence_encoder=4 * GIB)
    found = mesh.admitted(of_modelmesh("mesh"), "NotOurs", saying="sentence-encoder")
    assert found.warnings == (
        "emptyDir models-dir may hold 1.5Gi, and the cached model sentence-encoder has 4Gi: the pod"
        " is evicted then; mount the claim localmodel-mesh-nodes: `localmodel show NAME -o json`"
        " prints the storage stanza",
    )
    mounting = of_modelmesh("mesh", "localmodel-mesh-nodes")
    assert mesh.admitted(mounting, "NotOurs").warnings == ()
    assert mesh.admitted(of_modelmesh("mesh", memory_mib=4096), "NotOurs").warnings == ()


def test_modelmesh_reads_the_models_of_a_real_agent(
    system: Callable[[str], System], tmp_path: Path, hub: Hub
) -> None:
    """By the stanza that the agent prints, and the links that ModelMesh's puller makes of it."""
    mesh = system("modelmesh")
    uri = mesh.named("LocalModelCache")["spec"]["sourceModelUri"]
    hub.add(uri.removeprefix("hf://"), FILES)
    with machine(tmp_path / "machine", hub.endpoint) as found:
        mesh.at(found.root)
        mesh.apply()
        node = Node(mesh.plane, AgentOnNode.create(mesh.plane, "mesh-agent"), found)
        node.group = "mesh-nodes"
        agent = node.start()
        node.want(**{"sentence-encoder": uri})
        node.wait_words(agent, **{"sentence-encoder": "ModelDownloaded"})
        shown = found("show", "sentence-encoder", "-o", "json").ok().json
        stanza = shown["modelmesh"]["mesh-nodes"]["storage"]
        service = mesh.named("InferenceService")
        assert service["spec"]["predictor"]["model"]["storage"] == stanza

        mounted = tmp_path / "pvc_mounts" / stanza["parameters"]["name"]
        mounted.parent.mkdir()
        mounted.symlink_to(found.root)  # stands for the mount
        directory = tmp_path / "models" / "encoder"
        model = pulled(stanza["path"], mounted, directory)
        assert files_of(model) == FILES
        assert size_on_disk(model) == sum(map(len, FILES.values()))
        shutil.rmtree(directory)  # the puller unloads a model so
        found.check_offers()
    mesh.plane.request("DELETE", "/api/v1/nodes/mesh-agent").ok()


def pulled(path: str, claim: Path, directory: Path) -> Path:
    """What the puller makes of `type: pvc` (modelmesh-runtime-adapter, commit 0a3eba9,
    pullman/storageproviders/pvc/provider.go): one link to the path in the mounted claim, which the
    runtime is told to load."""
    directory.mkdir(parents=True, mode=0o755)
    source = claim / path
    source.stat()
    link = directory / source.name
    link.symlink_to(source)
    return link


def size_on_disk(model: Path) -> int:
    """As the puller counts it (model-serving-puller/puller/puller.go, getModelDiskSize): links in
    a model are followed by what they say, which has to be an absolute path."""
    if model.is_symlink():
        return size_on_disk(model.readlink())
    if model.is_dir():
        return sum(map(size_on_disk, model.iterdir()))
    return model.lstat().st_size


# -- without KServe --------------------------------------------------------------------------------


def test_a_deployment_names_a_base_model_and_an_adapter(system: Callable[[str], System]) -> None:
    plain = system("deployment")
    plain.apply()
    plain.add_node("plain-1")
    plain.add_node("plain-2")
    pod = of_deployment(plain.named("Deployment"))
    found = plain.admitted(pod, "Patched")
    base, adapter = (
        plain.named("LocalModelCache", name)["spec"]["sourceModelUri"]
        for name in ("qwen-base", "support-adapter")
    )
    assert found.claims == {OURS: {"claimName": "localmodel-plain-gpus", "readOnly": True}}
    assert found.mounts("vllm") == {
        place: {
            "name": OURS,
            "mountPath": place,
            "subPath": f"models/{cache_key(uri)}",
            "readOnly": True,
        }
        for place, uri in (("/models/base", base), ("/models/adapters/support", adapter))
    }
    assert found.note("keys").split(",") == sorted(map(cache_key, (base, adapter)))
    assert found.warnings == ()
    plain.hold("plain-1", qwen_base=16 * GIB, support_adapter=1)
    check_shared(plain, pod, holder="plain-1", other="plain-2")


def test_a_deployment_that_names_what_no_cache_has(system: Callable[[str], System]) -> None:
    """It makes nobody fetch anything, and is told what it lacks."""
    plain = system("deployment")
    plain.apply(but="support-adapter")
    plain.add_node("plain-1")
    pod = of_deployment(plain.named("Deployment"))
    found = plain.admitted(pod, "NoSuchCache")
    assert found.warnings == (
        "not from the node's cache: no cache has what it names: s3://adapters/support/v3; correct"
        " the annotation, or create the cache or its group",
    )
