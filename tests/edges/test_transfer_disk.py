"""What the engine leaves on disk: resume, cancellation, full disks, kills; and what it costs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.errors import AgentError, Reason
from agent.files import version_of
from agent.model import Digest, PathLocator
from agent.transfer import Engine
from agent.transfer.connections import Cancellation, Cancelled
from agent.transfer.local import LocalBody
from agent.transfer.pump import DEPTH, Buffers, Crowd, Intake, pump
from agent.transfer.sink import BUFFER_BYTES, Sink
from agent.transfer.throttle import Throttle
from tests.edges.downloads import (
    REPO,
    Download,
    an_engine,
    git_sha1,
    noise,
    ranges,
    sha256,
    url_of,
)
from tests.fakes.hub import Dribble, Fault, Hub, Slow, Stall, Truncate
from tests.fakes.wire import Wire, reply

SIZE = 5 * BUFFER_BYTES + 777
DATA = noise(SIZE)
CUT = 2 * BUFFER_BYTES + 1000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        hub.add(REPO, {"model.bin": DATA})
        yield hub


@pytest.fixture
def engine() -> Iterator[Engine]:
    with an_engine() as engine:
        yield engine


def _download(hub: Hub, tmp_path: Path) -> Download:
    return Download.of(url_of(hub, "model.bin"), tmp_path / "partial", DATA)


# --- resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("promise", [sha256, git_sha1], ids=["sha256", "git-sha1"])
@pytest.mark.parametrize("have", [1, BUFFER_BYTES, CUT, SIZE - 1])
async def test_only_the_rest_is_asked_for(
    hub: Hub, engine: Engine, tmp_path: Path, have: int, promise: object
) -> None:
    assert callable(promise)
    download = _download(hub, tmp_path)
    download.promised = promise(DATA)
    download.path.write_bytes(DATA[:have])
    assert await download.run(engine) == sha256(DATA).hex
    assert download.path.read_bytes() == DATA
    assert ranges(hub) == [f"bytes={have}-"]
    assert download.received == hub.bytes_sent() == SIZE - have


async def test_nothing_is_asked_for_what_is_whole(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    download = _download(hub, tmp_path)
    for left in (DATA, DATA + b"and more"):
        download.path.write_bytes(left)
        await download.run(engine)
        assert download.path.read_bytes() == DATA
        download.path.chmod(0o600)
    assert hub.requests == []


@pytest.mark.parametrize("wrong", [b"x" * CUT, DATA[1 : SIZE + 1] + b"!", b"y" * (SIZE + 9)])
async def test_a_wrong_beginning_is_found_out(
    hub: Hub, engine: Engine, tmp_path: Path, wrong: bytes
) -> None:
    download = _download(hub, tmp_path)
    download.path.write_bytes(wrong)
    await download.run(engine)
    assert download.path.read_bytes() == DATA
    assert download.reasons == [Reason.DIGEST_MISMATCH]
    assert ranges(hub)[-1] is None


async def test_what_nothing_proves_is_fetched_again(
    hub: Hub, engine: Engine, tmp_path: Path
) -> None:
    """After a power cut a file may be as long as it was and hold zeros."""
    download = _download(hub, tmp_path)
    download.promised = None
    download.path.write_bytes(bytes(CUT))
    await download.run(engine)
    assert download.path.read_bytes() == DATA
    assert ranges(hub) == [None]


async def test_but_within_one_life_it_is_resumed(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    download = _download(hub, tmp_path)
    download.promised = None
    hub.fault("*.bin", Truncate(CUT), times=1)
    await download.run(engine)
    assert download.path.read_bytes() == DATA
    assert ranges(hub) == [None, f"bytes={CUT}-"]


_NOBODY = """
import asyncio, encodings.idna, os, sys
from contextlib import closing
from pathlib import Path
from tests.edges.downloads import Download, an_engine

os.setgid(65534), os.setuid(65534)  # only now: who knows where Python is installed

async def main():
    path, url, data = Path(sys.argv[1]), sys.argv[2], sys.argv[3].encode()
    with an_engine() as engine:
        await Download.of(url, path, data).run(engine)
        await Download.of(url, path, data).run(engine)
asyncio.run(main())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_what_is_proven_and_read_only_can_be_found_again(tmp_path: Path) -> None:
    """An agent that is not root, and was killed between a proof and the file's new name."""
    with Wire(lambda head: reply(200, b"hello")) as server:
        home = Path(f"/tmp/localmodel-nobody-{os.getpid()}")
        home.mkdir(mode=0o700)
        os.chown(home, 65534, 65534)
        try:
            subprocess.run(
                [sys.executable, "-c", _NOBODY, home / "partial", server.url("/"), "hello"],
                check=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                timeout=60,
            )
        finally:
            (home / "partial").unlink(missing_ok=True)
            home.rmdir()
        assert len(server.heads) == 1


async def test_a_partial_that_is_a_link_is_not_followed(
    hub: Hub, engine: Engine, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    download = _download(hub, tmp_path)
    download.path.symlink_to(victim)
    with pytest.raises(AssertionError):  # of what it reports: it is the victim that is measured
        await download.run(engine)
    assert victim.read_bytes() == b"precious"


# --- what is there already ----------------------------------------------------------------------


async def test_hash(engine: Engine, tmp_path: Path) -> None:
    path, right = tmp_path / "file", sha256(DATA)
    path.write_bytes(DATA)
    assert await engine.hash(path, size=SIZE, promised=right) == right.hex
    assert await engine.hash(path, size=SIZE, promised=git_sha1(DATA)) == right.hex
    assert await engine.hash(path, size=SIZE, promised=None) == right.hex
    assert await engine.hash(path, size=SIZE, promised=sha256(b"")) is None
    assert await engine.hash(path, size=SIZE - 1, promised=None) is None
    assert await engine.hash(path, size=SIZE + 1, promised=None) is None


async def test_hash_of_what_is_no_file(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(__file__)
    os.mkfifo(tmp_path / "fifo")
    for name in ("absent", "directory", "link", "fifo"):
        assert await engine.hash(tmp_path / name, size=0, promised=None) is None


# --- files of this machine ----------------------------------------------------------------------


def _copy(source: Path, tmp_path: Path, *, size: int, version: str | None) -> Download:
    locator = PathLocator(path=str(source), version=version)
    return Download("", tmp_path / "partial", size, promised=None, where=lambda: locator)


async def test_a_local_file(engine: Engine, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for data in (b"", b"x", DATA):
        source.write_bytes(data)
        version = version_of(source.stat())
        await _copy(source, tmp_path, size=len(data), version=version).run(engine)
        assert (tmp_path / "partial").read_bytes() == data


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(DATA[:-1]),
        lambda path: path.write_bytes(DATA + b"!"),
        lambda path: (path.unlink(), path.write_bytes(DATA)),
        lambda path: os.utime(path, (1, 1)),
        lambda path: path.unlink(),
        lambda path: (path.rename(f"{path}.old"), path.mkdir()),
    ],
    ids=["shorter", "longer", "another", "touched", "gone", "directory"],
)
async def test_a_local_file_that_changed(
    engine: Engine, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    version = version_of(source.stat())
    change(source)
    error = await _copy(source, tmp_path, size=SIZE, version=version).fail(engine)
    assert error.reason in (Reason.SOURCE_CHANGED, Reason.UNSAFE_PATH)


@pytest.mark.parametrize("added", [b"", b"!"], ids=["overwritten", "longer"])
async def test_a_local_file_that_changes_while_it_is_read(tmp_path: Path, added: bytes) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    download = _copy(source, tmp_path, size=SIZE, version=version_of(source.stat()))
    with an_engine(bytes_per_second=2 * SIZE) as engine:
        task = asyncio.create_task(download.fail(engine))
        while download.done < BUFFER_BYTES:
            await asyncio.sleep(0.01)
        with source.open("r+b") as file:
            file.seek(SIZE - 1)
            file.write(b"?" + added)
        assert (await task).reason is Reason.SOURCE_CHANGED


async def test_what_is_no_file_does_not_hang(engine: Engine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name in ("fifo", "socket"):
            download = _copy(tmp_path / name, tmp_path, size=10, version=None)
            assert (await download.fail(engine)).reason is Reason.UNSAFE_PATH


# --- cancellation -------------------------------------------------------------------------------


def _transfer_threads() -> list[threading.Thread]:
    """Those that do not end in a moment: a thread that has just reported is still there."""
    names = {"transfer", "write", "hash"}
    found = [thread for thread in threading.enumerate() if thread.name in names]
    for thread in found:
        thread.join(timeout=3)
    return [thread for thread in found if thread.is_alive()]


async def _cancelled(task: asyncio.Task[str]) -> float:
    begun = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return time.monotonic() - begun


@pytest.mark.parametrize("after", [CUT, 10], ids=["ring", "straight"])
@pytest.mark.parametrize("name", ["stall", "dribble", "slow"])
async def test_cancelled_in_the_middle(hub: Hub, tmp_path: Path, after: int, name: str) -> None:
    data = DATA if after == CUT else DATA[:1000]
    hub.add(REPO, {"model.bin": data})
    faults: dict[str, Fault] = {
        "stall": Stall(after),
        "dribble": Dribble(bytes_per_second=100),
        "slow": Slow(len(data) // 5),
    }
    hub.fault("*.bin", faults[name])
    download = Download.of(url_of(hub, "model.bin"), tmp_path / "partial", data)
    with an_engine(stall_seconds=60) as engine:
        task = asyncio.create_task(download.run(engine))
        while download.received < min(after, 20):
            await asyncio.sleep(0.01)
        assert await _cancelled(task) < 3
        kept = download.path.read_bytes()
        assert data.startswith(kept)
        assert len(kept) == download.done
        assert _transfer_threads() == []
        hub.clear_faults()
        hub.clear()
        await download.run(engine)
        assert download.path.read_bytes() == data
        assert hub.bytes_sent() == len(data) - len(kept)


async def test_cancelled_while_the_cap_makes_it_wait(hub: Hub, tmp_path: Path) -> None:
    with an_engine(bytes_per_second=1000) as engine:
        download = _download(hub, tmp_path)
        task = asyncio.create_task(download.run(engine))
        while not download.received:
            await asyncio.sleep(0.01)
        assert await _cancelled(task) < 3


async def test_cancelled_before_an_answer(tmp_path: Path) -> None:
    with Wire(lambda head: None) as server, an_engine(stall_seconds=60) as engine:
        download = Download.of(server.url("/"), tmp_path / "partial", DATA)
        task = asyncio.create_task(download.run(engine))
        while not server.heads:
            await asyncio.sleep(0.01)
        assert await _cancelled(task) < 3
        assert _transfer_threads() == []


async def test_cancelled_between_tries(hub: Hub, tmp_path: Path) -> None:
    hub.stop()
    with an_engine(dice=lambda: 1000.0) as engine:
        download = _download(hub, tmp_path)
        task = asyncio.create_task(download.run(engine))
        while not download.retries:
            await asyncio.sleep(0.01)
        assert await _cancelled(task) < 3


async def test_cancelled_while_it_waits_for_its_turn(hub: Hub, tmp_path: Path) -> None:
    with an_engine(connections=1, stall_seconds=60) as engine:
        hub.fault("*.bin", Stall(1))
        one, two = _download(hub, tmp_path), _download(hub, tmp_path)
        two.path = tmp_path / "other"
        tasks = [asyncio.create_task(d.run(engine)) for d in (one, two)]
        while not one.received:
            await asyncio.sleep(0.01)
        assert await _cancelled(tasks[1]) < 3
        assert await _cancelled(tasks[0]) < 3
        assert two.located == 0


def test_a_closed_sink_is_closed_to_its_threads(tmp_path: Path) -> None:
    """A thread stuck in the kernel may come back after its descriptor's number is another's."""
    sink = Sink(tmp_path / "partial", size=10, promised=None)
    with sink._using("hold") as file:
        sink.close()
        os.fstat(file)  # still open: somebody is in there
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    for late in (lambda: sink.write(memoryview(b"x")), sink.restart, sink.prove):
        with pytest.raises(Cancelled):
            late()
    assert (tmp_path / "partial").read_bytes() == b""


# --- disks that fail ----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.getuid() != 0:
        pytest.skip("mounts a file system")
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


async def test_a_full_disk(hub: Hub, engine: Engine, small_disk: Path) -> None:
    data = noise(9 << 20)
    hub.add(REPO, {"model.bin": data})
    download = Download.of(url_of(hub, "model.bin"), small_disk / "partial", data)
    error = await download.fail(engine)
    assert error.reason is Reason.DISK_FULL
    assert download.retries == []
    kept = download.path.read_bytes()
    assert kept == data[: len(kept)]
    assert 3 << 20 <= len(kept) <= 4 << 20
    assert (await download.fail(engine)).reason is Reason.DISK_FULL, "still"

    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    hub.clear()
    await download.run(engine)
    assert download.path.read_bytes() == data
    assert hub.bytes_sent() <= len(data) - len(kept)


async def test_a_full_disk_and_a_small_file(hub: Hub, engine: Engine, small_disk: Path) -> None:
    data = noise(BUFFER_BYTES)
    hub.add(REPO, {"model.bin": data})
    filler = small_disk / "filler"
    filler.write_bytes(bytes((4 << 20) - BUFFER_BYTES // 2))
    download = Download.of(url_of(hub, "model.bin"), small_disk / "partial", data)
    assert (await download.fail(engine)).reason is Reason.DISK_FULL
    filler.unlink()
    await download.run(engine)
    assert download.path.read_bytes() == data


class _Scripted:
    """A body that comes as told, and ends in an error."""

    where = "here"

    def __init__(self, data: bytes, error: Exception) -> None:
        self._data = data
        self._error = error

    def read_into(self, view: memoryview) -> int:
        if not self._data:
            raise self._error
        count = min(len(view), len(self._data))
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


class _Torn(Sink):
    """Writes a part of the third buffer, and fails; goes well from then on."""

    fails: Exception | None
    writes = 0

    def write(self, data: memoryview) -> None:
        self.writes += 1
        if self.writes == 3 and self.fails is not None:
            super().write(data[:100])
            raise self.fails
        super().write(data)


@pytest.mark.parametrize(
    "failure",
    [AgentError(Reason.DISK_ERROR, "torn"), MemoryError()],
    ids=["disk", "anything"],
)
@pytest.mark.parametrize("more", [3, 40], ids=["both at once", "the disk first"])
def test_a_disk_and_a_network_that_fail_together(
    tmp_path: Path, failure: Exception, more: int
) -> None:
    """The file must not keep what was not hashed: what comes next would land behind it, and the
    digest, taken from the buffers, would be right all the same.
    """
    sink = _Torn(tmp_path / "partial", size=100 * BUFFER_BYTES, promised=None)
    sink.fails = failure
    data = noise(more * BUFFER_BYTES)
    body = _Scripted(data, AgentError(Reason.NETWORK, "torn too"))
    intake = Intake(body, throttle=Throttle(None), stall_seconds=9, cancellation=Cancellation())
    try:
        with pytest.raises((AgentError, MemoryError)):
            pump(intake, sink, Buffers(), roomy=True)
        assert sink.offset == 2 * BUFFER_BYTES
        assert sink.path.read_bytes() == data[: sink.offset]
    finally:
        sink.close()
    assert _transfer_threads() == []


def test_a_disk_that_lies(tmp_path: Path) -> None:
    """The digest is of what was received; that it is also what is there, its length says."""
    sink = Sink(tmp_path / "partial", size=3, promised=None)
    try:
        sink.hash(memoryview(b"abc"))
        with pytest.raises(AgentError) as caught:
            sink.prove()
    finally:
        sink.close()
    assert caught.value.reason is Reason.SIZE_MISMATCH


# --- what it costs ------------------------------------------------------------------------------


async def test_buffers_are_bounded(tmp_path: Path) -> None:
    files = {f"part-{n:02}.bin": noise(BUFFER_BYTES * 2 + n, seed=n) for n in range(40)}
    with Hub(tmp_path / "hub") as hub, an_engine(connections=3) as engine:
        hub.add(REPO, dict(files))
        hub.fault("*.bin", Truncate(BUFFER_BYTES + 1), times=4)
        await asyncio.gather(
            *(
                Download.of(url_of(hub, name), tmp_path / name, data).run(engine)
                for name, data in files.items()
            )
        )
        held = engine._buffers._idle
        assert 0 < len(held) <= 3 * DEPTH
        assert len({id(buffer) for buffer in held}) == len(held)


def test_throttle_without_a_cap() -> None:
    throttle = Throttle(None)
    assert throttle.step is None
    assert throttle.take(1 << 40) == 0


def test_throttle_accounts_for_everybody() -> None:
    now = 100.0
    throttle = Throttle(1000, clock=lambda: now)
    assert throttle.step == 100
    assert throttle.take(500) == pytest.approx(0.5)
    assert throttle.take(500) == pytest.approx(1.0), "the next one waits for the first too"
    now = 100.6
    assert throttle.take(100) == pytest.approx(0.5)
    now = 200.0
    assert throttle.take(100) == pytest.approx(0.1), "what was not used is not saved up"
    assert throttle.take(0) == pytest.approx(0.1)


def test_throttle_of_next_to_nothing() -> None:
    assert Throttle(1).step == 1


async def test_the_cap_is_for_all_together(tmp_path: Path) -> None:
    files = {f"part-{n}.bin": noise(200_000, seed=n) for n in range(4)}
    with (
        Hub(tmp_path / "hub") as hub,
        an_engine(bytes_per_second=800_000, stall_seconds=0.2) as engine,
    ):
        hub.add(REPO, dict(files))
        begun = time.monotonic()
        downloads = [
            Download.of(url_of(hub, name), tmp_path / name, data) for name, data in files.items()
        ]
        await asyncio.gather(*(download.run(engine) for download in downloads))
        assert 0.7 < time.monotonic() - begun < 20
        assert not any(download.retries for download in downloads), "our own cap is no stall"


# --- kill -9 ------------------------------------------------------------------------------------

_FETCH = """
import asyncio, sys
from contextlib import closing
from pathlib import Path
from agent.model import Digest, HttpLocator
from agent.transfer import Engine, FileJob

async def main(url, path, size, digest):
    async def locate():
        return HttpLocator(url=url)
    job = FileJob(path=Path(path), size=int(size), promised=Digest("sha256", digest),
                  locate=locate, on_bytes=lambda done, received: None, on_retry=print)
    print(await Engine().fetch(job))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path: Path) -> None:
    """What was on its way when the process died is fetched again, and little more."""
    size = 200 << 20
    big, digest = tmp_path / "big", hashlib.sha256()
    block = noise(1 << 20)
    with big.open("wb") as file:
        for n in range(size >> 20):  # no two blocks alike: a shift must show
            piece = n.to_bytes(8, "big") + block[8:]
            digest.update(piece)
            file.write(piece)
    with Hub(tmp_path / "hub") as hub:
        hub.add(REPO, {"model.bin": big})
        for moment in range(5):
            hub.clear()
            partial = tmp_path / f"partial-{moment}"
            command = [sys.executable, "-c", _FETCH, url_of(hub, "model.bin"), str(partial)]
            command += [str(size), digest.hexdigest()]
            stop_at = random.uniform(0.05, 0.95) * size
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                while hub.bytes_sent() < stop_at and process.poll() is None:
                    time.sleep(0.002)
                process.send_signal(signal.SIGKILL)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
            assert hub.bytes_sent() <= size + (64 << 20)
            with partial.open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == digest.hexdigest()
            partial.unlink()


def test_only_bodies_with_cores_to_spare_get_threads_of_their_own() -> None:
    crowd = Crowd(cores=4)
    with crowd.join() as first, crowd.join() as second, crowd.join() as third:
        assert (first, second, third) == (True, True, False)
    with crowd.join() as again:
        assert again
    with Crowd(cores=1).join() as alone:
        assert not alone


@pytest.mark.parametrize("roomy", [True, False])
def test_both_ways_through_the_pump_give_the_same_file(tmp_path: Path, roomy: bool) -> None:
    data = random.Random(7).randbytes(5 * BUFFER_BYTES + 3)
    (tmp_path / "source").write_bytes(data)
    promised = Digest("sha256", hashlib.sha256(data).hexdigest())
    sink = Sink(tmp_path / "file", size=len(data), promised=promised)
    with closing(LocalBody(PathLocator(path=str(tmp_path / "source")), start=0)) as body:
        intake = Intake(
            body, throttle=Throttle(None), stall_seconds=30.0, cancellation=Cancellation()
        )
        pump(intake, sink, Buffers(), roomy=roomy)
    assert sink.prove() == promised.hex
    sink.close()
    assert (tmp_path / "file").read_bytes() == data
