"""How far one model is, told while it comes."""

import threading
import time

from agent.model import Job, Stage, Want


class Tally:
    """How far one model is. Written by transfer threads, read by the loop."""

    def __init__(
        self, want: Want, *, stage: Stage, total: int | None = None, staged: bool = False
    ) -> None:
        """`staged`: what it brings is not sealed by this job, but waits beside what has its
        place."""
        self.want = want
        self.total = total
        self.staged = staged
        self.received = 0
        self.linked = 0
        self.begun_at = time.monotonic()
        self.lists = stage is Stage.RESOLVING
        self._stage = stage
        self._done = 0
        self._lock = threading.Lock()

    def add(self, done: int, received: int) -> None:
        """Bytes in place (negative when they turned out wrong), and bytes off the wire."""
        with self._lock:
            self._done += done
            self.received += received
            if received:
                self._stage = Stage.FETCHING

    def link(self, size: int) -> None:
        """Bytes that another model had already. Whether they are in place is told by `add`."""
        with self._lock:
            self.linked += size

    def verify(self) -> None:
        """What is here already is being read and hashed."""
        with self._lock:
            self._stage = Stage.VERIFYING

    @property
    def job(self) -> Job:
        return Job(key=self.want.key, stage=self._stage, total=self.total, done=self._done)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun_at
