"""Is this the disk we think it is? (design D6)

A directory looks the same whether its disk is mounted or not. Writing terabytes of models into the
mount point of a disk that is away fills the disk that kubelet lives on. So the volume carries its
identity, and this machine remembers which volume it had and whether that was a disk of its own.

    on the volume   on the machine     now                      verdict
    X               X                  any                      it is X
    Y or nothing    nothing            any                      first start here: it is Y, or new
    Y or nothing    X, was dedicated   the machine's own disk   DiskMissing: write nothing
    Y or nothing    X, was dedicated   a disk of its own        another disk: it is Y, or new
    Y or nothing    X, was shared      any                      emptied or replaced: the same

With `--require-dedicated` the machine's own disk is DiskMissing whatever the notes say.
"""

import json
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from agent import layout
from agent.errors import AgentError, Reason
from agent.files import disk_errors

_MACHINE = Path("/etc/hosts")
"""In a pod kubelet makes this file on its own file system; elsewhere it is on the root's."""


def on_machine_disk(root: Path) -> bool:
    """Whether the cache shares a file system with kubelet, or with the machine's own files."""
    return root.stat().st_dev == _MACHINE.stat().st_dev


@dataclass(frozen=True, slots=True)
class _Identity:
    id: str
    dedicated: bool


class Volume:
    """The identity of the volume at `root`, as the state directory of this machine remembers it."""

    def __init__(
        self, root: Path, state: Path, *, shared: Callable[[Path], bool] = on_machine_disk
    ) -> None:
        self._root = root
        self._on_volume = root / layout.VOLUME
        self._on_machine = state / layout.KNOWN_VOLUME
        self._shared = shared

    def check(self, *, require_dedicated: bool = False) -> None:
        """Raise DiskMissing where nothing must be written now. Writes nothing itself."""
        with disk_errors(f"look at the cache directory {self._root}"):
            found, known = _read(self._on_volume), _read(self._on_machine)
            # A note of the same volume proves it; another one may have been written to the mount
            # point before the disk was ever mounted.
            same = found is not None and known is not None and found.id == known.id
            was_dedicated = known is not None and known.dedicated and not same
            there = next(path for path in (self._root, *self._root.parents) if path.exists())
            if (was_dedicated or require_dedicated) and self._shared(there):
                why = "its disk is not mounted" if was_dedicated else "--require-dedicated is set"
                raise AgentError(
                    Reason.DISK_MISSING,
                    f"{self._root} is on this machine's own file system, and {why}",
                )

    def remember(self) -> None:
        """Make the volume and this machine know each other. After `check`, under the lock."""
        with disk_errors(f"identify the volume {self._root}"):
            found = _read(self._on_volume)
            name = found.id if found else str(uuid.uuid4())
            now = _Identity(id=name, dedicated=not self._shared(self._root))
            for path in (self._on_volume, self._on_machine):
                if _read(path) != now:
                    _write(path, now)


def _read(path: Path) -> _Identity | None:
    """None where there is no such note, or none that can be understood."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return _Identity(id=str(raw["id"]), dedicated=bool(raw["dedicated"]))
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return None


def _write(path: Path, identity: _Identity) -> None:
    aside = path.with_name(f"{path.name}.new")  # begins as the note does: known to be ours
    aside.write_text(json.dumps(asdict(identity)) + "\n", encoding="utf-8")
    aside.chmod(layout.NOTE_MODE)
    aside.replace(path)
