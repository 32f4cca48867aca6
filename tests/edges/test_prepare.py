"""The init container's one step, on a real directory: who owns what, and what is left alone."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from agent import layout
from agent.errors import AgentError, Reason
from agent.model import CacheKey
from agent.prepare import parse_owner, prepare
from agent.store import DIRECTORIES
from tests.machine import Machine, everything_in

OWNER = (64000, 64001)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="NOT TESTED, only root may give a directory away"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "var" / "lib" / "agent"


def owner_of(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def tops(root: Path, state: Path) -> dict[Path, int]:
    return {
        root: 0o755,
        root / layout.HIDDEN: 0o755,
        state: 0o700,
        **{root / name: mode for name, mode in DIRECTORIES},
    }


def run(root: Path, state: Path, owner: tuple[int, int] = OWNER) -> None:
    prepare(root, state, owner, require_dedicated=False)


def check(root: Path, state: Path, owner: tuple[int, int] = OWNER) -> None:
    for path, mode in tops(root, state).items():
        assert path.is_dir()
        assert (owner_of(path), mode_of(path)) == (owner, mode), path


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_fresh_node_needs_no_human(root: Path, state: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        run(root, state)
    finally:
        os.umask(before)
    check(root, state)
    assert everything_in(root) == {str(path) for path in tops(root, state) if path != state} - {
        str(root)
    }
    assert not list(state.iterdir()), "no file is written"


def test_again_changes_nothing(root: Path, state: Path) -> None:
    run(root, state)
    before = {path: path.stat().st_ctime_ns for path in tops(root, state)}
    run(root, state)
    assert {path: path.stat().st_ctime_ns for path in tops(root, state)} == before


def test_what_kubelet_made_and_another_user_left_is_set_right(root: Path, state: Path) -> None:
    root.mkdir(mode=0o700)
    state.mkdir(parents=True)
    state.chmod(0o777)
    (root / layout.MODELS).mkdir()
    (root / layout.MODELS).chmod(0o2775)  # as an fsGroup leaves it
    os.chown(root / layout.MODELS, 1, 1)
    run(root, state)
    check(root, state)


def test_files_at_the_top_change_hands_and_nothing_below_it_does(root: Path, state: Path) -> None:
    """The index, the notes and the manifests are one agent's; models may be terabytes."""
    run(root, state, (1, 1))
    key = CacheKey("0123456789abcdef")
    top = [state / layout.INDEX, root / layout.VOLUME, root / layout.manifest(key)]
    model, begun = root / layout.MODELS / key, root / layout.INGEST / key
    below = [model, model / "weights", begun, begun / "partial"]
    for directory in (model, begun):
        directory.mkdir()
    for file in (*top, model / "weights", begun / "partial"):
        file.write_text("x")
    for path in (*top, *below):
        os.chown(path, 1, 1)
    modes = {path: mode_of(path) for path in (*top, *below)}
    run(root, state)
    check(root, state)
    assert {owner_of(path) for path in top} == {OWNER}
    assert {owner_of(path) for path in below} == {(1, 1)}
    assert {path: mode_of(path) for path in (*top, *below)} == modes


def test_files_that_are_not_ours_keep_their_owner(root: Path, state: Path) -> None:
    run(root, state, (1, 1))
    theirs = [root / "lost-and-found.txt", root / layout.MODELS / "notes.txt"]
    for path in theirs:
        path.write_text("x")
    run(root, state)
    assert {owner_of(path) for path in theirs} == {(0, 0)}


@pytest.mark.parametrize("name", [".", layout.HIDDEN, layout.MODELS, layout.MANIFESTS, "state"])
def test_a_link_is_not_followed(tmp_path: Path, root: Path, state: Path, name: str) -> None:
    """Who could plant one would be given any directory of the node."""
    victim = tmp_path / "etc"
    victim.mkdir(mode=0o750)
    (victim / "passwd").touch()
    link = state if name == "state" else root / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir():
        link.rmdir()
    link.symlink_to(victim)
    with pytest.raises(AgentError) as caught:
        run(root, state)
    assert str(link) in caught.value.message
    assert owner_of(victim) == owner_of(victim / "passwd") == (0, 0)
    assert mode_of(victim) == 0o750
    assert everything_in(victim) == {str(victim / "passwd")}


def test_links_among_the_files_keep_their_target(tmp_path: Path, root: Path, state: Path) -> None:
    run(root, state)
    victim = tmp_path / "shadow"
    victim.touch()
    (state / "link").symlink_to(victim)
    (root / layout.MANIFESTS / "link").symlink_to(victim)
    run(root, state)
    assert owner_of(victim) == (0, 0)


def test_a_file_in_the_way_is_named(root: Path, state: Path) -> None:
    root.mkdir()
    (root / layout.MODELS).write_text("x")
    with pytest.raises(AgentError) as caught:
        run(root, state)
    assert layout.MODELS in caught.value.message
    assert (root / layout.MODELS).read_text() == "x"


def forget_the_disk(root: Path, state: Path) -> None:
    """As after a boot at which the disk did not come: the machine remembers one of its own."""
    state.mkdir(parents=True, exist_ok=True)
    (state / layout.KNOWN_VOLUME).write_text('{"id": "X", "dedicated": true}')


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Whatever is below `tmp_path` is the machine's own file system."""
    machine = tmp_path / "hosts"
    machine.touch()
    monkeypatch.setattr("agent.volume._MACHINE", machine)
    return machine


def test_where_the_disk_is_away_nothing_is_made(
    tmp_path: Path, root: Path, state: Path, on_machine: Path
) -> None:
    forget_the_disk(root, state)
    before = everything_in(tmp_path)
    with pytest.raises(AgentError) as caught:
        run(root, state)
    assert caught.value.reason is Reason.DISK_MISSING
    assert everything_in(tmp_path) == before
    assert owner_of(state) == (0, 0)
    shutil.rmtree(state)
    with pytest.raises(AgentError) as caught:
        prepare(root, state, OWNER, require_dedicated=True)
    assert caught.value.reason is Reason.DISK_MISSING
    assert not root.exists()
    assert not state.exists()


@pytest.mark.parametrize(
    ("text", "owner"),
    [("64000", (64000, 64000)), ("64000:0", (64000, 0)), ("0:5", (0, 5))],
)
def test_owners(text: str, owner: tuple[int, int]) -> None:
    assert parse_owner(text) == owner


@pytest.mark.parametrize("text", ["", "root", "1:", ":1", "-1", "1:2:3", " 1", "1\n", "9" * 11])
def test_an_owner_is_a_number(text: str) -> None:
    with pytest.raises(AgentError) as caught:
        parse_owner(text)
    assert caught.value.reason is Reason.INVALID_SPEC


# -- the verb -----------------------------------------------------------------------------------


def test_the_verb_prepares_and_says_nothing(localmodel: Machine, state: Path) -> None:
    done = localmodel("prepare", "--state", str(state), "--owner", "64000:64001").ok()
    assert (done.stdout, done.stderr) == ("", "")
    check(localmodel.root, state)


def test_the_verb_warns_of_a_missing_disk_and_lets_the_agent_say_it(
    localmodel: Machine, state: Path, on_machine: Path
) -> None:
    forget_the_disk(localmodel.root, state)
    done = localmodel.inline("prepare", "--state", str(state)).ok()
    assert done.stderr.startswith("warning: ")
    assert "nothing was made" in done.stderr
    assert not localmodel.root.exists()


def test_the_verb_refuses_an_owner_by_name(localmodel: Machine) -> None:
    done = localmodel.inline("prepare", "--owner", "nobody")
    assert done.code != 0
    assert "64000:64000" in done.stderr
    assert not localmodel.root.exists()
