"""Fixtures of the tests on a real node, which is up once for all of them."""

import re
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from tests.fakes.hub import Hub
from tests.node.host import ADDRESS
from tests.node.image import agent_image as build
from tests.node.installation import Agent, install
from tests.node.node import STATE, Node
from tests.node.objects import Lab
from tests.node.packages import need_host

_number = count(1)


# Not for the session: it would take its share of the machine from the tests after these.
@pytest.fixture(scope="package")
def node() -> Iterator[Node]:
    with Node() as node:
        yield node


@pytest.fixture
def lab(node: Node, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A place for one volume, not made yet, and pods that use it."""
    words = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())
    name = f"{words[:40].strip('-')}-{next(_number)}"
    path: Path = STATE / "volumes" / name
    with closing(Lab(node, name, path)) as lab:
        yield lab


@pytest.fixture(scope="package")
def hub(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """On the node's bridge, where pods reach it."""
    with Hub(tmp_path_factory.mktemp("hub"), host=ADDRESS) as hub:
        yield hub


@pytest.fixture(scope="package")
def agent(node: Node, hub: Hub, agent_image: Path) -> Agent:
    """Installed as the README says, on the one node of its group."""
    return install(node, hub, agent_image)


@pytest.fixture(scope="package")
def agent_image() -> Path:
    """The archive of the image that our Dockerfile makes of the sources as they are."""
    need_host()
    return build()
