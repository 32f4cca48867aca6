"""Why something failed, as one closed vocabulary.

    AgentError(reason, message)      the only exception that crosses a module of ours
        reason: Reason               what happened; says nothing about where
        RULES[reason]: Rule          what to do about it: when to try again, what a human can do

A `Reason` is the error type, the status reason, the Event reason, the metric label and the log
field (design D10). Foreign exceptions are mapped to it once, by the edge that met them, with
`raise ... from`. Nobody reads exception text to decide anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf


class Reason(StrEnum):
    """What went wrong. The values are public: they appear in status, Events, metrics and logs."""

    # The world is expected to change by itself.
    RATE_LIMITED = "RateLimited"
    NETWORK = "NetworkError"
    STALLED = "Stalled"
    SERVER_ERROR = "ServerError"
    LINK_EXPIRED = "LinkExpired"
    SOURCE_CHANGED = "SourceChanged"
    DISK_FULL = "DiskFull"
    INSUFFICIENT_CAPACITY = "InsufficientCapacity"
    STOPPED = "Stopped"
    API_SERVER = "ApiServerError"
    OTHER_AGENT = "OtherAgent"
    # Wrong bytes: tried again, and reported if they stay wrong.
    SIZE_MISMATCH = "SizeMismatch"
    DIGEST_MISMATCH = "DigestMismatch"
    # Somebody must act, far away from this node; we keep looking, slowly.
    UNAUTHORIZED = "Unauthorized"
    GATED = "Gated"
    REPOSITORY_NOT_FOUND = "RepositoryNotFound"
    REVISION_NOT_FOUND = "RevisionNotFound"
    FILE_NOT_FOUND = "FileNotFound"
    EMPTY_LISTING = "EmptyListing"
    UNSAFE_PATH = "UnsafePath"
    SOURCE_UNREADABLE = "SourceUnreadable"
    FINGERPRINT_MISMATCH = "FingerprintMismatch"
    BAD_RESPONSE = "BadResponse"
    BAD_ARCHIVE = "BadArchive"
    # Somebody must act on this node.
    READ_ONLY = "ReadOnly"
    PERMISSION_DENIED = "PermissionDenied"
    DISK_ERROR = "DiskError"
    FOREIGN_DIRECTORY = "ForeignDirectory"
    DISK_MISSING = "DiskMissing"
    LOCKED = "Locked"
    # Somebody must act on the cluster.
    FORBIDDEN = "Forbidden"
    PATH_MISMATCH = "PathMismatch"
    CLAIM_FAILED = "ClaimFailed"
    CERTIFICATE_FAILED = "CertificateFailed"
    # Only another request can help.
    INVALID_SPEC = "InvalidSpec"
    UNSUPPORTED = "Unsupported"
    CONFLICT = "Conflict"
    KEPT = "Kept"
    UNSAFE_FILES = "UnsafeFiles"
    # A bug of ours.
    INTERNAL = "InternalError"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When a failed model is tried again, and what a human can do meanwhile.

    `first_seconds` doubles with every failure in a row up to `cap_seconds`; `inf` means never by
    itself: a changed request or a restart is needed. Before that, `tries` of the one file are made
    inside the running download, where the bytes that arrived already are kept. `heals`: the world
    is expected to change by itself, so it is not yet a failure to whoever waits.
    """

    first_seconds: float
    cap_seconds: float
    advice: str
    tries: int = 1
    heals: bool = False


_SOON = 5.0
_MINUTE = 60.0
_SLOW = 600.0

RULES: Mapping[Reason, Rule] = {
    Reason.RATE_LIMITED: Rule(
        heals=True,
        first_seconds=30.0,
        cap_seconds=_SLOW,
        tries=5,
        advice="nothing to do; a token (HF_TOKEN) raises the hub's limit",
    ),
    Reason.NETWORK: Rule(
        heals=True,
        first_seconds=_SOON,
        cap_seconds=300.0,
        tries=5,
        advice="check that the endpoint, DNS and the proxy settings are reachable from this node",
    ),
    Reason.STALLED: Rule(
        heals=True,
        first_seconds=_SOON,
        cap_seconds=300.0,
        tries=5,
        advice="the source stopped sending; check the path to it (proxy, firewall, MTU)",
    ),
    Reason.SERVER_ERROR: Rule(
        heals=True,
        first_seconds=_SOON,
        cap_seconds=300.0,
        tries=5,
        advice="the source is failing; it is tried again by itself",
    ),
    Reason.LINK_EXPIRED: Rule(
        heals=True,
        first_seconds=_SOON,
        cap_seconds=300.0,
        advice="a signed link was refused twice; check this node's clock",
    ),
    Reason.SOURCE_CHANGED: Rule(
        heals=True,
        first_seconds=_SOON,
        cap_seconds=300.0,
        advice="the source changed while it was read; it is listed again by itself",
    ),
    Reason.STOPPED: Rule(
        first_seconds=_SOON,
        cap_seconds=300.0,
        heals=True,
        advice="ask again when the agent runs; what arrived is kept",
    ),
    Reason.API_SERVER: Rule(
        first_seconds=0.5,
        cap_seconds=30.0,
        heals=True,
        advice="downloads and pods go on meanwhile; check that the API server is reachable",
    ),
    Reason.OTHER_AGENT: Rule(
        first_seconds=_SOON,
        cap_seconds=_SOON,
        heals=True,
        advice="take the other one off this node; this agent takes over by itself",
    ),
    Reason.DISK_FULL: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="free space on the cache's file system; what was downloaded is kept and resumed",
    ),
    Reason.INSUFFICIENT_CAPACITY: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="free space, ask for fewer models, or give the cache a larger disk",
    ),
    Reason.SIZE_MISMATCH: Rule(
        first_seconds=_MINUTE,
        cap_seconds=3600.0,
        tries=2,
        advice="the source's listing and its file disagree; look for a caching proxy in between",
    ),
    Reason.DIGEST_MISMATCH: Rule(
        first_seconds=_MINUTE,
        cap_seconds=3600.0,
        tries=2,
        advice="the source sends wrong bytes; look for a caching proxy or a broken mirror",
    ),
    Reason.UNAUTHORIZED: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="give credentials that may read it: a token (HF_TOKEN), or the keys of its store",
    ),
    Reason.GATED: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="accept the model's terms on its page, as the account of the token (HF_TOKEN)",
    ),
    Reason.REPOSITORY_NOT_FOUND: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="check its name; a private one needs credentials (HF_TOKEN, or a store's keys)",
    ),
    Reason.REVISION_NOT_FOUND: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="check the branch, tag or commit after the colon",
    ),
    Reason.FILE_NOT_FOUND: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="check the path; for a file that the listing names, try again later",
    ),
    Reason.EMPTY_LISTING: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="the source holds no file, or the include and exclude patterns leave none",
    ),
    Reason.UNSAFE_PATH: Rule(
        first_seconds=3600.0,
        cap_seconds=3600.0,
        advice="the source names a file that cannot be stored safely; exclude it or fix the source",
    ),
    Reason.SOURCE_UNREADABLE: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="let the agent's user read the source, and look at the disk or mount it is on",
    ),
    Reason.FINGERPRINT_MISMATCH: Rule(
        first_seconds=3600.0,
        cap_seconds=3600.0,
        advice="the source is not what was expected; check the revision and the fingerprint",
    ),
    Reason.BAD_RESPONSE: Rule(
        first_seconds=_MINUTE,
        cap_seconds=3600.0,
        advice="the source breaks HTTP's rules; look for a proxy or a gateway in between",
    ),
    Reason.BAD_ARCHIVE: Rule(
        first_seconds=_SLOW,
        cap_seconds=3600.0,
        advice="pack the model again: plain files in a .tar, .tar.gz or .zip; or publish them as"
        " they are",
    ),
    Reason.READ_ONLY: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="mount the cache's directory read-write, or point --root elsewhere",
    ),
    Reason.PERMISSION_DENIED: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="make the cache's directory and all below it belong to the agent's user",
    ),
    Reason.DISK_ERROR: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="look at the kernel log: the disk or its file system reports errors",
    ),
    Reason.FOREIGN_DIRECTORY: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="give it to the agent by `localmodel prepare --adopt`, as root; or move it away",
    ),
    Reason.DISK_MISSING: Rule(
        first_seconds=_SOON,
        cap_seconds=_SOON,
        advice="mount the cache's disk; to begin anew on this one, remove <state>/volume",
    ),
    Reason.FORBIDDEN: Rule(
        first_seconds=_SOON,
        cap_seconds=_MINUTE,
        advice="apply the agent's RBAC again (kubectl apply -k daemonset/overlays/kserve)",
    ),
    Reason.PATH_MISMATCH: Rule(
        first_seconds=_SOON,
        cap_seconds=_MINUTE,
        advice="make the node group's volume and the DaemonSet's hostPath the same directory",
    ),
    Reason.CLAIM_FAILED: Rule(
        first_seconds=2.0,
        cap_seconds=300.0,
        advice="correct the node group's volume and claim specs; pods download meanwhile",
    ),
    Reason.CERTIFICATE_FAILED: Rule(
        first_seconds=2.0,
        cap_seconds=60.0,
        advice="apply the controller's manifests again; pods download meanwhile",
    ),
    Reason.LOCKED: Rule(
        first_seconds=inf,
        cap_seconds=inf,
        advice="stop the other agent, or use its --state directory to talk to it",
    ),
    Reason.INVALID_SPEC: Rule(
        first_seconds=inf, cap_seconds=inf, advice="correct the object or the command line"
    ),
    Reason.UNSUPPORTED: Rule(
        first_seconds=inf, cap_seconds=inf, advice="use one of the supported kinds of source"
    ),
    Reason.CONFLICT: Rule(
        first_seconds=inf, cap_seconds=inf, advice="make the requests for this URI agree"
    ),
    Reason.KEPT: Rule(
        first_seconds=inf, cap_seconds=inf, advice="see localmodel why for what keeps it"
    ),
    Reason.UNSAFE_FILES: Rule(
        first_seconds=inf,
        cap_seconds=inf,
        advice="exclude these files, publish safetensors, or set the file policy to warn",
    ),
    Reason.INTERNAL: Rule(
        first_seconds=_MINUTE,
        cap_seconds=_SLOW,
        advice="this is a bug; please report it with the log",
    ),
}


class AgentError(Exception):
    """Something failed for a known reason.

    `message` says what, in one line, with names and numbers and never a secret.
    `retry_after_seconds` is what the other side asked for, where it did (HTTP `Retry-After`).
    """

    def __init__(
        self, reason: Reason, message: str, *, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds

    def __repr__(self) -> str:
        return f"<AgentError {self.reason}: {self.message}>"

    def __str__(self) -> str:
        return self.message
