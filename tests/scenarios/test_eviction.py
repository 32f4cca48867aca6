"""A volume over months: what is kept, for whom, for how long, and what is asked for again."""

import os
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from agent import layout
from agent.errors import AgentError, Reason
from agent.model import CacheKey, cache_key
from agent.phases import Phase
from tests.scenarios.volume import Volume

OLD, NEW = "fake://old", "fake://new"
OLD_KEY, NEW_KEY = cache_key(OLD), cache_key(NEW)
DAY = 86400.0


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return _volume(tmp_path)


def _volume(home: Path, **settings: Any) -> Volume:
    made = Volume(home, **settings)
    made.source.add(OLD, {"weights.bin": bytes(400_000)})
    made.source.add(NEW, {"weights.bin": b"n" * 700_000})
    made.users = lambda: frozenset()
    return made


def _used(volume: Volume, *keys: CacheKey) -> None:
    volume.users = lambda: frozenset(keys)
    volume.reconciler.wake()


def _revision(volume: Volume) -> str | None:
    """Between the old revision and the new there is none."""
    found = volume.reconciler.sealed().get(OLD_KEY)
    return found.revision if found is not None else None


# -- making room ----------------------------------------------------------------------------------


async def test_what_comes_waits_for_the_bytes_of_what_goes(volume: Volume) -> None:
    """Else the disk would be above its mark by as much as is not unlinked yet."""
    volume.capacity = 900_000
    unlink, sweep = threading.Event(), volume.store.sweep

    def slow() -> None:
        assert unlink.wait(30)
        sweep()

    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        await volume.later(3600)  # it is not young any more
        with patch.object(volume.store, "sweep", slow):
            volume.want(NEW)
            await volume.until(lambda: not volume.store.model(OLD_KEY).exists())
            await volume.until(lambda: volume.reconciler.running(NEW_KEY))
            await volume.turn(5)
            assert volume.source.calls[-1] == ("list", NEW)
            unlink.set()
            await volume.reach(NEW, Phase.READY)


async def test_what_cannot_be_unlinked_keeps_nobody_waiting(volume: Volume) -> None:
    volume.capacity = 2_000_000

    def refuse() -> None:
        raise AgentError(Reason.DISK_ERROR, "told")

    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        volume.want()
        await volume.turn()
        with patch.object(volume.store, "sweep", refuse):
            await volume.reconciler.evict(OLD_KEY)
            volume.want(NEW)
            await volume.reach(NEW, Phase.READY)
            # Nor the next one, while that is not tried again by itself.
            volume.want()
            await volume.turn()
            await volume.reconciler.evict(NEW_KEY)
            volume.want(OLD)
            await volume.reach(OLD, Phase.READY)


# -- leaving --------------------------------------------------------------------------------------


async def test_what_left_goes_when_its_time_is_over_and_not_before(volume: Volume) -> None:
    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        volume.want()
        await volume.turn()
        await volume.later(6.9 * DAY)
        assert await volume.why(OLD) == "here, and would go if room were needed: 1 of 1 that may go"
        await volume.later(0.2 * DAY)
        assert volume.phase(OLD) is None
        assert (
            await volume.why(OLD)
            == "not here: it went 0s ago, because it had left the desired state"
        )


async def test_the_time_goes_on_while_no_agent_runs(tmp_path: Path) -> None:
    first = _volume(tmp_path)
    async with first.turning():
        first.want(OLD)
        await first.reach(OLD, Phase.READY)
        first.want()
        await first.turn()
        await first.later(DAY)
    second = _volume(tmp_path)
    second.now = first.now + 5.9 * DAY
    async with second.turning():
        second.want()
        await second.turn()
        assert second.phase(OLD) is Phase.READY
        await second.later(0.2 * DAY)
        assert second.phase(OLD) is None


async def test_what_is_wanted_again_in_time_stays_and_begins_anew(volume: Volume) -> None:
    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        for _ in range(3):
            volume.want()
            await volume.turn()
            await volume.later(6 * DAY)
            volume.want(OLD)
            await volume.turn()
        volume.want()
        await volume.turn()
        await volume.later(6 * DAY)
        assert volume.phase(OLD) is Phase.READY
        assert volume.source.calls.count(("list", OLD)) == 1


async def test_what_a_cache_said_of_keeping_outlives_the_cache(volume: Volume) -> None:
    async with volume.turning():
        volume.want(OLD, retain_seconds=0.0)
        await volume.reach(OLD, Phase.READY)
        _used(volume, OLD_KEY)
        volume.want()
        await volume.turn()
        assert volume.phase(OLD) is Phase.READY
        _used(volume)
        await volume.later(11)
        assert volume.phase(OLD) is None


# -- on demand ------------------------------------------------------------------------------------


async def test_on_demand_comes_with_a_pod_and_makes_room_when_none_uses_it(volume: Volume) -> None:
    async with volume.turning():
        volume.want(OLD, NEW, on_demand=True)
        await volume.turn()
        assert volume.phase(OLD) is volume.phase(NEW) is Phase.PENDING
        assert volume.source.calls == []
        _used(volume, OLD_KEY)
        await volume.reach(OLD, Phase.READY)
        _used(volume, NEW_KEY)
        await volume.until(lambda: volume.reconciler.facts()[NEW_KEY].block)
        assert "could be evicted" in await volume.why(NEW)  # the old one is too young
        await volume.later(700)
        await volume.reach(NEW, Phase.READY)
        assert volume.phase(OLD) is Phase.PENDING
        assert await volume.why(OLD) == (
            "not here: it is fetched on demand, and nobody on this node asks for it"
        )


async def test_a_ghost_is_counted_once_and_only_within_a_week(volume: Volume) -> None:
    async with volume.turning():
        volume.want(OLD, on_demand=True, ttl_seconds=3600.0)
        for days in (1.0, 8.0, 2.0):
            _used(volume, OLD_KEY)
            await volume.reach(OLD, Phase.READY)
            _used(volume)
            await volume.later(3700)
            assert volume.phase(OLD) is Phase.PENDING
            await volume.later(days * DAY)
        assert volume.metrics.evictions.labels(why="Expired")._value.get() == 3
        _used(volume, OLD_KEY)
        await volume.reach(OLD, Phase.READY)
        assert volume.metrics.ghost_hits._value.get() == 2
        assert volume.metrics.ghost_bytes._value.get() == 800_000


async def test_what_was_begun_and_nobody_asks_for_goes_first(volume: Volume) -> None:
    async with volume.turning():
        volume.source.add(OLD, {"a.bin": bytes(300_000), "b.bin": bytes(400_000)})
        volume.source.fail("locate", AgentError(Reason.GATED, "no"))
        volume.want(OLD, on_demand=True)
        _used(volume, OLD_KEY)
        await volume.reach(OLD, Phase.FAILED)
        partial = volume.store.tree(OLD_KEY) / "a.bin"
        partial.write_bytes(bytes(300_000))
        _used(volume)
        volume.source.mend()
        volume.want(NEW)
        await volume.until(lambda: volume.phase(NEW) is Phase.READY)
        assert not (volume.store.root / layout.ingest(OLD_KEY)).exists()


# -- asked again ----------------------------------------------------------------------------------


async def test_a_refresh_takes_the_place_of_what_nobody_uses(volume: Volume) -> None:
    """Only what changed is fetched; the old one is on offer until then, and gone afterwards."""
    same, first, second = b"s" * 100_000, b"1" * 50_000, b"2" * 60_000
    async with volume.turning():
        volume.source.add(OLD, {"same.bin": same, "config.json": first})
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        revision = volume.source.add(OLD, {"same.bin": same, "config.json": second})
        await volume.later(DAY)
        assert (volume.store.model(OLD_KEY) / "config.json").read_bytes() == first
        _used(volume, OLD_KEY)
        volume.source.calls.clear()
        volume.want(OLD, refresh="1")
        await volume.until(lambda: volume.reconciler.facts()[OLD_KEY].staged)
        await volume.later(60)
        assert volume.phase(OLD) is Phase.READY
        assert (volume.store.model(OLD_KEY) / "config.json").read_bytes() == first
        assert volume.source.calls == [("list", OLD), ("locate", "config.json")]
        _used(volume)
        await volume.later(11)
        await volume.until(lambda: _revision(volume) == revision)
        assert (volume.store.model(OLD_KEY) / "config.json").read_bytes() == second
        assert (volume.store.model(OLD_KEY) / "same.bin").read_bytes() == same
        await volume.later(60)
        assert volume.source.calls.count(("list", OLD)) == 1
        await volume.until(lambda: not list((volume.store.root / layout.TRASH).iterdir()))
        assert not list((volume.store.root / layout.INGEST).iterdir())


async def test_a_refresh_that_finds_nothing_new_changes_nothing(tmp_path: Path) -> None:
    first = _volume(tmp_path)
    async with first.turning():
        first.want(OLD)
        await first.reach(OLD, Phase.READY)
        sealed = first.reconciler.sealed()[OLD_KEY]
        first.want(OLD, refresh="1")
        await first.until(lambda: first.reconciler._known.refreshed.get(OLD_KEY) == "1")
        await first.turn()
        assert first.source.calls.count(("list", OLD)) == 2
        assert first.reconciler.sealed()[OLD_KEY] is sealed
        assert not list((first.store.root / layout.INGEST / OLD_KEY).parent.iterdir())
    second = _volume(tmp_path)
    async with second.turning():
        second.want(OLD, refresh="1")
        await second.turn(4)
        assert second.source.calls == []


async def test_a_refresh_that_fails_is_said_and_tried_again(volume: Volume) -> None:
    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        revision = volume.source.add(OLD, {"weights.bin": b"x" * 400_000})
        volume.source.fail("list", AgentError(Reason.NETWORK, "no route"))
        volume.want(OLD, refresh="1")
        await volume.until(lambda: volume.reconciler.facts()[OLD_KEY].attempt)
        assert volume.phase(OLD) is Phase.READY
        volume.source.mend()
        await volume.later(3600)
        await volume.until(lambda: _revision(volume) == revision)


async def test_a_staged_revision_that_is_not_wanted_any_more_is_given_up(volume: Volume) -> None:
    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        volume.source.add(OLD, {"weights.bin": b"x" * 400_000})
        _used(volume, OLD_KEY)
        volume.want(OLD, refresh="1")
        await volume.until(lambda: volume.reconciler.facts()[OLD_KEY].staged)
        volume.want(OLD)
        await volume.turn()
        assert not volume.reconciler.facts()[OLD_KEY].staged
        await volume.until(lambda: not list((volume.store.root / layout.INGEST).iterdir()))


def _size_and_end(file: Path) -> tuple[int, bytes]:
    try:
        data = file.read_bytes()
    except FileNotFoundError:  # it is being taken off offer
        return 0, b""
    return len(data), data[-1:]


# -- scrubbing ------------------------------------------------------------------------------------


async def test_a_byte_that_changed_unseen_is_found_and_its_file_alone_is_fetched(
    tmp_path: Path,
) -> None:
    """Of the same size and time: no look can see it."""
    volume = _volume(tmp_path, scrub_seconds=30 * DAY)
    volume.source.add(OLD, {"a.bin": b"a" * 1000, "b.bin": b"b" * 1000})
    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        file = volume.store.model(OLD_KEY) / "a.bin"
        times = file.stat()
        file.chmod(0o644)
        file.write_bytes(b"a" * 999 + b"x")
        file.chmod(0o444)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        await volume.later(60)
        assert volume.phase(OLD) is Phase.READY
        volume.source.calls.clear()
        await volume.later(31 * DAY)
    second = _volume(tmp_path, scrub_seconds=30 * DAY)
    second.source.add(OLD, {"a.bin": b"a" * 1000, "b.bin": b"b" * 1000})
    second.now = volume.now
    async with second.turning():
        second.want(OLD)
        scrubbed = second.metrics.verifications.labels(kind="scrub", result="damaged")._value
        await second.until(lambda: scrubbed.get() == 1)
        await second.until(lambda: _size_and_end(file) == (1000, b"a"))
        await second.reach(OLD, Phase.READY)
        await second.turn()
        assert second.source.calls == [("locate", "a.bin")]
        assert Phase.PENDING in second.witness.seen[OLD_KEY]
        past = [past.what for past in await second.index.past(OLD_KEY)]
        assert past == ["Sealed", "Damaged", "Sealed"]
