"""The place: this Python, the cache directory, its file system and how full that is."""

import errno
import json
import os
import platform
import re
import resource
import sqlite3
import stat
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agent import __version__, disk, layout
from agent.catalog import Catalog
from agent.doctor.check import FAIL, OK, WARN, Check, Level, Scene, holder, may_write, there, worst
from agent.errors import RULES, AgentError, Reason
from agent.model import quantity
from agent.store import DIRECTORIES
from agent.volume import Volume, on_machine_disk

_PACKAGES = ("aiohttp", "huggingface_hub", "kubernetes", "psutil", "sqlite-utils")
_DESCRIPTORS = 1024

# Kubelet's defaults, in percent of the file system.
_IMAGES_FROM, _IMAGES_TO = 85, 80

_NETWORK = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "afs")
)
_MEANS = {  # what a type of file system is to a cache
    "overlay": (
        WARN,
        "the writable layer of a container: it goes with the container",
        "mount a volume, or name another directory by --root",
    ),
    "tmpfs": (
        WARN,
        "memory: it is gone after a restart, and what it holds counts as memory",
        "name a directory on a disk by --root",
    ),
    **dict.fromkeys(
        ("vfat", "msdos", "exfat"),
        (FAIL, "it knows neither modes nor hard links", "use ext4 or XFS"),
    ),
}
_MEANS["ramfs"] = _MEANS["tmpfs"]
_OF_NETWORK = (
    WARN,
    "a network's: one agent only may keep it, a lock may not hold between machines, and a server"
    " that hangs stops everything",
    "use a local disk; never mount it read-write on two nodes",
)
_OF_FUSE = (
    WARN,
    "a program's: nobody can tell whether it renames atomically and has hard links",
    "use a local disk",
)


@dataclass(frozen=True, slots=True)
class Mount:
    """What /proc/self/mountinfo says of one path."""

    point: Path
    type: str
    read_only: bool

    @property
    def of_network(self) -> bool:
        return self.type in _NETWORK


def mounts(text: str) -> list[Mount]:
    """In their order: a later one at the same point hides the earlier."""
    found = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, of_type = before.split(), after.split()
        if separator and len(fields) >= 6 and len(of_type) >= 3:
            options = {*fields[5].split(","), *of_type[2].split(",")}
            found.append(Mount(Path(_unescaped(fields[4])), of_type[0], "ro" in options))
    return found


def _unescaped(text: str) -> str:
    """A space is `\\040` there."""
    raw = os.fsencode(text)
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), raw))


def mount_of(path: Path, text: str) -> Mount | None:
    """The mount that holds a path, or what is nearest above it."""
    real = Path(os.path.realpath(path))
    best = None
    for mount in mounts(text):
        if real.is_relative_to(mount.point) and (
            best is None or len(mount.point.parts) >= len(best.point.parts)
        ):
            best = mount
    return best


# -- this process -------------------------------------------------------------------------------


def versions(scene: Scene) -> Check:
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    said = [
        f"localmodel {__version__}",
        f"Python {platform.python_version()}",
        *found,
        f"SQLite {sqlite3.sqlite_version}",
        f"{platform.system()} {platform.release()} {platform.machine()}",
    ]
    if missing:
        advice = f"install {', '.join(missing)}"
        return Check("versions", FAIL, ", ".join(said), advice)
    return Check("versions", OK, ", ".join(said))


def descriptors(scene: Scene) -> Check:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return Check("descriptors", OK, "no limit")
    few = most < _DESCRIPTORS
    advice = f"raise it: `ulimit -n {_DESCRIPTORS}` or more before the agent" if few else ""
    return Check("descriptors", WARN if few else OK, f"{most} at once", advice)


# -- the directory ------------------------------------------------------------------------------


def cache(scene: Scene) -> Check:
    root, name = scene.root, "cache"
    try:
        found = root.stat()
    except FileNotFoundError:
        if root.is_symlink():
            return Check(
                name, FAIL, f"{root} is a symlink to nothing", "mend it, or name another by --root"
            )
        above = there(root)
        if may_write(above):
            return Check(
                name, WARN, f"{root} is not there", "right before the first pull; or --root"
            )
        advice = f"make it and give it to user {os.geteuid()}, or name another by --root"
        return Check(name, FAIL, f"{root} is not there, and {above} is not ours to write", advice)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return Check(name, FAIL, f"{root} is a symlink that leads to itself", "remove it")
        raise
    if not stat.S_ISDIR(found.st_mode):
        return Check(name, FAIL, f"{root} is no directory", "move it away, or --root")
    mode = stat.S_IMODE(found.st_mode)
    target = f" (a symlink to {os.path.realpath(root)})" if root.is_symlink() else ""
    seen = f"{root}{target}, of {found.st_uid}:{found.st_gid}, mode {mode:04o}"
    if not may_write(root):
        seen += f", not writable by this process (user {os.geteuid()})"
        if (process := holder(scene)) is not None:
            advice = f"process {process} keeps it; run the doctor as its user to see all"
            return Check(name, WARN, seen, advice)
        advice = (
            f"give it to user {os.geteuid()} (`localmodel prepare --owner` as root), or run as"
            f" user {found.st_uid}"
        )
        return Check(name, FAIL, seen, advice)
    if mode & 0o022:
        advice = f"others may write models into it: chmod {layout.DIRECTORY_MODE:o}"
        return Check(name, WARN, seen, advice)
    return Check(name, OK, f"{seen}, writable")


def directories(scene: Scene) -> Check:
    """The top directories: real ones, the cache's owner's, with their modes."""
    name, root = "directories", scene.root
    wanted = ((layout.HIDDEN, layout.DIRECTORY_MODE), *DIRECTORIES)
    present = [part for part, _ in wanted if os.path.lexists(root / part)]
    if not present:
        return Check(name, OK, "none yet: the agent makes them")
    owner = root.stat().st_uid
    problems: list[tuple[Level, str, str]] = []
    for part, mode in wanted:
        try:
            found = (root / part).lstat()
        except FileNotFoundError:
            problems.append((WARN, f"{part} is missing", "the agent makes it at its start"))
            continue
        if not stat.S_ISDIR(found.st_mode):
            advice = f"move {root / part} away: nothing is kept behind a symlink or a file"
            problems.append((FAIL, f"{part} is no directory", advice))
            continue
        if found.st_uid != owner:
            seen = f"{part} is of user {found.st_uid}, the cache of {owner}"
            # An agent that is root may all the same.
            level = WARN if owner == 0 else FAIL
            problems.append((level, seen, "`localmodel prepare` as root makes them one owner's"))
        if stat.S_IMODE(found.st_mode) != mode:
            seen = f"{part} has mode {stat.S_IMODE(found.st_mode):04o}, not {mode:04o}"
            why = "; an fsGroup of a pod does that" if found.st_mode & stat.S_ISGID else ""
            problems.append((WARN, seen, f"the agent mends it at its start{why}"))
    if not problems:
        return Check(name, OK, f"{len(wanted)}, with their owner and modes")
    return Check(name, *worst(problems))


def file_system(scene: Scene) -> Check:
    name, found = "file-system", mount_of(scene.root, scene.mounts)
    if found is None:
        return Check(
            name, WARN, "/proc/self/mountinfo does not say", "nothing, if this is no Linux"
        )
    seen = f"{found.type}, mounted at {found.point}"
    if found.read_only or os.statvfs(there(scene.root)).f_flag & os.ST_RDONLY:
        advice = "mount it read-write; after an error of the disk see `dmesg`"
        return Check(name, FAIL, f"{seen}, read-only", advice)
    if found.of_network:
        level, means, advice = _OF_NETWORK
    elif found.type == "fuse" or found.type.startswith("fuse."):
        level, means, advice = _OF_FUSE
    else:
        level, means, advice = _MEANS.get(found.type, (OK, "", ""))
    return Check(name, level, f"{seen}: {means}" if means else f"{seen}, read-write", advice)


def rename(scene: Scene) -> Check:
    """A rename and a hard link do not cross a mount, not even one of the same file system."""
    name, root = "rename", Path(os.path.realpath(scene.root))
    parts = [layout.HIDDEN, *(part for part, _ in DIRECTORIES)]
    paths = [root / part for part in parts]
    apart = [mount for mount in mounts(scene.mounts) if mount.point in paths]
    names = {str(mount.point.relative_to(root)) for mount in apart}
    with suppress(OSError):
        device = root.stat().st_dev
        for part, path in zip(parts, paths, strict=True):
            with suppress(OSError):
                if path.lstat().st_dev != device:
                    names.add(part)
    if names:
        advice = f"mount {root} as a whole: a model is published by a rename"
        return Check(name, FAIL, f"{_some_mounts(names)} of its own below {root}", advice)
    return Check(
        name, OK, "nothing below is a mount of its own: renames and hard links stay inside"
    )


def _some_mounts(names: set[str]) -> str:
    return f"{', '.join(sorted(names))} {'is a mount' if len(names) == 1 else 'are mounts'}"


def volume(scene: Scene) -> Check:
    """Is this the disk that it was (design D6)?"""
    name = "volume"
    known = Volume(scene.root, scene.state)
    try:
        known.check(require_dedicated=scene.settings.require_dedicated)
        here = _identity(scene.root / layout.VOLUME)
        remembered = _identity(scene.state / layout.KNOWN_VOLUME)
    except AgentError as error:
        if error.reason is Reason.PERMISSION_DENIED:
            return _not_ours(name, scene)
        return Check(name, FAIL, error.message, RULES[error.reason].advice)
    except PermissionError:
        return _not_ours(name, scene)
    shared = on_machine_disk(there(scene.root))
    kind = "shared with this machine's own files" if shared else "a file system of its own"
    if here is None and remembered is None:
        return Check(name, OK, f"{kind}, without an identity yet: no agent was here")
    if remembered is None:
        seen = f"{kind}, {here}, new to this machine"
        return Check(name, OK, seen)
    if here is None:
        advice = "it is new or was emptied: the agent gives it an identity"
        return Check(
            name, WARN, f"{kind}, without an identity; this machine had {remembered}", advice
        )
    if here != remembered:
        advice = "the disk was changed: the agent takes this one and remembers it"
        return Check(name, WARN, f"{kind}, {here}; this machine had {remembered}", advice)
    return Check(name, OK, f"{kind}, {here}, as this machine remembers it")


def _not_ours(name: str, scene: Scene) -> Check:
    seen = f"what {scene.state} remembers is not this user's to read"
    return Check(name, WARN, seen, "run it as the agent's user to see it")


def _identity(path: Path) -> str | None:
    """The first block of a UUID says enough. None for no note, or one that means nothing."""
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        return f"volume {str(raw['id'])[:8]}"
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return None


# -- room ---------------------------------------------------------------------------------------


def _marks(scene: Scene) -> tuple[float, float, bool]:
    shared = on_machine_disk(there(scene.root))
    return *scene.settings.marks(shared=shared and scene.of_a_node), shared


def space(scene: Scene) -> Check:
    name, settings = "space", scene.settings
    found = disk.space(there(scene.root))
    high, low, _ = _marks(scene)
    used = found.capacity - found.free
    percent = 100 * used / found.capacity if found.capacity else 100.0
    seen = (
        f"{quantity(used)} of {quantity(found.capacity)} used ({percent:.0f}%),"
        f" marks {low:g}% and {high:g}%"
    )
    problems: list[tuple[Level, str, str]] = [(OK, seen, "")]
    if found.free == 0:
        problems.append((FAIL, "nothing is free", "make room: `localmodel evict`"))
    elif percent >= high:
        advice = "nothing is begun before models go: `localmodel plan` says which"
        problems.append((WARN, "above the high mark", advice))
    if settings.limit is not None:
        taken = sum(entry.bytes for entry in Catalog(scene.root).entries())
        seen = f"models take {quantity(taken)} of --limit {quantity(settings.limit)}"
        over = taken > settings.limit
        advice = "models go until it is kept: see `localmodel plan`" if over else ""
        problems.append((WARN if over else OK, seen, advice))
        if settings.limit > found.capacity:
            problems.append((WARN, "which is more than the disk has", "lower --limit"))
    numbers = os.statvfs(there(scene.root))
    if numbers.f_files and numbers.f_favail < numbers.f_files // 100:
        seen = f"{numbers.f_favail} of {numbers.f_files} inodes are free"
        problems.append((WARN, seen, "remove small files, or make the file system anew with more"))
    return Check(name, *worst(problems))


def kubelet(scene: Scene) -> Check:
    """Its image garbage collection finds no images to blame where models fill the disk."""
    name = "kubelet"
    if not scene.of_a_node:
        return Check(name, OK, "not asked: this is no node's agent (no NODE_NAME)")
    high, low, shared = _marks(scene)
    if not shared:
        return Check(name, OK, "the cache has a file system of its own: kubelet does not mind it")
    seen = (
        f"the cache is on kubelet's file system: it deletes images from {_IMAGES_FROM}% down to"
        f" {_IMAGES_TO}%, models stop at {high:g}% and go down to {low:g}%"
    )
    if high >= _IMAGES_FROM:
        advice = "lower LOCALMODEL_HIGH to 78, or it deletes the node's images for ever; or a disk"
        return Check(name, FAIL, seen, f"{advice} of its own for the cache")
    if high > _IMAGES_TO:
        advice = f"models above {_IMAGES_TO}% cost images once it begins: LOCALMODEL_HIGH=78"
        return Check(name, WARN, seen, advice)
    return Check(name, OK, seen)
