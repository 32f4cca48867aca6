"""The agent on a real API server: how fast what happens is said, and what it costs to be there.

The origin sends each model in about six seconds, as a real one takes minutes: a change that follows
another within two seconds shares its write (docs/design.md), and is not what is measured.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.cluster.control_plane import ControlPlane, binaries
from tests.cluster.identity import AgentOnNode, install
from tests.cluster.nodes import Node, cache
from tests.fakes.faults import Slow
from tests.fakes.hub import Hub
from tests.machine import Agent, machine

_MIB = 2**20
_IDLE_SECONDS = 120.0


def available() -> bool:
    """Whether etcd and kube-apiserver are there (`make control-plane`)."""
    try:
        binaries("etcd", "kube-apiserver", "kubectl")
    except BaseException:  # noqa: BLE001  pytest's skip is no Exception
        return False
    return True


def run(runs: int) -> None:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")))
        plane = stack.enter_context(ControlPlane(home / "plane"))
        install(plane)
        hub = stack.enter_context(Hub(home / "hub"))
        where = stack.enter_context(machine(home / "machine", hub.endpoint))
        node = Node(plane, AgentOnNode.create(plane, "bench"), where)
        node.make_group()
        node.want()
        proxy = stack.enter_context(node.behind_a_proxy())
        agent = node.start().wait_ready()
        print("\nOn a real API server (RBAC on), one node")
        began, said = zip(*(_one(node, hub, number) for number in range(runs)), strict=True)
        report("spec written to first byte asked for", [1000 * s for s in began], "ms")
        report("last byte sent to ModelDownloaded in the API", [1000 * s for s in said], "ms", 250)
        before = sum(count for verb, count in proxy.requests.items() if verb != "WATCH")
        time.sleep(_IDLE_SECONDS)
        after = sum(count for verb, count in proxy.requests.items() if verb != "WATCH")
        report(
            "requests of an idle agent, no watches",
            [(after - before) * 60 / _IDLE_SECONDS],
            "/min",
            2,
        )
        report("RSS, idle", [_rss(agent)], "MiB", 110)
        report("RSS, peak of a download of 512 MiB", [_peak(node, hub, agent)], "MiB", 160)


def _one(node: Node, hub: Hub, number: int) -> tuple[float, float]:
    """Seconds from the spec to the first byte, and from the last byte to the word."""
    repo, size = f"bench/m{number}", 3 * _MIB
    hub.add(repo, {"model.safetensors": bytes(size)})
    hub.fault(f"{repo}/*", Slow(bytes_per_second=_MIB // 2))
    node.plane.apply(cache(f"m{number}", f"hf://{repo}", [node.group]))
    begun = time.perf_counter()
    node.want(**{f"m{number}": f"hf://{repo}"})
    applied = time.perf_counter()
    first = _when(lambda: hub.bytes_sent(f"{repo}/*") > 0)
    last = _when(lambda: hub.bytes_sent(f"{repo}/*") >= size)
    done = _when(lambda: node.words() == {f"m{number}": "ModelDownloaded"})
    assert applied > begun
    return max(0.0, first - applied), done - last


def _peak(node: Node, hub: Hub, agent: Agent) -> float:
    hub.add("bench/large", {f"{n}.safetensors": bytes([n]) * (64 * _MIB) for n in range(8)})
    peaks, over = [0.0], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            peaks.append(_rss(agent))

    looking = threading.Thread(target=look)
    looking.start()
    node.want(large="hf://bench/large")
    _when(lambda: node.words() == {"large": "ModelDownloaded"})
    over.set()
    looking.join()
    return max(peaks)


def _when(condition: Callable[[], bool]) -> float:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.002)
    return time.perf_counter()


def _rss(agent: Agent) -> float:
    size: int = psutil.Process(agent.pid).memory_info().rss
    return size / _MIB


def report(what: str, numbers: list[float], unit: str, reach: float | None = None) -> None:
    median = statistics.median(numbers)
    spread = f"{min(numbers):.0f}-{max(numbers):.0f}" if len(numbers) > 1 else ""
    goal = "" if reach is None else f"reach {reach:g}: {'yes' if median <= reach else 'NO'}"
    print(f"  {what:<46} {median:>8.1f} {unit:<5} {spread:>12}  {goal}")
