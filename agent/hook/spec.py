"""Reading a pod's spec, in which anything may be absent."""

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def at(raw: Json, *names: str) -> Json:
    """What is under a path of names; {} where nothing is."""
    for name in names:
        raw = raw.get(name) or {}
    return raw


def containers(spec: Json) -> list[tuple[str, Json]]:
    """With their JSON pointers."""
    return [
        (f"/spec/{kind}/{index}", container)
        for kind in ("initContainers", "containers")
        for index, container in enumerate(spec.get(kind) or ())
    ]


def mounts(container: Json) -> Sequence[Json]:
    return container.get("volumeMounts") or ()


def name_of(item: Json) -> str:
    return str(item.get("name") or "")
