"""Facts about a model -> what its users read. Pure. KServe's words are here and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from typing import Any

from agent.errors import RULES, Reason
from agent.model import Attempt, Block, Blocked, CacheKey, Entry, Foreign, Ingest, Job, ModelRef
from agent.phases import Phase, phase_of

KSERVE_STATUS: Mapping[Phase, str] = {
    Phase.PENDING: "ModelDownloadPending",
    Phase.RESOLVING: "ModelDownloading",
    Phase.FETCHING: "ModelDownloading",
    Phase.VERIFYING: "ModelDownloading",
    Phase.ADOPTING: "ModelDownloaded",
    Phase.READY: "ModelDownloaded",
    Phase.FAILED: "ModelDownloadError",
    Phase.PARTIAL: "ModelDownloadPending",
}


UNPROVEN = "Unproven"
"""Why a model that is here waits for one of its caches, as `Blocked` says it for all of them."""

WAITS: Mapping[str, str] = {
    Blocked.QUEUED: "others are being fetched, or have a higher priority; it is next by itself",
    Blocked.BACKING_OFF: "the last try failed, and the time of the next one has not come",
    Blocked.INSUFFICIENT_CAPACITY: "nothing that may go would make room for it; the message says"
    " how many bytes are missing",
    Blocked.LARGER_THAN_VOLUME: "it is larger than the cache, its limit or that of its node group",
    Blocked.FOREIGN_DIRECTORY: "another agent's directory has its place and cannot be taken over;"
    " the message says why",
    UNPROVEN: "it is here, and the credentials that this cache names have not led to it yet",
}
"""Why a wanted model is not Ready although nothing has failed, for the reason of its status."""

NO_ROOM = frozenset({Blocked.INSUFFICIENT_CAPACITY, Blocked.LARGER_THAN_VOLUME})
"""For this nobody should wait: it ends when somebody else goes, if ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is known of one key at one moment. `names` are those who ask for it, `groups` the
    node groups that do."""

    key: CacheKey
    ref: ModelRef
    wanted: bool
    entry: Entry | None = None
    damaged: bool = False
    ingest: Ingest | None = None
    job: Job | None = None
    attempt: Attempt | None = None
    block: Block | None = None
    started_at: float | None = None
    floor: int = 0
    staged: bool = False
    foreign: Foreign | None = None
    names: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()

    @property
    def phase(self) -> Phase | None:
        return phase_of(
            wanted=self.wanted,
            entry=self.entry,
            damaged=self.damaged,
            ingest=self.ingest,
            job=self.job,
            attempt=self.attempt,
            block=self.block,
            adoptable=self.foreign is not None and self.foreign.whole,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model, for people and machines. Times are RFC 3339, sizes bytes, "" is: not known.

    `foreign` is how a directory that another agent left in its place compares with the listing:
    `unknown` (nobody can tell yet), `matches` in all sizes, or `differs`; "": there is none.
    """

    key: str
    uri: str
    state: str
    model_status: str
    reason: str = ""
    message: str = ""
    revision: str = ""
    fingerprint: str = ""
    bytes: int = 0
    downloaded_bytes: int = 0
    files: int = 0
    path: str = ""
    started_at: str = ""
    ready_at: str = ""
    retry_at: str = ""
    last_used: str = ""
    foreign: str = ""
    warning: str = ""


def model_status(facts: Facts, *, path: str) -> ModelStatus | None:
    """What to say of a model; None where there is nothing to say. `path` is where it is served."""
    phase = facts.phase
    if phase is None:
        return None
    reason, message = reason_of(facts, phase)
    common: dict[str, Any] = {
        "key": facts.key,
        "uri": facts.ref.uri,
        "state": phase.value,
        "model_status": _kserve(phase, facts.attempt),
        "reason": reason,
        "message": message,
        "started_at": rfc3339(facts.started_at),
    }
    if phase is Phase.READY and facts.entry is not None:
        entry = facts.entry
        return ModelStatus(
            **common,
            revision=entry.revision,
            fingerprint=entry.fingerprint,
            bytes=entry.bytes,
            downloaded_bytes=entry.bytes,
            files=entry.files,
            path=path,
            ready_at=rfc3339(entry.sealed_at),
            last_used=rfc3339(entry.last_used),
            warning=entry.warning,
        )
    total, done = progress_of(facts)
    retry_at = facts.attempt.retry_at if facts.attempt and phase is Phase.FAILED else None
    return ModelStatus(
        **common,
        revision=facts.ingest.revision if facts.ingest else "",
        bytes=total,
        downloaded_bytes=done,
        path=path if phase is Phase.ADOPTING else "",
        foreign=_foreign(facts),
        retry_at=rfc3339(retry_at),
    )


def unproven(status: ModelStatus, failed: Attempt | None) -> ModelStatus:
    """What to say of a model to a cache whose own credentials have not led to it yet.

    Nothing of what others brought: only whether it may have it, and why not.
    """
    if status.state != Phase.READY:
        return status
    phase, reason = Phase.PENDING, UNPROVEN
    message = "it is here; the credentials that this cache names are tried first"
    retry_at = None
    if failed is not None:
        heals, retry_at = RULES[failed.reason].heals, failed.retry_at
        message = f"it is here, but not by the credentials of this cache: {_failure(failed)}"
        if not heals:
            phase, reason = Phase.FAILED, failed.reason.value
    return ModelStatus(
        key=status.key,
        uri=status.uri,
        state=phase.value,
        model_status=KSERVE_STATUS[phase],
        reason=reason,
        message=message,
        retry_at=rfc3339(retry_at),
    )


def progress_line(facts: Facts, counter: int) -> str | None:
    """The line that a waiting pod reads (design D2): what to do, a counter that moves, numbers.

    None once the model is on offer, or for a key nobody waits for.
    """
    phase = facts.phase
    if phase is None or phase is Phase.READY or not facts.wanted:
        return None
    total, done = progress_of(facts)
    reason, _ = reason_of(facts, phase)
    stuck = facts.block is not None and facts.block.why in NO_ROOM
    # Nor for what takes the place of another's directory when no pod uses it: who waits does.
    stuck = stuck or phase is Phase.FAILED or facts.foreign is not None
    verb = "fallback" if stuck else "wait"
    return f"{verb} {counter} {done} {total} {reason or phase.value}"


def camel_case(status: ModelStatus) -> dict[str, Any]:
    """The fields as a Kubernetes status names them; those that are not known are left out."""
    result = {}
    for name in status.__dataclass_fields__:
        value = getattr(status, name)
        if value != "":
            head, *tail = name.split("_")
            result[head + "".join(part.title() for part in tail)] = value
    return result


def rfc3339(seconds: float | None) -> str:
    """UTC, whole seconds; "" for None and for never."""
    if seconds is None or not isfinite(seconds):
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def progress_of(facts: Facts) -> tuple[int, int]:
    """Total and done, in bytes; while the listing is not known, what the cache says of its size."""
    if facts.job is not None and facts.job.total is not None:
        return facts.job.total, facts.job.done
    if facts.ingest is not None:
        return facts.ingest.total, facts.ingest.done
    return facts.floor, 0


def _foreign(facts: Facts) -> str:
    if facts.foreign is None or not facts.wanted:
        return ""
    if facts.foreign.lacking is None:
        return "unknown"
    return "matches" if facts.foreign.whole else "differs"


def reason_of(facts: Facts, phase: Phase) -> tuple[str, str]:
    """Why it is in this state: the reason, "" where nothing is wrong, and a message for people."""
    if phase is Phase.ADOPTING:
        return _why_adopting(facts)
    if phase is Phase.READY and facts.staged:
        return "", "a newer revision is here, and takes its place when no pod uses this one"
    if phase is Phase.PENDING and facts.staged:
        return "", "it is here, and takes the place of other files when no pod uses them"
    if phase is Phase.READY and facts.attempt is not None:
        return facts.attempt.reason.value, f"cannot be refreshed: {facts.attempt.message}"
    if phase is Phase.READY and facts.entry is not None:
        return "", facts.entry.warning
    if phase is Phase.FAILED and facts.attempt is not None:
        return facts.attempt.reason.value, _failure(facts.attempt)
    if phase is Phase.PENDING and facts.block is not None:
        return facts.block.why.value, facts.block.message
    if phase is Phase.PENDING and facts.damaged:
        return Reason.DIGEST_MISMATCH.value, "it was found damaged and is off offer"
    if facts.foreign is not None and facts.wanted:
        return "", _compared(facts.foreign)
    return "", ""


def _failure(attempt: Attempt) -> str:
    """With what to do, and when it is tried again."""
    when = rfc3339(attempt.retry_at)
    then = f"next try at {when}" if when else "not tried again until the request changes"
    return f"{attempt.message} ({RULES[attempt.reason].advice}; {then})"


def _why_adopting(facts: Facts) -> tuple[str, str]:
    left = "left by another agent, and its sizes are right"
    if facts.staged:
        return "", f"{left}; it is proven, and taken over when no pod uses it"
    if facts.block is not None and facts.block.why is not Blocked.BACKING_OFF:
        return facts.block.why.value, f"{left}; {facts.block.message}"
    if facts.attempt is not None and facts.job is None:
        return facts.attempt.reason.value, f"{left}; cannot be proven: {facts.attempt.message}"
    return "", f"{left}; its bytes are being proven"


def _compared(foreign: Foreign) -> str:
    if foreign.lacking is None:
        return "another agent left a directory in its place; it is to be compared with the source"
    names = sorted(foreign.lacking)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"another agent left a directory in its place, where {', '.join(names[:3])}{more} are not"
        " what the source has; they are fetched beside it"
    )


def _kserve(phase: Phase, attempt: Attempt | None) -> str:
    """Downloading while a retry by itself may succeed: Error flaps in KServe's controller."""
    if phase is Phase.FAILED and attempt is not None:
        if attempt.reason is Reason.FOREIGN_DIRECTORY:
            # There may well be a model, and it is not ours to speak for until it is adopted.
            return KSERVE_STATUS[Phase.PENDING]
        return "ModelDownloading" if RULES[attempt.reason].heals else KSERVE_STATUS[phase]
    return KSERVE_STATUS[phase]
