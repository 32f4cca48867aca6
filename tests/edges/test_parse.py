"""LocalModelCache objects: what is taken from them, and what is refused naming the field."""

import copy
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import AgentError, Reason
from agent.kube.parse import cache, fingerprint, patterns
from agent.model import ModelRef, Want
from tests.machine import cache_yaml

URI = "hf://acme/tiny"
GOOD: dict[str, Any] = json.loads(
    cache_yaml(
        "tiny",
        URI,
        include="*.safetensors, *.json,",
        exclude="old/*",
        priority="-3",
        expect_fingerprint="sha256:" + "a" * 64,
    )
)


def test_everything_we_understand_is_taken() -> None:
    found = cache(GOOD)
    assert found.name == "tiny"
    assert found.want == Want(
        ref=ModelRef(uri=URI, include=("*.safetensors", "*.json"), exclude=("old/*",)),
        names=frozenset({"tiny"}),
        priority=-3,
        expect_fingerprint="sha256:" + "a" * 64,
    )


def test_annotations_of_others_and_unknown_ones_of_ours_do_not_matter() -> None:
    raw = copy.deepcopy(GOOD)
    raw["metadata"]["annotations"] = {"other/include": 7, "localmodel-agent.io/later": "x", 5: 6}
    assert cache(raw).want.ref == ModelRef(uri=URI)
    raw["metadata"]["annotations"] = None
    assert cache(raw).want.ref == ModelRef(uri=URI)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("apiVersion", "serving.kserve.io/v1", "apiVersion is 'serving.kserve.io/v1'"),
        ("apiVersion", None, "apiVersion is of type NoneType"),
        ("kind", "LocalModelNode", "kind is 'LocalModelNode'"),
        ("metadata", [], "metadata is missing"),
        ("metadata.name", None, "metadata.name of type NoneType"),
        ("metadata.name", 7, "metadata.name of type int"),
        ("metadata.name", "../../x", "metadata.name '../../x'"),
        ("metadata.name", "a/b", "metadata.name 'a/b'"),
        ("metadata.name", ".hidden", "metadata.name '.hidden'"),
        ("metadata.name", "n" * 254, "is not a name"),
        ("metadata.name", "tiny\n", "is not a name"),
        ("spec", None, "spec is missing"),
        ("spec.sourceModelUri", "", "spec.sourceModelUri ''"),
        ("spec.sourceModelUri", ["x"], "spec.sourceModelUri of type list"),
        ("spec.sourceModelUri", "hf://a/b\nc", "is not a URI"),
        ("metadata.annotations", ["x"], "metadata.annotations is not an object"),
        ("metadata.annotations", {"localmodel-agent.io/include": 5}, "quote its value"),
        ("metadata.annotations", {"localmodel-agent.io/include": "a\nb"}, "control characters"),
        ("metadata.annotations", {"localmodel-agent.io/priority": "high"}, "not an integer"),
        (
            "metadata.annotations",
            {"localmodel-agent.io/expect-fingerprint": "sha256:AB"},
            "not sha256:<64 hex digits>",
        ),
    ],
)
def test_what_is_wrong_is_named(path: str, value: object, says: str) -> None:
    raw = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(AgentError) as caught:
        cache(raw)
    assert caught.value.reason is Reason.INVALID_SPEC
    assert says in caught.value.message
    assert caught.value.message.isprintable()


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=5,
)


@given(
    _ANY,
    st.sampled_from(
        ["apiVersion", "kind", "metadata", "spec", "metadata.name", "metadata.annotations"]
    ),
)
def test_any_value_anywhere_is_taken_or_refused(value: Any, path: str) -> None:
    raw = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[last] = value
    with suppress(AgentError):  # and nothing else
        cache(raw)
    with pytest.raises(AgentError):
        cache([value])


def test_patterns_and_fingerprints() -> None:
    assert patterns("") == ()
    assert patterns(" a , ,b/* ") == ("a", "b/*")
    assert fingerprint(None) is None
    for wrong in ("", "sha256:", "a" * 64, "sha256:" + "A" * 64, "sha256:" + "a" * 65):
        with pytest.raises(AgentError):
            fingerprint(wrong)
