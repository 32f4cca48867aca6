"""Makes the top directories and gives them to the agent: the one step that needs to be root.

Runs as an init container with CHOWN, FOWNER and DAC_OVERRIDE, so that a fresh node needs no human.
It never goes below the top directories, never follows a link, and writes no file. What is not ours
keeps its owner: it takes only the files that are in `.localmodel` and in the state directory.
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


def parse_owner(text: str) -> tuple[int, int]:
    """`UID` or `UID:GID`, in numbers."""
    found = re.fullmatch(r"([0-9]{1,10})(?::([0-9]{1,10}))?", text)
    if found is None:
        raise AgentError(
            Reason.INVALID_SPEC, f"--owner {text!r} is not UID or UID:GID, for example 64000:64000"
        )
    return int(found[1]), int(found[2] or found[1])


def prepare(root: Path, state: Path, owner: tuple[int, int], *, require_dedicated: bool) -> None:
    """Raises DiskMissing where the cache's disk is away: nothing is made then."""
    Volume(root, state).check(require_dedicated=require_dedicated)
    _own(state, layout.PRIVATE_MODE, owner)
    _own(root, layout.DIRECTORY_MODE, owner, files=False)
    _own(root / layout.HIDDEN, layout.DIRECTORY_MODE, owner)
    for name, mode in DIRECTORIES:
        _own(root / name, mode, owner, files=name != layout.MODELS)


def _own(path: Path, mode: int, owner: tuple[int, int], *, files: bool = True) -> None:
    """Make a directory, and it and the files in it the owner's: not what is in its directories."""
    with disk_errors(f"prepare {path}"):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
