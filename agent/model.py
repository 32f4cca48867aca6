"""The nouns. Values only: frozen, comparable, without behaviour beyond what they imply."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NewType

from agent.errors import Reason

CacheKey = NewType("CacheKey", str)
"""First 16 hex digits of the SHA-256 of a source URI, taken verbatim (KServe >= 0.18)."""


def cache_key(uri: str) -> CacheKey:
    """The name of a model's directory. No normalisation: `s3://foo` and `s3://foo/` differ."""
    return CacheKey(hashlib.sha256(uri.encode()).hexdigest()[:16])


def rest_of(uri: str, model: str) -> str | None:
    """What of a model a URI names, "" for the whole; None if it names something else."""
    asked, whole = uri.removesuffix("/"), model.removesuffix("/")
    if asked == whole:
        return ""
    rest = asked.removeprefix(f"{whole}/")
    return None if rest == asked else rest


def claim_name(group: str) -> str:
    """The claim on the caches of a node group, in each namespace that has one."""
    return f"localmodel-{group}"


def quantity(size: int) -> str:
    """Bytes as people read them, and as a Kubernetes quantity: 0, 512Mi, 1.4Ti."""
    power = max(0, min((size.bit_length() - 1) // 10, 5)) if size > 0 else 0
    value = size / 1024**power
    text = f"{value:.1f}".rstrip("0").rstrip(".") if value < 100 else f"{value:.0f}"
    return text + ("", "Ki", "Mi", "Gi", "Ti", "Pi")[power]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """What was asked for. The patterns are not part of the key (design D2)."""

    uri: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def key(self) -> CacheKey:
        return cache_key(self.uri)


class FilePolicy(StrEnum):
    """What is done about files that run code when they are loaded, or that cannot be loaded."""

    OFF = "off"
    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A model that should be here, and the names of those who asked (several may share a key).

    `on_demand`: fetched when somebody asks for it on this node, and a victim like any other later;
    it goes `ttl_seconds` after its last use at the latest. `retain_seconds` is how long it is kept
    after it left the desired state, where that is said. `floor` is what its cache says of its size,
    in bytes, shown until its listing is known. `groups` are the node groups that ask for it.
    Any new value of `refresh` asks the source again what the model is today (design D13). `access`
    is what the cache says of its credentials, as JSON: names, never a secret; "" where it cannot.
    `file_policy` is what its node groups say of that; None: what the agent says.
    """

    ref: ModelRef
    names: frozenset[str] = frozenset()
    priority: int = 0
    expect_fingerprint: str | None = None
    on_demand: bool = False
    pinned: bool = False
    ttl_seconds: float | None = None
    retain_seconds: float | None = None
    floor: int = 0
    groups: frozenset[str] = frozenset()
    refresh: str = ""
    access: str = ""
    file_policy: FilePolicy | None = None

    @property
    def key(self) -> CacheKey:
        return self.ref.key


Algorithm = Literal["sha256", "git-sha1", "md5", "crc64nvme", "crc32c", "crc32"]

HEX_DIGITS: Mapping[Algorithm, int] = {
    "sha256": 64,
    "git-sha1": 40,
    "md5": 32,
    "crc64nvme": 16,
    "crc32c": 8,
    "crc32": 8,
}


@dataclass(frozen=True, slots=True)
class Digest:
    """A promise about a file's bytes. `git-sha1` is the object name of the bytes as a git blob."""

    algorithm: Algorithm
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a listing.

    `path` is where it goes, relative to the model's directory; `origin` is its name at the source.
    `version` is the source's own token for exactly these bytes, where the URL does not pin them.
    """

    path: str
    size: int
    origin: str
    digest: Digest | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The pinned answer to "what is it today": one revision, every file, sorted by path.

    `archive` is the file at the source that holds them all, where that is how they come. What is in
    it nobody knows before it is here: until then there are no `files`.
    """

    ref: ModelRef
    revision: str
    files: tuple[RemoteFile, ...]
    archive: RemoteFile | None = None

    @property
    def key(self) -> CacheKey:
        return self.ref.key

    @property
    def bytes(self) -> int:
        """The room that it takes until it is sealed. An archive lies beside what is in it, and is
        taken to hold as much as it is long while nobody has looked."""
        size = sum(file.size for file in self.files)
        if self.archive is None:
            return size
        return self.archive.size + (size if self.files else self.archive.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLocator:
    """GET this URL with these headers; ranges allowed. Headers go to this origin only, but for
    `If-Match`, which goes wherever the bytes come from.

    `fresh_until`, of time.monotonic, is for a URL that carries a signature: a refusal after it may
    be the signature's age, and a new one may cure it; before it, the refusal means what it says.
    `verify` is as in boto3: False for any certificate, or the path of the only authorities.
    """

    url: str = field(repr=False)  # may carry a signature
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    fresh_until: float | None = None
    verify: bool | str = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PathLocator:
    """Read this file, as long as it still has this version."""

    path: str
    version: str | None = None


Locator = HttpLocator | PathLocator


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A sealed model: complete, proven and on offer. Immutable by construction.

    `shared` are those of its files that have more than one name: inode and size. `warning` is what
    its users should know of its files; "" for nothing.
    """

    ref: ModelRef
    revision: str
    fingerprint: str
    bytes: int
    files: int
    sealed_at: float
    last_used: float
    warning: str = ""
    shared: frozenset[tuple[int, int]] = frozenset()

    @property
    def key(self) -> CacheKey:
        return self.ref.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingest:
    """A model that was begun and is not sealed: its listing is pinned on disk.

    `shared` are those of its files that have more than one name: inode and size.
    """

    ref: ModelRef
    revision: str
    total: int
    done: int
    shared: frozenset[tuple[int, int]] = frozenset()

    @property
    def remaining(self) -> int:
        return max(0, self.total - self.done)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A directory in the place of a wanted model that this agent never made: KServe's, say.

    `bytes` are those of its files, `shared` those that have more than one name: inode and size.
    `lacking` are the files of the pinned listing that are not there in their sizes, or are known to
    be wrong; None while nobody can tell. `obstacle` says why it cannot be taken over, if so.
    """

    bytes: int = 0
    shared: frozenset[tuple[int, int]] = frozenset()
    lacking: frozenset[str] | None = None
    obstacle: str = ""

    @property
    def whole(self) -> bool:
        """Whether its sizes are those of the listing: good enough to go on being served."""
        return self.may_be_whole and self.lacking is not None

    @property
    def may_be_whole(self) -> bool:
        """The same, or nobody can tell yet."""
        return not self.lacking


class Stage(StrEnum):
    """What a running job is doing."""

    RESOLVING = "resolving"
    FETCHING = "fetching"
    VERIFYING = "verifying"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work in progress for one key.

    `done` counts what is proven or arrived in this job, so `remaining` holds also what an earlier
    job left and this one has still to hash. None while the listing is not known.
    """

    key: CacheKey
    stage: Stage
    total: int | None = None
    done: int = 0

    @property
    def remaining(self) -> int | None:
        return None if self.total is None else max(0, self.total - self.done)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The failures in a row of one key. `retry_at` is Unix seconds; infinite: never by itself."""

    key: CacheKey
    count: int
    reason: Reason
    message: str
    retry_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """That the desired state of `owner` has asked for a key, and when it stopped to, Unix seconds.

    `retain_seconds` is what its cache said of keeping it from then on, if anything.
    """

    owner: str
    retain_seconds: float | None = None
    left_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """Something that happened to a model, for who asks why. Times are Unix seconds.

    `what` is `Sealed`, `Evicted`, `Damaged` or `WantedAgain`; `why` a reason where there is one;
    `age_seconds` how long it had been here, `idle_seconds` how long nobody had used it.
    """

    at: float
    key: CacheKey
    uri: str
    what: str
    why: str = ""
    bytes: int = 0
    age_seconds: float | None = None
    idle_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Actual:
    """What is there. `in_use` is None when it could not be established: then nothing is evicted.

    `left` are keys that the desired state asked for once and does not any more, and until when
    each is kept all the same, Unix seconds; `kept` are no victims though nothing wants them now,
    because nobody said that they may go; `begun` holds every ingest, also those whose listing is
    not to be used again. `demanded` are keys that somebody waits for here and now; `pinned` those
    that an operator keeps, `outcast` those that an operator
    wants to be gone; `waiting` says since when a want has been short of room.
    `outdated` are sealed models that another revision, or other files, should take the place of;
    `staged` those of which that other one is here and proven. `foreign` are the places of wanted
    models that somebody else's directories have.
    """

    entries: Mapping[CacheKey, Entry]
    damaged: frozenset[CacheKey] = frozenset()
    ingests: Mapping[CacheKey, Ingest] = field(default_factory=dict)
    jobs: Mapping[CacheKey, Job] = field(default_factory=dict)
    attempts: Mapping[CacheKey, Attempt] = field(default_factory=dict)
    in_use: frozenset[CacheKey] | None = None
    left: Mapping[CacheKey, float] = field(default_factory=dict)
    kept: frozenset[CacheKey] = frozenset()
    begun: frozenset[CacheKey] = frozenset()
    demanded: frozenset[CacheKey] = frozenset()
    pinned: frozenset[CacheKey] = frozenset()
    outcast: frozenset[CacheKey] = frozenset()
    outdated: frozenset[CacheKey] = frozenset()
    staged: frozenset[CacheKey] = frozenset()
    foreign: Mapping[CacheKey, Foreign] = field(default_factory=dict)
    waiting: Mapping[CacheKey, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Bytes of one file system. `free` is what an unprivileged process may still write."""

    capacity: int
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Counters of one block device since boot; seconds are those the device was busy reading."""

    read_bytes: int
    written_bytes: int
    read_seconds: float
    write_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Numbers and policy of one volume. All sizes in bytes.

    `reclaiming` is what was retired and is not unlinked yet. `high` and `low` are fractions of
    `capacity`: above `high` nothing is begun that needs room, and victims are looked for, down to
    `low`. `limit` is what our own bytes may take, whatever else the disk holds; `group_limits` are
    the same for the models that a node group asks for.
    """

    capacity: int
    free: int
    reclaiming: int = 0
    high: float = 0.95
    low: float = 0.90
    max_fetches: int = 2
    min_age_seconds: float = 600.0
    limit: int | None = None
    group_limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return self.capacity - self.free


@dataclass(frozen=True, slots=True)
class Resolve:
    """Ask the source what the model is today, and pin the answer."""

    key: CacheKey


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring what is missing; `bytes` are reserved from now on."""

    key: CacheKey
    bytes: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a job that nobody wants any more; what it wrote is kept for a resume."""

    key: CacheKey


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take a damaged model off offer, back to where it can be mended."""

    key: CacheKey


class Why(StrEnum):
    """Why a sealed model is evicted."""

    SPACE = "Space"  # its room is needed for another
    LEFT = "Left"  # its users took it out of the desired state
    EXPIRED = "Expired"  # its ttl has passed since its last use
    ASKED = "Asked"  # an operator said so


@dataclass(frozen=True, slots=True)
class Evict:
    """Retire a sealed model. `bytes` are those that this frees: not what another model shares."""

    key: CacheKey
    bytes: int
    why: Why = Why.SPACE


@dataclass(frozen=True, slots=True)
class Abandon:
    """Give up what was begun of a model that nobody waits for; this frees so many `bytes`."""

    key: CacheKey
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Exchange:
    """Put a staged revision in the place of what nobody uses: an older one, or a directory that
    somebody else left."""

    key: CacheKey


Action = Resolve | Fetch | Cancel | Withdraw | Evict | Abandon | Exchange


class Kept(StrEnum):
    """Why a sealed model is no victim now, whatever room is needed."""

    WANTED = "Wanted"
    DEMANDED = "Demanded"
    IN_USE = "InUse"
    UNKNOWN_USE = "UnknownUse"
    PINNED = "Pinned"
    YOUNG = "Young"
    DAMAGED = "Damaged"
    BUSY = "Busy"
    UNCONFIRMED = "Unconfirmed"


class Blocked(StrEnum):
    """Why a wanted model is not being worked on right now."""

    QUEUED = "Queued"
    BACKING_OFF = "BackingOff"
    INSUFFICIENT_CAPACITY = "InsufficientCapacity"
    LARGER_THAN_VOLUME = "LargerThanVolume"
    FOREIGN_DIRECTORY = "ForeignDirectory"  # as the reason: only a human can clear it


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block with its numbers, as the operator reads it."""

    why: Blocked
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now, what cannot be done and why, and when to look again at the latest."""

    actions: tuple[Action, ...] = ()
    blocked: Mapping[CacheKey, Block] = field(default_factory=dict)
    wake_at: float | None = None
