"""The agent of one node, from a LocalModelNode to files and status, on the real API server."""

from huggingface_hub import snapshot_download

from tests.cluster.identity import LEASES, SERVING
from tests.cluster.nodes import Node, cache
from tests.conftest import FILES, REPO, URI
from tests.edges.volume import snapshot
from tests.fakes.hub import Hub
from tests.machine import Agent, files_of, until

DOWNLOADED = "ModelDownloaded"
PENDING = "ModelDownloadPending"
FAILED = "ModelDownloadError"
OTHER = "acme/other"
OTHER_URI = f"hf://{OTHER}"
KSERVE = {"control-plane": "kserve-localmodelnode-agent"}


def test_an_entry_becomes_files_and_status(node: Node) -> None:
    node.want(tiny=URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    agent.wait_ready()
    assert files_of(node.machine.model(URI)) == FILES
    model = node.status()["models"]["tiny"]
    assert model["state"] == "Ready"
    assert model["bytes"] == sum(map(len, FILES.values()))
    assert model["source"] == URI
    node.wait_condition(agent, "Ready", "True", "ModelsReady")
    node.wait_condition(agent, "Degraded", "False", "AsExpected")
    node.plane.kubectl("wait", "--for=condition=Ready", f"lmn/{node.name}", "--timeout=5s")
    shown = node.plane.kubectl("get", "lmn", node.name)
    assert shown.split()[:7] == ["NAME", "READY", "DOWNLOADING", "USED", "LIMIT", "FREE", "HIT%"]
    assert "1/1" in shown
    assert agent.stop() == 0


def test_9_1_7_a_model_that_leaves_the_spec_goes_and_its_key_with_it(node: Node, hub: Hub) -> None:
    hub.add(OTHER, {"config.json": b"{}"})
    node.want(tiny=URI, other=OTHER_URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED, other=DOWNLOADED)
    node.want(other=OTHER_URI)
    node.wait_words(agent, other=DOWNLOADED)
    until(lambda: not node.machine.model(URI).exists(), agent.log_text)
    assert node.machine.model(OTHER_URI).is_dir()


def test_what_leaves_the_spec_while_no_agent_runs_goes_at_its_start(node: Node, hub: Hub) -> None:
    node.want(tiny=URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    agent.kill()
    node.want()
    agent = node.start()
    until(lambda: not node.machine.model(URI).exists(), agent.log_text)
    node.wait_words(agent)


def test_one_bad_entry_stops_no_other(node: Node) -> None:
    """And one that is half downloaded when it leaves leaves nothing behind."""
    node.want_entries(
        {"modelName": "wrong", "sourceModelUri": "gopher://x/y", "nodeGroup": node.group},
        {"modelName": "tiny", "sourceModelUri": URI, "nodeGroup": node.group},
        {"modelName": "tiny", "namespace": "team-a", "sourceModelUri": URI},
    )
    agent = node.start()
    node.wait_words(agent, wrong=FAILED, tiny=DOWNLOADED, **{"team-a/tiny": DOWNLOADED})
    condition = node.wait_condition(agent, "Degraded", "True", "Unsupported")
    assert "gopher" in condition["message"]
    until(lambda: [e for e in node.events() if e["reason"] == "Unsupported"])


def test_files_of_the_node_are_nobodys_to_publish(node: Node) -> None:
    """Who may create a cache must not read the agent's token with it."""
    node.want(token=f"file://{node.identity.token_file}", path=str(node.identity.token_file))
    agent = node.start()
    node.wait_words(agent, token=FAILED, path=FAILED)
    node.wait_condition(agent, "Degraded", "True", "Unsupported")
    assert not node.machine.sealed()


def test_labels_alone_stop_nothing(node: Node) -> None:
    """Anybody may set them on a pod of theirs."""
    node.add_pod(f"odd-{node.name}", labels=KSERVE)
    node.add_pod(f"odder-{node.name}", uri=URI, labels={"model": "a", "node": "b"})
    node.want(tiny=URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)


def test_annotations_of_the_cache_count(node: Node) -> None:
    """Also where its entry is heard of first."""
    agent = node.start().wait_ready()
    node.want(**{f"noted-{node.name}": URI})
    node.plane.apply(cache(f"noted-{node.name}", URI, [node.group], include="*.json"))
    node.wait_words(agent, **{f"noted-{node.name}": DOWNLOADED})
    assert files_of(node.machine.model(URI)) == {"config.json": FILES["config.json"]}


def test_what_kserves_agent_left_is_downloaded_all_the_time_and_taken_over(
    node: Node, hub: Hub
) -> None:
    place = node.machine.model(URI)
    snapshot_download(REPO, endpoint=hub.endpoint, local_dir=place, token=False)
    hub.clear()
    before = snapshot(place)
    node.want(tiny=URI)
    node.plane.apply(cache("tiny", URI, [node.group]))
    path = f"{SERVING}/localmodelnodes"
    said = {"status": {"modelStatus": {"tiny": DOWNLOADED}}}
    version = node.plane.request("PATCH", f"{path}/{node.name}/status", said).ok()["metadata"][
        "resourceVersion"
    ]
    server = node.add_pod(f"server-{node.name}", uri=URI)
    agent = node.start()

    def state() -> tuple[str, str]:
        model = node.status().get("models", {}).get("tiny", {})
        return model.get("state", ""), model.get("message", "")

    until(lambda: "taken over when" in state()[1], agent.log_text)
    assert state()[0] == "Adopting"
    assert snapshot(place) == before
    assert agent.metrics()["localmodel_requests_total hit"] == 1
    until(lambda: "Adopting" in {event["reason"] for event in node.events()}, agent.log_text)
    node.remove_pod(server)
    until(lambda: state()[0] == "Ready", agent.log_text, seconds=90)
    assert files_of(place) == FILES
    assert hub.bytes_sent() == 0
    only = f"fieldSelector=metadata.name%3D{node.name}"
    watched = f"{path}?watch=1&timeoutSeconds=1&resourceVersion={version}&{only}"
    history = [event["object"]["status"] for event in node.plane.request("GET", watched).ok()]
    assert len(history) > 2
    assert {status["modelStatus"]["tiny"] for status in history} == {DOWNLOADED}


def test_what_is_in_the_place_of_a_model_and_no_directory_is_pending_and_untouched(
    node: Node,
) -> None:
    theirs = node.machine.model(URI)
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    node.want(tiny=URI)
    agent = node.start()
    node.wait_condition(agent, "Degraded", "True", "ForeignDirectory")
    node.wait_words(agent, tiny=PENDING)
    assert theirs.read_text() == "theirs"


def test_a_pickle_is_said_and_refused_where_its_group_says_so(node: Node, hub: Hub) -> None:
    hub.add(OTHER, {"pytorch_model.bin": b"named so"})
    node.want(other=OTHER_URI)
    agent = node.start()
    node.wait_words(agent, other=DOWNLOADED)
    until(lambda: [e for e in node.events() if e["reason"] == "UnsafeFiles"])
    node.wait_condition(agent, "Degraded", "False", "AsExpected")
    until(lambda: "pytorch_model.bin" in node.status()["models"]["other"].get("message", ""))
    node.make_group(file_policy="refuse")  # of what is published from now on
    node.want()
    until(lambda: not node.machine.model(OTHER_URI).exists(), agent.log_text)
    sent = hub.bytes_sent()
    node.want(other=OTHER_URI)
    node.wait_words(agent, other=FAILED)
    node.wait_condition(agent, "Degraded", "True", "UnsafeFiles")
    assert hub.bytes_sent() == sent, "its name is enough"
    node.make_group(file_policy="off")
    node.wait_words(agent, other=DOWNLOADED)


# -- the path -----------------------------------------------------------------------------------


def test_a_group_at_another_path_is_a_mismatch_that_names_both(node: Node, hub: Hub) -> None:
    node.want(tiny=URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    sent = hub.bytes_sent()
    node.make_group("/somewhere/else")
    node.wait_words(agent, tiny=FAILED)
    message = node.wait_condition(agent, "Degraded", "True", "PathMismatch")["message"]
    assert "/somewhere/else" in message
    assert str(node.machine.root) in message
    # An edit of a group is no wish to lose a model.
    node.make_group()
    node.wait_words(agent, tiny=DOWNLOADED)
    assert hub.bytes_sent() == sent


# -- who else is here ---------------------------------------------------------------------------


def test_9_1_14_beside_kserves_agent_nothing_is_managed(node: Node) -> None:
    theirs = node.add_pod(f"theirs-{node.name}", labels=KSERVE, owner="DaemonSet")
    node.want(tiny=URI)
    agent = node.start()
    node.wait_condition(agent, "Degraded", "True", "OtherAgent")
    assert node.words() == {}
    assert not node.machine.root.exists()
    assert agent.get("/readyz")[0] == 503
    until(lambda: [e for e in node.events() if e["reason"] == "OtherAgent"])
    node.remove_pod(theirs)
    node.wait_words(agent, tiny=DOWNLOADED)
    agent.wait_ready()


def test_kserves_agent_that_comes_later_ends_the_managing(node: Node) -> None:
    agent = node.start().wait_ready()
    node.want()
    node.add_pod(f"theirs-{node.name}", labels=KSERVE, owner="DaemonSet")
    node.wait_condition(agent, "Degraded", "True", "OtherAgent")
    node.want(tiny=URI)
    until(lambda: agent.get("/readyz")[0] == 503)
    assert not node.machine.model(URI).exists()


def test_9_1_14_downloads_that_kserve_began_are_waited_for(node: Node) -> None:
    labels = {"model": "tiny", "node": node.name}
    job = node.add_pod(f"job-{node.name}", uri=URI, labels=labels, owner="Job")
    node.want(tiny=URI)
    agent = node.start()
    message = node.wait_condition(agent, "Degraded", "True", "OtherAgent")["message"]
    assert f"default/job-{node.name}" in message
    node.remove_pod(job)
    node.wait_words(agent, tiny=DOWNLOADED)


def test_a_node_has_one_agent(node: Node) -> None:
    """Whoever holds the Lease; it is released at a good end, and worthless when its pod is gone."""
    lease = f"{LEASES}/{node.name}"
    first = node.start().wait_ready()
    second = node.start(
        "--root", str(node.machine.home / "other"), environment={"POD_NAME": "another"}
    )
    until(lambda: second.said("holds the lease"), second.log_text)
    assert second.get("/readyz")[0] == 503
    assert not (node.machine.home / "other").exists()
    assert first.stop() == 0
    assert node.plane.request("GET", lease).ok()["spec"]["holderIdentity"] in ("", _me("another"))
    until(lambda: second.get("/readyz")[0] == 200, second.log_text)
    assert node.plane.request("GET", lease).ok()["spec"]["holderIdentity"] == _me("another")
    second.kill()  # its pod is no pod of this node: nobody need wait for the Lease to expire
    node.start().wait_ready()


def _me(pod: str) -> str:
    return f"localmodel-system/{pod}"


# -- who uses what ------------------------------------------------------------------------------


def test_9_1_7_pods_are_counted_once_and_keep_their_model(node: Node, hub: Hub) -> None:
    node.want(tiny=URI)
    early = node.add_pod(f"early-{node.name}", uri=OTHER_URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    pod = node.add_pod(f"pod-{node.name}", uri=URI)
    _wait_counted(agent, hit=1, miss=1)
    agent.stop()
    agent = node.start().wait_ready()
    node.want()  # its user goes on
    node.wait_words(agent)
    until(
        lambda: (node.status().get("hits"), node.status().get("misses")) == (1, 1), agent.log_text
    )
    assert agent.metrics()["localmodel_requests_total hit"] == 0, "counted again"
    assert files_of(node.machine.model(URI)) == FILES
    node.remove_pod(pod)
    node.remove_pod(early)
    until(lambda: not node.machine.model(URI).exists(), agent.log_text)


def _wait_counted(agent: Agent, **results: int) -> None:
    def counted() -> bool:
        metrics = agent.metrics()
        return all(
            metrics[f"localmodel_requests_total {result}"] == number
            for result, number in results.items()
        )

    until(counted, agent.log_text)
