"""Looking at directories on disk without ever following a symlink: it could lead anywhere."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from agent.files import disk_errors, seconds_of
from agent.manifest import Manifest


def names(path: Path) -> list[str]:
    with disk_errors(f"list {path}"), suppress(FileNotFoundError, NotADirectoryError):
        return sorted(entry.name for entry in path.iterdir())
    return []


def is_directory(path: Path) -> bool:
    """Of its own, not by way of a symlink: that could lead anywhere."""
    return stat.S_ISDIR(_mode(path))


def is_odd(path: Path) -> bool:
    """Something where a model's directory would be that is no directory."""
    return _mode(path) != 0 and not is_directory(path)


def _mode(path: Path) -> int:
    """What is there; 0 for nothing. Raises AgentError where nobody can tell (EIO, EACCES, ESTALE):
    `Path.is_dir` would raise a bare OSError for the same, or call it absent in a later Python.
    """
    with (
        disk_errors(f"look at {path}"),
        suppress(FileNotFoundError, NotADirectoryError),
    ):
        return path.lstat().st_mode
    return 0


def is_file(path: Path, size: int) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def size(path: Path) -> int:
    """Bytes of a regular file; 0 where there is none."""
    try:
        found = path.lstat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def is_reached(root: Path, path: Path) -> bool:
    """Whether only real directories lead from the root to a path below it."""
    between = [parent for parent in path.parents if parent.is_relative_to(root)]
    return bool(between) and all(is_directory(parent) for parent in between)


def parents(paths: Iterable[str]) -> list[str]:
    """Every directory of these paths, parents first."""
    found: set[str] = set()
    for path in paths:
        parts = path.split("/")
        found.update("/".join(parts[:n]) for n in range(1, len(parts)))
    return sorted(found)


def files_below(root: Path) -> Iterator[Path]:
    """Everything below that is no directory of its own. Follows no symlink, not even the root."""
    if not is_directory(root):
        return
    for directory, directories, names in os.walk(root):
        for name in names:
            yield Path(directory, name)
        for name in directories:  # os.walk calls a symlink to a directory a directory
            if Path(directory, name).is_symlink():
                yield Path(directory, name)


def everything_below(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All there is below a directory: relative path and facts, of the root itself under "".

    Follows no symlink. Raises OSError for a directory that cannot be read: nobody could tell then
    what is in it.
    """

    def unreadable(error: OSError) -> None:
        raise error

    yield "", root.lstat()
    for directory, directories, names in os.walk(root, onerror=unreadable):
        for path in (Path(directory, name) for name in (*directories, *names)):
            with suppress(FileNotFoundError):
                yield str(path.relative_to(root)), path.lstat()


def directories_below(root: Path) -> list[Path]:
    """The root and every directory below it, children first. Follows no symlink, as above."""
    if not is_directory(root):
        return []
    return [Path(directory) for directory, _, _ in os.walk(root, topdown=False)]


def not_whole(root: Path, found: Manifest) -> list[str]:
    """The paths that are not regular files of their sizes in real directories."""
    real = {""} if is_directory(root) else set()
    for directory in parents(file.path for file in found.files):
        if directory.rpartition("/")[0] in real and is_directory(root / directory):
            real.add(directory)
    return [
        file.path
        for file in found.files
        if file.path.rpartition("/")[0] not in real or not is_file(root / file.path, file.size)
    ]


def written_to(root: Path, found: Manifest) -> list[str]:
    """The paths of files whose time says that somebody wrote into them after the seal."""
    return [path for path, file in _files(root, found) if seconds_of(file) > found.sealed_at]


def shared(root: Path, found: Manifest) -> frozenset[tuple[int, int]]:
    """Inode and size of the files that have another name elsewhere."""
    return frozenset(
        (file.st_ino, file.st_size) for _, file in _files(root, found) if file.st_nlink > 1
    )


def _files(root: Path, found: Manifest) -> Iterator[tuple[str, os.stat_result]]:
    """The files of a manifest that are there, in its order."""
    for file in found.files:
        with suppress(OSError):
            yield file.path, (root / file.path).lstat()
