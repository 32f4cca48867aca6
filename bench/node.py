"""From the creation of a pod to the first byte of its model read, on a real node (tests/node).

Five pods in turn: two without a model, of which one has an initializer; one that reads the cache
through the wrapped initializer; one that KServe rewrote onto its claim; and one whose initializer
downloads the model, from a hub on the same machine. The end is when containerd reads the line that
the server prints after that byte.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.origin import write_random
from tests.cluster.nodes import cache
from tests.fakes.hub import Hub
from tests.node.host import ADDRESS
from tests.node.image import agent_image
from tests.node.installation import GROUP, install
from tests.node.node import Node
from tests.node.objects import SLEEP, Pod
from tests.node.tenants import SERVER, Tenant, claim_of_kserve, initializer_image

_GIB = 2**30
_REPO, _FILE = "bench/model", "model.safetensors"
_URI = f"hf://{_REPO}"
_REACH_SECONDS = 0.15
_PATIENCE = 600.0


def run(runs: int, scale: float) -> None:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")))
        node = stack.enter_context(Node())
        hub = stack.enter_context(Hub(home / "hub", host=ADDRESS))
        size = int(2 * _GIB * scale)
        write_random(home / _FILE, size, random.Random(0))
        hub.add(_REPO, {_FILE: home / _FILE})
        agent = install(node, hub, agent_image())
        node.load(initializer_image())
        agent.wait_controllers()
        node.plane.apply(cache("bench", _URI, [GROUP]))
        agent.want("bench", _REPO)
        agent.wait_downloaded("bench", seconds=_PATIENCE)
        inside = stack.enter_context(closing(Tenant(node, hub, "bench")))
        inside.wait_claim()
        claim_of_kserve(inside, f"bench-{GROUP}")
        outside = stack.enter_context(closing(Tenant(node, hub, "bench-outside", label=False)))
        read = f"/mnt/models/{_FILE}"
        kinds: dict[str, Callable[[str], float]] = {
            "no model at all": lambda name: _timed(
                outside, _without_a_model(outside, name), "/bin/sh"
            ),
            "the same with an initializer that does nothing": lambda name: _timed(
                outside, _without_a_model(outside, name, command=["true"]), "/bin/sh"
            ),
            "cached, by the wrapped initializer": lambda name: _timed(
                inside, inside.predictor(name, _URI, [_FILE]), read
            ),
            "cached, rewritten by KServe": lambda name: _timed(
                inside, inside.rewritten(name, _URI, f"bench-{GROUP}"), read
            ),
            "not cached: downloaded by the initializer": lambda name: _timed(
                outside, outside.predictor(name, _URI, [_FILE]), read
            ),
        }
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(runs):
            for index, (kind, timed) in enumerate(kinds.items()):
                found[kind].append(timed(f"p{number}-{index}"))
        print(f"\nPod created to first byte read, real node, {size / _GIB:.3g} GiB, {runs} runs")
        base = statistics.median(found["no model at all"])
        for kind, seconds in found.items():
            middle = statistics.median(seconds)
            print(
                f"  {kind:<45} {middle:7.2f} s  [{min(seconds):.2f}-{max(seconds):.2f}]"
                f"  {1000 * (middle - base):+8.0f} ms"
            )
        print(f"  (reach: cached within {1000 * _REACH_SECONDS:.0f} ms of no model at all)")


def _without_a_model(
    tenant: Tenant, name: str, *, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """The same server, that is to read its own program; `command` is what its initializer runs, if
    it is to have one: to start a container takes kubelet a while, whatever is in it."""
    pod = tenant.predictor(name, _URI, [_FILE])
    if command is None:
        del pod["spec"]["initContainers"]
    else:
        pod["spec"]["initContainers"][0]["command"] = list(command)
    return pod


def _timed(tenant: Tenant, pod: dict[str, Any], file: str) -> float:
    (server,) = pod["spec"]["containers"]
    server["command"] = ["sh", "-c", f"head -c 1 {file} >/dev/null && echo read; {SLEEP}"]
    begun_at = time.time()
    made = tenant.create(pod)
    try:
        made.wait_running(SERVER, seconds=_PATIENCE)
        return _read_at(made) - begun_at
    finally:
        tenant.remove(made)


def _read_at(pod: Pod) -> float:
    (line,) = [line for line in pod.log(SERVER, "--timestamps").splitlines() if "read" in line]
    stamp = line.split()[0]
    return datetime.fromisoformat(f"{stamp[:26].rstrip('Z')}+00:00").timestamp()
