"""Which files of a model a ClusterStorageContainer wants (kserve.md 5.5, 9.1.12).

Decided from the container alone, before anything is asked of a source: the patterns are a part of
what is wanted, so a change of them is a change of the wish, like that of an annotation (design D2).
"""

import json
from collections.abc import Mapping
from typing import Any

from agent.kube.credentials.container import PATTERNS, matching
from agent.kube.credentials.objects import mapping, objects_of, refused, text_of
from agent.layout import is_one_line

Patterns = tuple[tuple[str, ...], tuple[str, ...]]
"""What to take (none: everything), and what to leave out of that."""

_NOTHING = "[z-a]"  # an empty range: a pattern that no path matches


def storage_patterns(uri: str, raw: Any) -> Patterns:
    """Of the container for this URI, as globs with the meaning that ours have (`sources.base`).

    `raw` is the list of ClusterStorageContainers as the API server answers it; None for none.
    Raises Unauthorized, as everything that is wrong with an object, for patterns that cannot be
    read here and now: without them the wrong files would be brought.
    """
    scheme = uri.partition("://")[0]
    if scheme in ("http", "https"):  # one file: KServe does not filter these
        return (), ()
    if (found := matching(uri, raw)) is None:
        return (), ()
    where, container = found
    values = _values(where, container)
    include, exclude = (_listed(f"{where}, {name}", values.get(name, "")) for name in PATTERNS)
    if scheme != "hf":  # the hub's client has more meanings than fnmatch
        include, exclude = (tuple(map(_plain, globs)) for globs in (include, exclude))
    return include, exclude


def _values(where: str, container: Mapping[str, Any]) -> dict[str, str]:
    """Those that are written out; what `envFrom` says is refused where it is read."""
    found = {}
    for item in objects_of(where, container, "env"):
        if (name := text_of(where, item, "name")) in PATTERNS:
            value = text_of(where, item, "value")
            if mapping(where, item, "valueFrom") or "$(" in value:
                raise refused(f"{where}: {name} must be a plain value, of no other variable")
            found[name] = value.replace("$$", "$")
    return found


def _listed(where: str, text: str) -> tuple[str, ...]:
    """A JSON array, one JSON text, or a comma-separated list."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = [part for part in map(str.strip, text.split(",")) if part]
    if not isinstance(value, list | dict):
        value = [value if isinstance(value, str) else text.strip()]
    if not isinstance(value, list) or not all(isinstance(part, str) and part for part in value):
        raise refused(f"{where}: it is not an array of texts")
    if not all(map(is_one_line, value)):
        raise refused(f"{where}: a pattern holds control characters")
    return tuple(value)


def _plain(glob: str) -> str:
    """fnmatch has no directories: to it `dir/` is the name of a file, and no file has it. A
    backslash is a character to it, and we store no name that has one."""
    return _NOTHING if glob.endswith("/") or "\\" in glob else glob


__all__ = ["Patterns", "storage_patterns"]
