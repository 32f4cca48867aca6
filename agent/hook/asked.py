"""What a pod asks for: the models it names, and where they are to be. Pure."""

import posixpath
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from agent.hook.decisions import Left, Why
from agent.hook.spec import Json, mounts, name_of
from agent.kube.parse import ANNOTATIONS as PREFIX
from agent.kube.podspec import sources
from agent.quantities import parse_duration

MOST_MODELS = 100  # of one pod: others wait while it is admitted

_WAIT_SECONDS = 30 * 60


def volumes_of(places: Iterable[str], container: Json) -> dict[str, str]:
    """By path in a container, the name of the volume that it is in; without those in none."""
    found = {directory_of(mount.get("mountPath")): name_of(mount) for mount in mounts(container)}
    volumes = {}
    for place in places:
        directory = directory_of(place)
        if around := [path for path in found if directory.startswith(path)]:
            volumes[place] = found[max(around, key=len)]
    return volumes


def pairs_of(arguments: Sequence[Any]) -> list[tuple[str, str]]:
    """`uri destination uri destination`. Raises Left for anything else."""
    words = [str(word) for word in arguments]
    pairs = list(zip(words[::2], words[1::2], strict=False))
    places = [place for _, place in pairs]
    if len(places) > MOST_MODELS:
        raise Left(Why.ODD, f"it has more than {MOST_MODELS} models")
    if len(words) % 2 or not pairs or len({uri for uri, _ in pairs}) < len(pairs):
        raise Left(Why.ODD, "the initializer's arguments are no pairs")
    check_places(places)
    return pairs


def check_not_expanded(initializer: Json) -> None:
    """Raise Left for what kubelet makes other words of, `$(NAME)` and `$$`: nobody can say here
    what they will be."""
    for word in (*(initializer.get("command") or ()), *(initializer.get("args") or ())):
        if "$(" in str(word) or "$$" in str(word):
            raise Left(Why.ODD, f"{word} is another word when the pod starts")


def check_places(places: Sequence[str]) -> None:
    """Raise Left where one is in another, or two are the same: what one pair leaves to the
    original would be written over the links of the other."""
    for place in places:
        if not place.startswith("/") or _normal(place) == "/":
            raise Left(Why.ODD, f"{place} is no absolute path of a directory")
    found = sorted(map(directory_of, places))
    for outer, inner in pairwise(found):  # what is below a path comes next to it
        if inner.startswith(outer):
            raise Left(Why.ODD, f"{outer} holds another model")


def named_in(notes: Json) -> dict[str, tuple[str, str]]:
    """The models that annotations name: URI and mount path, by the name behind the dot."""
    return {
        name: (uri, _normal(str(notes.get(f"{PREFIX}/mount-path{name}") or "/mnt/models")))
        for name, uri in sources(notes).items()
    }


def _normal(path: str) -> str:
    """Without what makes two paths of one: POSIX lets two slashes at the beginning mean more."""
    return re.sub("^//", "/", posixpath.normpath(path))


def wait_seconds(text: Any) -> int:
    try:
        return int(parse_duration(str(text))) if text else _WAIT_SECONDS
    except ValueError:
        return _WAIT_SECONDS


def directory_of(path: Any) -> str:
    """To be compared with the beginning of another path."""
    return f"{_normal(str(path)).rstrip('/')}/"
