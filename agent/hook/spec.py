"""Reading objects in which anything may be absent, and naming what is in them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

_SECRET = re.compile(r"(://)[^\s/@?]*@|(?<=[^\s?])\?[^\s,;]+")
"""What a URI may hold that is not for a log: user and password, and the signature in a query."""

WARNING = 256
"""Characters of a warning: the API server cuts what is longer, from the end, where the fix is."""


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


def few(names: Iterable[str]) -> str:
    """Three of them, each cut to what a name needs: it becomes an annotation, or a warning."""
    found = list(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(cut(name, 100) for name in found[:3]) + more


def cut(text: str, most: int) -> str:
    """On one line, no longer than this, and without the secrets of URIs: these go first, because
    nobody knows a password whose `@` was cut off."""
    line = "".join(c if c.isprintable() else " " for c in _SECRET.sub(r"\1", text))
    return line if len(line) <= most else f"{line[: most - 3]}..."
