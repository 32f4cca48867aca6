"""Who goes and who stays on a node of a cluster, on the real API server."""

from tests.cluster.nodes import Node, cache, group
from tests.conftest import FILES, URI
from tests.fakes.hub import Hub
from tests.machine import files_of, until

DOWNLOADED = "ModelDownloaded"
PENDING = "ModelDownloadPending"
SIZE = sum(map(len, FILES.values()))
OTHER = "acme/other"
OTHER_URI = f"hf://{OTHER}"


def test_a_pod_that_comes_between_the_plan_and_the_removal_keeps_its_model(
    node: Node, hub: Hub
) -> None:
    """The watch has not heard of it, so the plan does not know; the last list does."""
    with node.behind_a_proxy() as proxy:
        node.want(tiny=URI)
        agent = node.start()
        node.wait_words(agent, tiny=DOWNLOADED)
        proxy.mute = "/pods"
        pod = node.add_pod(f"pod-{node.name}", uri=URI)
        node.want()
        node.wait_words(agent)
        lists = proxy.requests["GET"]
        until(lambda: proxy.requests["GET"] > lists, agent.log_text)  # it is tried again, and again
        assert files_of(node.machine.model(URI)) == FILES
        assert node.machine.sealed()
        node.remove_pod(pod)
        proxy.mute = ""
        until(lambda: not node.machine.model(URI).exists(), agent.log_text)


def test_on_demand_comes_with_its_pod_and_goes_for_another(node: Node, hub: Hub) -> None:
    """Two models through a cache that may hold one; each is fetched when a pod asks."""
    hub.add(OTHER, {"model.safetensors": b"o" * SIZE})
    first, second = f"first-{node.name}", f"second-{node.name}"
    for name, uri in ((first, URI), (second, OTHER_URI)):
        node.plane.apply(cache(name, uri, [node.group], policy="on-demand"))
    node.want(**{first: URI, second: OTHER_URI})
    agent = node.start("--limit", str(SIZE + 100), "--min-age", "0s")
    node.wait_words(agent, **{first: PENDING, second: PENDING})
    assert hub.bytes_sent() == 0

    pod = node.add_pod(f"one-{node.name}", uri=URI)
    node.wait_words(agent, **{first: DOWNLOADED, second: PENDING})
    other = node.add_pod(f"two-{node.name}", uri=OTHER_URI)
    until(
        lambda: node.status()["models"][second].get("reason") == "InsufficientCapacity",
        agent.log_text,
    )
    shown = node.machine("why", OTHER_URI).ok().stdout
    assert "are free below the limit and 0 could be evicted" in shown
    assert f"used by pod default/one-{node.name}" in node.machine("why", URI).ok().stdout

    node.remove_pod(pod)
    node.wait_words(agent, **{first: PENDING, second: DOWNLOADED})
    assert "its room was needed" in node.machine("why", URI).ok().stdout
    node.remove_pod(other)


def test_the_limit_of_a_node_group_holds_and_is_shown(node: Node, hub: Hub) -> None:
    limited = group(node.group, str(node.machine.root))
    limited["spec"]["storageLimit"] = "100Ki"
    node.plane.apply(limited)
    node.want(tiny=URI)
    agent = node.start()
    until(
        lambda: node.status().get("models", {}).get("tiny", {}).get("reason") == "LargerThanVolume",
        agent.log_text,
    )
    assert "this volume may hold 100Ki" in node.status()["models"]["tiny"]["message"]
    assert node.status()["disk"]["limit"] == "100Ki"
    assert hub.bytes_sent("model-1.safetensors") == 0
    limited["spec"]["storageLimit"] = "10Gi"
    node.plane.apply(limited)
    node.wait_words(agent, tiny=DOWNLOADED)


def test_a_refresh_of_a_cache_takes_the_new_revision(node: Node, hub: Hub) -> None:
    name = f"moving-{node.name}"
    node.plane.apply(cache(name, URI, [node.group]))
    node.want(**{name: URI})
    agent = node.start()
    node.wait_words(agent, **{name: DOWNLOADED})
    newer = {**FILES, "config.json": b'{"newer": true}'}
    commit = hub.add("acme/tiny", newer)
    hub.clear()
    node.plane.apply(cache(name, URI, [node.group], refresh="2"))
    until(lambda: node.status()["models"][name].get("revision") == commit, agent.log_text)
    assert files_of(node.machine.model(URI)) == newer
    assert hub.bytes_sent("model-1.safetensors") == 0
    assert hub.bytes_sent("config.json") > 0
