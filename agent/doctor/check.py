"""What a check is, and what it is given to look at."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from agent import layout
from agent.config import Settings
from agent.layout import is_one_line

_HIDDEN = "[not shown]"
_SHORTEST = 6  # a shorter one is nobody's secret, and its removal would eat words


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's: what was seen, and what to do about it where there is something."""

    name: str
    level: Level
    seen: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The machine as it is now. `mounts` and `locks` are the kernel's texts."""

    settings: Settings
    environment: Mapping[str, str]
    now: float
    mounts: str = ""
    locks: str = ""

    @property
    def root(self) -> Path:
        return self.settings.root

    @property
    def state(self) -> Path:
        return self.settings.state_directory

    @property
    def of_a_node(self) -> bool:
        return self.settings.node_name is not None

    @property
    def in_a_cluster(self) -> bool:
        return self.of_a_node or bool(self.environment.get("KUBERNETES_SERVICE_HOST"))


def worst(problems: list[tuple[Level, str, str]]) -> tuple[Level, str, str]:
    """One level, text and advice of several."""
    order = list(Level)
    level = max((level for level, _, _ in problems), key=order.index, default=OK)
    texts = dict.fromkeys(seen for _, seen, _ in problems if seen)
    advice = dict.fromkeys(advice for _, _, advice in problems if advice)
    return level, ", ".join(texts), ", ".join(advice)


def some(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def there(path: Path) -> Path:
    """It, or what is nearest above it."""
    return next(found for found in (path, *path.parents) if found.exists())


def may_write(path: Path) -> bool:
    """As this process is now: no file system that is mounted read-only may be written."""
    return os.access(path, os.W_OK | os.X_OK, effective_ids=True)


def holder(scene: Scene) -> int | None:
    """The process that holds the volume's lock, as far as this one can see; the lock is not tried:
    an agent that starts in that moment would be refused.
    """
    held = {}
    for line in scene.locks.splitlines():
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK":
            held[fields[5]] = int(fields[4])
    for path in (scene.root / layout.HIDDEN, scene.root / layout.LOCK):
        try:
            found = path.lstat()
            device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        except OSError:
            continue
        if (process := held.get(f"{device}:{found.st_ino}")) is not None:
            return process
        for name, process in held.items():  # btrfs has other device numbers there than in stat
            if name.endswith(f":{found.st_ino}") and str(process) == _noted(scene):
                return process
    return None


def _noted(scene: Scene) -> str:
    try:
        return (scene.root / layout.LOCK).read_text(errors="replace").strip()
    except OSError:
        return ""


# -- what must not be said ----------------------------------------------------------------------


def without(check: Check, secrets: frozenset[str]) -> Check:
    """Fit for a terminal and a log: one line, and none of the secrets of this machine."""
    return replace(check, seen=_fit(check.seen, secrets), advice=_fit(check.advice, secrets))


def _fit(text: str, secrets: frozenset[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    text = re.sub(r"(\w+://)[^/@\s]+@", rf"\1{_HIDDEN}@", text)
    text = " ".join(text.split())[:1000]
    return text if is_one_line(text) else ascii(text)[1:-1]


def secrets_in(texts: list[str]) -> frozenset[str]:
    """The secrets in the values of variables and the texts of token files."""
    found = {text.strip() for text in texts}
    found |= {line.strip() for text in texts for line in text.splitlines()}
    return frozenset(secret for secret in found if len(secret) >= _SHORTEST)
