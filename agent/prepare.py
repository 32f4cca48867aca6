"""Makes the top directories and gives them to the agent: the one step that needs to be root.

Runs as an init container with CHOWN, FOWNER and DAC_OVERRIDE, so that a fresh node needs no human.
It never follows a link, and writes no file. What is not ours keeps its owner: it takes only the
files that are in `.localmodel` and in the state directory. With `adopt`, also what another agent
left below `models/<key>`: without that, the agent could neither link such a file
(fs.protected_hardlinks) nor move its directory away.
"""

import os
import re
import stat
from pathlib import Path

from agent import layout
from agent.errors import AgentError, Reason
from agent.files import disk_errors
from agent.store import DIRECTORIES
from agent.volume import Volume

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_DEEPEST = 100  # each level is a descriptor; no model is so deep


def parse_owner(text: str) -> tuple[int, int]:
    """`UID` or `UID:GID`, in numbers."""
    found = re.fullmatch(r"([0-9]{1,10})(?::([0-9]{1,10}))?", text)
    if found is None:
        raise AgentError(
            Reason.INVALID_SPEC, f"--owner {text!r} is not UID or UID:GID, for example 64000:64000"
        )
    return int(found[1]), int(found[2] or found[1])


def prepare(
    root: Path,
    state: Path,
    owner: tuple[int, int],
    *,
    require_dedicated: bool,
    adopt: bool = False,
) -> list[str]:
    """What could not be adopted, a line each.

    Raises DiskMissing where the cache's disk is away: nothing is made then.
    """
    Volume(root, state).check(require_dedicated=require_dedicated)
    _own(state, layout.PRIVATE_MODE, owner)
    _own(root, layout.DIRECTORY_MODE, owner, files=False)
    _own(root / layout.HIDDEN, layout.DIRECTORY_MODE, owner)
    for name, mode in DIRECTORIES:
        _own(root / name, mode, owner, files=name != layout.MODELS)
    return _adopt(root / layout.MODELS, owner) if adopt else []


def _own(path: Path, mode: int, owner: tuple[int, int], *, files: bool = True) -> None:
    """Make a directory, and it and the files in it the owner's: not what is in its directories."""
    with disk_errors(f"prepare {path}"):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, _DIRECTORY)
        try:
            found = os.fstat(descriptor)
            if (found.st_uid, found.st_gid) != owner:
                os.fchown(descriptor, *owner)
            if stat.S_IMODE(found.st_mode) != mode:
                os.fchmod(descriptor, mode)
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    if files and entry.is_file(follow_symlinks=False):
                        os.chown(entry.name, *owner, dir_fd=descriptor, follow_symlinks=False)
        finally:
            os.close(descriptor)


def _adopt(models: Path, owner: tuple[int, int]) -> list[str]:
    with disk_errors(f"adopt what is in {models}"):
        descriptor = os.open(models, _DIRECTORY)
        try:
            giving = _Giving(owner, os.fstat(descriptor).st_dev)
            for name in _names(descriptor):
                if layout.is_key(name):
                    giving.entry(descriptor, name, Path(name))
        finally:
            os.close(descriptor)
    return giving.refused


def _names(descriptor: int) -> list[str]:
    with os.scandir(descriptor) as entries:
        return sorted(entry.name for entry in entries)


class _Giving:
    """Gives trees to the agent, each thing by a descriptor of its own that no link has led to.

    Somebody may have such a tree mounted with a right to write, and rearrange it meanwhile. So a
    directory changes hands before it is listed, and what a descriptor turns out to be counts, not
    what its name was a moment ago. Readers notice nothing: all may read what all may read.
    """

    def __init__(self, owner: tuple[int, int], device: int) -> None:
        self._owner = owner
        self._device = device
        self.refused: list[str] = []

    def entry(self, parent: int, name: str, path: Path) -> None:
        try:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                self._directory(parent, name, path)
            elif stat.S_ISREG(mode):
                self._file(parent, name, path)
            else:
                self._refuse(path, "is neither a file nor a directory")
        except FileNotFoundError:
            pass  # gone meanwhile
        except OSError as error:
            self._refuse(path, error.strerror or str(error))

    def _directory(self, parent: int, name: str, path: Path) -> None:
        if len(path.parts) > _DEEPEST:
            self._refuse(path, f"is more than {_DEEPEST} directories deep")
            return
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            found = os.fstat(descriptor)
            if found.st_dev != self._device:
                self._refuse(path, "is on another file system")
                return
            self._give(descriptor, found, layout.DIRECTORY_MODE)
            for child in _names(descriptor):
                self.entry(descriptor, child, path / child)
        finally:
            os.close(descriptor)

    def _file(self, parent: int, name: str, path: Path) -> None:
        # Without O_NONBLOCK, a fifo that took the name would hang here for ever.
        descriptor = os.open(name, _FILE, dir_fd=parent)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_dev != self._device:
                self._refuse(path, "is no file of this file system")
            elif found.st_nlink > 1 and found.st_uid != self._owner[0]:
                # Its other name may be anywhere: whoever could plant one would be given the file.
                self._refuse(path, "has another name, perhaps elsewhere")
            else:
                mode = stat.S_IMODE(found.st_mode) & layout.DIRECTORY_MODE | layout.FILE_MODE
                self._give(descriptor, found, mode)
        finally:
            os.close(descriptor)

    def _give(self, descriptor: int, found: os.stat_result, mode: int) -> None:
        if (found.st_uid, found.st_gid) != self._owner:
            os.fchown(descriptor, *self._owner)
        if stat.S_IMODE(found.st_mode) != mode:
            os.fchmod(descriptor, mode)

    def _refuse(self, path: Path, why: str) -> None:
        self.refused.append(f"{str(path)!a} {why}; it keeps its owner")
