"""The init container's one step, on a real directory: who owns what, and what is left alone."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from agent import layout
from agent.errors import AgentError, Reason
from agent.model import CacheKey
from agent.prepare import parse_owner, prepare
from agent.store import DIRECTORIES
from tests.edges.volume import UNSHARE, in_child, needs_mounts
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


# -- what another agent left --------------------------------------------------------------------

KEY = CacheKey("0123456789abcdef")
THEIRS = (1000, 2000)


def adopt(root: Path, state: Path) -> list[str]:
    return prepare(root, state, OWNER, require_dedicated=False, adopt=True)


def left(root: Path, files: dict[str, int], *, key: str = KEY) -> Path:
    """What the initializer of a Job leaves: files with these modes, of its user."""
    top = root / layout.MODELS / key
    for path, mode in files.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_bytes(b"x")
        (top / path).chmod(mode)
    for directory, _, names in os.walk(top):
        for path in (directory, *(f"{directory}/{name}" for name in names)):
            os.chown(path, *THEIRS, follow_symlinks=False)
    return top


def test_what_another_agent_left_changes_hands(root: Path, state: Path) -> None:
    top = left(root, {"config.json": 0o644, "a/b/weights": 0o600, ".cache/x": 0o664, "s": 0o4755})
    (top / "a").chmod(0o2770)
    written = {path: path.stat().st_mtime_ns for path in top.rglob("*") if path.is_file()}
    assert adopt(root, state) == []
    everything = [top, *top.rglob("*")]
    assert {owner_of(path) for path in everything} == {OWNER}
    assert {mode_of(path) for path in everything if path.is_dir()} == {0o755}
    modes = {str(path.relative_to(top)): mode_of(path) for path in written}
    assert modes == {"config.json": 0o644, "a/b/weights": 0o644, ".cache/x": 0o644, "s": 0o755}
    assert {path: path.stat().st_mtime_ns for path in written} == written, "or it were damage"


def test_without_being_told_to_nothing_changes_hands(root: Path, state: Path) -> None:
    top = left(root, {"config.json": 0o644})
    run(root, state)
    assert owner_of(top) == owner_of(top / "config.json") == THEIRS


def test_a_second_time_changes_nothing(root: Path, state: Path) -> None:
    top = left(root, {"config.json": 0o644, "a/w": 0o444})
    adopt(root, state)
    before = {path: path.stat().st_ctime_ns for path in [top, *top.rglob("*")]}
    assert adopt(root, state) == []
    assert {path: path.stat().st_ctime_ns for path in before} == before


def test_what_has_no_key_keeps_its_owner(root: Path, state: Path) -> None:
    """The models of KServe <= 0.17, and whatever people keep there."""
    top = left(root, {"config.json": 0o644}, key="llama-3")
    assert adopt(root, state) == []
    assert owner_of(top) == owner_of(top / "config.json") == THEIRS


@pytest.mark.parametrize("kind", ["file", "directory", "top"])
def test_no_link_in_it_is_followed(tmp_path: Path, root: Path, state: Path, kind: str) -> None:
    victim = tmp_path / "etc"
    victim.mkdir(mode=0o750)
    (victim / "shadow").write_text("x")
    (victim / "shadow").chmod(0o600)
    top = left(root, {"config.json": 0o644})
    if kind == "top":
        link = root / layout.MODELS / ("f" * 16)
        link.symlink_to(victim)
    elif kind == "directory":
        link = top / "weights"
        link.symlink_to(victim)
    else:
        link = top / "weights"
        link.symlink_to(victim / "shadow")
    (refused,) = adopt(root, state)
    assert "is neither a file nor a directory" in refused
    assert owner_of(victim) == owner_of(victim / "shadow") == (0, 0)
    assert (mode_of(victim), mode_of(victim / "shadow")) == (0o750, 0o600)
    assert owner_of(link) != OWNER
    assert owner_of(top / "config.json") == OWNER


@pytest.mark.parametrize("became", ["file", "directory"])
def test_nor_one_that_takes_a_name_after_it_was_looked_at(
    tmp_path: Path, root: Path, state: Path, became: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "etc"
    victim.mkdir()
    (victim / "shadow").write_text("x")
    top = left(root, {"a/w": 0o644, "config.json": 0o644})
    look = os.stat
    name, target = ("config.json", victim / "shadow") if became == "file" else ("a", victim)

    def slow(path: str, *, dir_fd: int | None = None, follow_symlinks: bool) -> os.stat_result:
        found = look(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        if path == name and dir_fd is not None:
            (top / name).rename(root / "aside")
            (top / name).symlink_to(target)
        return found

    monkeypatch.setattr("agent.prepare.os.stat", slow)
    (refused,) = adopt(root, state)
    assert name in refused
    assert owner_of(victim) == owner_of(victim / "shadow") == (0, 0)


def test_a_second_name_of_a_file_elsewhere_is_not_given_away(
    tmp_path: Path, root: Path, state: Path
) -> None:
    top = left(root, {"config.json": 0o644})
    victim = tmp_path / "shadow"
    victim.write_text("x")
    victim.chmod(0o600)
    os.link(victim, top / "weights")
    (refused,) = adopt(root, state)
    assert "has another name" in refused
    assert (owner_of(victim), mode_of(victim)) == ((0, 0), 0o600)


def test_odd_things_are_named_and_left(root: Path, state: Path) -> None:
    top = left(root, {"config.json": 0o644})
    os.mkfifo(top / "pipe")
    deep = top / "/".join("d" * 120)
    deep.mkdir(parents=True)
    refused = adopt(root, state)
    assert len(refused) == 2
    assert any("pipe" in line for line in refused)
    assert any("deep" in line for line in refused)
    assert owner_of(top / "config.json") == OWNER
    assert owner_of(top / "pipe") == owner_of(deep) == (0, 0)


@needs_mounts
def test_another_file_system_is_not_entered(root: Path, state: Path) -> None:
    in_child(_with_a_mount, root, state, wrap=UNSHARE)


def _with_a_mount(root: str, state: str) -> None:
    top = left(Path(root), {"config.json": 0o644})
    (top / "mounted").mkdir()
    options = ["-t", "tmpfs", "-o", "uid=1000", "tmpfs", str(top / "mounted")]
    subprocess.run(["mount", *options], check=True)
    (top / "mounted" / "file").touch()
    (refused,) = adopt(Path(root), Path(state))
    assert "another file system" in refused
    assert owner_of(top / "mounted" / "file") == (0, 0)
    assert owner_of(top / "config.json") == OWNER


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


def test_the_verb_adopts_and_names_what_it_could_not(localmodel: Machine, state: Path) -> None:
    top = left(localmodel.root, {"config.json": 0o644})
    (top / "link").symlink_to("/etc")
    done = localmodel.inline("prepare", "--adopt", "--state", str(state)).ok()
    assert done.stderr.startswith("warning: '0123456789abcdef/link' is neither")
    assert owner_of(top / "config.json") == (64000, 64000)
