"""What is downloaded, and the hub that it is downloaded from: a process of its own, as in life."""

import hashlib
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = "bench/model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A set of files: name -> bytes."""

    name: str
    description: str
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def shapes(scale: float) -> list[Shape]:
    mib = int(scale * 2**20)
    shards = {f"model-{n:05}-of-00008.safetensors": 256 * mib for n in range(1, 9)}
    small = {f"tokenizer/part-{n}.json": 8192 + n for n in range(20)}
    return [
        Shape(
            name="one",
            description=f"one file of {2048 * scale:.0f} MiB",
            files={"model.safetensors": 2048 * mib},
        ),
        Shape(
            name="model",
            description=f"8 files of {256 * scale:.0f} MiB and 20 small ones",
            files=shards | small,
        ),
    ]


def write_random(path: Path, size: int, dice: random.Random) -> str:
    """A file of so many bytes; its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while size > 0:
            block = dice.randbytes(min(size, 2**22))
            digest.update(block)
            size -= file.write(block)
    return digest.hexdigest()


class Origin:
    """A hub that serves one shape; its files are in the page cache."""

    def __init__(self, root: Path, shape: Shape) -> None:
        self.shape = shape
        self._root = root
        self._hub: subprocess.Popen[str] | None = None
        self.endpoint = ""
        self.digests: dict[str, str] = {}

    def __enter__(self) -> "Origin":
        upstream = self._root / "upstream"
        dice = random.Random(0)
        for name, size in self.shape.files.items():
            self.digests[name] = write_random(upstream / name, size, dice)
        command = [sys.executable, "-m", "tests.fakes.hub", "--root", str(self._root / "hub")]
        self._hub = subprocess.Popen(
            [*command, "--port", "0", "--add", f"{REPOSITORY}={upstream}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._hub.stdout is not None
        self.endpoint = self._hub.stdout.readline().split()[-1]
        return self

    def __exit__(self, *_: object) -> None:
        if self._hub is not None:
            self._hub.terminate()
            self._hub.wait(15)
        shutil.rmtree(self._root, ignore_errors=True)
