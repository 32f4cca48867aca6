"""A hub that misbehaves, end to end: nothing wrong is published, and what can heal heals."""

import hashlib
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent import layout
from agent.model import cache_key
from tests.conftest import FILES, REPO, URI
from tests.fakes.hub import (
    Corrupt,
    Dribble,
    Fault,
    Hub,
    IgnoreRange,
    Long,
    PartialAs200,
    Reset,
    Short,
    Stall,
    Status,
    Truncate,
    WrongListing,
)
from tests.machine import Agent, Machine, everything_in, files_of, until

WEIGHTS = "model-1.safetensors"


@pytest.mark.parametrize(
    "fault",
    [
        Corrupt(offset=123_456),
        Truncate(after=100_000),
        Reset(after=100_000),
        Stall(after=100_000),
        Dribble(bytes_per_second=50),
        Short(by=1),
        Long(by=1),
        Status(500),
        Status(503, headers={"Retry-After": "1"}),
        Status(429, headers={"Retry-After": "1"}),
        Status(403),  # of the link's host: the link has expired
    ],
    ids=lambda fault: type(fault).__name__ + str(getattr(fault, "code", "")),
)
def test_a_fault_that_passes_costs_a_retry_and_no_more(
    localmodel: Machine, hub: Hub, fault: Fault
) -> None:
    hub.fault(WEIGHTS, fault, times=1)
    found = localmodel.inline("pull", URI, "--stall-seconds", "1", "-o", "json").ok().json
    assert found["result"] == "downloaded"
    assert files_of(localmodel.model(URI)) == FILES
    localmodel.check_offers()
    assert hub.bytes_sent("model-2.safetensors") == len(FILES["model-2.safetensors"])
    assert len([request for request in hub.requests if request.file.endswith(WEIGHTS)]) >= 2


@pytest.mark.parametrize("fault", [IgnoreRange(), PartialAs200()], ids=["whole", "part"])
def test_a_range_that_is_answered_with_200(localmodel: Machine, hub: Hub, fault: Fault) -> None:
    """The whole file restarts it; a part that calls itself the whole is refused."""
    hub.fault(WEIGHTS, Truncate(after=100_000), times=1)
    hub.fault(WEIGHTS, fault, times=1)
    done = localmodel.inline("pull", URI, "-o", "json")
    if isinstance(fault, PartialAs200):
        assert (done.code, done.json["reason"]) == (1, "BadResponse")
        assert localmodel.sealed() == set()
        done = localmodel.inline("pull", URI, "-o", "json")
    assert done.ok().json["result"] == "downloaded"
    assert files_of(localmodel.model(URI)) == FILES


@pytest.mark.parametrize(
    ("fault", "reason", "advice"),
    [
        (Corrupt(offset=5), "DigestMismatch", "wrong bytes"),
        (Short(by=1), "SizeMismatch", "disagree"),
        (Long(by=1), "SizeMismatch", "disagree"),
        (WrongListing(size_delta=1), "SizeMismatch", "disagree"),
        (WrongListing(size_delta=-1), "SizeMismatch", "disagree"),
        (Status(404), "FileNotFound", "check the path"),
        (Status(429, headers={"Retry-After": "3600"}), "RateLimited", "token"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_a_fault_that_stays_is_told_and_nothing_of_it_is_published(
    localmodel: Machine, hub: Hub, fault: Fault, reason: str, advice: str
) -> None:
    hub.fault(WEIGHTS, fault)
    done = localmodel.inline("pull", URI, "-o", "json")
    assert (done.code, done.json["reason"]) == (1, reason)
    assert advice in done.json["advice"]
    assert localmodel.sealed() == set()
    assert not localmodel.model(URI).exists()
    # The other files need not come again once it is over.
    hub.clear_faults()
    hub.clear()
    localmodel.inline("pull", URI).ok()
    assert files_of(localmodel.model(URI)) == FILES
    assert hub.bytes_sent("model-2.safetensors") == 0
    localmodel.check_offers()


def test_a_hub_that_is_away_fails_a_cache_until_it_is_back(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    hub.stop()
    localmodel.want("tiny", URI)
    status = agent.wait_state("tiny", "Failed", reason="NetworkError")
    assert hub.endpoint in status["message"]
    assert status["retryAt"] > status["startedAt"]
    assert f"next try at {status['retryAt']}" in status["message"]
    assert status["modelStatus"] == "ModelDownloading", "it is tried again by itself"
    hub.start()
    assert agent.wait_state("tiny", "Ready")["downloadedBytes"] == sum(map(len, FILES.values()))


def test_a_long_retry_after_is_kept_across_a_restart(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    hub.fault("/api/*", Status(429, headers={"Retry-After": "3600"}))
    localmodel.want("tiny", URI)
    status = agent.wait_state("tiny", "Failed", reason="RateLimited")
    retry_at = datetime.fromisoformat(status["retryAt"])
    assert 3500 < (retry_at - datetime.now(UTC)).total_seconds() < 3700
    assert agent.stop() == 0
    hub.clear_faults()
    hub.clear()
    localmodel.status_directory.joinpath("tiny.json").unlink()
    agent = localmodel.agent().wait_ready()
    again = agent.wait_state("tiny", "Failed", reason="RateLimited")
    assert again["retryAt"] == status["retryAt"]
    assert hub.requests == [], "it was asked not to"
    # Who asks by hand is worth a try.
    localmodel.inline("pull", URI).ok()
    agent.wait_state("tiny", "Ready")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../../x", "'..'"),
        ("/etc/x", "absolute"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("a\x1b[31mb", "control character"),
        ("n" * 300, "300 bytes"),
        ("a//b", "segment ''"),
        ("sub/./x", "segment '.'"),
        ("back\\slash", "backslash"),
        ("", "empty"),
    ],
    ids=ascii,
)
def test_a_hostile_name_is_refused_before_the_first_byte(
    localmodel: Machine, hub: Hub, tmp_path: Path, name: str, says: str
) -> None:
    entry = {"type": "file", "oid": "0" * 40, "size": 5, "path": name}
    good = {"type": "file", "oid": "0" * 40, "size": 5, "path": "good.txt"}
    hub.raw_tree("acme/hostile", [good, entry])
    before = everything_in(tmp_path, but=[localmodel.root])
    done = localmodel.inline("pull", "hf://acme/hostile", "-o", "json")
    assert (done.code, done.json["reason"]) == (1, "UnsafePath")
    assert says in done.json["message"]
    assert done.json["message"].isprintable()
    assert everything_in(tmp_path, but=[localmodel.root]) - before <= {str(localmodel.root)}
    assert localmodel.sealed() == set()
    assert not list(localmodel.root.rglob("good.txt"))
    assert hub.bytes_sent("good.txt") == 0


def test_a_hostile_name_can_be_left_out(localmodel: Machine, hub: Hub) -> None:
    hub.add(REPO, FILES)
    good = FILES["config.json"]
    listed = [("../x", "0" * 40, 5), ("config.json", _oid(good), len(good))]
    hub.raw_tree(
        REPO, [{"type": "file", "path": p, "oid": oid, "size": size} for p, oid, size in listed]
    )
    assert localmodel.inline("pull", URI).code == 1
    localmodel.inline("pull", URI, "--exclude", "../*").ok()
    assert set(files_of(localmodel.model(URI))) == {"config.json"}


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def test_a_source_directory_that_changes_while_it_is_read_is_not_published(
    localmodel: Machine, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights.bin").write_bytes(random.Random(1).randbytes(1_000_000))
    command = localmodel.start("pull", str(source), "--max-rate", "300Ki", "-o", "json")
    partial = localmodel.root / layout.ingest(cache_key(str(source)))
    until(lambda: any(path.stat().st_size for path in partial.rglob("weights.bin")))
    (source / "weights.bin").write_bytes(b"another file")
    done = command.done()
    assert (done.code, done.json["reason"]) == (1, "SourceChanged")
    assert not localmodel.model(str(source)).exists()
    localmodel.inline("pull", str(source)).ok()
    assert files_of(localmodel.model(str(source))) == {"weights.bin": b"another file"}
