"""What others read of us: status files, progress lines, gauges. Written only when they change.

Also the witness of the state machine: a change of phase that `phases.TRANSITIONS` does not know is
counted and logged, and every change is one log line.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from agent import layout
from agent.errors import AgentError
from agent.files import disk_errors
from agent.metrics import Metrics
from agent.model import Attempt, CacheKey
from agent.phases import TRANSITIONS, Phase
from agent.status import KSERVE_STATUS, Facts, camel_case, model_status, progress_line, unproven
from agent.store import Store
from agent.wishes import Desired, SpecError

Body = Mapping[str, Any]
Doubts = Mapping[str, Attempt | None]
"""The caches whose own credentials are not proven, and the last failure to (`agent.proofs`)."""

NO_DOUBTS: Doubts = {}

_log = logging.getLogger(__name__)


class Status(Protocol):
    """Where the status of every cache goes, by its name."""

    def write(self, bodies: Mapping[str, Body]) -> None: ...


class StatusDirectory:
    """One JSON file a name. Falls back to the state directory where DIR cannot be written."""

    def __init__(self, preferred: Path, fallback: Path) -> None:
        self._path = preferred if _writable(preferred) else fallback
        with disk_errors(f"make the status directory {self._path}"):
            self._make()
            # Of an earlier life; the first `write` says what is true now.
            stale = [path.stem for path in self._path.glob("*.json") if _is_ours(path)]
        self._written: dict[str, str] = dict.fromkeys(stale, "")

    def _make(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        self._path.chmod(layout.DIRECTORY_MODE)
        self._written = {}

    def write(self, bodies: Mapping[str, Body]) -> None:
        """Make the directory say exactly this. Raises AgentError."""
        failure = None
        for name, body in bodies.items():
            try:
                self._write(name, json.dumps(body, indent=1) + "\n")
            except AgentError as error:  # a name too long, say: no reason to keep quiet of others
                failure = failure or error
        for name in set(self._written) - set(bodies):
            with disk_errors(f"remove the status of {name}"):
                (self._path / f"{name}.json").unlink(missing_ok=True)
            del self._written[name]
        if failure is not None:
            raise failure

    def _write(self, name: str, text: str) -> None:
        if self._written.get(name) == text:
            return
        with disk_errors(f"write the status of {name}"):
            if not self._path.is_dir():  # somebody removed it: all of it is to be written again
                self._make()
            aside = self._path / ".status.new"
            aside.write_text(text)
            aside.chmod(layout.NOTE_MODE)  # for everybody, whatever the umask
            aside.replace(self._path / f"{name}.json")
        self._written[name] = text


class Publisher:
    """Turns the facts of one moment into what users see."""

    def __init__(self, store: Store, metrics: Metrics, status: Status | None) -> None:
        self._store = store
        self._metrics = metrics
        self._status = status
        self._phases: dict[CacheKey, Phase] = {}
        self._counter = 0
        self._lines: dict[CacheKey, str] = {}

    def witness(self, facts: Mapping[CacheKey, Facts]) -> None:
        """Log, count and gauge what changed."""
        for key, fact in facts.items():
            self._witness(key, fact)
        for key in set(self._phases) - set(facts):
            del self._phases[key]
        self._gauges(facts)

    def write(
        self, facts: Mapping[CacheKey, Facts], desired: Desired, doubts: Doubts = NO_DOUBTS
    ) -> None:
        """The status of every cache. Waits for a disk, and one may be on a network."""
        if self._status is not None:
            try:
                self._status.write(self._bodies(facts, desired, doubts))
            except AgentError as error:
                _log.warning("status is not written: %s", error.message)

    def _bodies(
        self, facts: Mapping[CacheKey, Facts], desired: Desired, doubts: Doubts
    ) -> dict[str, Body]:
        bodies: dict[str, Body] = {}
        for error in desired.errors:
            bodies[error.name] = _refused(error, bodies.get(error.name, {}))
        for name, key in desired.names.items():
            status = model_status(facts[key], path=str(self._store.model(key)))
            if status is None:
                continue
            if name in doubts:
                status = unproven(status, doubts[name])
            # A cache whose file has become unreadable is kept, and its status says so.
            trouble = bodies.get(name, {})
            kept = {k: trouble[k] for k in ("reason", "message") if k in trouble}
            bodies[name] = {"name": name, **camel_case(status), **kept}
        return bodies

    def progress(self, facts: Iterable[Facts]) -> None:
        """Write the lines that waiting pods read; the counter tells them that we are alive."""
        self._counter += 1
        lines = {fact.key: progress_line(fact, self._counter) for fact in facts}
        for key in {*lines, *self._lines}:
            try:
                self._write_progress(key, lines.get(key))
            except AgentError as error:
                _log.warning("progress of %s is not written: %s", key, error.message)

    def _write_progress(self, key: CacheKey, line: str | None) -> None:
        before = self._lines.get(key)
        if line is None:
            if before is not None:
                self._store.clear_progress(key)
                del self._lines[key]
        elif before is None or not _is_the_same(line, before):
            self._store.write_progress(key, line)
            self._lines[key] = line

    def _witness(self, key: CacheKey, fact: Facts) -> None:
        before, now = self._phases.get(key), fact.phase
        if now is None or now is before:
            return
        if before is not None and now not in TRANSITIONS[before]:
            self._metrics.illegal_transitions.inc()
            _log.error("illegal change of %s from %s to %s", fact.ref.uri, before, now)
        self._phases[key] = now
        status = model_status(fact, path=str(self._store.model(key)))
        assert status is not None  # there is a phase
        level = logging.WARNING if now is Phase.FAILED else logging.INFO
        _log.log(
            level,
            "%s is %s%s",
            fact.ref.uri,
            now,
            f": {status.reason}: {status.message}" if status.reason else "",
            extra={"key": key, "state": now.value, "reason": status.reason, "bytes": status.bytes},
        )

    def _gauges(self, facts: Mapping[CacheKey, Facts]) -> None:
        phases = [fact.phase for fact in facts.values()]
        for phase in Phase:
            self._metrics.models.labels(state=phase.value).set(phases.count(phase))
        sealed = sum(fact.entry.bytes for fact in facts.values() if fact.entry)
        partial = sum(fact.ingest.done for fact in facts.values() if fact.ingest)
        reserved = sum(fact.job.remaining or 0 for fact in facts.values() if fact.job)
        for kind, size in (("sealed", sealed), ("partial", partial), ("reserved", reserved)):
            self._metrics.stored_bytes.labels(kind=kind).set(size)


def _is_the_same(line: str, before: str) -> bool:
    """Whether a line says no more than the one that is there. Who reads `fallback` waits no longer,
    so nobody looks whether its counter moves: two thousand models that have failed would be two
    thousand writes every five seconds."""
    verb, _, *said = line.split()
    return verb == "fallback" and before.split()[:1] + before.split()[2:] == [verb, *said]


def _refused(error: SpecError, before: Body) -> Body:
    """`before` is what was said already under this name: a file may hold several mistakes."""
    message = f"{before['message']}; {error.message}" if before else error.message
    return {
        "name": error.name,
        "state": Phase.FAILED.value,
        "modelStatus": KSERVE_STATUS[Phase.FAILED],
        "reason": error.reason.value,
        "message": message,
    }


def _is_ours(path: Path) -> bool:
    """Whether it is a status that an agent wrote: nobody else's file is removed."""
    try:
        return '"modelStatus"' in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _writable(path: Path) -> bool:
    try:
        path.mkdir(exist_ok=True)  # no parents: a desired directory that is not there is a mistake
    except OSError:
        return False
    return os.access(path, os.W_OK)
