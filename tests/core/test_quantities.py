"""Sizes and durations as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.quantities import duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0.0),
        ("90s", 90.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("7d", 604800.0),
        ("250ms", 0.25),
        (" 10m ", 600.0),
    ],
)
def test_durations_are_those_of_go_and_days(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "10", "m", "-1s", "1h 30m", "1y", "1h30", "h1"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="write for example 90s, 1h30m or 7d"):
        parse_duration(text)


@given(st.integers(0, 10**9))
def test_what_is_shown_reads_back_within_its_two_units(seconds: int) -> None:
    shown = parse_duration(duration(seconds))
    assert shown <= seconds
    smallest = {"d": 86400, "h": 3600, "m": 60, "s": 1}[duration(seconds)[-1]]
    assert seconds - shown < smallest
