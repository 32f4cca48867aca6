"""Two models with a file in common: it comes once, lies once, and each of them is whole alone."""

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from agent.catalog import Versions
from agent.errors import AgentError, Reason
from agent.events import Event
from agent.files import Files
from agent.manifest import Manifest
from agent.model import (
    CacheKey,
    Digest,
    Listing,
    ModelRef,
    RemoteFile,
    Stage,
    Want,
    cache_key,
)
from agent.phases import Phase
from agent.store import Store
from agent.tally import Tally
from tests.edges.downloads import git_sha1, noise, sha256
from tests.edges.volume import Mortal, check_offers, mode_of, snapshot, write
from tests.scenarios.volume import Volume

BASE, TUNE = "fake://base", "fake://tune"
BASE_KEY, TUNE_KEY = cache_key(BASE), cache_key(TUNE)
SHARD = noise(200_000)
BASE_FILES = {"config.json": b"{}", "shard-1.bin": SHARD, "shard-2.bin": noise(90_000, 2)}
TUNE_FILES = {"config.json": b"{...}", "weights/shard-1.bin": SHARD, "head.bin": noise(50_000, 3)}
OWN = len(TUNE_FILES["config.json"]) + len(TUNE_FILES["head.bin"])


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return _volume(tmp_path)


def _volume(home: Path, store: Store | None = None) -> Volume:
    made = Volume(home, store=store)
    made.source.add(BASE, BASE_FILES)
    made.source.add(TUNE, TUNE_FILES)
    return made


def _base(volume: Volume) -> Path:
    return volume.store.model(BASE_KEY) / "shard-1.bin"


def _tune(volume: Volume) -> Path:
    return volume.store.model(TUNE_KEY) / "weights/shard-1.bin"


def _located(volume: Volume) -> int:
    """How often the origin was asked for the shard, under either of its names."""
    return sum(call[1].endswith("shard-1.bin") for call in volume.source.calls)


async def _pull(volume: Volume, uri: str) -> Event:
    async with asyncio.timeout(20):
        events = [event async for event in volume.service.pull({"uri": uri})]
    assert events[-1]["event"] == "result", events[-1]
    return events[-1]


async def _bring(volume: Volume, uri: str) -> Tally:
    """List and fetch, with nobody else about."""
    want = Want(ref=ModelRef(uri=uri))
    tally = Tally(want, stage=Stage.RESOLVING)
    await volume.fetcher.resolve(want, tally)
    await volume.fetcher.fetch(tally)
    return tally


def _rot(path: Path) -> None:
    """One bit, and no time that would tell: the disk did it."""
    found, data = path.stat(), bytearray(path.read_bytes())
    data[1000] ^= 1
    _overwrite(path, bytes(data))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def _overwrite(path: Path, data: bytes) -> None:
    """In place: whoever has a name for these bytes has the new ones."""
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


# -- an ordinary day ----------------------------------------------------------------------------


async def test_a_file_that_two_models_have_comes_once_and_lies_once(volume: Volume) -> None:
    async with volume.turning():
        base = await _pull(volume, BASE)
        assert (base["downloaded_bytes"], base["linked_bytes"]) == (base["bytes"], 0)
        tune = await _pull(volume, TUNE)
        assert (tune["downloaded_bytes"], tune["linked_bytes"]) == (OWN, len(SHARD))
        assert volume.metrics.linked_bytes._value.get() == len(SHARD)
        assert _located(volume) == 1
        assert _base(volume).samefile(_tune(volume))
        again = await _pull(volume, TUNE)
        assert (again["result"], again["linked_bytes"]) == ("hit", 0)
    check_offers(volume.store.root)


async def test_one_of_them_evicted_leaves_the_other_whole(volume: Volume) -> None:
    volume.users = lambda: frozenset()
    async with volume.turning():
        await _pull(volume, BASE)
        await _pull(volume, TUNE)
        store, sealed = volume.store, dict(volume.reconciler.sealed())
        one = frozenset({(_base(volume).stat().st_ino, len(SHARD))})
        assert store.shared(BASE_KEY, sealed[BASE_KEY]) == one
        assert store.shared(TUNE_KEY, sealed[TUNE_KEY]) == one

        store.begin_retire(BASE_KEY)
        store.finish_retire(BASE_KEY)
        assert store.shared(TUNE_KEY, sealed[TUNE_KEY]) == one, "the trash has it still"
        store.sweep()
        assert store.shared(TUNE_KEY, sealed[TUNE_KEY]) == frozenset()
        assert await volume.fetcher.damaged(sealed[TUNE_KEY]) == []
        assert _tune(volume).read_bytes() == SHARD
        check_offers(store.root)


async def test_room_is_reserved_only_for_what_no_model_has(volume: Volume) -> None:
    async with volume.turning():
        await _bring(volume, BASE)
        tally = Tally(Want(ref=ModelRef(uri=TUNE)), stage=Stage.RESOLVING)
        await volume.fetcher.resolve(tally.want, tally)
        assert (tally.linked, tally.received) == (len(SHARD), 0)
        assert volume.store.ingests()[TUNE_KEY].remaining == OWN
        again = Tally(tally.want, stage=Stage.RESOLVING)
        await volume.fetcher.resolve(again.want, again)
        assert again.linked == 0, "it is there"


async def test_what_had_arrived_of_a_linked_file_is_given_up(volume: Volume) -> None:
    async with volume.turning():
        want = Want(ref=ModelRef(uri=TUNE))
        await volume.fetcher.resolve(want)
        partial = volume.store.partial(TUNE_KEY) / "weights/shard-1.bin"
        write(partial, SHARD[:150_000])
        await _bring(volume, BASE)
        tally = Tally(want, stage=Stage.FETCHING)
        await volume.fetcher.fetch(tally)
        assert (tally.linked, tally.received) == (len(SHARD), OWN)
        assert tally.job.done == tally.total
        assert _base(volume).samefile(_tune(volume))


async def test_a_newer_revision_shares_with_the_one_on_offer(volume: Volume) -> None:
    async with volume.turning():
        await _bring(volume, BASE)
        volume.source.add(BASE, {**BASE_FILES, "config.json": b"[]"})
        tally = Tally(Want(ref=ModelRef(uri=BASE)), stage=Stage.RESOLVING)
        await volume.fetcher.resolve(tally.want, tally)
        assert tally.linked == len(SHARD) + 90_000
        assert volume.store.ingests()[BASE_KEY].remaining == 2


async def test_a_git_name_promises_nothing_that_a_manifest_could_be_asked_for(
    volume: Volume,
) -> None:
    suspected: list[CacheKey] = []
    async with volume.turning():
        volume.fetcher.suspected = lambda key, paths: suspected.append(key)
        await _bring(volume, BASE)
        files = [
            RemoteFile(path="blob", size=len(SHARD), origin="blob", digest=git_sha1(SHARD)),
            RemoteFile(path="none", size=len(SHARD), origin="none"),
            # Whoever lies about a size must not bring a good model into disrepute.
            RemoteFile(path="size", size=len(SHARD) - 1, origin="size", digest=sha256(SHARD)),
        ]
        volume.source.describe(TUNE, files)
        await volume.fetcher.resolve(Want(ref=ModelRef(uri=TUNE)))
        assert volume.store.ingests()[TUNE_KEY].done == 0
        assert suspected == []


# -- what must not be shared --------------------------------------------------------------------


async def test_wrong_bytes_are_not_shared_and_their_model_is_suspected(volume: Volume) -> None:
    suspected: list[tuple[CacheKey, list[str]]] = []
    async with volume.turning():
        await _bring(volume, BASE)
        _rot(_base(volume))
        volume.fetcher.suspected = lambda key, paths: suspected.append((key, paths))
        want = Want(ref=ModelRef(uri=TUNE))
        await volume.fetcher.resolve(want)
        assert suspected == [(BASE_KEY, ["shard-1.bin"])]
        tally = Tally(want, stage=Stage.FETCHING)
        await volume.fetcher.fetch(tally)
        assert (tally.linked, tally.received) == (0, OWN + len(SHARD))
        assert _tune(volume).read_bytes() == SHARD
        assert _base(volume).read_bytes() != SHARD, "nobody has touched it"
        assert _base(volume).stat().st_nlink == 1


async def test_a_good_copy_serves_where_another_is_wrong(volume: Volume) -> None:
    third = "fake://third"
    volume.source.add(third, {"s": SHARD})
    async with volume.turning():
        await _bring(volume, BASE)
        sound = volume.store.root / "sound"
        sound.write_bytes(SHARD)
        await _bring(volume, TUNE)
        # Each with an inode of its own.
        worse, better = sorted((_base(volume), _tune(volume)))
        worse.unlink()
        sound.rename(worse)
        worse.chmod(0o444)
        _rot(worse)
        volume.fetcher.suspected = lambda key, paths: None
        tally = await _bring(volume, third)
        assert tally.linked == len(SHARD)
        assert (volume.store.model(cache_key(third)) / "s").samefile(better)


async def test_a_suspected_model_is_mended_beside(volume: Volume) -> None:
    async with volume.turning():
        await _pull(volume, BASE)
        _rot(_base(volume))
        await _pull(volume, TUNE)
        await volume.until(lambda: not volume.reconciler.withdrawn())
        await volume.reach(BASE, Phase.READY)
        assert _base(volume).read_bytes() == _tune(volume).read_bytes() == SHARD
    check_offers(volume.store.root)


class _Refusing(Files):
    """Links nothing, for this reason."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.asked = 0

    def link(self, source: Path, target: Path, *, below: Path | None = None) -> None:
        self.asked += 1
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS])
async def test_what_cannot_be_linked_is_downloaded(tmp_path: Path, code: int) -> None:
    files = _Refusing(code)
    volume = _volume(tmp_path, Store(tmp_path / "cache", files))
    async with volume.turning():
        await _pull(volume, BASE)
        tune = await _pull(volume, TUNE)
        assert (tune["downloaded_bytes"], tune["linked_bytes"]) == (tune["bytes"], 0)
        assert files.asked == 1, "nor is it hashed a second time for it"
        assert not _base(volume).samefile(_tune(volume))
    check_offers(volume.store.root)


async def test_a_disk_without_room_for_a_name_is_full(tmp_path: Path) -> None:
    volume = _volume(tmp_path, Store(tmp_path / "cache", _Refusing(errno.ENOSPC)))
    async with volume.turning():
        await _bring(volume, BASE)
        with pytest.raises(AgentError) as caught:
            await volume.fetcher.resolve(Want(ref=ModelRef(uri=TUNE)))
        assert caught.value.reason is Reason.DISK_FULL
        assert volume.store.ingests()[TUNE_KEY].done == 0


class _Meddled(Store):
    """Somebody is faster than the link, or busy during a hash that finds wrong bytes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.meddle: Callable[[Path], None] = lambda source: None
        self.found_wrong: Callable[[], None] = lambda: None

    def link(self, key: CacheKey, path: str, source: Path) -> bool:
        self.meddle(source)
        return super().link(key, path, source)

    def discard(self, key: CacheKey, path: str) -> None:
        self.found_wrong()
        super().discard(key, path)


async def test_a_model_that_was_retired_after_the_hash(tmp_path: Path) -> None:
    store = _Meddled(tmp_path / "cache")
    volume = _volume(tmp_path, store)

    def retire(_: Path) -> None:
        store.begin_retire(BASE_KEY)
        store.finish_retire(BASE_KEY)

    async with volume.turning():
        await _bring(volume, BASE)
        store.meddle = retire
        tally = await _bring(volume, TUNE)
        assert (tally.linked, tally.received) == (0, OWN + len(SHARD))


async def test_a_file_that_was_changed_after_the_hash(tmp_path: Path) -> None:
    store = _Meddled(tmp_path / "cache")
    volume = _volume(tmp_path, store)
    async with volume.turning():
        await _bring(volume, BASE)
        store.meddle = lambda source: _overwrite(source, bytes(len(SHARD)))
        tally = await _bring(volume, TUNE)
        assert (tally.linked, tally.received) == (0, OWN + len(SHARD))
        assert _tune(volume).read_bytes() == SHARD
        assert _base(volume).stat().st_nlink == 1


async def test_a_file_that_is_changed_during_the_hash_and_takes_its_time_back(
    volume: Volume,
) -> None:
    """Its size, its inode and its time are what they were; only the ctime tells."""
    hashing = volume._engine.hash
    hashed: list[Path] = []

    async def meddled(path: Path, *, size: int, promised: Digest | None) -> str | None:
        digest = await hashing(path, size=size, promised=promised)
        if path == _base(volume):
            hashed.append(path)
            if len(hashed) == 1:
                _rot(path)
        return digest

    async with volume.turning():
        await _bring(volume, BASE)
        with patch.object(volume._engine, "hash", meddled):
            tally = await _bring(volume, TUNE)
        assert (tally.linked, tally.received) == (0, OWN + len(SHARD))
        assert _tune(volume).read_bytes() == SHARD


async def test_a_file_that_gets_another_name_during_the_hash_is_linked_all_the_same(
    volume: Volume, tmp_path: Path
) -> None:
    hashing = volume._engine.hash
    hashed: list[Path] = []

    async def meddled(path: Path, *, size: int, promised: Digest | None) -> str | None:
        digest = await hashing(path, size=size, promised=promised)
        if path == _base(volume):
            hashed.append(path)
            if len(hashed) == 1:
                (tmp_path / "name").hardlink_to(path)
        return digest

    async with volume.turning():
        await _bring(volume, BASE)
        want = Want(ref=ModelRef(uri=TUNE))
        tally = Tally(want, stage=Stage.RESOLVING)
        with patch.object(volume._engine, "hash", meddled):
            await volume.fetcher.resolve(want, tally)
        assert len(hashed) == 2
        assert tally.linked == len(SHARD)


async def test_what_others_wrote_is_on_the_disk_before_it_is_hashed(tmp_path: Path) -> None:
    """A page that was mapped and dirty before takes more bytes without a new time."""
    files = Mortal()
    volume = _volume(tmp_path, Store(tmp_path / "cache", files))
    hashing = volume._engine.hash
    before: list[tuple[Path, bool]] = []

    async def noted(path: Path, *, size: int, promised: Digest | None) -> str | None:
        before.append((path, f"sync {path}" in files.steps))
        return await hashing(path, size=size, promised=promised)

    async with volume.turning():
        await _bring(volume, BASE)
        with patch.object(volume._engine, "hash", noted):
            await _bring(volume, TUNE)
        assert before == [(_base(volume), True)]


async def test_a_file_that_takes_the_place_of_one_just_proven_is_not_sealed(
    tmp_path: Path,
) -> None:
    class Swapped(Store):
        def promote(self, key: CacheKey, path: str) -> None:
            super().promote(key, path)
            if path == "head.bin" and swaps.pop():
                swaps.append(False)
                write(self.tree(key) / path, bytes(50_000), mode=0o444)

    swaps = [True]
    volume = _volume(tmp_path, Swapped(tmp_path / "cache"))
    async with volume.turning():
        with pytest.raises(AgentError, match=r"head.bin of .* changed .* after it was proven"):
            await _bring(volume, TUNE)
        await _bring(volume, TUNE)
        assert (volume.store.model(TUNE_KEY) / "head.bin").read_bytes() == TUNE_FILES["head.bin"]


async def test_a_file_that_is_written_into_after_the_last_look_is_not_sealed(
    tmp_path: Path,
) -> None:
    class Late(Store):
        def seal(self, sealed: Manifest, proven: Versions | None = None) -> None:
            if sealed.ref.uri == TUNE:
                _overwrite(self.tree(TUNE_KEY) / "head.bin", bytes(50_000))
            super().seal(sealed, proven)

    volume = _volume(tmp_path, Late(tmp_path / "cache"))
    async with volume.turning():
        with pytest.raises(AgentError, match=r"head.bin of .* changed .* after it was proven"):
            await _bring(volume, TUNE)
        assert volume.store.manifest(TUNE_KEY) is None


async def test_a_repair_that_a_pod_misleads_fails_and_is_made_by_the_next_try(
    volume: Volume,
) -> None:
    async with volume.turning():
        await _bring(volume, BASE)
        await _bring(volume, TUNE)
        want, tree = Want(ref=ModelRef(uri=TUNE)), volume.store.tree(TUNE_KEY)
        _tune(volume).unlink()
        volume.store.reopen(TUNE_KEY)
        begin, base = volume.store.begin, snapshot(volume.store.model(BASE_KEY))

        def mislead(listing: Listing) -> None:
            begin(listing)
            (tree / "weights").rmdir()
            (tree / "weights").symlink_to(volume.store.model(BASE_KEY))

        with patch.object(volume.store, "begin", mislead), pytest.raises(AgentError) as caught:
            await volume.fetcher.fetch(Tally(want, stage=Stage.FETCHING))
        assert caught.value.reason is Reason.DISK_ERROR
        assert "somebody else writes into the cache" in caught.value.message
        tally = Tally(want, stage=Stage.FETCHING)
        await volume.fetcher.fetch(tally)
        assert (tally.linked, tally.received) == (len(SHARD), 0)
        assert _tune(volume).read_bytes() == SHARD
        assert snapshot(volume.store.model(BASE_KEY)) == base
    check_offers(volume.store.root)


async def test_a_file_that_is_written_into_between_its_proof_and_the_seal(
    volume: Volume,
) -> None:
    """Through the other model, say, which some pod has mounted with a right to write."""
    async with volume.turning():
        await _bring(volume, BASE)
        want = Want(ref=ModelRef(uri=TUNE))
        await volume.fetcher.resolve(want)
        clock = volume.fetcher._clock

        def meddle() -> float:
            volume.fetcher._clock = clock
            _overwrite(_base(volume), bytes(len(SHARD)))
            return clock()

        volume.fetcher._clock = meddle
        with pytest.raises(AgentError, match=r"shard-1.bin of .* changed .* after it was proven"):
            await volume.fetcher.fetch(Tally(want, stage=Stage.FETCHING))
        assert volume.store.manifest(TUNE_KEY) is None
        tally = Tally(want, stage=Stage.FETCHING)
        await volume.fetcher.fetch(tally)
        assert tally.received == len(SHARD)
        assert _tune(volume).read_bytes() == SHARD


# -- repairs ------------------------------------------------------------------------------------


async def test_a_repair_is_a_new_file_that_the_other_takes_over(volume: Volume) -> None:
    async with volume.turning():
        await _bring(volume, BASE)
        await _bring(volume, TUNE)
        before = _base(volume).stat().st_ino
        _rot(_base(volume))
        volume.store.reopen(BASE_KEY)
        tally = await _bring(volume, BASE)
        assert tally.received == len(SHARD)
        assert _base(volume).stat().st_ino != before == _tune(volume).stat().st_ino
        assert _base(volume).read_bytes() == SHARD

        volume.store.reopen(TUNE_KEY)
        tally = await _bring(volume, TUNE)
        assert (tally.linked, tally.received) == (len(SHARD), 0)
        assert _located(volume) == 2
        assert _base(volume).samefile(_tune(volume))


async def test_a_repair_that_ends_while_the_other_is_hashed_serves_it_too(tmp_path: Path) -> None:
    store = _Meddled(tmp_path / "cache")
    volume = _volume(tmp_path, store)
    async with volume.turning():
        await _bring(volume, BASE)
        await _bring(volume, TUNE)
        found = store.manifest(BASE_KEY)
        assert found is not None
        _rot(_base(volume))
        store.reopen(BASE_KEY)
        store.reopen(TUNE_KEY)

        def mend_the_base() -> None:
            write(store.tree(BASE_KEY) / "shard-1.bin", SHARD)
            store.seal(found)

        store.found_wrong = mend_the_base
        tally = Tally(Want(ref=ModelRef(uri=TUNE)), stage=Stage.VERIFYING)
        await volume.fetcher.fetch(tally)
        assert (tally.linked, tally.received) == (len(SHARD), 0)
        assert tally.job.done == tally.total
        assert _base(volume).samefile(_tune(volume))
    check_offers(store.root)


async def test_who_writes_into_a_shared_file_damages_both_and_both_are_mended(
    volume: Volume,
) -> None:
    async with volume.turning():
        await _pull(volume, BASE)
        await _pull(volume, TUNE)
        _overwrite(_base(volume), bytes(len(SHARD)))
        await volume.later(31)
        await volume.until(lambda: not volume.reconciler.withdrawn())
        await volume.reach(BASE, Phase.READY)
        await volume.reach(TUNE, Phase.READY)
        assert _base(volume).read_bytes() == _tune(volume).read_bytes() == SHARD
    check_offers(volume.store.root)


async def test_a_file_that_was_only_touched_is_proven_again_and_not_fetched(
    volume: Volume,
) -> None:
    async with volume.turning():
        await _pull(volume, BASE)
        inode = _base(volume).stat().st_ino
        os.utime(_base(volume), (0, volume.now + 1e9))  # in the future, where it must not stay
        assert not await volume.reconciler.look(BASE_KEY)
        await volume.until(lambda: not volume.reconciler.withdrawn())
        await volume.reach(BASE, Phase.READY)
        assert await volume.reconciler.look(BASE_KEY)
        assert _located(volume) == 1
        assert _base(volume).stat().st_ino == inode


async def test_a_shared_file_that_was_opened_to_a_group_is_closed_for_all(
    volume: Volume,
) -> None:
    """kubelet does so for a pod with an fsGroup."""
    async with volume.turning():
        await _bring(volume, BASE)
        _base(volume).chmod(0o664)
        await _bring(volume, TUNE)
        assert mode_of(_base(volume)) == 0o444
