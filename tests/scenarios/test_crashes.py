"""Killed, told to stop, started again: nothing wrong is ever on offer, next to nothing is lost."""

import random
import signal
import time
from pathlib import Path

import pytest

from agent import layout
from agent.model import cache_key
from tests.conftest import URI
from tests.fakes.hub import Hub, Slow
from tests.machine import Agent, Machine, files_of, until

MIB = 1024 * 1024
BIG = "acme/big"
BIG_FILES: dict[str, bytes] = {
    "config.json": b"{}\n",
    **{f"model-{n}.safetensors": random.Random(n).randbytes(12 * MIB) for n in range(4)},
    "tokenizer/vocab.txt": random.Random(9).randbytes(300_000),
}
BIG_SIZE = sum(map(len, BIG_FILES.values()))
RESUMED = 64 * MIB
"""What a resume may download again, by the issue. Ours needs what was in flight."""


@pytest.fixture
def big(hub: Hub) -> Hub:
    hub.add(BIG, BIG_FILES)
    return hub


@pytest.mark.slow
def test_kill_9_at_fifty_random_moments(localmodel: Machine, big: Hub) -> None:
    """A pull is killed anywhere between its first import and the last fsync of its seal."""
    dice = random.Random(3)
    commit = big.add(BIG, BIG_FILES)
    big.fault("*", Slow(bytes_per_second=48 * MIB))
    kills, done = 0, 0
    while kills < 50:
        uri = f"hf://{BIG}:v{done}"
        big.tag(BIG, f"v{done}", commit)
        command = localmodel.start("pull", uri)
        time.sleep(dice.uniform(0.2, 1.2))  # the moment is the experiment
        kills += command.running()
        command.kill()
        assert command.process.returncode in (0, -signal.SIGKILL)
        localmodel.check_offers([cache_key(uri)])
        if cache_key(uri) in localmodel.sealed():
            done += 1
    print(kills, "kills", done, "models", big.bytes_sent() // MIB, "MiB")  # -rA shows it
    before, uri = big.bytes_sent(), f"hf://{BIG}:v{done}"
    big.tag(BIG, f"v{done}", commit)
    localmodel("pull", uri).ok()
    assert files_of(localmodel.model(uri)) == BIG_FILES
    localmodel.check_offers()
    assert big.bytes_sent() - before <= BIG_SIZE
    # Each kill costs what was on the wire and in the pipes of four connections, not a model.
    assert big.bytes_sent() <= (done + 1) * BIG_SIZE + kills * 8 * MIB
    assert not list((localmodel.root / layout.INGEST).iterdir())


@pytest.mark.slow
def test_an_agent_is_killed_again_and_again_and_its_model_comes(
    localmodel: Machine, big: Hub
) -> None:
    dice = random.Random(5)
    big.fault("*", Slow(bytes_per_second=4 * MIB))
    localmodel.want("big", f"hf://{BIG}")
    for _ in range(6):
        agent = localmodel.agent()
        time.sleep(dice.uniform(0.6, 1.4))  # the moment is the experiment
        agent.kill()
        localmodel.check_offers()
    big.clear_faults()
    agent = localmodel.agent().wait_ready()
    agent.wait_state("big", "Ready")
    assert files_of(localmodel.model(f"hf://{BIG}")) == BIG_FILES
    assert big.bytes_sent() <= BIG_SIZE + 6 * 8 * MIB


def test_sigterm_keeps_the_partial_files_and_a_restart_goes_on_behind_them(
    localmodel: Machine, big: Hub
) -> None:
    big.fault("*.safetensors", Slow(bytes_per_second=6 * MIB))
    localmodel.want("big", f"hf://{BIG}")
    agent = localmodel.agent().wait_ready()
    until(lambda: big.bytes_sent() > 20 * MIB)
    begun = time.monotonic()
    assert agent.stop(signal.SIGTERM, seconds=10) == 0
    assert time.monotonic() - begun < 10
    assert agent.said("stopping")
    partial = localmodel.root / layout.ingest(cache_key(f"hf://{BIG}"))
    kept = sum(len(data) for data in files_of(partial).values())
    assert kept > 10 * MIB
    assert localmodel.sealed() == set()

    big.clear_faults()
    big.clear()
    agent = localmodel.agent().wait_ready()
    agent.wait_state("big", "Ready")
    assert files_of(localmodel.model(f"hf://{BIG}")) == BIG_FILES
    missing = BIG_SIZE - kept
    assert missing <= big.bytes_sent() <= min(missing + RESUMED, missing + MIB)
    localmodel.check_offers()


def test_bytes_that_changed_while_we_were_away_are_not_believed(
    localmodel: Machine, big: Hub
) -> None:
    """A partial file of the right size, with a hole where its bytes never reached the disk."""
    big.fault("*.safetensors", Slow(bytes_per_second=6 * MIB))
    command = localmodel.start("pull", f"hf://{BIG}")
    until(lambda: big.bytes_sent() > 20 * MIB)
    command.kill()
    ingest = localmodel.root / layout.ingest(cache_key(f"hf://{BIG}"))
    for path in ingest.rglob("*.safetensors"):
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.seek(100_000)
            file.write(bytes(4096))
    vocabulary = ingest / "tree/tokenizer/vocab.txt"
    vocabulary.chmod(0o600)
    vocabulary.write_bytes(bytes(300_000))
    big.clear_faults()
    localmodel("pull", f"hf://{BIG}").ok()
    assert files_of(localmodel.model(f"hf://{BIG}")) == BIG_FILES
    localmodel.check_offers()


def test_what_was_complete_when_we_were_killed_is_hashed_and_offered_at_start(
    localmodel: Machine, hub: Hub
) -> None:
    """A directory in its place whose manifest had not got its name yet."""
    localmodel.inline("pull", URI).ok()
    manifests = localmodel.root / layout.MANIFESTS
    (manifests / cache_key(URI)).rename(manifests / f".{cache_key(URI)}.sealing")
    hub.clear()
    agent = localmodel.agent().wait_ready()
    until(lambda: localmodel.sealed() == {cache_key(URI)}, agent.log_text)
    assert hub.requests == []
    assert localmodel.inline("pull", URI, "-o", "json").ok().json["result"] == "hit"
    localmodel.check_offers()


def test_a_directory_that_is_not_ours_is_reported_and_untouched_while_it_is_used(
    localmodel: Machine, hub: Hub
) -> None:
    theirs = localmodel.model(URI)
    theirs.mkdir(parents=True)
    (theirs / "precious").write_text("work of years")
    localmodel.want("tiny", URI)
    with (theirs / "precious").open():  # as who serves it does
        agent = localmodel.agent().wait_ready()
        assert agent.said(f"{theirs} is not ours")
        status = agent.wait_state("tiny", "Pending")
        until(lambda: "takes the place" in agent.status("tiny").get("message", ""), agent.log_text)
        assert status["foreign"] in ("unknown", "differs")
        assert files_of(theirs) == {"precious": b"work of years"}


def test_what_is_in_the_place_of_a_model_and_no_directory_is_never_touched(
    localmodel: Machine, hub: Hub
) -> None:
    theirs = localmodel.model(URI)
    theirs.parent.mkdir(parents=True)
    theirs.write_text("work of years")
    localmodel.want("tiny", URI)
    agent = localmodel.agent().wait_ready()
    assert agent.said(f"{theirs} is not ours")
    status = agent.wait_state("tiny", "Failed", reason="ForeignDirectory")
    assert "move it away" in status["message"]
    assert theirs.read_text() == "work of years"
    assert hub.bytes_sent() == 0


def test_the_index_may_be_garbage_or_gone_at_start(localmodel: Machine) -> None:
    localmodel.inline("pull", URI).ok()
    index = localmodel.state / layout.INDEX
    for spoil in (_overwrite, Path.unlink):
        spoil(index)
        agent = localmodel.agent().wait_ready()
        found = localmodel.inline("pull", URI, "-o", "json").ok().json
        assert found["result"] == "hit"
        assert index.read_bytes()[:15] == b"SQLite format 3"
        assert agent.stop() == 0
    assert index.with_name(f"{index.name}.damaged").read_bytes().startswith(b"garbage")


def _overwrite(index: Path) -> None:
    index.write_bytes(b"garbage" * 10_000)


def test_the_index_may_become_garbage_under_a_running_agent(
    localmodel: Machine, agent: Agent
) -> None:
    localmodel.inline("pull", URI).ok()
    for part in localmodel.state.glob(f"{layout.INDEX}*"):
        with part.open("r+b") as file:
            file.write(b"garbage" * 10_000)
    for uri in (URI, f"{URI}/sub", f"{URI}/config.json"):
        localmodel.inline("pull", uri).ok()
    assert agent.get("/healthz")[0] == 200
    assert agent.stop() == 0
    localmodel.agent().wait_ready()
    models = localmodel.inline("ls", "-o", "json").ok().json
    assert [model["state"] for model in models] == ["Ready"] * 3
    localmodel.check_offers()
