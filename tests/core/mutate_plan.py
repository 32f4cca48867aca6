"""Plants bugs in `plan`, one at a time, and asks the tests: `python -m tests.core.mutate_plan`.

Once a release, and whenever `plan` or its tests change; too slow for every run. Exit status 1 if a
bug survives, or if a pattern is no longer in the source: then the bug is to be planted anew.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# ruff: noqa: E501 - a bug a line is easier to read than its wrapped form

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = (20, 300)
"""Of each property, in two rounds: most bugs do not see the second."""
SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Bug:
    """One replacement in plan.py or victims.py. `old` must occur exactly once in the two."""

    name: str
    old: str
    new: str


BUGS = (
    Bug("evicts what is wanted", "if want is not None and not want.on_demand:\n", "if False:\n"),
    Bug("evicts what is used", "    if key in actual.in_use:\n        return Kept.IN_USE\n", ""),
    Bug("evicts what somebody waits for", "    if key in actual.demanded:\n        return Kept.DEMANDED\n", ""),
    Bug("evicts what is damaged", "    if key in actual.damaged:\n        return Kept.DAMAGED\n", ""),
    Bug("evicts what a job works on", "if key in actual.jobs or key in actual.staged:", "if key in actual.staged:"),
    Bug("evicts what a staged revision is to replace", "if key in actual.jobs or key in actual.staged:", "if key in actual.jobs:"),
    Bug("evicts the young", "if 0 <= now - entry.sealed_at < volume.min_age_seconds:", "if False:"),
    Bug("spares what is just old enough", "if 0 <= now - entry.sealed_at < volume.min_age_seconds:", "if 0 <= now - entry.sealed_at <= volume.min_age_seconds:"),
    Bug("evicts what frees nothing", "if entry.bytes > 0 and keeps(", "if keeps("),
    Bug("unknown use is no use", "    if actual.in_use is None:\n        return Kept.UNKNOWN_USE\n", "    if actual.in_use is None:\n        return None\n"),
    Bug("evicts what an operator pinned", "if key in actual.pinned or (want", "if (want"),
    Bug("evicts what its cache pinned", " or (want is not None and want.pinned):", ":"),
    Bug("evicts what nobody said may go", "    if key in actual.kept:\n        return Kept.UNCONFIRMED\n", ""),
    Bug("evicts the most recently used", "(entry.last_used, entry.sealed_at, key)", "(-entry.last_used, entry.sealed_at, key)"),
    Bug("evicts in the order of sealing", "(entry.last_used, entry.sealed_at, key)", "(entry.sealed_at, entry.last_used, key)"),
    Bug("evicts the largest first", "(entry.last_used, entry.sealed_at, key)", "(-entry.bytes, 0, key)"),
    Bug("breaks ties of use by key", "(entry.last_used, entry.sealed_at, key)", "(entry.last_used, 0, key)"),
    Bug("breaks ties by the order of a dict", "for *_, key in ranked", "for *_, key in sorted(ranked[::-1], key=lambda item: item[:2])"),
    Bug("evicts what is whole before what is begun", "return [*_partial(desired, actual), *whole]", "return [*whole, *_partial(desired, actual)]"),
    Bug("never gives up what is begun", "return [*_partial(desired, actual), *whole]", "return list(whole)"),
    Bug("gives up what is begun of unknown use", "if actual.in_use is None:  # a pod may be reading what was withdrawn to be mended\n        return []", "if actual.in_use is None:\n        actual = __import__('dataclasses').replace(actual, in_use=frozenset())"),
    Bug("gives up what is begun and wanted", " and (key not in desired or desired[key].on_demand)", ""),
    Bug("gives up what is begun and waited for", "needed = actual.in_use | actual.demanded | actual.kept", "needed = actual.in_use | actual.kept"),
    Bug("gives up what is begun and nobody said may go", "| actual.demanded | actual.kept | actual.pinned", "| actual.demanded | actual.pinned"),
    Bug("gives up what a job brings", "needed |= actual.jobs.keys() | actual.entries.keys()", "needed |= actual.entries.keys()"),
    Bug("gives up what is staged", "needed |= actual.jobs.keys() | actual.entries.keys()", "needed |= actual.jobs.keys()"),
    Bug("counts what is shared as freed", "            if self._holders[file] > 0:\n                freed -= file[1]\n", ""),
    Bug("never frees what was shared", "if self._holders[file] > 0:\n                freed", "if True:\n                freed"),
    Bug("counts what is shared twice", "size * (holders - 1)", "0 * (holders - 1)"),
    Bug("evicts in vain", "return [v for v in found if v in chosen or not trial._in_vain(v)], freed", "return found, freed"),
    Bug("evicts one more than needed", "if freed >= short:", "if freed > short:"),
    Bug("evicts one less than needed", "if freed >= short:", "if freed + 5 >= short:"),
    Bug("evicts half", "if need - self.room > freed:", "if need - self.room > freed and not chosen:"),
    Bug("evicts before it knows whether it suffices", "        if need - self.room > freed:\n", "        if need - self.room > freed:\n            self._evict(chosen)\n"),
    Bug("blocks what would just fit", "if need - self.room > freed:", "if need - self.room >= freed > 0:"),
    Bug("gives nothing back after an eviction", "                self.actions.append(Evict(victim.key, freed))\n                self._freed(freed)\n", "                self.actions.append(Evict(victim.key, freed))\n"),
    Bug("evicts the same twice", "self.victims.remove(victim)", "pass"),
    Bug("says the wrong size of a victim", "Evict(victim.key, freed)", "Evict(victim.key, freed + 1)"),
    Bug("never drains", "if short > 0:\n            chosen, _", "if False:\n            chosen, _"),
    Bug("drains at all times", "if self.room_on_disk < 0:\n", "if True:\n"),
    Bug("drains a limit that is not reached", "0 if self.room_in_limit >= 0 else int(-self.room_in_limit)", "5"),
    Bug("does not drain to the limit", "0 if self.room_in_limit >= 0 else int(-self.room_in_limit)", "0"),
    Bug("drains from the low mark", "max(short, slack - self.room_on_disk)", "max(short, slack)"),
    Bug("knows no limit", "inf if volume.limit is None else volume.limit - ours", "inf if True else volume.limit - ours"),
    Bug("reserves nothing below the limit", "volume.limit - ours - sum(map(self._promised, running))", "volume.limit - ours"),
    Bug("counts what arrived as room below the limit", "volume.limit - ours - sum(map(self._promised, running))", "volume.limit - ours - reserved"),
    Bug("forgets what is begun below the limit", "        ours += sum(ingest.done for ingest in actual.ingests.values())\n", ""),
    Bug("counts what is shared twice below the limit", " - self.links.saved\n", "\n"),
    Bug("knows no limit of a group", "for group in sorted(want.groups & self.group_room.keys()):\n            short", "for group in ():\n            short"),
    Bug("evicts others for a group", "if short > 0 and group in victim.groups and", "if short > 0 and"),
    Bug("begins beyond the limit of a group", "            if short > 0:\n                limit =", "            if False:\n                limit ="),
    Bug("does not count what a group begins", "            self.group_room[group] -= size\n", "            pass\n"),
    Bug("forgets what a group holds", "            if group in want.groups:\n                room -= self._held(key)\n", ""),
    Bug("does not count what it begins", "self._freed(-size)", "pass"),
    Bug("fetches the total again", "self._fetch(want, ingest.remaining)", "self._fetch(want, ingest.total)"),
    Bug("asks room for the total", "self._room_for(want, ingest.total, ingest.remaining)", "self._room_for(want, ingest.total, ingest.total)"),
    Bug("lets what is here wait for room", "if need == 0:", "if False:"),
    Bug("blocks what fills the volume exactly", "if total > most:", "if total >= most:"),
    Bug("never says that it is too large", "if total > most:", "if False:"),
    Bug("serves the lowest priority first", "(-want.priority, not", "(want.priority, not"),
    Bug("serves in the order of keys", "key=lambda want: (-want.priority, not self._is_starved(want), want.key)", "key=lambda want: want.key"),
    Bug("serves in the order of a dict", "not self._is_starved(want), want.key)", "not self._is_starved(want))"),
    Bug("keeps room for nobody", "            self.kept_for = want\n", "            pass\n"),
    Bug("keeps room too early", "if self._is_starved(want) and need", "if need"),
    Bug("keeps room for who can never get it", " and need <= self._room_in_time(want):", ":"),
    Bug("does not wake to keep room", "            self._is_time(since + STARVED_SECONDS * (1 + self._times_waited(want)))\n", "            pass\n"),
    Bug("a listing takes no slot", "        self.slots -= 1\n        self.actions.append(Resolve", "        self.actions.append(Resolve"),
    Bug("begins what runs already", "in (absent | outdated) - actual.jobs.keys()", "in absent | outdated"),
    Bug("begins what is here already", "absent = self.desired.keys() - actual.entries.keys()", "absent = set(self.desired)"),
    Bug("never asks again", "in (absent | outdated) - actual.jobs.keys()", "in absent - actual.jobs.keys()"),
    Bug("begins what nobody asks for", "return not want.on_demand or want.key in self.actual.demanded", "return True"),
    Bug("never begins on demand", "return not want.on_demand or want.key in self.actual.demanded", "return not want.on_demand"),
    Bug("exchanges what is used", "if used is not None and key not in used and not busy:", "if not busy:"),
    Bug("never exchanges", "        self._exchange_the_staged()\n", ""),
    Bug("exchanges what is damaged", "busy = key in self.actual.jobs or key in self.actual.damaged\n", "busy = key in self.actual.jobs\n"),
    Bug("leaves wrong bytes on offer while they are used", "if key not in self.actual.entries or key in self.actual.jobs:\n                continue\n            failed", "if key not in self.actual.entries or key in self.actual.jobs or key in (self.actual.in_use or ()):\n                continue\n            failed"),
    Bug("leaves wrong bytes on offer while unwanted", "if key not in self.actual.entries or key in self.actual.jobs:\n                continue\n            failed", "if key not in self.desired or key not in self.actual.entries or key in self.actual.jobs:\n                continue\n            failed"),
    Bug("takes off offer what a job mends", "if key not in self.actual.entries or key in self.actual.jobs:\n                continue\n            failed", "if key not in self.actual.entries:\n                continue\n            failed"),
    Bug("takes off offer again and again what the disk refuses", "if failed is None or failed.retry_at == inf or self._is_time(failed.retry_at):", "if True:"),
    Bug("removes what left and is wanted again", "self.actual.left.keys() - self.desired.keys() - ", "self.actual.left.keys() - "),
    Bug("removes what left while a job is on it", " - self.desired.keys() - self.actual.jobs.keys()", " - self.desired.keys()"),
    Bug("removes what left before its time", "and self._is_time(self.actual.left[key]):", "and True:"),
    Bug("removes what left from under its pods", "needed = actual.in_use is None or key in actual.in_use or key in actual.demanded", "needed = actual.in_use is None"),
    Bug("removes what left of unknown use", "needed = actual.in_use is None or key in actual.in_use or key in actual.demanded", "needed = key in (actual.in_use or ()) or key in actual.demanded"),
    Bug("removes what left while it is damaged", " and key not in actual.damaged\n", "\n"),
    Bug("removes what left and is pinned", "return not needed and key not in actual.pinned and", "return not needed and"),
    Bug("expires what is always wanted", " and want.on_demand\n        ]", "\n        ]"),
    Bug("expires what its cache pinned", "if busy or want.pinned or not", "if busy or not"),
    Bug("expires by the age", "max(entry.last_used, entry.sealed_at) + want", "entry.sealed_at + want"),
    Bug("never expires", "        self._remove_the_expired()\n", ""),
    Bug("says that what expired left", "Why.EXPIRED", "Why.LEFT"),
    Bug("does not count the room of what left", "            self.actions.append(Evict(key, freed, why))\n            self._freed(freed)\n", "            self.actions.append(Evict(key, freed, why))\n"),
    Bug("says the wrong size of what left", "Evict(key, freed, why)", "Evict(key, 0, why)"),
    Bug("abandons what is not here", "for key in sorted(gone & there):", "for key in sorted(gone):"),
    Bug("leaves what was begun by a listing that is not used again", " | self.actual.ingests.keys() | self.actual.begun\n", " | self.actual.ingests.keys()\n"),
    Bug("evicts what left twice", "        self.victims = [victim for victim in self.victims if victim.key != key]\n", ""),
    Bug("removes what left in any order", "for key in sorted(gone & there):", "for key in gone & there:"),
    Bug("evicts what an operator wants to go although it is used", "if not going and self._keeps(key) in (None, Kept.YOUNG, Kept.UNCONFIRMED):", "if not going:"),
    Bug("forgets what an operator wants to go", "        self._remove_the_outcast()\n", ""),
    Bug("sleeps through the end of a time", "            self.wake_at = min(self.wake_at, when)\n        return", "            pass\n        return"),
    Bug("drains to the high mark only", "slack - self.room", "-self.room"),
    Bug("reserves nothing for what runs", "- reserved + volume", "+ volume"),
    Bug("reserves for what is cancelled", "for key, job in actual.jobs.items() if key in desired", "for key, job in actual.jobs.items()"),
    Bug("reserves what is written already", "bounds = (job.remaining,", "bounds = (job.total,"),
    Bug("reserves what is only hashed again", "None if ingest is None else ingest.remaining)", "None)"),
    Bug("reserves nothing before a job says its size", "default=0)", "default=0) if job.total is not None else 0"),
    Bug("forgets what is being unlinked", " + volume.reclaiming", ""),
    Bug("counts what is being unlinked twice", "+ volume.reclaiming", "+ 2 * volume.reclaiming"),
    Bug("knows no high mark", "int(volume.capacity * volume.high)", "volume.capacity"),
    Bug("confuses the marks", "int(volume.capacity * volume.high)", "int(volume.capacity * volume.low)"),
    Bug("has a slot too many", "max(0, volume.max_fetches - len(running))", "1 + max(0, volume.max_fetches - len(running))"),
    Bug("knows no bound of slots", "if self.slots == 0:", "if False:"),
    Bug("counts slots of cancelled jobs", "volume.max_fetches - len(running)", "volume.max_fetches - len(actual.jobs)"),
    Bug("a fetch takes no slot", "self.slots -= 1\n        self.actions.append(Fetch", "self.actions.append(Fetch"),
    Bug("stops at the first that does not fit", "for want in self._missing_wants():\n", "for want in self._missing_wants():\n            if self.blocked:\n                break\n"),
    Bug("cancels what is wanted", "if key not in self.desired:\n                self.actions.append(Cancel", "if True:\n                self.actions.append(Cancel"),
    Bug("never cancels", "self._cancel_the_unwanted()\n        self", "self"),
    Bug("cancels in any order", "sorted(self.actual.jobs)", "self.actual.jobs"),
    Bug("keeps what left", "        self._remove_what_left()\n", ""),
    Bug("evicts what left twice", "[victim for victim in self.victims if victim.key != key]", "self.victims"),
    Bug("never backs off", "attempt.retry_at > self.now", "False"),
    Bug("backs off for ever", "attempt is not None and attempt.retry_at > self.now", "attempt is not None"),
    Bug("backs off a moment too long", "attempt.retry_at > self.now", "attempt.retry_at >= self.now"),
    Bug("wakes at the latest retry", "self.wake_at = min(self.wake_at, attempt.retry_at)", "self.wake_at = attempt.retry_at"),
    Bug("never wakes", "self.wake_at = min(self.wake_at, attempt.retry_at)", "pass"),
    Bug("wakes at the end of time", "self.wake_at if self.wake_at < inf else None", "self.wake_at"),
    Bug("forgets why", "self.blocked[key] = Block(why=why, message=message)", "pass"),
)  # fmt: skip


def tests_fail(sources: Mapping[str, str], examples: int) -> bool:
    """Whether the tests of `plan` notice that its sources are these."""
    with TemporaryDirectory() as name:
        copy = Path(name)
        for package in ("agent", "tests/core"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, copy / package, ignore=ignored)
        for file in ("pyproject.toml", "tests/__init__.py"):
            shutil.copy(ROOT / file, copy / file)
        for file, text in sources.items():
            (copy / "agent" / file).write_text(text)
        command = (sys.executable, "-m", "pytest", "tests/core/test_plan.py", "-x", "-q")
        options = ("-p", "no:cacheprovider", "--hypothesis-seed=0")
        done = subprocess.run(
            [*command, *options],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": name, "PLAN_EXAMPLES": str(examples)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    # Anything but "all passed" and "tests failed" says nothing about the bug.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest cannot run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def verdict(sources: Mapping[str, str], bug: Bug) -> str:
    found = {file: text.count(bug.old) for file, text in sources.items()}
    if sum(found.values()) != 1:
        return f"pattern occurs {sum(found.values())} times"
    planted = {file: text.replace(bug.old, bug.new) for file, text in sources.items()}
    try:
        caught = any(tests_fail(planted, examples) for examples in EXAMPLES)
        return "caught" if caught else "survived"
    except subprocess.TimeoutExpired:
        return "caught"  # it does not come to rest


def main(names: Sequence[str]) -> int:
    """All bugs, or those whose name holds one of the words."""
    files = ("plan.py", "victims.py")
    sources = {file: (ROOT / "agent" / file).read_text() for file in files}
    bugs = [bug for bug in BUGS if not names or any(name in bug.name for name in names)]
    if tests_fail(sources, EXAMPLES[-1]):
        print("the tests fail without a planted bug")
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = []
        for bug, found in zip(bugs, pool.map(lambda bug: verdict(sources, bug), bugs), strict=True):
            print(f"{found:<24}{bug.name}", flush=True)
            verdicts.append(found)
    caught = verdicts.count("caught")
    print(f"{caught} of {len(bugs)} planted bugs caught")
    return 0 if caught == len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
