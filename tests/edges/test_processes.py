"""Who reads a model, on a machine without a cluster: real processes, real files."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.model import cache_key
from agent.processes import models_read

KEY = cache_key("hf://acme/tiny")

OPEN = "import sys; file = open(sys.argv[1], 'rb'); print(flush=True); sys.stdin.read()"
MAPPED = (
    "import mmap, sys\n"
    "with open(sys.argv[1], 'rb') as file:\n"
    "    pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
    "print(flush=True); sys.stdin.read()"
)
INSIDE = (
    "import os, sys; os.chdir(os.path.dirname(sys.argv[1])); print(flush=True); sys.stdin.read()"
)


@contextmanager
def reading(program: str, file: Path) -> Iterator[None]:
    command = [sys.executable, "-c", program, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.communicate()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "cache" / "models" / KEY / "a directory" / "weights.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"w" * 8192)
    return file


@pytest.mark.parametrize("program", [OPEN, MAPPED, INSIDE], ids=["open", "mapped", "inside"])
def test_a_process_that_reads_a_model_uses_it(program: str, weights: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    assert models_read(root) == frozenset()
    with reading(program, weights):
        assert models_read(root) == {KEY}
        assert models_read(tmp_path / "another") == frozenset()
    assert models_read(root) == frozenset()


def test_through_another_name_of_the_cache(weights: Path, tmp_path: Path) -> None:
    """`--root` may be a symlink; the kernel speaks of real paths."""
    alias = tmp_path / "alias"
    alias.symlink_to(tmp_path / "cache")
    with reading(OPEN, weights):
        assert models_read(alias) == {KEY}


def test_this_process_is_not_a_user(weights: Path, tmp_path: Path) -> None:
    """The agent hashes what it keeps."""
    with weights.open("rb"):
        assert models_read(tmp_path / "cache") == frozenset()
