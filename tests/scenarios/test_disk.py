"""Small real disks: what does not fit is refused with numbers, a full one is survived."""

import random
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agent import layout
from agent.model import cache_key
from tests.conftest import FILES, URI
from tests.fakes.hub import Hub, Slow
from tests.machine import Agent, Machine, files_of, until

MIB = 1024 * 1024
BIG_URI = "hf://acme/big"
BIG_FILES: dict[str, bytes] = {
    f"model-{n}.safetensors": random.Random(n).randbytes(3 * MIB) for n in range(2)
}

Mount = Callable[..., Path]


def _eat(path: Path, size: int) -> Path:
    hog = path / "hog"
    with hog.open("wb") as file:
        file.write(bytes(size))
    return hog


def _fill(path: Path) -> Path:
    """Take every block that is left."""
    hog = path / "hog"
    with hog.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return hog


def test_what_can_never_fit_is_refused_with_the_numbers(
    localmodel: Machine, hub: Hub, mount: Mount
) -> None:
    hub.add("acme/big", BIG_FILES)
    localmodel.root = mount("4m")
    done = localmodel.inline("pull", BIG_URI, "-o", "json")
    assert (done.code, done.json["reason"]) == (1, "InsufficientCapacity")
    assert "needs 6Mi" in done.json["message"]
    assert done.json["message"].endswith("of 4Mi")
    assert "larger disk" in done.json["advice"]
    assert hub.bytes_sent() == 0, "not one byte was asked for"
    localmodel.inline("pull", URI).ok()


def test_what_does_not_fit_now_waits_and_says_how_much_is_missing(
    localmodel: Machine, hub: Hub, mount: Mount
) -> None:
    hub.add("acme/big", BIG_FILES)
    localmodel.root = mount("10m")
    localmodel.state = localmodel.root / layout.STATE
    hog = _eat(localmodel.root, 5 * MIB)
    localmodel.want("big", BIG_URI)
    localmodel.want("tiny", URI)
    agent = localmodel.agent().wait_ready()
    status = agent.wait_state("big", "Pending", reason="InsufficientCapacity")
    assert "needs 6Mi more" in status["message"]
    agent.wait_state("tiny", "Ready")  # what fits is not held up by what does not
    assert hub.bytes_sent("acme/big/*") == 0
    refused = localmodel.inline("pull", BIG_URI, "-o", "json")
    assert (refused.code, refused.json["reason"]) == (1, "InsufficientCapacity")
    hog.unlink()
    localmodel.inline("pull", BIG_URI).ok()
    agent.wait_state("big", "Ready")
    assert files_of(localmodel.model(BIG_URI)) == BIG_FILES


def test_a_disk_that_somebody_else_fills_half_way_is_survived(
    localmodel: Machine, hub: Hub, mount: Mount
) -> None:
    hub.add("acme/big", BIG_FILES)
    hub.fault("acme/big/*", Slow(bytes_per_second=2 * MIB))
    localmodel.root = mount("12m")
    localmodel.state = localmodel.root / layout.STATE
    localmodel.want("big", BIG_URI)
    agent = localmodel.agent().wait_ready()
    until(lambda: hub.bytes_sent("acme/big/*") > 2 * MIB)
    hog = _fill(localmodel.root)
    status = agent.wait_state("big", "Failed", reason="DiskFull")
    assert "what was downloaded is kept" in status["message"]
    assert status["retryAt"]
    assert localmodel.sealed() == set()
    assert agent.get("/healthz")[0] == 200
    localmodel.check_offers()

    hog.unlink()
    hub.clear_faults()
    hub.clear()
    localmodel.inline("pull", BIG_URI).ok()
    agent.wait_state("big", "Ready")
    assert files_of(localmodel.model(BIG_URI)) == BIG_FILES
    assert hub.bytes_sent("acme/big/*") < 5 * MIB
    localmodel.check_offers()


def test_a_full_disk_does_not_keep_the_agent_from_starting(
    localmodel: Machine, mount: Mount
) -> None:
    localmodel.root = mount("4m")
    localmodel.state = localmodel.root / layout.STATE
    localmodel.inline("pull", URI).ok()
    _fill(localmodel.root)
    agent = localmodel.agent().wait_ready()
    assert localmodel.inline("pull", URI, "-o", "json").ok().json["result"] == "hit"
    assert agent.stop() == 0


def test_a_read_only_root_is_refused_with_what_to_do(localmodel: Machine, mount: Mount) -> None:
    localmodel.root = mount("4m")
    subprocess.run(["mount", "-o", "remount,ro", localmodel.root], check=True)
    agent = localmodel.agent()
    assert agent.process.wait(timeout=30) == 1
    assert "(ReadOnly)" in agent.log_text()
    assert "mount the cache's directory read-write" in agent.log_text()


def test_a_sealed_model_that_is_deleted_by_hand_comes_back(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    shutil.rmtree(localmodel.model(URI))
    hub.clear()
    assert localmodel.inline("pull", URI, "-o", "json").ok().json["result"] in (
        "downloaded",
        "joined",
    )
    assert agent.said(f"{URI} is damaged: config.json, ")
    assert files_of(localmodel.model(URI)) == FILES
    assert agent.wait_state("tiny", "Ready")["path"] == str(localmodel.model(URI))
    assert agent.metrics()["localmodel_verifications_total look damaged"] >= 1
    localmodel.check_offers()


def test_a_model_that_loses_a_file_is_off_offer_before_it_is_whole_again(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    (localmodel.model(URI) / "model-1.safetensors").unlink()
    hub.fault("model-1.safetensors", Slow(bytes_per_second=100_000))
    command = localmodel.start("pull", URI)
    until(lambda: localmodel.sealed() == set(), agent.log_text)
    assert not (localmodel.root / layout.manifest(cache_key(URI))).exists()
    command.done().ok()
    assert files_of(localmodel.model(URI)) == FILES
