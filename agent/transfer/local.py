"""A file of this machine as a body: read like one that comes over a wire, and pinned like one."""

import os

from agent.errors import AgentError, Reason
from agent.files import disk_errors, version_of
from agent.model import PathLocator


class LocalBody:
    """The rest of a local file. `check` says whether it was the same file all the time."""

    def __init__(self, locator: PathLocator, *, start: int) -> None:
        self.where = locator.path
        self.start = start
        self._version = locator.version
        self._offset = start
        with disk_errors(f"open {locator.path}"):
            self._file = os.open(locator.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.check()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        if self._version is not None and version_of(os.fstat(self._file)) != self._version:
            raise AgentError(Reason.SOURCE_CHANGED, f"{self.where} changed while it was read")

    def read_into(self, view: memoryview) -> int:
        with disk_errors(f"read {self.where}"):
            count = os.preadv(self._file, [view], self._offset)
        self._offset += count
        return count

    def close(self) -> None:
        os.close(self._file)
