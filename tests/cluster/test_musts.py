"""What KServe's contract demands of a node's agent (kserve.md 9.1), where nothing else shows it.

Every test that proves one of the MUSTs has its number in its name, wherever it is: `9_1_3`. That
none of them is without one is checked by tests/docs.
"""

import os
import stat
import time
from pathlib import Path

from agent import layout
from agent.model import cache_key
from tests.cluster.nodes import Node, local_model_node
from tests.cluster.test_agent import DOWNLOADED, FAILED, OTHER, OTHER_URI
from tests.conftest import FILES, REPO, URI
from tests.fakes.faults import Slow, Status
from tests.fakes.hub import Hub
from tests.machine import files_of, until

DOWNLOADING = "ModelDownloading"
PENDING = "ModelDownloadPending"
SLOW = Slow(bytes_per_second=100_000)  # three seconds for the larger file


def test_9_1_1_what_another_node_should_hold_is_not_ours(node: Node, hub: Hub) -> None:
    hub.add(OTHER, {"config.json": b"{}"})
    another = local_model_node(f"{node.name}-b", {"modelName": "b", "sourceModelUri": OTHER_URI})
    node.plane.apply(another)
    node.want(tiny=URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    assert not node.machine.model(OTHER_URI).exists()
    assert not [request for request in hub.requests if OTHER in str(request)]


def test_9_1_2_an_entry_needs_a_name_and_a_uri_and_no_more(node: Node) -> None:
    node.want_entries({"modelName": "tiny", "sourceModelUri": URI})
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    node.want_entries(
        {"modelName": "tiny", "sourceModelUri": URI},
        {"modelName": "tiny", "namespace": "team-a", "sourceModelUri": URI},
        {"modelName": "again", "sourceModelUri": URI, "storage": {}, "nodeGroup": node.group},
    )
    words = {"tiny": DOWNLOADED, "again": DOWNLOADED, "team-a/tiny": DOWNLOADED}
    node.wait_words(agent, **words)


def test_9_1_4_downloaded_is_what_is_whole_and_a_retry_is_no_error(node: Node, hub: Hub) -> None:
    hub.fault("*.safetensors", Status(503), times=2)
    hub.fault("*.safetensors", SLOW)
    node.want(tiny=URI)
    agent = node.start()
    seen: list[str] = []
    model = node.machine.model(URI)
    while DOWNLOADED not in seen:
        word = node.words().get("tiny", "")
        if not seen or seen[-1] != word:
            seen.append(word)
        assert word != DOWNLOADED or files_of(model) == FILES
        assert word == DOWNLOADED or not model.exists() or files_of(model) == FILES
        assert len(seen) < 10, agent.log_text()
        time.sleep(0.02)
    assert [word for word in seen if word not in ("", PENDING)] == [DOWNLOADING, DOWNLOADED]


def test_9_1_5_a_model_is_at_its_key_with_the_files_of_its_source(node: Node) -> None:
    node.want(tiny=URI)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    place = node.machine.root / "models" / cache_key(URI)
    assert files_of(place) == FILES
    assert node.status()["models"]["tiny"]["state"] == "Ready"


def test_9_1_6_a_folder_goes_with_the_last_entry_that_names_it(node: Node, hub: Hub) -> None:
    node.want(one=URI, two=URI)
    agent = node.start()
    node.wait_words(agent, one=DOWNLOADED, two=DOWNLOADED)
    sent = hub.bytes_sent(f"{REPO}/*")
    assert sent == sum(map(len, FILES.values()))
    node.want(two=URI)
    node.wait_words(agent, two=DOWNLOADED)
    time.sleep(1.0)
    assert files_of(node.machine.model(URI)) == FILES
    node.want()
    node.wait_words(agent)
    until(lambda: not node.machine.model(URI).exists(), agent.log_text)


def test_9_1_7_a_download_that_nobody_wants_any_more_ends(node: Node, hub: Hub) -> None:
    hub.fault("*.safetensors", Slow(bytes_per_second=20_000))
    node.want(tiny=URI)
    agent = node.start()
    until(lambda: hub.bytes_sent("*.safetensors") > 0, agent.log_text)
    node.want()
    node.wait_words(agent)
    until(lambda: not list((node.machine.root / layout.INGEST).iterdir()), agent.log_text)
    assert not node.machine.model(URI).exists()


def test_9_1_9_everybody_reads_and_the_agent_alone_writes(node: Node) -> None:
    node.want(tiny=URI)
    agent = node.start()
    # Before any model: what kubelet makes in its place would be root's.
    until((node.machine.root / "models").is_dir, agent.log_text)
    node.wait_words(agent, tiny=DOWNLOADED)
    top = node.machine.model(URI)
    assert _mode(top.parent) == _mode(top) == 0o755
    for directory, directories, names in os.walk(top):
        assert {_mode(Path(directory, name)) for name in directories} <= {0o755}
        assert {_mode(Path(directory, name)) for name in names} <= {0o444}


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_9_1_13_a_scheme_without_a_source_is_an_error_with_an_event(node: Node) -> None:
    node.want(far="webhdfs://name-node/models/sklearn", disk="pvc://claim/path")
    agent = node.start()
    node.wait_words(agent, far=FAILED, disk=FAILED)
    for name, advice in (
        ("far", "copy the model to a hub"),
        ("disk", "a volume is not downloaded"),
    ):
        model = node.status()["models"][name]
        assert model["reason"] == "Unsupported"
        assert advice in model["message"]

    def told() -> bool:
        said = [event["message"] for event in node.events() if event["reason"] == "Unsupported"]
        return {message.partition(":")[0] for message in said} == {"far", "disk"}

    until(told, agent.log_text)


def test_9_1_14_below_models_there_is_nothing_but_models(node: Node, hub: Hub) -> None:
    """KServe's agent, if it comes back, removes every directory there that it does not know."""
    hub.fault("*.safetensors", SLOW)
    node.want(tiny=URI)
    agent = node.start()
    until(lambda: hub.bytes_sent("*.safetensors") > 0, agent.log_text)
    assert list((node.machine.root / "models").iterdir()) == []
    node.wait_words(agent, tiny=DOWNLOADED)
    assert [path.name for path in (node.machine.root / "models").iterdir()] == [cache_key(URI)]


def test_9_1_15_of_an_older_kserve_the_status_is_kept_and_its_folders_are_left(node: Node) -> None:
    """KServe 0.17 and older names a folder after its cache. That layout is not served (KServe 0.18
    is needed, docs/operations.md): the key of the status is the same, the model is at its key, and
    a folder of the old kind is neither taken for it nor removed."""
    theirs = node.machine.root / "models" / "tiny"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text("of 0.17")
    node.want_entries({"modelName": "tiny", "sourceModelUri": URI})  # all that it writes
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    assert files_of(node.machine.model(URI)) == FILES
    assert files_of(theirs) == {"config.json": b"of 0.17"}
    node.want()
    node.wait_words(agent)
    until(lambda: not node.machine.model(URI).exists(), agent.log_text)
    assert files_of(theirs) == {"config.json": b"of 0.17"}
