"""Predictor pods on the real node: admitted by the shipped controllers, fed by the agent."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent import layout
from agent.model import cache_key
from tests.cluster.identity import NAMESPACE
from tests.cluster.nodes import cache
from tests.fakes.hub import Hub, Slow
from tests.machine import until
from tests.node.installation import CONTROLLER, GROUP, Agent
from tests.node.node import BUSYBOX, on_host
from tests.node.objects import PATIENCE, SLEEP, Pod
from tests.node.tenants import SERVER, Tenant, claim_of_kserve, initializer_image, tree

NAMES = ("config.json", "model.safetensors", "sub/dir/tokenizer.json")


def files(repo: str) -> dict[str, bytes]:
    """Of each repository others: what the node has already is not downloaded again."""
    weights = random.Random(repo).randbytes(2_000_000)
    contents = (f'{{"name": "{repo}"}}\n'.encode(), weights, f'["{repo}"]\n'.encode())
    return dict(zip(NAMES, contents, strict=True))


def digests(repo: str) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files(repo).items()}


def sent(hub: Hub, repo: str) -> int:
    return sum(hub.bytes_sent(f"{repo}/{name}") for name in NAMES)


@pytest.fixture(scope="module")
def serving(agent: Agent) -> Agent:
    """With both controllers ready, and an initializer to wrap."""
    agent.node.load(initializer_image())

    agent.wait_controllers()
    return agent


@pytest.fixture
def tenant(serving: Agent, request: pytest.FixtureRequest) -> Iterator[Tenant]:
    name = request.node.name.removeprefix("test_").replace("_", "-")[:40].strip("-")
    with closing(Tenant(serving.node, serving.hub, name)) as tenant:
        tenant.wait_claim()
        yield tenant


def known(agent: Agent, name: str, repo: str) -> None:
    """A LocalModelCache of it: what the hook goes by. The LocalModelNode is `want`'s."""
    agent.node.plane.apply(cache(name, f"hf://{repo}", [GROUP]))


def downloaded(agent: Agent, name: str) -> str:
    """A new model that the node has; its repository."""
    repo = f"acme/{name}"
    agent.hub.add(repo, files(repo))
    known(agent, name, repo)
    agent.want(name, repo)
    agent.wait_downloaded(name)
    return repo


def test_a_predictor_starts_from_the_cache_and_asks_no_origin(
    serving: Agent, tenant: Tenant
) -> None:
    repo = downloaded(serving, "served")
    before = sent(serving.hub, repo)
    pod = tenant.create(tenant.predictor("p", f"hf://{repo}", NAMES))
    notes = pod.get()["metadata"]["annotations"]
    assert notes["localmodel-agent.io/keys"] == cache_key(f"hf://{repo}"), (
        serving.describe_controllers()
    )
    pod.wait_running(SERVER)
    assert tree(pod) == digests(repo)
    assert "from this node's cache" in pod.log("storage-initializer")
    assert sent(serving.hub, repo) == before


def test_while_the_model_comes_the_pod_waits_and_says_how_far_it_is(
    serving: Agent, tenant: Tenant
) -> None:
    repo = "acme/coming"
    serving.hub.add(repo, files(repo))
    serving.hub.fault(f"{repo}/model.safetensors", Slow(bytes_per_second=300_000))
    known(serving, "coming", repo)
    serving.want("coming", repo)
    until(lambda: serving.status().get("coming") == "ModelDownloading", serving.describe)
    pod = tenant.create(tenant.predictor("p", f"hf://{repo}", NAMES))
    pod.wait_running("storage-initializer")
    until(lambda: "waiting" in pod.log("storage-initializer"), pod.describe)
    serving.hub.clear_faults()
    pod.wait_running(SERVER)
    assert tree(pod) == digests(repo)
    assert sent(serving.hub, repo) < 1.5 * sum(map(len, files(repo).values())), "downloaded twice"


def downloaded_by_itself(pod: Pod, repo: str) -> None:
    """It started as it would have without us."""
    uri = f"hf://{repo}"
    pod.wait_running(SERVER)
    assert tree(pod) == digests(repo)
    log = pod.log("storage-initializer")
    assert f"runs the original entrypoint for: {uri}" in log
    assert f"downloaded {uri}" in log


def test_a_model_that_does_not_fit_is_downloaded_by_the_pod(serving: Agent, tenant: Tenant) -> None:
    repo = "acme/too-large"
    serving.hub.add(repo, files(repo))
    group = f"/apis/serving.kserve.io/v1alpha1/localmodelnodegroups/{GROUP}"
    plane = serving.node.plane
    limit = plane.request("GET", group).ok()["spec"]["storageLimit"]
    plane.request("PATCH", group, {"spec": {"storageLimit": "1Ki"}}).ok()
    try:
        known(serving, "too-large", repo)
        serving.want("too-large", repo)
        pod = tenant.create(tenant.predictor("p", f"hf://{repo}", NAMES))
        downloaded_by_itself(pod, repo)
        assert "the cache cannot bring it: LargerThanVolume" in pod.log("storage-initializer")
    finally:
        plane.request("PATCH", group, {"spec": {"storageLimit": limit}}).ok()
        serving.forget("too-large")


def test_the_deadline_is_the_pods_own(serving: Agent, tenant: Tenant) -> None:
    repo = "acme/too-slow"
    serving.hub.add(repo, files(repo))
    known(serving, "too-slow", repo)
    serving.hub.fault(f"{repo}/model.safetensors", Slow(bytes_per_second=50_000))
    serving.want("too-slow", repo)
    try:
        until(lambda: serving.status().get("too-slow") == "ModelDownloading", serving.describe)
        wait = {"localmodel-agent.io/wait": "4s"}
        pod = tenant.predictor("p", f"hf://{repo}", NAMES, annotations=wait)
        made = tenant.create(pod)
        made.wait_running("storage-initializer")
        until(lambda: "waited long enough" in made.log("storage-initializer"), made.describe)
        serving.hub.clear_faults()
        downloaded_by_itself(made, repo)
    finally:
        serving.hub.clear_faults()
        serving.forget("too-slow")


def test_an_agent_that_is_dead_is_waited_for_a_minute(serving: Agent, tenant: Tenant) -> None:
    repo = "acme/abandoned"
    serving.hub.add(repo, files(repo))
    known(serving, "abandoned", repo)
    serving.hub.fault(f"{repo}/model.safetensors", Slow(bytes_per_second=10_000))
    serving.want("abandoned", repo)
    agent = serving.process()
    try:
        progress = on_host("/models") / layout.progress(cache_key(f"hf://{repo}"))
        until(progress.exists, serving.describe)
        agent.suspend()  # to its pod, as good as dead; and kubelet does not start it again yet
        pod = tenant.create(tenant.predictor("p", f"hf://{repo}", NAMES))
        pod.wait_running("storage-initializer")
        until(lambda: "waiting" in pod.log("storage-initializer"), pod.describe)
        serving.hub.clear_faults()
        silent = "the agent of this node is silent"
        until(lambda: silent in pod.log("storage-initializer"), pod.describe, seconds=90)
        downloaded_by_itself(pod, repo)
    finally:
        agent.resume()
        serving.hub.clear_faults()
        serving.wait_ready()


def test_what_the_original_began_the_original_ends(serving: Agent, tenant: Tenant) -> None:
    """A pod that was there before the hook, say, and whose sandbox is made again."""
    repo = downloaded(serving, "half-done")
    pod = tenant.predictor("p", f"hf://{repo}", NAMES)
    (initializer,) = pod["spec"]["initContainers"]
    (volume,) = [mount for mount in initializer["volumeMounts"] if "models" in mount["mountPath"]]
    half = {
        **{"name": "half", "image": BUSYBOX, "imagePullPolicy": "Never", "volumeMounts": [volume]},
        "command": ["sh", "-c", "printf half >/mnt/models/config.json"],
    }
    pod["spec"]["initContainers"].insert(0, half)
    downloaded_by_itself(tenant.create(pod), repo)


def test_run_again_it_links_again(serving: Agent, tenant: Tenant) -> None:
    """Kubelet runs init containers again when the pod's sandbox is made again."""
    repo = downloaded(serving, "twice")
    pod = tenant.create(tenant.predictor("p", f"hf://{repo}", NAMES)).wait_running(SERVER)
    before = sent(serving.hub, repo)
    first = pod.container("storage-initializer")["containerID"]
    serving.node.kill_sandbox(pod.namespace, pod.name)
    until(
        lambda: pod.container("storage-initializer").get("containerID", first) != first,
        pod.describe,
        seconds=PATIENCE,
    )
    until(lambda: "running" in pod.container(SERVER).get("state", {}), pod.describe)
    assert tree(pod) == digests(repo)
    assert "from this node's cache" in pod.log("storage-initializer")
    assert sent(serving.hub, repo) == before


def test_a_pod_that_kserve_rewrote_starts_when_its_model_is_there(
    serving: Agent, tenant: Tenant
) -> None:
    """KServe routes pods to a node that has nothing yet. Without us kubelet makes an empty
    directory in the cache, and the server starts on that (test_kubelet_facts)."""
    repo = "acme/rewritten"
    uri = f"hf://{repo}"
    serving.hub.add(repo, files(repo))
    known(serving, "rewritten", repo)
    claim_of_kserve(tenant, "rewritten-gpu")
    pod = tenant.create(tenant.rewritten("p", uri, "rewritten-gpu"))
    until(lambda: pod.waits_for(SERVER) == "CreateContainerConfigError", pod.describe, seconds=60)
    model = on_host("/models") / layout.model(cache_key(uri))
    assert not model.exists()
    serving.want("rewritten", repo)
    pod.wait_running(SERVER)
    assert tree(pod) == digests(repo)
    (volume,) = [v for v in pod.get()["spec"]["volumes"] if v["name"] == "kserve-pvc-source"]
    assert volume["persistentVolumeClaim"] == {"claimName": "rewritten-gpu", "readOnly": True}


def test_no_pod_changes_the_cache_whatever_it_asks_of_its_volumes(
    serving: Agent, tenant: Tenant
) -> None:
    """OpenShift's SCCs set these on every pod. (SELinux is not on here: of its labels nothing can
    be shown, but that the fields are taken.)"""
    repo = downloaded(serving, "untouched")
    uri = f"hf://{repo}"
    claim_of_kserve(tenant, "untouched-gpu")
    before = modes(on_host("/models"))
    security = {
        **{"runAsUser": 1000680000, "runAsGroup": 0, "fsGroup": 1000680000},
        "seLinuxOptions": {"level": "s0:c26,c10"},
    }
    for name, pod in (
        ("wrapped", tenant.predictor("wrapped", uri, NAMES)),
        ("rewritten", tenant.rewritten("rewritten", uri, "untouched-gpu")),
    ):
        pod["spec"]["securityContext"] = security
        made = tenant.create(pod).wait_running(SERVER)
        assert tree(made) == digests(repo)
        place = "/mnt/localmodel/models" if name == "wrapped" else "/mnt/models"
        script = f"touch {place}/new || echo refused; chmod 777 {place}/* || echo refused"
        said = made.run("sh", "-c", script, container=SERVER)
        assert said.split().count("refused") == 2
        assert modes(on_host("/models")) == before


def test_two_teams_under_the_restricted_standard_read_one_model(
    serving: Agent, tenant: Tenant
) -> None:
    repo = downloaded(serving, "shared")
    uri = f"hf://{repo}"
    before = sent(serving.hub, repo)
    for number in (1, 2):
        name = f"restricted-{number}"
        with closing(Tenant(serving.node, serving.hub, name, restricted=True)) as team:
            team.wait_claim()
            pod = team.predictor("p", uri, NAMES)
            pod["spec"]["securityContext"] |= {
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            }
            for container in pod["spec"]["initContainers"] + pod["spec"]["containers"]:
                container["securityContext"] = {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }
            made = team.create(pod).wait_running(SERVER)
            assert tree(made) == digests(repo)
    assert sent(serving.hub, repo) == before


def test_what_a_pod_reads_is_not_evicted(serving: Agent, tenant: Tenant) -> None:
    repo = downloaded(serving, "kept")
    uri = f"hf://{repo}"
    model = on_host("/models") / layout.model(cache_key(uri))
    pod = tenant.create(tenant.predictor("p", uri, NAMES)).wait_running(SERVER)
    serving.forget("kept")
    until(lambda: "kept" not in serving.status(), serving.describe)
    assert "it is in use" in serving.verb("evict", uri)
    assert f"pod {tenant.name}/p" in serving.verb("why", uri)
    assert tree(pod) == digests(repo)
    tenant.remove(pod)
    until(lambda: not model.exists(), serving.describe, seconds=PATIENCE)


def test_a_pod_makes_an_on_demand_model_come(serving: Agent, tenant: Tenant) -> None:
    repo = "acme/on-demand"
    uri = f"hf://{repo}"
    serving.hub.add(repo, files(repo))
    serving.node.plane.apply(cache("on-demand", uri, [GROUP], policy="on-demand"))
    model = serving.want("on-demand", repo)
    until(lambda: serving.status().get("on-demand") == "ModelDownloadPending", serving.describe)
    pod = tenant.create(tenant.predictor("p", uri, NAMES)).wait_running(SERVER)
    assert tree(pod) == digests(repo)
    assert "from this node's cache" in pod.log("storage-initializer")
    assert sent(serving.hub, repo) == sum(map(len, files(repo).values()))
    assert model.is_dir()


def test_a_plain_deployment_names_its_model(serving: Agent, tenant: Tenant) -> None:
    repo = "acme/plain"
    uri = f"hf://{repo}"
    serving.hub.add(repo, files(repo))
    known(serving, "plain", repo)
    labels = {"app": "vllm"}
    server = {
        **{"name": SERVER, "image": BUSYBOX, "imagePullPolicy": "Never"},
        "command": ["sh", "-c", SLEEP],
    }
    template = {
        "metadata": {"labels": labels, "annotations": {"localmodel-agent.io/source": uri}},
        "spec": {"containers": [server], "terminationGracePeriodSeconds": 1},
    }
    serving.node.plane.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "vllm", "namespace": tenant.name},
            "spec": {"selector": {"matchLabels": labels}, "template": template},
        }
    )

    def name() -> str:
        found = serving.node.plane.get("pods", "-n", tenant.name, "-l", "app=vllm")["items"]
        return str(found[0]["metadata"]["name"]) if found else ""

    pod = Pod(serving.node, until(name, "no pod"), tenant.name)
    until(lambda: pod.waits_for(SERVER) == "CreateContainerConfigError", pod.describe, seconds=60)
    serving.want("plain", repo)
    pod.wait_running(SERVER)
    assert tree(pod) == digests(repo)


def test_without_a_controller_pods_are_as_they_were(serving: Agent, tenant: Tenant) -> None:
    repo = downloaded(serving, "alone")
    uri = f"hf://{repo}"
    scale(serving, 0)
    try:
        pod = tenant.predictor("p", uri, NAMES)
        made = tenant.create(pod)
        assert "localmodel-agent.io/injected" not in made.get()["metadata"]["annotations"]
        made.wait_running(SERVER)
        assert tree(made) == digests(repo)
        assert made.log("storage-initializer").split() == ["downloaded", uri]
        (told,) = until(lambda: made.events("CacheBypassed"), serving.describe)
        assert f"reads {uri} past the cache, though this node has it" in told
        assert serving.metric("localmodel_pods_bypassed_total") >= 1
    finally:
        scale(serving, 2)
    again = tenant.create(tenant.predictor("again", uri, NAMES))
    assert "localmodel-agent.io/injected" in again.get()["metadata"]["annotations"]


def scale(serving: Agent, replicas: int) -> None:
    plane = serving.node.plane
    flag = f"--replicas={replicas}"
    plane.kubectl("scale", "deployment", CONTROLLER, "-n", NAMESPACE, flag)

    def done() -> bool:
        status = plane.get("deployment", CONTROLLER, "-n", NAMESPACE)["status"]
        label = f"app.kubernetes.io/name={CONTROLLER}"
        pods = plane.get("pods", "-n", NAMESPACE, "-l", label)["items"]  # and those that end
        return int(status.get("readyReplicas", 0)) == replicas == len(pods)

    until(done, serving.describe_controllers, seconds=PATIENCE)


def modes(root: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, user and group of all that is on offer in the cache."""
    found = {}
    for directory in (root, root / layout.MODELS, root / layout.MANIFESTS):
        for path in (directory, *directory.rglob("*")):
            status = path.lstat()
            found[str(path)] = status.st_mode, status.st_uid, status.st_gid
    return found
