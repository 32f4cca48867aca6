"""The status of a LocalModelNode: KServe's map, and what ours says beyond it. Pure.

KServe's controller reads `modelStatus` alone. Everything else is for people, and is dropped by an
API server that has KServe's own CRD; nothing depends on it.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

from agent.errors import AgentError, Reason
from agent.model import Space, quantity
from agent.phases import Phase
from agent.status import KSERVE_STATUS, rfc3339

Body = Mapping[str, Any]

_MODEL_FIELDS = (
    "state",
    "reason",
    "message",
    "revision",
    "fingerprint",
    "bytes",
    "downloadedBytes",
    "startedAt",
    "readyAt",
    "retryAt",
    "lastUsed",
    "pinned",
)
_TROUBLE = frozenset(reason.value for reason in Reason)
_DOWNLOADED = KSERVE_STATUS[Phase.READY]
_DOWNLOADING = KSERVE_STATUS[Phase.FETCHING]

_MOVING = frozenset({"downloadedBytes", "lastUsed", "message"})
"""What changes all the time, of a model; of a node, `disk` and the counts of pods."""

_TEXT_CHARACTERS = 1000
"""Of a message or a URI: a single hostile one could be more than etcd takes of an object."""

Field = tuple[str | None, ...]
"""Where something is in a status; None for any model's name."""


def compose(
    entries: Iterable[str],
    bodies: Mapping[str, Body],
    *,
    obstacle: AgentError | None,
    disk: Mapping[str, int] | None,
    hits: int,
    misses: int,
    version: str,
    before: Mapping[str, Any],
    now: float,
) -> dict[str, Any]:
    """The whole status, with exactly one key for every entry of the spec.

    `bodies` say what is known of each; `obstacle` why nothing is done at all; `disk` is in bytes;
    `before` is the status as the API server has it, for the times of the conditions.
    """
    names = list(dict.fromkeys(entries))
    said = before.get("modelStatus") or {}
    models = {name: _model(bodies.get(name), obstacle) for name in names}
    words = {name: _word(bodies.get(name), obstacle, said.get(name)) for name in names}
    ready = sum(word == _DOWNLOADED for word in words.values())
    asked = hits + misses
    status: dict[str, Any] = {
        "modelStatus": words,
        "models": models,
        "hits": hits,
        "misses": misses,
        "agentVersion": version,
        "summary": {
            "ready": f"{ready}/{len(names)}",
            "downloading": sum(word == _DOWNLOADING for word in words.values()),
            "hitPercent": f"{100 * hits // asked}%" if asked else "-",
        },
        "conditions": [
            _condition("Ready", *_ready(ready, len(names), obstacle), before, now),
            _condition("Degraded", *_degraded(models, obstacle), before, now),
        ],
    }
    if disk is not None:
        status["disk"] = {name: quantity(size) for name, size in disk.items()}
    return status


def disk_numbers(space: Space, *, limit: int, reserved: int) -> dict[str, int]:
    return {
        "capacity": space.capacity,
        "limit": limit,
        "used": space.capacity - space.free,
        "free": space.free,
        "reserved": reserved,
    }


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What makes `before` into `after` as a JSON merge patch: nulls for keys that go.

    Top-level keys of `before` that `after` does not name are left alone: they are not ours.
    """
    patch: dict[str, Any] = {}
    for name, value in after.items():
        old = before.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            gone: dict[str, Any] = dict.fromkeys(set(old) - set(value))
            if changes := {**merge_patch(old, value), **gone}:
                patch[name] = changes
        elif value != old:
            patch[name] = value
    return patch


def lost(patch: Mapping[str, Any], status: Mapping[str, Any], at: Field = ()) -> set[Field]:
    """The fields of a patch that a status has otherwise, though it was made by that very patch: the
    server's kind does not know them, or somebody on the way changes them."""
    found: set[Field] = set()
    for name, value in patch.items():
        here, have = (*at, name), status.get(name)
        if isinstance(value, Mapping) and isinstance(have, Mapping):
            found |= lost(value, have, here)
        elif value != have:
            found.add(_of_any_model(here))
    return found


def without(patch: Mapping[str, Any], fields: Container[Field], at: Field = ()) -> dict[str, Any]:
    """A patch that leaves these fields as they are."""
    kept: dict[str, Any] = {}
    for name, value in patch.items():
        here = (*at, name)
        if _of_any_model(here) in fields:
            continue
        if isinstance(value, Mapping) and value:
            value = without(value, fields, here)
            if not value:
                continue
        kept[name] = value
    return kept


def _of_any_model(field: Field) -> Field:
    """What one model cannot have, none can."""
    return (field[0], None, *field[2:]) if len(field) > 2 and field[0] == "models" else field


def no_more_downloaded(before: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    """The entries of which `before` said that they are on offer, and `now` that they are not."""
    return {
        name
        for name, word in now.items()
        if word != _DOWNLOADED and before.get(name) == _DOWNLOADED
    }


def urgent(patch: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a patch says more than how far things are.

    A message may hold numbers that move all the time; what it is about is in the other fields.
    """
    for name, change in patch.items():
        if name == "models":
            for model in change.values():
                if model is None or not _MOVING.issuperset(model):
                    return True
        elif name == "summary":
            if not {"hitPercent"}.issuperset(change):
                return True
        elif name == "conditions":
            if _holds(change) != _holds(before.get("conditions") or []):
                return True
        elif name not in ("disk", "hits", "misses"):
            return True
    return False


def _holds(conditions: Iterable[Body]) -> set[tuple[Any, ...]]:
    return {tuple(map(c.get, ("type", "status", "reason"))) for c in conditions}


def _word(body: Body | None, obstacle: AgentError | None, before: object) -> str:
    """KServe's word. What cannot be looked at is not Downloaded; but what its agent left, and
    nobody has compared yet, stays what it was."""
    if body is None or obstacle is not None:
        return KSERVE_STATUS[Phase.PENDING]
    if body.get("foreign") == "unknown":
        return _DOWNLOADED if before == _DOWNLOADED else KSERVE_STATUS[Phase.PENDING]
    word: str = body["modelStatus"]
    return word


def _model(body: Body | None, obstacle: AgentError | None) -> dict[str, Any]:
    if body is None or obstacle is not None:
        if obstacle is None:
            return {"state": Phase.PENDING.value}
        message = obstacle.message[:_TEXT_CHARACTERS]
        reason = obstacle.reason.value
        return {"state": Phase.PENDING.value, "reason": reason, "message": message}
    found = {name: body[name] for name in _MODEL_FIELDS if name in body}
    if "uri" in body:
        found["source"] = body["uri"]
    for name in found.keys() & {"message", "source"}:
        found[name] = found[name][:_TEXT_CHARACTERS]
    return found


def _ready(ready: int, total: int, obstacle: AgentError | None) -> tuple[bool, str, str]:
    if obstacle is not None:
        return False, obstacle.reason.value, obstacle.message
    if ready < total:
        return False, "ModelsNotReady", f"{ready} of {total} models are on offer"
    return True, "ModelsReady", f"all {total} models are on offer"


def _degraded(models: Mapping[str, Body], obstacle: AgentError | None) -> tuple[bool, str, str]:
    """Whether a human should look, and at what first. Reasons are those of `Reason`."""
    if obstacle is not None:
        return True, obstacle.reason.value, obstacle.message
    bad = {name: model for name, model in models.items() if model.get("reason") in _TROUBLE}
    if not bad:
        return False, "AsExpected", ""
    first = next(iter(bad.values()))
    said = "; ".join(f"{name}: {model.get('message', '')}" for name, model in list(bad.items())[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return True, first["reason"], (said + more)[:4000]


def _condition(
    kind: str, holds: bool, reason: str, message: str, before: Mapping[str, Any], now: float
) -> dict[str, Any]:
    status = "True" if holds else "False"
    old: Mapping[str, Any] = next(
        (c for c in before.get("conditions") or [] if c.get("type") == kind), {}
    )
    since = old.get("lastTransitionTime") if old.get("status") == status else None
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": since or rfc3339(now),
    }
