"""What an agent does while its API server, its disk and its neighbours misbehave."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.identity import SERVING, AgentOnNode
from tests.cluster.nodes import Node
from tests.cluster.test_agent import DOWNLOADED, FAILED, OTHER, OTHER_URI
from tests.conftest import FILES, REPO, URI
from tests.fakes.faults import Slow
from tests.fakes.hub import Hub
from tests.machine import Agent, files_of, machine, until

SIZE = sum(map(len, FILES.values()))
SLOW = Slow(bytes_per_second=100_000)  # three seconds for the larger file


def _begin(node: Node, hub: Hub) -> Agent:
    """A download that goes on for a few seconds."""
    hub.fault("*.safetensors", SLOW)
    node.want(tiny=URI)
    agent = node.start()
    until(lambda: hub.bytes_sent("*.safetensors") > 0, agent.log_text)
    return agent


# -- the API server -----------------------------------------------------------------------------


def test_the_server_dies_during_a_download_and_no_byte_comes_twice(
    private_node: Node, hub: Hub
) -> None:
    node, agent = private_node, _begin(private_node, hub)
    node.plane.kill_apiserver()
    until(lambda: node.machine.sealed(), agent.log_text)
    node.plane.restart_apiserver()
    node.wait_words(agent, tiny=DOWNLOADED)
    assert hub.bytes_sent(f"{REPO}/*") == SIZE
    # What changes afterwards is heard of.
    hub.add(OTHER, {"config.json": b"{}"})
    node.want(tiny=URI, other=OTHER_URI)
    node.wait_words(agent, tiny=DOWNLOADED, other=DOWNLOADED)


def test_a_watch_that_is_closed_every_second_misses_nothing(node: Node, hub: Hub) -> None:
    with node.behind_a_proxy() as proxy:
        proxy.watch_seconds = 1.0
        agent = node.start().wait_ready()
        lists = {path: count for path, count in proxy.lists.items() if "/lease" not in path}
        for number in range(3):
            hub.add(f"acme/m{number}", {"config.json": b"%d" % number})
            names = [f"m{n}" for n in range(number + 1)]
            node.want(**{name: f"hf://acme/{name}" for name in names})
            node.wait_words(agent, **dict.fromkeys(names, DOWNLOADED))
        assert proxy.requests["WATCH"] > 10
        again = {path: proxy.lists[path] for path in lists}
        assert again == lists, "listed again without a need"
        assert max(proxy.lists.values()) <= 3, "what credentials are made of is kept for a minute"


def test_a_history_that_is_compacted_away_is_listed_again(private_node: Node, hub: Hub) -> None:
    node = private_node
    with node.behind_a_proxy() as proxy:
        proxy.watch_seconds = 0.5
        agent = node.start().wait_ready()
        lists = proxy.requests["GET"]
        proxy.holds_watches = True
        until(lambda: agent.said("held"), agent.log_text)
        node.want(tiny=URI)
        node.plane.compact()
        proxy.holds_watches = False
        node.wait_words(agent, tiny=DOWNLOADED)
        assert proxy.requests["GET"] > lists


@pytest.mark.parametrize("status", [409, 429, 503])
def test_a_status_that_is_refused_is_written_later(node: Node, status: int) -> None:
    with node.behind_a_proxy() as proxy:
        headers = {"Retry-After": "1"} if status == 429 else {}
        proxy.answers = [("PATCH", status, headers)] * 3
        node.want(tiny=URI)
        agent = node.start()
        node.wait_words(agent, tiny=DOWNLOADED)
        assert not proxy.answers


def test_a_token_that_was_rotated_is_read_again(node: Node, hub: Hub) -> None:
    with node.behind_a_proxy() as proxy:
        proxy.watch_seconds = 1.0
        agent = node.start().wait_ready()
        old = node.identity.token
        node.identity.rotate()
        proxy.revoked.add(old)
        node.want(tiny=URI)
        node.wait_words(agent, tiny=DOWNLOADED)
        assert not agent.said("revoked")


# -- the objects --------------------------------------------------------------------------------


def test_9_1_1_no_local_model_node_is_waited_for(node: Node) -> None:
    agent = node.start().wait_ready()
    node.want(tiny=URI)
    node.wait_words(agent, tiny=DOWNLOADED)


def test_an_object_that_is_deleted_and_made_again_costs_nothing(node: Node, hub: Hub) -> None:
    """KServe's controller makes it with one model and patches the others in."""
    hub.add(OTHER, {"config.json": b"{}"})
    node.want(tiny=URI, other=OTHER_URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED, other=DOWNLOADED)
    sent = hub.bytes_sent()
    node.plane.kubectl("delete", "localmodelnode", node.name)
    until(lambda: len(node.machine.sealed()) == 2)  # absence is not a command
    node.want(other=OTHER_URI)
    node.wait_words(agent, other=DOWNLOADED)
    node.want(tiny=URI, other=OTHER_URI)
    node.wait_words(agent, tiny=DOWNLOADED, other=DOWNLOADED)
    assert hub.bytes_sent() == sent
    # What leaves the new object has left.
    node.want(other=OTHER_URI)
    until(lambda: not node.machine.model(URI).exists(), agent.log_text)


def test_another_writer_of_the_status_is_corrected_and_reported(node: Node) -> None:
    node.want(tiny=URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    path = f"{SERVING}/localmodelnodes/{node.name}/status"
    wrong = {"status": {"modelStatus": {"tiny": FAILED, "zombie": DOWNLOADED}}}
    for _ in range(3):
        node.plane.request("PATCH", path, wrong).ok()
        node.wait_words(agent, tiny=DOWNLOADED)
    until(lambda: [e for e in node.events() if "somebody else" in e["message"]], agent.log_text)


def test_on_kserves_own_crds_everything_still_works(
    private_control_plane: Callable[..., ControlPlane], tmp_path: Path, hub: Hub
) -> None:
    """They drop what is ours; it is not offered again and again."""
    plane = private_control_plane(kserve=True)
    with machine(tmp_path / "machine", hub.endpoint) as found:
        node = Node(plane, AgentOnNode.create(plane, "node-0"), found)
        node.make_group()
        node.want(tiny=URI)
        with node.behind_a_proxy() as proxy:
            agent = node.start()
            node.wait_words(agent, tiny=DOWNLOADED)
            assert set(node.status()) == {"modelStatus"}
            written = proxy.requests["PATCH"]
            node.add_pod("reader", uri=URI)
            until(lambda: agent.metrics()["localmodel_requests_total hit"] == 1)
            node.want()
            node.wait_words(agent)
            assert proxy.requests["PATCH"] - written <= 2 + len(node.events())


# -- this node ----------------------------------------------------------------------------------


def test_an_agent_that_is_killed_goes_on_where_it_was(node: Node, hub: Hub) -> None:
    agent = _begin(node, hub)
    until(lambda: hub.bytes_sent("model-1.safetensors") > 100_000)
    agent.kill()
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    assert hub.bytes_sent(f"{REPO}/*") < 2 * SIZE
    assert files_of(node.machine.model(URI)) == FILES


def test_9_1_8_a_tree_that_somebody_deletes_is_withdrawn_and_comes_again(
    node: Node, hub: Hub
) -> None:
    node.want(tiny=URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    hub.fault("*.safetensors", SLOW)  # so that what is said meanwhile can be seen
    (node.machine.model(URI) / "model-1.safetensors").unlink()
    node.wait_words(agent, 60.0, tiny="ModelDownloading")
    node.wait_words(agent, tiny=DOWNLOADED)
    assert files_of(node.machine.model(URI)) == FILES


@pytest.fixture
def on_a_disk(
    node: Node, mount: Callable[..., Path], tmp_path: Path
) -> tuple[Node, list[str], Path]:
    """A node whose cache is a disk of its own; the flags of its agent, and the disk."""
    disk = mount("16m")
    node.make_group(str(disk))
    return node, ["--root", str(disk), "--state", str(tmp_path / "state")], disk


def test_a_disk_that_is_away_is_missing_and_nothing_is_written(
    on_a_disk: tuple[Node, list[str], Path], hub: Hub
) -> None:
    node, flags, disk = on_a_disk
    node.want(tiny=URI)
    agent = node.start(*flags)
    node.wait_words(agent, tiny=DOWNLOADED)
    # Away while it runs: as after `umount -l`, or a mount that was not there at boot.
    subprocess.run(["umount", "--lazy", disk], check=True)
    message = node.wait_condition(agent, "Degraded", "True", "DiskMissing")["message"]
    assert str(disk) in message
    node.wait_words(agent, tiny="ModelDownloadPending")
    assert list(disk.iterdir()) == []
    # A new disk: everything begins again.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
    node.wait_words(agent, tiny=DOWNLOADED)
    assert agent.process.poll() is None
