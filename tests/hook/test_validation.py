"""A cache is refused where nothing else could come of it, and an update for what it changes."""

import copy
from dataclasses import replace
from typing import Any

import pytest

from agent.hook.validation import Users, Verdict, services_of, validate
from agent.hook.world import Cache, Group, World
from agent.kube.podspec import KSERVE_LABEL
from agent.sources import scheme_of
from tests.hook.pods import A100, LLAMA, selector

GIB = 1024**3
POOL = {"nodeSelectorTerms": [{"matchExpressions": [
    {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": ["p4d"]}
]}]}  # fmt: skip
WORLD = World(
    caches=(
        Cache(name="llama", uri=LLAMA, groups=("small",)),
        Cache(name="ours", namespace="team-a", uri="hf://acme/ours", groups=("small",)),
    ),
    groups={
        "small": Group(name="small", selector=POOL, limit=80 * GIB),
        "large": Group(name="large", selector=POOL, limit=200 * GIB),
        "boundless": Group(name="boundless", selector=None),
    },
)


def cache(name: str = "new", *, namespace: str = "", **changes: Any) -> dict[str, Any]:
    """Fields of the spec, and `notes` for annotations."""
    notes = changes.pop("notes", {})
    metadata = {"name": name, "annotations": notes}
    spec = {"sourceModelUri": "hf://acme/new", "modelSize": "16Gi", "nodeGroups": ["small"]}
    return {
        "metadata": metadata | ({"namespace": namespace} if namespace else {}),
        "spec": {key: value for key, value in (spec | changes).items() if value is not None},
    }


def judge(new: dict[str, Any], old: dict[str, Any] | None = None, world: World = WORLD) -> Verdict:
    operation = "CREATE" if old is None else "UPDATE"
    return validate(operation, new, old or {}, world, check=scheme_of, users=Users())


def refused(new: dict[str, Any], old: dict[str, Any] | None = None, world: World = WORLD) -> str:
    verdict = judge(new, old, world)
    assert verdict.refusal
    assert verdict.warnings == ()
    return verdict.refusal


def test_a_good_cache_is_let_through_in_silence() -> None:
    assert judge(cache()) == judge(cache(namespace="team-a")) == Verdict()
    assert judge(cache(), cache()) == Verdict()


# --- the URI ------------------------------------------------------------------------------------


def test_two_cluster_caches_of_one_uri_are_refused_as_kserve_does() -> None:
    said = refused(cache(sourceModelUri=LLAMA))
    assert said.startswith(f"LocalModelCache llama has the same sourceModelUri {LLAMA}")
    assert judge(cache(sourceModelUri=LLAMA, namespace="team-a")) == Verdict()
    assert judge(cache(sourceModelUri=f"{LLAMA}/")) == Verdict(), "another string, another model"
    assert judge(cache(sourceModelUri="hf://acme/ours")) == Verdict(), "that is a namespace's"


def test_what_has_the_uri_already_may_be_written() -> None:
    """Both were there before the hook."""
    twin = cache(sourceModelUri=LLAMA)
    assert judge(twin | {"status": {}}, twin) == Verdict()
    assert judge(cache("llama", sourceModelUri=LLAMA)) == Verdict(), "seen by the watch already"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("pvc://claim/m", "there is no source for pvc://; a volume is not downloaded"),
        ("meta-llama/Llama", "did you mean hf://meta-llama/Llama?"),
        ("file:///etc", "nobody's files are read from a node"),
        ("/etc", "nobody's files are read from a node"),
        ("hf://a/b\n", "is not a URI"),
        (7, "is not a URI"),
    ],
)
def test_a_uri_that_nobody_could_fetch(uri: Any, said: str) -> None:
    assert said in refused(cache(sourceModelUri=uri))
    assert judge(cache(sourceModelUri=uri), cache(sourceModelUri=uri)) == Verdict()


# --- node groups --------------------------------------------------------------------------------


def test_node_groups_must_exist() -> None:
    said = refused(cache(nodeGroups=["small", "tiny"]))
    assert "no LocalModelNodeGroup tiny; there are: boundless, large, small" in said
    said = refused(cache(namespace="team-a"), world=replace(WORLD, groups={}))
    assert "no LocalModelNodeGroup small; there are: none" in said


def test_a_group_that_went_later_blocks_nothing() -> None:
    gone = cache(nodeGroups=["small", "gone"])
    assert judge(cache(nodeGroups=["small", "gone"], notes={"a": "b"}), gone) == Verdict()
    assert judge(cache(nodeGroups=["large", "gone"]), gone) == Verdict()
    assert "no LocalModelNodeGroup other;" in refused(cache(nodeGroups=["gone", "other"]), gone)


def test_what_is_being_deleted_may_be_written() -> None:
    leaving = cache(nodeGroups=["gone"], sourceModelUri="pvc://x")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert judge(leaving, cache()) == Verdict()


def test_the_singular_is_what_somebody_meant() -> None:
    assert "did you mean nodeGroups: [gpu]?" in refused(cache(nodeGroups=None, nodeGroup="gpu"))
    note = '{"spec": {"nodeGroup": "gpu"}}'
    applied = {"kubectl.kubernetes.io/last-applied-configuration": note}
    (said,) = judge(cache(notes=applied)).warnings
    assert "spec.nodeGroup (gpu) is no field" in said
    assert judge(cache(notes=applied), cache(notes=applied)).warnings == ()
    for odd in ("[" * 100_000, "[]", "{}", "null", '{"spec": null}', "x"):
        assert judge(cache(notes=dict.fromkeys(applied, odd))) == Verdict()


# --- sizes --------------------------------------------------------------------------------------


def test_a_model_that_fits_no_group_is_refused_with_the_numbers() -> None:
    said = refused(cache(modelSize="300Gi", nodeGroups=["small", "large"]))
    assert "modelSize 300Gi is more than the storageLimit of every node group" in said
    assert "(small 80Gi, large 200Gi)" in said
    assert judge(cache(modelSize="300Gi", nodeGroups=["small", "boundless"])).refusal == ""


def test_a_model_that_fits_some_groups_is_cached_there() -> None:
    (said,) = judge(cache(modelSize="140Gi", nodeGroups=["small", "large"])).warnings
    assert said == (
        "modelSize 140Gi is more than the storageLimit of small 80Gi: not cached there, cached on"
        " the others"
    )


@pytest.mark.parametrize("size", ["80Gi", 16 * GIB, "what", 0, None])
def test_a_size_that_says_nothing_refuses_nothing(size: Any) -> None:
    assert judge(cache(modelSize=size)) == Verdict()


def test_a_limit_that_became_smaller_blocks_no_update() -> None:
    large = cache(modelSize="140Gi")
    assert judge(cache(modelSize="140Gi", notes={"a": "b"}), large) == Verdict()
    assert refused(cache(modelSize="141Gi"), large)


# --- annotations --------------------------------------------------------------------------------


def test_annotations_of_ours_are_read_as_a_node_reads_them() -> None:
    wrong = cache(notes={"localmodel-agent.io/policy": "lazy"})
    assert "localmodel-agent.io/policy is not eager or on-demand" in refused(wrong)
    assert judge(wrong, copy.deepcopy(wrong)) == Verdict(), "a finalizer must go through"
    assert judge(cache(notes={"other.io/policy": "lazy"})) == Verdict()


# --- an autoscaler ------------------------------------------------------------------------------


def _late(*terms: tuple[str, str]) -> World:
    """A group whose selector has these terms, of a label and an operator each."""
    found = [{"matchExpressions": [{"key": key, "operator": how}]} for key, how in terms]
    group = Group(name="small", selector={"nodeSelectorTerms": found})
    return replace(WORLD, groups={"small": group})


@pytest.mark.parametrize(
    ("terms", "late"),
    [
        ([("nvidia.com/gpu.product", "In")], "nvidia.com/gpu.product"),
        ([("feature.node.kubernetes.io/pci-10de.present", "Exists")], "feature.node"),
        ([("nvidia.com/gpu.count", "Gt"), ("amd.com/gpu.vram", "Exists")], "nvidia.com/gpu.count"),
        ([("nvidia.com/gpu.product", "In"), ("pool", "In")], ""),
        ([("nvidia.com/gpu.product", "NotIn")], ""),
        ([("nvidia.com/gpu", "Exists")], ""),
        ([("node.kubernetes.io/instance-type", "In")], ""),
        ([], ""),
    ],
)
def test_labels_that_a_node_has_late(terms: list[tuple[str, str]], late: str) -> None:
    warnings = judge(cache(), world=_late(*terms)).warnings
    assert bool(warnings) is bool(late)
    assert all(late in one and "cannot scale this group from zero" in one for one in warnings)
    assert judge(cache(), cache(), world=_late(*terms)).warnings == ()


def test_warnings_fit_into_what_kubectl_shows() -> None:
    long = "g" * 250
    group = Group(name=long, selector=selector(A100), limit=1)
    world = replace(WORLD, groups={long: group, "large": WORLD.groups["large"]})
    note = f'{{"spec": {{"nodeGroup": "{long}"}}}}'
    applied = {"kubectl.kubernetes.io/last-applied-configuration": note}
    verdict = judge(cache(nodeGroups=[long, "large"], notes=applied), world=world)
    assert len(verdict.warnings) == 3
    assert all(len(one) <= 256 for one in verdict.warnings)


# --- deletion -----------------------------------------------------------------------------------


def _service(name: str, label: str, *, namespace: str = "", kind: str = "InferenceService") -> Any:
    labels = {KSERVE_LABEL: label}
    labels |= {f"{KSERVE_LABEL}-namespace": namespace} if namespace else {}
    return {"kind": kind, "metadata": {"name": name, "namespace": "team-a", "labels": labels}}


def _deleted(old: dict[str, Any], *services: Any, pods: tuple[str, ...] = ()) -> str:
    users = Users(services=services, pods=pods)
    return validate("DELETE", {}, old, WORLD, check=scheme_of, users=users).refusal


def test_a_cache_in_use_is_not_deleted() -> None:
    old = cache("llama")
    assert _deleted(old) == ""
    assert _deleted(old, _service("a", "llama")).startswith(
        "llama is in use by InferenceService team-a/a:"
    )
    llm = _service("b", "llama", kind="LLMInferenceService")
    said = _deleted(old, _service("a", "llama"), llm, pods=("team-b/p-1", "team-b/p-2"))
    assert said == (
        "llama is in use by InferenceService team-a/a, LLMInferenceService team-a/b,"
        " pod team-b/p-1 and 1 more: delete these, or give them another model, first"
    )


def test_a_service_that_left_it_does_not_hold_it() -> None:
    """Its label is its word; the list in the status is only where to look."""
    old = cache("llama")
    assert _deleted(old, _service("a", "another"), {"kind": "InferenceService"}) == ""
    assert _deleted(old, _service("a", "llama", namespace="team-a")) == "", "the namespace's own"
    ours = cache("llama", namespace="team-a")
    assert _deleted(ours, _service("a", "llama", namespace="team-a"))
    assert _deleted(ours, _service("a", "llama")) == ""


def test_what_is_being_deleted_may_be_deleted() -> None:
    old = cache("llama")
    old["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert _deleted(old, _service("a", "llama"), pods=("team-a/p",)) == ""


def test_whom_to_ask_for_before_a_deletion() -> None:
    old = cache("llama")
    assert services_of(old) == ()
    item = {"namespace": "team-a", "name": "a"}
    old["status"] = {"inferenceServices": [item], "llmInferenceServices": [item | {"name": "b"}]}
    assert services_of(old) == (
        "/apis/serving.kserve.io/v1beta1/namespaces/team-a/inferenceservices/a",
        "/apis/serving.kserve.io/v1alpha1/namespaces/team-a/llminferenceservices/b",
    )
