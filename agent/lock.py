"""The lock of the one agent of a volume: held as long as the process lives, and no longer."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from agent.errors import AgentError, Reason


class Lock:
    """Two locks: of the file that names the holder, and of its directory.

    Somebody who removes the file takes the first away without anybody noticing, and the next agent
    would make a new one. The directory is not removed by accident.
    """

    def __init__(self, path: Path) -> None:
        """Raises Locked, naming the holder."""
        self._held: list[int] = []
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(path, flags, 0o644)  # first: who may not write is to hear just that
            self._held.append(file)
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._held.append(directory)
            self._directory = directory
            with suppress(OSError):  # not every file system locks directories
                self._take(directory, path)
            self._take(file, path)
        except BaseException:
            self.release()
            raise
        with suppress(OSError):  # the number is a courtesy; on a full disk we must start to evict
            os.truncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)

    def _take(self, descriptor: int, file: Path) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AgentError(
                Reason.LOCKED,
                f"another agent or command (process {_holder(file)}) already manages"
                f" {file.parent.parent}",
            ) from None

    def is_on(self, path: Path) -> bool:
        """Whether `path` is on the very file system whose lock is held.

        A disk that was mounted over the directory, or taken away from under it, is another one.
        """
        return path.stat().st_dev == os.fstat(self._directory).st_dev

    def release(self) -> None:
        while self._held:
            os.close(self._held.pop())


def _holder(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()[:20] or "unknown"
    except OSError:
        return "unknown"
