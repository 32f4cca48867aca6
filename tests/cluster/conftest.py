"""One API server for all tests here; each test has a node of its own, so none disturbs another."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.cluster.control_plane import Answer, ControlPlane, binaries
from tests.cluster.identity import AgentOnNode, install
from tests.cluster.nodes import Node
from tests.fakes.hub import Hub
from tests.machine import machine, until

_numbers = itertools.count(1)
_READABLE = (
    "/apis/serving.kserve.io/v1alpha1/localmodelnodes",
    "/api/v1/events",
    "/apis/coordination.k8s.io/v1/leases",
)


def pytest_runtest_setup() -> None:
    """Here and not in a fixture: so pytest tells of all that is skipped in one line."""
    binaries("etcd", "kube-apiserver", "kubectl")


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The shared API server with our CRDs and the kserve overlay. Do not kill it: see below."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as plane:
        install(plane)
        yield plane
        for path in _READABLE:
            leaks.check(path, json.dumps(_read(plane, path)))


def _read(plane: ControlPlane, path: str) -> Any:
    """429: the storage of a kind is made anew, because its CRD has just been applied."""
    answers: list[Answer] = []

    def answered() -> bool:
        answers.append(plane.request("GET", path))
        return answers[-1].status != 429

    until(answered, path)
    return answers[-1].ok()


@pytest.fixture
def private_control_plane(tmp_path: Path) -> Iterator[Callable[..., ControlPlane]]:
    """A factory of API servers that a test may kill; its arguments are those of `_factory`'s."""
    with _factory(tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def module_control_plane(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., ControlPlane]]:
    """The same for the tests of one file, which leave each other's objects alone."""
    with _factory(tmp_path_factory.mktemp("module")) as make:
        yield make


@contextmanager
def _factory(directory: Path) -> Iterator[Callable[..., ControlPlane]]:
    """`installed=False`: with nothing on it. `kserve=True`: with KServe's own CRDs, not ours.
    `overlay` is which of ours. All else that is given are ControlPlane's arguments."""
    with ExitStack() as started:

        def make(
            *,
            installed: bool = True,
            kserve: bool = False,
            overlay: str = "kserve",
            **options: Any,
        ) -> ControlPlane:
            plane = ControlPlane(directory / f"control-plane-{next(_numbers)}", **options)
            started.enter_context(plane)
            if installed:
                install(plane, kserve=kserve, overlay=overlay)
            return plane

        yield make


@pytest.fixture
def node_name() -> str:
    """The name of a node that no other test has."""
    return f"node-{next(_numbers)}"


@pytest.fixture
def agent_on_node(control_plane: ControlPlane, node_name: str) -> AgentOnNode:
    """The agent's identity on a fresh node of the shared API server."""
    return AgentOnNode.create(control_plane, node_name)


@pytest.fixture
def node(
    control_plane: ControlPlane, agent_on_node: AgentOnNode, tmp_path: Path, hub: Hub
) -> Iterator[Node]:
    """A node with its group, a disk and a hub; its agent is not started yet."""
    with machine(tmp_path / "machine", hub.endpoint) as found:
        made = Node(control_plane, agent_on_node, found)
        made.make_group()
        yield made


@pytest.fixture
def private_node(
    private_control_plane: Callable[..., ControlPlane], tmp_path: Path, hub: Hub
) -> Iterator[Node]:
    """The same on an API server of its own, which the test may kill."""
    plane = private_control_plane(flags=["--watch-cache=false"])
    with machine(tmp_path / "machine", hub.endpoint) as found:
        made = Node(plane, AgentOnNode.create(plane, "node-0"), found)
        made.make_group()
        yield made
