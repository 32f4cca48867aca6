"""Which models the processes of this machine read now: who uses what, where there are no pods.

Linux keeps the bytes of an open or mapped file until its last user closes it, so a model that goes
is never pulled from under a process: what this spares is a second download. That is why processes
of other users, whose files only root can see, are no reason to evict nothing for ever.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from agent import layout, trees
from agent.model import CacheKey


def models_read(root: Path) -> frozenset[CacheKey]:
    """The keys of the models below `root` that some process but this one has open, mapped, or as
    its working directory; by what a file is and not by its name, which is another in a container.
    """
    known = _files_of(root / layout.MODELS)
    own = os.getpid()
    held = (files for number in psutil.pids() if number != own for files in _held_by(number))
    return frozenset(known[file] for file in held if file in known)


def _files_of(models: Path) -> dict[tuple[int, int], CacheKey]:
    """Device and inode of every file and directory of a model. One that two models share is of
    either; whichever is spared keeps the bytes."""
    found = {}
    for name in trees.names(models):
        if layout.is_key(name):
            for directory, _, files in os.walk(models / name):
                for path in (directory, *(f"{directory}/{file}" for file in files)):
                    with suppress(OSError):
                        at = os.lstat(path)
                        found[at.st_dev, at.st_ino] = CacheKey(name)
    return found


def _held_by(number: int) -> Iterator[tuple[int, int]]:
    process = Path(f"/proc/{number}")
    # It may end while it is looked at; another user's cannot be looked at.
    with suppress(OSError):
        yield _at(process / "cwd")
    with suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                yield _at(descriptor)
    with suppress(OSError), (process / "maps").open("rb") as maps:
        for line in maps:
            # address perms offset major:minor inode path
            fields = line.split(maxsplit=5)
            if len(fields) == 6:
                major, _, minor = fields[3].partition(b":")
                yield os.makedev(int(major, 16), int(minor, 16)), int(fields[4])


def _at(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
