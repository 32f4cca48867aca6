"""What another agent left is served, proven and taken over: without a byte, and without a gap."""

import asyncio
import io
import os
import zipfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from agent import layout
from agent.errors import AgentError, Reason
from agent.model import CacheKey, Digest, cache_key
from agent.phases import Phase
from agent.status import model_status
from agent.store import Store
from tests.edges import volume as disk
from tests.edges.downloads import noise
from tests.edges.volume import check_offers, mode_of, snapshot
from tests.fakes.source import FakeSource
from tests.machine import files_of
from tests.scenarios.volume import Volume

URI = "fake://model"
KEY = cache_key(URI)
FILES = {"config.json": b"{}", "weights/a.bin": noise(120_000), "weights/b.bin": noise(90_000, 2)}
METADATA = {".cache/huggingface/.gitignore": b"*", ".cache/huggingface/download/x.metadata": b"e"}
LEFT = {**FILES, **METADATA}


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    made = Volume(tmp_path)
    made.source.add(URI, FILES)
    made.users = lambda: frozenset()
    return made


def leave(root: Path, contents: Mapping[str, bytes]) -> Path:
    """Before our time."""
    directory = disk.leave(root, contents, uri=URI)
    for path in contents:
        os.utime(directory / path, (1_600_000_000, 1_600_000_000))
    return directory


def in_use(volume: Volume) -> None:
    volume.users = lambda: frozenset({KEY})


def word(volume: Volume) -> str:
    status = model_status(volume.reconciler.facts()[KEY], path="")
    assert status is not None
    return status.model_status


def located(volume: Volume) -> list[str]:
    """The files whose bytes the origin was asked for."""
    return [path for operation, path in volume.source.calls if operation == "locate"]


def theirs(volume: Volume) -> Path:
    return volume.store.model(KEY)


@asynccontextmanager
async def _hashing_held(volume: Volume) -> AsyncIterator[None]:
    """A large one takes minutes."""
    go, engine = asyncio.Event(), volume._engine
    hashing = engine.hash

    async def slow(path: Path, *, size: int, promised: Digest | None) -> str | None:
        await go.wait()
        return await hashing(path, size=size, promised=promised)

    with patch.object(engine, "hash", slow):
        yield
        go.set()


# -- an ordinary day ----------------------------------------------------------------------------


async def test_a_whole_one_is_adopted_without_a_byte_of_the_origin(volume: Volume) -> None:
    left = leave(volume.store.root, LEFT)  # once: made anew, it may have other inodes
    inodes = {p: (left / p).stat().st_ino for p in FILES}
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        assert Phase.FETCHING not in volume.witness.seen[KEY]
        assert located(volume) == []
        assert volume.metrics.adopted_bytes._value.get() == sum(map(len, FILES.values()))
        assert {p: (theirs(volume) / p).stat().st_ino for p in FILES} == inodes
        await volume.until(lambda: not any((volume.store.root / layout.TRASH).iterdir()))
    assert files_of(theirs(volume)) == FILES, "what nobody listed is gone"
    check_offers(volume.store.root)


async def test_while_it_is_used_it_is_served_and_not_touched(volume: Volume) -> None:
    before = snapshot(leave(volume.store.root, LEFT))
    in_use(volume)
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: KEY in volume.reconciler._known.staged)
        await volume.turn(5)
        assert volume.phase(URI) is Phase.ADOPTING
        assert word(volume) == "ModelDownloaded"
        assert volume.store.manifest(KEY) is None
        assert snapshot(theirs(volume)) == before, "names, inodes, modes and bytes"
        assert "taken over when no pod uses it" in await volume.why(URI)
        assert volume.reconciler.present() == {KEY}, "whoever mounts the whole cache may read it"
        volume.users = lambda: frozenset()
        await volume.later(60)
        await volume.reach(URI, Phase.READY)
    assert located(volume) == []
    assert mode_of(theirs(volume) / "config.json") == 0o444


async def test_without_knowing_who_uses_it_it_stays(volume: Volume) -> None:
    leave(volume.store.root, LEFT)
    volume.users = lambda: None
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: KEY in volume.reconciler._known.staged)
        await volume.turn(3)
        assert volume.phase(URI) is Phase.ADOPTING
    assert files_of(theirs(volume)) == LEFT


async def test_it_is_served_from_the_moment_that_it_is_listed(volume: Volume) -> None:
    leave(volume.store.root, LEFT)
    async with volume.turning(), _hashing_held(volume):
        with volume.source.held("list"):
            volume.want(URI)
            await volume.until(lambda: volume.phase(URI) is Phase.RESOLVING)
            status = model_status(volume.reconciler.facts()[KEY], path="")
            assert status is not None
            assert status.foreign == "unknown"
        await volume.reach(URI, Phase.ADOPTING)


async def test_nobody_wants_it_so_nobody_touches_it(volume: Volume) -> None:
    leave(volume.store.root, LEFT)
    async with volume.turning():
        await volume.turn(3)
        assert volume.phase(URI) is None
    assert files_of(theirs(volume)) == LEFT
    assert volume.source.calls == []


async def test_a_want_that_goes_leaves_it_where_it_was(volume: Volume) -> None:
    leave(volume.store.root, LEFT)
    in_use(volume)
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: KEY in volume.reconciler._known.staged)
        volume.want()
        volume.users = lambda: frozenset()
        await volume.turn(3)
        assert volume.phase(URI) is None
        assert files_of(theirs(volume)) == LEFT
        assert volume.store.ingests() == {}


# -- what differs -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "cut", "symlink"])
async def test_what_is_missing_is_fetched_beside_it(volume: Volume, how: str) -> None:
    path = leave(volume.store.root, LEFT) / "weights/b.bin"
    path.unlink()
    if how == "cut":
        path.write_bytes(FILES["weights/b.bin"][:1000])
    elif how == "symlink":
        path.symlink_to("a.bin")
    before = snapshot(theirs(volume))
    in_use(volume)
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: KEY in volume.reconciler._known.staged)
        await volume.turn()
        assert located(volume) == ["weights/b.bin"]
        assert snapshot(theirs(volume)) == before
        assert Phase.ADOPTING not in volume.witness.seen[KEY]
        assert word(volume) != "ModelDownloaded"
        volume.users = lambda: frozenset()
        await volume.later(60)
        await volume.reach(URI, Phase.READY)
    assert files_of(theirs(volume)) == FILES
    check_offers(volume.store.root)


async def test_a_wrong_byte_is_found_and_takes_the_word_back(volume: Volume) -> None:
    wrong = bytearray(FILES["weights/a.bin"])
    wrong[77] ^= 1
    leave(volume.store.root, {**LEFT, "weights/a.bin": bytes(wrong)})
    in_use(volume)
    async with volume.turning():
        with volume.source.held("locate"):
            async with _hashing_held(volume):
                volume.want(URI)
                await volume.reach(URI, Phase.ADOPTING)
                assert word(volume) == "ModelDownloaded"
            await volume.until(lambda: volume.phase(URI) is not Phase.ADOPTING)
            assert word(volume) != "ModelDownloaded"
            await volume.until(lambda: word(volume) == "ModelDownloading")
        await volume.until(lambda: KEY in volume.reconciler._known.staged)
        assert located(volume) == ["weights/a.bin"]
        assert word(volume) != "ModelDownloaded"
        assert (theirs(volume) / "weights/a.bin").read_bytes() == wrong
        volume.users = lambda: frozenset()
        await volume.later(60)
        await volume.reach(URI, Phase.READY)
    assert files_of(theirs(volume)) == FILES


async def test_what_turned_out_wrong_is_remembered_over_a_restart(tmp_path: Path) -> None:
    """By the file that was begun in its place: its size alone would be believed again."""
    first = Volume(tmp_path)
    first.source.add(URI, FILES)
    in_use(first)
    leave(first.store.root, {**LEFT, "weights/a.bin": bytes(len(FILES["weights/a.bin"]))})
    async with first.turning():
        first.want(URI)
        await first.until(lambda: KEY in first.reconciler._known.staged)
    second = Volume(tmp_path)
    second.source = first.source
    in_use(second)
    async with second.turning():
        second.want(URI)
        await second.turn()
        assert Phase.ADOPTING not in second.witness.seen[KEY]
        assert word(second) != "ModelDownloaded"


async def test_a_restart_takes_its_word_before_any_listing(tmp_path: Path) -> None:
    """The listing was pinned in the life before."""
    first = Volume(tmp_path)
    first.source.add(URI, FILES)
    in_use(first)
    leave(first.store.root, LEFT)
    async with first.turning():
        first.want(URI)
        await first.until(lambda: KEY in first.reconciler._known.staged)
    second = Volume(tmp_path)
    second.source = first.source
    second.source.fail("list", AgentError(Reason.NETWORK, "no route"))
    second.users = lambda: frozenset()
    async with second.turning():
        second.want(URI)
        await second.reach(URI, Phase.READY)
        await second.turn()
        assert set(second.witness.seen[KEY]) == {Phase.ADOPTING, Phase.READY}
    assert located(second) == []


async def test_what_was_all_proven_is_not_taken_over_for_nobody(tmp_path: Path) -> None:
    """What an earlier life left complete is sealed at the start, whoever asked: not over this."""
    first = Volume(tmp_path)
    first.source.add(URI, FILES)
    in_use(first)
    leave(first.store.root, LEFT)
    async with first.turning():
        first.want(URI)
        await first.until(lambda: KEY in first.reconciler._known.staged)
    second = Volume(tmp_path)
    second.source = first.source
    second.users = lambda: frozenset()
    async with second.turning():
        await second.turn(4)
        assert second.phase(URI) in (None, Phase.PARTIAL)
    assert files_of(theirs(second)) == LEFT


async def test_empty_files_that_kserve_never_brings_are_no_difference(volume: Volume) -> None:
    volume.source.add(URI, {**FILES, "empty": b""})
    leave(volume.store.root, FILES)
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        assert Phase.FETCHING not in volume.witness.seen[KEY]
    assert located(volume) == ["empty"], "of which no byte is asked for"
    assert files_of(theirs(volume)) == {**FILES, "empty": b""}


async def test_without_a_promise_the_size_is_believed_and_the_manifest_says_so(
    tmp_path: Path,
) -> None:
    volume = Volume(tmp_path)
    volume.source = FakeSource(tmp_path / "silent", promise=False)
    volume.source.add(URI, FILES)
    volume.users = lambda: frozenset()
    leave(volume.store.root, LEFT)
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        sealed = volume.reconciler.sealed()[KEY]
        assert {file.promised for file in sealed.files} == {None}
    assert located(volume) == []


async def test_what_was_unpacked_of_an_archive_is_taken_over(volume: Volume) -> None:
    """The archive is fetched once, to know what is in it; the files that are there are linked."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    volume.source.add(URI, {"model.zip": made.getvalue()})
    left = {path: path.stat().st_ino for path in leave(volume.store.root, FILES).rglob("*.bin")}
    in_use(volume)
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: KEY in volume.reconciler._known.staged)
        assert {path: path.stat().st_ino for path in left} == left, "it is in use"
        volume.users = lambda: frozenset()
        await volume.later(60)
        await volume.until(lambda: KEY in volume.reconciler.sealed())
    assert files_of(theirs(volume)) == FILES
    assert {path: path.stat().st_ino for path in left} == left, "the same files"
    assert located(volume) == ["model.zip"]
    check_offers(volume.store.root)


async def test_a_file_written_after_its_proof_is_not_published(volume: Volume) -> None:
    path = leave(volume.store.root, LEFT) / "weights/a.bin"
    in_use(volume)
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: KEY in volume.reconciler._known.staged)
        path.write_bytes(bytes(len(FILES["weights/a.bin"])))
        volume.users = lambda: frozenset()
        await volume.later(60)
        await volume.later(3600)
        await volume.reach(URI, Phase.READY)
    assert files_of(theirs(volume)) == FILES
    check_offers(volume.store.root)


# -- room ---------------------------------------------------------------------------------------


async def test_it_takes_no_room_that_it_does_not_have_already(tmp_path: Path) -> None:
    volume = Volume(tmp_path, limit=sum(map(len, FILES.values())) + 10)
    volume.source.add(URI, FILES)
    volume.users = lambda: frozenset()
    volume.capacity = 230_000
    leave(volume.store.root, FILES)
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)


async def test_a_pull_of_what_is_in_use_does_not_wait_for_ever(volume: Volume) -> None:
    leave(volume.store.root, LEFT)
    in_use(volume)
    async with volume.turning():
        events = [event async for event in volume.service.pull({"uri": URI})]
        assert events[-1]["event"] == "error"
        assert events[-1]["reason"] == "Kept"
    assert files_of(theirs(volume)) == LEFT


async def test_waiting_pods_are_told_not_to_wait(volume: Volume) -> None:
    """A pod that waits uses it: whoever waited for the other would wait for ever."""
    leave(volume.store.root, LEFT)
    in_use(volume)
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.ADOPTING)
        facts = volume.reconciler.facts()
        volume.witness.progress(facts.values())
        line = (volume.store.root / layout.progress(KEY)).read_text()
        assert line.startswith("fallback ")


# -- the last moment ----------------------------------------------------------------------------


async def test_a_pod_that_comes_while_it_is_made_ready_keeps_it(volume: Volume) -> None:
    before = snapshot(leave(volume.store.root, LEFT))
    sealing = volume.store.root / layout.sealing(KEY)
    asked: list[bool] = []

    def users() -> frozenset[CacheKey]:
        asked.append(sealing.exists())
        return frozenset({KEY}) if any(asked) else frozenset()

    volume.users = users
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: any(asked))
        await volume.turn()
        assert volume.phase(URI) is Phase.ADOPTING
        assert not sealing.exists()
        after = snapshot(theirs(volume))
        assert {p: (i, b) for p, (i, _, b) in after.items()} == {
            p: (i, b) for p, (i, _, b) in before.items()
        }
        volume.users = lambda: frozenset()
        await volume.later(60)
        await volume.reach(URI, Phase.READY)


async def test_what_is_written_after_it_was_made_ready_does_not_take_the_place(
    volume: Volume,
) -> None:
    """By a pod that mounts it and has ended since; with a time that no later look would doubt."""
    path = leave(volume.store.root, LEFT) / "weights/a.bin"
    sealing = volume.store.root / layout.sealing(KEY)
    written: list[Path] = []

    def users() -> frozenset[CacheKey]:
        if sealing.exists() and not written:
            written.append(path)
            path.chmod(0o644)
            path.write_bytes(bytes(len(FILES["weights/a.bin"])))
            os.utime(path, (1_650_000_000, 1_650_000_000))
        return frozenset()

    volume.users = users
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: written)
        await volume.turn()
        assert volume.store.manifest(KEY) is None
        assert not sealing.exists()
        await volume.later(60)
        await volume.later(3600)
        await volume.reach(URI, Phase.READY)
    assert files_of(theirs(volume)) == FILES
    check_offers(volume.store.root)


async def test_a_pod_that_the_watch_has_not_heard_of_finds_not_even_a_mode_changed(
    volume: Volume,
) -> None:
    before = snapshot(leave(volume.store.root, LEFT))
    asked: list[None] = []

    async def by_quorum() -> frozenset[CacheKey]:
        asked.append(None)
        return frozenset({KEY})

    volume.reconciler._removal._in_use_now = by_quorum
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: asked)
        await volume.turn()
        assert snapshot(theirs(volume)) == before
        assert len(asked) == 1, "nor is it asked again at once"


async def test_one_that_vanishes_before_the_exchange_is_replaced_all_the_same(
    volume: Volume,
) -> None:
    directory = leave(volume.store.root, LEFT)
    in_use(volume)
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: KEY in volume.reconciler._known.staged)
        directory.rename(volume.store.root / "moved-away")
        await volume.turn()
        await volume.reach(URI, Phase.READY)
    assert files_of(theirs(volume)) == FILES
    check_offers(volume.store.root)


# -- another user's -----------------------------------------------------------------------------


@pytest.fixture
def stranger() -> int:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED, only root can leave a directory as another user")
    return 12345


async def test_what_is_another_users_is_served_and_the_way_out_is_said(
    volume: Volume, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(volume.store.root, LEFT)
    monkeypatch.setattr("agent.catalog.os.geteuid", lambda: stranger)
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: volume.reconciler.facts()[KEY].block)
        await volume.turn()
        status = model_status(volume.reconciler.facts()[KEY], path="")
        assert status is not None
        assert (status.state, status.model_status) == ("Adopting", "ModelDownloaded")
        assert status.reason == "ForeignDirectory"
        assert "prepare --adopt" in status.message
        assert located(volume) == []
        # Its files change hands, and the next look goes on by itself.
        monkeypatch.setattr("agent.catalog.os.geteuid", lambda: 0)
        await volume.turn()
        await volume.reach(URI, Phase.READY)
    assert located(volume) == []


async def test_no_room_is_made_for_what_could_not_take_its_place(
    volume: Volume, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(volume.store.root, {"config.json": b"{}"})
    monkeypatch.setattr("agent.catalog.os.geteuid", lambda: stranger)
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: volume.reconciler.facts()[KEY].block)
        await volume.turn()
        assert volume.phase(URI) is Phase.PENDING
        assert word(volume) == "ModelDownloadPending"
    assert located(volume) == []


def test_a_store_of_one_user_says_whose_another_is(tmp_path: Path, stranger: int) -> None:
    store = Store(tmp_path)
    store.open()
    path = leave(tmp_path, LEFT)
    assert store.foreign(KEY) is not None
    os.chown(path / "weights/a.bin", stranger, stranger)
    found = store.foreign(KEY)
    assert found is not None
    assert found.obstacle == "", "root takes over anybody's"
    store.close()
