"""JSON Patch (RFC 6902) for lists and members that may be absent."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agent.hook.spec import Json


def append(owner: Json, path: str, name: str, *items: Json) -> list[Json]:
    """To a list that may be absent."""
    if not owner.get(name):
        return [put(name in owner, f"{path}/{name}", list(items))]
    return [{"op": "add", "path": f"{path}/{name}/-", "value": item} for item in items]


def put(there: bool, path: str, value: Any) -> Json:
    return {"op": "replace" if there else "add", "path": path, "value": value}


def escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def applied(document: Any, patch: Iterable[Json]) -> Any:
    """A patched copy, which shares what did not change. Raises ValueError for what an API server
    would refuse: it would refuse the pod with it."""
    for step in patch:
        parts = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")]
        document = _with(document, parts[1:], step)
    return document


def _with(owner: Any, parts: Sequence[str], step: Json) -> Any:
    name, *below = parts
    changed: Any
    if isinstance(owner, list):
        changed = list(owner)
        if below:
            changed[int(name)] = _with(owner[int(name)], below, step)
        elif step["op"] == "add" and (name == "-" or 0 <= int(name) <= len(owner)):
            changed.insert(len(owner) if name == "-" else int(name), step["value"])
        else:
            raise ValueError(step["path"])
    elif isinstance(owner, Mapping):
        if (name in owner) != (bool(below) or step["op"] == "replace"):
            raise ValueError(step["path"])
        changed = {**owner, name: _with(owner[name], below, step) if below else step["value"]}
    else:
        raise ValueError(step["path"])
    return changed
