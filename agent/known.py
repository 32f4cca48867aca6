"""What is known of a volume, in memory: the facts of the last look, and what follows from them.

Everything here can be rebuilt from the disk. Only `reconcile` and its parts change it; nothing here
waits, reads a disk or asks a clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

from agent.errors import AgentError, Reason
from agent.manifest import Manifest
from agent.model import (
    Asked,
    Attempt,
    Block,
    Blocked,
    CacheKey,
    Entry,
    Foreign,
    Ingest,
    Job,
    ModelRef,
    Want,
)
from agent.status import NO_ROOM, Facts
from agent.wishes import Desired

_NOT_TO_BE_PUBLISHED = frozenset({Reason.FINGERPRINT_MISMATCH, Reason.UNSAFE_FILES})


@dataclass(slots=True)
class Known:
    """The facts, as of the last look."""

    desired: Desired = field(default_factory=lambda: Desired(wants={}, names={}))
    mending: dict[CacheKey, Want] = field(default_factory=dict)
    """Models that are brought back to their seal, whoever asks for them now."""
    sealed: dict[CacheKey, Manifest] = field(default_factory=dict)
    last_used: dict[CacheKey, float] = field(default_factory=dict)
    damaged: dict[CacheKey, list[str]] = field(default_factory=dict)
    """Models on offer that must not be, with the paths that are known to be wrong, if any are."""
    withdrawn: dict[CacheKey, tuple[Manifest, list[str]]] = field(default_factory=dict)
    """Models that were damaged and are not whole again: what was sealed, and what was wrong."""
    ingests: dict[CacheKey, Ingest] = field(default_factory=dict)
    attempts: dict[CacheKey, Attempt] = field(default_factory=dict)
    blocked: Mapping[CacheKey, Block] = field(default_factory=dict)
    started: dict[CacheKey, float] = field(default_factory=dict)
    asked_for: dict[CacheKey, Asked] = field(default_factory=dict)
    """Keys that the desired state has asked for, in this life or an earlier one."""
    shared: dict[CacheKey, frozenset[tuple[int, int]]] = field(default_factory=dict)
    """The files of sealed models that have more than one name: inode and size."""
    pinned: frozenset[CacheKey] = frozenset()
    refreshed: dict[CacheKey, str] = field(default_factory=dict)
    """Because of which value of the annotation the source was asked last."""
    listed: dict[CacheKey, str] = field(default_factory=dict)
    """The same of the listing that is being fetched."""
    staged: dict[CacheKey, Manifest] = field(default_factory=dict)
    """Proven and not sealed yet: what is to take the place of a sealed model, or of `foreign`."""
    foreign: Mapping[CacheKey, Foreign] = field(default_factory=dict)
    """Places of wanted models that somebody else's directories have."""
    waiting: dict[CacheKey, float] = field(default_factory=dict)
    """Since when a want has been short of room, Unix seconds."""

    def entry(self, key: CacheKey) -> Entry | None:
        found = self.sealed.get(key)
        if found is None:
            return None
        entry = found.entry(last_used=self.last_used.get(key, 0.0))
        return replace(entry, shared=self.shared.get(key, frozenset()))

    def entries(self) -> dict[CacheKey, Entry]:
        return {key: entry for key in self.sealed if (entry := self.entry(key)) is not None}

    def whole(self, key: CacheKey) -> Entry | None:
        """The entry of a model that is on offer and not known to be damaged."""
        return None if key in self.damaged else self.entry(key)

    def seal(self, key: CacheKey, sealed: Manifest, now: float) -> None:
        """A model is on offer, proven a moment ago: its failures and its damage are over."""
        self.sealed[key], self.last_used[key] = sealed, now
        for over in (
            *(self.damaged, self.withdrawn, self.mending, self.attempts, self.started),
            self.staged,
        ):
            over.pop(key, None)

    def withdraw(self, key: CacheKey) -> None:
        """A damaged model is off offer. It is to be whole again, and the same as before, whether or
        not anybody asks for it now."""
        found = self.sealed.pop(key)
        self.staged.pop(key, None)
        self.withdrawn[key] = found, self.damaged.pop(key)
        self.mending[key] = Want(ref=found.ref, expect_fingerprint=found.fingerprint)

    def outdated(self, wants: Mapping[CacheKey, Want]) -> frozenset[CacheKey]:
        """Sealed models that the desired state wants otherwise, or wants to be asked for again.

        `wants` are those that are decided on now: the desired state may have changed since.
        """
        return frozenset(
            key
            for key, want in self.desired.wants.items()
            if key in self.sealed
            and wants.get(key) == want
            and (
                want.ref != self.sealed[key].ref
                or want.refresh not in ("", self.refreshed.get(key))
            )
        )

    def overtaken(self, wants: Mapping[CacheKey, Want]) -> list[CacheKey]:
        """Staged models that are not, or not any more, what is wanted in the place of another."""
        outdated = self.outdated(wants)
        return [
            key
            for key, staged in self.staged.items()
            if key not in wants
            or (key in self.sealed and key not in outdated)
            or staged.ref != wants[key].ref
            or wants[key].expect_fingerprint not in (None, staged.fingerprint)
        ]

    def needless(self, wants: Mapping[CacheKey, Want]) -> list[CacheKey]:
        """Sealed models beside which something was begun that nobody wants any more."""
        return sorted(self.ingests.keys() & self.sealed.keys() - self.outdated(wants))

    def replace_what_is_left(self, want: Want) -> None:
        """An ingest of other patterns, that nobody asks for now, gives way to one who asks."""
        left = self.mending.get(want.key)
        if left is not None and left.ref != want.ref and want.key not in self.withdrawn:
            del self.mending[want.key]

    def mend_what_is_complete(self, attempts: Mapping[CacheKey, Attempt]) -> None:
        """Every byte was here when we were killed: prove them and seal, whoever asked.

        Unless whoever asked said that these are not the bytes to publish, as the `attempts` of the
        earlier life tell; or another's directory has its place, which only a wish takes away.
        """
        refused = {key for key, failed in attempts.items() if failed.reason in _NOT_TO_BE_PUBLISHED}
        for key, ingest in self.ingests.items():
            if ingest.remaining == 0 and key not in self.foreign and key not in refused:
                self.mending[key] = Want(ref=ingest.ref)

    def note_the_asked(self, now: float) -> dict[CacheKey, Asked | None]:
        """Bring `asked_for` up to date with the desired state; the changes, None: forgotten.

        What is not asked for any more has left at this moment, if it is sure that it has.
        """
        desired, changes = self.desired, dict[CacheKey, Asked | None]()
        for key, want in desired.wants.items():
            asked = Asked(owner=desired.owner or "", retain_seconds=want.retain_seconds)
            if self.asked_for.get(key) != asked:
                changes[key] = asked
        present = self.sealed.keys() | self.ingests.keys()
        for key, before in self.asked_for.items():
            if key in desired.wants:
                continue
            if key not in present:
                changes[key] = None
            elif before.left_at is None and self.has_left(key):
                changes[key] = replace(before, left_at=now)
        for key, asked_now in changes.items():
            if asked_now is None:
                del self.asked_for[key]
            else:
                self.asked_for[key] = asked_now
        return changes

    def has_left(self, key: CacheKey) -> bool:
        """Whether the desired state that asked for it once does not any more, for sure."""
        desired, asked = self.desired, self.asked_for.get(key)
        return (
            asked is not None
            and desired.complete
            and asked.owner == desired.owner
            and key not in desired.wants
            and key not in desired.spoken_for
        )

    def left(self, retain_seconds: float) -> dict[CacheKey, float]:
        """What left, and until when each is kept, Unix seconds."""
        return {
            key: asked.left_at
            + (retain_seconds if asked.retain_seconds is None else asked.retain_seconds)
            for key, asked in self.asked_for.items()
            if asked.left_at is not None and self.has_left(key)
        }

    def facts(
        self, wants: Mapping[CacheKey, Want], jobs: Mapping[CacheKey, tuple[ModelRef, Job]]
    ) -> dict[CacheKey, Facts]:
        """All there is to say of every key, in the order of keys."""
        keys = sorted({*wants, *self.sealed, *self.ingests, *jobs})
        return {key: self._facts_of(key, wants.get(key), jobs.get(key)) for key in keys}

    def _facts_of(
        self, key: CacheKey, want: Want | None, job: tuple[ModelRef, Job] | None
    ) -> Facts:
        entry, ingest, attempt = self.entry(key), self.ingests.get(key), self.attempts.get(key)
        refs = [known.ref for known in (want, entry, ingest) if known is not None]
        desired = self.desired.wants.get(key)
        if desired is not None and entry is not None and desired.ref != entry.ref:
            entry = None  # other files are wanted now, and on their way to its place
        if want and entry and (error := objection(want, entry)):
            # It is here, but it is not what is wanted: to these users it is not ready.
            entry, attempt = None, _never(key, error)
        return Facts(
            key=key,
            ref=refs[0] if refs or job is None else job[0],
            wanted=want is not None,
            entry=entry,
            damaged=key in self.damaged,
            ingest=ingest,
            job=job[1] if job else None,
            attempt=attempt,
            block=self.blocked.get(key),
            started_at=self.started.get(key),
            floor=want.floor if want is not None else 0,
            staged=key in self.staged,
            foreign=self.foreign.get(key),
            names=want.names if want is not None else frozenset(),
            groups=want.groups if want is not None else frozenset(),
        )

    def refusal(self, key: CacheKey) -> AgentError | None:
        """Why a model does not come by itself now; None while it only waits its turn."""
        attempt, block = self.attempts.get(key), self.blocked.get(key)
        if attempt is not None:
            return AgentError(attempt.reason, attempt.message)
        if block is not None and block.why is Blocked.FOREIGN_DIRECTORY:
            return AgentError(Reason.FOREIGN_DIRECTORY, block.message)
        if key in self.staged and key in self.foreign:
            return AgentError(
                Reason.KEPT,
                f"{self.staged[key].ref.uri} is here and proven, and takes the place of what"
                " another agent left there when nobody uses that",
            )
        if block is not None and block.why in NO_ROOM:
            return AgentError(Reason.INSUFFICIENT_CAPACITY, block.message)
        return None


def objection(want: Want, entry: Entry) -> AgentError | None:
    """Why a sealed model is not what a want asks for, though it has its key."""
    if entry.ref != want.ref:
        return AgentError(
            Reason.CONFLICT,
            f"{entry.ref.uri} is on offer with {patterns(entry.ref)}, and wanted with"
            f" {patterns(want.ref)}; name the revision in the URI to have both",
        )
    if want.expect_fingerprint not in (None, entry.fingerprint):
        return AgentError(
            Reason.FINGERPRINT_MISMATCH,
            f"{entry.ref.uri} at {entry.revision} is {entry.fingerprint}, not"
            f" {want.expect_fingerprint}",
        )
    return None


def agree(want: Want, other: Want) -> None:
    """Raise Conflict for two wants of one key with different patterns or fingerprints (design D2).

    A want without a fingerprint takes what the other one proves; the reverse is checked when it
    is there.
    """
    if None not in (want.expect_fingerprint, other.expect_fingerprint) and (
        want.expect_fingerprint != other.expect_fingerprint
    ):
        raise AgentError(
            Reason.CONFLICT,
            f"{want.ref.uri} is already wanted with the fingerprint {other.expect_fingerprint}",
        )
    if other.ref != want.ref:
        raise AgentError(
            Reason.CONFLICT,
            f"{want.ref.uri} is already wanted with {patterns(other.ref)}; use the same"
            f" patterns, or name the revision in the URI to have both",
        )


def patterns(ref: ModelRef) -> str:
    """The patterns of a request, for a message."""
    if not ref.include and not ref.exclude:
        return "no patterns"
    include, exclude = ",".join(ref.include), ",".join(ref.exclude)
    return f"include {include or '*'} and exclude {exclude or 'nothing'}"


def _never(key: CacheKey, error: AgentError) -> Attempt:
    return Attempt(key=key, count=1, reason=error.reason, message=error.message, retry_at=inf)
