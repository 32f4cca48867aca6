"""Small real file systems, gone at the end of a block. Root only: elsewhere the test is skipped."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1024 * 1024


@contextmanager
def tmpfs(place: Path, size: int) -> Iterator[Path]:
    with _mounted(place, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield place


@contextmanager
def ext4(place: Path, size: int) -> Iterator[Path]:
    """On a loop device. Its image lies beside it: `image_of`."""
    image = image_of(place)
    with image.open("wb") as file:
        file.truncate(size)
    _or_skip("mkfs.ext4", "-q", "-m", "0", str(image))
    with loop(image, place):
        yield place


@contextmanager
def loop(image: Path, place: Path) -> Iterator[Path]:
    """What is in an image: its journal is replayed, as after a power cut."""
    with _mounted(place, "-o", "loop", str(image)):
        yield place


def image_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.img")


KINDS = {"tmpfs": tmpfs, "ext4": ext4}


@contextmanager
def _mounted(place: Path, *arguments: str) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    _or_skip("mount", *arguments, str(place))
    try:
        yield
    finally:
        # Lazily: a killed process may hold it for a moment longer.
        subprocess.run(["umount", "--lazy", place], check=True)


def _or_skip(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        pytest.skip(f"NOT TESTED, no small file system can be made here: {said}")
