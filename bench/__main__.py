"""`make bench`: a verified download by us, by curl and by huggingface_hub, from one local hub;
then the agent on a real API server (bench/cluster.py), its upkeep (bench/upkeep.py), the admission
hook of a large cluster (bench/hook.py), and pods that start on a real node (bench/node.py).

    python -m bench [--runs 5] [--scale 1.0] [--only downloads|cluster|upkeep|hook|node]

Runs are interleaved (A B C A B C ...), so that a machine that slows down slows everybody. Everybody
must end with every byte on disk and its SHA-256 known: the peers do not verify, so their digest is
part of their time. Start-up of an interpreter is nobody's time: ours is a request to a running
agent, as on a node, and huggingface_hub's clock starts after its imports. CPU counts the whole
process and its children; the hub's own does not count, but it shares the cores.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import cluster, hook, node, upkeep
from bench.origin import Origin, Shape, shapes
from bench.peers import Peer, Result, peers
from tests.node.packages import lacks

_PARTS = ("downloads", "cluster", "upkeep", "hook", "node")


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    flags.add_argument("--runs", type=int, default=5)
    flags.add_argument("--only", choices=_PARTS, help="one part of it")
    flags.add_argument("--scale", type=float, default=1.0, help="of the sizes, to try it out")
    arguments = flags.parse_args()
    print(machine())
    only = arguments.only
    if only in (None, "downloads"):
        downloads(arguments.runs, arguments.scale)
    if only in (None, "upkeep"):
        upkeep.run(arguments.runs)
    for part, measured in (("cluster", cluster.run), ("hook", hook.run)):
        if only not in (None, part):
            continue
        if cluster.available():
            measured(arguments.runs)
        else:
            print(f"\nNOT MEASURED: the {part} part needs its binaries; run make control-plane")
    if only in (None, "node"):
        if lack := lacks():
            print(f"\nNOT MEASURED: pods on a real node: {lack}")
        else:
            node.run(arguments.runs, arguments.scale)


def downloads(runs: int, scale: float) -> None:
    with tempfile.TemporaryDirectory(prefix="localmodel-bench-", dir=".") as directory:
        root = Path(directory).absolute()
        for shape in shapes(scale):
            with Origin(root / "origin", shape) as origin:
                report(shape, measure(origin, root / "work", runs))


def machine() -> str:
    """The conditions, without which no number means anything."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    return (
        f"{os.cpu_count()} cores ({model}), Python {platform.python_version()},"
        f" Linux {platform.release().partition('-')[0]}"
    )


def measure(origin: Origin, work: Path, runs: int) -> dict[str, list[Result]]:
    results: dict[str, list[Result]] = {}
    for run in range(runs):
        for peer in peers():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            results.setdefault(peer.name, []).append(one(peer, origin, work))
            print(f"\r  run {run + 1} of {runs}: {peer.name:<40}", end="", file=sys.stderr)
    print("\r" + " " * 60, end="\r", file=sys.stderr)
    return results


def one(peer: Peer, origin: Origin, work: Path) -> Result:
    found = peer.run(origin, work)
    if found.digests != origin.digests:
        sys.exit(f"error: {peer.name} has other bytes than the origin: nothing was measured")
    return found


def report(shape: Shape, results: dict[str, list[Result]]) -> None:
    gib = shape.bytes / 2**30
    print(f"\n{shape.name}: {shape.description}")
    columns = f"{'GiB/s':>6} {'min-max':>11} {'times ours':>10} {'CPU s/GiB':>9} {'peak MiB':>8}"
    print(f"  {'':<34} {columns}")
    ours = _median([result.seconds for result in next(iter(results.values()))])
    for name, found in results.items():
        seconds = [result.seconds for result in found]
        median = _median(seconds)
        spread = f"{gib / max(seconds):.2f}-{gib / min(seconds):.2f}"
        cpu = _median([result.cpu_seconds for result in found]) / gib
        memory = _median([result.peak_bytes for result in found]) / 2**20
        print(
            f"  {name:<34} {gib / median:>6.2f} {spread:>11} {median / ours:>10.2f}"
            f" {cpu:>9.2f} {memory:>8.0f}"
        )
    idle = [result.idle_bytes for result in next(iter(results.values()))]
    peak = [result.peak_bytes for result in next(iter(results.values()))]
    above = _median([p - i for p, i in zip(peak, idle, strict=True)]) / 2**20
    print(f"  ours: {_median(idle) / 2**20:.0f} MiB idle, {above:.0f} MiB above that at the peak")


def _median(numbers: Sequence[float]) -> float:
    return statistics.median(numbers)


if __name__ == "__main__":
    main()
