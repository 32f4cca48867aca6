"""What the verbs say: plain events, and which model a user's word means.

Apart from `service`, because a CLI that finds a running agent, or only looks at the disk, needs
these words and nothing of the machinery behind them: it starts in half the time.
"""

from collections.abc import Container, Mapping
from dataclasses import asdict
from typing import Any

from agent.errors import RULES, AgentError, Reason
from agent.manifest import Manifest
from agent.model import CacheKey, ModelRef
from agent.status import Facts, model_status

Event = dict[str, Any]
"""What JSON can carry; `event` says which one it is."""


def select(sealed: Mapping[CacheKey, ModelRef], asked: Any) -> list[CacheKey]:
    """The keys of the models that were asked for by URI, key or the beginning of a key; all for
    None. Raises InvalidSpec for one that is not on offer."""
    if asked is None:
        return list(sealed)
    return [_selected(sealed, str(name)) for name in asked]


def is_named(name: str, key: str, uri: str, caches: Container[str] = ()) -> bool:
    """Whether a user's word for a model means this one: its URI, the beginning of its key, or one
    of the caches that ask for it."""
    return name == uri or name in caches or (len(name) >= 4 and key.startswith(name))


def model_event(facts: Facts, *, path: str) -> Event | None:
    """What `ls` and `show` are told of a model; None where there is nothing to say."""
    status = model_status(facts, path=path)
    if status is None:
        return None
    asked = {"names": sorted(facts.names), "groups": sorted(facts.groups)}
    return {"event": "model", **asdict(status), **asked}


def _selected(sealed: Mapping[CacheKey, ModelRef], name: str) -> CacheKey:
    found = [key for key, ref in sealed.items() if is_named(name, key, ref.uri)]
    if len(found) != 1:
        problem = "is not on offer here" if not found else f"is the beginning of {len(found)} keys"
        raise AgentError(Reason.INVALID_SPEC, f"{name[:200]!r} {problem}; see localmodel ls")
    return found[0]


def verified_event(found: Manifest, bad: list[str]) -> Event:
    return {
        "event": "verified",
        "key": found.ref.key,
        "uri": found.ref.uri,
        "files": len(found.files),
        "bytes": found.bytes,
        "bad": bad,
    }


def error_event(error: AgentError) -> Event:
    return {
        "event": "error",
        "reason": error.reason.value,
        "message": error.message,
        "advice": RULES[error.reason].advice,
    }
