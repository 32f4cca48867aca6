"""A disk that holds ten models and is asked for two hundred; and one that is full at any moment."""

import asyncio
import os
import random
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest

from agent import disk, layout
from agent.model import CacheKey, Listing, Locator, ModelRef, RemoteFile, Space, Want, cache_key
from agent.phases import Phase
from agent.transfer.pump import DEPTH
from tests.edges.volume import on_offer, sha256
from tests.fakes.hub import Hub
from tests.machine import Machine, files_of
from tests.scenarios.disks import KINDS, MIB
from tests.scenarios.loop import Life, offered

DISK = 32 * MIB
MODELS = 200
SIZES = (2_000_000, 2_600_000, 3_000_000)
HOG = 4 * MIB
CONNECTIONS = 8
BUFFER = 16 * 1024
AHEAD = CONNECTIONS * DEPTH * BUFFER
"""What the engine may hold that has come and is not written yet."""


class SmallDisk(Life):
    """A life whose disk is as large as it is."""

    def _space(self) -> Space:
        return disk.space(self.store.root)


class Gauge:
    """Samples what is used of a file system, as fast as it can; `worst` is by how much it was above
    what was allowed at that moment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.allowed = 0
        self.worst = -(1 << 60)
        self.samples = 0
        self._stop = threading.Event()

    @property
    def used(self) -> int:
        space = disk.space(self.root)
        return space.capacity - space.free

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self.worst = max(self.worst, self.used - self.allowed)
            self.samples += 1


def _uri(number: int) -> str:
    return f"fake://m{number}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_two_hundred_models_go_through_a_disk_that_holds_ten(
    tmp_path: Path, kind: str
) -> None:
    dice = random.Random(7)
    with (
        KINDS[kind](tmp_path / "disk", DISK) as mount,
        patch("agent.transfer.pump.BUFFER_BYTES", BUFFER),
    ):
        life = SmallDisk(tmp_path, root=mount / "cache", min_age_seconds=0.0)
        life.reconciler.policy.high, life.reconciler.policy.low = 0.95, 0.90
        published = {}
        for number in range(MODELS):
            data = dice.randbytes(dice.choice(SIZES))
            files = {"config.json": b"%d" % number, "weights.bin": data}
            life.source.add(_uri(number), files)
            whole = frozenset((path, sha256(data)) for path, data in files.items())
            published[cache_key(_uri(number))] = whole
        pods: list[str] = []
        life.users = lambda: frozenset(map(cache_key, pods))
        await life.begin()
        try:
            space = disk.space(mount)
            ceiling = int(space.capacity * 0.95) + AHEAD
            gauge = Gauge(mount)
            gauge.allowed = ceiling
            life.wish(
                {
                    cache_key(_uri(n)): Want(ref=ModelRef(uri=_uri(n)), on_demand=True)
                    for n in range(MODELS)
                }
            )
            with gauge.running():
                came = await _a_long_day(life, gauge, ceiling, pods, published, dice)
        finally:
            await life.end()
        evicted = life.metrics.evictions.labels(why="Space")._value.get()
        print(kind, came, "came", evicted, "went", gauge.samples, "samples", gauge.worst, "worst")
        assert gauge.worst <= 0, f"{gauge.worst} bytes above what is allowed"
        assert came > MODELS * 0.9
        assert evicted > MODELS * 0.7


async def _a_long_day(
    life: Life,
    gauge: Gauge,
    ceiling: int,
    pods: list[str],
    published: dict[CacheKey, frozenset[tuple[str, str]]],
    dice: random.Random,
) -> int:
    """Two models after two others, and four pods at most; how many models came."""
    came, hog = 0, life.store.root.parent / "hog"
    for number in range(0, MODELS, 2):
        if number % 25 in (10, 11, 12):  # they take whatever room is made for them
            gauge.allowed = gauge.used + HOG + AHEAD
            _eat(hog, HOG)
            await _rests(life)
            assert gauge.used <= ceiling - AHEAD, "room was made: what is in use is little"
            gauge.allowed = ceiling
        elif number % 25 in (18, 19):
            hog.unlink(missing_ok=True)
        new = (number, number + 1)
        pods += map(_uri, new)
        del pods[: -dice.randint(2, 4)]
        life.now += 61.0
        life.reconciler.wake()
        await _rests(life)
        sealed = life.reconciler.sealed()
        came += sum(cache_key(_uri(n)) in sealed for n in new)
        there = set(on_offer(life.store.root))
        assert {cache_key(uri) for uri in pods[:-2]} & life.reported <= there
        if number % 10 == 0:
            offers = offered(life.store.root)
            assert all(published[key] == files for key, files in offers.items())
    return came


def _eat(hog: Path, size: int) -> None:
    """So much more, or all that is left."""
    with hog.open("ab", buffering=0) as file, suppress(OSError):
        for _ in range(size // BUFFER):
            file.write(bytes(BUFFER))


async def _rests(life: Life) -> None:
    """Nothing runs, nothing waits to be unlinked, and nothing more is decided."""
    trash = life.store.root / layout.TRASH
    idle = 0
    while idle < 3:
        await life.turn(1)
        busy = any(life.reconciler.running(key) for key in life.reconciler.wants())
        idle = 0 if busy or any(trash.iterdir()) else idle + 1


# -- a limit ------------------------------------------------------------------------------------


async def test_a_limit_counts_what_has_arrived_of_a_download(tmp_path: Path) -> None:
    """Two models are listed, and the limit has room for one. As that one comes in, its room must
    not become the other one's."""
    large, other = _uri(1), _uri(2)
    life = Life(tmp_path, limit=700_000)
    life.capacity, life.users = 10_000_000, frozenset
    life.source.add(large, {"big": bytes(400_000), "last": b"x"})
    life.source.add(other, {"weights.bin": b"o" * 500_000})
    go_on, locate = asyncio.Event(), life.source.locate

    async def slow(listing: Listing, file: RemoteFile) -> Locator:
        if file.path == "last":
            await go_on.wait()
        return await locate(listing, file)

    def done() -> int:
        tally = life.reconciler.running(cache_key(large))
        return tally.job.done if tally is not None else 0

    with patch.object(life.source, "locate", slow):
        await life.begin()
        try:
            life.wish(
                {
                    cache_key(uri): Want(ref=ModelRef(uri=uri), priority=priority)
                    for uri, priority in ((large, 1), (other, 0))
                }
            )
            await life.until(lambda: done() == 400_000)
            await life.until(lambda: cache_key(other) in life.store.ingests())
            await life.turn(5)
            running = life.reconciler.running(cache_key(other))
            assert running is None
            assert life.phase(other) is Phase.PENDING
        finally:
            go_on.set()
            await life.end()


# -- no space at any call -----------------------------------------------------------------------

CALLS = "write,pwrite64,ftruncate,fsync,fdatasync,mkdir,rename,link,openat"
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)")
OLD, NEW = "acme/old", "acme/new"
OLD_FILES = {"a.safetensors": random.Random(1).randbytes(900_000)}
NEW_FILES = {"c.json": b"{}", "d/b.safetensors": random.Random(2).randbytes(1_300_000)}
PULL = ("pull", f"hf://{NEW}", "--limit", "2Mi", "--min-age", "0s")
"""It evicts the old model."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="NOT TESTED: there is no strace here")
def test_no_space_at_any_call(localmodel: Machine, hub: Hub, tmp_path: Path) -> None:
    hub.add(OLD, OLD_FILES)
    hub.add(NEW, NEW_FILES)
    localmodel.inline("pull", f"hf://{OLD}").ok()
    before = tmp_path / "before"
    shutil.copytree(localmodel.root, before)
    log = tmp_path / "calls"
    localmodel.start(*PULL, under=_strace("-y", "-o", str(log), f"trace={CALLS}")).done().ok()
    assert localmodel.sealed() == {cache_key(f"hf://{NEW}")}
    calls = _calls(log.read_text(), localmodel.root)
    every = os.environ.get("ENOSPC_EVERY")
    chosen = calls if every else random.Random(3).sample(calls, min(10, len(calls)))
    results: Counter[int] = Counter()
    for call, path, number in chosen:
        shutil.rmtree(localmodel.root)
        shutil.copytree(before, localmodel.root)
        inject = f"inject={call}:error=ENOSPC:when={number}"
        under = _strace("-o", "/dev/null", "-P", str(path), f"trace={call}", inject)
        done = localmodel.start(*PULL, under=under).done()
        where = f"{call} {number} of {path}: {done}"
        results[done.code] += 1
        assert "Traceback" not in done.stderr, where
        assert done.code in (0, 1), where
        localmodel.check_offers()
        if done.code == 0:
            assert cache_key(f"hf://{NEW}") in localmodel.sealed(), where
        again = localmodel.inline(*PULL)
        assert again.code == 0, (where, again)
        localmodel.check_offers()
        assert localmodel.sealed() == {cache_key(f"hf://{NEW}")}, where
        assert files_of(localmodel.model(f"hf://{NEW}")) == NEW_FILES
        for name in (layout.INGEST, layout.TRASH):
            assert not list((localmodel.root / name).iterdir()), where
    print(len(chosen), "of", len(calls), "calls; exit codes", dict(results))
    assert results[1], "not one of these calls mattered?"


def _strace(*options: str) -> list[str]:
    pairs: list[str] = []
    for option in options:
        pairs += ["-e", option] if option.startswith(("trace=", "inject=")) else [option]
    return ["strace", "-f", "-qq", *pairs]


def _calls(log: str, root: Path) -> list[tuple[str, Path, int]]:
    """Every call that needs space, with its path and its number on that path in its thread: so it
    is counted by `strace -P`."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found: dict[tuple[str, Path, int], None] = {}
    for line in log.splitlines():
        match = _CALL.match(line)
        if match is None:
            continue
        thread, call, rest = match.groups()
        for path in re.findall(rf"[<\"]({re.escape(str(root))}/[^>\"]*)[>\"]", rest)[:1]:
            seen[thread, call, path] += 1
            if call != "openat" or "O_CREAT" in rest:
                found[call, Path(path), seen[thread, call, path]] = None
    return list(found)
