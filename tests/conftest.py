"""Fixtures of the tests that run the real command: a hub, a machine, small models, small disks."""

import json
import logging
import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.hub import Hub
from tests.leaks import LogScan
from tests.machine import Agent, Machine, machine

REPO = "acme/tiny"
URI = f"hf://{REPO}"


def safetensors(seed: int, size: int) -> bytes:
    """A file of this size that a server could load: one tensor of noise."""
    room = 88  # for length and header, padded with spaces as the format allows
    data = random.Random(seed).randbytes(size - room)
    tensor = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    header = json.dumps({"w": tensor}).encode().ljust(room - 8)
    return struct.pack("<Q", len(header)) + header + data


FILES: dict[str, bytes] = {
    "config.json": b'{"model_type": "tiny"}\n',
    "model-1.safetensors": safetensors(1, 300_000),
    "model-2.safetensors": safetensors(2, 200_000),
    "sub/notes.md": b"# notes\n",
}


_SCAN = LogScan()


def pytest_configure() -> None:
    logger = logging.getLogger("agent")
    logger.addHandler(_SCAN)
    logger.setLevel(logging.DEBUG)


@pytest.fixture(autouse=True)
def _no_secret_in_any_log() -> Iterator[None]:
    yield
    found, _SCAN.found = _SCAN.found, []
    assert not found, found


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub that holds one small model of four files."""
    with Hub(tmp_path / "hub") as hub:
        hub.add(REPO, FILES)
        yield hub


@pytest.fixture
def localmodel(tmp_path: Path, hub: Hub) -> Iterator[Machine]:
    """The command, on a machine of its own that knows this hub and nothing else."""
    with machine(tmp_path / "machine", hub.endpoint) as found:
        yield found


@pytest.fixture
def agent(localmodel: Machine) -> Agent:
    """A ready agent with an empty desired directory."""
    return localmodel.agent().wait_ready()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Small file systems: `mount("8m")` is a tmpfs of 8 MiB, gone at the end."""
    with ExitStack() as mounted:

        def make(size: str) -> Path:
            path = tmp_path / f"disk-{size}"
            path.mkdir()
            tried = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path],
                capture_output=True,
                text=True,
                check=False,
            )
            if tried.returncode != 0:
                pytest.skip(f"NOT TESTED, no small file system without root: {tried.stderr}")
            # Lazily: a killed process may hold it for a moment longer.
            mounted.callback(lambda: subprocess.run(["umount", "--lazy", path], check=True))
            return path

        yield make
