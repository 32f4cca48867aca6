"""`file:///dir`, `file:///dir/file` and plain absolute paths: a model that is here already.

Nothing promises a digest, so a file is pinned by size, time and inode: one that changes while it is
read is not published. One archive alone is published as what is in it. Symlinks to files are
followed (a hub client's snapshot is made of them), symlinks to directories are not.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

from agent.errors import AgentError, Reason
from agent.files import source_errors, version_of
from agent.model import Listing, Locator, ModelRef, PathLocator, RemoteFile
from agent.sources.base import is_archive, pack, pin, selected
from agent.threads import looking


class LocalPath:
    """Files of this machine, or of a volume that is mounted into the agent."""

    def check(self, ref: ModelRef) -> None:
        _path(ref)

    def host(self, ref: ModelRef) -> str:
        return ""

    async def list(self, ref: ModelRef) -> Listing:
        return await looking(lambda: _list(ref))

    async def locate(self, listing: Listing, file: RemoteFile) -> Locator:
        root = _path(listing.ref)
        path = await looking(lambda: root if root.is_file() else root / file.path)
        return PathLocator(path=str(path), version=file.version)


def _path(ref: ModelRef) -> Path:
    """Taken apart by hand: urlsplit drops what follows a `#` or a `?`, and every line feed."""
    raw = ref.uri.encode(errors="surrogateescape")
    host = b""
    if raw.startswith(b"file:"):
        raw = raw.removeprefix(b"file:")
        if raw.startswith(b"//"):
            host, slash, rest = raw.removeprefix(b"//").partition(b"/")
            raw = slash + rest
        if b"?" in raw or b"#" in raw:
            raise AgentError(
                Reason.INVALID_SPEC, f"{ref.uri[:200]!r}: write %3F for a ? and %23 for a #"
            )
        raw = unquote_to_bytes(raw)
    if host not in (b"", b"localhost") or not raw.startswith(b"/") or b"\0" in raw:
        raise AgentError(
            Reason.INVALID_SPEC, f"{ref.uri[:200]!r} must be file:///absolute/path, on this machine"
        )
    return Path(os.fsdecode(raw))


def _list(ref: ModelRef) -> Listing:
    root = _path(ref)
    with source_errors(f"list {root}"):
        try:
            names = [(root, root.name)] if not root.is_dir() else list(_walk(root))
            # What is left out may be anything; of one archive, the patterns are for what is in it.
            alone = is_archive([name for _, name in names])
            files = [
                _file(path, name)
                for path, name in names
                if alone or path == root or selected(name, ref)
            ]
        except (FileNotFoundError, NotADirectoryError) as error:
            # Also a link that points nowhere, and a file that went while we looked.
            raise AgentError(
                Reason.FILE_NOT_FOUND, f"{error.filename or root} does not exist"
            ) from error
    pinned = "".join(
        f"{file.path}\0{file.version}\0" for file in sorted(files, key=lambda f: f.path)
    )
    revision = hashlib.sha256(pinned.encode(errors="surrogatepass")).hexdigest()[:40]
    return pack(ref, revision, files[0]) if alone else pin(ref, revision, files)


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    for directory, _, names in os.walk(root, onerror=_raise):
        for name in names:
            path = Path(directory, name)
            yield path, str(path.relative_to(root))


def _raise(error: OSError) -> None:
    raise error


def _file(path: Path, name: str) -> RemoteFile:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise AgentError(Reason.UNSAFE_PATH, f"{path} is not a regular file")
    return RemoteFile(path=name, size=found.st_size, origin=name, version=version_of(found))
