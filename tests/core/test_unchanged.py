"""For how long something has been the same."""

from agent.unchanged import Unchanged


def test_it_counts_from_the_first_look_and_anew_with_every_change() -> None:
    seen = Unchanged[str]()
    assert seen.seconds("a", 100.0) == 0.0
    assert seen.seconds("a", 130.0) == 30.0
    assert seen.seconds("b", 140.0) == 0.0
    assert seen.seconds("a", 150.0) == 0.0, "it was another in between"
    assert seen.seconds("a", 151.0) == 1.0


def test_what_is_known_of_the_time_before_counts() -> None:
    seen = Unchanged("a", 40.0)
    assert seen.seconds("a", 100.0) == 60.0
    assert seen.seconds("b", 101.0) == 0.0


def test_nothing_is_never_the_same() -> None:
    seen = Unchanged[str]()
    assert seen.seconds(None, 100.0) == 0.0
    assert seen.seconds(None, 130.0) == 0.0
