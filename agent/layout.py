"""Every path and name the cache uses on disk (design D2), and which names it refuses.

Names from a hub are hostile input. `check_paths` is the one gate they pass, before the first byte:
what it lets through can be joined to a directory of ours and written into a manifest line without
quoting.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Literal

from agent.errors import AgentError, Reason
from agent.model import CacheKey

MODELS = "models"
HIDDEN = ".localmodel"
MANIFESTS = f"{HIDDEN}/manifests"
PROGRESS = f"{HIDDEN}/progress"
PINS = f"{HIDDEN}/pins"
INGEST = f"{HIDDEN}/ingest"
TRASH = f"{HIDDEN}/trash"
LOCK = f"{HIDDEN}/lock"
VOLUME = f"{HIDDEN}/volume"  # who this volume is
STATE = f"{HIDDEN}/state"  # the embedded default; a DaemonSet keeps its state on the node instead

# Inside ingest/<key>/. A name under `tree` has been proven and fsynced; `partial` has not.
LISTING = "listing.json"
TREE = "tree"
PARTIAL = "partial"
REPLACED = "replaced"  # what somebody else had left in the model's place, until ours is on offer
ARCHIVE = "archive"  # what the files of `tree` are unpacked from

# Inside the state directory.
INDEX = "index.sqlite3"
SOCKET = "agent.sock"
STATUS = "status"
AUTHORITIES = "authorities"  # what TLS trusts for single models
KNOWN_VOLUME = "volume"  # which volume this machine had last

DIRECTORY_MODE = 0o755
FILE_MODE = 0o444
PRIVATE_MODE = 0o700
NOTE_MODE = 0o644  # manifests and progress lines

ArchiveKind = Literal["tar", "zip", "unsupported"]

_ARCHIVES: Mapping[str, ArchiveKind] = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".zip": "zip",
    # Their windows are as large as whoever packed them likes: memory that the agent has not got.
    **dict.fromkeys((".tar.bz2", ".tbz2", ".tar.xz", ".txz"), "unsupported"),
}

_NAME_MAX = 255  # bytes in one name, on every Linux file system that matters
_PATH_MAX = 1024  # bytes in a relative path: leaves room for the mount and kubelet's own prefix

_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def model(key: CacheKey) -> str:
    return f"{MODELS}/{key}"


def manifest(key: CacheKey) -> str:
    """Present means: the model is sealed and on offer."""
    return f"{MANIFESTS}/{key}"


def sealing(key: CacheKey) -> str:
    """The manifest on its way in: every file is proven, the directory may have been renamed."""
    return f"{MANIFESTS}/.{key}.sealing"


def retiring(key: CacheKey) -> str:
    """The manifest on its way out: off offer, the directory still in its place."""
    return f"{MANIFESTS}/.{key}.retiring"


def progress(key: CacheKey) -> str:
    return f"{PROGRESS}/{key}"


def ingest(key: CacheKey) -> str:
    return f"{INGEST}/{key}"


def is_key(name: str) -> bool:
    """Whether a directory entry can be a key of ours."""
    return len(name) == 16 and all(c in "0123456789abcdef" for c in name)


def key_in(subpath: str) -> CacheKey | None:
    """The key in `models/<key>` or anything below it: what a mount of a volume shows."""
    parts = subpath.strip("/").split("/")
    if len(parts) >= 2 and parts[0] == MODELS and is_key(parts[1]):
        return CacheKey(parts[1])
    return None


def key_of_manifest(name: str) -> tuple[CacheKey, str] | None:
    """`0123456789abcdef` -> (key, "manifest"); `.0123456789abcdef.sealing` -> (key, "sealing")."""
    if is_key(name):
        return CacheKey(name), "manifest"
    parts = name.split(".")
    if (
        len(parts) == 3
        and not parts[0]
        and is_key(parts[1])
        and parts[2] in ("sealing", "retiring")
    ):
        return CacheKey(parts[1]), parts[2]
    return None


def archive_kind(name: str) -> ArchiveKind | None:
    """How KServe's initializer would unpack a file of this name; None: it is a file as any."""
    kinds = (kind for suffix, kind in _ARCHIVES.items() if name.lower().endswith(suffix))
    return next(kinds, None)


def is_one_line(text: str) -> bool:
    """Whether a text can be a line of a manifest or a log, and be shown as what it is.

    No control character, line or paragraph separator, half of a surrogate pair, or change of
    writing direction. `str.isprintable` would refuse too much: a macOS screenshot has U+202F in its
    name, an emoji may be younger than this Python, and either would cost its whole model.
    """
    return text.isprintable() or not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _DIRECTION for c in text
    )


def unsafe(path: str) -> str | None:
    """Why this relative path must not be created, or None if it may be."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if not path:
        return "is empty"
    if path.startswith("/"):
        return "is absolute"
    if not is_one_line(path) or "\\" in path:
        # Also keeps every manifest line in the plain form of sha256sum.
        return "holds a control character or a backslash"
    if path == "-":
        return "means the standard input to sha256sum"
    if len(encoded) > _PATH_MAX:
        return f"is {len(encoded)} bytes long; at most {_PATH_MAX} are possible"
    for segment in path.split("/"):
        if segment in ("", ".", ".."):
            return f"has the segment {segment!r}"
        if len(segment.encode()) > _NAME_MAX:
            return f"has a name of {len(segment.encode())} bytes; at most {_NAME_MAX} are possible"
    return None


def check_paths(paths: Iterable[str]) -> None:
    """Raise `UnsafePath` for the first path that cannot be stored, twice the same one included.

    A file that is also a directory (`a` beside `a/b`) cannot exist on a file system, though an
    object store may hold both.
    """
    files: set[str] = set()
    directories: set[str] = set()
    for path in paths:
        why = unsafe(path)
        if why is None and path in files:
            why = "is listed twice"
        if why is not None:
            raise AgentError(Reason.UNSAFE_PATH, f"the source names {_shown(path)}, which {why}")
        files.add(path)
        parts = path.split("/")
        directories.update("/".join(parts[:n]) for n in range(1, len(parts)))
    if both := sorted(files & directories):
        raise AgentError(
            Reason.UNSAFE_PATH, f"the source names {_shown(both[0])} both as a file and a directory"
        )


def _shown(path: str) -> str:
    """A hostile name, fit for one line of a log."""
    return ascii(path) if len(path) <= 80 else f"{path[:60]!a}... ({len(path)} characters)"
