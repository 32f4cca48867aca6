"""Plants bugs in `plan`, one at a time, and asks the tests: `python -m tests.core.mutate_plan`.

Once a release, and whenever `plan` or its tests change; too slow for every run. Exit status 1 if a
bug survives, or if a pattern is no longer in the source: then the bug is to be planted anew.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# ruff: noqa: E501 - a bug a line is easier to read than its wrapped form

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 300
SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Bug:
    """One replacement in plan.py. `old` must occur exactly once."""

    name: str
    old: str
    new: str


BUGS = (
    Bug("evicts what is wanted", "key not in self.desired\n                and", "True\n                and"),
    Bug("evicts what is used", "and key not in used\n", ""),
    Bug("evicts what is damaged", "and key not in self.actual.damaged\n", ""),
    Bug("evicts what a job works on", "and key not in self.actual.jobs\n                and entry", "and entry"),
    Bug("evicts the young", "and entry.sealed_at <= old\n", ""),
    Bug("spares what is just old enough", "entry.sealed_at <= old", "entry.sealed_at < old"),
    Bug("forgets the minimum age", "self.now - self.volume.min_age_seconds", "self.now"),
    Bug("evicts what frees nothing", "and entry.bytes > 0\n", ""),
    Bug("unknown use is no use", "return []\n        old", "used = frozenset()\n        old"),
    Bug("evicts the most recently used", "(entry.last_used, entry.sealed_at, entry.key)", "(-entry.last_used, entry.sealed_at, entry.key)"),
    Bug("evicts in the order of sealing", "(entry.last_used, entry.sealed_at, entry.key)", "(entry.sealed_at, entry.last_used, entry.key)"),
    Bug("evicts the largest first", "(entry.last_used, entry.sealed_at, entry.key)", "(-entry.bytes, entry.key)"),
    Bug("breaks ties of use by key", "(entry.last_used, entry.sealed_at, entry.key)", "(entry.last_used, entry.key)"),
    Bug("breaks ties by the order of a dict", "(entry.last_used, entry.sealed_at, entry.key)", "(entry.last_used, entry.sealed_at)"),
    Bug("evicts one more than needed", "if short <= 0:", "if short < 0:"),
    Bug("evicts one less than needed", "if short <= 0:", "if short <= 5:"),
    Bug("evicts half", "if short > sum(entry.bytes for entry in victims):", "if short > sum(entry.bytes for entry in victims) and not victims:"),
    Bug("evicts before it knows whether it suffices", "        if short > sum(entry.bytes for entry in victims):\n", "        if short > sum(entry.bytes for entry in victims):\n            self._evict(victims)\n"),
    Bug("blocks what would just fit", "if short > sum(entry.bytes for entry in victims):", "if short >= sum(entry.bytes for entry in victims) > 0:"),
    Bug("gives nothing back after an eviction", "self.victims.remove(entry)\n            self.room += entry.bytes", "self.victims.remove(entry)"),
    Bug("evicts the same twice", "self.victims.remove(entry)", "pass"),
    Bug("says the wrong size of a victim", "Evict(entry.key, entry.bytes)", "Evict(entry.key, entry.bytes + 1)"),
    Bug("never drains", "if self.room >= 0:\n            return", "return"),
    Bug("drains at all times", "if self.room >= 0:\n            return", "pass"),
    Bug("drains to the high mark only", "slack - self.room", "-self.room"),
    Bug("drains from the low mark", "self._evict(_just_enough(self.victims, slack - self.room))", "self._evict(_just_enough(self.victims, slack))"),
    Bug("reserves nothing for what runs", "- reserved + volume", "+ volume"),
    Bug("reserves for what is cancelled", "for key, job in actual.jobs.items() if key in desired", "for key, job in actual.jobs.items()"),
    Bug("reserves what is written already", "bounds = (job.remaining,", "bounds = (job.total,"),
    Bug("reserves what is only hashed again", "None if ingest is None else ingest.remaining)", "None)"),
    Bug("reserves nothing before a job says its size", "default=0)", "default=0) if job.total is not None else 0"),
    Bug("forgets what is being unlinked", " + volume.reclaiming", ""),
    Bug("counts what is being unlinked twice", "+ volume.reclaiming", "+ 2 * volume.reclaiming"),
    Bug("knows no high mark", "int(volume.capacity * volume.high)", "volume.capacity"),
    Bug("confuses the marks", "int(volume.capacity * volume.high)", "int(volume.capacity * volume.low)"),
    Bug("does not count what it begins", "self.room -= size", "pass"),
    Bug("fetches the total again", "self._fetch(key, ingest.remaining)", "self._fetch(key, ingest.total)"),
    Bug("asks room for the total", "short = ingest.remaining - self.room", "short = ingest.total - self.room"),
    Bug("lets what is here wait for room", "if ingest.remaining == 0:", "if False:"),
    Bug("blocks what fills the volume exactly", "if ingest.total > self.ceiling:", "if ingest.total >= self.ceiling:"),
    Bug("never says that it is too large", "if ingest.total > self.ceiling:", "if False:"),
    Bug("serves the lowest priority first", "(-want.priority, want.key)", "(want.priority, want.key)"),
    Bug("serves in the order of keys", "(-want.priority, want.key)", "want.key"),
    Bug("serves in the order of a dict", "(-want.priority, want.key)", "-want.priority"),
    Bug("has a slot too many", "max(0, volume.max_fetches - len(running))", "1 + max(0, volume.max_fetches - len(running))"),
    Bug("knows no bound of slots", "if self.slots == 0:", "if False:"),
    Bug("counts slots of cancelled jobs", "volume.max_fetches - len(running)", "volume.max_fetches - len(actual.jobs)"),
    Bug("a listing takes no slot", "self.slots -= 1\n            self.actions.append(Resolve", "self.actions.append(Resolve"),
    Bug("a fetch takes no slot", "self.slots -= 1\n        self.actions.append(Fetch", "self.actions.append(Fetch"),
    Bug("stops at the first that does not fit", "for want in self._missing_wants():\n", "for want in self._missing_wants():\n            if self.blocked:\n                break\n"),
    Bug("begins what runs already", "key not in self.actual.jobs and key not in self.actual.entries", "key not in self.actual.entries"),
    Bug("begins what is here already", "key not in self.actual.jobs and key not in self.actual.entries", "key not in self.actual.jobs"),
    Bug("cancels what is wanted", "if key not in self.desired:\n                self.actions.append(Cancel", "if True:\n                self.actions.append(Cancel"),
    Bug("never cancels", "self._cancel_the_unwanted()\n        self", "self"),
    Bug("cancels in any order", "sorted(self.actual.jobs)", "self.actual.jobs"),
    Bug("leaves wrong bytes on offer while they are used", "if key in self.actual.entries and key not in self.actual.jobs:", "if key in self.actual.entries and key not in self.actual.jobs | (self.actual.in_use or set()):"),
    Bug("leaves wrong bytes on offer while unwanted", "if key in self.actual.entries and key not in self.actual.jobs:", "if key in self.desired and key in self.actual.entries and key not in self.actual.jobs:"),
    Bug("takes off offer what a job mends", "if key in self.actual.entries and key not in self.actual.jobs:", "if key in self.actual.entries:"),
    Bug("keeps what left", "        self._remove_what_left()\n", ""),
    Bug("removes what left and is wanted again", "self.actual.left - set(self.desired) -", "self.actual.left -"),
    Bug("removes what left while a job is on it", "- set(self.desired) - set(self.actual.jobs)):", "- set(self.desired)):"),
    Bug("removes what left from under its pods", "used is None or key in used or key", "used is None or key"),
    Bug("removes what left of unknown use", "if used is None or key in used or", "if key in (used or ()) or"),
    Bug("removes what left while it is damaged", " or key in used or key in self.actual.damaged:", " or key in used:"),
    Bug("spares what left and is young", "            if entry is not None:\n", "            if entry is not None and entry.sealed_at <= self.now - self.volume.min_age_seconds:\n"),
    Bug("spares what left and frees nothing", "            if entry is not None:\n", "            if entry is not None and entry.bytes:\n"),
    Bug("evicts what left twice", "[victim for victim in self.victims if victim.key != key]", "self.victims"),
    Bug("does not count the room of what left", "                self.room += entry.bytes\n", ""),
    Bug("says the wrong size of what left", "self.actions.append(Evict(key, entry.bytes))", "self.actions.append(Evict(key, 0))"),
    Bug("never abandons", "elif key in self.actual.ingests or key in self.actual.begun:", "elif False:"),
    Bug("abandons what is not here", "elif key in self.actual.ingests or key in self.actual.begun:", "else:"),
    Bug("abandons beside an eviction", "            elif key in self.actual.ingests or", "            if key in self.actual.ingests or"),
    Bug("leaves what was begun by a listing that is not used again", " or key in self.actual.begun:", ":"),
    Bug("evicts what nobody said may go", "                and key not in self.actual.kept\n", ""),
    Bug("abandons what was never asked for", "sorted(self.actual.left - set", "sorted((self.actual.left | set(self.actual.ingests)) - set"),
    Bug("removes what left in any order", "in sorted(self.actual.left - set(self.desired) - set(self.actual.jobs)):", "in self.actual.left - set(self.desired) - set(self.actual.jobs):"),
    Bug("never backs off", "attempt.retry_at > self.now", "False"),
    Bug("backs off for ever", "attempt is not None and attempt.retry_at > self.now", "attempt is not None"),
    Bug("backs off a moment too long", "attempt.retry_at > self.now", "attempt.retry_at >= self.now"),
    Bug("wakes at the latest retry", "self.wake_at = min(self.wake_at, attempt.retry_at)", "self.wake_at = attempt.retry_at"),
    Bug("never wakes", "self.wake_at = min(self.wake_at, attempt.retry_at)", "pass"),
    Bug("wakes at the end of time", "self.wake_at if self.wake_at < inf else None", "self.wake_at"),
    Bug("forgets why", "self.blocked[key] = Block(why=why, message=message)", "pass"),
)  # fmt: skip


def tests_fail(plan: str) -> bool:
    """Whether the tests of `plan` notice that its source is this one."""
    with TemporaryDirectory() as name:
        copy = Path(name)
        for package in ("agent", "tests/core"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, copy / package, ignore=ignored)
        for file in ("pyproject.toml", "tests/__init__.py"):
            shutil.copy(ROOT / file, copy / file)
        (copy / "agent" / "plan.py").write_text(plan)
        command = (sys.executable, "-m", "pytest", "tests/core/test_plan.py", "-x", "-q")
        options = ("-p", "no:cacheprovider", "--hypothesis-seed=0")
        done = subprocess.run(
            [*command, *options],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": name, "PLAN_EXAMPLES": str(EXAMPLES)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    # Anything but "all passed" and "tests failed" says nothing about the bug.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest cannot run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def verdict(source: str, bug: Bug) -> str:
    if source.count(bug.old) != 1:
        return f"pattern occurs {source.count(bug.old)} times"
    try:
        return "caught" if tests_fail(source.replace(bug.old, bug.new)) else "survived"
    except subprocess.TimeoutExpired:
        return "caught"  # it does not come to rest


def main(names: Sequence[str]) -> int:
    """All bugs, or those whose name holds one of the words."""
    source = (ROOT / "agent" / "plan.py").read_text()
    bugs = [bug for bug in BUGS if not names or any(name in bug.name for name in names)]
    if tests_fail(source):
        print("the tests fail without a planted bug")
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = []
        for bug, found in zip(bugs, pool.map(lambda bug: verdict(source, bug), bugs), strict=True):
            print(f"{found:<24}{bug.name}", flush=True)
            verdicts.append(found)
    caught = verdicts.count("caught")
    print(f"{caught} of {len(bugs)} planted bugs caught")
    return 0 if caught == len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
