"""One 429 is for all who ask that host, and for nobody else."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.errors import AgentError, Reason
from agent.fetch import Fetcher
from agent.metrics import Metrics
from agent.model import ModelRef, Stage, Want
from agent.ratelimits import RateLimits
from agent.sources import Sources
from agent.sources.hf import HuggingFace
from agent.store import Store
from agent.tally import Tally
from agent.transfer import Engine
from tests.fakes.hub import Hub, Status

HUB = "https://hub"


class Ticks:
    """A clock that only moves by hand, or while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        monkeypatch.setattr(asyncio, "sleep", self._sleep)

    def __call__(self) -> float:
        return self.now

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    return Ticks(monkeypatch)


@pytest.fixture
def limits(ticks: Ticks) -> RateLimits:
    return RateLimits(ticks=ticks, dice=lambda: 0.25)


def _refusal(seconds: float | None, reason: Reason = Reason.RATE_LIMITED) -> AgentError:
    return AgentError(reason, "429", retry_after_seconds=seconds)


async def test_a_short_pause_is_waited_for_and_with_jitter(
    limits: RateLimits, ticks: Ticks
) -> None:
    limits.heed(HUB, _refusal(7.0))
    await limits.pause(HUB)
    assert ticks.slept == [7.25]
    await limits.pause(HUB)
    assert ticks.slept == [7.25]


async def test_a_long_pause_is_an_error_that_says_how_long(limits: RateLimits) -> None:
    limits.heed(HUB, _refusal(300.0))
    with pytest.raises(AgentError) as caught:
        await limits.pause(HUB)
    assert caught.value.reason is Reason.RATE_LIMITED
    assert caught.value.retry_after_seconds == 300.0
    assert HUB in caught.value.message
    assert "300 s" in caught.value.message


async def test_another_host_and_another_failure_pause_nobody(
    limits: RateLimits, ticks: Ticks
) -> None:
    limits.heed(HUB, _refusal(7.0))
    limits.heed("https://store", _refusal(7.0, Reason.SERVER_ERROR))
    limits.heed("", _refusal(7.0))
    for host in ("https://mirror", "https://store", ""):
        await limits.pause(host)
    assert ticks.slept == []


async def test_a_refusal_without_a_time_is_a_short_pause(limits: RateLimits, ticks: Ticks) -> None:
    limits.heed(HUB, _refusal(None))
    await limits.pause(HUB)
    assert ticks.slept == [5.25]


async def test_no_pause_is_longer_than_an_hour(limits: RateLimits) -> None:
    limits.heed(HUB, _refusal(1e9))
    with pytest.raises(AgentError) as caught:
        await limits.pause(HUB)
    assert caught.value.retry_after_seconds == 3600.0


async def test_a_shorter_refusal_does_not_shorten_a_pause(limits: RateLimits, ticks: Ticks) -> None:
    limits.heed(HUB, _refusal(20.0))
    limits.heed(HUB, _refusal(1.0))
    await limits.pause(HUB)
    assert ticks.slept == [20.25]


@asynccontextmanager
async def _fetcher(hub: Hub, tmp_path: Path) -> AsyncIterator[Fetcher]:
    source, store, engine = HuggingFace(hub.endpoint, lambda: None), Store(tmp_path), Engine()
    store.open()
    try:
        yield Fetcher(
            store=store,
            sources=Sources({"hf": lambda environment: source}),
            engine=engine,
            metrics=Metrics(),
        )
    finally:
        engine.close()
        store.close()


async def test_after_one_429_no_model_asks_the_hub(hub: Hub, tmp_path: Path) -> None:
    """Ten models, one refusal for an hour: nine of them learn it without a request."""
    hub.fault("/api/*", Status(429, {"Retry-After": "3600"}))
    async with _fetcher(hub, tmp_path) as fetcher:
        for number in range(10):
            with pytest.raises(AgentError) as caught:
                await fetcher.today(Want(ref=ModelRef(uri=f"hf://acme/m{number}")))
            assert caught.value.reason is Reason.RATE_LIMITED
            assert 3590 < (caught.value.retry_after_seconds or 0) <= 3600
    assert len(hub.requests) == 1


async def test_a_429_for_a_file_pauses_listings_too(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/tiny", {"model.safetensors": b"x" * 1000})
    hub.fault("/*/resolve/*", Status(429, {"Retry-After": "3600"}))
    want = Want(ref=ModelRef(uri="hf://acme/tiny"))
    async with _fetcher(hub, tmp_path) as fetcher:
        await fetcher.resolve(want)
        with pytest.raises(AgentError):
            await fetcher.fetch(Tally(want, stage=Stage.FETCHING))
        asked = len(hub.requests)
        with pytest.raises(AgentError) as caught:
            await fetcher.today(Want(ref=ModelRef(uri="hf://acme/other")))
    assert caught.value.reason is Reason.RATE_LIMITED
    assert len(hub.requests) == asked
