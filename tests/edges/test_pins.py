"""Pins are files: they outlive everything, and an operator may make one by hand."""

from pathlib import Path

import pytest

from agent import layout
from agent.errors import AgentError, Reason
from agent.model import cache_key
from agent.pins import Pins
from agent.store import Store

KEY = cache_key("hf://acme/tiny")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = Store(tmp_path)
    store.open()
    store.close()
    return tmp_path


def test_a_pin_is_there_until_it_is_removed(root: Path) -> None:
    pins = Pins(root)
    assert pins.all() == frozenset()
    for _ in range(2):
        pins.add(KEY)
        assert Pins(root).all() == {KEY}
    for _ in range(2):
        pins.remove(KEY)
        assert Pins(root).all() == frozenset()


def test_one_made_by_hand_counts_and_other_files_do_not(root: Path) -> None:
    directory = root / layout.PINS
    for name in (KEY, "README", f"{KEY}.bak"):
        (directory / name).touch()
    assert Pins(root).all() == {KEY}


def test_a_directory_that_somebody_removed_is_made_again(root: Path) -> None:
    (root / layout.PINS).rmdir()
    assert Pins(root).all() == frozenset()
    Pins(root).add(KEY)
    assert Pins(root).all() == {KEY}


def test_what_cannot_be_written_is_an_error_with_a_reason(root: Path) -> None:
    (root / layout.PINS).rmdir()
    (root / layout.PINS).write_text("in the way")
    with pytest.raises(AgentError) as caught:
        Pins(root).add(KEY)
    assert caught.value.reason is Reason.DISK_ERROR
