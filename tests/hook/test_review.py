"""AdmissionReviews: what the API server gets, whatever it was that came."""

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.hook import review
from agent.hook.admission import mutate
from agent.hook.decisions import Mutation, Why
from agent.hook.patch import applied
from agent.hook.review import OF_CACHES, OF_PODS, Answer, Deletion, Outcome
from agent.hook.validation import Users
from agent.hook.world import World
from agent.kube.podspec import KSERVE_LABEL
from agent.model import cache_key
from agent.sources import scheme_of
from tests.hook.pods import LLAMA, MIXED, WORLD, cases, golden, plain

GIB = 1024**3


def asked(
    pod: Any, *, kind: str = "Pod", operation: str = "CREATE", **fields: Any
) -> dict[str, Any]:
    group = {} if kind == "Pod" else {"group": "serving.kserve.io", "version": "v1alpha1"}
    request = {
        "uid": "0af-1",
        "kind": {"group": "", "version": "v1", "kind": kind} | group,
        "operation": operation,
        "namespace": "team-a",
        "object": pod,
        "oldObject": None,
        "options": {"kind": "CreateOptions"},
        "dryRun": False,
        **fields,
    }
    return {"apiVersion": review.API, "kind": "AdmissionReview", "request": request}


def mutated(raw: Any, world: World = WORLD) -> tuple[Answer, dict[str, Any]]:
    answer = review.mutated(review.read(json.dumps(raw).encode()), world)
    assert answer.outcome in OF_PODS
    return answer, response(answer)


def validated(raw: Any, **known: Any) -> tuple[Answer, dict[str, Any]]:
    request = review.read(json.dumps(raw).encode())
    answer = review.validated(request, WORLD, check=scheme_of, **known)
    assert answer.outcome in OF_CACHES
    return answer, response(answer)


def response(answer: Answer, uid: str = "0af-1") -> dict[str, Any]:
    """The answer, held against what `admission.k8s.io/v1` allows."""
    raw = json.loads(answer.body)
    assert (raw["apiVersion"], raw["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    found: dict[str, Any] = raw["response"]
    known = {"uid", "allowed", "auditAnnotations", "status", "warnings", "patch", "patchType"}
    assert set(found) <= known
    assert found["uid"] == uid
    assert isinstance(found["allowed"], bool)
    assert ("patch" in found) == ("patchType" in found)
    assert found["auditAnnotations"]["decision"].startswith(answer.outcome)
    warnings = found.get("warnings", [])
    assert len(warnings) <= 5
    assert all(isinstance(one, str) and len(one) <= 256 and one.isprintable() for one in warnings)
    return found


# --- pods -----------------------------------------------------------------------------------------


def test_a_pod_is_patched() -> None:
    pod = golden("uncached-hf")
    answer, found = mutated(asked(pod))
    assert answer.outcome is Outcome.PATCHED
    assert found["allowed"] is True
    assert found["patchType"] == "JSONPatch"
    assert found["auditAnnotations"] == {
        "decision": f"Patched: wrapped: {LLAMA} from the cache of gpu1"
    }
    after = applied(pod, json.loads(base64.b64decode(found["patch"])))
    assert after["spec"]["volumes"][-1]["name"] == "localmodel-cache"
    assert mutated(asked(pod, dryRun=True))[1] == found
    again, found = mutated(asked(after))
    assert (again.outcome, "patch" in found) == (Why.DONE, False)


def test_the_namespace_is_the_request_s() -> None:
    """A pod of a Deployment has none of its own yet."""
    pod = plain(source=LLAMA)
    del pod["metadata"]["namespace"]
    assert mutated(asked(pod))[0].outcome is Outcome.PATCHED
    assert mutated(asked(pod, namespace="elsewhere"))[0].outcome is Why.NO_CLAIM


@pytest.mark.parametrize("case", list(cases()))
def test_the_recorded_pods_are_all_allowed(case: str) -> None:
    _, found = mutated(asked(golden(case)))
    assert found["allowed"] is True


def test_who_expected_the_cache_is_warned() -> None:
    world = replace(WORLD, nodes=MIXED)
    answer, found = mutated(asked(golden("uncached-hf")), world)
    assert (answer.outcome, answer.detail) == (Why.OTHER_NODES, "h")
    (said,) = found["warnings"]
    assert said.startswith("not from the node's cache: it could run on nodes outside of the group")
    assert said.endswith(": h; set the annotation serving.kserve.io/nodegroup, or a nodeSelector")
    assert found["auditAnnotations"] == {"decision": "OtherNodes: h"}
    assert "patch" not in found


def test_who_named_a_model_that_nobody_caches_is_warned() -> None:
    assert "warnings" in mutated(asked(plain(source="hf://nobody/asked")))[1]
    pod = golden("uncached-hf")
    pod["spec"]["initContainers"][0]["args"][0] = "hf://nobody/asked"
    assert "warnings" not in mutated(asked(pod))[1], "it expected nothing"


# --- advice ---------------------------------------------------------------------------------------


def test_a_predictor_is_advised_whether_or_not_it_is_helped() -> None:
    answer, found = mutated(asked(golden("triton-vllm")))
    assert answer.outcome is Why.NO_CACHE
    (said,) = found["warnings"]
    assert "Stub process is not healthy" in said
    for disable in ("localmodel-agent.io/disable", "serving.kserve.io/disable-localmodel"):
        pod = golden("triton-vllm")
        pod["metadata"]["annotations"][disable] = "true"
        assert "warnings" not in mutated(asked(pod))[1]


def test_what_is_no_predictor_is_left_in_peace() -> None:
    pod = plain()
    pod["spec"]["containers"][0]["resources"] = {}
    assert "warnings" not in mutated(asked(pod))[1]
    pod["metadata"]["labels"] = {KSERVE_LABEL: "llama-3-1-8b"}
    assert "warnings" in mutated(asked(pod))[1]


@pytest.mark.parametrize("case", ["uncached-hf", "cached-hf"])
def test_advice_knows_the_group_and_the_models_of_the_decision(case: str) -> None:
    world = replace(WORLD, sizes={cache_key(LLAMA): 90 * GIB}, capacity={"a": 80 * GIB})
    (said,) = mutated(asked(golden(case)), world)[1]["warnings"]
    assert "90Gi, and no cache of the group gpu1 holds more than 80Gi" in said


def test_no_log_and_no_warning_has_what_a_uri_hides() -> None:
    uri = "https://user:sesame@host/model.gguf?X-Amz-Signature=sesame&b=1"
    pod = golden("uncached-hf")
    pod["metadata"]["annotations"]["localmodel-agent.io/source"] = uri
    del pod["spec"]["initContainers"]
    answer, found = mutated(asked(pod))
    assert answer.outcome is Why.NO_SUCH_CACHE
    assert "https://host/model.gguf" in answer.detail
    told = json.dumps([answer.detail, found["warnings"], found["auditAnnotations"]])
    assert "sesame" not in told


def test_a_secret_is_hidden_before_it_is_cut() -> None:
    """A name gets a hundred characters: behind a long token, no `@` would be left."""
    answer, found = mutated(asked(plain(source=f"https://oauth2:{'sesame' * 20}@host/x")))
    assert answer.detail == "https://host/x"
    assert "sesame" not in json.dumps(found)


def test_of_many_warnings_five_are_given() -> None:
    pod = golden("triton-vllm")
    pod["spec"]["containers"] *= 7
    assert len(mutated(asked(pod))[1]["warnings"]) == 5


# --- caches ---------------------------------------------------------------------------------------


def _cache(**spec: Any) -> dict[str, Any]:
    known = {"sourceModelUri": "hf://acme/new", "modelSize": "1Gi", "nodeGroups": ["gpu1"]}
    return {"metadata": {"name": "new"}, "spec": known | spec}


def test_a_cache_is_allowed_or_refused_with_what_to_do() -> None:
    answer, found = validated(asked(_cache(), kind="LocalModelCache"))
    assert (answer.outcome, found["allowed"]) == (Outcome.ALLOWED, True)
    (said,) = found["warnings"]
    assert "cannot scale this group from zero" in said
    answer, found = validated(asked(_cache(nodeGroups=["x"]), kind="LocalModelNamespaceCache"))
    assert (answer.outcome, found["allowed"]) == (Outcome.REFUSED, False)
    assert found["status"]["code"] == 403
    assert "there is no LocalModelNodeGroup x; there are: gpu1, gpu2." in found["status"]["message"]
    unchanged = asked(
        _cache(nodeGroups=["x"]),
        kind="LocalModelCache",
        operation="UPDATE",
        oldObject=_cache(nodeGroups=["x"]),
    )
    assert validated(unchanged)[1]["allowed"] is True


def test_a_deletion_says_whom_to_ask() -> None:
    old = _cache() | {"status": {"inferenceServices": [{"namespace": "team-a", "name": "a"}]}}
    raw = asked(None, kind="LocalModelCache", operation="DELETE", oldObject=old, namespace="")
    request = review.read(json.dumps(raw).encode())
    assert review.deletion(request) == Deletion(
        key=cache_key("hf://acme/new"),
        namespace="",
        services=("/apis/serving.kserve.io/v1beta1/namespaces/team-a/inferenceservices/a",),
    )
    assert validated(raw)[1]["allowed"] is True
    answer, found = validated(raw, users=Users(pods=("team-a/p",)))
    assert (answer.outcome, found["allowed"]) == (Outcome.REFUSED, False)
    other = review.read(json.dumps(asked(_cache(), kind="LocalModelCache")).encode())
    assert review.deletion(other) is None


def test_a_refusal_is_no_book() -> None:
    found = validated(asked(_cache(sourceModelUri=f"file://{'x' * 9999}"), kind="LocalModelCache"))
    assert len(found[1]["status"]["message"]) == 1000


# --- what is odd ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"object": None},
        {"object": []},
        {"kind": None},
        {"kind": {"group": "apps", "version": "v1", "kind": "Deployment"}},
        {"subResource": "ephemeralcontainers"},
        {"operation": "UPDATE"},
        {"operation": None},
    ],
)
def test_what_is_not_for_us_is_let_through(fields: dict[str, Any]) -> None:
    answer, found = mutated(asked(golden("uncached-hf"), **fields))
    assert (answer.outcome, found["allowed"]) == (Outcome.UNREADABLE, True)
    assert "patch" not in found
    answer, found = validated(asked(_cache(), **fields))
    assert (answer.outcome, found["allowed"]) == (Outcome.UNREADABLE, True)


def test_another_version_is_let_through() -> None:
    raw = asked(golden("uncached-hf")) | {"apiVersion": "admission.k8s.io/v2"}
    assert mutated(raw)[0].outcome is Outcome.UNREADABLE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"request": []}',
        b'{"request": {"uid": 1}}',
        b'{"request": {"uid": ""}}',
        b"[" * 1_000_000,
        b'{"request": {"uid": "a", "object": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}}",
        b'{"request": {"uid": "a", "object": ' + b"9" * 10_000 + b"}}",
    ],
)
def test_nobody_is_answered_who_cannot_be(body: bytes) -> None:
    with pytest.raises(ValueError):
        review.read(body)


@pytest.mark.parametrize("spec", [7, {"initContainers": 7}, {"initContainers": ["x"]}])
def test_a_bug_of_ours_is_nobody_s_problem(spec: Any) -> None:
    answer, found = mutated(asked({"metadata": {"annotations": {"a": "b"}}, "spec": spec}))
    assert (answer.outcome, found["allowed"]) == (Outcome.ERROR, True)
    assert not {"patch", "warnings"} & set(found)
    answer, found = validated(asked({"spec": {"nodeGroups": 7}}, kind="LocalModelCache"))
    assert (answer.outcome, found["allowed"]) == (Outcome.ERROR, True)


def test_a_pod_of_a_megabyte_is_answered_soon_and_briefly() -> None:
    """Whoever may make pods must not stop the admission of others'."""
    notes = {f"source.{n}": LLAMA for n in range(100)}
    notes |= {f"mount-path.{n}": f"/m/{n}" for n in range(100)}
    pod = plain(**notes)
    mounts = [{"name": "x", "mountPath": f"/{n}"} for n in range(30_000)]
    pod["spec"]["containers"][0]["volumeMounts"] = mounts
    answer, _ = mutated(asked(pod))
    assert answer.outcome is Outcome.PATCHED
    assert len(answer.body) < 200_000


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_comes_is_answered(data: st.DataObject) -> None:
    """A good review in which anything, anywhere, is replaced by anything."""
    kind = data.draw(st.sampled_from(["Pod", "LocalModelCache"]))
    operation = data.draw(st.sampled_from(["CREATE", "UPDATE", "DELETE"]))
    case = data.draw(st.sampled_from(["uncached-hf", "cached-hf", "triton-vllm", "llmisvc"]))
    pod = golden(case) if kind == "Pod" else _cache()
    raw: Any = asked(pod, kind=kind, operation=operation, oldObject=_cache())
    for _ in range(data.draw(st.integers(1, 3))):
        owner = raw
        while True:
            names = sorted(owner) if isinstance(owner, dict) else range(len(owner))
            name = data.draw(st.sampled_from(names))
            if not isinstance(owner[name], dict | list) or not owner[name]:
                break
            if data.draw(st.integers(0, 5)) == 0:
                break
            owner = owner[name]
        owner[name] = data.draw(_JSON)
        if not isinstance(raw["request"], dict | list):
            break
    body = json.dumps(raw).encode()
    try:
        request = review.read(body)
    except ValueError:
        uid = raw["request"].get("uid") if isinstance(raw["request"], dict) else None
        assert not isinstance(uid, str) or not uid
        return
    review.deletion(request)
    for answer in (
        review.mutated(request, WORLD),
        review.validated(request, WORLD, check=scheme_of),
    ):
        response(answer, request.uid)
        assert len(answer.body) < 4 * len(body) + 16_384


@given(st.binary(max_size=200) | _JSON.map(lambda raw: json.dumps(raw).encode()))
def test_garbage_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        review.read(body)


def test_a_patch_that_does_not_apply_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API server would refuse the pod for it, whatever the failurePolicy."""
    good = mutate(golden("uncached-hf"), WORLD, namespace="team-a")
    assert isinstance(good, Mutation)
    for path in ("/spec/nowhere/-", "/spec/volumes/99", "/spec/volumes/-1", "/metadata/name/x"):
        bad = replace(good, patch=(*good.patch, {"op": "add", "path": path, "value": {}}))
        monkeypatch.setattr(review, "mutate", lambda *_, bad=bad, **__: bad)
        answer, found = mutated(asked(golden("uncached-hf")))
        assert answer.outcome is Outcome.ERROR, path
        assert "patch" not in found
