"""What is asked for changes while it is being brought: the answer is to the newest question."""

import asyncio
import os
from pathlib import Path

import pytest

from agent import layout
from agent.errors import AgentError, Reason
from agent.model import ModelRef, Want, cache_key
from agent.phases import Phase
from agent.store import Store
from agent.wishes import Desired
from tests.scenarios.volume import Volume

URI = "fake://model"
KEY = cache_key(URI)
NARROW = ModelRef(uri=URI, exclude=("*.bin",))
OTHER = "sha256:" + "0" * 64


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    made = Volume(tmp_path)
    made.source.add(URI, {"config.json": b"{}", "weights.bin": bytes(100_000)})
    return made


def _desire(volume: Volume, want: Want | None) -> None:
    wants = {} if want is None else {want.key: want}
    volume.reconciler.desire(Desired(wants=wants, names={}))


def _files(volume: Volume) -> set[str]:
    return {path.name for path in volume.store.model(KEY).iterdir()}


async def test_a_listing_pinned_for_other_patterns_is_listed_again(volume: Volume) -> None:
    """An interrupted pull of everything must not decide what a pull of less publishes."""
    async with volume.turning():
        await volume.fetcher.resolve(Want(ref=ModelRef(uri=URI)))
    async with _again(volume).turning() as again:
        pull = again.reconciler.pull(Want(ref=NARROW))
        await asyncio.wait_for(pull.done, 20)
        assert _files(again) == {"config.json"}
        assert again.reconciler.sealed()[KEY].ref == NARROW


async def test_a_complete_ingest_of_other_patterns_gives_way(volume: Volume) -> None:
    async with volume.turning():
        _desire(volume, Want(ref=ModelRef(uri=URI)))
        await volume.reach(URI, Phase.READY)
        volume.store.reopen(KEY)
    async with _again(volume).turning() as again:
        pull = again.reconciler.pull(Want(ref=NARROW))
        await asyncio.wait_for(pull.done, 20)
        assert _files(again) == {"config.json"}


async def test_patterns_that_change_during_a_download_are_the_ones_that_count(
    volume: Volume,
) -> None:
    async with volume.turning():
        _desire(volume, Want(ref=ModelRef(uri=URI)))
        await volume.until(lambda: volume.reconciler.running(KEY))
        _desire(volume, Want(ref=NARROW))
        await volume.until(lambda: KEY in volume.reconciler.sealed())
        assert volume.reconciler.sealed()[KEY].ref in (NARROW, ModelRef(uri=URI))
        if volume.reconciler.sealed()[KEY].ref == NARROW:
            assert _files(volume) == {"config.json"}
        else:  # it was sealed before anybody heard: then it is not what is wanted, and says so
            assert volume.phase(URI) is Phase.FAILED


async def test_a_manifest_that_somebody_removed_is_damage(volume: Volume) -> None:
    """Present means on offer: without it no reader of the disk knows of the model."""
    async with volume.turning():
        _desire(volume, Want(ref=ModelRef(uri=URI)))
        await volume.reach(URI, Phase.READY)
        (volume.store.root / layout.manifest(KEY)).unlink()
        assert not await volume.reconciler.look(KEY)
        await volume.until(lambda: volume.store.manifest(KEY) is not None)
        await volume.reach(URI, Phase.READY)


async def test_a_model_and_its_manifest_that_somebody_removed_come_back(volume: Volume) -> None:
    async with volume.turning():
        _desire(volume, Want(ref=ModelRef(uri=URI)))
        await volume.reach(URI, Phase.READY)
        (volume.store.root / layout.manifest(KEY)).unlink()
        os.rename(volume.store.model(KEY), volume.store.root / "elsewhere")  # noqa: PTH104 - as a user would
        await volume.later(60)
        await volume.until(lambda: volume.store.model(KEY).is_dir())
        await volume.reach(URI, Phase.READY)
        assert _files(volume) == {"config.json", "weights.bin"}


class _Stuck(Store):
    def reopen(self, key: object, known: object = None) -> None:
        raise AgentError(Reason.READ_ONLY, "cannot withdraw it: read-only file system")


async def test_who_waits_for_a_repair_that_cannot_begin_is_told_why(tmp_path: Path) -> None:
    volume = Volume(tmp_path, store=_Stuck(tmp_path / "cache"))
    volume.source.add(URI, {"config.json": b"{}"})
    async with volume.turning():
        _desire(volume, Want(ref=ModelRef(uri=URI)))
        await volume.reach(URI, Phase.READY)
        pull = volume.reconciler.mend(ModelRef(uri=URI), ["config.json"])
        with pytest.raises(AgentError) as caught:
            await asyncio.wait_for(pull.done, 20)
        assert caught.value.reason is Reason.READ_ONLY
        await volume.turn()
        assert volume.phase(URI) is Phase.FAILED


async def test_a_model_that_is_used_all_the_time_is_not_the_oldest_without_an_index(
    volume: Volume,
) -> None:
    async with volume.turning():
        _desire(volume, Want(ref=ModelRef(uri=URI)))
        await volume.reach(URI, Phase.READY)
        for _ in range(40):
            volume.now += 250
            await volume.reconciler.use(KEY)
        mirrored = (volume.store.root / layout.manifest(KEY)).stat().st_mtime
        assert volume.now - mirrored <= 550


async def test_one_pull_does_not_fail_for_the_fingerprint_of_another(volume: Volume) -> None:
    async with volume.turning():
        first = volume.reconciler.pull(Want(ref=ModelRef(uri=URI), expect_fingerprint=OTHER))
        with pytest.raises(AgentError) as caught:
            volume.reconciler.pull(Want(ref=ModelRef(uri=URI)))
        assert caught.value.reason is Reason.CONFLICT
        with pytest.raises(AgentError) as wrong:
            await asyncio.wait_for(first.done, 20)
        assert wrong.value.reason is Reason.FINGERPRINT_MISMATCH
        second = volume.reconciler.pull(Want(ref=ModelRef(uri=URI)))
        await asyncio.wait_for(second.done, 20)


async def test_a_wish_that_was_dropped_and_made_again_is_a_new_one(volume: Volume) -> None:
    async with volume.turning():
        bad = Want(ref=ModelRef(uri=URI), expect_fingerprint=OTHER)
        _desire(volume, bad)
        await volume.reach(URI, Phase.FAILED)
        _desire(volume, None)
        await volume.turn()
        calls = len(volume.source.calls)
        _desire(volume, bad)
        await volume.reach(URI, Phase.FAILED)
        await volume.until(lambda: volume.reconciler.failure(KEY))
        await volume.turn()
        assert len(volume.source.calls) >= calls
        attempt = volume.reconciler.failure(KEY)
        assert attempt is not None
        assert attempt.count == 1


async def test_a_directory_that_cannot_be_read_stops_nobody(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO on one model: that one is not known to be whole or damaged, the others go on."""
    volume.source.add("fake://other", {"a": b"1"})

    def broken(key: str, found: object) -> list[str]:
        raise AgentError(Reason.DISK_ERROR, "cannot look at it: Input/output error")

    async with volume.turning():
        _desire(volume, Want(ref=ModelRef(uri=URI)))
        await volume.reach(URI, Phase.READY)
        monkeypatch.setattr(volume.store, "damage", broken)
        await volume.later(60)
        volume.want(URI, "fake://other")
        await volume.reach("fake://other", Phase.READY)
        assert volume.phase(URI) is Phase.READY


def _again(volume: Volume) -> Volume:
    """Another life on the same disk."""
    again = Volume(volume.store.root.parent)
    again.source.add(URI, {"config.json": b"{}", "weights.bin": bytes(100_000)})
    return again
