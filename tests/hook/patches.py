"""JSON Patch (RFC 6902), as much of it as the hook sends."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any


def patched(document: Any, patch: Iterable[Mapping[str, Any]]) -> Any:
    """A patched copy. Raises what the API server would refuse: `replace` of what is not there."""
    result = copy.deepcopy(document)
    for step in patch:
        *parents, last = (
            part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]
        )
        owner = result
        for part in parents:
            owner = owner[int(part)] if isinstance(owner, list) else owner[part]
        value = copy.deepcopy(step["value"])
        if isinstance(owner, list):
            assert step["op"] == "add", step
            owner.insert(len(owner) if last == "-" else int(last), value)
        else:
            assert (last in owner) == (step["op"] == "replace"), step
            owner[last] = value
    return result
