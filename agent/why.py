"""Why a model is here, not here, would go or went: one sentence from the facts. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from agent.model import Actual, CacheKey, Kept, Past, Volume, Want, quantity
from agent.phases import Phase
from agent.quantities import duration
from agent.status import Facts, reason_of
from agent.victims import keeps, victims

KEPT: Mapping[Kept, str] = {
    Kept.WANTED: "the desired state wants it here at all times",
    Kept.DEMANDED: "somebody waits for it now",
    Kept.IN_USE: "it is in use",
    Kept.UNKNOWN_USE: "nobody can tell who uses it, so nothing is evicted",
    Kept.PINNED: "it is pinned",
    Kept.YOUNG: "it came not long ago (--min-age)",
    Kept.DAMAGED: "it is damaged, and is mended first",
    Kept.BUSY: "it is being worked on",
    Kept.UNCONFIRMED: "nobody has said that it may go: what asked for it is away, or unreadable",
}

_WENT: Mapping[str, str] = {
    "Space": "its room was needed",
    "Left": "it had left the desired state",
    "Expired": "nobody had used it for as long as its ttl",
    "Asked": "an operator evicted it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that is known when somebody asks about one model."""

    key: CacheKey
    wants: Mapping[CacheKey, Want]
    actual: Actual
    volume: Volume
    now: float
    facts: Facts | None
    past: Sequence[Past] = ()
    users: Sequence[str] = ()


def explain(case: Case) -> list[str]:
    """The answer first, then what supports it."""
    phase = case.facts.phase if case.facts is not None else None
    return [_verdict(case, phase), *_tried(case), *_asked(case), *_used(case), *_history(case)]


def _verdict(case: Case, phase: Phase | None) -> str:
    if phase is Phase.READY and case.key in case.actual.entries:
        return _here(case)
    if phase is None or case.facts is None:
        return _gone(case)
    if phase is Phase.ADOPTING:
        return f"here, and stays: {reason_of(case.facts, phase)[1]}{_amount(case.facts)}"
    if phase is Phase.PARTIAL:
        return "not here: it was begun, and nobody asks for it now; its bytes are kept for a resume"
    if phase in (Phase.RESOLVING, Phase.FETCHING, Phase.VERIFYING):
        return f"on its way: {phase.value.lower()}{_amount(case.facts)}"
    return f"not here: {_waits(case, case.facts)}"


def _here(case: Case) -> str:
    kept = keeps(case.key, case.wants, case.actual, case.volume, case.now)
    if kept is not None:
        return f"here, and stays: {KEPT[kept]}"
    order = [victim.key for victim in victims(case.wants, case.actual, case.volume, case.now)]
    if case.key not in order:
        return "here, and stays: it holds no bytes"
    place = order.index(case.key) + 1
    return f"here, and would go if room were needed: {place} of {len(order)} that may go"


def _gone(case: Case) -> str:
    came_or_went = [past for past in case.past if past.what in ("Evicted", "Sealed")]
    last = came_or_went[-1] if came_or_went else None
    if last is not None and last.what == "Sealed":
        return "not here: it was, and went by no eviction: somebody removed it"
    if last is None:
        return "not here: nothing asks for it, and it is not known to have been here"
    ago = duration(max(0.0, case.now - last.at))
    return f"not here: it went {ago} ago, because {_WENT.get(last.why, last.why)}"


def _waits(case: Case, facts: Facts) -> str:
    if facts.damaged:
        return "it is damaged and off offer; it is mended next"
    if facts.block is not None:
        return facts.block.message
    if facts.attempt is not None:
        return f"{facts.attempt.reason.value}: {facts.attempt.message}"
    want = case.wants.get(case.key)
    if want is not None and want.on_demand and case.key not in case.actual.demanded:
        if case.actual.in_use is None:
            return "it is fetched on demand, and nobody can tell now whether somebody asks"
        return "it is fetched on demand, and nobody on this node asks for it"
    return "it is about to be fetched"


def _amount(facts: Facts) -> str:
    job = facts.job
    if job is None or not job.total:
        return ""
    return f", {quantity(job.done)} of {quantity(job.total)}"


def _tried(case: Case) -> list[str]:
    """How often it failed, and when it is tried again."""
    want, attempt = case.wants.get(case.key), case.facts.attempt if case.facts else None
    if want is None or attempt is None or case.key in case.actual.jobs:
        return []
    if want.on_demand and case.key not in case.actual.demanded:
        then = "tried again when somebody asks for it"
    elif attempt.retry_at == inf:
        then = "not tried again until the request changes"
    else:
        then = f"the next try is in {duration(attempt.retry_at - case.now)}"
    times = "once" if attempt.count == 1 else f"{attempt.count} times in a row"
    return [f"failed {times}; {then}"]


def _asked(case: Case) -> list[str]:
    want, left = case.wants.get(case.key), case.actual.left.get(case.key)
    lines = []
    if want is not None:
        policy = "on demand" if want.on_demand else "always"
        names = ", ".join(sorted(want.names)) or "a command"
        lines.append(f"asked for by {names}: {policy}, priority {want.priority}")
        if want.ttl_seconds is not None and want.on_demand:
            lines.append(f"goes {duration(want.ttl_seconds)} after its last use")
    elif left is not None and left > case.now:
        lines.append(f"left the desired state; kept {duration(left - case.now)} more")
    elif case.key in case.actual.entries:
        lines.append("nothing in the desired state asks for it")
    if case.key in case.actual.pinned:
        lines.append("pinned by an operator")
    return lines


def _used(case: Case) -> list[str]:
    lines = [f"used by {user}" for user in case.users]
    entry = case.actual.entries.get(case.key)
    if entry is None:
        return lines
    if entry.last_used:
        lines.append(f"last used {duration(max(0.0, case.now - entry.last_used))} ago")
    shared = sum(size for _, size in entry.shared)
    if shared:
        lines.append(f"shares {quantity(shared)} of its {quantity(entry.bytes)} with other models")
    return lines


def _history(case: Case) -> list[str]:
    return [_event(past, case.now) for past in case.past[-5:]]


def _event(past: Past, now: float) -> str:
    ago = f"{duration(max(0.0, now - past.at))} ago"
    match past.what:
        case "Sealed":
            return f"{ago}: complete and proven, {quantity(past.bytes)}"
        case "Evicted":
            age = duration(max(0.0, past.age_seconds or 0.0))
            idle = duration(max(0.0, past.idle_seconds or 0.0))
            return (
                f"{ago}: evicted, because {_WENT.get(past.why, past.why)}; {age} old, {idle} idle"
            )
        case "Damaged":
            return f"{ago}: found damaged: {past.why}"
    return f"{ago}: wanted again after its eviction"
