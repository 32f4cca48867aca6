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

from agent import layout
from agent.model import CacheKey


def models_read(root: Path) -> frozenset[CacheKey]:
    """The keys of the models below `root` that some process but this one has open, mapped, or as
    its working directory."""
    top = f"{root.resolve()}/"
    own = os.getpid()
    found = set()
    for number in psutil.pids():
        if number == own:
            continue
        for path in _paths(number):
            if path.startswith(top) and (key := layout.key_in(path.removeprefix(top))):
                found.add(key)
    return frozenset(found)


def _paths(number: int) -> Iterator[str]:
    process = Path(f"/proc/{number}")
    # It may end while it is looked at; another user's cannot be looked at.
    with suppress(OSError):
        yield str((process / "cwd").readlink())
    with suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                yield str(descriptor.readlink())
    with suppress(OSError), (process / "maps").open("rb") as maps:
        for line in maps:
            # address perms offset dev inode path
            fields = line.split(maxsplit=5)
            if len(fields) == 6:
                yield os.fsdecode(fields[5].rstrip(b"\n"))
