"""A file of this machine as a body: read like one that comes over a wire, and pinned like one."""

import errno
import os
import stat

from agent.errors import AgentError, Reason
from agent.files import source_errors, version_of
from agent.model import PathLocator


class LocalBody:
    """The rest of a local file. Raises SourceChanged as soon as it is not the listed one."""

    def __init__(self, locator: PathLocator, *, start: int) -> None:
        self.where = locator.path
        self.start = start
        self._version = locator.version
        self._offset = start
        self._file = _open(locator.path)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode):
            raise AgentError(Reason.UNSAFE_PATH, f"{self.where} is not a regular file")
        if self._version is not None and version_of(found) != self._version:
            raise AgentError(Reason.SOURCE_CHANGED, f"{self.where} changed since it was listed")

    def read_into(self, view: memoryview) -> int:
        with source_errors(f"read {self.where}"):
            count = os.preadv(self._file, [view], self._offset)
        self._check()  # after the read: what was read before a change is good
        self._offset += count
        return count

    def close(self) -> None:
        os.close(self._file)


def _open(path: str) -> int:
    with source_errors(f"open {path}"):
        try:
            # Without O_NONBLOCK, a fifo would hang here for ever.
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AgentError(Reason.SOURCE_CHANGED, f"{path} is there no more") from error
        except OSError as error:
            if error.errno == errno.ENXIO:  # a socket
                raise AgentError(Reason.UNSAFE_PATH, f"{path} is not a regular file") from error
            raise
