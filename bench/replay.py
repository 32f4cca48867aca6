"""How often the disk already has what is asked for: our eviction order beside others, on a trace.

    python -m bench.replay [--requests 1000000] [--seed 1] [--alphas 0.9 0.6] [--newcomer-every 100]

Prints a table for each alpha and, without arguments, draws docs/replay.svg. The same arguments give
the same numbers. The other policies are libcachesim's, which gets an environment of its own below
.bench/: its LRU must hit as often as ours, or one of the two replays is wrong.

ASSUMED, not measured: 500 models are alive at any time and asked for by Zipf's law; a newcomer
comes every 100 requests, at a rank drawn log-uniformly, and pushes everything below it down and the
last one out for good; sizes are those of `MIXTURE`, whatever the rank. Models come whole, at once,
and nothing is wanted, used or young, so that everything may be evicted. Sizes are in MiB, because
the trace format has 32 bits for them.

Two policies of libcachesim 0.3.5 are not here: LFUDA and BeladySize do not come back from objects
this large. `bound` is their better: no policy at all, whatever it knows, hits more.
"""

import argparse
import heapq
import json
import struct
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import pow
from pathlib import Path
from random import Random

from agent.model import CacheKey, cache_key

LIBRARY = "libcachesim==0.3.5"
ENVIRONMENT = Path(".bench/replay")
PLOT = Path("docs/replay.svg")
ALIVE = 500
REQUESTS = 1_000_000
ALPHAS = (0.9, 0.6)
NEWCOMER_EVERY = 100
SEED = 1

_GIB, _TIB = 2**10, 2**20  # in MiB

MIXTURE = (
    (0.45, 0.2, 2),  # adapters, embedders, small models
    (0.33, 5, 16),  # 7B to 8B, quantised larger ones
    (0.14, 25, 70),  # 13B to 32B
    (0.06, 130, 250),  # 70B, mixtures of experts
    (0.02, 400, 700),  # the largest
)
"""(share of the models, smallest, largest in GiB); log-uniform in between.

After the shape of what people put on the Hugging Face hub for serving, by hand: no census."""

TABLE = (1, 2, 4, 8)
DISKS = (0.5, *TABLE, 16)
"""In TiB, of what may be filled: a disk's size times the high mark."""

OURS, BOUND = "LRU (ours)", "no policy can do better"

POLICIES = {
    "LRU": "LRU",
    "FIFO": "FIFO",
    "LFU": "LFU",
    "ARC": "ARC",
    "2Q": "TwoQ",
    "LRU-2": "LRUK",
    "SIEVE": "Sieve",
    "S3-FIFO": "S3FIFO",
    "LHD": "LHD",
    "GDSF": "GDSF",
    "Belady": "Belady",
}
"""Our name to libcachesim's, each with its defaults."""

_KNOWS_THE_FUTURE = ("Belady", BOUND)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Who asks for which model when: one request a second. `alive` is the MiB of a working set."""

    requests: Sequence[int]
    sizes: Sequence[int]
    alive: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Hits of all requests, and bytes of hits of all bytes asked for."""

    requests: float
    bytes: float


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__)
    flags.add_argument("--requests", type=int, default=REQUESTS)
    flags.add_argument("--seed", type=int, default=SEED)
    flags.add_argument("--alphas", type=float, nargs="+", default=list(ALPHAS))
    flags.add_argument("--newcomer-every", type=int, default=NEWCOMER_EVERY)
    given = flags.parse_args()
    begun = time.monotonic()
    python = environment()
    found = {}
    for alpha in given.alphas:
        trace = made(alpha, given.requests, Random(given.seed), every=given.newcomer_every)
        found[alpha] = trace, replayed(trace, python)
        print(f"\nalpha {alpha:g}, {given.requests} requests, seed {given.seed}", end="")
        print(f", a newcomer every {given.newcomer_every}: {about(trace)}\n")
        print(table(found[alpha][1]))
    print(f"\n{time.monotonic() - begun:.0f} s")
    if given == flags.parse_args([]):
        PLOT.write_text(plot(found))
        print(f"written: {PLOT}")


# -- the trace ----------------------------------------------------------------------------------


def made(alpha: float, requests: int, random: Random, *, every: int = NEWCOMER_EVERY) -> Trace:
    weights = list(accumulate((rank + 1) ** -alpha for rank in range(ALIVE)))
    sizes = [_size(random) for _ in range(ALIVE)]
    ranked = list(range(ALIVE))
    asked: list[int] = []
    alive, seen = sum(sizes), []
    while len(asked) < requests:
        asked += random.choices(ranked, cum_weights=weights, k=every)
        seen.append(alive)
        alive -= sizes[ranked.pop()]
        ranked.insert(int(ALIVE ** random.random()) - 1, len(sizes))
        sizes.append(_size(random))
        alive += sizes[-1]
    return Trace(requests=asked[:requests], sizes=sizes, alive=sum(seen) / len(seen))


def _size(random: Random) -> int:
    _, low, high = random.choices(MIXTURE, [share for share, _, _ in MIXTURE])[0]
    return round(_GIB * low * pow(high / low, random.random()))


def about(trace: Trace) -> str:
    asked, models = trace.requests, len(set(trace.requests))
    return (
        f"{models} models of {sum(trace.sizes) / len(trace.sizes) / _GIB:.1f} GiB in the mean,"
        f" {trace.alive / _TIB:.1f} TiB alive at a time; {models / len(asked):.1%} of the requests"
        f" are the first for their model; 100 requests in a row ask for {_distinct(trace, 100):.1f}"
        f" TiB of different models, 700 for {_distinct(trace, 700):.1f}, 3000 for"
        f" {_distinct(trace, 3000):.1f}"
    )


def _distinct(trace: Trace, window: int) -> float:
    starts = range(0, max(1, len(trace.requests) - window), 7 * window)
    models = [set(trace.requests[start : start + window]) for start in starts]
    return sum(sum(trace.sizes[m] for m in some) for some in models) / len(models) / _TIB


# -- the replays --------------------------------------------------------------------------------


class Ours:
    """The victims of `agent.plan`, without looking at every entry for every request.

    By (last_used, sealed_at, key), just enough, whole models; what is larger than the disk is not
    begun. tests/core/test_replay.py compares each eviction with plan's own.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._room = capacity
        self._entries: dict[CacheKey, tuple[float, float, int]] = {}
        # Each entry once, as it was when it was put here: a use moves it only when it comes up.
        # That is the right order, because a use can only make it later.
        self._order: list[tuple[float, float, CacheKey]] = []

    def ask(self, key: CacheKey, size: int, now: float) -> list[CacheKey] | None:
        """None is a hit; else what was evicted for it, in order."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries[key] = (now, *entry[1:])
            return None
        if size > self._capacity:
            return []
        evicted = []
        while self._room < size:
            evicted.append(self._evict())
        self._room -= size
        self._entries[key] = (now, now, size)
        heapq.heappush(self._order, (now, now, key))
        return evicted

    def _evict(self) -> CacheKey:
        while True:
            last_used, sealed_at, key = self._order[0]
            used = self._entries[key][0]
            if used == last_used:
                heapq.heappop(self._order)
                self._room += self._entries.pop(key)[2]
                return key
            heapq.heapreplace(self._order, (used, sealed_at, key))


def replayed(trace: Trace, python: Path) -> dict[str, dict[float, Ratio]]:
    """Every policy on every disk. What nothing can beat comes last."""
    capacities = {disk: int(disk * _TIB) for disk in DISKS}
    others = _libcachesim(trace, capacities, python)
    found = {OURS: {disk: ours(trace, size) for disk, size in capacities.items()}, **others}
    apart = max(
        abs(found[OURS][disk].bytes - other.bytes)
        + abs(found[OURS][disk].requests - other.requests)
        for disk, other in found.pop("LRU").items()
    )
    if apart > 1e-9:
        sys.exit(f"error: our LRU and libcachesim's are {apart} apart: nothing was measured")
    intervals = _intervals(trace)
    found[BOUND] = {disk: bound(trace, intervals, size) for disk, size in capacities.items()}
    return found


def ours(trace: Trace, capacity: int) -> Ratio:
    disk, keys = Ours(capacity), [cache_key(f"hf://bench/{n}") for n in range(len(trace.sizes))]
    hits = (
        trace.sizes[model]
        for now, model in enumerate(trace.requests)
        if disk.ask(keys[model], trace.sizes[model], now) is None
    )
    return _ratio(trace, list(hits))


def _ratio(trace: Trace, hits: Sequence[float]) -> Ratio:
    return Ratio(len(hits) / len(trace.requests), sum(hits) / _asked_for(trace))


def _asked_for(trace: Trace) -> int:
    return sum(trace.sizes[model] for model in trace.requests)


def _intervals(trace: Trace) -> list[tuple[int, int]]:
    """For each request but the first of its model: how long ago the last was, and the size."""
    before: dict[int, int] = {}
    found = []
    for now, model in enumerate(trace.requests):
        if model in before:
            found.append((now - before[model], trace.sizes[model]))
        before[model] = now
    return found


def bound(trace: Trace, intervals: Iterable[tuple[int, int]], capacity: int) -> Ratio:
    """More than any policy can hit (PFOO-L, Berger et al. 2018).

    To hit, a model has to lie there since its last request. All that lies there, summed over time,
    is at most the disk times the time; the cheapest hits are bought with that, the last in part.
    """
    fits = [(length, size) for length, size in intervals if size <= capacity]
    budget = capacity * len(trace.requests)
    most = _bought(sorted((length * size, 1) for length, size in fits), budget)
    most_bytes = _bought(((length * size, size) for length, size in sorted(fits)), budget)
    return Ratio(most / len(trace.requests), most_bytes / _asked_for(trace))


def _bought(offers: Iterable[tuple[int, int]], budget: int) -> float:
    """What the offers (price, worth) give, cheapest for its worth first."""
    worth = 0.0
    for price, value in offers:
        if price >= budget:
            return worth + value * budget / price
        budget -= price
        worth += value
    return worth


# -- libcachesim --------------------------------------------------------------------------------

_SCRIPT = """
import json, sys
import libcachesim as library
path, capacities, policies = json.load(sys.stdin)
for policy in policies:
    for capacity in capacities:
        reader = library.TraceReader(path, trace_type=library.TraceType.ORACLE_GENERAL_TRACE)
        cache = getattr(library, policy)(cache_size=capacity, hashpower=16)
        requests, size = cache.process_trace(reader)
        print("result", json.dumps([policy, capacity, 1 - requests, 1 - size]), flush=True)
"""

_REQUEST = struct.Struct("<IQIq")  # libcachesim's "oracleGeneral": time, object, size, next request
_NEVER = 2**30
"""As the next request: one that is far away."""


def environment() -> Path:
    """The Python that has libcachesim, made at the first call."""
    python = ENVIRONMENT / "bin" / "python"
    ready = ENVIRONMENT / f".{LIBRARY}"
    if not ready.exists():
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--only-binary", ":all:", LIBRARY], check=True)
        ready.touch()
    return python


def _libcachesim(
    trace: Trace, capacities: Mapping[float, int], python: Path
) -> dict[str, dict[float, Ratio]]:
    with tempfile.NamedTemporaryFile(dir=ENVIRONMENT) as file:
        file.write(_written(trace))
        file.flush()
        ran = subprocess.run(
            [python, "-c", _SCRIPT],
            input=json.dumps([file.name, [*capacities.values()], [*POLICIES.values()]]),
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
            check=True,
        )
    # It logs to the same stream, in colours.
    lines = [line.partition("result ")[2] for line in ran.stdout.splitlines()]
    ratios = {
        (policy, size): Ratio(*rest) for policy, size, *rest in map(json.loads, filter(None, lines))
    }
    return {
        name: {disk: ratios[policy, size] for disk, size in capacities.items()}
        for name, policy in POLICIES.items()
    }


def _written(trace: Trace) -> bytes:
    after: dict[int, int] = {}
    lines = []
    for now, model in reversed(list(enumerate(trace.requests))):
        lines.append(_REQUEST.pack(now, model + 1, trace.sizes[model], after.get(model, _NEVER)))
        after[model] = now
    return b"".join(reversed(lines))


# -- the report ---------------------------------------------------------------------------------


def table(found: Mapping[str, Mapping[float, Ratio]]) -> str:
    """Markdown. Each cell is the percentage of the bytes, then of the requests."""
    lines = [
        ["bytes / requests, %", *(f"{disk} TiB" for disk in TABLE)],
        ["---"] * (len(TABLE) + 1),
    ]
    for name, ratios in found.items():
        cells = (ratios[disk] for disk in TABLE)
        lines.append([name, *(f"{100 * r.bytes:.1f} / {100 * r.requests:.1f}" for r in cells)])
    online = [ratios for name, ratios in found.items() if name not in _KNOWS_THE_FUTURE]
    best = [max(ratios[disk].bytes for ratios in online) for disk in TABLE]
    behind = [1 - found[OURS][disk].bytes / top for disk, top in zip(TABLE, best, strict=True)]
    lines.append(["ours behind the best online one, bytes", *(f"{b:.1%}" for b in behind)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_COLOURS = {
    OURS: "#d62728",
    "FIFO": "#8c8c8c",
    "LFU": "#8c564b",
    "ARC": "#ff9d3b",
    "2Q": "#bcbd22",
    "LRU-2": "#1f77b4",
    "SIEVE": "#2ca02c",
    "S3-FIFO": "#17becf",
    "LHD": "#e377c2",
    "GDSF": "#9467bd",
    "Belady": "#555555",
    BOUND: "#000000",
}
_WIDTH, _HEIGHT, _PANEL, _LEFT, _TOP = 860, 470, 350, 60, 50
_LOW = 330  # the y of 0 %


def plot(found: Mapping[float, tuple[Trace, Mapping[str, Mapping[float, Ratio]]]]) -> str:
    """One panel for each alpha: hits by bytes over the disk, in TiB and parts of what is alive."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' font-family="sans-serif" font-size="12" fill="#222">',
        "<title>Hit ratio by bytes over the size of the disk</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for number, (alpha, (trace, policies)) in enumerate(found.items()):
        parts += _panel(_LEFT + number * (_PANEL + 60), f"Zipf, alpha {alpha:g}", trace, policies)
    for number, name in enumerate(_COLOURS):
        x, y = _LEFT + number % 6 * 120, _LOW + 90 + number // 6 * 22
        parts.append(f'<path d="M{x} {y}h24" {_stroke(name)}/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    left: int, title: str, trace: Trace, policies: Mapping[str, Mapping[float, Ratio]]
) -> list[str]:
    step = _PANEL // (len(DISKS) - 1)
    parts = [f'<text x="{left}" y="{_TOP - 22}" font-size="14">{title}: hits by bytes</text>']
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        parts.append(f'<path d="M{left} {y}h{_PANEL}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{percent} %</text>')
    for number, disk in enumerate(DISKS):
        middle = f'x="{left + number * step}" text-anchor="middle"'
        parts.append(f'<text {middle} y="{_LOW + 20}">{disk:g} TiB</text>')
        share = disk * _TIB / trace.alive
        parts.append(f'<text {middle} y="{_LOW + 36}" fill="#777">{share:.0%}</text>')
    caption = f'x="{left + _PANEL // 2}" y="{_LOW + 56}" text-anchor="middle" fill="#777"'
    parts.append(f"<text {caption}>disk, and its part of the models that are alive</text>")
    for name in sorted(policies, key=lambda name: name == OURS):  # ours on top
        points = (
            f"{left + number * step},{_y(policies[name][disk].bytes)}"
            for number, disk in enumerate(DISKS)
        )
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" {_stroke(name)}/>')
    return parts


def _y(ratio: float) -> float:
    return round(_LOW - ratio * (_LOW - _TOP), 1)


def _stroke(name: str) -> str:
    dash = ' stroke-dasharray="5 4"' if name in _KNOWS_THE_FUTURE else ""
    return f'stroke="{_COLOURS[name]}" stroke-width="{3 if name == OURS else 1.5}"{dash}'


if __name__ == "__main__":
    main()
