"""What the agent says on the pods of its node, on the real API server."""

import time

import pytest

from agent.model import cache_key
from tests.cluster.nodes import Node, cache
from tests.conftest import URI
from tests.fakes.hub import Hub, Slow
from tests.machine import Agent, until

DOWNLOADED = "ModelDownloaded"
PENDING = "ModelDownloadPending"
KEY = cache_key(URI)
MISSING = "hf://acme/missing"
BYPASSED = "localmodel_pods_bypassed_total"


@pytest.mark.parametrize("by", ["keys", "subPath"])
def test_a_pod_brings_what_is_on_demand_also_by_what_the_hook_wrote(node: Node, by: str) -> None:
    name, pod = f"tiny-{node.name}", f"pod-{node.name}"
    node.plane.apply(cache(name, URI, [node.group], policy="on-demand"))
    node.want(**{name: URI})
    agent = node.start()
    node.wait_words(agent, **{name: PENDING})
    assert "nobody on this node asks for it" in node.machine("why", URI).ok().stdout
    node.add_pod(pod, keys=KEY) if by == "keys" else node.add_pod(pod, uri=URI)
    node.wait_words(agent, **{name: DOWNLOADED})
    shown = node.machine("why", URI).ok().stdout
    assert f"used by pod default/{pod}\n" in shown
    assert node.events(pod) == [], "it was here in a moment"


def test_a_pod_is_told_that_it_waits_how_far_it_is_and_when_it_is_over(
    node: Node, hub: Hub
) -> None:
    pod = f"pod-{node.name}"
    hub.fault("model-1.safetensors", Slow(bytes_per_second=25_000))
    node.want(tiny=URI)
    agent = node.start()
    node.add_pod(pod, keys=KEY)
    event = node.wait_event(agent, pod, "WaitsForModel")
    assert event["type"] == "Normal"
    assert f"waits for {URI}: " in event["message"]
    assert " of 488Ki, fetching" in event["message"]
    about = event["involvedObject"]
    assert (about["kind"], about["apiVersion"], about["namespace"]) == ("Pod", "v1", "default")
    assert "WaitsForModel" in node.plane.kubectl("describe", "pod", pod)
    event = node.wait_event(agent, pod, "ModelReady")
    assert (event["type"], event["count"]) == ("Normal", 1)
    assert URI in event["message"]
    assert len(node.events(pod)) == 2


def test_a_pod_is_told_why_its_model_does_not_come(node: Node) -> None:
    name = f"missing-{node.name}"
    nowhere, nobodys = f"nowhere-{node.name}", f"nobodys-{node.name}"
    node.plane.apply(cache(name, MISSING, [node.group], policy="on-demand"))
    node.want(**{name: MISSING})
    agent = node.start()
    node.add_pod(nowhere, keys=cache_key(MISSING))
    node.add_pod(nobodys, uri=URI)
    event = node.wait_event(agent, nowhere, "RepositoryNotFound")
    assert event["type"] == "Warning"
    assert event["message"].startswith(f"{MISSING}: ")
    assert "next try at " in event["message"]
    shown = node.machine("why", MISSING).ok().stdout
    assert "failed once; the next try is in " in shown
    event = node.wait_event(agent, nobodys, "NotAskedFor")
    assert KEY in event["message"]
    # What asks for it then is news.
    node.want(**{name: MISSING, "tiny": URI})
    node.wait_event(agent, nobodys, "ModelReady")


def test_a_pod_that_goes_past_the_cache_is_counted_and_told_once(node: Node) -> None:
    """The hook is not there at all: this is what an operator sees of it."""
    name, pod, other = (f"{which}-{node.name}" for which in ("tiny", "past", "other"))
    node.plane.apply(cache(name, URI, [node.group]))
    node.want(**{name: URI})
    agent = node.start()
    node.wait_words(agent, **{name: DOWNLOADED})
    time.sleep(1.1)  # the API server counts whole seconds
    node.add_pod(pod, downloads=f"{URI}/")
    node.add_pod(other, downloads=MISSING)
    event = node.wait_event(agent, pod, "CacheBypassed")
    assert (event["type"], event["count"]) == ("Warning", 1)
    assert f"reads {URI}/ past the cache, though this node has it" in event["message"]
    _wait_bypassed(agent, 1)
    agent.kill()
    agent = node.start().wait_ready()
    last = node.add_pod(f"last-{node.name}", downloads=URI).rpartition("/")[2]
    node.wait_event(agent, last, "CacheBypassed")
    _wait_bypassed(agent, 1)
    assert len(node.events(pod)) == 1, "told again"
    assert node.events(other) == []


def test_show_has_what_modelmesh_reads_the_model_by(node: Node) -> None:
    """For each node group that asks for it."""
    node.want_entries(
        {"modelName": "tiny", "sourceModelUri": URI, "nodeGroup": node.group},
        {"modelName": "same", "sourceModelUri": URI, "nodeGroup": "another"},
    )
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED, same=DOWNLOADED)
    shown = node.machine("show", "tiny", "-o", "json").ok().json
    assert shown["modelmesh"] == {
        group: {
            "storage": {
                "parameters": {"type": "pvc", "name": f"localmodel-{group}"},
                "path": f"models/{KEY}",
            }
        }
        for group in ("another", node.group)
    }
    lines = node.machine("show", "same").ok().stdout.splitlines()
    rows = [line.split() for line in lines]
    assert ["claim", f"localmodel-{node.group}", f"models/{KEY}"] in rows
    assert ["claim", "localmodel-another", f"models/{KEY}"] in rows
    assert ["names", "same,", "tiny"] in rows


def _wait_bypassed(agent: Agent, number: int) -> None:
    until(lambda: agent.metrics()[BYPASSED] == number, agent.log_text)
