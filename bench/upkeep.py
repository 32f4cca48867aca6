"""What the cache costs while nothing is downloaded: a plan, a start, a list, a touch.

    python -m bench --only upkeep

Ten thousand entries is a hundred times what a node holds, so that what grows shows.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from agent import layout
from agent.index import Index
from agent.manifest import Manifest, SealedFile, render
from agent.model import Actual, Entry, Ingest, ModelRef, Volume, Want
from agent.plan import plan
from agent.store import Store

_MANY = 10_000
_MODELS = 256
_FILES = 12


def run(runs: int) -> None:
    with tempfile.TemporaryDirectory(prefix="localmodel-bench-", dir=".") as directory:
        root = Path(directory).absolute()
        print(f"\nUpkeep: medians of {runs} runs")
        _report(f"plan() with {_MANY} entries, one eviction", _plans(runs), "ms", 30)
        _report("a last use noted in the index", _touches(root / "touch", runs), "ms", 1)
        _seal(root / "some", _MODELS, _FILES)
        _report(f"agent: start to ready, {_MODELS} models", _starts(root / "some", runs), "s", 2)
        _seal(root / "many", _MANY, 1)
        _report(f"ls with {_MANY} rows, no agent", _lists(root / "many", runs), "s", None)


def _entry(number: int) -> Entry:
    return Entry(
        ref=ModelRef(uri=f"hf://acme/{number}"),
        revision="r",
        fingerprint="sha256:00",
        bytes=2**30,
        files=_FILES,
        sealed_at=0.0,
        last_used=float(number % 997),
        shared=frozenset({(number // 2, 2**20)}) if number % 10 < 2 else frozenset(),
    )


def _plans(runs: int) -> list[float]:
    """Half of them wanted, a tenth sharing a file, and one model that needs room."""
    entries = {entry.key: entry for entry in map(_entry, range(_MANY))}
    wants = {e.key: Want(ref=e.ref) for n, e in enumerate(entries.values()) if n % 2}
    new = Ingest(ref=ModelRef(uri="hf://acme/new"), revision="r", total=2**31, done=0)
    wants[new.ref.key] = Want(ref=new.ref)
    actual = Actual(entries=entries, ingests={new.ref.key: new}, in_use=frozenset())
    volume = Volume(capacity=_MANY * 2**30, free=0, high=1.0)
    return [1000 * _seconds(lambda: plan(wants, actual, volume, now=1e6)) for _ in range(runs)]


def _touches(root: Path, runs: int) -> list[float]:
    root.mkdir()
    entries = [_entry(number) for number in range(_MODELS)]

    async def measure() -> list[float]:
        index = Index(root / layout.INDEX, rebuild=lambda: entries)
        await index.open()
        taken = []
        for run in range(runs * 20):
            begun = time.perf_counter()
            await index.record_use(entries[run % _MODELS].key, 1e6 + run)
            taken.append(1000 * (time.perf_counter() - begun))
        await index.close()
        return taken

    return asyncio.run(measure())


def _seal(root: Path, models: int, files: int) -> None:
    """Sealed models of small files, made as `Store.seal` would leave them."""
    store = Store(root)
    store.open()
    store.close()
    names = [f"model-{number:05}.safetensors" for number in range(files)]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    described = tuple(SealedFile(path=n, size=4, sha256=sha256, promised=None) for n in names)
    for number in range(models):
        ref = ModelRef(uri=f"hf://acme/{number}")
        directory = root / layout.model(ref.key)
        directory.mkdir()
        for name in names:
            (directory / name).write_bytes(b"test")
            os.utime(directory / name, (0, 0))
        sealed = Manifest(ref=ref, revision="r", sealed_at=1, files=described)
        (root / layout.manifest(ref.key)).write_text(render(sealed))


def _starts(root: Path, runs: int) -> list[float]:
    return [_start(root) for _ in range(runs)]


def _start(root: Path) -> float:
    """From the command to the socket that answers: the first turn is over then."""
    socket = root / layout.STATE / layout.SOCKET
    socket.unlink(missing_ok=True)
    command = [sys.executable, "-m", "agent", "agent", "--root", str(root)]
    begun = time.perf_counter()
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"], stderr=subprocess.DEVNULL
    ) as process:
        while not socket.exists():
            assert process.poll() is None
            time.sleep(0.005)
        taken = time.perf_counter() - begun
        process.terminate()
    return taken


def _lists(root: Path, runs: int) -> list[float]:
    command = [sys.executable, "-m", "agent", "ls", "--root", str(root)]
    return [_seconds(lambda: subprocess.check_output(command)) for _ in range(runs)]


def _seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def _report(what: str, numbers: list[float], unit: str, reach: float | None) -> None:
    median = statistics.median(numbers)
    goal = f"  (reach {reach:g})" if reach is not None else ""
    print(f"  {what:<44} {median:>8.2f} {unit}  {min(numbers):.2f}-{max(numbers):.2f}{goal}")
