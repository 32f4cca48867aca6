"""The loop against a world that changes under it: eviction races, looks, cancellations, bugs."""

import asyncio
import errno
import random
import shutil
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent import layout
from agent.catalog import Versions
from agent.errors import AgentError, Reason
from agent.events import Event
from agent.files import Files
from agent.manifest import Manifest
from agent.model import ModelRef, Want, cache_key
from agent.phases import Phase
from agent.store import Store
from agent.wishes import Desired
from tests.fakes.source import Operation
from tests.scenarios.volume import Volume

OLD, NEW = "fake://old", "fake://new"
OLD_KEY, NEW_KEY = cache_key(OLD), cache_key(NEW)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    made = Volume(tmp_path)
    made.source.add(OLD, {"weights.bin": bytes(400_000)})
    made.source.add(NEW, {"weights.bin": b"n" * 700_000})
    return made


async def _seal_old(volume: Volume) -> None:
    """A model that nobody wants any more, old enough to be a victim."""
    volume.want(OLD)
    await volume.reach(OLD, Phase.READY)
    volume.want()
    await volume.later(3600)


# -- eviction -----------------------------------------------------------------------------------


async def test_what_nobody_uses_makes_room_for_what_is_wanted(volume: Volume) -> None:
    volume.users = lambda: frozenset()
    async with volume.turning():
        await _seal_old(volume)
        volume.want(NEW)
        await volume.reach(NEW, Phase.READY)
        assert volume.phase(OLD) is None
        assert not volume.store.model(OLD_KEY).exists()
        assert volume.metrics.evictions.labels(why="Space")._value.get() == 1
        await volume.until(lambda: not list((volume.store.root / layout.TRASH).iterdir()))


async def test_without_knowing_who_uses_what_nothing_is_evicted(volume: Volume) -> None:
    async with volume.turning():
        await _seal_old(volume)
        volume.want(NEW)
        await volume.until(lambda: volume.reconciler.facts()[NEW_KEY].block)
        block = volume.reconciler.facts()[NEW_KEY].block
        assert block is not None
        assert block.why == "InsufficientCapacity"
        assert block.message.startswith("needs 684Ki more; 58")
        assert volume.phase(OLD) is Phase.READY
        assert ("locate", "weights.bin") not in volume.source.calls[2:]


async def test_a_pod_that_comes_while_its_model_retires_keeps_it(volume: Volume) -> None:
    """Nobody uses it when the plan is made; by the time it is off offer, somebody does."""
    volume.users = lambda: frozenset()
    async with volume.turning():
        await _seal_old(volume)
        retiring = volume.store.root / layout.retiring(OLD_KEY)
        asked: list[bool] = []

        def users() -> frozenset[str]:
            asked.append(retiring.exists())
            return frozenset({OLD_KEY}) if any(asked) else frozenset()

        volume.users = users  # type: ignore[assignment] # a CacheKey is a str
        before = len(volume.source.calls)
        volume.want(NEW)
        await volume.until(lambda: any(asked))
        await volume.turn()
        assert volume.phase(OLD) is Phase.READY
        assert volume.store.manifest(OLD_KEY) is not None
        assert volume.store.damage(OLD_KEY, volume.reconciler.sealed()[OLD_KEY]) == []
        assert not retiring.exists()
        # And what was to have its room has not begun without it.
        assert ("locate", "weights.bin") not in volume.source.calls[before:]
        assert volume.reconciler.running(NEW_KEY) is None
        assert volume.metrics.evictions.labels(why="Space")._value.get() == 0

        # Not at once: the list that said so may be newer than the watch.
        volume.users = lambda: frozenset()
        volume.reconciler.wake()
        await volume.turn()
        assert volume.phase(OLD) is Phase.READY
        volume.now += 60.0
        volume.reconciler.wake()
        await volume.reach(NEW, Phase.READY)
        assert volume.phase(OLD) is None


async def test_what_became_unknown_while_a_model_retires_keeps_it(volume: Volume) -> None:
    volume.users = lambda: frozenset()
    async with volume.turning():
        await _seal_old(volume)
        retiring = volume.store.root / layout.retiring(OLD_KEY)
        asked: list[bool] = []

        def users() -> frozenset[str] | None:
            asked.append(retiring.exists())
            return None if any(asked) else frozenset()

        volume.users = users  # type: ignore[assignment] # a CacheKey is a str
        volume.want(NEW)
        await volume.until(lambda: any(asked))
        await volume.turn()
        assert volume.phase(OLD) is Phase.READY
        assert volume.store.manifest(OLD_KEY) is not None


# -- looks --------------------------------------------------------------------------------------


async def test_a_look_every_half_minute_finds_what_was_deleted_and_heals_it(
    volume: Volume,
) -> None:
    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        (volume.store.model(OLD_KEY) / "weights.bin").unlink()
        await volume.later(29)
        assert volume.phase(OLD) is Phase.READY
        with volume.source.held("locate"):
            await volume.later(2)
            await volume.until(lambda: volume.phase(OLD) is not Phase.READY)
            assert volume.store.manifest(OLD_KEY) is None, "off offer at once"
        await volume.reach(OLD, Phase.READY)
        assert (volume.store.model(OLD_KEY) / "weights.bin").read_bytes() == bytes(400_000)


async def test_a_damaged_model_that_nobody_wants_is_healed_all_the_same(volume: Volume) -> None:
    async with volume.turning():
        await _seal_old(volume)
        (volume.store.model(OLD_KEY) / "weights.bin").unlink()
        await volume.later(31)
        await volume.until(lambda: volume.source.calls.count(("locate", "weights.bin")) == 2)
        await volume.reach(OLD, Phase.READY)
        assert volume.store.manifest(OLD_KEY) is not None


# -- jobs ---------------------------------------------------------------------------------------


class _SlowSeal(Store):
    """Stops before a seal until it may go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.sealing = threading.Event()
        self.go_on = threading.Event()

    def seal(self, sealed: Manifest, proven: Versions | None = None) -> None:
        self.sealing.set()
        assert self.go_on.wait(20)
        super().seal(sealed, proven)


async def test_a_wish_withdrawn_during_the_seal_leaves_a_model_that_is_known(
    tmp_path: Path,
) -> None:
    """A seal cannot be stopped half way. What it published must not be forgotten."""
    store = _SlowSeal(tmp_path / "cache")
    volume = Volume(tmp_path, store=store)
    volume.source.add(OLD, {"weights.bin": b"weights"})
    async with volume.turning():
        volume.want(OLD)
        await volume.until(store.sealing.is_set)
        volume.want()
        await asyncio.sleep(0)
        threading.Timer(0.2, store.go_on.set).start()
        await volume.until(lambda: store.manifest(OLD_KEY) is not None)
        await volume.reach(OLD, Phase.READY)
        volume.want(OLD)
        await volume.turn()
        assert volume.phase(OLD) is Phase.READY
        assert [call for call in volume.source.calls if call[0] == "list"] == [("list", OLD)]


async def test_a_bug_in_a_job_fails_its_model_and_not_the_loop(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    async with volume.turning():
        monkeypatch.setattr(volume.fetcher, "resolve", broken)
        volume.want(OLD)
        await volume.reach(OLD, Phase.FAILED)
        attempt = volume.reconciler.failure(OLD_KEY)
        assert attempt is not None
        assert attempt.reason is Reason.INTERNAL
        assert "ZeroDivisionError: a bug" in attempt.message
        monkeypatch.undo()
        await volume.later(61)
        await volume.reach(OLD, Phase.READY)


async def test_a_bug_in_the_loop_ends_it_loudly_and_tells_who_waits(volume: Volume) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.RaisesGroup(ZeroDivisionError):
        async with volume.turning():
            with volume.source.held("list"):
                pull = volume.reconciler.pull(Want(ref=ModelRef(uri=OLD)))
                await volume.reach(OLD, Phase.RESOLVING)
                volume.users = broken
                volume.reconciler.wake()
                with pytest.raises(AgentError, match="the agent stops"):
                    await asyncio.wait_for(pull.done, 20)


async def test_a_failure_is_tried_again_when_its_time_has_come(volume: Volume) -> None:
    async with volume.turning():
        volume.source.fail("list", AgentError(Reason.NETWORK, "no route"), times=2)
        volume.want(OLD)
        await volume.reach(OLD, Phase.FAILED)
        attempt = volume.reconciler.failure(OLD_KEY)
        assert attempt is not None
        assert 2.5 <= attempt.retry_at - volume.now <= 5
        await volume.turn()
        assert len(volume.source.calls) == 1, "not before its time"
        await volume.later(6)
        await volume.until(lambda: len(volume.source.calls) == 2)

        def failed_again() -> bool:
            attempt = volume.reconciler.failure(OLD_KEY)
            return attempt is not None and attempt.count == 2

        await volume.until(failed_again)
        await volume.later(60)
        await volume.reach(OLD, Phase.READY)
        assert volume.reconciler.failure(OLD_KEY) is None


async def test_a_changed_wish_forgets_the_failures_of_the_old_one(volume: Volume) -> None:
    async with volume.turning():
        volume.source.fail("list", AgentError(Reason.GATED, "terms"), times=1)
        volume.want(OLD)
        await volume.reach(OLD, Phase.FAILED)
        changed = Want(ref=ModelRef(uri=OLD, exclude=("*.md",)))
        volume.reconciler.desire(Desired(wants={OLD_KEY: changed}, names={}))
        await volume.reach(OLD, Phase.READY)


async def test_progress_lines_move_and_go(volume: Volume) -> None:
    line = volume.store.root / layout.progress(OLD_KEY)
    async with volume.turning():
        with volume.source.held("locate"):
            volume.want(OLD)
            await volume.until(lambda: ("locate", "weights.bin") in volume.source.calls)
            seen = []
            for _ in range(2):
                volume.witness.progress(volume.reconciler.facts().values())
                seen.append(line.read_text())
            assert seen == ["wait 1 0 400000 Fetching\n", "wait 2 0 400000 Fetching\n"]
            volume.want()
            await volume.reach(OLD, Phase.PARTIAL)
            volume.witness.progress(volume.reconciler.facts().values())
            assert not line.exists(), "a line is a promise to a waiting pod"
        volume.source.fail("locate", AgentError(Reason.GATED, "terms"))
        volume.want(OLD)
        await volume.reach(OLD, Phase.FAILED)
        volume.witness.progress(volume.reconciler.facts().values())
        assert line.read_text().startswith("fallback 4 ")
        assert line.read_text().endswith(" Gated\n")
        volume.source.mend()
        await volume.later(3600)
        await volume.reach(OLD, Phase.READY)
        assert not line.exists()


# -- anything, in any order -----------------------------------------------------------------------


class _Chaos:
    """Does anything that users, pods, disks and sources may do, in the order of a seed."""

    def __init__(self, volume: Volume, seed: int) -> None:
        self._volume = volume
        self._dice = random.Random(seed)
        self.uris = [f"fake://m{n}" for n in range(4)]
        for uri in self.uris:
            volume.source.add(
                uri,
                {"a.bin": self._dice.randbytes(200_000), "b.bin": self._dice.randbytes(100_000)},
            )

    async def step(self) -> None:
        deeds: tuple[Callable[[], Awaitable[None]], ...] = (
            self._wish,
            self._wish,
            self._use,
            self._fail,
            self._delete,
            self._pull,
            self._wait,
            self._verify,
        )
        await self._dice.choice(deeds)()

    async def _wish(self) -> None:
        self._volume.want(*self._dice.sample(self.uris, self._dice.randrange(4)))

    async def _use(self) -> None:
        used = frozenset(cache_key(uri) for uri in self._dice.sample(self.uris, 2))
        self._volume.users = lambda: used

    async def _fail(self) -> None:
        error = AgentError(self._dice.choice(list(Reason)), "as arranged")
        operation: Operation = self._dice.choice(("list", "locate"))
        self._volume.source.fail(operation, error, times=1)

    async def _delete(self) -> None:
        if sealed := list(self._volume.reconciler.sealed()):
            path = self._volume.store.model(self._dice.choice(sealed)) / "a.bin"
            path.unlink(missing_ok=True)

    async def _wait(self) -> None:
        if self._dice.random() < 0.5:
            await self._volume.later(self._dice.choice((1, 31, 700, 5000)))
        else:
            await asyncio.sleep(self._dice.choice((0, 0.001, 0.02)))

    async def _pull(self) -> None:
        await self._watch(self._volume.service.pull({"uri": self._dice.choice(self.uris)}))

    async def _verify(self) -> None:
        await self._watch(self._volume.service.verify({"repair": self._dice.random() < 0.5}))

    async def _watch(self, events: AsyncGenerator[Event, None]) -> None:
        """To the end, or until the user has had enough."""
        async with aclosing(events):
            async for _ in events:
                if self._dice.random() < 0.4:
                    break


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_every_change_is_a_legal_one_and_offers_are_whole(
    tmp_path: Path, seed: int
) -> None:
    volume = Volume(tmp_path)
    volume.capacity = 900_000  # holds three of the four
    volume.users = lambda: frozenset()
    chaos = _Chaos(volume, seed)
    uri = chaos.uris[0]
    async with volume.turning():
        for _ in range(60):
            await chaos.step()
        volume.source.mend()
        volume.capacity = 10_000_000
        volume.want(uri)
        await volume.later(5000)
        await volume.until(lambda: volume.reconciler.running(cache_key(uri)) is None)
        await volume.turn()
        await asyncio.wait_for(volume.reconciler.pull(Want(ref=ModelRef(uri=uri))).done, 20)
        assert volume.phase(uri) is Phase.READY
        for key, found in dict(volume.reconciler.sealed()).items():
            assert await volume.fetcher.damaged(found) == [], key


@pytest.mark.parametrize(("asked", "seconds"), [(10.0, 10.0), (None, 30.0), (1.0, 5.0), (60, 30)])
async def test_9_1_8_a_lost_folder_is_noticed_as_soon_as_kserve_asks(
    volume: Volume, asked: float | None, seconds: float
) -> None:
    """At least so often, and not in a tight loop."""
    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        volume.reconciler.look_every(asked)
        await volume.later(31)  # a look by what was asked before may have been due
        volume.source.fail("list", AgentError(Reason.NETWORK, "no route"))
        volume.source.fail("locate", AgentError(Reason.NETWORK, "no route"))
        shutil.rmtree(volume.store.model(OLD_KEY))
        await volume.later(seconds - 1)
        assert volume.phase(OLD) is Phase.READY
        await volume.later(2)
        assert volume.phase(OLD) is not Phase.READY


class _Stuck(Files):
    """What was begun cannot be moved to the trash."""

    def rename(self, source: Path, target: Path, *, below: Path | None = None) -> None:
        if target.parent.name == "trash" and source.parent.name == "ingest":
            raise OSError(errno.ENOSPC, "No space left on device")
        super().rename(source, target, below=below)


async def test_what_cannot_be_given_up_stops_nobody(tmp_path: Path) -> None:
    """A leftover beside a sealed model, say, on a disk without room for one more name."""
    volume = Volume(tmp_path, store=Store(tmp_path / "cache", _Stuck()))
    volume.source.add(OLD, {"weights.bin": b"o"})
    volume.source.add(NEW, {"weights.bin": b"n"})
    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        assert OLD_KEY in volume.store.ingests()
        volume.want(OLD, NEW)
        await volume.reach(NEW, Phase.READY)
        assert volume.metrics.turns.labels(result="failed")._value.get() == 0


# -- credentials that must show themselves (design D12) --------------------------------------------


async def test_a_cache_that_comes_to_a_sealed_model_is_in_doubt_until_its_own_try(
    volume: Volume,
) -> None:
    """And nobody else is; the loop comes back for the next try by itself."""
    said: dict[str, str] = {}
    volume.witness._status = SimpleNamespace(
        write=lambda bodies: said.update({name: body["state"] for name, body in bodies.items()})
    )
    want = Want(ref=ModelRef(uri=OLD))
    guarded = {"team-a/old": replace(want, access="its own")}
    names = {"old": OLD_KEY, "team-a/old": OLD_KEY}
    async with volume.turning():
        volume.want(OLD)
        await volume.reach(OLD, Phase.READY)
        volume.source.fail("list", AgentError(Reason.UNAUTHORIZED, "no"))
        desired = Desired(wants={OLD_KEY: want}, names=names, guarded=guarded)
        volume.reconciler.desire(desired)
        await volume.until(lambda: said.get("team-a/old") == "Failed")
        assert said["old"] == "Ready"
        volume.source.mend()
        await volume.later(10)
        assert said["team-a/old"] == "Failed", "before its time"
        volume.now += 60
        volume.reconciler.wake()
        await volume.until(lambda: said["team-a/old"] == "Ready")
        # Once shown it stays, whatever the source says later.
        volume.source.fail("list", AgentError(Reason.UNAUTHORIZED, "no"))
        await volume.later(7200)
        assert said == {"old": "Ready", "team-a/old": "Ready"}
