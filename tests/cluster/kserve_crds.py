"""KServe's four CRDs: ours without what we added, by tests/manifests/kserve_fields.yaml.

That the list is KServe's is checked by reading; that ours holds all of it, by test_kserve_fields.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from tests.machine import REPOSITORY

Schema = dict[str, Any]
_INNER = ("properties", "items", "additionalProperties")


def our_crds() -> dict[str, Schema]:
    """Ours, by kind."""
    files = yaml.safe_load((REPOSITORY / "crds/kustomization.yaml").read_text())["resources"]
    crds = [yaml.safe_load((REPOSITORY / "crds" / name).read_text()) for name in files]
    return {crd["spec"]["names"]["kind"]: crd for crd in crds}


def kserve_fields() -> dict[str, Any]:
    """What KServe's have, by kind."""
    path = REPOSITORY / "tests/manifests/kserve_fields.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return {kind: crd for kind, crd in found.items() if not kind.startswith("_")}


def kserve_crds() -> list[Schema]:
    """KServe's, as they are installed: no columns, no short names, none of our fields."""
    crds = []
    for kind, crd in copy.deepcopy(our_crds()).items():
        for name in ("shortNames", "categories"):
            del crd["spec"]["names"][name]
        version = crd["spec"]["versions"][0]
        del version["additionalPrinterColumns"]
        _prune(version["schema"]["openAPIV3Schema"], kserve_fields()[kind]["fields"])
        crds.append(crd)
    return crds


def storage_containers_crd() -> Schema:
    """KServe's ClusterStorageContainers, which we read and do not install; any field is kept."""
    return _any_crd("ClusterStorageContainer", "Cluster", "v1alpha1", disabled="boolean")


def service_crds() -> list[Schema]:
    """What KServe's users write; nobody does anything with it here."""
    return [
        _any_crd("InferenceService", "Namespaced", "v1beta1"),
        _any_crd("ServingRuntime", "Namespaced", "v1alpha1"),
        _any_crd("LLMInferenceService", "Namespaced", "v1alpha2", "v1alpha1"),
    ]


def _any_crd(kind: str, scope: str, *versions: str, **beside: str) -> Schema:
    """With a spec in which any field is kept; the first version is the stored one. `beside` are
    types of fields beside the spec."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    others = {name: {"type": kind_of} for name, kind_of in beside.items()}
    schema = {"type": "object", "properties": {"spec": anything, **others}}
    plural = f"{kind.lower()}s"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.serving.kserve.io"},
        "spec": {
            "group": "serving.kserve.io",
            "names": {"kind": kind, "plural": plural},
            "scope": scope,
            "versions": [
                {
                    "name": name,
                    "served": True,
                    "storage": name == versions[0],
                    "schema": {"openAPIV3Schema": schema},
                }
                for name in versions
            ],
        },
    }


def schema_of(crd: Mapping[str, Any]) -> Schema:
    schema: Schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def fields(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every field below, with its path and what is demanded of it itself."""
    if path:
        yield path, {k: v for k, v in schema.items() if k not in (*_INNER, "description")}
    for name, inner in schema.get("properties", {}).items():
        yield from fields(inner, f"{path}.{name}" if path else name)
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if key in schema:
            yield from fields(schema[key], path + mark)


def _prune(schema: Schema, known: Mapping[str, Any], path: str = "") -> None:
    properties = schema.get("properties", {})
    for name in list(properties):
        inner = f"{path}.{name}" if path else name
        if inner in known:
            _prune(properties[name], known, inner)
        else:
            del properties[name]
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if key in schema:
            _prune(schema[key], known, path + mark)
