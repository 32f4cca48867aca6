"""The shipped DaemonSet, as it is but for the image's name and the hub's address, on a real node.

The hub listens on the node's bridge, where pods reach it.
"""

import random
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agent import layout
from agent.model import cache_key
from tests.cluster.identity import NAMESPACE
from tests.fakes.hub import Slow
from tests.machine import files_of, until
from tests.node.host import NAME
from tests.node.installation import OWNER, Agent
from tests.node.node import on_host
from tests.node.objects import PATIENCE, SLEEP, Lab, container

FILES = {
    "config.json": b'{"model_type": "tiny"}\n',
    "model-1.safetensors": random.Random(1).randbytes(3_000_000),
    "model-2.safetensors": random.Random(2).randbytes(3_000_000),
    "sub/notes.md": b"# notes\n",
}


def test_prepare_gives_the_agent_its_directories(agent: Agent) -> None:
    for path, mode in (
        (on_host("/models"), 0o755),
        (on_host("/models") / layout.MODELS, 0o755),
        (on_host("/models") / layout.MANIFESTS, 0o755),
        (on_host("/var/lib/localmodel-agent"), 0o700),
    ):
        found = path.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (OWNER, OWNER, mode), path


def test_model_of_the_node_object_is_downloaded_and_a_pod_reads_the_same_bytes(
    agent: Agent,
) -> None:
    agent.hub.add("acme/first", FILES)
    model = agent.want("first", "acme/first")
    agent.wait_downloaded("first")
    assert files_of(model) == FILES

    with closing(Lab(agent.node, "serving", Path("/models"))) as lab:
        lab.bind()
        mounts = {"/mnt/models": f"models/{model.name}"}
        pod = lab.pod(container("server", SLEEP, mounts), read_only=True).wait_running()
        manifest = (on_host("/models") / layout.manifest(cache_key("hf://acme/first"))).read_text()
        lines = [line for line in manifest.splitlines() if line and not line.startswith("#")]
        assert len(lines) == len(FILES)
        names = [line.split(maxsplit=1)[1] for line in lines]
        read = pod.run("sh", "-c", 'cd /mnt/models && sha256sum "$@"', "sh", *names)
        assert read.splitlines() == lines

        # As long as it runs its model stays, whatever the spec says.
        agent.forget("first")
        until(lambda: "first" not in agent.status(), agent.describe, seconds=PATIENCE)
        assert files_of(model) == FILES
    until(lambda: not model.exists(), agent.describe, seconds=PATIENCE)


def test_the_verbs_find_the_cache_in_the_pod(agent: Agent) -> None:
    """What `kubectl localmodel ls --node NODE` runs."""
    agent.hub.add("acme/listed", FILES)
    agent.want("listed", "acme/listed")
    agent.wait_downloaded("listed")
    pod = agent.wait_ready()["metadata"]["name"]
    listed = agent.node.plane.kubectl("exec", pod, "-n", NAMESPACE, "--", "localmodel", "ls")
    assert "hf://acme/listed" in listed


def test_agent_lives_by_its_lease_and_without_privilege(agent: Agent) -> None:
    """Its token is bound to the node, else the shipped policy would have refused the Lease."""
    pod = agent.wait_ready()["metadata"]["name"]
    lease = agent.node.plane.get("lease", NAME, "-n", NAMESPACE)
    assert lease["spec"]["holderIdentity"].rpartition("/")[2] == pod
    read = agent.node.plane.kubectl(
        "exec", pod, "-n", NAMESPACE, "-c", "agent", "--", "cat", "/proc/1/status"
    )
    status = dict(line.split(":", 1) for line in read.splitlines())
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(OWNER)}
    assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"


def test_agent_deleted_amid_a_download_goes_on_where_it_was(agent: Agent) -> None:
    first, second = "model-1.safetensors", "model-2.safetensors"
    agent.hub.add("acme/second", FILES | {first: FILES[first][::-1], second: FILES[second][::-1]})
    agent.hub.fault(f"acme/second/{second}", Slow(bytes_per_second=300_000))
    model = agent.want("second", "acme/second")
    sent = agent.hub.bytes_sent
    size = len(FILES[second])
    until(lambda: sent(f"acme/second/{first}") == size, agent.describe)
    until(lambda: agent.status().get("second") == "ModelDownloading", agent.describe)
    until(lambda: sent(f"acme/second/{second}") > size // 2, agent.describe)

    deleted = agent.wait_ready()["metadata"]
    agent.node.plane.kubectl("delete", "pod", deleted["name"], "-n", NAMESPACE, "--wait=false")
    until(lambda: all(p["metadata"]["uid"] != deleted["uid"] for p in agent.pods()))
    agent.hub.clear_faults()
    assert agent.wait_ready()["metadata"]["uid"] != deleted["uid"]
    agent.wait_downloaded("second")
    assert agent.status()["listed"] == "ModelDownloaded"
    assert files_of(model)[second] == FILES[second][::-1]
    assert sent(f"acme/second/{first}") == size
    # What was in flight when the connection went is sent again, and the rest is not.
    assert sent(f"acme/second/{second}") < 1.1 * size, sent(f"acme/second/{second}") / size


@pytest.mark.parametrize("server", ["kubelet", "containerd"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_kubelet_restarted_disturbs_nothing(
    agent: Agent, server: str, number: signal.Signals
) -> None:
    before = agent.wait_ready()
    agent.node.restart(server, number)
    name = f"{server}-{number.name.lower()}"
    agent.hub.add(f"acme/{name}", FILES)
    agent.want(name, f"acme/{name}")
    agent.wait_downloaded(name)
    after = agent.wait_ready()

    def containers(pod: dict[str, Any]) -> list[tuple[str, int]]:
        return [
            (one["containerID"], one["restartCount"]) for one in pod["status"]["containerStatuses"]
        ]

    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert containers(after) == containers(before)
