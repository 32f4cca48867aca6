"""The agent with a directory of YAML: what is wished for comes, and the status says how it goes."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from agent import layout
from agent.model import cache_key
from tests.conftest import FILES, REPO, URI
from tests.fakes.hub import Hub, Slow
from tests.machine import Agent, Machine, cache_yaml, files_of, replace, until

SIZE = sum(map(len, FILES.values()))
OTHER = f"{URI}/sub"


def test_a_cache_is_brought_and_its_status_tells_all(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    commit = hub.add(REPO, FILES)
    localmodel.want("tiny", URI)
    status = agent.wait_state("tiny", "Ready")
    assert status["modelStatus"] == "ModelDownloaded"
    assert status["name"] == "tiny"
    assert (status["key"], status["uri"]) == (cache_key(URI), URI)
    assert status["revision"] == commit
    assert (status["bytes"], status["downloadedBytes"], status["files"]) == (SIZE, SIZE, 4)
    assert status["path"] == str(localmodel.model(URI))
    assert status["fingerprint"].startswith("sha256:")
    assert status["readyAt"].endswith("Z")
    assert "reason" not in status
    assert files_of(localmodel.model(URI)) == FILES
    assert not (localmodel.root / layout.progress(cache_key(URI))).exists()
    localmodel.check_offers()
    shown = localmodel.inline("ls", "-o", "json").ok().json
    assert [model["state"] for model in shown] == ["Ready"]


def test_a_running_download_tells_how_far_it_is(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    hub.fault("model-1.safetensors", Slow(bytes_per_second=20_000))
    localmodel.want("tiny", URI)
    status = agent.wait_state("tiny", "Fetching")
    assert status["modelStatus"] == "ModelDownloading"
    assert status["bytes"] == SIZE
    line = localmodel.root / layout.progress(cache_key(URI))
    until(line.exists, agent.log_text)
    verb, counter, done, total, reason = line.read_text().split()
    assert (verb, counter, total, reason) == ("wait", "1", str(SIZE), "Fetching")
    assert 200_000 < int(done) < SIZE
    until(lambda: agent.status("tiny").get("downloadedBytes", 0) >= int(done))
    assert agent.metrics()["localmodel_stored_bytes reserved"] > 0


def test_added_changed_and_removed_files_are_followed(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    path = localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    localmodel.want("other", OTHER)
    agent.wait_state("other", "Ready")

    localmodel.want("tiny", f"{URI}:main")
    until(lambda: agent.status("tiny").get("key") == cache_key(f"{URI}:main"))
    agent.wait_state("tiny", "Ready")

    path.unlink()
    until(lambda: agent.status("tiny") == {})
    assert agent.status("other")["state"] == "Ready"
    # What left the wishes is kept: without knowing who uses it, nothing is evicted.
    assert len(localmodel.sealed()) == 3


def test_a_wish_that_is_withdrawn_stops_its_download_and_resumes_when_it_comes_back(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    hub.fault("model-1.safetensors", Slow(bytes_per_second=50_000))
    path = localmodel.want("tiny", URI)
    until(lambda: hub.bytes_sent("model-1.safetensors") > 50_000)
    until((localmodel.root / layout.ingest(cache_key(URI)) / "tree/model-2.safetensors").exists)
    path.unlink()
    until(lambda: agent.said(f"{URI} is Partial"), agent.log_text)
    assert agent.status("tiny") == {}
    hub.clear_faults()
    hub.clear()
    localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    assert 0 < hub.bytes_sent() < len(FILES["model-1.safetensors"])
    localmodel.check_offers()


def test_a_bad_file_is_named_and_does_not_disturb_a_good_one(
    localmodel: Machine, agent: Agent
) -> None:
    replace(localmodel.desired / "broken.yaml", "metadata:\n  name: [never closed\n")
    localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    status = agent.wait_state("broken", "Failed", reason="InvalidSpec")
    assert status["modelStatus"] == "ModelDownloadError"
    assert status["message"].startswith("broken.yaml line 3: not YAML: ")
    assert agent.said("broken is refused: broken.yaml line 3: not YAML")

    (localmodel.desired / "broken.yaml").unlink()
    until(lambda: agent.status("broken") == {})


def test_a_good_file_that_becomes_malformed_keeps_its_model_wanted(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    path = localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    replace(path, "kind: {\n")
    status = agent.wait_state("tiny", "Ready", reason="InvalidSpec")
    assert "tiny.yaml line" in status["message"]
    localmodel.want("tiny", URI)
    until(lambda: "reason" not in agent.status("tiny"))


def test_whatever_is_in_the_files_the_agent_lives_and_says_what_is_wrong(
    localmodel: Machine, agent: Agent
) -> None:
    bad = {
        "kind": (cache_yaml("kind", URI).replace("LocalModelCache", "Secret"), "kind is 'Secret'"),
        "hostile": (cache_yaml("../../x", URI), "'../../x' is not a name"),
        "uri": (
            cache_yaml("uri", URI).replace(f'"{URI}"', "7"),
            "sourceModelUri of type int is not",
        ),
        "value": ("created: 2026-99-99\n", "a value does not fit its type"),
        "control": ("a: \x00\n", "not YAML"),
    }
    for name, (text, _) in bad.items():
        replace(localmodel.desired / f"{name}.yaml", text)
    (localmodel.desired / "folder.yaml").mkdir()
    long = "n" * 253
    localmodel.want(long, f"{URI}/config.json", file="long.yaml")
    localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    for name, (_, says) in bad.items():
        status = agent.wait_state(name, "Failed", reason="InvalidSpec")
        assert f"{name}.yaml line 1: " in status["message"]
        assert says in status["message"]
    assert "cannot be read" in agent.wait_state("folder", "Failed")["message"]
    # No file can have that name. Its model comes all the same, and so do the others' statuses.
    until(localmodel.model(f"{URI}/config.json").exists)
    assert agent.said("cannot write the status of nnn")
    written = {path.name for path in localmodel.status_directory.glob("*.json")}
    assert written == {f"{name}.json" for name in (*bad, "folder", "tiny")}
    assert not (localmodel.home.parent / "x.json").exists()


def test_two_caches_of_one_uri_share_the_model_and_have_a_status_each(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    localmodel.want("one", URI)
    localmodel.want("two", URI)
    one, two = agent.wait_state("one", "Ready"), agent.wait_state("two", "Ready")
    assert one["path"] == two["path"]
    assert hub.bytes_sent() == SIZE
    (localmodel.desired / "one.yaml").unlink()
    until(lambda: agent.status("one") == {})
    assert agent.status("two") == two


def test_two_caches_that_disagree_are_an_error_of_the_newer_one(
    localmodel: Machine, agent: Agent
) -> None:
    localmodel.want("a", URI, include="*.json")
    localmodel.want("b", URI)
    localmodel.want("a", f"{URI}/sub", file="c.yaml")
    assert agent.wait_state("b", "Failed", reason="InvalidSpec")
    assert "b and a want" in agent.status("b")["message"]
    # Of two files that use one name, the first counts; its status speaks of the second.
    status = agent.wait_state("a", "Ready", reason="InvalidSpec")
    assert status["uri"] == URI
    assert "c.yaml: there is already a LocalModelCache a" in status["message"]
    assert set(files_of(localmodel.model(URI))) == {"config.json"}
    # They agree again.
    localmodel.want("b", URI, include="*.json")
    assert agent.wait_state("b", "Ready")["uri"] == URI


def test_a_config_map_is_a_directory_of_links(localmodel: Machine, agent: Agent) -> None:
    """As kubelet writes it: `..data` is exchanged at once, the names lead through it."""

    def revision(name: str, uri: str) -> None:
        directory = localmodel.desired / f"..{name}"
        directory.mkdir()
        (directory / "tiny.yaml").write_text(cache_yaml("tiny", uri))
        link = localmodel.desired / "..data_tmp"
        link.symlink_to(directory.name)
        link.replace(localmodel.desired / "..data")

    revision("2026_01", URI)
    (localmodel.desired / "tiny.yaml").symlink_to("..data/tiny.yaml")
    assert agent.wait_state("tiny", "Ready")["uri"] == URI
    revision("2026_02", OTHER)
    until(lambda: agent.status("tiny").get("uri") == OTHER)
    agent.wait_state("tiny", "Ready")


def test_a_read_only_directory_has_its_status_in_the_state_directory(
    localmodel: Machine, mount: Callable[..., Path]
) -> None:
    localmodel.desired = mount("1m")
    localmodel.want("tiny", URI)
    subprocess.run(["mount", "-o", "remount,ro", localmodel.desired], check=True)
    localmodel.status_directory = localmodel.state / layout.STATUS
    agent = localmodel.agent().wait_ready()
    agent.wait_state("tiny", "Ready")


def test_what_no_source_can_list_is_failed_with_what_to_do_instead(
    localmodel: Machine, agent: Agent
) -> None:
    localmodel.want("pvc", "pvc://claim/model")
    localmodel.want("odd", "x-unheard-of://there")
    status = agent.wait_state("pvc", "Failed", reason="Unsupported")
    assert "name it in the InferenceService itself" in status["message"]
    assert "not tried again until the request changes" in status["message"]
    assert "retryAt" not in status
    agent.wait_state("odd", "Failed", reason="Unsupported")
    # What a wish may name does not multiply the series.
    assert agent.metrics()["localmodel_downloads_total Unsupported other"] == 2


def test_an_expected_fingerprint_guards_a_cache(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    localmodel.want("tiny", URI, expect_fingerprint="sha256:" + "0" * 64)
    status = agent.wait_state("tiny", "Failed", reason="FingerprintMismatch")
    right = next(
        word.strip(",") for word in status["message"].split() if word.startswith("sha256:")
    )
    assert not localmodel.model(URI).exists()
    assert agent.stop() == 0
    agent = localmodel.agent().wait_ready()
    agent.wait_state("tiny", "Failed", reason="FingerprintMismatch")
    assert not localmodel.model(URI).exists()
    hub.clear()
    localmodel.want("tiny", URI, expect_fingerprint=right)
    assert agent.wait_state("tiny", "Ready")["fingerprint"] == right
    assert hub.bytes_sent() == 0, "every byte was here"


def test_a_status_of_an_earlier_life_is_removed(localmodel: Machine) -> None:
    localmodel.status_directory.mkdir()
    (localmodel.status_directory / "gone.json").write_text('{"modelStatus": "ModelDownloaded"}')
    (localmodel.status_directory / "not-ours.json").write_text("{}")
    agent = localmodel.agent().wait_ready()
    until(lambda: agent.status("gone") == {})
    until(lambda: not (localmodel.status_directory / "gone.json").exists())
    assert (localmodel.status_directory / "not-ours.json").exists()


def test_the_metrics_tell_lookups_bytes_states_and_disk(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    fresh = agent.metrics()
    for result in ("hit", "joined", "miss"):
        assert fresh[f"localmodel_requests_total {result}"] == 0
    localmodel.want("tiny", URI)
    localmodel.want("bad", "hf://acme/nothing")
    agent.wait_state("tiny", "Ready")
    agent.wait_state("bad", "Failed", reason="RepositoryNotFound")
    for uri in (URI, URI, OTHER):
        localmodel.inline("pull", uri).ok()
    found = agent.metrics()
    assert found["localmodel_requests_total hit"] == 2
    assert found["localmodel_requests_total miss"] == 1
    assert found["localmodel_request_bytes_total hit"] == 2 * SIZE
    assert found["localmodel_download_bytes_total hf"] == hub.bytes_sent()
    assert found["localmodel_downloads_total ok hf"] == 2
    assert found["localmodel_downloads_total RepositoryNotFound hf"] == 1
    assert found["localmodel_download_duration_seconds_count lt1g hf"] == 2
    assert found["localmodel_models Ready"] == 2
    assert found["localmodel_models Failed"] == 1
    assert found["localmodel_stored_bytes sealed"] == SIZE + len(FILES["sub/notes.md"])
    capacity = found["localmodel_filesystem_capacity_bytes"]
    assert 0 < found["localmodel_filesystem_available_bytes"] < capacity
    assert found["localmodel_reconcile_total ok"] > 0
    assert agent.get("/healthz") == (200, "ok\n")
    assert agent.get("/readyz") == (200, "ok\n")
    assert agent.get("/v1/models")[0] == 404, "the verbs are on the socket only"
    names = {name.split()[0] for name in found}
    number = localmodel.root.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    assert ("localmodel_disk_bytes_total" in names) is device.exists()
