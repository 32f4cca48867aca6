"""Waiting times, with loaded dice."""

import time
from collections.abc import Iterator
from math import inf

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.backoff import gives_up, in_place_delay, next_attempt, retry_after_seconds
from agent.errors import RULES, AgentError, Reason
from agent.model import Attempt, CacheKey

KEY = CacheKey("0123456789abcdef")
NOW = 1_700_000_000.0
DICE = st.floats(0.0, 1.0, exclude_max=True)
FAILING = [reason for reason in Reason if not gives_up(reason)]


def failures(reason: Reason, number: int, dice: float = 0.5) -> list[float]:
    """The seconds waited after each of so many failures in a row."""
    waits, attempt, now = [], None, NOW
    for _ in range(number):
        attempt = next_attempt(KEY, attempt, AgentError(reason, "x"), now=now, dice=lambda: dice)
        waits.append(attempt.retry_at - now)
        now = attempt.retry_at
    return waits


# -- between the tries of a model -----------------------------------------------------------------


@given(st.sampled_from(FAILING), DICE, st.integers(1, 2000))
@example(Reason.NETWORK, 0.0, 5000)  # the exponent must not overflow
def test_a_wait_lies_between_half_of_the_rule_and_the_rule(
    reason: Reason, dice: float, count: int
) -> None:
    rule = RULES[reason]
    before = Attempt(key=KEY, count=count, reason=reason, message="x", retry_at=NOW)
    error = AgentError(reason, "x")
    attempt = next_attempt(KEY, before, error, now=0.0, dice=lambda: dice)
    assert attempt.count == count + 1
    full = min(rule.cap_seconds, rule.first_seconds * 2.0 ** min(count, 100))
    assert full / 2 <= attempt.retry_at <= full


@pytest.mark.parametrize("reason", FAILING, ids=str)
def test_failures_in_a_row_wait_longer_up_to_the_cap(reason: Reason) -> None:
    waits = failures(reason, 20)
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(RULES[reason].first_seconds * 0.75)
    assert waits[-1] == pytest.approx(RULES[reason].cap_seconds * 0.75)


def test_the_second_wait_is_twice_the_first() -> None:
    assert failures(Reason.NETWORK, 3, dice=0.0) == pytest.approx([2.5, 5.0, 10.0])


def test_another_reason_begins_a_new_row() -> None:
    """The world has changed: what was fixed meanwhile should not be waited for."""
    attempt: Attempt | None = None
    for reason in (Reason.UNAUTHORIZED, Reason.UNAUTHORIZED, Reason.NETWORK):
        attempt = next_attempt(KEY, attempt, AgentError(reason, "x"), now=NOW, dice=lambda: 0.5)
    assert attempt is not None
    assert (attempt.count, attempt.reason) == (1, Reason.NETWORK)


@pytest.mark.parametrize("reason", sorted(set(Reason) - set(FAILING)), ids=str)
def test_what_only_another_request_can_help_is_never_tried_again(reason: Reason) -> None:
    error = AgentError(reason, "x", retry_after_seconds=5.0)
    assert next_attempt(KEY, None, error, now=NOW, dice=lambda: 0.5).retry_at == inf


def test_the_record_says_what_failed() -> None:
    attempt = next_attempt(
        KEY, None, AgentError(Reason.STALLED, "nothing for 30 s"), now=NOW, dice=lambda: 0.5
    )
    assert (attempt.key, attempt.count) == (KEY, 1)
    assert (attempt.reason, attempt.message) == (Reason.STALLED, "nothing for 30 s")


@given(st.floats(0.0, 1e9), DICE)
def test_the_other_side_is_not_asked_before_the_time_it_named(asked: float, dice: float) -> None:
    """Nor more than an hour and a little after it: a header does not put a model to sleep."""
    error = AgentError(Reason.RATE_LIMITED, "429", retry_after_seconds=asked)
    wait = next_attempt(KEY, None, error, now=0.0, dice=lambda: dice).retry_at
    assert min(asked, 3600.0) <= wait <= 3600.0 + RULES[Reason.RATE_LIMITED].first_seconds


def test_nodes_that_were_told_the_same_moment_do_not_come_back_together() -> None:
    error = AgentError(Reason.RATE_LIMITED, "429", retry_after_seconds=300.0)
    waits = {
        next_attempt(KEY, None, error, now=0.0, dice=lambda dice=dice: dice).retry_at  # type: ignore[misc]  # a default argument binds it
        for dice in (0.0, 0.25, 0.5, 0.75)
    }
    assert len(waits) == 4


# -- between the tries of a file ------------------------------------------------------------------


@pytest.mark.parametrize("reason", Reason, ids=str)
def test_a_file_is_tried_as_often_as_the_rule_says(reason: Reason) -> None:
    error = AgentError(reason, "x")
    tries = 1
    while in_place_delay(error, tries, lambda: 0.5) is not None:
        tries += 1
        assert tries < 100
    assert tries == RULES[reason].tries


@given(st.integers(1, 4), DICE)
def test_a_file_waits_from_a_quarter_second_to_half_a_minute(tries: int, dice: float) -> None:
    delay = in_place_delay(AgentError(Reason.NETWORK, "x"), tries, lambda: dice)
    assert delay is not None
    assert 0.25 * 2 ** (tries - 1) <= delay <= 0.5 * 2 ** (tries - 1) <= 30.0


@pytest.mark.parametrize(("asked", "waits"), [(0.0, True), (30.0, True), (30.1, False)])
def test_a_long_wait_that_was_asked_for_is_the_models_and_not_the_files(
    asked: float, waits: bool
) -> None:
    error = AgentError(Reason.RATE_LIMITED, "429", retry_after_seconds=asked)
    delay = in_place_delay(error, 1, lambda: 0.5)
    assert (delay is not None) is waits
    assert delay is None or asked <= delay <= asked + 1.0


# -- Retry-After ----------------------------------------------------------------------------------


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A node whose clock shows another zone's time."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_east")
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("0", 0.0),
        (" 120 ", 120.0),
        ("-5", 0.0),
        ("1.5", None),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("Tue, 14 Nov 2023 23:13:50 +0100", 30.0),
        ("Tue, 14 Nov 2023 22:13:50 -0000", 30.0),  # UTC, of an unknown zone: not ours
        ("Tue, 14 Nov 2023 22:13:10 GMT", 0.0),
        ("Tue, 14 Nov 20233 22:13:10 GMT", None),
        ("Tue, 14 Nov 2023 22:13:50 +99999999999999", None),
        ("9" * 400, None),  # no float is as large
        ("9" * 5000, None),  # no int is read from as many digits
    ],
)
def test_what_a_header_asks_for(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, now=NOW) == seconds


@given(st.text() | st.from_regex(r"\A[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ .*\Z"))
def test_no_header_breaks_it(value: str) -> None:
    asked = retry_after_seconds(value, now=NOW)
    assert asked is None or 0.0 <= asked < inf
