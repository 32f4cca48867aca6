"""The bandwidth cap: one bucket that every connection of the node draws from."""

import threading
import time
from collections.abc import Callable


class Throttle:
    """At most `rate` bytes a second over all callers; None: no cap."""

    def __init__(self, rate: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = 0.0  # when everything handed out so far has been paid for

    @property
    def step(self) -> int | None:
        """The most bytes to take at once, so that a low cap is a trickle and not a stutter."""
        return None if self._rate is None else max(1, self._rate // 10)

    def take(self, count: int) -> float:
        """Account for `count` bytes that were received; seconds to wait before the next ones."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now) + count / self._rate
            return self._free_at - now
