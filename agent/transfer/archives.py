"""What is in a `.tar`, `.tar.gz` or `.zip`, and its files one by one. Archives are hostile input.

An archive is read twice, front to back: `contents` hashes what is in it and writes nothing, so that
room can be found for exactly that, or it can be refused; `unpack` writes what is wanted of it, each
byte checked against the first reading. No name of an archive is ever given to the file system here,
and no link is made: a link to a file of the same archive is that file once more.

tarfile and zipfile are used to read, with bounds that they have not got: a header may claim to be
as long as it likes, and a damaged one in the middle is taken for the end.
"""

import errno
import gzip
import io
import itertools
import lzma
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from agent.errors import AgentError, Reason
from agent.files import disk_errors
from agent.layout import ArchiveKind
from agent.model import Digest, RemoteFile, quantity
from agent.transfer.connections import Cancellation
from agent.transfer.sink import BUFFER_BYTES, Hashes, Sink

MOST_FILES = 20_000
_LONGEST_NAME = 4096  # PATH_MAX; tarfile takes a second for one of 100,000
_MOST_MEMBERS = 10 * MOST_FILES  # directories are not published, and cost time all the same
"""Each is some hundred bytes of memory, and a line of a manifest."""

_HEADER_BYTES = 1024**2
"""All that is said of one file, a long name or attributes; tarfile reads each in one piece, and
remembers those that are said of all files."""
_DIRECTORY_BYTES = 4 * 1024**2
"""The directory of a zip file, with names of 150 bytes for MOST_FILES. Of the shortest entries it
would hold 90,000, in 45 MB of memory."""
_LINKS = 40  # in a row, as in Linux

_GZIP, _BZIP2, _XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
_BLOCK = bytes(tarfile.BLOCKSIZE)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, ValueError, LookupError, OverflowError, NotImplementedError, struct.error),
    RecursionError,  # headers of headers of headers
)
"""What the two libraries, and what they are made of, raise for bytes that are no archive."""


class _Body(Protocol):
    def readinto(self, view: memoryview) -> int | None: ...


@dataclass(frozen=True, slots=True)
class _Item:
    """A file of an archive, or (`target`) a link to another one of it."""

    path: str
    size: int = 0
    body: _Body | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where one file is to be written, and what it must be. `proven` is called when it is there,
    durable and right, in the thread that wrote it."""

    path: Path
    size: int
    promised: Digest
    proven: Callable[[], None]


@dataclass(slots=True)
class _Found:
    """What was found so far, bounded."""

    most_bytes: int
    files: dict[str, RemoteFile] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    def count(self, path: str, size: int) -> None:
        if path in self.files or path in self.links:
            raise AgentError(Reason.UNSAFE_PATH, f"the archive holds {path[:200]!a} twice")
        if len(self.files) + len(self.links) >= MOST_FILES:
            raise _bad(f"it holds more than {MOST_FILES} files")
        if size < 0:
            raise _bad(f"{path[:200]!a} is said to be {size} bytes long")
        self.bytes += size
        if self.bytes > self.most_bytes:
            raise _bad(f"it holds more than {quantity(self.most_bytes)}, all that the disk has")

    def follow(self, path: str) -> RemoteFile:
        """The file that a link leads to."""
        target = path
        for _ in range(_LINKS):
            target = self.links[target]
            if target in self.files:
                return self.files[target]
            if target not in self.links:
                break
        inside = any(name.startswith(f"{target}/") for name in (*self.files, *self.links))
        what = "a directory" if inside else "no file of the archive"
        raise _bad(f"{path[:200]!a} is a link to {what}; pack it with its links followed (tar -h)")


def contents(
    path: Path,
    kind: ArchiveKind,
    *,
    most_bytes: int,
    buffer: bytearray,
    cancellation: Cancellation,
) -> list[RemoteFile]:
    """Every file of an archive, hashed; `origin` is where in it the bytes are.

    Raises BadArchive, UnsafePath, or what the disk says. At most `most_bytes` are unpacked, in
    memory and a buffer at a time.
    """
    found = _Found(most_bytes)
    with _opened(path, kind, cancellation) as items:
        for item in items:
            cancellation.check()
            if item.target is not None:
                found.count(item.path, 0)
                found.links[item.path] = item.target
                continue
            found.count(item.path, item.size)
            hashes = Hashes(item.size, None)
            for data in _read(item, buffer, cancellation):
                hashes.update(data)
            digest = Digest("sha256", hashes.sha256)
            found.files[item.path] = RemoteFile(
                path=item.path, size=item.size, origin=item.path, digest=digest
            )
        return [*found.files.values(), *_linked(found)]


def _linked(found: _Found) -> list[RemoteFile]:
    files = []
    for path in found.links:
        file = found.follow(path)
        found.bytes += file.size
        if found.bytes > found.most_bytes:
            raise _bad(f"with its links it holds more than {quantity(found.most_bytes)}")
        files.append(RemoteFile(path=path, size=file.size, origin=file.origin, digest=file.digest))
    return files


def unpack(
    path: Path,
    kind: ArchiveKind,
    targets: Mapping[str, Sequence[Target]],
    *,
    buffer: bytearray,
    cancellation: Cancellation,
    on_bytes: Callable[[int], None],
) -> None:
    """Write the wanted files of an archive, each to one or several places, and prove them.

    `targets` are by `origin`. Raises BadArchive, DigestMismatch, or what the disk says.
    """
    left = dict(targets)
    with _opened(path, kind, cancellation) as items:
        for item in items if left else ():
            cancellation.check()
            if item.body is not None and (wanted := left.pop(item.path, None)):
                _write(item, wanted, buffer, cancellation, on_bytes)
                if not left:
                    return
    if left:
        raise _bad(f"{min(left)[:200]!a} is not in it any more")


def _write(
    item: _Item,
    targets: Sequence[Target],
    buffer: bytearray,
    cancellation: Cancellation,
    on_bytes: Callable[[int], None],
) -> None:
    with ExitStack() as stack:
        sinks = []
        for target in targets:
            sink = Sink(target.path, size=target.size, promised=target.promised)
            stack.callback(sink.close)
            sink.restart()  # what an earlier life wrote of it cannot be gone on with
            sinks.append(sink)
        for data in _read(item, buffer, cancellation):
            for sink in sinks:
                sink.write(data)
                sink.hash(data)
                on_bytes(len(data))
        for sink, target in zip(sinks, targets, strict=True):
            sink.prove()
            cancellation.check()
            target.proven()


def _read(item: _Item, buffer: bytearray, cancellation: Cancellation) -> Iterator[memoryview]:
    """The bytes of a file, as many as its header says."""
    view, offset = memoryview(buffer), 0
    assert item.body is not None
    while offset < item.size:
        cancellation.check()
        count = item.body.readinto(view[: min(len(view), item.size - offset)])
        if not count:
            raise _bad(f"{item.path[:200]!a} ends after {offset} of {item.size} bytes")
        offset += count
        yield view[:count]
    # zipfile compares its checksum when it is asked for more than there is.
    if item.body.readinto(view[:1]):
        raise _bad(f"{item.path[:200]!a} is longer than {item.size} bytes")


@contextmanager
def _opened(path: Path, kind: ArchiveKind, cancellation: Cancellation) -> Iterator[Iterator[_Item]]:
    with disk_errors("read the archive"), path.open("rb") as file:
        items = _zipped(file) if kind == "zip" else _tarred(file, path, cancellation)
        try:
            with closing(items):
                yield items
        except _BROKEN as error:
            raise _bad(f"{type(error).__name__}: {str(error)[:200]}") from error


# -- tar ------------------------------------------------------------------------------------------


class _Reader:
    """What tarfile reads from: forward only, never much at once, and with its last block known."""

    def __init__(self, file: BinaryIO, cancellation: Cancellation) -> None:
        self._file = file
        self._cancellation = cancellation
        self._packed = isinstance(file, gzip.GzipFile)
        self._left: int | None = _HEADER_BYTES
        self.last = b""

    def bound(self, size: int | None) -> None:
        """How much may be read until this is called again; None: it is of a file, and flows by."""
        self._left = size

    def read(self, size: int) -> bytes:
        if self._left is not None:
            if not 0 <= size <= self._left:
                raise _bad(f"it has a header of {max(size, _HEADER_BYTES)} bytes")
            self._left -= size
        self.last = self._file.read(size)
        return self.last

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        """In a compressed file, which has to be read, in steps that can be cancelled."""
        while self._packed and offset - self._file.tell() > BUFFER_BYTES:
            self._cancellation.check()
            if not self._file.read(BUFFER_BYTES):
                break
        return self._file.seek(offset)

    def drain(self) -> None:
        """To the end, where a compressed file has its checksum."""
        while self._file.read(BUFFER_BYTES):
            self._cancellation.check()


def _tarred(file: BinaryIO, path: Path, cancellation: Cancellation) -> Generator[_Item, None, None]:
    if not hasattr(tarfile, "data_filter"):
        raise AgentError(
            Reason.UNSUPPORTED, "this Python cannot unpack safely; use 3.11.4 or newer, or a .zip"
        )
    magic = file.read(len(_XZ))
    file.seek(0)
    if magic.startswith((_BZIP2, _XZ)):
        raise _bad("it is compressed by bzip2 or xz, whatever its name says")
    packed = gzip.GzipFile(fileobj=file) if magic.startswith(_GZIP) else None
    reader = _Reader(packed or file, cancellation)  # type: ignore[arg-type] # a GzipFile reads
    # The encoding of KServe's initializer; what is no UTF-8 becomes half of a surrogate pair.
    with tarfile.open(fileobj=reader, mode="r:", encoding="utf-8") as tar:  # type: ignore[call-overload]
        for count in itertools.count():
            if (member := tar.next()) is None:
                break
            tar.members.clear()  # it keeps them all
            said = sum(len(key) + len(value) for key, value in tar.pax_headers.items())
            if said > _HEADER_BYTES:
                raise _bad("it has too much to say of all its files")
            if count > _MOST_MEMBERS:
                raise _bad(f"it holds more than {_MOST_MEMBERS} directories and files")
            cancellation.check()
            reader.bound(None)
            if (item := _member(tar, member, path)) is not None:
                yield item
            reader.bound(_HEADER_BYTES)
    if reader.last != _BLOCK:
        raise _bad("it has no end: it was cut off, or a header in it is damaged")
    reader.drain()


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> _Item | None:
    """None for a directory: those that files are in are made anyway."""
    if max(len(member.name), len(member.linkname)) > _LONGEST_NAME:
        raise _unsafe(f"{member.name[:80]}...", "its name is too long")
    if member.issparse():
        raise _bad("it holds a sparse file, which may be of any length; pack it without --sparse")
    try:
        safe = tarfile.data_filter(member, str(path.parent))
    except tarfile.FilterError as error:
        raise _unsafe(member.name, str(error)) from error
    name = _plain(member.name)
    if member.isdir():
        return None
    if member.isreg():
        body = tar.extractfile(member)
        assert body is not None
        return _Item(name, member.size, body)  # type: ignore[arg-type] # a BufferedReader
    target = safe.linkname
    if member.issym():
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    return _Item(name, target=_plain(target))


def _plain(name: str) -> str:
    """`./a//b` -> `a/b`. What else a name must not be is said where the listing is pinned."""
    if name.startswith("/"):
        raise _unsafe(name, "it is absolute")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


# -- zip ------------------------------------------------------------------------------------------


class _Bounded(io.RawIOBase):
    """A zip file, whose directory zipfile reads in one piece."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _DIRECTORY_BYTES:
            size = _DIRECTORY_BYTES + 1
        found = self._file.read(size)
        if len(found) > _DIRECTORY_BYTES:
            raise _bad(f"its directory is longer than {quantity(_DIRECTORY_BYTES)}")
        return found

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            if error.errno == errno.EINVAL:  # an entry is said to be before the file begins
                raise _bad("an entry is said to be outside of it") from error
            raise

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _zipped(file: BinaryIO) -> Generator[_Item, None, None]:
    with zipfile.ZipFile(_Bounded(file)) as archive:
        for info in archive.infolist():
            name = _checked(info)
            if not info.is_dir():
                with archive.open(info) as body:
                    yield _Item(name, info.file_size, body)  # type: ignore[arg-type] # reads into


def _checked(info: zipfile.ZipInfo) -> str:
    """The name of an entry that may be unpacked. zipfile itself would mend hostile names."""
    if info.flag_bits & 0x41:
        raise _bad(f"{info.filename[:200]!a} is encrypted")
    if info.compress_type not in _METHODS:
        raise _bad(f"{info.filename[:200]!a} is compressed by method {info.compress_type}")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _unsafe(info.filename, "it is a link or a device")
    if "\0" in info.orig_filename:
        raise _unsafe(info.orig_filename, "its name holds a zero")
    return _plain(info.filename)


def _bad(what: str) -> AgentError:
    return AgentError(Reason.BAD_ARCHIVE, f"the archive cannot be unpacked: {what}")


def _unsafe(name: str, why: str) -> AgentError:
    shown = ascii(name[:200])
    why = why if why.isprintable() else ascii(why)
    return AgentError(Reason.UNSAFE_PATH, f"the archive holds {shown}: {why[:300]}")
