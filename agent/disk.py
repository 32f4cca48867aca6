"""Numbers of a file system and of the device under it."""

import os
from pathlib import Path

import psutil

from agent.files import disk_errors
from agent.model import Space, Traffic


def space(root: Path) -> Space:
    """Capacity without the blocks reserved for root: used + free adds up to it, as in `df`."""
    with disk_errors(f"look at the file system of {root}"):
        found = os.statvfs(root)
    reserved = (found.f_bfree - found.f_bavail) * found.f_frsize
    return Space(
        capacity=found.f_blocks * found.f_frsize - reserved, free=found.f_bavail * found.f_frsize
    )


def traffic(root: Path) -> tuple[str, Traffic] | None:
    """The device that holds `root` and its counters; None where there is no such device (tmpfs)."""
    number = root.stat().st_dev
    link = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not link.exists():
        return None
    device = link.resolve().name
    found = psutil.disk_io_counters(perdisk=True, nowrap=False).get(device)
    if found is None:
        return None
    return device, Traffic(
        read_bytes=found.read_bytes,
        written_bytes=found.write_bytes,
        read_seconds=found.read_time / 1000,
        write_seconds=found.write_time / 1000,
    )
