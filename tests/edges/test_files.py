"""Verbs on a path that somebody else may bend: none of them acts where a symlink leads to."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.errors import AgentError, Reason
from agent.files import Files, version_at
from tests.edges.volume import mode_of, snapshot, write

FILES = Files()

Verb = Callable[[Path, Path], object]
"""Of a file to bring, and a directory below which somebody else may write."""

VERBS: dict[str, Verb] = {
    "make": lambda new, top: FILES.make_directory(top / "way/new", 0o755, below=top),
    "make again": lambda new, top: FILES.make_directory(top / "way/empty", 0o755, below=top),
    "rename": lambda new, top: FILES.rename(new, top / "way/file", below=top.parent),
    "link": lambda new, top: FILES.link(new, top / "way/new", below=top),
    "unlink": lambda new, top: FILES.unlink(top / "way/file", below=top),
    "set mode": lambda new, top: FILES.set_mode(top / "way/file", 0o444, below=top),
    "backdate": lambda new, top: FILES.backdate(top / "way/file", 1, below=top),
    "remove": lambda new, top: FILES.remove_directory(top / "way/empty", below=top),
    "look": lambda new, top: version_at(top / "way/file", top),
}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """What nobody may touch."""
    directory = tmp_path / "elsewhere"
    (directory / "empty").mkdir(parents=True, mode=0o700)
    write(directory / "file", b"theirs")
    return directory


@pytest.mark.parametrize("verb", VERBS)
def test_no_link_on_the_way_is_followed(tmp_path: Path, elsewhere: Path, verb: str) -> None:
    top, new = tmp_path / "top", tmp_path / "new"
    top.mkdir()
    write(new, b"new")
    (top / "way").symlink_to(elsewhere)
    before, time = snapshot(tmp_path), (elsewhere / "file").stat().st_mtime_ns
    with pytest.raises(AgentError, match="somebody else writes into the cache") as caught:
        VERBS[verb](new, top)
    assert caught.value.reason is Reason.DISK_ERROR
    assert snapshot(tmp_path) == before
    assert (elsewhere / "file").stat().st_mtime_ns == time


@pytest.mark.parametrize("verb", VERBS)
def test_real_directories_lead_there(tmp_path: Path, elsewhere: Path, verb: str) -> None:
    top, new = tmp_path / "top", tmp_path / "new"
    top.mkdir()
    write(new, b"new")
    elsewhere.rename(top / "way")
    before, time = snapshot(tmp_path), (top / "way/file").stat().st_mtime_ns
    VERBS[verb](new, top)
    changed = snapshot(tmp_path) != before or (top / "way/file").stat().st_mtime_ns != time
    assert changed is (verb != "look")


def test_the_mode_of_what_a_link_leads_to_is_not_set(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "link").symlink_to(elsewhere / "file")
    with pytest.raises(OSError, match="symbolic link"):
        FILES.set_mode(tmp_path / "link", 0o444)
    assert mode_of(elsewhere / "file") == 0o600


def test_a_directory_that_nobody_may_read_is_opened_again(tmp_path: Path) -> None:
    """As a maker with an odd umask leaves it, killed before it came to the mode."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made").chmod(0)
    FILES.make_directory(tmp_path / "made", 0o755)
    assert mode_of(tmp_path / "made") == 0o755


def test_a_file_that_is_not_there_has_no_version(tmp_path: Path) -> None:
    assert version_at(tmp_path / "no/file", tmp_path) is None
    assert version_at(tmp_path / "no/way/file", tmp_path / "no") is None
    write(tmp_path / "file", b"1")
    found = version_at(tmp_path / "file", tmp_path)
    os.utime(tmp_path / "file", (1, 1))
    assert version_at(tmp_path / "file", tmp_path) not in (None, found)
