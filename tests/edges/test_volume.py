"""Whose disk is it: every row of the table of `agent.volume`, on directories and on real disks."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import layout, volume
from agent.errors import AgentError, Reason
from agent.volume import Volume
from tests.machine import everything_in

ON_MACHINE = True
OF_ITS_OWN = False


class Place:
    """A cache and a state directory; where the cache is, a test says."""

    def __init__(self, home: Path) -> None:
        self.root = home / "cache"
        self.state = home / "state"
        self.on_machine = False
        self.home = home
        (self.root / layout.HIDDEN).mkdir(parents=True)
        self.state.mkdir()

    @property
    def volume(self) -> Volume:
        return Volume(self.root, self.state, shared=lambda path: self.on_machine)

    @property
    def notes(self) -> tuple[str | None, str | None]:
        """Who the volume says it is, and who the machine remembers."""
        return _id(self.root / layout.VOLUME), _id(self.state / layout.KNOWN_VOLUME)

    def note(self, path: Path, name: str, *, dedicated: bool) -> None:
        path.write_text(json.dumps({"id": name, "dedicated": dedicated}))

    def on_volume(self, name: str) -> None:
        self.note(self.root / layout.VOLUME, name, dedicated=True)

    def known(self, name: str, *, dedicated: bool) -> None:
        self.note(self.state / layout.KNOWN_VOLUME, name, dedicated=dedicated)

    def is_missing(self, *, require_dedicated: bool = False) -> bool:
        """Whether DiskMissing is the verdict; whatever it is, nothing is written."""
        before = everything_in(self.home)
        found: list[AgentError] = []
        try:
            self.volume.check(require_dedicated=require_dedicated)
        except AgentError as error:
            found.append(error)
        assert everything_in(self.home) == before
        assert all(error.reason is Reason.DISK_MISSING for error in found), found
        assert all(str(self.root) in error.message for error in found)
        return bool(found)


def _id(path: Path) -> str | None:
    return json.loads(path.read_text())["id"] if path.exists() else None


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "home")


@pytest.mark.parametrize("now", [ON_MACHINE, OF_ITS_OWN])
@pytest.mark.parametrize(
    ("known", "dedicated"), [("X", True), ("X", False), ("", False), ("Y", False)]
)
def test_the_volume_says_who_it_is_and_so_it_is(
    place: Place, known: str, dedicated: bool, now: bool
) -> None:
    place.on_volume("X")
    if known:
        place.known(known, dedicated=dedicated)
    place.on_machine = now
    assert not place.is_missing()
    place.volume.remember()
    assert place.notes == ("X", "X")
    # From now on the machine knows whether it is a disk of its own.
    (place.root / layout.VOLUME).unlink()
    place.on_machine = True
    assert place.is_missing() == (now is OF_ITS_OWN)


@pytest.mark.parametrize("found", ["", "Y"])
def test_only_its_own_note_proves_a_dedicated_disk(place: Place, found: str) -> None:
    """Another one may have been written to the mount point before the disk was ever mounted."""
    place.known("X", dedicated=True)
    if found:
        place.on_volume(found)
    place.on_machine = True
    assert place.is_missing()
    place.on_machine = False
    assert not place.is_missing()
    place.volume.remember()
    ours, machines = place.notes
    assert ours == machines != "X"
    assert not found or ours == found


@pytest.mark.parametrize("now", [ON_MACHINE, OF_ITS_OWN])
def test_a_first_start_makes_a_new_volume(place: Place, now: bool) -> None:
    place.on_machine = now
    assert not place.is_missing()
    place.volume.remember()
    ours, machines = place.notes
    assert ours == machines
    assert ours
    for path in (place.root / layout.VOLUME, place.state / layout.KNOWN_VOLUME):
        assert path.stat().st_mode & 0o777 == layout.NOTE_MODE
    before = everything_in(place.home)
    place.volume.remember()
    assert place.notes == (ours, ours)
    assert everything_in(place.home) == before, "nothing half written is left"


def test_a_dedicated_disk_that_is_away_is_missing(place: Place) -> None:
    place.known("X", dedicated=True)
    place.on_machine = True
    assert place.is_missing()


def test_a_new_dedicated_disk_begins_again(place: Place) -> None:
    """An instance that was stopped and started has an empty one."""
    place.known("X", dedicated=True)
    assert not place.is_missing()
    place.volume.remember()
    ours, machines = place.notes
    assert ours == machines != "X"


@pytest.mark.parametrize("now", [ON_MACHINE, OF_ITS_OWN])
def test_a_shared_one_that_was_emptied_begins_again(place: Place, now: bool) -> None:
    place.known("X", dedicated=False)
    place.on_machine = now
    assert not place.is_missing()
    place.volume.remember()
    assert place.notes[0] == place.notes[1] != "X"


def test_a_first_boot_may_insist_on_a_disk_of_its_own(place: Place) -> None:
    place.on_machine = True
    assert place.is_missing(require_dedicated=True)
    place.on_machine = False
    assert not place.is_missing(require_dedicated=True)
    place.volume.remember()
    place.on_machine = True  # whatever the notes say
    assert place.is_missing(require_dedicated=True)
    assert not place.is_missing()


def test_before_the_directory_is_made_its_parent_tells_where_it_would_be(place: Place) -> None:
    place.known("X", dedicated=True)
    asked: list[Path] = []

    def shared(path: Path) -> bool:
        asked.append(path)
        return True

    absent = place.home / "not" / "made" / "yet"
    with pytest.raises(AgentError) as caught:
        Volume(absent, place.state, shared=shared).check()
    assert caught.value.reason is Reason.DISK_MISSING
    assert asked == [place.home]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"X"', "{}", '{"id": "X"}', '{"dedicated": true}', "\ufffd\0", "7"],
)
def test_a_damaged_note_is_none(place: Place, text: str) -> None:
    # On the machine: it remembers nothing, so this is a first start.
    (place.state / layout.KNOWN_VOLUME).write_text(text)
    place.on_machine = True
    assert not place.is_missing()
    # On the volume: it does not say who it is, and the machine remembers a disk.
    place.known("X", dedicated=True)
    (place.root / layout.VOLUME).write_text(text)
    assert place.is_missing()
    # Both are mended.
    place.on_machine = False
    place.volume.remember()
    assert place.notes[0] == place.notes[1] is not None


def test_a_note_that_is_no_text_is_none(place: Place) -> None:
    (place.root / layout.VOLUME).write_bytes(b"\xff\xfe\x00")
    place.known("X", dedicated=True)
    place.on_machine = True
    assert place.is_missing()


def test_a_note_that_cannot_be_read_is_no_verdict(place: Place) -> None:
    """Nobody can tell, so nothing is begun: neither here nor on another disk."""
    (place.root / layout.VOLUME).mkdir()
    with pytest.raises(AgentError) as caught:
        place.volume.check()
    assert caught.value.reason is Reason.DISK_ERROR


# -- real file systems ---------------------------------------------------------------------------


def test_a_disk_is_one_of_its_own_or_the_machines(
    mount: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, machine = mount("1m"), tmp_path / "hosts"
    machine.write_text("127.0.0.1 localhost\n")
    assert not volume.on_machine_disk(disk)  # whatever the machine's own is
    monkeypatch.setattr(volume, "_MACHINE", machine)
    assert volume.on_machine_disk(tmp_path)
    assert not volume.on_machine_disk(disk)


def test_a_real_disk_that_goes_and_another_that_comes(
    mount: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, state = tmp_path / "hosts", tmp_path / "state"
    machine.touch()
    state.mkdir()
    monkeypatch.setattr(volume, "_MACHINE", machine)
    disk = mount("1m")
    (disk / layout.HIDDEN).mkdir()
    found = Volume(disk, state)
    found.check(require_dedicated=True)
    found.remember()
    first = _id(disk / layout.VOLUME)
    subprocess.run(["umount", disk], check=True)
    with pytest.raises(AgentError) as caught:
        found.check()
    assert caught.value.reason is Reason.DISK_MISSING
    assert not list(disk.iterdir())
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    (disk / layout.HIDDEN).mkdir()
    found.check()
    found.remember()
    assert _id(disk / layout.VOLUME) == _id(state / layout.KNOWN_VOLUME) != first


def test_a_full_disk_is_said_to_be_full(mount: Callable[..., Path], tmp_path: Path) -> None:
    disk = mount("64k")
    (disk / layout.HIDDEN).mkdir()
    with pytest.raises(OSError):
        (disk / "filler").write_bytes(bytes(2**17))
    with pytest.raises(AgentError) as caught:
        Volume(disk, tmp_path).remember()
    assert caught.value.reason is Reason.DISK_FULL
    assert _id(tmp_path / layout.KNOWN_VOLUME) is None
