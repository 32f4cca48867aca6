"""Killed, and the plug pulled, while models make room for each other.

`KILLS=200` and `POWER_CUTS=200` look longer.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from agent import layout
from agent.model import CacheKey, cache_key
from agent.store import Store
from tests.edges.volume import check_offers, fast_directory
from tests.fakes.hub import Hub, Slow
from tests.machine import Agent, Machine, files_of, until
from tests.scenarios.disks import MIB, ext4, image_of, loop
from tests.scenarios.loop import inodes_below

NAMES = [f"m{number}" for number in range(8)]
URIS = {name: f"hf://acme/{name}" for name in NAMES}
FILES = {
    name: {
        "config.json": b"{}",
        "a.safetensors": random.Random(name).randbytes(700_000),
        "b/b.safetensors": random.Random(f"{name} b").randbytes(300_000),
    }
    for name in NAMES
}
LIMIT = 3 * MIB
ROOM = ("--limit", "3Mi", "--min-age", "0s")
"""For three of the eight."""


@pytest.fixture
def eight(hub: Hub) -> Hub:
    for name in NAMES:
        hub.add(f"acme/{name}", FILES[name])
    hub.fault("*", Slow(bytes_per_second=6 * MIB))
    return hub


def _published(root: Path, keys: set[CacheKey]) -> None:
    """What is on offer is what the hub has."""
    for name in NAMES:
        if cache_key(URIS[name]) in keys:
            assert files_of(root / layout.model(cache_key(URIS[name]))) == FILES[name]


@contextmanager
def _used(root: Path, keys: set[CacheKey]) -> Iterator[CacheKey | None]:
    """Hold a file of one of these open, as who serves it does."""
    with ExitStack() as stack:
        for key in sorted(keys):
            stack.enter_context((root / layout.model(key) / "a.safetensors").open("rb"))
            yield key
            return
        yield None


@pytest.mark.slow
def test_kill_9_at_random_moments_of_evictions(localmodel: Machine, eight: Hub) -> None:
    dice = random.Random(11)
    rounds, seen = int(os.environ.get("KILLS", "8")), set[CacheKey]()
    for _ in range(rounds):
        for path in localmodel.desired.glob("*.yaml"):
            path.unlink()
        for name in dice.sample(NAMES, 2):  # the others may go when their room is needed
            localmodel.want(name, URIS[name])
        with _used(localmodel.root, localmodel.sealed()) as used:
            agent = localmodel.agent(*ROOM)
            assert agent.port  # from here on it works
            time.sleep(dice.uniform(0.0, 1.2))  # the moment is the experiment
            agent.kill()
            localmodel.check_offers()
            sealed = localmodel.sealed()
            _published(localmodel.root, sealed)
            # Killed while it retires: its manifest waits beside it, and is put back at the start.
            assert used is None or used in sealed | _retiring(localmodel.root)
        seen |= sealed
    wanted = [path.stem for path in localmodel.desired.glob("*.yaml")]
    eight.clear_faults()
    agent = localmodel.agent(*ROOM).wait_ready()
    for name in wanted:
        agent.wait_state(name, "Ready")
    evicted = agent.metrics().get("localmodel_evictions_total Space", 0.0)
    print(rounds, "kills", len(seen), "models seen,", evicted, "evicted by the last agent")
    _at_rest(localmodel.root)
    assert agent.stop() == 0
    assert len(seen) > 3
    localmodel.check_offers()
    _published(localmodel.root, localmodel.sealed())


def _retiring(root: Path) -> set[CacheKey]:
    found = {
        layout.key_of_manifest(path.name)
        for path in (root / layout.MANIFESTS).iterdir()
        if path.name.endswith(".retiring")
    }
    return {known[0] for known in found if known is not None}


def _at_rest(root: Path) -> None:
    """Nothing is left that nobody knows of, and what is known is no more than may be."""
    store = Store(root)
    until(lambda: not any((root / layout.TRASH).iterdir()), "the trash is not empty")
    assert {path.name for path in (root / layout.MANIFESTS).iterdir()} == {
        path.name for path in (root / layout.MODELS).iterdir()
    }
    for path in (root / layout.INGEST).iterdir():
        assert store.listing(CacheKey(path.name)) is not None, path
    held = inodes_below(root / layout.MODELS, root / layout.INGEST)
    assert sum(size for size, _ in held.values()) <= LIMIT + 100_000  # the listings


@contextmanager
def _running(machine: Machine) -> Iterator[Agent]:
    agent = machine.agent(*ROOM).wait_ready()
    yield agent
    assert agent.stop() == 0


# -- the plug -----------------------------------------------------------------------------------

_DRIVER = """
import itertools, sys
from agent.cli import run
root, *uris = sys.argv[1:]
for uri in itertools.cycle(uris):
    run(["pull", "--root", root, uri])
"""


@contextmanager
def _pulling(machine: Machine) -> Iterator[None]:
    """Somebody who pulls one model after the other: each makes another one go."""
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(machine.root), *URIS.values()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=machine.home,
        env=machine.environment,
    )
    try:
        yield
        assert process.poll() is None, process.returncode
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_plug_is_pulled_at_random_moments_of_evictions(
    localmodel: Machine, eight: Hub, tmp_path: Path
) -> None:
    """The image of a mounted file system is copied as it is; its journal is replayed on a mount.

    The agent stands still while it is copied: of what it was told to be durable, all is there.
    """
    dice = random.Random(13)
    cuts = int(os.environ.get("POWER_CUTS", "30"))
    offers = begun = retiring = 0
    with fast_directory() as memory, ext4(memory / "disk", 48 * MIB) as mount:
        localmodel.root = mount / "cache"
        localmodel.state = localmodel.root / layout.STATE
        localmodel.inline("pull", URIS["m0"]).ok()
        with (
            _used(localmodel.root, localmodel.sealed()) as used,
            _running(localmodel) as agent,
            _pulling(localmodel),
        ):
            until(lambda: len(localmodel.sealed()) > 1)
            for cut in range(cuts):
                time.sleep(dice.uniform(0.01, 0.4))  # the moment is the experiment
                image = memory / f"cut-{cut}.img"
                agent.process.send_signal(signal.SIGSTOP)
                try:
                    copy = ["cp", "--sparse=always", str(image_of(mount)), str(image)]
                    subprocess.run(copy, check=True)
                finally:
                    agent.process.send_signal(signal.SIGCONT)
                with loop(image, memory / f"cut-{cut}") as found:
                    retiring += len(_retiring(found / "cache"))
                    keys = _recovered(found / "cache")
                    assert used in keys
                    offers += len(keys)
                    begun += len(Store(found / "cache").ingests())
                image.unlink()
            assert agent.process.poll() is None
            evicted = agent.metrics()["localmodel_evictions_total Space"]
        localmodel.check_offers()
    print(cuts, "cuts", offers, "offers", begun, "begun", retiring, "retiring", evicted, "evicted")
    assert evicted


def _recovered(root: Path) -> set[CacheKey]:
    """Open it as the next agent does; what is on offer then, every byte of it read."""
    store = Store(root)
    store.open()
    try:
        assert store.recover() == []
        check_offers(root)
        store.sweep()
        assert not any((root / layout.TRASH).iterdir())
        keys = {entry.key for entry in store.entries()}
        _published(root, keys)
        for ingest in (root / layout.INGEST).iterdir():
            assert store.listing(CacheKey(ingest.name)) is not None, ingest
        return keys
    finally:
        store.close()
