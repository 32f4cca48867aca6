"""For how long something has been the same, by the clock of whoever looks.

Whether a Lease has ended is reckoned so, as client-go does: since we saw its last renewal, and not
since it was made. The clocks of two machines differ.
"""

from typing import Generic, TypeVar

T = TypeVar("T")


class Unchanged(Generic[T]):
    """One value that is looked at again and again."""

    def __init__(self, value: T | None = None, since: float = 0.0) -> None:
        """`value` is the same since `since`, as far as is known: by the clock of `seconds`."""
        self._value = value
        self._since = since

    def seconds(self, value: T | None, now: float) -> float:
        """For how long it is this value, in seconds; `now` is monotonic. None is never the same."""
        if value is None or value != self._value:
            self._value, self._since = value, now
        return now - self._since
