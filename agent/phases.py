"""Which state a model is in, as its users see it, and which changes of it are legal.

A phase is derived from facts and stored nowhere. TRANSITIONS is the whole truth about legal
changes: the publisher counts a change that is not in it, the scenario tests assert that every
change they saw is, and `docs/states.md` is drawn from it.
"""

from collections.abc import Mapping
from enum import StrEnum

from agent.model import Attempt, Block, Blocked, Entry, Ingest, Job, Stage


class Phase(StrEnum):
    """The state of one model on this volume."""

    PENDING = "Pending"  # wanted, nothing is being done yet (or not now: see the message)
    RESOLVING = "Resolving"  # the source is asked for its files
    FETCHING = "Fetching"  # bytes are moving
    VERIFYING = "Verifying"  # bytes that were here are being read and hashed again
    ADOPTING = "Adopting"  # another agent left it, whole by its sizes; proven while it is served
    READY = "Ready"  # sealed: complete, proven, on offer
    FAILED = "Failed"  # the last try failed; the message says when the next one is
    PARTIAL = "Partial"  # begun, interrupted, and not wanted by anybody now


MEANING: Mapping[Phase, str] = {
    Phase.PENDING: "wanted; nothing is being done yet, the message says why",
    Phase.RESOLVING: "the source is asked which files there are today",
    Phase.FETCHING: "bytes are moving",
    Phase.VERIFYING: "bytes that were here already are read and hashed again",
    Phase.ADOPTING: "another agent left it, and its sizes are right; served while it is proven",
    Phase.READY: "complete, proven byte by byte and on offer",
    Phase.FAILED: "the last try failed; the reason and the time of the next one are given",
    Phase.PARTIAL: "begun, interrupted, and wanted by nobody now; kept for a resume",
}

_WORK = frozenset({Phase.RESOLVING, Phase.FETCHING, Phase.VERIFYING})

TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.PENDING: _WORK | {Phase.ADOPTING, Phase.READY, Phase.FAILED, Phase.PARTIAL},
    # Ready straight from resolving: an earlier life left everything, only the proof was missing.
    Phase.RESOLVING: frozenset(Phase) - {Phase.RESOLVING},
    # Back to resolving: other patterns are wanted now than those it was begun with.
    Phase.FETCHING: frozenset(Phase) - {Phase.FETCHING},
    Phase.VERIFYING: frozenset(Phase) - {Phase.VERIFYING},
    # To work: a file of it was removed, or its bytes are wrong, though its size is right.
    Phase.ADOPTING: frozenset(Phase) - {Phase.ADOPTING},
    # A damaged model leaves Ready at once and is mended in place of being trusted.
    # To resolving: its cache wants other files of it now.
    Phase.READY: _WORK | {Phase.PENDING, Phase.FAILED},
    Phase.FAILED: _WORK | {Phase.PENDING, Phase.ADOPTING, Phase.READY, Phase.PARTIAL},
    Phase.PARTIAL: _WORK | {Phase.PENDING, Phase.ADOPTING, Phase.FAILED, Phase.READY},
}

_OF_STAGE: Mapping[Stage, Phase] = {
    Stage.RESOLVING: Phase.RESOLVING,
    Stage.FETCHING: Phase.FETCHING,
    Stage.VERIFYING: Phase.VERIFYING,
}


def phase_of(
    *,
    wanted: bool,
    entry: Entry | None,
    damaged: bool,
    ingest: Ingest | None,
    job: Job | None,
    attempt: Attempt | None,
    block: Block | None,
    adoptable: bool = False,
) -> Phase | None:
    """The phase of one key from all that is known of it; None: there is nothing to say.

    A running job is the freshest fact, except that what is sealed and whole is Ready whatever else
    goes on, and what another agent left whole is served all the while. A failure shows until the
    next try begins, unless something newer than its own back-off blocks that try, or nobody wants
    the model any more: then there is no next try.
    """
    if entry is not None and not damaged:
        return Phase.READY
    if adoptable and wanted and not damaged:
        return Phase.ADOPTING
    if job is not None:
        return _OF_STAGE[job.stage]
    waits = block is None or block.why is Blocked.BACKING_OFF
    if attempt is not None and wanted and waits:
        return Phase.FAILED
    if wanted or damaged or block is not None:
        return Phase.PENDING
    return Phase.PARTIAL if ingest is not None else None
