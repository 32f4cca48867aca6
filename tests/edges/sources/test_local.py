"""`file://` and plain paths: what a disk can hold that no hub can."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import AgentError, Reason
from agent.model import Listing, ModelRef, PathLocator
from agent.sources.local import LocalPath
from tests.contracts.source_contract import bring, refusal

SOURCE = LocalPath()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_bytes(b"{}")
    (root / "sub" / "w.bin").write_bytes(b"w" * 1000)
    return root


async def _list(path: object, **options: tuple[str, ...]) -> Listing:
    return await SOURCE.list(ModelRef(uri=str(path), **options))


def _paths(listing: Listing) -> list[str]:
    return [file.path for file in listing.files]


async def test_ways_to_name_a_directory(model: Path) -> None:
    for uri in (
        model,
        f"{model}/",
        f"file://{model}",
        f"file://localhost{model}",
        f"{model}/sub/..",
    ):
        assert _paths(await _list(uri)) == ["config.json", "sub/w.bin"]


async def test_a_hub_clients_snapshot(tmp_path: Path) -> None:
    """`models--*/snapshots/<commit>/*` are links into `blobs/`."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    (snapshot / "sub").mkdir(parents=True)
    for name, data in {"config.json": b"{}", "sub/w.bin": b"weights"}.items():
        blob = blobs / str(len(data))
        blob.write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    listing = await _list(snapshot)
    assert {f.path: f.size for f in listing.files} == {"config.json": 2, "sub/w.bin": 7}
    brought = await bring(SOURCE, listing, tmp_path)
    assert brought == {"config.json": b"{}", "sub/w.bin": b"weights"}


async def test_links_to_directories_are_not_followed(model: Path) -> None:
    (model / "loop").symlink_to(model)
    (model / "etc").symlink_to("/etc")
    assert _paths(await _list(model)) == ["config.json", "sub/w.bin"]


async def test_but_the_model_may_be_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(model)
    assert _paths(await _list(tmp_path / "current")) == ["config.json", "sub/w.bin"]


async def test_a_link_to_nothing(model: Path) -> None:
    (model / "gone").symlink_to("nowhere")
    error = await refusal(SOURCE, ModelRef(uri=str(model)))
    assert error.reason is Reason.FILE_NOT_FOUND
    assert "gone" in error.message
    assert _paths(await _list(model, exclude=("gone",))) == ["config.json", "sub/w.bin"]


async def test_a_single_file(model: Path, tmp_path: Path) -> None:
    listing = await _list(f"file://{model}/sub/w.bin")
    assert _paths(listing) == ["w.bin"]
    assert await bring(SOURCE, listing, tmp_path) == {"w.bin": b"w" * 1000}
    (model / "link").symlink_to("sub/w.bin")
    assert _paths(await _list(model / "link")) == ["link"]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("with space", "with%20space"),
        ("ünï", "%C3%BCn%C3%AF"),
        ("ünï", "ünï"),
        ("a#b?c", "a%23b%3Fc"),
        ("100%", "100%25"),
        (os.fsdecode(b"latin-\xe9"), "latin-%E9"),
    ],
)
async def test_percent_encoding(tmp_path: Path, name: str, written: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "a").write_bytes(b"1")
    assert _paths(await _list(f"file://{tmp_path}/{written}")) == ["a"]


async def test_a_plain_path_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("with space", "a#b?c", "100%25", "%41"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(b"1")
        assert _paths(await _list(tmp_path / name)) == ["a"]


@pytest.fixture
def odd(model: Path) -> Iterator[Path]:
    os.mkfifo(model / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(model / "socket"))
        yield model


async def test_what_is_no_file(odd: Path) -> None:
    """Nothing is opened, so nothing hangs."""
    for name in ("fifo", "socket"):
        error = await refusal(SOURCE, ModelRef(uri=str(odd), include=(name,)))
        assert error.reason is Reason.UNSAFE_PATH
        assert name in error.message
        assert (await refusal(SOURCE, ModelRef(uri=str(odd / name)))).reason is Reason.UNSAFE_PATH
    assert (await refusal(SOURCE, ModelRef(uri=str(odd)))).reason is Reason.UNSAFE_PATH
    assert _paths(await _list(odd, exclude=("fifo", "socket"))) == ["config.json", "sub/w.bin"]


async def test_a_device_is_no_model() -> None:
    assert (await refusal(SOURCE, ModelRef(uri="/dev/zero"))).reason is Reason.UNSAFE_PATH


async def test_a_file_that_changes_after_it_was_listed(model: Path, tmp_path: Path) -> None:
    listing = await _list(model)
    (model / "sub" / "w.bin").write_bytes(b"v" * 1000)
    with pytest.raises(AgentError) as caught:
        await bring(SOURCE, listing, tmp_path)
    assert caught.value.reason is Reason.SOURCE_CHANGED
    assert (await _list(model)).revision != listing.revision


async def test_a_file_that_goes(model: Path, tmp_path: Path) -> None:
    listing = await _list(model)
    (model / "sub" / "w.bin").unlink()
    with pytest.raises(AgentError) as caught:
        await bring(SOURCE, listing, tmp_path)
    assert caught.value.reason is Reason.SOURCE_CHANGED


async def test_nobody_promises_anything(model: Path) -> None:
    listing = await _list(model)
    assert {file.digest for file in listing.files} == {None}
    assert all(file.version for file in listing.files)
    locator = await SOURCE.locate(listing, listing.files[0])
    assert locator == PathLocator(path=str(model / "config.json"), version=listing.files[0].version)


async def _list_and_bring(model: Path, into: Path) -> None:
    await bring(SOURCE, await _list(model), into)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("closed", [".", "sub", "sub/w.bin"])
async def test_what_may_not_be_read(closed: str) -> None:
    """Root reads everything: the effective user is another one for the length of this."""
    with tempfile.TemporaryDirectory() as home:
        model, into = Path(home, "model"), Path(home, "into")
        (model / "sub").mkdir(parents=True)
        (model / "sub" / "w.bin").write_bytes(b"w")
        into.mkdir()
        into.chmod(0o777)
        Path(home).chmod(0o755)
        (model / closed).chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(AgentError) as caught:
                await _list_and_bring(model, into)
        finally:
            os.seteuid(0)
        assert caught.value.reason is Reason.SOURCE_UNREADABLE


async def test_an_archive_alone_is_to_be_unpacked(tmp_path: Path) -> None:
    """As KServe does, by its path or as all that its directory holds."""
    path = tmp_path / "one" / "m.tar.gz"
    path.parent.mkdir()
    path.write_bytes(b"tar")
    for uri in (str(path), str(path.parent)):
        listing = await LocalPath().list(ModelRef(uri=uri, include=("*.bin",)))
        assert listing.files == ()
        assert listing.archive is not None
        located = await LocalPath().locate(listing, listing.archive)
        assert isinstance(located, PathLocator)
        assert located.path == str(path)
    (path.parent / "beside").write_bytes(b"")
    listing = await LocalPath().list(ModelRef(uri=str(path.parent)))
    assert [file.path for file in listing.files] == ["beside", "m.tar.gz"]
