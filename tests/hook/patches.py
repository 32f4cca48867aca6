"""What the hook's patches may change at all."""

import re
from typing import Any

OURS = re.compile(
    r"/metadata/annotations/localmodel-agent.io~1(injected|keys)"
    r"|/spec/(volumes|(initContainers|containers)/\d+/volumeMounts)/\d+"
    r"|/spec/initContainers/\d+/command/\d+"
    r"|/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution/\d+"
)
"""What is added."""

CHANGED = re.compile(
    r"/spec/initContainers/\d+/command/\d+"
    r"|/spec/volumes/\d+/persistentVolumeClaim/readOnly"
    r"|/spec/(initContainers|containers)/\d+/volumeMounts/\d+/subPath"
)
"""What may be another than it was: the last two only where KServe rewrote the pod."""


def changes(before: Any, after: Any, pointer: str = "") -> dict[str, tuple[Any, Any]]:
    """Every value that differs, by its JSON pointer: the old and the new one, None for none.

    A list or an object that is new is looked into: what is in it is new, not the list.
    """
    if not isinstance(after, dict | list) or not isinstance(before, type(after) | None):
        return {} if before == after else {pointer: (before, after)}
    olds, news = _items(before), _items(after)
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**olds, **news}:
        old, new = olds.get(name), news.get(name)
        below = f"{pointer}/{str(name).replace('~', '~0').replace('/', '~1')}"
        whole = isinstance(after, list) and name not in olds  # an item is added as a whole
        found |= {below: (old, new)} if whole else changes(old, new, below)
    return found


def check_only_ours(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Hold two pods, without and with the hook, against what is promised."""
    for pointer, (old, new) in changes(before, after).items():
        assert new is not None, f"{pointer} has gone"
        assert OURS.fullmatch(pointer) or CHANGED.fullmatch(pointer), pointer
        if old is not None:
            assert CHANGED.fullmatch(pointer), (pointer, old, new)
        elif isinstance(new, dict) and "weight" not in new:
            assert new["name"] == "localmodel-cache", (pointer, new)


def _items(value: Any) -> dict[Any, Any]:
    return dict(enumerate(value)) if isinstance(value, list) else dict(value or {})
