"""What becomes of a pod: the recorded ones of KServe, one decision each, and then all others."""

import copy
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.hook.admission import MOUNT, VOLUME, mutate
from agent.hook.decisions import EXPLAINED, QUIET, Mutation, Skip, Why
from agent.hook.patch import applied
from agent.hook.scheduling import Node
from agent.hook.world import Cache, Group, World
from agent.model import cache_key
from tests.hook.generated import named_pods
from tests.hook.patches import changes
from tests.hook.pods import (
    A100,
    BUCKET,
    ENTRYPOINT,
    H100,
    LLAMA,
    LLAMA_70B,
    MIXED,
    WORLD,
    cases,
    golden,
    node,
    plain,
    selector,
)

CLAIM = {"claimName": "localmodel-gpu1", "readOnly": True}


def admit(pod: dict[str, Any], world: World = WORLD) -> Mutation | Skip:
    return mutate(pod, world, namespace=pod["metadata"]["namespace"])


def helped(pod: dict[str, Any], world: World = WORLD) -> dict[str, Any]:
    """The pod as it is stored, which the hook then leaves alone."""
    decision = admit(pod, world)
    assert isinstance(decision, Mutation), decision
    result: dict[str, Any] = applied(pod, decision.patch)
    assert admit(result, world) == Skip(why=Why.DONE), "helped twice"
    assert result["metadata"]["annotations"]["localmodel-agent.io/keys"] == ",".join(decision.keys)
    return result


def left(pod: dict[str, Any], world: World = WORLD) -> Skip:
    decision = admit(pod, world)
    assert isinstance(decision, Skip), decision
    return decision


GOLDEN = {
    "uncached-hf": f"wrapped: {LLAMA} from the cache of gpu1",
    "cached-hf": f"read-only: {LLAMA} on KServe's claim",
    "cached-nodegroup": f"read-only: {LLAMA_70B} on KServe's claim",
    "subpath": f"read-only: {BUCKET} on KServe's claim",
    "namespace-cache": "read-only: hf://Qwen/Qwen2.5-7B-Instruct on KServe's claim",
    "opt-out": Why.DISABLED,
    "readonly-false": Why.WRITES,
    "storage-key": Why.NO_CACHE,
    "storage-uris": f"wrapped: {LLAMA} from the cache of gpu1",
    "triton-vllm": Why.NO_CACHE,
    "transformer": Why.NO_CACHE,
    "custom-initializer": Why.NO_CACHE,
    "pvc": Why.NOT_OURS,
    "llmisvc": Why.NO_CACHE,
    "multi-container": Why.NO_CACHE,
    "oci": Why.NOT_OURS,
    "uncached-readonly-false": Why.WRITES,
    "cached-two-groups-default": f"read-only: {LLAMA_70B} on KServe's claim",
    "storage-uris-apart": f"wrapped: {LLAMA} from the cache of gpu1",
    "transformer-cached": f"read-only: {LLAMA} on KServe's claim",
    "transformer-separate": Why.NOT_OURS,
    "multi-container-cached": f"read-only: {LLAMA} on KServe's claim",
    "custom-predictor-cached": f"read-only: {LLAMA} on KServe's claim",
    "logger-cached": f"read-only: {LLAMA} on KServe's claim",
    "sa-credentials": Why.NO_CACHE,
    "storage-key-cached-uri": f"wrapped: {BUCKET}/llama/7b from the cache of gpu1",
    "llmisvc-cached": f"read-only: {LLAMA} on KServe's claim",
    "oci-native": Why.NOT_OURS,
    "oci-fetch": Why.NO_CACHE,
}


def test_every_recorded_pod_has_its_decision() -> None:
    assert set(cases()) == set(GOLDEN)
    assert len(GOLDEN) == 29


@pytest.mark.parametrize("case", GOLDEN)
def test_what_becomes_of_the_pods_that_kserve_makes(case: str) -> None:
    decision = admit(golden(case))
    assert (decision.note if isinstance(decision, Mutation) else decision.why) == GOLDEN[case]


# --- wrapped ------------------------------------------------------------------------------------


def test_a_wrapped_pod_keeps_all_that_it_had() -> None:
    before = golden("uncached-hf")
    after = helped(before)
    (initializer,), (server,) = after["spec"]["initContainers"], after["spec"]["containers"]
    mount = {"name": VOLUME, "mountPath": MOUNT, "readOnly": True}
    shell, flag, script, name = initializer.pop("command")
    assert (shell, flag, name) == ("sh", "-c", "localmodel")
    assert cache_key(LLAMA) in script
    assert f"exec {ENTRYPOINT[0]} " in script
    assert initializer["volumeMounts"].pop() == server["volumeMounts"].pop() == mount
    assert after["spec"]["volumes"].pop() == {"name": VOLUME, "persistentVolumeClaim": CLAIM}
    for note in ("injected", "keys"):
        del after["metadata"]["annotations"][f"localmodel-agent.io/{note}"]
    assert after == before


def test_whoever_mounts_the_destination_sees_the_cache_and_nobody_else() -> None:
    world = replace(WORLD, caches=(Cache(name="m", uri=_uri("transformer"), groups=("gpu1",)),))
    after = helped(golden("transformer"), world)
    assert _seeing(after) == {"storage-initializer", "kserve-container", "transformer-container"}
    world = replace(WORLD, caches=(Cache(name="m", uri=_uri("multi-container"), groups=("gpu1",)),))
    after = helped(golden("multi-container"), world)
    assert _seeing(after) == {"storage-initializer", "kserve-container"}


def test_a_container_that_others_add_after_us_sees_the_cache_as_well() -> None:
    """The hook is called again then (`reinvocationPolicy: IfNeeded`)."""
    pod = helped(golden("uncached-hf"))
    (server,) = pod["spec"]["containers"]
    (there,) = [mount for mount in server["volumeMounts"] if mount["mountPath"] == "/mnt/models"]
    before = _seeing(pod)
    for name, mounts in (("late", [there]), ("mesh", [])):
        pod["spec"]["containers"].append({"name": name, "image": "x", "volumeMounts": mounts})
    whole = helped(pod)
    assert _seeing(whole) == before | {"late"}
    assert whole["metadata"] == pod["metadata"]


def _late(pod: dict[str, Any], *mounts: tuple[str, str]) -> dict[str, Any]:
    """With a container more, as another webhook adds one."""
    pod = copy.deepcopy(pod)
    found = [{"name": name, "mountPath": path} for name, path in mounts]
    pod["spec"]["containers"].append({"name": "late", "image": "x", "volumeMounts": found})
    return pod


def _two_models(*uris: str) -> dict[str, Any]:
    """Each in a volume of its own."""
    pod = golden("uncached-hf")
    (initializer,) = pod["spec"]["initContainers"]
    initializer["args"] = [word for n, uri in enumerate(uris) for word in (uri, f"/mnt/{n}")]
    initializer["volumeMounts"] = [
        {"name": f"v{n}", "mountPath": f"/mnt/{n}"} for n in range(len(uris))
    ]
    pod["spec"]["volumes"] += [{"name": f"v{n}", "emptyDir": {}} for n in range(len(uris))]
    return pod


def test_what_has_no_links_is_not_completed() -> None:
    """Nor is it odd: it was helped before, and needs nothing."""
    pod = helped(_two_models(LLAMA, "hf://nobody/asked"))
    assert left(_late(pod, ("v1", "/mnt/1"))) == Skip(why=Why.DONE)
    assert left(_late(pod, ("v1", "/mnt/1"), ("devshm", MOUNT))) == Skip(why=Why.DONE)
    assert _seeing(helped(_late(pod, ("v0", "/mnt/0")))) >= {"late"}


@pytest.mark.parametrize("arguments", [None, [], ["hf://x/y"], [LLAMA, "/mnt/models"], [7, None]])
@pytest.mark.parametrize("claim", ["own", {"a": 1}, None])
def test_whoever_says_that_he_was_helped_is_believed(arguments: Any, claim: Any) -> None:
    """What we did is in the command of the initializer, and nowhere else."""
    pod = golden("uncached-hf")
    pod["metadata"]["annotations"]["localmodel-agent.io/injected"] = "wrapped"
    own = {"name": VOLUME, "persistentVolumeClaim": {"claimName": claim}}
    pod["spec"]["volumes"] += [own, own]
    pod["spec"]["initContainers"][0]["args"] = arguments
    assert left(_late(pod, ("kserve-provision-location", "/mnt/models"))) == Skip(why=Why.DONE)
    pod["spec"]["initContainers"] = None
    assert left(_late(pod, ("kserve-provision-location", "/mnt/models"))).why in (
        Why.DONE,
        Why.NOT_OURS,
    )


def test_a_container_that_has_the_cache_elsewhere_does_not_have_it() -> None:
    pod = _late(
        helped(golden("uncached-hf")), ("kserve-provision-location", "/mnt/models"), (VOLUME, "/x")
    )
    assert "late" in _seeing(helped(pod))


def test_who_runs_before_the_initializer_finds_no_directory_of_it() -> None:
    """The mount would be on a directory that is not there yet: the runtime makes none on a volume
    that is read-only."""
    pod = _two_models(LLAMA)
    pod["spec"]["initContainers"][0]["volumeMounts"] = [{"name": "v0", "mountPath": "/mnt"}]
    early = {"name": "v0", "mountPath": "/mnt", "readOnly": True}
    pod["spec"]["containers"].append({"name": "server", "image": "x", "volumeMounts": [early]})
    assert "server" in _seeing(helped(pod))
    pod["spec"]["initContainers"].insert(0, {"name": "e", "image": "x", "volumeMounts": [early]})
    assert left(pod).why is Why.ODD


def test_a_pod_of_an_llm_inference_service() -> None:
    """It has no annotations at all, and its server is called main."""
    pod = golden("llmisvc")
    assert "annotations" not in pod["metadata"]
    world = replace(WORLD, caches=(Cache(name="m", uri=_uri("llmisvc"), groups=("gpu1",)),))
    assert _seeing(helped(pod, world)) == {"storage-initializer", "main"}


def test_a_command_of_its_own_is_the_original() -> None:
    pod = golden("uncached-hf")
    initializer = pod["spec"]["initContainers"][0]
    initializer["command"] = ["/bin/odd one", "--x"]
    script = helped(pod)["spec"]["initContainers"][0]["command"][2]
    assert "exec '/bin/odd one' --x " in script
    initializer["image"] = "quay.io/odd/image@sha256:0"  # which may have no shell
    assert left(pod).why is Why.UNKNOWN_IMAGE


@pytest.mark.parametrize(
    ("image", "known"),
    [
        ("kserve/storage-initializer", True),
        ("kserve/storage-initializer:v0.18.0", True),
        ("localhost:5000/x/storage-initializer@sha256:0a", True),
        ("storage-initializer:v1@sha256:0a", True),
        ("kserve/storage-initializer-fork:v1", False),
        ("", False),
    ],
)
def test_the_image_says_what_the_original_is(image: str, known: bool) -> None:
    pod = golden("uncached-hf")
    pod["spec"]["initContainers"][0]["image"] = image
    decision = admit(pod)
    assert isinstance(decision, Mutation) is known
    assert known or decision == Skip(why=Why.UNKNOWN_IMAGE, detail=image)


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("CONFIDENTIAL_ENABLED", "true", Why.CONFIDENTIAL),
        ("STORAGE_ALLOW_PATTERNS", "*.safetensors", Why.PATTERNS),
        ("STORAGE_IGNORE_PATTERNS", '["*.bin"]', Why.PATTERNS),
    ],
)
def test_what_only_the_initializer_can_do_is_left_to_it(
    variable: str, value: str, why: Why
) -> None:
    pod = golden("uncached-hf")
    pod["spec"]["initContainers"][0]["env"].append({"name": variable, "value": value})
    assert left(pod).why is why
    elsewhere = {"configMapKeyRef": {"name": "c", "key": "k"}}
    pod["spec"]["initContainers"][0]["env"][-1] = {"name": variable, "valueFrom": elsewhere}
    assert left(pod).why is why, "nobody can say here what it will be"


def test_a_map_of_variables_may_choose_files() -> None:
    pod = golden("uncached-hf")
    source = {"configMapRef": {"name": "c"}}
    pod["spec"]["initContainers"][0]["envFrom"] = [source]
    assert left(pod) == Skip(why=Why.PATTERNS, detail="envFrom")
    pod["spec"]["initContainers"][0]["envFrom"] = [{**source, "prefix": "AWS_"}]
    helped(pod)


def test_a_cache_of_some_of_the_files_is_not_the_model() -> None:
    (first, *others) = WORLD.caches
    world = replace(WORLD, caches=(replace(first, include=("*.json",)), *others))
    assert left(golden("uncached-hf"), world).why is Why.PATTERNS


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["hf://a/b"],
        [LLAMA, "mnt/models"],
        [LLAMA, "/mnt", "s3://b/x", "/mnt/models"],
        [LLAMA, "/mnt/models", "s3://b/x", "/mnt/models/"],
        [LLAMA, "/mnt/a", LLAMA, "/mnt/b"],
        [word for n in range(101) for word in (f"hf://a/{n}", f"/mnt/{n}")],
    ],
)
def test_arguments_that_are_no_pairs_are_left_alone(arguments: list[str]) -> None:
    pod = golden("uncached-hf")
    pod["spec"]["initContainers"][0]["args"] = arguments
    assert left(pod).why is Why.ODD


@pytest.mark.parametrize(
    "arguments",
    [[LLAMA, "/mnt/$(NAME)"], [f"{BUCKET}/$(NAME)", "/mnt/models"], [f"{BUCKET}/$$x", "/mnt/m"]],
)
def test_what_kubelet_makes_another_word_of_is_left_alone(arguments: list[str]) -> None:
    """`$(NAME)` is the value of a variable by then, and `$$` is `$`."""
    pod = golden("uncached-hf")
    initializer = pod["spec"]["initContainers"][0]
    initializer["args"] = arguments
    assert left(pod).detail.endswith("is another word when the pod starts")
    initializer |= {"args": [LLAMA, "/mnt/models"], "command": ["sh", "-c", "$(RUN)"]}
    assert left(pod).why is Why.ODD


def test_links_are_for_a_volume_that_ends_with_the_pod() -> None:
    """In a claim of the tenant's they would lead nowhere, for whoever else mounts it."""
    pod = golden("uncached-hf")
    volume = pod["spec"]["volumes"][-1]
    del volume["emptyDir"]
    volume["persistentVolumeClaim"] = {"claimName": "mine"}
    assert left(pod).detail == f"the volume {volume['name']} of /mnt/models is no emptyDir"
    inner = {"name": "inner", "mountPath": "/mnt/models/llama"}
    pod["spec"]["volumes"].append({"name": "inner", "emptyDir": {}})
    initializer, server = pod["spec"]["initContainers"][0], pod["spec"]["containers"][0]
    initializer["volumeMounts"].append(inner)
    server["volumeMounts"].append(inner)
    initializer["args"][1] = "/mnt/models/llama/base"
    assert _seeing(helped(pod)) == {"storage-initializer", "kserve-container"}


def test_a_page_that_linux_would_not_run_is_not_written() -> None:
    """No argument of a process may have 128 KiB."""
    pod = golden("uncached-hf")
    long = "/".join(["a" * 250] * 3)
    for count, ok in ((20, True), (100, False)):
        pod["spec"]["initContainers"][0]["args"] = [
            word for n in range(count) for word in (f"{BUCKET}/{long}/{n}", f"/mnt/models/{n}")
        ]
        decision = admit(pod)
        assert isinstance(decision, Mutation) is ok
        if isinstance(decision, Mutation):
            after = applied(pod, decision.patch)
            assert len(after["spec"]["initContainers"][0]["command"][2]) < 128 * 1024


def test_a_container_that_has_something_there_already_is_left_alone() -> None:
    pod = golden("uncached-hf")
    mounts = pod["spec"]["containers"][0]["volumeMounts"]
    mounts.append({"name": "devshm", "mountPath": f"{MOUNT}/"})
    assert left(pod).why is Why.ODD


# --- which cache --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cached", "asked", "rest"),
    [
        ("s3://b/m", "s3://b/m", ""),
        ("s3://b/m/", "s3://b/m", ""),
        ("s3://b/m", "s3://b/m/", ""),
        ("s3://b/m/", "s3://b/m/x/y", "x/y"),
        ("s3://b/m", "s3://b/m/x/", "x"),
        ("s3://b/m", "s3://b/m2", None),
        ("s3://b/m", "s3://b", None),
        ("hf://o/m", "hf://o/m:rev", None),
        ("s3://b/m", "s3://b/m/../x", None),
        ("s3://b/m", "s3://b/m//x", None),
        ("s3://b/m", "s3://b/m/x\n", None),
    ],
)
def test_what_a_cache_holds(cached: str, asked: str, rest: str | None) -> None:
    assert Cache(name="c", uri=cached, groups=()).rest(asked) == rest


def test_the_longest_wins_and_those_of_the_namespace_come_first() -> None:
    def key_of(*caches: Cache) -> str:
        pod = golden("uncached-hf")
        pod["spec"]["initContainers"][0]["args"][0] = "s3://b/m/x/y"
        decision = admit(pod, replace(WORLD, caches=caches))
        assert isinstance(decision, Mutation)
        return decision.keys[0]

    short, long = (Cache(name="c", uri=uri, groups=("gpu1",)) for uri in ("s3://b/m", "s3://b/m/x"))
    assert key_of(short, long) == key_of(long, short) == long.key
    ours = replace(short, namespace="team-a")
    assert key_of(long, ours) == ours.key
    assert key_of(replace(ours, namespace="team-b"), long) == long.key


# --- which group, and whether at all ------------------------------------------------------------


def _without_gpu() -> dict[str, Any]:
    pod = golden("uncached-hf")
    for container in pod["spec"]["containers"]:
        container["resources"] = {}
    return pod


@pytest.mark.parametrize(
    ("change", "why", "detail"),
    [
        ({"claims": frozenset()}, Why.NO_CLAIM, "localmodel-gpu1 in team-a"),
        ({"live": frozenset({"a"})}, Why.NO_AGENT, "b"),
        ({"nodes": MIXED}, Why.OTHER_NODES, "h"),
        ({"nodes": ()}, Why.NO_AGENT, "no node of gpu1 is Ready"),
        ({"groups": {}}, Why.NO_SUCH_CACHE, "its node groups do not exist"),
    ],
)
def test_nothing_is_done_that_could_keep_it_from_a_node(
    change: dict[str, Any], why: Why, detail: str
) -> None:
    assert left(golden("uncached-hf"), replace(WORLD, **change)) == Skip(why=why, detail=detail)


def test_a_pod_that_names_the_group_may_only_be_there() -> None:
    world = replace(WORLD, nodes=MIXED, live=frozenset({"a", "b", "h"}))
    pod = golden("uncached-hf")
    pod["metadata"]["annotations"]["serving.kserve.io/nodegroup"] = "gpu1"
    helped(pod, world)
    pod["metadata"]["annotations"]["serving.kserve.io/nodegroup"] = "gpu2"
    assert left(pod, world) == Skip(why=Why.NO_SUCH_CACHE, detail="not in the node group gpu2")


def test_a_pod_that_names_a_group_and_can_run_on_none_of_its_nodes() -> None:
    """The claim would keep it from the others."""
    world = replace(WORLD, nodes=MIXED, live=frozenset({"a", "b", "h"}))
    pod = golden("uncached-hf")
    pod["metadata"]["annotations"]["serving.kserve.io/nodegroup"] = "gpu1"
    pod["spec"]["nodeSelector"] = {"nvidia.com/gpu.product": H100}
    assert left(pod, world).detail == "it names the group gpu1, and can run on no node of it"


def test_what_the_selector_allows_says_the_group() -> None:
    """kserve#5914: the first of a cache's groups is not always the pod's."""
    world = replace(WORLD, nodes=MIXED, live=frozenset({"a", "b", "h"}))
    for product, group in ((A100, "gpu1"), (H100, "gpu2")):
        pod = golden("uncached-hf")
        pod["spec"]["initContainers"][0]["args"][0] = LLAMA_70B
        pod["spec"]["nodeSelector"] = {"nvidia.com/gpu.product": product}
        volume = helped(pod, world)["spec"]["volumes"][-1]
        assert volume["persistentVolumeClaim"]["claimName"] == f"localmodel-{group}"


def test_a_node_without_a_gpu_is_no_place_for_a_pod_that_wants_one() -> None:
    world = replace(WORLD, nodes=(*WORLD.nodes, Node(name="cpu")))
    helped(golden("uncached-hf"), world)
    assert left(_without_gpu(), world) == Skip(why=Why.OTHER_NODES, detail="cpu")


def test_a_volume_that_all_nodes_share_is_for_all_of_them() -> None:
    world = replace(
        WORLD,
        groups={"gpu1": Group(name="gpu1", selector=None)},
        nodes=(*WORLD.nodes, Node(name="cpu")),
        live=frozenset({"a", "b", "cpu"}),
        holders={cache_key(LLAMA): frozenset({"a"})},
    )
    assert "affinity" not in helped(_without_gpu(), world)["spec"]


def test_nodes_that_have_the_model_are_preferred_and_not_required() -> None:
    world = replace(WORLD, holders={cache_key(LLAMA): frozenset({"b", "elsewhere"})})
    preferred = "preferredDuringSchedulingIgnoredDuringExecution"
    term = {
        "weight": 50,
        "preference": {
            "matchFields": [{"key": "metadata.name", "operator": "In", "values": ["b"]}]
        },
    }
    required = {"requiredDuringSchedulingIgnoredDuringExecution": selector(A100)}
    other = {"weight": 1, "preference": {}}
    choices: tuple[dict[str, Any] | None, ...] = (
        None,
        {},
        {"podAffinity": {}},
        {"nodeAffinity": required},
        {"nodeAffinity": {preferred: [other]}},
    )
    for affinity in choices:
        pod = golden("uncached-hf")
        if affinity is not None:
            pod["spec"]["affinity"] = affinity
        found = helped(pod, world)["spec"]["affinity"]
        assert found["nodeAffinity"][preferred][-1] == term
        kept = {key: value for key, value in (affinity or {}).items() if key != "nodeAffinity"}
        assert {key: value for key, value in found.items() if key != "nodeAffinity"} == kept
    everywhere = replace(WORLD, holders={cache_key(LLAMA): frozenset({"a", "b"})})
    assert "affinity" not in helped(golden("uncached-hf"), everywhere)["spec"]


# --- rewritten by KServe ------------------------------------------------------------------------


def test_a_rewritten_pod_cannot_write() -> None:
    before = golden("cached-hf")
    after = helped(before)
    assert after["spec"]["volumes"][1]["persistentVolumeClaim"].pop("readOnly") is True
    assert after["spec"] == before["spec"]


def test_a_claim_that_says_it_may_be_written_is_told_otherwise() -> None:
    pod = golden("cached-hf")
    pod["spec"]["volumes"][1]["persistentVolumeClaim"]["readOnly"] = False
    assert helped(pod)["spec"]["volumes"][1]["persistentVolumeClaim"]["readOnly"] is True


def test_the_sub_path_of_a_trailing_slash_is_mended() -> None:
    """kserve.md 4.4: a cache of `.../m/`, a service of `.../m`."""
    pod = golden("subpath")
    notes, uri = pod["metadata"]["annotations"], "s3://bucket/models/"
    notes["internal.serving.kserve.io/localmodel-sourceuri"] = uri
    mount = pod["spec"]["containers"][0]["volumeMounts"][-1]
    mount["subPath"] = f"models/{cache_key(uri)}/s3://bucket/models/llama/7b"
    (found,) = [
        mount["subPath"]
        for mount in helped(pod)["spec"]["containers"][0]["volumeMounts"]
        if "subPath" in mount
    ]
    assert found == f"models/{cache_key(uri)}/llama/7b"


def test_download_jobs_and_users_own_claims_are_left_alone() -> None:
    pod = golden("cached-hf")
    pod["metadata"]["namespace"] = WORLD.job_namespace
    assert left(pod).why is Why.NOT_OURS
    pod = golden("cached-hf")
    pod["spec"]["volumes"][1]["persistentVolumeClaim"]["claimName"] = "mine"
    assert left(pod).why is Why.NOT_OURS


def test_a_rewritten_pod_that_does_not_name_its_model_is_left_alone() -> None:
    pod = golden("cached-hf")
    del pod["metadata"]["annotations"]["internal.serving.kserve.io/localmodel-sourceuri"]
    assert left(pod).why is Why.ODD


# --- by annotation ------------------------------------------------------------------------------


def test_a_plain_pod_gets_the_model_where_it_says() -> None:
    after = helped(plain(source=f"{BUCKET}/llama/7b", mount_path="/models/llama/"))
    mount = {
        "name": VOLUME,
        "mountPath": "/models/llama",
        "subPath": f"models/{cache_key(BUCKET)}/llama/7b",
        "readOnly": True,
    }
    assert [container["volumeMounts"][-1] for container in after["spec"]["containers"]] == [
        mount
    ] * 2
    assert after["spec"]["volumes"][1:] == [{"name": VOLUME, "persistentVolumeClaim": CLAIM}]


@pytest.mark.parametrize("place", ["/..", "/", "models"])
def test_a_place_that_is_no_place(place: str) -> None:
    pod = plain(source=LLAMA, mount_path=place)
    del pod["spec"]["containers"][1:]
    assert left(pod).detail.endswith("is no absolute path of a directory")


def test_two_slashes_are_one() -> None:
    after = helped(plain(source=LLAMA, mount_path="//models//x"))
    assert after["spec"]["containers"][0]["volumeMounts"][-1]["mountPath"] == "/models/x"


def test_several_models_by_name() -> None:
    notes = {
        "source": LLAMA,
        "source.draft": f"{BUCKET}/draft",
        "mount-path.draft": "/mnt/draft",
    }
    after = helped(plain(**notes))
    mounts = after["spec"]["containers"][0]["volumeMounts"]
    assert [mount["mountPath"] for mount in mounts] == ["/mnt/models", "/mnt/draft"]


@pytest.mark.parametrize(
    ("notes", "change", "why"),
    [
        ({"source": "hf://nobody/asked"}, {}, Why.NO_SUCH_CACHE),
        ({"source": LLAMA, "source.x": "hf://nobody/asked"}, {}, Why.NO_SUCH_CACHE),
        ({"source": LLAMA}, {"inject": frozenset()}, Why.NO_CLAIM),
        ({"source": LLAMA, "mount-path": "/x"}, {}, Why.ODD),
        ({"source": LLAMA, "disable": "true"}, {}, Why.DISABLED),
        ({"sources": LLAMA}, {}, Why.NOT_OURS),
    ],
)
def test_a_plain_pod_is_left_alone(notes: dict[str, str], change: Any, why: Why) -> None:
    assert left(plain(**notes), replace(WORLD, **change)).why is why


def test_a_pod_may_not_name_any_number_of_models() -> None:
    notes = {f"source.{n}": LLAMA for n in range(101)}
    assert left(plain(**notes)).detail == "it names more than 100 models"
    pod = plain(**{f"mount-path.{n}": f"/{n}" for n in range(100)})
    pod["metadata"]["annotations"] |= {f"localmodel-agent.io/source.{n}": LLAMA for n in range(100)}
    helped(pod)
    pod["spec"]["containers"] *= 6
    assert left(pod).detail == "so many models in so many containers"


def test_a_large_pod_is_compared_with_many_nodes_in_no_time() -> None:
    """Whoever may make pods must not stop the admission of others'. It took ten seconds."""
    nodes = tuple(node(f"n{number}", A100) for number in range(5000))
    world = replace(WORLD, nodes=nodes, live=frozenset(one.name for one in nodes))
    pod = golden("uncached-hf")
    pod["spec"]["containers"] *= 3000
    begun = time.process_time()
    assert isinstance(admit(pod, world), Mutation)
    assert time.process_time() - begun < 3


def test_nobody_waits_for_a_pod_with_thousands_of_volumes_or_names() -> None:
    """Eight seconds for the volumes, one for the names: each was compared with each."""
    pod = golden("uncached-hf")
    mount = pod["spec"]["initContainers"][0]["volumeMounts"][0]
    pod["spec"]["volumes"] += [{"name": f"v{n}", "emptyDir": {}} for n in range(8000)]
    pod["spec"]["containers"] = [{"name": f"c{n}", "volumeMounts": [mount]} for n in range(8000)]
    names = plain(**{f"source.{n}": "hf://no/body" for n in range(6000)})
    caches = tuple(Cache(name="c", uri=f"s3://b/{n}", groups=("gpu1",)) for n in range(3000))
    begun = time.process_time()
    assert isinstance(admit(pod), Mutation)
    assert left(names, replace(WORLD, caches=caches)).why is Why.ODD
    assert time.process_time() - begun < 2


def test_nobody_waits_for_a_pod_with_many_places_in_an_initializer_with_many_mounts() -> None:
    """Ten seconds, when each place looked through all mounts anew."""
    pod = golden("uncached-hf")
    (initializer,) = pod["spec"]["initContainers"]
    (mount,) = initializer["volumeMounts"]
    models = [(f"hf://no/body-{n}", f"/mnt/other/{n}") for n in range(99)]
    initializer["args"] += [word for pair in models for word in pair]
    initializer["volumeMounts"] += [{**mount, "mountPath": f"/m/{n}"} for n in range(30_000)]
    begun = time.process_time()
    assert isinstance(admit(pod), Mutation)
    pod["spec"]["volumes"].append({"name": VOLUME})
    pod["metadata"]["annotations"]["localmodel-agent.io/injected"] = "forged"
    initializer["command"] = ["sh", "-c"] * 200_000
    assert left(pod).why is Why.DONE
    assert time.process_time() - begun < 2


def test_nobody_waits_for_a_pod_with_a_million_tolerations() -> None:
    """Each is compared with each taint of each node."""
    pod = golden("uncached-hf")
    pod["spec"]["tolerations"] = [{"key": "a"}] * 500
    helped(pod)
    pod["spec"]["tolerations"] *= 4
    assert left(pod).why is Why.ODD


@pytest.mark.parametrize("name", list(named_pods()))
def test_no_wish_leads_to_a_pod_that_could_not_start(name: str) -> None:
    """tests/cluster asks the API server about the same ones; it does not know what can start."""
    pod, expected = named_pods()[name]
    if expected:
        helped(pod)
    else:
        assert left(pod).why in (Why.ODD, Why.NO_CACHE, Why.NO_SUCH_CACHE)


def test_a_directory_that_the_initializer_made_is_there_for_the_server() -> None:
    """Recorded: the model's volume is at /mnt, writable only in the initializer."""
    pod = golden("storage-uris-apart")
    assert "kserve-container" in _seeing(helped(pod))
    pod["spec"]["initContainers"][0]["volumeMounts"][-1]["readOnly"] = True
    assert left(pod).why is Why.ODD


# --- all others ---------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=200)
def test_any_part_of_a_pod_may_be_missing(data: st.DataObject) -> None:
    """No exception, whatever the API server lets through; and the same answer twice."""
    pod = golden(data.draw(st.sampled_from(sorted(GOLDEN))))
    for _ in range(data.draw(st.integers(1, 4))):
        owner: Any = pod
        while isinstance(owner, dict | list) and owner:
            names = list(owner) if isinstance(owner, dict) else range(len(owner))
            name = data.draw(st.sampled_from(names))
            if data.draw(st.booleans()) or not isinstance(owner[name], dict | list):
                del owner[name]
                break
            owner = owner[name]
    before = json.dumps(pod)
    world = replace(WORLD, nodes=data.draw(st.sampled_from([WORLD.nodes, MIXED, ()])))
    decision = mutate(pod, world, namespace="team-a")
    assert json.dumps(pod) == before
    assert mutate(pod, world, namespace="team-a") == decision
    if isinstance(decision, Mutation):
        again = mutate(applied(pod, decision.patch), world, namespace="team-a")
        assert again == Skip(why=Why.DONE)


def test_every_reason_is_explained() -> None:
    assert set(EXPLAINED) == set(Why)
    assert set(Why) > QUIET
    said = Skip(why=Why.NO_CLAIM, detail="localmodel-gpu1").message
    assert "localmodel-gpu1; label the namespace" in said
    for why, explained in EXPLAINED.items():
        long = Skip(why=why, detail="x\n" * 500).message
        assert len(long) == 256
        assert long.isprintable()
        assert long.startswith(f"not from the node's cache: {explained.means}")
        assert long.endswith(explained.advice)


def _uri(case: str) -> str:
    return str(golden(case)["spec"]["initContainers"][0]["args"][0])


def _seeing(pod: dict[str, Any]) -> set[str]:
    """The containers that mount the whole cache."""
    return {
        container["name"]
        for kind in ("initContainers", "containers")
        for container in pod["spec"][kind]
        if any(mount["mountPath"] == MOUNT for mount in container.get("volumeMounts", ()))
    }


def test_the_worlds_of_the_tests_are_what_they_say() -> None:
    assert WORLD.in_group("gpu1") == {"a", "b"}
    assert replace(WORLD, nodes=(*MIXED, node("x", "L4"))).in_group("gpu2") == {"h"}


def test_what_counts_as_a_change() -> None:
    assert changes({"a": [1], "b": None}, {"a": [1, {"c": 2}], "b": {"~/": 3}}) == {
        "/a/1": (None, {"c": 2}),
        "/b/~0~1": (None, 3),
    }
    assert changes({"a": 1, "b": {"c": 1}}, {"b": {}}) == {"/a": (1, None), "/b/c": (1, None)}
