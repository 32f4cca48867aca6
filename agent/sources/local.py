"""`file:///dir`, `file:///dir/file` and plain absolute paths: a model that is here already.

Nothing promises a digest, so a file is pinned by size, time and inode: one that changes while it is
read is not published. Symlinks to files are followed (a hub client's snapshot is made of them),
symlinks to directories are not.
"""

import asyncio
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from agent.errors import AgentError, Reason
from agent.files import disk_errors, version_of
from agent.model import Listing, Locator, ModelRef, PathLocator, RemoteFile
from agent.sources.base import pin


class LocalPath:
    """Files of this machine, or of a volume that is mounted into the agent."""

    def check(self, ref: ModelRef) -> None:
        _path(ref)

    async def list(self, ref: ModelRef) -> Listing:
        return await asyncio.to_thread(_list, ref)

    async def locate(self, listing: Listing, file: RemoteFile) -> Locator:
        root = _path(listing.ref)
        path = root if root.is_file() else root / file.path
        return PathLocator(path=str(path), version=file.version)


def _path(ref: ModelRef) -> Path:
    if not ref.uri.startswith("file:"):
        return Path(ref.uri)
    parts = urlsplit(ref.uri)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise AgentError(
            Reason.INVALID_SPEC, f"{ref.uri[:200]!r} must be file:///absolute/path, on this machine"
        )
    return Path(unquote(parts.path))


def _list(ref: ModelRef) -> Listing:
    root = _path(ref)
    with disk_errors(f"list {root}"):
        if not root.exists():
            raise AgentError(Reason.FILE_NOT_FOUND, f"{root} does not exist")
        files = [_file(root, root.name)] if root.is_file() else list(_walk(root))
    pinned = "".join(
        f"{file.path}\0{file.version}\0" for file in sorted(files, key=lambda f: f.path)
    )
    revision = hashlib.sha256(pinned.encode(errors="surrogateescape")).hexdigest()[:40]
    return pin(ref, revision, files)


def _walk(root: Path) -> Iterator[RemoteFile]:
    for directory, _, names in os.walk(root, onerror=_raise):
        for name in names:
            path = Path(directory, name)
            yield _file(path, str(path.relative_to(root)))


def _raise(error: OSError) -> None:
    raise error


def _file(path: Path, name: str) -> RemoteFile:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise AgentError(Reason.UNSAFE_PATH, f"{path} is not a regular file")
    return RemoteFile(path=name, size=found.st_size, origin=name, version=version_of(found))
