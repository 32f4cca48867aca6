"""Which files a ClusterStorageContainer wants (kserve.md 5.5, 9.1.12), against KServe's rule."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined] # lazily
from hypothesis import example, given
from hypothesis import strategies as st

from agent.errors import AgentError, Reason
from agent.kube.credentials import storage_patterns
from agent.layout import unsafe
from agent.model import ModelRef
from agent.sources.base import selected

ALLOW, IGNORE = "STORAGE_ALLOW_PATTERNS", "STORAGE_IGNORE_PATTERNS"
HUB, STORE = "hf://acme/tiny", "s3://bucket/tiny"


def container(*env: dict[str, Any], prefix: str = "", name: str = "a", **spec: Any) -> Any:
    return {
        "metadata": {"name": name},
        "spec": {
            "workloadType": "localModelDownloadJob",
            "supportedUriFormats": [{"prefix": prefix or uri} for uri in (HUB, STORE, "http")],
            "container": {"name": "c", "env": list(env), **spec},
        },
    }


def patterns(uri: str, *env: dict[str, Any], **more: Any) -> Any:
    return storage_patterns(uri, {"items": [container(*env, **more)]})


def variable(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "value": value}


def of_kserve(paths: Sequence[str], allow: list[str], ignore: list[str]) -> list[str]:
    """kserve.md 5.5: fnmatch on the relative path; allow first, then ignore."""
    kept = [path for path in paths if not allow or any(fnmatchcase(path, p) for p in allow)]
    return [path for path in kept if not any(fnmatchcase(path, p) for p in ignore)]


def ours(uri: str, paths: Sequence[str], allow: list[str], ignore: list[str]) -> list[str]:
    written = (variable(ALLOW, json.dumps(allow)), variable(IGNORE, json.dumps(ignore)))
    include, exclude = patterns(uri, *written)
    ref = ModelRef(uri=uri, include=include, exclude=exclude)
    return [path for path in paths if selected(path, ref)]


_TEXT = st.text(alphabet="ab./*?[]!-\\é", min_size=1, max_size=6)
_GLOBS = st.lists(_TEXT, max_size=3)
_PATHS = st.lists(_TEXT.filter(lambda path: unsafe(path) is None), max_size=6)


@given(paths=_PATHS, allow=_GLOBS, ignore=_GLOBS)
@example(paths=["sub/a", "sub"], allow=["sub/"], ignore=[])
@example(paths=["sub/a", "b"], allow=[], ignore=["sub/"])
@example(paths=["a/b/c"], allow=["a*c"], ignore=["a\\b\\c"])
@example(paths=["a"], allow=["[a/"], ignore=[])
def test_9_1_12_an_object_store_has_the_files_that_fnmatch_leaves(
    paths: list[str], allow: list[str], ignore: list[str]
) -> None:
    assert ours(STORE, paths, allow, ignore) == of_kserve(paths, allow, ignore)


@given(paths=_PATHS, allow=_GLOBS, ignore=_GLOBS)
@example(paths=["sub/a", "sub"], allow=["sub/"], ignore=[])
def test_9_1_12_a_hub_has_the_files_that_its_own_client_leaves(
    paths: list[str], allow: list[str], ignore: list[str]
) -> None:
    """KServe gives them to `snapshot_download`."""
    theirs = filter_repo_objects(paths, allow_patterns=allow or None, ignore_patterns=ignore)
    assert ours(HUB, paths, allow, ignore) == list(theirs)


@pytest.mark.parametrize(
    ("text", "globs"),
    [
        ("", ()),
        (" , ", ()),
        ("[]", ()),
        ('["*.safetensors", "a,b"]', ("*.safetensors", "a,b")),
        ('"*.safetensors"', ("*.safetensors",)),
        ("*.bin, *.pt ,", ("*.bin", "*.pt")),
        ("17", ("17",)),
        ("[ab]*", ("[ab]*",)),
        ("a$$b", ("a$b",)),
        ("[" * 100_000, ("[" * 100_000,)),  # no JSON
    ],
)
def test_how_they_are_written(text: str, globs: tuple[str, ...]) -> None:
    assert patterns(HUB, variable(IGNORE, text)) == ((), globs)
    assert patterns(HUB, variable(ALLOW, text)) == (globs, ())


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ALLOW, "value": '{"a": 1}'},
        {"name": ALLOW, "value": "[1]"},
        {"name": ALLOW, "value": '[""]'},
        {"name": ALLOW, "value": '["a\\nb"]'},
        {"name": ALLOW, "value": "$(OTHER)"},
        {"name": ALLOW, "valueFrom": {"configMapKeyRef": {"name": "a", "key": "b"}}},
    ],
)
def test_what_cannot_be_read_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(AgentError, match=f"ClusterStorageContainer a.*{ALLOW}") as refused:
        patterns(HUB, wrong)
    assert refused.value.reason is Reason.UNAUTHORIZED  # which is tried again


def test_the_last_of_one_name_counts_as_in_a_container() -> None:
    assert patterns(HUB, variable(ALLOW, "a"), variable(ALLOW, "b")) == (("b",), ())


def test_one_file_of_a_web_server_is_not_filtered() -> None:
    assert patterns("https://host/model.gguf", variable(ALLOW, "*.bin")) == ((), ())


def test_only_the_container_that_is_for_the_uri_counts() -> None:
    others = container(variable(ALLOW, "a"), prefix="gs://")
    mine = container(variable(ALLOW, "b"), name="b")
    assert storage_patterns(HUB, {"items": [others, mine]}) == (("b",), ())
    assert storage_patterns(HUB, {"items": [others]}) == ((), ())
    assert storage_patterns(HUB, None) == ((), ())
