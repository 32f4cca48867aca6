"""A model that comes in one archive: published as what is in it, like any other model."""

import io
import random
import signal
import tarfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import pytest

from agent import layout, manifest
from agent.errors import AgentError, Reason
from agent.model import (
    Digest,
    Ingest,
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
from agent.transfer import archives
from agent.wishes import Desired
from tests.edges.volume import check_offers, sha256
from tests.fakes.s3 import Answer
from tests.fakes.s3 import Store as S3Server
from tests.machine import Machine, files_of
from tests.scenarios.disks import MIB, tmpfs
from tests.scenarios.volume import Volume

URI = "fake://packed"
KEY = cache_key(URI)
WEIGHTS = random.Random(1).randbytes(120_000)
FILES: Mapping[str, bytes] = {
    "config.json": b"{}",
    "empty": b"",
    "top/weights.bin": WEIGHTS,
    "top/deep/vocab.txt": random.Random(2).randbytes(40_000),
}


def tarball(files: Mapping[str, bytes], *, mode: str = "w:gz") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


PACKED = tarball(FILES)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    made = Volume(tmp_path)
    made.users = frozenset
    made.source.add(URI, {"model.tar.gz": PACKED})
    return made


def _published(volume: Volume, uri: str = URI) -> dict[str, bytes]:
    check_offers(volume.store.root)
    assert not (volume.store.root / layout.ingest(cache_key(uri))).exists()
    return files_of(volume.store.model(cache_key(uri)))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.tar.gz", PACKED),
        ("MODEL.TGZ", PACKED),
        ("model.tar", tarball(FILES, mode="w")),
        ("model.tar", PACKED),  # whatever its name says, as tarfile does
        ("model.zip", zipped(FILES)),
    ],
)
async def test_it_is_published_as_what_is_in_it(volume: Volume, name: str, data: bytes) -> None:
    volume.source.add(URI, {name: data})
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        assert _published(volume) == FILES
        sealed = volume.store.manifest(KEY)
        assert sealed is not None
        assert sealed.archive == manifest.SealedArchive(
            path=name, size=len(data), sha256=sha256(data)
        )
        assert manifest.parse(manifest.render(sealed)) == sealed
        assert volume.source.calls == [("list", URI), ("locate", name)]


async def test_without_a_promise_it_comes_once_all_the_same(volume: Volume) -> None:
    volume.source._promise = False
    volume.source.add(URI, {"model.tar.gz": PACKED})
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        assert _published(volume) == FILES
        assert volume.source.calls == [("list", URI), ("locate", "model.tar.gz")]


async def test_an_archive_among_others_stays_as_it_is(volume: Volume) -> None:
    volume.source.add(URI, {"model.tar.gz": PACKED, "README.md": b"#"})
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        assert _published(volume) == {"model.tar.gz": PACKED, "README.md": b"#"}


async def test_patterns_select_among_what_is_in_it(volume: Volume) -> None:
    ref = ModelRef(uri=URI, include=("top/",), exclude=("*.txt",))
    async with volume.turning():
        _desire(volume, Want(ref=ref))
        await volume.reach(URI, Phase.READY)
        assert _published(volume) == {"top/weights.bin": WEIGHTS}
        _desire(volume, Want(ref=ModelRef(uri=URI, include=("*.none",))))
        await volume.until(lambda: volume.reconciler.failure(KEY))
        failure = volume.reconciler.failure(KEY)
        assert failure is not None
        assert failure.reason is Reason.EMPTY_LISTING


def _desire(volume: Volume, want: Want) -> None:
    volume.reconciler.desire(Desired(wants={want.key: want}, names={}))


# -- room -----------------------------------------------------------------------------------------


async def test_room_is_found_for_what_is_in_it_before_it_is_unpacked(volume: Volume) -> None:
    """A bomb: 30 KiB that hold 30 MB, on a disk of one. Nothing of it is ever written."""
    bomb = tarball({"zeros.bin": bytes(30_000_000)})
    volume.capacity = 40_000_000
    volume.source.add(URI, {"model.tar.gz": bomb})
    volume.source.add("fake://old", {"weights.bin": bytes(20_000_000)})
    async with volume.turning():
        volume.want("fake://old")
        await volume.reach("fake://old", Phase.READY)
        volume.want("fake://old", URI)
        await volume.until(lambda: volume.reconciler.facts()[KEY].block)
        block = volume.reconciler.facts()[KEY].block
        assert block is not None
        assert block.why == "InsufficientCapacity"
        assert "needs 29" in block.message or "needs 28" in block.message
        assert not any(volume.store.tree(KEY).rglob("*.bin"))
        assert not any(volume.store.partial(KEY).rglob("*.bin"))
        # What nobody wants any more makes room for exactly that.
        volume.want(URI)
        await volume.later(3600)
        await volume.reach(URI, Phase.READY)
        assert volume.phase("fake://old") is None
        assert (volume.store.model(KEY) / "zeros.bin").stat().st_size == 30_000_000


async def test_an_archive_needs_room_beside_what_is_in_it(volume: Volume) -> None:
    packed = tarball({"weights.bin": random.Random(4).randbytes(300_000)})
    volume.source.add(URI, {"model.tar.gz": packed})
    volume.capacity = 2 * len(packed) - 5000
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: volume.reconciler.facts()[KEY].block)
        block = volume.reconciler.facts()[KEY].block
        assert block is not None
        assert block.why == "LargerThanVolume"
        assert ("locate", "model.tar.gz") not in volume.source.calls, "refused at once"


def _ingest(store: Store) -> Ingest:
    return store.ingests()[KEY]


def test_what_is_still_to_come_is_counted(tmp_path: Path) -> None:
    """The archive, then what is in it, then nothing: from what lies on the disk alone."""
    store = Store(tmp_path)
    store.open()
    archive = RemoteFile(path="m.tar", size=1000, origin="", digest=Digest("sha256", "0" * 64))
    file = RemoteFile(path="a", size=700, origin="a", digest=Digest("sha256", "1" * 64))
    listing = Listing(ref=ModelRef(uri=URI), revision="r", files=(), archive=archive)
    store.begin(listing)
    assert (_ingest(store).total, _ingest(store).done) == (2000, 0)
    store.archive(KEY).write_bytes(bytes(1000))
    assert (_ingest(store).total, _ingest(store).done) == (2000, 1000)
    store.begin(Listing(ref=listing.ref, revision="r", files=(file,), archive=archive))
    assert (_ingest(store).total, _ingest(store).done) == (1700, 1000)
    (store.tree(KEY) / "a").write_bytes(bytes(700))
    assert (_ingest(store).total, _ingest(store).remaining) == (700, 0)
    store.drop_archive(KEY)
    assert (_ingest(store).total, _ingest(store).remaining) == (700, 0)
    (store.tree(KEY) / "a").unlink()
    assert _ingest(store).remaining == 1700
    store.close()


@pytest.mark.parametrize("name", ["model.tar.gz", "model.zip"])
async def test_a_disk_that_fills_while_it_is_unpacked(tmp_path: Path, name: str) -> None:
    files = {f"{n}.bin": random.Random(n).randbytes(MIB) for n in range(4)}
    packed = zipped(files) if name.endswith("zip") else tarball(files)
    with tmpfs(tmp_path / "disk", 10 * MIB) as mount:
        volume = Volume(tmp_path, store=Store(mount / "cache"))
        volume.capacity = 100 * MIB  # somebody else fills it: nobody could have known
        volume.source.add(URI, {name: packed})
        hog = mount / "hog"
        real = archives.unpack

        def filled(*arguments: object, **named: object) -> None:
            hog.write_bytes(bytes(4 * MIB))
            real(*arguments, **named)  # type: ignore[arg-type]

        async with volume.turning():
            with patch.object(archives, "unpack", filled):
                volume.want(URI)
                await volume.until(lambda: volume.reconciler.failure(KEY))
            failure = volume.reconciler.failure(KEY)
            assert failure is not None
            assert failure.reason is Reason.DISK_FULL
            assert volume.store.manifest(KEY) is None
            hog.unlink()
            await volume.later(700)
            await volume.reach(URI, Phase.READY)
            assert _published(volume) == files
            assert volume.source.calls.count(("locate", name)) == 1, "the archive was kept"


# -- same bytes once, mended, refreshed -----------------------------------------------------------


async def test_bytes_that_another_model_has_are_not_written_again(volume: Volume) -> None:
    volume.source.add("fake://plain", {"shard.bin": WEIGHTS})
    async with volume.turning():
        volume.want("fake://plain")
        await volume.reach("fake://plain", Phase.READY)
        volume.want("fake://plain", URI)
        await volume.reach(URI, Phase.READY)
        assert _published(volume) == FILES
        first = volume.store.model(cache_key("fake://plain")) / "shard.bin"
        assert first.samefile(volume.store.model(KEY) / "top/weights.bin")
        assert volume.metrics.linked_bytes._value.get() == len(WEIGHTS)


async def test_no_room_is_asked_for_what_another_model_has(volume: Volume) -> None:
    volume.source.add("fake://plain", {"shard.bin": WEIGHTS})
    async with volume.turning():
        volume.want("fake://plain")
        await volume.reach("fake://plain", Phase.READY)
        want = Want(ref=ModelRef(uri=URI))
        await volume.fetcher.resolve(want)
        assert await volume.fetcher.fetch(Tally(want, stage=Stage.FETCHING)) is None
        total = sum(map(len, FILES.values()))
        assert _ingest(volume.store).remaining == total - len(WEIGHTS)


@pytest.mark.parametrize("how", ["gone", "truncated", "rotten"])
async def test_one_damaged_file_is_mended_and_the_others_stay(volume: Volume, how: str) -> None:
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        spoiled = volume.store.model(KEY) / "top/weights.bin"
        before = {name: (volume.store.model(KEY) / name).stat().st_ino for name in FILES}
        held = spoiled.open("rb")  # or its number would be given to the next file
        spoiled.chmod(0o600)
        if how == "gone":
            spoiled.unlink()
        else:
            spoiled.write_bytes(WEIGHTS[:-1] if how == "truncated" else WEIGHTS[:-1] + b"!")
        await volume.later(31)
        await volume.until(lambda: volume.source.calls.count(("locate", "model.tar.gz")) == 2)
        await volume.reach(URI, Phase.READY)
        assert _published(volume) == FILES
        after = {name: (volume.store.model(KEY) / name).stat().st_ino for name in FILES}
        held.close()
        kept = {name for name in FILES if before[name] == after[name]}
        assert kept == set(FILES) - {"top/weights.bin"}
        assert volume.source.calls.count(("list", URI)) == 1


async def test_a_mend_finds_room_for_the_archive_before_it_comes(volume: Volume) -> None:
    """Nobody could know that it is needed before its files were hashed."""
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        await volume.turn()
        volume.capacity = sum(map(len, FILES.values())) + len(PACKED) // 2
        spoiled = volume.store.model(KEY) / "top/weights.bin"
        spoiled.chmod(0o600)
        spoiled.write_bytes(WEIGHTS[:-1] + b"!")
        await volume.later(31)
        await volume.until(lambda: volume.reconciler.facts()[KEY].block)
        assert volume.reconciler.facts()[KEY].phase is Phase.PENDING
        assert volume.source.calls.count(("locate", "model.tar.gz")) == 1
        volume.capacity *= 3
        await volume.turn()
        await volume.reach(URI, Phase.READY)
        assert _published(volume) == FILES


async def test_a_refresh_that_comes_while_an_archive_is_fetched_is_not_lost(
    volume: Volume,
) -> None:
    async with volume.turning():
        volume.want(URI, refresh="1")
        await volume.reach(URI, Phase.READY)
        volume.source.add(URI, {"model.tar.gz": tarball({**FILES, "config.json": b"second"})})
        volume.source.fail("locate", AgentError(Reason.NETWORK, "no route"))
        volume.want(URI, refresh="2")
        await volume.until(lambda: volume.reconciler.failure(KEY))
        newest = {**FILES, "config.json": b"third"}
        volume.source.add(URI, {"model.tar.gz": tarball(newest)})
        volume.source.mend()
        volume.want(URI, refresh="3")

        async def is_newest() -> bool:
            await volume.later(60)
            path = volume.store.model(KEY) / "config.json"
            return path.exists() and path.read_bytes() == b"third"

        for _ in range(50):
            if await is_newest():
                break
        await volume.reach(URI, Phase.READY)
        assert files_of(volume.store.model(KEY)) == newest


async def test_a_damaged_link_of_an_archive_is_mended(volume: Volume) -> None:
    """The manifest does not say what in the archive a file was a link to."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        info = tarfile.TarInfo("blob")
        info.size = len(WEIGHTS)
        archive.addfile(info, io.BytesIO(WEIGHTS))
        info = tarfile.TarInfo("weights.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "blob"
        archive.addfile(info)
    volume.source.add(URI, {"model.tar": made.getvalue()})
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        (volume.store.model(KEY) / "weights.bin").unlink()
        await volume.later(31)
        await volume.until(lambda: volume.source.calls.count(("locate", "model.tar")) == 2)
        await volume.reach(URI, Phase.READY)
        assert _published(volume) == dict.fromkeys(("blob", "weights.bin"), WEIGHTS)


async def test_a_newer_archive_takes_the_place_of_an_older_one(volume: Volume) -> None:
    async with volume.turning():
        volume.want(URI, refresh="1")
        await volume.reach(URI, Phase.READY)
        inode = (volume.store.model(KEY) / "top/weights.bin").stat().st_ino
        newer = {**FILES, "config.json": b'{"new": true}', "more.txt": b"more"}
        del newer["empty"]
        volume.source.add(URI, {"model.tar.gz": tarball(newer)})
        volume.users = lambda: frozenset({KEY})
        volume.want(URI, refresh="2")
        await volume.until(lambda: volume.reconciler.facts()[KEY].staged)
        assert files_of(volume.store.model(KEY)) == FILES, "a pod reads it"
        assert not volume.store.archive(KEY).exists(), "it may wait for days"
        volume.users = frozenset
        await volume.later(60)
        await volume.until(lambda: not volume.reconciler.facts()[KEY].staged)
        assert _published(volume) == newer
        assert (volume.store.model(KEY) / "top/weights.bin").stat().st_ino == inode
        # The same again: nothing is fetched.
        calls = len(volume.source.calls)
        volume.want(URI, refresh="3")
        await volume.until(lambda: volume.source.calls[calls:] == [("list", URI)])
        await volume.turn()
        assert volume.source.calls[calls:] == [("list", URI)]


# -- what cannot be unpacked ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PACKED[: len(PACKED) // 2], Reason.BAD_ARCHIVE),
        (b"<html>", Reason.BAD_ARCHIVE),
        (tarball({"../../outside": b"x"}), Reason.UNSAFE_PATH),
        (tarball({"a": b"", "a/b": b""}), Reason.UNSAFE_PATH),
        (tarball({"back\\slash": b""}), Reason.UNSAFE_PATH),
        (tarball({"line\nfeed": b""}), Reason.UNSAFE_PATH),
        (tarball({}), Reason.EMPTY_LISTING),
    ],
    ids=["cut off", "no archive", "outside", "file and directory", "slash", "line feed", "empty"],
)
async def test_it_is_refused_until_a_better_one_is_there(
    volume: Volume, data: bytes, reason: Reason
) -> None:
    volume.source.add(URI, {"model.tar.gz": data})
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: volume.reconciler.failure(KEY))
        failure = volume.reconciler.failure(KEY)
        assert failure is not None
        assert failure.reason is reason
        assert volume.store.manifest(KEY) is None
        names = [path.name for path in volume.store.root.parent.iterdir()]
        assert sorted(names) == [
            "cache",
            "index.sqlite3",
            "index.sqlite3-shm",
            "index.sqlite3-wal",
            "origin",
        ]
        volume.source.add(URI, {"model.tar.gz": PACKED})
        await volume.later(7200)
        await volume.reach(URI, Phase.READY)
        assert _published(volume) == FILES


async def test_what_is_not_unpacked_says_so(volume: Volume) -> None:
    volume.source.add(URI, {"model.tar.xz": b"x"})
    async with volume.turning():
        volume.want(URI)
        await volume.until(lambda: volume.reconciler.failure(KEY))
        failure = volume.reconciler.failure(KEY)
        assert failure is not None
        assert failure.reason is Reason.UNSUPPORTED
        assert "tar.gz" in failure.message


# -- killed ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_at_any_moment(localmodel: Machine) -> None:
    """While it comes, while it is looked into, while it is unpacked, while it is sealed."""
    files = {f"d/{n}.bin": random.Random(n).randbytes(6 * MIB) for n in range(6)}
    dice, kills = random.Random(11), 0
    packed = tarball(files, mode="w")
    with S3Server() as server:
        server.put("models", {"packed/model.tar": packed})
        localmodel.environment |= server.environment
        uri, seen = "s3://models/packed/model.tar", set()
        for number in range(25):
            command = localmodel.start("pull", uri)
            time.sleep(dice.uniform(0.5, 2.0))  # the moment is the experiment
            kills += command.running()
            command.kill()
            assert command.process.returncode in (0, -signal.SIGKILL)
            localmodel.check_offers()
            ingest = localmodel.root / layout.ingest(cache_key(uri))
            seen |= {path.name for path in ingest.glob("*")}
            if cache_key(uri) in localmodel.sealed():
                assert files_of(localmodel.model(uri)) == files, number
                localmodel.inline("evict", uri)
        localmodel("pull", uri).ok()
        assert files_of(localmodel.model(uri)) == files
        assert {"archive", "tree", "partial", "listing.json"} <= seen
    assert kills > 5


def test_an_archive_is_resumed_by_ranges(localmodel: Machine) -> None:
    files = {"weights.bin": random.Random(1).randbytes(12 * MIB)}
    packed = tarball(files, mode="w")
    with S3Server() as server:
        server.put("models", {"m/model.tar": packed})
        server.fault("GET", "*/model.tar", Answer(cut=5 * MIB), times=1)
        localmodel.environment |= server.environment
        uri = "s3://models/m/model.tar"
        localmodel("pull", uri).ok()
        assert files_of(localmodel.model(uri)) == files
        asked = [seen for seen in server.seen if seen.method == "GET" and "model.tar" in seen.path]
        ranges = [seen.headers.get("range") for seen in asked]
        assert any(found and found != "bytes=0-" for found in ranges), ranges


async def test_an_archive_proves_the_credentials_of_a_cache(volume: Volume) -> None:
    """By a byte of itself: what is in it has no size yet."""
    await volume.fetcher.prove(Want(ref=ModelRef(uri=URI)))
    assert ("locate", "model.tar.gz") in volume.source.calls
