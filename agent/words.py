"""What the pods of a node are told about their models, from the facts. Pure.

The reason of such an Event is one of `Said`, or, where a model cannot come, its own.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from agent.model import Blocked, CacheKey, quantity
from agent.phases import Phase
from agent.status import NO_ROOM, Facts, progress_of, reason_of
from agent.wishes import Desired

_SERVED = frozenset({Phase.READY, Phase.ADOPTING})
_COMING = frozenset({Phase.RESOLVING, Phase.FETCHING, Phase.VERIFYING})
_HOPELESS = NO_ROOM | {Blocked.FOREIGN_DIRECTORY}
_SHOWN = 3  # models in one message
_URI_CHARACTERS = 80


class Said(StrEnum):
    """Reasons of Events on pods. The values are public."""

    WAITS = "WaitsForModel"
    READY = "ModelReady"
    NOT_ASKED_FOR = "NotAskedFor"
    BYPASSED = "CacheBypassed"


SAYS: Mapping[Said, str] = {
    Said.WAITS: "it cannot start before a model is here; the message says how far that is",
    Said.READY: "what it waited for is here; it goes on by itself",
    Said.NOT_ASKED_FOR: "it waits for a model that no entry of this node's LocalModelNode asks for",
    Said.BYPASSED: "it is to read what this node's cache is there for, and reads past it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One Event."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


def of_waiting(
    keys: Collection[CacheKey], facts: Mapping[CacheKey, Facts], desired: Desired
) -> Word | None:
    """What to say to a pod that has not started and uses these models: of all that there is to say,
    what is worst. None while nobody can tell."""
    keys = sorted(keys)
    for key in keys:
        if (trouble := _trouble(facts.get(key), desired, key)) is not None:
            return trouble
    known = [facts[key] for key in keys if key in facts]
    absent = [fact for fact in known if fact.phase not in _SERVED]
    if absent:
        return Word(
            kind="Normal",
            reason=Said.WAITS,
            message=f"waits for {_some(map(_how_far, absent))}; it starts once that is complete",
        )
    if len(known) < len(keys):
        return None  # an entry came a moment ago, and its cache is still to be heard of
    message = f"on this node now: {_some(fact.ref.uri for fact in known)}"
    return Word(kind="Normal", reason=Said.READY, message=message)


def _trouble(fact: Facts | None, desired: Desired, key: CacheKey) -> Word | None:
    """Why a model does not come."""
    phase = fact.phase if fact is not None else None
    if phase in _SERVED:
        return None
    if fact is None or phase is None or not fact.wanted:
        return _unwanted(fact, desired, key)
    hopeless = fact.block is not None and fact.block.why in _HOPELESS
    if phase is Phase.FAILED or (phase is Phase.PENDING and hopeless):
        reason, message = reason_of(fact, phase)
        return Word(kind="Warning", reason=reason, message=f"{fact.ref.uri}: {message}")
    return None


def _unwanted(fact: Facts | None, desired: Desired, key: CacheKey) -> Word | None:
    if (refused := desired.refused.get(key)) is not None:
        message = f"{refused.name}: {refused.message}"
        return Word(kind="Warning", reason=refused.reason.value, message=message)
    if key in desired.spoken_for:
        return None
    name = f"{fact.ref.uri} ({key})" if fact is not None else key
    return Word(
        kind="Warning",
        reason=Said.NOT_ASKED_FOR,
        message=f"this pod waits for the model {name}, and no entry of this node's LocalModelNode"
        " asks for it; look for its LocalModelCache, and whether a node group of it has this node",
    )


def _how_far(fact: Facts) -> str:
    phase = fact.phase
    assert phase is not None
    total, done = progress_of(fact)
    amount = f"{quantity(done)} of {quantity(total)}" if total else ""
    _, message = reason_of(fact, phase)
    state = phase.value.lower()
    return f"{fact.ref.uri}: " + ", ".join(filter(None, (amount, message or state)))


def of_bypass(uri: str, fact: Facts | None, *, namespace: str) -> Word:
    """What to say of a pod that downloads what this node's cache is there for: three hundred
    characters at most. `namespace` is ours."""
    phase = fact.phase if fact is not None else None
    here = "has it" if phase in _SERVED else "is bringing it" if phase in _COMING else "caches it"
    shown = uri if len(uri) <= _URI_CHARACTERS else f"{uri[: _URI_CHARACTERS - 3]}..."
    return Word(
        kind="Warning",
        reason=Said.BYPASSED,
        message=f"reads {shown} past the cache, though this node {here}: the hook left this pod as"
        f" it was. See `kubectl -n {namespace} get deploy localmodel-controller`; its metric"
        " localmodel_hook_pods_total says why pods are left",
    )


def _some(parts: Iterable[str]) -> str:
    found = list(parts)
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
