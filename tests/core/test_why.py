"""`why` has an answer for every state that a model can be in, and for every change of it."""

from dataclasses import replace
from math import inf

import pytest

from agent.errors import Reason
from agent.model import (
    Actual,
    Attempt,
    Block,
    Blocked,
    Entry,
    Foreign,
    Ingest,
    Job,
    Kept,
    ModelRef,
    Past,
    Stage,
    Volume,
    Want,
    Why,
)
from agent.phases import TRANSITIONS, Phase
from agent.status import Facts
from agent.why import KEPT, Case, explain

NOW = 1_000_000.0
REF = ModelRef(uri="hf://acme/tiny")
KEY = REF.key
ENTRY = Entry(
    ref=REF,
    revision="r",
    fingerprint="sha256:00",
    bytes=2**30,
    files=1,
    sealed_at=NOW - 9000,
    last_used=NOW - 7260,
)
INGEST = Ingest(ref=REF, revision="r", total=2**30, done=2**29)
FAILED = Attempt(key=KEY, count=1, reason=Reason.GATED, message="ask for access", retry_at=NOW + 9)
SHORT = Block(why=Blocked.INSUFFICIENT_CAPACITY, message="needs 1Gi more; 0 are free")


def _facts(phase: Phase) -> Facts:
    """The facts of a model in this state."""
    facts = Facts(key=KEY, ref=REF, wanted=phase is not Phase.PARTIAL)
    if phase in (Phase.RESOLVING, Phase.FETCHING, Phase.VERIFYING):
        stage = Stage(phase.value.lower())
        total = None if stage is Stage.RESOLVING else 2**30
        return replace(facts, job=Job(key=KEY, stage=stage, total=total, done=2**28))
    extra = {
        Phase.PENDING: {"block": SHORT},
        Phase.ADOPTING: {"foreign": Foreign(lacking=frozenset()), "ingest": INGEST},
        Phase.READY: {"entry": ENTRY},
        Phase.FAILED: {"attempt": FAILED},
        Phase.PARTIAL: {"ingest": INGEST},
    }[phase]
    return replace(facts, **extra)  # type: ignore[arg-type]  # by name


def _case(phase: Phase | None, *past: Past, want: Want | None = None, **actual: object) -> Case:
    facts = _facts(phase) if phase is not None else None
    entries = {KEY: ENTRY} if phase is Phase.READY else {}
    given = {"entries": entries, "in_use": frozenset(), **actual}
    return Case(
        key=KEY,
        wants={KEY: want} if want is not None else {},
        actual=Actual(**given),  # type: ignore[arg-type]  # by name
        volume=Volume(capacity=2**40, free=2**39),
        now=NOW,
        facts=facts,
        past=past,
    )


SAYS = {
    Phase.PENDING: "not here: needs 1Gi more; 0 are free",
    Phase.RESOLVING: "on its way: resolving",
    Phase.FETCHING: "on its way: fetching, 256Mi of 1Gi",
    Phase.VERIFYING: "on its way: verifying, 256Mi of 1Gi",
    Phase.ADOPTING: "here, and stays: left by another agent, and its sizes are right; its bytes are"
    " being proven",
    Phase.READY: "here, and would go if room were needed: 1 of 1 that may go",
    Phase.FAILED: "not here: Gated: ask for access",
    Phase.PARTIAL: "not here: it was begun, and nobody asks for it now; its bytes are kept for a"
    " resume",
}


@pytest.mark.parametrize(
    ("before", "after"), [(b, a) for b, afters in TRANSITIONS.items() for a in sorted(afters)]
)
def test_every_change_of_state_has_an_answer(before: Phase, after: Phase) -> None:
    assert _facts(before).phase is before
    assert _facts(after).phase is after
    assert explain(_case(before))[0] == SAYS[before]
    assert explain(_case(after))[0] == SAYS[after]


@pytest.mark.parametrize("why", Why)
def test_what_went_says_why_and_when(why: Why) -> None:
    past = Past(
        at=NOW - 3 * 86400,
        key=KEY,
        uri=REF.uri,
        what="Evicted",
        why=why.value,
        age_seconds=90000.0,
        idle_seconds=7260.0,
    )
    answer, *support = explain(_case(None, past))
    assert answer.startswith("not here: it went 3d ago, because ")
    assert why.value not in answer
    assert support[-1].endswith("; 1d1h old, 2h1m idle")


def test_what_never_was_here_is_said_to_be_unknown() -> None:
    assert explain(_case(None)) == [
        "not here: nothing asks for it, and it is not known to have been here"
    ]


KEEPING: dict[Kept, dict[str, object]] = {
    Kept.DEMANDED: {"demanded": frozenset({KEY})},
    Kept.IN_USE: {"in_use": frozenset({KEY})},
    Kept.UNKNOWN_USE: {"in_use": None},
    Kept.PINNED: {"pinned": frozenset({KEY})},
    Kept.YOUNG: {"entries": {KEY: replace(ENTRY, sealed_at=NOW)}},
    Kept.DAMAGED: {"damaged": frozenset({KEY})},
    Kept.BUSY: {"jobs": {KEY: Job(key=KEY, stage=Stage.VERIFYING)}},
    Kept.UNCONFIRMED: {"kept": frozenset({KEY})},
}


@pytest.mark.parametrize("kept", Kept)
def test_what_keeps_a_model_is_said(kept: Kept) -> None:
    want = Want(ref=REF) if kept is Kept.WANTED else None
    case = _case(Phase.READY, want=want, **KEEPING.get(kept, {}))
    assert explain(case)[0] == f"here, and stays: {KEPT[kept]}"


def test_the_support_names_who_asks_who_uses_and_what_happened() -> None:
    want = Want(ref=REF, names=frozenset({"b", "a"}), on_demand=True, ttl_seconds=3600.0)
    shared = replace(ENTRY, shared=frozenset({(7, 2**29)}))
    sealed = Past(at=NOW - 9000, key=KEY, uri=REF.uri, what="Sealed", bytes=2**30)
    again = Past(at=NOW - 9500, key=KEY, uri=REF.uri, what="WantedAgain", why="Space")
    broken = Past(at=NOW - 60, key=KEY, uri=REF.uri, what="Damaged", why="a.bin")
    case = _case(Phase.READY, again, sealed, broken, want=want, entries={KEY: shared})
    users = replace(case, users=["pod default/vllm-0"])
    assert explain(users)[1:] == [
        "asked for by a, b: on demand, priority 0",
        "goes 1h after its last use",
        "used by pod default/vllm-0",
        "last used 2h1m ago",
        "shares 512Mi of its 1Gi with other models",
        "2h38m ago: wanted again after its eviction",
        "2h30m ago: complete and proven, 1Gi",
        "1m ago: found damaged: a.bin",
    ]


@pytest.mark.parametrize(
    ("want", "actual", "retry_at", "says"),
    [
        (Want(ref=REF), {}, NOW + 125, "the next try is in 2m5s"),
        (Want(ref=REF), {}, NOW - 1, "the next try is in 0s"),
        (Want(ref=REF), {}, inf, "not tried again until the request changes"),
        (Want(ref=REF, on_demand=True), {}, NOW + 9, "tried again when somebody asks for it"),
        (
            Want(ref=REF, on_demand=True),
            {"demanded": frozenset({KEY})},
            NOW + 9,
            "the next try is in 9s",
        ),
    ],
)
def test_what_failed_says_how_often_and_when_it_is_tried_again(
    want: Want, actual: dict[str, object], retry_at: float, says: str
) -> None:
    case = _case(Phase.FAILED, want=want, **actual)
    assert case.facts is not None
    for count, times in ((1, "once"), (3, "3 times in a row")):
        attempt = replace(FAILED, count=count, retry_at=retry_at)
        found = replace(case, facts=replace(case.facts, attempt=attempt))
        answer, second, *_ = explain(found)
        assert answer == SAYS[Phase.FAILED]
        assert second == f"failed {times}; {says}"
        # What is tried just now, or wanted by nobody, is not to be tried again.
        job = Job(key=KEY, stage=Stage.RESOLVING)
        running = replace(found, actual=replace(found.actual, jobs={KEY: job}))
        for other in (running, replace(found, wants={})):
            assert not [line for line in explain(other) if "failed" in line]


def test_what_is_fetched_on_demand_says_that_nobody_asks() -> None:
    want = Want(ref=REF, on_demand=True)
    waits = replace(_case(Phase.PENDING, want=want), facts=Facts(key=KEY, ref=REF, wanted=True))
    assert explain(waits)[0] == (
        "not here: it is fetched on demand, and nobody on this node asks for it"
    )


def test_what_left_says_how_long_it_is_kept() -> None:
    case = _case(Phase.READY, left={KEY: NOW + 3600.0})
    assert explain(case)[1] == "left the desired state; kept 1h more"
