"""Our CRDs are strict supersets of KServe's: what its objects may be, ours may be, and no less."""

import pytest

from tests.cluster.kserve_crds import fields, kserve_crds, kserve_fields, our_crds, schema_of

KINDS = ["LocalModelCache", "LocalModelNamespaceCache", "LocalModelNode", "LocalModelNodeGroup"]
OURS = ["models", "disk", "hits", "misses", "summary", "conditions", "agentVersion"]


def test_there_are_the_same_kinds() -> None:
    assert list(our_crds()) == list(kserve_fields()) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_kserve_is_there_and_demands_neither_more_nor_less(kind: str) -> None:
    ours = dict(fields(schema_of(our_crds()[kind])))
    for path, demanded in kserve_fields()[kind]["fields"].items():
        if "embeds" in demanded:
            demanded = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        assert ours[path] == demanded, path


@pytest.mark.parametrize("kind", KINDS)
def test_the_frame_is_kserves(kind: str) -> None:
    spec, known = our_crds()[kind]["spec"], kserve_fields()[kind]
    (version,) = spec["versions"]
    assert (spec["group"], version["name"]) == ("serving.kserve.io", "v1alpha1")
    assert spec["scope"] == known["scope"]
    assert ("status" in version.get("subresources", {})) is known["status_subresource"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_status_of_a_node_has_more(kind: str) -> None:
    known = kserve_fields()[kind]["fields"]
    added = [path for path, _ in fields(schema_of(our_crds()[kind])) if path not in known]
    allowed = [f"status.{name}" for name in OURS] if kind == "LocalModelNode" else []
    assert [path for path in added if not path.startswith(tuple(allowed))] == []
    assert sorted(path for path in added if path in allowed) == sorted(allowed)


def test_what_is_pruned_to_kserves_has_its_fields_alone() -> None:
    for crd in kserve_crds():
        known = kserve_fields()[crd["spec"]["names"]["kind"]]["fields"]
        assert {path for path, _ in fields(schema_of(crd))} == set(known)
