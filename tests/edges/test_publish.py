"""What is said: progress lines where they are new, and to each cache what it may have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent import layout
from agent.errors import Reason
from agent.metrics import Metrics
from agent.model import Attempt, CacheKey, Entry, Job, ModelRef, Stage
from agent.publish import Publisher
from agent.status import Facts
from agent.store import Store
from agent.wishes import Desired

REF = ModelRef(uri="hf://acme/tiny")


class Counting(Store):
    """A store that counts the lines that are written."""

    writes = 0

    def write_progress(self, key: CacheKey, line: str) -> None:
        self.writes += 1
        super().write_progress(key, line)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    (tmp_path / layout.HIDDEN).mkdir()
    return Counting(tmp_path)


def facts(**known: Any) -> list[Facts]:
    return [Facts(key=REF.key, ref=REF, wanted=True, **known)]


def failed(reason: Reason) -> list[Facts]:
    return facts(attempt=Attempt(key=REF.key, reason=reason, message="m", count=1, retry_at=9e9))


def line(store: Store) -> str:
    return (store.root / layout.progress(REF.key)).read_text()


def test_a_final_line_is_written_once(store: Counting) -> None:
    """Two thousand of them, every five seconds, took a core for ever."""
    publisher = Publisher(store, Metrics(), None)
    for _ in range(5):
        publisher.progress(failed(Reason.GATED))
    assert store.writes == 1
    assert line(store) == "fallback 1 0 0 Gated\n"
    publisher.progress(failed(Reason.UNAUTHORIZED))
    assert line(store) == "fallback 6 0 0 Unauthorized\n"
    publisher.progress([])
    assert not (store.root / layout.progress(REF.key)).exists()
    publisher.progress(failed(Reason.UNAUTHORIZED))
    assert line(store) == "fallback 8 0 0 Unauthorized\n"


def test_a_line_that_somebody_waits_on_moves(store: Counting) -> None:
    publisher = Publisher(store, Metrics(), None)
    publisher.progress(failed(Reason.GATED))
    for number in range(2, 5):
        publisher.progress(facts(job=Job(key=REF.key, stage=Stage.FETCHING, total=9, done=1)))
        assert line(store) == f"wait {number} 1 9 Fetching\n"
    publisher.progress(failed(Reason.GATED))
    assert line(store) == "fallback 5 0 0 Gated\n"


class _Said:
    """Where the status goes."""

    def __init__(self) -> None:
        self.bodies: Mapping[str, Any] = {}

    def write(self, bodies: Mapping[str, Any]) -> None:
        self.bodies = bodies


ENTRY = Entry(
    ref=REF,
    revision="r1",
    fingerprint="sha256:00",
    bytes=10,
    files=1,
    sealed_at=100.0,
    last_used=100.0,
)


@pytest.mark.parametrize(
    ("reason", "state", "word", "said"),
    [
        (None, "Pending", "ModelDownloadPending", "Unproven"),
        (Reason.API_SERVER, "Pending", "ModelDownloadPending", "Unproven"),
        (Reason.NETWORK, "Pending", "ModelDownloadPending", "Unproven"),
        (Reason.UNAUTHORIZED, "Failed", "ModelDownloadError", "Unauthorized"),
        (Reason.GATED, "Failed", "ModelDownloadError", "Gated"),
    ],
)
def test_who_has_not_shown_his_credentials_is_told_so_and_nobody_else(
    store: Counting, reason: Reason | None, state: str, word: str, said: str
) -> None:
    status = _Said()
    doubt = reason and Attempt(
        key=REF.key, reason=reason, message="it said no", count=1, retry_at=1e9
    )
    desired = Desired(wants={}, names={"tiny": REF.key, "team-a/tiny": REF.key})
    known = facts(entry=ENTRY)[0]
    publisher = Publisher(store, Metrics(), status)
    publisher.write({REF.key: known}, desired, {"team-a/tiny": doubt or None})
    assert status.bodies["tiny"]["modelStatus"] == "ModelDownloaded"
    told = status.bodies["team-a/tiny"]
    assert (told["state"], told["modelStatus"], told["reason"]) == (state, word, said)
    assert ("it said no" in told["message"]) is (reason is not None)
    assert told.get("retryAt", "") == ("2001-09-09T01:46:40Z" if reason else "")
    assert not told.keys() & {"fingerprint", "revision", "path", "readyAt", "lastUsed"}


def test_of_a_model_that_is_not_here_all_its_caches_are_told_the_same(store: Counting) -> None:
    status = _Said()
    desired = Desired(wants={}, names={"tiny": REF.key, "team-a/tiny": REF.key})
    publisher = Publisher(store, Metrics(), status)
    publisher.write({REF.key: failed(Reason.NETWORK)[0]}, desired, {"team-a/tiny": None})
    first, second = ({**body, "name": ""} for body in status.bodies.values())
    assert first == second
