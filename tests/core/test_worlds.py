"""The generator itself: a property over worlds in which nothing happens proves nothing."""

import pytest

from tests.core.count_actions import KINDS, MIXED, count

WORLDS = 1000


@pytest.fixture(scope="module")
def shares() -> dict[str, float]:
    counts = count(WORLDS)
    return {kind: counts[kind] / counts["worlds"] for kind in counts}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_a_plan_can_say_occurs_often(kind: str, shares: dict[str, float]) -> None:
    assert shares.get(kind, 0.0) > 0.03


@pytest.mark.parametrize("kind", MIXED)
def test_the_combinations_that_hide_bugs_occur(kind: str, shares: dict[str, float]) -> None:
    assert shares.get(kind, 0.0) > 0.005
