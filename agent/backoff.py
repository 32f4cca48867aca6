"""How long to wait before trying again. Pure: the caller brings the clock and the dice."""

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC
from email.utils import parsedate_to_datetime
from math import inf

from agent.errors import RULES, AgentError, Reason
from agent.model import Attempt, CacheKey

_IN_PLACE_FIRST_SECONDS = 0.5
IN_PLACE_CAP_SECONDS = 30.0
RETRY_AFTER_CAP_SECONDS = 3600.0  # a header must not put a model to sleep for a day

LONGEST_SECONDS = 7200.0
"""No rule and no Retry-After puts a try off for that long: only a clock that was wrong."""

Dice = Callable[[], float]
"""Uniform in [0, 1), as `random.random`."""


def doubling(first: float, cap: float, count: int) -> float:
    """Seconds after the failure number `count` in a row."""
    # The exponent is bounded so that a thousand failures in a row do not overflow a float.
    return min(cap, first * 2.0 ** min(count - 1, 60))


def _jittered(seconds: float, dice: Dice) -> float:
    """Half fixed, half random: agents that failed together do not come back together."""
    return seconds * (0.5 + dice() / 2)


def in_place_delay(error: AgentError, tries: int, dice: Dice) -> float | None:
    """Seconds until try number `tries + 1` of a file, or None: let the whole model back off."""
    if tries >= RULES[error.reason].tries:
        return None
    asked = error.retry_after_seconds
    if asked is not None:
        # A long wait belongs to the model's own back-off, where it survives a restart.
        return None if asked > IN_PLACE_CAP_SECONDS else asked + dice()
    return _jittered(doubling(_IN_PLACE_FIRST_SECONDS, IN_PLACE_CAP_SECONDS, tries), dice)


def next_attempt(
    key: CacheKey, previous: Attempt | None, error: AgentError, *, now: float, dice: Dice
) -> Attempt:
    """The record of one more failure in a row, with the time of the next try."""
    same = previous is not None and previous.reason is error.reason
    count = previous.count + 1 if previous is not None and same else 1
    rule = RULES[error.reason]
    delay = doubling(rule.first_seconds, rule.cap_seconds, count)
    if delay != inf:
        delay = _jittered(delay, dice)
        if error.retry_after_seconds is not None:
            # Every node was told the same moment, so they spread out behind it.
            asked = min(error.retry_after_seconds, RETRY_AFTER_CAP_SECONDS)
            delay = max(delay, asked + dice() * rule.first_seconds)
    return Attempt(
        key=key, count=count, reason=error.reason, message=error.message, retry_at=now + delay
    )


def gives_up(reason: Reason) -> bool:
    """Whether nothing but another request can help."""
    return RULES[reason].first_seconds == inf


def retry_after_seconds(value: str | None, *, now: float) -> float | None:
    """What a Retry-After header asks for: a number of seconds, or a date (RFC 9110, 10.2.3).

    None if the header is absent or cannot be read. `now` is Unix seconds.
    """
    if value is None:
        return None
    # OverflowError: both are free to hold hundreds of digits.
    with suppress(ValueError, OverflowError):
        return max(0.0, float(int(value)))
    with suppress(ValueError, OverflowError):
        asked = parsedate_to_datetime(value)
        if asked.tzinfo is None:  # "-0000": UTC, and nothing is said of the sender's own zone
            asked = asked.replace(tzinfo=UTC)
        return max(0.0, asked.timestamp() - now)
    return None
