"""A whole agent over directories as KServe's own agent leaves them: real client, real layout."""

import os
import random
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from agent import layout
from agent.model import cache_key
from tests.conftest import FILES, REPO
from tests.edges.volume import fast_directory, holds, snapshot
from tests.fakes import s3
from tests.fakes.hub import Hub
from tests.machine import Agent, Machine, files_of, machine, until

URI = f"hf://{REPO}"
BUCKET = "s3://models/llama"
OBJECTS: Mapping[str, bytes] = {
    "llama/config.json": b"{}",
    "llama/weights/a.bin": random.Random(1).randbytes(300_000),
    "llama/empty.txt": b"",
    "llama/folder/": b"",
    "llama-tune/config.json": b"of another model",
}


def kserves_job(hub: Hub, place: Path) -> None:
    """What its storage initializer does for `hf://`."""
    snapshot_download(REPO, endpoint=hub.endpoint, local_dir=place, token=False)
    assert (place / ".cache/huggingface").is_dir()
    hub.clear()


def s3_job(store: s3.Store, place: Path) -> None:
    """And for `s3://` (kserve.md 5.3): by a raw prefix, without what is empty."""
    client, prefix = store.client(), "llama"
    for found in client.list_objects_v2(Bucket="models", Prefix=prefix)["Contents"]:
        if found["Size"] and not found["Key"].endswith("/"):
            target = place / found["Key"].removeprefix(prefix).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file("models", found["Key"], str(target))
    store.seen.clear()


def adopted(agent: Agent) -> float:
    return agent.metrics()["localmodel_adopted_bytes_total"]


def test_what_kserve_brought_from_a_hub_is_adopted_without_a_byte(
    localmodel: Machine, hub: Hub
) -> None:
    kserves_job(hub, localmodel.model(URI))
    inodes = {path: (localmodel.model(URI) / path).stat().st_ino for path in FILES}
    localmodel.want("tiny", URI)
    agent = localmodel.agent().wait_ready()
    agent.wait_state("tiny", "Ready")
    assert hub.bytes_sent() == 0
    assert [r for r in hub.requests if r.origin == "cdn"] == []
    assert files_of(localmodel.model(URI)) == FILES
    assert {path: (localmodel.model(URI) / path).stat().st_ino for path in FILES} == inodes
    assert adopted(agent) == sum(map(len, FILES.values()))
    localmodel.check_offers()


def test_while_it_is_read_it_stays_as_it_is(localmodel: Machine, hub: Hub) -> None:
    place = localmodel.model(URI)
    kserves_job(hub, place)
    before = snapshot(place)
    localmodel.want("tiny", URI)
    with (place / "config.json").open():
        agent = localmodel.agent().wait_ready()
        status = agent.wait_state("tiny", "Adopting")
        assert (status["modelStatus"], status["path"]) == ("ModelDownloaded", str(place))
        until(lambda: "taken over when" in agent.status("tiny")["message"], agent.log_text)
        assert snapshot(place) == before
        why = localmodel.inline("why", URI).ok().stdout
        assert "left by another agent" in why
    agent.stop()
    agent = localmodel.agent().wait_ready()  # which asks at once who reads what
    agent.wait_state("tiny", "Ready")
    assert hub.bytes_sent() == 0


def test_what_kserve_brought_from_s3_is_adopted_without_a_get(localmodel: Machine) -> None:
    with s3.Store() as store:
        store.put("models", OBJECTS)
        place = localmodel.model(BUCKET)
        s3_job(store, place)
        assert not (place / "empty.txt").exists()
        stray = place / "-tune/config.json"
        assert stray.exists(), "its prefix is not bounded"
        localmodel.want("llama", BUCKET)
        agent = localmodel.agent(environment=store.environment).wait_ready()
        agent.wait_state("llama", "Ready")
        assert store.of("GET") == []
        wanted = {
            name.removeprefix("llama/"): data
            for name, data in OBJECTS.items()
            if name.startswith("llama/") and not name.endswith("/")
        }
        assert files_of(place) == wanted
    localmodel.check_offers()


def test_one_wrong_byte_costs_one_file(localmodel: Machine, hub: Hub) -> None:
    place = localmodel.model(URI)
    kserves_job(hub, place)
    largest = max(FILES, key=lambda path: len(FILES[path]))
    wrong = bytearray(FILES[largest])
    wrong[-1] ^= 1
    (place / largest).write_bytes(wrong)
    localmodel.want("tiny", URI)
    agent = localmodel.agent().wait_ready()
    agent.wait_state("tiny", "Ready")
    assert hub.bytes_sent() == len(FILES[largest])
    assert agent.said("left by another agent, and wrong")
    assert files_of(place) == FILES


@pytest.mark.slow
def test_kill_9_at_random_moments_never_leaves_the_place_empty(
    localmodel: Machine, hub: Hub
) -> None:
    """Its pods find all the files there, at every moment that an agent is dead, but for the one
    between two renames; and after the next start, whatever the last one was killed at."""
    dice, place = random.Random(7), localmodel.model(URI)
    localmodel.want("tiny", URI)
    rounds = int(os.environ.get("KILLS", "10"))
    for _ in range(rounds):
        for name in (localmodel.root / layout.MANIFESTS).glob("*"):
            name.unlink()
        subprocess.run(["rm", "-rf", place, localmodel.root / layout.INGEST], check=True)
        kserves_job(hub, place)
        agent = localmodel.agent()
        assert agent.port
        time.sleep(dice.uniform(0.0, 0.5))  # the moment is the experiment
        agent.kill()
        aside = localmodel.root / layout.ingest(cache_key(URI)) / layout.REPLACED
        assert holds(place, FILES) or holds(aside, FILES)
        localmodel.check_offers()
    agent = localmodel.agent().wait_ready()
    agent.wait_state("tiny", "Ready")
    assert hub.bytes_sent() == 0
    assert files_of(place) == FILES


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED, only root can be two users")
def test_what_is_another_users_waits_for_prepare_and_is_adopted_then(hub: Hub) -> None:
    """The command as the image's user, the directory of the user of KServe's Jobs."""
    with fast_directory() as home, machine(home, hub.endpoint) as localmodel:
        place = localmodel.model(URI)
        kserves_job(hub, place)
        localmodel("prepare", "--owner", "64000").ok()
        for directory, _, names in os.walk(place):
            for name in ("", *names):
                os.chown(Path(directory, name), 1000, 1000)
        for path in (home, localmodel.home):
            path.chmod(0o777)
        before = snapshot(place)
        user = ("setpriv", "--reuid=64000", "--regid=64000", "--clear-groups")
        refused = localmodel.start("pull", URI, under=user).done()
        assert refused.code != 0
        assert "prepare --adopt" in refused.stderr
        assert snapshot(place) == before
        localmodel("prepare", "--owner", "64000", "--adopt").ok()
        pulled = localmodel.start("pull", URI, under=user).done().ok()
        assert "were here already" in pulled.stdout
        assert hub.bytes_sent() == 0
        assert files_of(place) == FILES
