"""What is read out of an archive, against what tarfile and zipfile would have extracted."""

import gzip
import hashlib
import io
import random
import stat
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import AgentError, Reason
from agent.layout import ArchiveKind
from agent.model import Digest, RemoteFile
from agent.transfer import archives
from agent.transfer.archives import Target, contents, unpack
from agent.transfer.connections import Cancellation, Cancelled
from agent.transfer.sink import BUFFER_BYTES
from tests.edges.volume import fast_directory, files_below

MOST = 10**9
WEIGHTS = random.Random(5).randbytes(3 * BUFFER_BYTES + 11)
FILES: Mapping[str, bytes] = {
    "config.json": b"{}",
    "empty": b"",
    "model.bin": WEIGHTS,
    "sub/deep/er.txt": b"deep",
    "sub/zoë ʃ.txt": b"unicode",
    f"long/{'n' * 200}": b"a name that takes a header of its own",
}


def look(path: Path, kind: ArchiveKind, *, most: int = MOST) -> list[RemoteFile]:
    return contents(
        path,
        kind,
        most_bytes=most,
        buffer=bytearray(BUFFER_BYTES),
        cancellation=Cancellation(),
    )


def bring(path: Path, kind: ArchiveKind, into: Path) -> dict[str, bytes]:
    """Everything in an archive, as it is brought."""
    told: list[str] = []
    targets: dict[str, list[Target]] = {}
    places = {}
    for number, file in enumerate(look(path, kind)):
        assert file.digest is not None
        places[file.path] = into / str(number)
        target = Target(
            path=places[file.path],
            size=file.size,
            promised=file.digest,
            proven=lambda name=file.path: told.append(name),  # type: ignore[misc]
        )
        targets.setdefault(file.origin, []).append(target)
    moved: list[int] = []
    unpack(
        path,
        kind,
        targets,
        buffer=bytearray(BUFFER_BYTES),
        cancellation=Cancellation(),
        on_bytes=moved.append,
    )
    assert sorted(told) == sorted(places)
    brought = {name: place.read_bytes() for name, place in places.items()}
    assert sum(moved) == sum(map(len, brought.values()))
    assert all(stat.S_IMODE(place.stat().st_mode) == 0o444 for place in places.values())
    return brought


def refusal(path: Path, kind: ArchiveKind, *, most: int = MOST) -> AgentError:
    with pytest.raises(AgentError) as caught:
        look(path, kind, most=most)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 700
    return caught.value


# -- making them ----------------------------------------------------------------------------------


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=kind, linkname=target)


def tar(path: Path, *entries: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as made:  # type: ignore[call-overload]
        for info, data in entries:
            made.addfile(info, io.BytesIO(data))
    return path


def tar_of(path: Path, files: Mapping[str, bytes], *, mode: str = "w") -> Path:
    return tar(path, *(entry(name, data) for name, data in files.items()), mode=mode)


def zip_of(path: Path, files: Mapping[str, bytes], *, method: int = zipfile.ZIP_STORED) -> Path:
    return zipped(path, [(zipfile.ZipInfo(name), data) for name, data in files.items()], method)


def zipped(
    path: Path, entries: Iterable[tuple[zipfile.ZipInfo, bytes]], method: int | None = None
) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for info, data in entries:
            made.writestr(info, data, compress_type=method)
    return path


MAKERS: Mapping[str, tuple[ArchiveKind, Callable[[Path, Mapping[str, bytes]], Path]]] = {
    "tar": ("tar", lambda path, files: tar_of(path, files)),
    "tar.gz": ("tar", lambda path, files: tar_of(path, files, mode="w:gz")),
    "zip": ("zip", lambda path, files: zip_of(path, files)),
    "zip-deflated": (
        "zip",
        lambda path, files: zip_of(path, files, method=zipfile.ZIP_DEFLATED),
    ),
}


def extracted(path: Path, kind: ArchiveKind, into: Path) -> dict[str, bytes]:
    """What KServe's initializer leaves of it, read as a server would: through its links."""
    if kind == "tar":
        with tarfile.open(path, "r", encoding="utf-8") as archive:
            archive.extractall(into, filter="data")
    else:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(into)
    return {str(found.relative_to(into)): found.read_bytes() for found in files_below(into)}


# -- what is right --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", MAKERS)
def test_what_is_in_an_archive_comes_out(how: str, tmp_path: Path) -> None:
    kind, make = MAKERS[how]
    path = make(tmp_path / "archive", FILES)
    found = {file.path: file for file in look(path, kind)}
    assert {name: file.size for name, file in found.items()} == {
        name: len(data) for name, data in FILES.items()
    }
    assert {file.digest for file in found.values()} == {
        Digest("sha256", hashlib.sha256(data).hexdigest()) for data in FILES.values()
    }
    assert bring(path, kind, tmp_path) == FILES == extracted(path, kind, tmp_path / "x")


_NAME = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cf"], exclude_characters="/\\\0"),
    min_size=1,
    max_size=12,
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)
_PATHS = st.lists(_NAME, min_size=1, max_size=4).map("/".join)
_TREES = st.dictionaries(_PATHS, st.binary(max_size=2000), min_size=1, max_size=8).filter(
    lambda tree: not any(other.startswith(f"{name}/") for name in tree for other in tree)
)


@given(files=_TREES, how=st.sampled_from(sorted(MAKERS)), data=st.data())
@settings(max_examples=150, deadline=None)
def test_it_is_what_the_initializer_would_have_left(
    files: dict[str, bytes], how: str, data: st.DataObject
) -> None:
    kind, make = MAKERS[how]
    with fast_directory() as scratch:
        path = make(scratch / "archive", files)
        if kind == "tar":  # and some links to what is there
            named = data.draw(st.dictionaries(_NAME, st.sampled_from(sorted(files)), max_size=4))
            taken = {part for name in files for part in (name.split("/")[0],)}
            links = {name: to for name, to in named.items() if name not in taken}
            kinds = data.draw(st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE]))
            # A hard link names its file as the archive does, or tarfile does not find it.
            dot = data.draw(st.sampled_from(["", "./"])) if kinds == tarfile.SYMTYPE else ""
            entries = [entry(f"{dot}{name}", body) for name, body in files.items()]
            entries += [link(name, to, kinds) for name, to in links.items()]
            path = tar(scratch / "archive", *entries, mode="w:gz" if "gz" in how else "w")
        (scratch / "brought").mkdir()
        assert bring(path, kind, scratch / "brought") == extracted(path, kind, scratch / "x")


def test_links_are_the_files_that_they_lead_to(tmp_path: Path) -> None:
    """As a hub client's snapshot has them: names that lead to blobs."""
    path = tar(
        tmp_path / "archive",
        link("snapshot/model.bin", "../blobs/1"),  # before what it leads to
        link("snapshot/again.bin", "model.bin"),
        entry("blobs", type=tarfile.DIRTYPE),
        entry("blobs/1", WEIGHTS),
        link("hard.bin", "blobs/1", tarfile.LNKTYPE),
    )
    brought = bring(path, "tar", tmp_path)
    assert brought == dict.fromkeys(
        ("snapshot/model.bin", "snapshot/again.bin", "blobs/1", "hard.bin"), WEIGHTS
    )
    assert brought == extracted(path, "tar", tmp_path / "x")


def test_only_what_is_wanted_is_written(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "archive", FILES, mode="w:gz")
    written: list[str] = []
    promised = Digest("sha256", hashlib.sha256(b"deep").hexdigest())
    target = Target(
        path=tmp_path / "here", size=4, promised=promised, proven=lambda: written.append("here")
    )
    arguments = {"buffer": bytearray(BUFFER_BYTES), "cancellation": Cancellation()}
    wanted = {"sub/deep/er.txt": [target]}
    (tmp_path / "here").write_bytes(b"of an earlier life, and longer")
    unpack(path, "tar", wanted, on_bytes=lambda size: None, **arguments)  # type: ignore[arg-type]
    assert (tmp_path / "here").read_bytes() == b"deep"
    assert written == ["here"]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["archive", "here"]


def test_other_bytes_than_those_of_the_first_reading_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "archive", {"a": b"other"})
    target = Target(
        path=tmp_path / "here",
        size=5,
        promised=Digest("sha256", "0" * 64),
        proven=lambda: pytest.fail("it is wrong"),
    )
    for wanted, reason in (("a", Reason.DIGEST_MISMATCH), ("b", Reason.BAD_ARCHIVE)):
        with pytest.raises(AgentError) as caught:
            unpack(
                path,
                "tar",
                {wanted: [target]},
                buffer=bytearray(BUFFER_BYTES),
                cancellation=Cancellation(),
                on_bytes=lambda size: None,
            )
        assert caught.value.reason is reason


def test_a_sparse_file_may_be_of_any_length_and_is_refused(tmp_path: Path) -> None:
    """Of 12 KB, 9 TB would be hashed."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(5 * 1024**2)
        file.seek(3 * 1024**2)
        file.write(b"middle")
    command = ["tar", "--sparse", "--format=gnu", "-cf", "archive", "sparse"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "archive").stat().st_size < 1024**2
    error = refusal(tmp_path / "archive", "tar")
    assert error.reason is Reason.BAD_ARCHIVE
    assert "without --sparse" in error.message


def test_a_name_of_any_length_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as made:
        made.addfile(*_streamed("a/" * 60_000 + "b", b"x"))
    error = refusal(path, "tar")
    assert error.reason is Reason.UNSAFE_PATH
    assert len(error.message) < 500


# -- hostile names, one by one --------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        [entry("/etc/passwd", b"x")],
        [entry("../outside", b"x")],
        [entry("a/../../outside", b"x")],
        [entry("device", type=tarfile.CHRTYPE)],
        [entry("device", type=tarfile.BLKTYPE)],
        [entry("pipe", type=tarfile.FIFOTYPE)],
        [link("out", "/etc/passwd")],
        [link("out", "../../etc/passwd")],
        [link("out", "../outside", tarfile.LNKTYPE)],
        [entry("twice", b"1"), entry("twice", b"2")],
        [entry("twice", b"1"), entry("./twice", b"2")],
        [entry("a", b"1"), link("a", "a")],
    ],
    ids=lambda entries: ascii([info.name for info, _ in entries]),
)
def test_a_tar_with_such_a_name_is_refused(
    entries: list[tuple[tarfile.TarInfo, bytes]], tmp_path: Path
) -> None:
    path = tar(tmp_path / "archive", entry("good", b"good"), *entries)
    assert refusal(path, "tar").reason is Reason.UNSAFE_PATH
    assert [found.name for found in tmp_path.iterdir()] == ["archive"]


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([link("a", "b"), link("b", "a")], "is a link to no file"),
        ([link("self", "self")], "is a link to no file"),
        ([link("out", "nothing")], "is a link to no file"),
        ([entry("d/x", b"x"), link("l", "d")], "is a link to a directory"),
        ([entry("d/x", b"x"), link("l", "d"), entry("l/y", b"y")], "is a link to a directory"),
    ],
)
def test_links_that_lead_to_no_file_are_refused(
    entries: list[tuple[tarfile.TarInfo, bytes]], why: str, tmp_path: Path
) -> None:
    error = refusal(tar(tmp_path / "archive", *entries), "tar")
    assert error.reason is Reason.BAD_ARCHIVE
    assert why in error.message


def _info(name: str, **fields: object) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (_info("/etc/passwd"), Reason.UNSAFE_PATH),
        (_info("link", external_attr=(stat.S_IFLNK | 0o777) << 16), Reason.UNSAFE_PATH),
        (_info("device", external_attr=stat.S_IFCHR << 16), Reason.UNSAFE_PATH),
        (_info("bz2", compress_type=zipfile.ZIP_BZIP2), Reason.BAD_ARCHIVE),
        (_info("lzma", compress_type=zipfile.ZIP_LZMA), Reason.BAD_ARCHIVE),
    ],
    ids=lambda value: ascii(getattr(value, "filename", value)),
)
def test_a_zip_with_such_an_entry_is_refused(
    info: zipfile.ZipInfo, reason: Reason, tmp_path: Path
) -> None:
    good = (zipfile.ZipInfo("good"), b"good")
    path = zipped(tmp_path / "archive", [good, (info, b"bad")])
    assert refusal(path, "zip").reason is reason


def _patched(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "archive", {"secret": b"x" * 40})
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    struct.pack_into("<H", data, 6, 1)
    struct.pack_into("<H", data, central + 8, 1)
    path.write_bytes(data)
    error = refusal(path, "zip")
    assert error.reason is Reason.BAD_ARCHIVE
    assert "encrypted" in error.message


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_names_a_file_twice_is_refused(tmp_path: Path) -> None:
    entries = [(zipfile.ZipInfo("twice"), data) for data in (b"1", b"2")]
    path = zipped(tmp_path / "archive", entries)
    assert refusal(path, "zip").reason is Reason.UNSAFE_PATH


def test_a_zero_in_a_name_is_refused(tmp_path: Path) -> None:
    path = _patched(zip_of(tmp_path / "archive", {"aXb": b"x"}), b"aXb", b"a\0b")
    assert refusal(path, "zip").reason is Reason.UNSAFE_PATH


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", MAKERS)
def test_an_archive_that_was_cut_off_is_refused(how: str, tmp_path: Path) -> None:
    """Wherever; also between two of its files, where tarfile itself would call it whole."""
    kind, make = MAKERS[how]
    whole = make(tmp_path / "archive", {f"{n}.bin": b"%d" % n * 400 for n in range(6)}).read_bytes()
    end = len(whole.rstrip(b"\0")) if how == "tar" else len(whole)
    for size in [0, 1, 100, *range(512, end, 512), end - 1]:
        (tmp_path / "cut").write_bytes(whole[:size])
        assert refusal(tmp_path / "cut", kind).reason is Reason.BAD_ARCHIVE, size


@given(data=st.data(), how=st.sampled_from(sorted(MAKERS)))
@settings(max_examples=300, deadline=None)
def test_damage_is_a_refusal_or_harmless(data: st.DataObject, how: str) -> None:
    """Whatever bytes are changed: an error of ours, or files; never another exception."""
    kind, make = MAKERS[how]
    with fast_directory() as scratch:
        path = make(scratch / "archive", {"a.txt": b"a" * 700, "b/c.txt": b"c" * 30})
        spoiled = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(spoiled) - 1))
            spoiled[at] = data.draw(st.integers(0, 255))
        path.write_bytes(spoiled)
        try:
            found = look(path, kind)
        except AgentError as error:
            assert error.reason in (Reason.BAD_ARCHIVE, Reason.UNSAFE_PATH)  # noqa: PT017
        else:
            if how != "tar":  # which alone has no checksum of what is in it
                assert {file.size for file in found} <= {700, 30}


def test_a_header_that_is_damaged_is_not_the_end(tmp_path: Path) -> None:
    """tarfile alone takes it for the end, and would publish half of a model."""
    path = tar_of(tmp_path / "archive", {"a": b"a" * 512, "b": b"b" * 512})
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 0xFF  # the checksum of the second header
    path.write_bytes(data)
    with tarfile.open(path) as naive:
        assert naive.getnames() == ["a"]
    assert refusal(path, "tar").reason is Reason.BAD_ARCHIVE


def test_a_gzip_checksum_counts(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "archive", {"a": WEIGHTS}, mode="w:gz")
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    assert refusal(path, "tar").reason is Reason.BAD_ARCHIVE


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(b"<html>not found</html>" * 100)
    assert refusal(path, "tar").reason is Reason.BAD_ARCHIVE
    assert refusal(path, "zip").reason is Reason.BAD_ARCHIVE
    tar_of(path, FILES, mode="w:xz")
    error = refusal(path, "tar")
    assert "xz" in error.message
    assert error.reason is Reason.BAD_ARCHIVE


# -- bombs ----------------------------------------------------------------------------------------


def test_more_than_the_disk_has_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    info, _ = entry("bomb")
    info.size = 10**15
    path.write_bytes(info.tobuf() + bytes(1024))
    error = refusal(path, "tar")
    assert "holds more than" in error.message
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf() + bytes(1024))
    assert "holds more than" in refusal(path, "tar").message
    zip_of(path, {"zeros": bytes(10**6)}, method=zipfile.ZIP_DEFLATED)
    assert "holds more than" in refusal(path, "zip", most=10**6 - 1).message


def test_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    links = (link(f"l{n}", "big") for n in range(5))
    path = tar(tmp_path / "archive", entry("big", bytes(1000)), *links)
    assert len(look(path, "tar", most=6000)) == 6
    assert "with its links" in refusal(path, "tar", most=5999).message


def test_a_header_of_any_length_takes_no_memory(tmp_path: Path) -> None:
    """A pax header is read in one piece: of 300 KiB of gzip, 300 MiB of memory."""
    info, _ = entry("pax", type=tarfile.XHDTYPE)
    info.size = 300 * 1024**2
    path = tmp_path / "archive"
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf())
        for _ in range(300):
            file.write(bytes(1024**2))
    assert "a header of" in refusal(path, "tar").message


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE], ids=["one", "all"])
def test_headers_of_headers_take_no_memory(kind: bytes, tmp_path: Path) -> None:
    """Of 50 KiB of gzip, 40 MiB: each header is a small one, and all are for one file."""
    record = b"%d comment=%s\n" % (1_000_000, b"x" * (1_000_000 - len("1000000 comment=\n")))
    info, _ = entry("pax", type=kind)
    info.size = len(record)
    path = tmp_path / "archive"
    with gzip.open(path, "wb") as file:
        for _ in range(40):
            file.write(info.tobuf() + record + bytes(-len(record) % 512))
    tracemalloc.start()
    assert "a header of" in refusal(path, "tar").message
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 1024**2


@pytest.mark.parametrize("in_key", [False, True])
def test_what_is_said_of_all_files_is_bounded(tmp_path: Path, in_key: bool) -> None:
    path = tmp_path / "archive"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as made:
        for number in range(4):
            said = {f"key{number}": "x" * 400_000}
            made.pax_headers = {value: key for key, value in said.items()} if in_key else said
            made.pax_headers = {f"{number}{key}": value for key, value in made.pax_headers.items()}
            header = made.tarinfo.create_pax_global_header(made.pax_headers)
            assert made.fileobj is not None
            made.fileobj.write(header)
            made.offset += len(header)
            made.addfile(*_streamed(f"{number}.txt", b"x"))
    assert "of all its files" in refusal(path, "tar").message


def _streamed(name: str, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    return entry(name, data)[0], io.BytesIO(data)


def test_directories_without_an_end_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_MOST_MEMBERS", 50)
    path = tmp_path / "archive"
    with tarfile.open(path, "w") as made:
        for number in range(60):
            made.addfile(entry(f"{number}/", type=tarfile.DIRTYPE)[0])
        made.addfile(*_streamed("file", b"x"))
    assert "more than 50 directories and files" in refusal(path, "tar").message


def test_many_short_headers_end(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    info, _ = entry("pax", type=tarfile.XGLTYPE)
    info.size = len(record := b"9 a=bcde\n")
    path.write_bytes((info.tobuf() + record.ljust(512, b"\0")) * 3000)
    assert refusal(path, "tar").reason is Reason.BAD_ARCHIVE


def test_a_zip_directory_of_any_length_takes_no_memory(tmp_path: Path) -> None:
    """zipfile reads it in one piece, and makes objects of all of it at once."""
    comment = bytes(60_000)
    path = zipped(tmp_path / "archive", [(_info(f"{n}", comment=comment), b"") for n in range(75)])
    assert path.stat().st_size > 4 * 1024**2
    assert "its directory is longer" in refusal(path, "zip").message


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_FILES", 10)
    for how, (kind, make) in MAKERS.items():
        path = make(tmp_path / how, {f"{n}": b"" for n in range(11)})
        assert "more than 10 files" in refusal(path, kind).message


# -- cancelled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", MAKERS)
def test_it_can_be_cancelled(how: str, tmp_path: Path) -> None:
    kind, make = MAKERS[how]
    path = make(tmp_path / "archive", FILES)
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        contents(
            path,
            kind,
            most_bytes=MOST,
            buffer=bytearray(BUFFER_BYTES),
            cancellation=cancellation,
        )
