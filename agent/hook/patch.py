"""JSON Patch (RFC 6902) for lists and members that may be absent."""

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
