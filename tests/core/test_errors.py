"""The closed vocabulary: every reason has a rule, and the rules make sense."""

import re
from math import inf

import pytest

from agent.errors import RULES, AgentError, Reason

each = pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.value)


def test_no_rule_is_missing_and_none_is_left_over() -> None:
    assert set(RULES) == set(Reason)


def test_the_values_are_unique() -> None:
    assert len({reason.value for reason in Reason}) == len(Reason.__members__)


@each
def test_the_value_is_what_kubernetes_takes_as_a_reason(reason: Reason) -> None:
    """PascalCase, and short: it is a metric label and a status field too."""
    assert re.fullmatch(r"([A-Z][a-z]+)+", reason.value)
    assert len(reason.value) <= 32


@each
def test_the_advice_is_one_plain_line(reason: Reason) -> None:
    """It is read in a sentence, in brackets, behind the message."""
    advice = RULES[reason].advice
    assert 10 < len(advice) <= 100
    assert advice.isprintable()
    assert advice == advice.strip(" .")
    assert advice[0].islower()


@each
def test_the_waits_grow_and_end(reason: Reason) -> None:
    rule = RULES[reason]
    assert 0 < rule.first_seconds <= rule.cap_seconds
    assert rule.cap_seconds <= 3600.0 or rule.first_seconds == inf, "a day is never by itself"
    assert rule.tries >= 1


@each
def test_what_only_another_request_can_help_is_never_tried_in_place(reason: Reason) -> None:
    rule = RULES[reason]
    if rule.first_seconds == inf:
        assert rule.tries == 1


def test_an_error_says_what_and_shows_its_reason_to_developers() -> None:
    error = AgentError(Reason.NETWORK, "no route to hub.example", retry_after_seconds=3.0)
    assert str(error) == error.message == "no route to hub.example"
    assert repr(error) == "<AgentError NetworkError: no route to hub.example>"
    assert (error.reason, error.retry_after_seconds) == (Reason.NETWORK, 3.0)
