"""Predictor pods on the real node: admitted by the shipped controllers, fed by the agent."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import closing

import pytest

from agent.model import cache_key
from tests.cluster.identity import NAMESPACE
from tests.cluster.nodes import cache
from tests.fakes.hub import Hub
from tests.machine import until
from tests.node.installation import CONTROLLER, GROUP, Agent
from tests.node.objects import PATIENCE
from tests.node.tenants import SERVER, Tenant, initializer_image, tree

FILES = {
    "config.json": b'{"model_type": "tiny"}\n',
    "model.safetensors": random.Random(3).randbytes(2_000_000),
    "sub/dir/tokenizer.json": b"{}\n",
}


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def sent(hub: Hub, repo: str) -> int:
    return sum(hub.bytes_sent(f"{repo}/{name}") for name in FILES)


@pytest.fixture(scope="module")
def serving(agent: Agent) -> Agent:
    """With both controllers ready, and an initializer to wrap."""
    agent.node.load(initializer_image())

    def ready() -> bool:
        found = agent.node.plane.get("deployment", CONTROLLER, "-n", NAMESPACE)
        return bool(found["status"].get("readyReplicas") == 2)

    until(ready, lambda: _controllers(agent), seconds=PATIENCE)
    return agent


def _controllers(agent: Agent) -> str:
    plane = agent.node.plane
    parts = [plane.kubectl("get", "pods,events", "-n", NAMESPACE)]
    for pod in agent.pods(CONTROLLER):
        parts.append(plane.kubectl("logs", pod["metadata"]["name"], "-n", NAMESPACE))
    return "\n".join(parts)


@pytest.fixture
def tenant(serving: Agent, request: pytest.FixtureRequest) -> Iterator[Tenant]:
    name = request.node.name.removeprefix("test_").replace("_", "-")[:40].strip("-")
    with closing(Tenant(serving.node, serving.hub, name)) as tenant:
        tenant.wait_claim()
        yield tenant


def known(agent: Agent, name: str, repo: str) -> None:
    """A LocalModelCache of it: what the hook goes by. The LocalModelNode is `want`'s."""
    agent.node.plane.apply(cache(name, f"hf://{repo}", [GROUP]))


def test_a_predictor_starts_from_the_cache_and_asks_no_origin(
    serving: Agent, tenant: Tenant
) -> None:
    repo = "acme/served"
    serving.hub.add(repo, FILES)
    known(serving, "served", repo)
    serving.want("served", repo)
    serving.wait_downloaded("served")
    before = sent(serving.hub, repo)
    pod = tenant.create(tenant.predictor("p", f"hf://{repo}", FILES))
    notes = pod.get()["metadata"]["annotations"]
    assert notes["localmodel-agent.io/keys"] == cache_key(f"hf://{repo}"), _controllers(serving)
    pod.wait_running(SERVER)
    assert tree(pod) == digests(FILES)
    assert "from this node's cache" in pod.log("storage-initializer")
    assert sent(serving.hub, repo) == before
