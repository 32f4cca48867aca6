"""The engine against a hub that misbehaves: every fault, once and for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agent.errors import RULES, AgentError, Reason
from agent.model import HttpLocator
from agent.transfer import Engine
from agent.transfer.sink import BUFFER_BYTES
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
from tests.fakes.hub import (
    Corrupt,
    Dribble,
    Fault,
    Hub,
    IgnoreRange,
    Long,
    PartialAs200,
    Reset,
    Short,
    Slow,
    Stall,
    Status,
    Truncate,
)
from tests.fakes.wire import Wire, reply

SIZE = 3 * BUFFER_BYTES + 12_345
DATA = noise(SIZE)
CUT = BUFFER_BYTES + 1000  # inside the second buffer

# Both origins: the hub itself, and the CDN it redirects to.
FILES = ["model.json", "model.bin"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        files: dict[str, bytes | Path] = dict.fromkeys(FILES, DATA)
        hub.add(REPO, files, lfs=lambda path, size: path.endswith(".bin"))
        yield hub


@pytest.fixture
def engine() -> Iterator[Engine]:
    with an_engine() as engine:
        yield engine


def _download(hub: Hub, tmp_path: Path, name: str) -> Download:
    promise = sha256 if name.endswith(".bin") else git_sha1
    return Download.of(url_of(hub, name), tmp_path / "partial", DATA, promised=promise(DATA))


# --- a fault that passes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("fault", "reason", "sent"),
    [
        (Corrupt(0), Reason.DIGEST_MISMATCH, 2 * SIZE),
        (Corrupt(SIZE - 1), Reason.DIGEST_MISMATCH, 2 * SIZE),
        (Truncate(CUT), Reason.NETWORK, SIZE),
        (Truncate(0), Reason.NETWORK, SIZE),
        (Stall(CUT), Reason.STALLED, SIZE),
        (Stall(0), Reason.STALLED, SIZE),
        (Short(10), Reason.SIZE_MISMATCH, None),
        (Long(10), Reason.SIZE_MISMATCH, None),
        (Status(500), Reason.SERVER_ERROR, SIZE),
        (Status(502, body=b"<html>"), Reason.SERVER_ERROR, SIZE),
        (Status(408), Reason.SERVER_ERROR, SIZE),
        (Status(503, {"Retry-After": "1"}), Reason.SERVER_ERROR, SIZE),
        (Status(429, {"Retry-After": "1"}), Reason.RATE_LIMITED, SIZE),
        (Status(429), Reason.RATE_LIMITED, SIZE),
    ],
    ids=repr,
)
async def test_it_gets_over(
    hub: Hub,
    engine: Engine,
    tmp_path: Path,
    name: str,
    fault: Fault,
    reason: Reason,
    sent: int | None,
) -> None:
    download = _download(hub, tmp_path, name)
    hub.fault(f"*{name}", fault, times=1)

    assert await download.run(engine) == sha256(DATA).hex

    assert download.path.read_bytes() == DATA
    assert download.reasons == [reason]
    assert download.located == 1
    if sent is not None:
        assert hub.bytes_sent() == sent
        assert download.received == sent
    resumed = fault in (Truncate(CUT), Stall(CUT))
    assert ranges(hub)[-1] == (f"bytes={CUT}-" if resumed else None)


async def test_a_reset_keeps_what_came_before_it(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    download = _download(hub, tmp_path, "model.bin")
    hub.fault("*.bin", Reset(CUT), times=1)
    await download.run(engine)
    assert download.path.read_bytes() == DATA
    assert download.reasons == [Reason.NETWORK]
    # A reset takes with it what the client has not taken from the wire.
    assert SIZE <= download.received <= SIZE + CUT


async def test_a_trickle_is_a_stall(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    download = _download(hub, tmp_path, "model.bin")
    hub.fault("*.bin", Dribble(bytes_per_second=200), times=1)
    await download.run(engine)
    assert download.path.read_bytes() == DATA
    assert download.reasons == [Reason.STALLED]
    # What trickled in was kept, but for the read that was the last straw.
    assert SIZE < download.received < SIZE + 10


async def test_what_comes_with_the_headers_is_kept(engine: Engine, tmp_path: Path) -> None:
    # In one segment: the reader of the headers has it in its buffer, and waits for more.
    begin = reply(200, DATA[:5], {"Content-Length": str(SIZE)})
    rest = reply(206, DATA[5:], {"Content-Range": f"bytes 5-{SIZE - 1}/{SIZE}"})
    answers = iter([begin, rest])
    with Wire(lambda head: next(answers)) as wire:
        download = Download.of(wire.url("/x"), tmp_path / "partial", DATA)
        await download.run(engine)
        assert b"Range: bytes=5-\r\n" in wire.heads[1]
    assert download.reasons == [Reason.STALLED]
    assert download.received == SIZE


async def test_a_slow_line_is_none(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    download = _download(hub, tmp_path, "model.bin")
    hub.fault("*.bin", Slow(bytes_per_second=SIZE))  # three stall periods
    await download.run(engine)
    assert download.retries == []


async def test_every_way_at_once(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    """Transient failures do not use up the second try that wrong bytes have."""
    download = _download(hub, tmp_path, "model.bin")
    passing: list[Fault] = [Truncate(CUT), Status(503), Stall(1000), Corrupt(SIZE - 1), Reset(0)]
    for fault in passing:
        hub.fault("*.bin", fault, times=1)
    await download.run(engine)
    assert download.path.read_bytes() == DATA
    assert download.reasons == [
        *(Reason.NETWORK, Reason.SERVER_ERROR, Reason.STALLED),
        *(Reason.DIGEST_MISMATCH, Reason.NETWORK),
    ]


async def test_progress_begins_the_count_anew(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    data = noise(30 << 20)
    hub.add(REPO, {"model.bin": data})
    download = Download.of(url_of(hub, "model.bin"), tmp_path / "partial", data)
    hub.fault("*.bin", Truncate(9 << 20), times=3)
    for _ in range(RULES[Reason.NETWORK].tries - 2):
        hub.fault("*.bin", Status(500), times=1)
    await download.run(engine)
    assert len(download.retries) > RULES[Reason.NETWORK].tries
    assert hub.bytes_sent() == len(data)


async def test_progress_does_not_pardon_wrong_bytes(
    hub: Hub, engine: Engine, tmp_path: Path
) -> None:
    """Each costs a whole download, and a source that sends them on a bad line sends them again."""
    data = noise(20 << 20)
    hub.add(REPO, {"model.bin": data})
    download = Download.of(url_of(hub, "model.bin"), tmp_path / "partial", data)
    for progress in (9 << 20, 18 << 20):
        hub.fault("*.bin", Truncate(progress), times=1)
        hub.fault("*.bin", Corrupt(len(data) - 1), times=1)
    error = await download.fail(engine)
    assert error.reason is Reason.DIGEST_MISMATCH
    assert download.received == RULES[Reason.DIGEST_MISMATCH].tries * len(data)


# --- a fault that stays -------------------------------------------------------------------------

GATED: Mapping[str, str] = {"X-Error-Code": "GatedRepo"}


@pytest.mark.parametrize(
    ("fault", "reason", "on_cdn"),
    [
        (Corrupt(0), Reason.DIGEST_MISMATCH, None),
        (Truncate(0), Reason.NETWORK, None),
        (Stall(0), Reason.STALLED, None),
        (Reset(0), Reason.NETWORK, None),
        (Short(10), Reason.SIZE_MISMATCH, None),
        (Long(10), Reason.SIZE_MISMATCH, None),
        (Status(500), Reason.SERVER_ERROR, None),
        (Status(429), Reason.RATE_LIMITED, None),
        (Status(400), Reason.BAD_RESPONSE, None),
        (Status(204), Reason.BAD_RESPONSE, None),
        (Status(304), Reason.BAD_RESPONSE, None),
        (Status(401), Reason.UNAUTHORIZED, Reason.LINK_EXPIRED),
        (Status(403), Reason.UNAUTHORIZED, Reason.LINK_EXPIRED),
        (Status(410), Reason.FILE_NOT_FOUND, Reason.LINK_EXPIRED),
        (Status(404), Reason.FILE_NOT_FOUND, None),
        (Status(412), Reason.SOURCE_CHANGED, None),
        (Status(416, {"Content-Range": "bytes */7"}), Reason.SOURCE_CHANGED, None),
        (Status(200, {"Content-Encoding": "gzip"}, b"x"), Reason.BAD_RESPONSE, None),
        (Status(200, {"Content-Range": "bytes 0-9/10"}, b"x"), Reason.BAD_RESPONSE, None),
        (Status(206, {"Content-Range": "bytes 1-9/10"}, b"x"), Reason.BAD_RESPONSE, None),
        (Status(206, {"Content-Range": "bytes 0-9/*"}, b"x"), Reason.BAD_RESPONSE, None),
        (Status(206, {}, b"x"), Reason.BAD_RESPONSE, None),
        (Status(206, {"Content-Range": "bytes 0-6/7"}, b"x"), Reason.SIZE_MISMATCH, None),
        (Status(302, {}), Reason.BAD_RESPONSE, None),
        (Status(302, {"Location": "ftp://host/x"}), Reason.BAD_RESPONSE, None),
        (Status(302, {"Location": "http://host:port/x"}), Reason.BAD_RESPONSE, None),
    ],
    ids=lambda value: repr(value)[:60],
)
@pytest.mark.parametrize("name", FILES)
async def test_it_gives_up(
    hub: Hub,
    engine: Engine,
    tmp_path: Path,
    name: str,
    fault: Fault,
    reason: Reason,
    on_cdn: Reason | None,
) -> None:
    download = _download(hub, tmp_path, name)
    hub.fault(f"*{name}", fault)
    expected = on_cdn or reason if name.endswith(".bin") else reason

    error = await download.fail(engine)

    assert error.reason is expected
    tries = RULES[expected].tries
    assert len(download.retries) == tries - 1
    assert download.located == (2 if expected is Reason.LINK_EXPIRED else 1)
    assert hub.bytes_sent() <= tries * (SIZE + 10)
    # A later try begins where this one ended, unless what came was wrong.
    assert download.done == 0


@pytest.mark.parametrize("status", [401, 403])
async def test_a_gated_file_says_so(hub: Hub, engine: Engine, tmp_path: Path, status: int) -> None:
    hub.fault("/*/resolve/*", Status(status, GATED))
    error = await _download(hub, tmp_path, "model.bin").fail(engine)
    assert error.reason is Reason.GATED


async def test_a_gated_repository_of_the_hub(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    hub.gate(REPO, tokens={"hf_friend_sesame"})
    hub.accept("hf_stranger_sesame")
    for headers in ({}, {"Authorization": "Bearer hf_stranger_sesame"}):
        download = _download(hub, tmp_path, "model.bin")
        download.headers = headers
        assert (await download.fail(engine)).reason is Reason.GATED
    download.headers = {"Authorization": "Bearer hf_friend_sesame"}
    await download.run(engine)
    assert not hub.cdn_saw_authorization


@pytest.mark.parametrize("status", [429, 503])
async def test_a_long_retry_after_is_handed_up(
    hub: Hub, engine: Engine, tmp_path: Path, status: int
) -> None:
    hub.fault("*.bin", Status(status, {"Retry-After": "1800"}))
    download = _download(hub, tmp_path, "model.bin")
    error = await download.fail(engine)
    assert error.reason is (Reason.RATE_LIMITED if status == 429 else Reason.SERVER_ERROR)
    assert error.retry_after_seconds == 1800
    assert download.retries == []


async def test_a_small_retry_after_is_honoured(hub: Hub, tmp_path: Path) -> None:
    hub.fault("*.bin", Status(429, {"Retry-After": "1"}), times=1)
    with an_engine(dice=lambda: 0.0) as engine:
        begun = time.monotonic()
        await _download(hub, tmp_path, "model.bin").run(engine)
        assert time.monotonic() - begun >= 1


async def test_refused_then_back(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    hub.stop()
    download = _download(hub, tmp_path, "model.bin")
    download.react = lambda error: hub.start() if len(download.retries) == 2 else None
    await download.run(engine)
    assert download.reasons == [Reason.NETWORK, Reason.NETWORK]
    assert "refused" in download.retries[0].message


async def test_refused_for_ever(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    hub.stop()
    error = await _download(hub, tmp_path, "model.bin").fail(engine)
    assert error.reason is Reason.NETWORK


async def test_no_such_host(engine: Engine, tmp_path: Path) -> None:
    download = Download.of("http://localmodel.invalid/x", tmp_path / "partial", DATA)
    assert (await download.fail(engine)).reason is Reason.NETWORK


# --- ranges -------------------------------------------------------------------------------------


async def test_a_whole_answer_to_a_range_starts_the_file_again(
    hub: Hub, engine: Engine, tmp_path: Path
) -> None:
    download = _download(hub, tmp_path, "model.bin")
    hub.fault("*.bin", Truncate(CUT), times=1)
    hub.fault("*.bin", IgnoreRange())
    await download.run(engine)
    assert download.path.read_bytes() == DATA
    assert ranges(hub)[-1] == f"bytes={CUT}-"
    assert hub.bytes_sent() == CUT + SIZE


@pytest.mark.parametrize(
    "answer",
    [
        PartialAs200(),
        Status(206, {"Content-Range": f"bytes 0-{SIZE - 1}/{SIZE}"}, b"x" * 99),
        Status(206, {"Content-Range": f"bytes {CUT + 1}-{SIZE - 1}/{SIZE}"}, b"x" * 99),
        Status(206, {"Content-Range": f"bytes {CUT}-{SIZE - 2}/{SIZE}"}, b"x" * 99),
        Status(206, {"Content-Range": f"bytes={CUT}-{SIZE - 1}/{SIZE}"}, b"x" * 99),
        Status(206, {}, b"x" * 99),
    ],
    ids=lambda value: repr(value)[:70],
)
async def test_a_wrong_range_is_not_believed(
    hub: Hub, engine: Engine, tmp_path: Path, answer: Fault
) -> None:
    download = _download(hub, tmp_path, "model.bin")
    hub.fault("*.bin", Truncate(CUT), times=1)
    hub.fault("*.bin", answer, times=1)
    error = await download.fail(engine)
    assert error.reason is Reason.BAD_RESPONSE
    assert download.path.read_bytes() == DATA[:CUT], "nothing wrong was kept"
    await download.run(engine)
    assert download.path.read_bytes() == DATA


async def test_the_range_of_another_file_is_not_believed(
    hub: Hub, engine: Engine, tmp_path: Path
) -> None:
    download = _download(hub, tmp_path, "model.bin")
    hub.fault("*.bin", Truncate(CUT), times=1)
    hub.fault("*.bin", Short(10))
    assert (await download.fail(engine)).reason is Reason.SIZE_MISMATCH
    assert download.path.read_bytes() == DATA[:CUT]


# --- links that expire --------------------------------------------------------------------------


async def test_an_expired_link_is_replaced_once(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    download = _download(hub, tmp_path, "model.bin")
    hub.fault("/cdn/*", Status(403), times=1)
    await download.run(engine)
    assert (download.located, download.retries) == (2, [])


async def test_links_that_are_never_good(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    brief = Hub(tmp_path / "brief", link_seconds=-1)
    with brief:
        brief.add(REPO, {"model.bin": DATA})
        download = _download(brief, tmp_path, "model.bin")
        error = await download.fail(engine)
    assert (error.reason, download.located) == (Reason.LINK_EXPIRED, 2)
    assert len([r for r in brief.requests if r.origin == "cdn"]) == 2


@pytest.mark.parametrize(("progress", "located"), [(9 << 20, 3), (1 << 20, 2)])
async def test_and_again_only_after_progress(
    hub: Hub, engine: Engine, tmp_path: Path, progress: int, located: int
) -> None:
    data = noise(12 << 20)
    hub.add(REPO, {"model.bin": data})
    download = Download.of(url_of(hub, "model.bin"), tmp_path / "partial", data)
    hub.fault("/cdn/*", Status(403), times=1)
    hub.fault("*.bin", Truncate(progress), times=1)
    hub.fault("/cdn/*", Status(403), times=1)
    if located == 3:
        await download.run(engine)
        assert hub.bytes_sent() == len(data)
    else:
        assert (await download.fail(engine)).reason is Reason.LINK_EXPIRED
        assert download.done == progress
    assert download.located == located


# --- bodies without a length --------------------------------------------------------------------


def _chunked(data: bytes, *, end: bool = True) -> bytes:
    pieces = [data[at : at + 100_000] for at in range(0, len(data), 100_000)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return reply(200, body + (b"0\r\n\r\n" if end else b""), {"Transfer-Encoding": "chunked"})


async def test_a_chunked_body(engine: Engine, tmp_path: Path) -> None:
    with Wire(lambda head: _chunked(DATA)) as wire:
        for name in ("one", "two"):
            await Download.of(wire.url("/x"), tmp_path / name, DATA).run(engine)
            assert (tmp_path / name).read_bytes() == DATA


async def test_a_chunked_body_that_is_too_long(engine: Engine, tmp_path: Path) -> None:
    with Wire(lambda head: _chunked(DATA + b"!")) as wire:
        download = Download.of(wire.url("/x"), tmp_path / "partial", DATA)
        error = await download.fail(engine)
        assert error.reason is Reason.SIZE_MISMATCH
        assert download.reasons == [Reason.SIZE_MISMATCH]
        assert len(wire.heads) == RULES[Reason.SIZE_MISMATCH].tries


@pytest.mark.parametrize("end", [True, False], ids=["short", "torn"])
async def test_a_chunked_body_that_ends_early(engine: Engine, tmp_path: Path, end: bool) -> None:
    part = _chunked(DATA[:CUT], end=end)
    part = part.replace(b"HTTP/1.1 200 Told\r\n", b"HTTP/1.1 200 Told\r\nConnection: close\r\n")
    rest = reply(206, DATA[CUT:], {"Content-Range": f"bytes {CUT}-{SIZE - 1}/{SIZE}"})
    answers = iter([part, rest])
    with Wire(lambda head: next(answers)) as wire:
        download = Download.of(wire.url("/x"), tmp_path / "partial", DATA)
        await download.run(engine)
        assert download.path.read_bytes() == DATA
        assert download.reasons == [Reason.NETWORK]
        assert f"Range: bytes={CUT}-".encode() in wire.heads[1]


async def test_a_body_that_ends_with_its_connection(engine: Engine, tmp_path: Path) -> None:
    answer = b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n" + DATA
    with Wire(lambda head: answer) as wire:
        await Download.of(wire.url("/x"), tmp_path / "partial", DATA).run(engine)
    assert (tmp_path / "partial").read_bytes() == DATA


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 999999 \r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
        b"",
    ],
    ids=lambda value: repr(value[:20]),
)
async def test_what_is_no_http(engine: Engine, tmp_path: Path, garbage: bytes) -> None:
    with Wire(lambda head: garbage, answers_each=1) as wire:
        download = Download.of(wire.url("/x"), tmp_path / "partial", DATA)
        assert (await download.fail(engine)).reason is Reason.NETWORK


async def test_a_servers_words_are_not_repeated(engine: Engine, tmp_path: Path) -> None:
    with Wire(lambda head: b"HTTP/1.1 404 \x1b[31mred\r\nContent-Length: 0\r\n\r\n") as wire:
        error = await Download.of(wire.url("/x"), tmp_path / "partial", DATA).fail(engine)
    assert error.message.endswith("answers 404 Not Found")


# --- sizes and promises -------------------------------------------------------------------------


@pytest.mark.parametrize("promise", [sha256, git_sha1, None], ids=["sha256", "git-sha1", "none"])
@pytest.mark.parametrize(
    "size",
    [0, 1, *(n * BUFFER_BYTES + d for n in (1, 2, 4, 5) for d in (-1, 0, 1)), 3_333_333],
)
async def test_sizes(tmp_path: Path, size: int, promise: object) -> None:
    data = noise(size, seed=size)
    with Hub(tmp_path / "hub") as hub, an_engine() as engine:
        hub.add(REPO, {"model.bin": data})
        promised = promise(data) if callable(promise) else None
        download = Download.of(
            url_of(hub, "model.bin"), tmp_path / "partial", data, promised=promised
        )
        assert await download.run(engine) == sha256(data).hex
        assert download.path.read_bytes() == data
        assert download.path.stat().st_mode & 0o777 == 0o444
        assert download.retries == []
        assert hub.bytes_sent() == size


@pytest.mark.parametrize("promise", [sha256, git_sha1], ids=["sha256", "git-sha1"])
async def test_a_promise_that_an_empty_file_breaks(
    engine: Engine, tmp_path: Path, promise: object
) -> None:
    assert callable(promise)
    download = Download.of("http://127.0.0.1:9/x", tmp_path / "empty", b"", promised=promise(b"!"))
    assert (await download.fail(engine)).reason is Reason.DIGEST_MISMATCH


async def test_many_at_once(tmp_path: Path) -> None:
    """More files than connections, of mixed sizes, over a line that breaks now and then."""
    files = {f"part-{n:02}.bin": noise(n * 77_777, seed=n) for n in range(30)}
    with Hub(tmp_path / "hub") as hub, an_engine(connections=4) as engine:
        hub.add(REPO, dict(files))
        hub.fault("*.bin", Truncate(10), times=4)
        for name in ("part-07.bin", "part-29.bin"):
            hub.fault(name, Corrupt(0), times=1)
        downloads = [
            Download.of(url_of(hub, name), tmp_path / name, data) for name, data in files.items()
        ]
        await asyncio.gather(*(download.run(engine) for download in downloads))
        assert {d.path.name: d.path.read_bytes() for d in downloads} == files
        assert sum(len(d.retries) for d in downloads) == 6


async def test_errors_are_values(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    """One line, without the signature of the link that failed."""
    hub.fault("/cdn/*", Status(404))
    error = await _download(hub, tmp_path, "model.bin").fail(engine)
    assert isinstance(error, AgentError)
    assert "sig=" not in repr(error)
    assert "\n" not in error.message


# --- whether it would be given --------------------------------------------------------------------


async def test_one_byte_is_asked_for_to_see_whether_a_file_is_given(
    hub: Hub, engine: Engine
) -> None:
    locator = HttpLocator(url=url_of(hub, "model.bin"))
    await engine.reach(locator, size=SIZE)
    assert hub.bytes_sent() <= 1
    with pytest.raises(AgentError) as caught:  # it is not the file that was listed
        await engine.reach(locator, size=SIZE + 1)
    assert caught.value.reason is not Reason.NETWORK
    hub.gate(REPO, tokens=["hf_another"])
    with pytest.raises(AgentError) as caught:
        await engine.reach(locator, size=SIZE)
    assert caught.value.reason is Reason.GATED
