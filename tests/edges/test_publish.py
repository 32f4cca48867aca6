"""The lines that waiting pods read: written where they say something new."""

from pathlib import Path
from typing import Any

import pytest

from agent import layout
from agent.errors import Reason
from agent.metrics import Metrics
from agent.model import Attempt, CacheKey, Job, ModelRef, Stage
from agent.publish import Publisher
from agent.status import Facts
from agent.store import Store

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
