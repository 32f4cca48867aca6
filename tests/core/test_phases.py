"""Phases against a life: every fact that can change, changed, and what users would see of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest

from agent.errors import Reason
from agent.model import Attempt, Block, Blocked, Entry, Ingest, Job, ModelRef, Stage
from agent.phases import MEANING, TRANSITIONS, Phase, phase_of

REF = ModelRef(uri="hf://acme/tiny")
ENTRY = Entry(
    ref=REF, revision="r", fingerprint="sha256:00", bytes=1, files=1, sealed_at=0.0, last_used=0.0
)
INGEST = Ingest(ref=REF, revision="r", total=2, done=1)
ATTEMPT = Attempt(key=REF.key, count=1, reason=Reason.NETWORK, message="no route", retry_at=9.0)


@dataclass(frozen=True, slots=True)
class Life:
    """The facts of one key, as far as phases tell them apart."""

    wanted: bool = False
    sealed: bool = False
    damaged: bool = False
    begun: bool = False
    stage: Stage | None = None
    failed: bool = False
    blocked: Blocked | None = None
    left: bool = False  # by another agent, whole by its sizes

    @property
    def phase(self) -> Phase | None:
        return phase_of(
            wanted=self.wanted,
            entry=ENTRY if self.sealed else None,
            damaged=self.damaged,
            ingest=INGEST if self.begun else None,
            job=None if self.stage is None else Job(key=REF.key, stage=self.stage),
            attempt=ATTEMPT if self.failed else None,
            block=None if self.blocked is None else Block(why=self.blocked, message="why"),
            adoptable=self.left,
        )


def events(life: Life) -> Iterator[Life]:
    """All that can happen next, one thing at a time."""
    if not life.sealed:  # it comes with a listing, and goes by somebody's hand, or a hash
        yield replace(life, left=not life.left)
    if life.stage is not None:
        yield from _of_a_job(life)
        return
    # Asked for, or asked for otherwise (which forgives a failure), or not any more.
    yield replace(life, wanted=True, blocked=None)
    yield replace(life, wanted=True, failed=False, blocked=None)
    yield replace(life, wanted=False, blocked=None)
    if life.sealed:
        yield replace(life, damaged=True)
        if life.damaged:  # withdrawn, and from then on wanted by ourselves
            yield replace(life, sealed=False, damaged=False, begun=True, wanted=True)
        elif not life.wanted:  # evicted
            yield replace(life, sealed=False)
    elif life.wanted:
        for why in Blocked:
            if life.failed or why is not Blocked.BACKING_OFF:
                yield replace(life, blocked=why)
        yield replace(life, stage=Stage.RESOLVING, blocked=None)
        if life.begun:
            yield replace(life, stage=Stage.FETCHING, blocked=None)
            yield replace(life, stage=Stage.VERIFYING, blocked=None)


def _of_a_job(life: Life) -> Iterator[Life]:
    over = replace(life, stage=None)
    yield replace(over, failed=True, blocked=Blocked.BACKING_OFF)
    yield replace(over, wanted=False)  # cancelled
    if life.stage is Stage.RESOLVING:
        for following in (None, Stage.FETCHING, Stage.VERIFYING):
            yield replace(life, begun=True, stage=following)
        return
    if life.stage is Stage.VERIFYING:
        yield replace(life, stage=Stage.FETCHING)
    yield replace(over, begun=False, sealed=True, failed=False, left=False)


def _lives() -> set[Life]:
    """All that can be reached from nothing at all, and from what a restart finds."""
    found = {Life(), Life(sealed=True), Life(begun=True), Life(begun=True, wanted=True)}
    # Killed between the seal and the row that forgets the failures before it.
    found.add(Life(sealed=True, failed=True))
    ahead = list(found)
    while ahead:
        fresh = set(events(ahead.pop())) - found
        found |= fresh
        ahead.extend(fresh)
    return found


def _changes(following: Callable[[Life], Iterator[Life]]) -> set[tuple[Phase, Phase]]:
    found = set()
    for life in _lives():
        for later in following(life):
            before, after = life.phase, later.phase
            if before is not None and after is not None and before is not after:
                found.add((before, after))
    return found


def test_every_change_that_can_happen_is_legal() -> None:
    illegal = {(a.value, b.value) for a, b in _changes(events) if b not in TRANSITIONS[a]}
    assert illegal == set()


def test_every_legal_change_can_happen() -> None:
    """Publications may miss states in between: damage found, withdrawn and begun again, say."""

    def up_to_three(life: Life) -> Iterator[Life]:
        now = {life}
        for _ in range(3):
            now = {later for earlier in now for later in events(earlier)}
            yield from now

    table = {(a, b) for a, following in TRANSITIONS.items() for b in following}
    assert {(a.value, b.value) for a, b in table - _changes(up_to_three)} == set()


def test_every_phase_is_reached() -> None:
    assert {life.phase for life in _lives()} == {*Phase, None}


def test_the_tables_cover_the_phases_and_nothing_else() -> None:
    assert set(TRANSITIONS) == set(MEANING) == set(Phase)
    for phase, following in TRANSITIONS.items():
        assert following <= set(Phase)
        assert phase not in following, "staying is no change"


def test_no_phase_is_a_dead_end() -> None:
    assert all(TRANSITIONS[phase] for phase in Phase)


@pytest.mark.parametrize("flags", list(product((False, True), repeat=4)))
@pytest.mark.parametrize("stage", [None, *Stage])
def test_what_is_whole_is_ready_whatever_else_goes_on(
    flags: tuple[bool, ...], stage: Stage | None
) -> None:
    wanted, begun, failed, damaged = flags
    life = Life(wanted, True, damaged, begun, stage, failed, Blocked.QUEUED if wanted else None)
    assert (life.phase is Phase.READY) is not damaged


@pytest.mark.parametrize(
    ("life", "phase"),
    [
        (Life(), None),
        (Life(wanted=True), Phase.PENDING),
        (Life(wanted=True, begun=True, blocked=Blocked.INSUFFICIENT_CAPACITY), Phase.PENDING),
        (Life(wanted=True, stage=Stage.RESOLVING), Phase.RESOLVING),
        (Life(wanted=True, begun=True, stage=Stage.FETCHING), Phase.FETCHING),
        (Life(wanted=True, begun=True, stage=Stage.VERIFYING), Phase.VERIFYING),
        (Life(wanted=True, failed=True), Phase.FAILED),
        (Life(wanted=True, failed=True, blocked=Blocked.BACKING_OFF), Phase.FAILED),
        # The back-off is over; what holds it up now is newer than the failure.
        (Life(wanted=True, failed=True, blocked=Blocked.QUEUED), Phase.PENDING),
        (Life(wanted=True, failed=True, blocked=Blocked.INSUFFICIENT_CAPACITY), Phase.PENDING),
        # Nobody wants it: there is no next try to announce.
        (Life(begun=True, failed=True), Phase.PARTIAL),
        (Life(wanted=True, failed=True, stage=Stage.FETCHING), Phase.FETCHING),
        (Life(begun=True), Phase.PARTIAL),
        # Another agent's is served whatever goes on beside it, but not without a wish.
        (Life(wanted=True, left=True), Phase.ADOPTING),
        (Life(wanted=True, left=True, begun=True, stage=Stage.VERIFYING), Phase.ADOPTING),
        (Life(wanted=True, left=True, failed=True), Phase.ADOPTING),
        (Life(wanted=True, left=True, blocked=Blocked.FOREIGN_DIRECTORY), Phase.ADOPTING),
        (Life(left=True, begun=True), Phase.PARTIAL),
        (Life(sealed=True, damaged=True), Phase.PENDING),
        (Life(sealed=True, damaged=True, wanted=True, stage=Stage.VERIFYING), Phase.VERIFYING),
    ],
)
def test_the_phase_of(life: Life, phase: Phase | None) -> None:
    assert life.phase is phase
