"""Facts about a model -> what its users read. Pure. KServe's words are here and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from typing import Any

from agent.errors import RULES, Reason
from agent.model import Attempt, Block, Blocked, CacheKey, Entry, Ingest, Job, ModelRef
from agent.phases import Phase, phase_of

KSERVE_STATUS: Mapping[Phase, str] = {
    Phase.PENDING: "ModelDownloadPending",
    Phase.RESOLVING: "ModelDownloading",
    Phase.FETCHING: "ModelDownloading",
    Phase.VERIFYING: "ModelDownloading",
    Phase.READY: "ModelDownloaded",
    Phase.FAILED: "ModelDownloadError",
    Phase.PARTIAL: "ModelDownloadPending",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is known of one key at one moment."""

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
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model, for people and machines. Times are RFC 3339, sizes bytes, "" is: not known."""

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
    warning: str = ""


def model_status(facts: Facts, *, path: str) -> ModelStatus | None:
    """What to say of a model; None where there is nothing to say. `path` is where it is served."""
    phase = facts.phase
    if phase is None:
        return None
    reason, message = _why(facts, phase)
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
    total, done = _progress(facts)
    retry_at = facts.attempt.retry_at if facts.attempt and phase is Phase.FAILED else None
    return ModelStatus(
        **common,
        revision=facts.ingest.revision if facts.ingest else "",
        bytes=total,
        downloaded_bytes=done,
        retry_at=rfc3339(retry_at),
    )


def progress_line(facts: Facts, counter: int) -> str | None:
    """The line that a waiting pod reads (design D2): what to do, a counter that moves, numbers.

    None once the model is on offer, or for a key nobody waits for.
    """
    phase = facts.phase
    if phase is None or phase is Phase.READY or not facts.wanted:
        return None
    total, done = _progress(facts)
    reason, _ = _why(facts, phase)
    short = facts.block is not None and facts.block.why in (
        Blocked.INSUFFICIENT_CAPACITY,
        Blocked.LARGER_THAN_VOLUME,
    )
    verb = "fallback" if phase is Phase.FAILED or short else "wait"
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


def _progress(facts: Facts) -> tuple[int, int]:
    """Total and done, in bytes; while the listing is not known, what the cache says of its size."""
    if facts.job is not None and facts.job.total is not None:
        return facts.job.total, facts.job.done
    if facts.ingest is not None:
        return facts.ingest.total, facts.ingest.done
    return facts.floor, 0


def _why(facts: Facts, phase: Phase) -> tuple[str, str]:
    if phase is Phase.READY and facts.staged:
        return "", "a newer revision is here, and takes its place when no pod uses this one"
    if phase is Phase.PENDING and facts.staged:
        return "", "it is here, and takes the place of other files when no pod uses them"
    if phase is Phase.READY and facts.attempt is not None:
        return facts.attempt.reason.value, f"cannot be refreshed: {facts.attempt.message}"
    if phase is Phase.READY and facts.entry is not None:
        return "", facts.entry.warning
    if phase is Phase.FAILED and facts.attempt is not None:
        attempt = facts.attempt
        when = rfc3339(attempt.retry_at)
        then = f"next try at {when}" if when else "not tried again until the request changes"
        advice = RULES[attempt.reason].advice
        return attempt.reason.value, f"{attempt.message} ({advice}; {then})"
    if phase is Phase.PENDING and facts.block is not None:
        return facts.block.why.value, facts.block.message
    if phase is Phase.PENDING and facts.damaged:
        return Reason.DIGEST_MISMATCH.value, "it was found damaged and is off offer"
    return "", ""


def _kserve(phase: Phase, attempt: Attempt | None) -> str:
    """Downloading while a retry by itself may succeed: Error flaps in KServe's controller."""
    if phase is Phase.FAILED and attempt is not None:
        if attempt.reason is Reason.FOREIGN_DIRECTORY:
            # There may well be a model, and it is not ours to speak for until it is adopted.
            return KSERVE_STATUS[Phase.PENDING]
        return "ModelDownloading" if RULES[attempt.reason].heals else KSERVE_STATUS[phase]
    return KSERVE_STATUS[phase]
