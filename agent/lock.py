"""The lock of the one agent of a volume: held as long as the process lives, and no longer."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from agent.errors import AgentError, Reason


def take(path: Path) -> int:
    """The descriptor that holds the lock until it is closed. Raises Locked, naming the holder."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise AgentError(
            Reason.LOCKED,
            f"another agent (process {holder}) already manages {path.parent.parent}",
        ) from None
    with suppress(OSError):  # the number is a courtesy; on a full disk we must start to evict
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
