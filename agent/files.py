"""The verbs of a file system that a crash cannot tear: what `store` is written in.

The seam to the outside world of the store. Each verb is one step between two of which a machine can
die; the crash tests run the store on a subclass that dies at every one of them.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.errors import AgentError, Reason

_REASONS = {
    errno.ENOSPC: Reason.DISK_FULL,
    errno.EDQUOT: Reason.DISK_FULL,
    errno.EROFS: Reason.READ_ONLY,
    errno.EACCES: Reason.PERMISSION_DENIED,
    errno.EPERM: Reason.PERMISSION_DENIED,
    errno.EIO: Reason.DISK_ERROR,
    errno.ESTALE: Reason.DISK_ERROR,
    errno.EUCLEAN: Reason.DISK_ERROR,
    errno.ENAMETOOLONG: Reason.UNSAFE_PATH,
}


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Map the OSErrors of a disk to reasons. `what` was being done, for the message."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, Reason.DISK_ERROR)
        raise AgentError(reason, f"cannot {what}: {error.strerror or error}") from error


@contextmanager
def source_errors(what: str) -> Iterator[None]:
    """The same for what a model is copied from: not our disk, and not ours to make readable."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        raise AgentError(Reason.SOURCE_UNREADABLE, f"cannot {what}: {text}") from error


def version_of(found: os.stat_result) -> str:
    """A token for exactly the bytes a file has now, as far as a file system can tell."""
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}"


def seconds_of(found: os.stat_result) -> int:
    """When a file was written, whole Unix seconds, rounded down: as a float it may round up."""
    return found.st_mtime_ns // 10**9


class Files:
    """The real file system."""

    def make_directory(self, path: Path, mode: int) -> None:
        """Make one directory, parents present, with exactly this mode whatever the umask.

        One that is there gets the mode too: its maker may have been killed before it came to that,
        and kubelet's fsGroup opens what it finds to a group.
        """
        try:
            path.mkdir(mode)
        except FileExistsError:
            if path.is_symlink() or not path.is_dir():
                raise
        if stat.S_IMODE(path.stat().st_mode) != mode:
            with suppress(PermissionError):  # another's: whether we may write is seen soon enough
                path.chmod(mode)

    def write(self, path: Path, data: bytes, mode: int) -> None:
        """Write a whole file under a name that nobody reads yet, and fsync it.

        Any previous attempt under that name is replaced, never continued.
        """
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(path, flags, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)
                file.write(data)
                file.flush()
                os.fsync(descriptor)
        except OSError:
            with suppress(OSError):  # half a note on a full disk is in everybody's way
                path.unlink()
            raise

    def rename(self, source: Path, target: Path) -> None:
        """Atomic. Replaces a file, or an empty directory."""
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name on the same file system. No symlink is followed."""
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def set_mode(self, path: Path, mode: int) -> None:
        """Give a file or directory exactly this mode, durably. No symlink is followed."""
        if stat.S_IMODE(path.lstat().st_mode) != mode:
            path.chmod(mode)
            _sync(path, os.O_NOFOLLOW)

    def backdate(self, path: Path, latest: int) -> None:
        """Take the time of a file that was written later (Unix seconds) back to that, durably."""
        found = path.lstat()
        if seconds_of(found) > latest:
            os.utime(path, ns=(found.st_atime_ns, latest * 10**9), follow_symlinks=False)
            _sync(path, os.O_NOFOLLOW)

    def sync_file(self, path: Path) -> None:
        """Make the bytes of a file that somebody else wrote survive a power cut."""
        _sync(path, os.O_NOFOLLOW | os.O_NONBLOCK)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory survive a power cut."""
        _sync(path, os.O_DIRECTORY)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Unlink a tree that nobody may be reading. Follows no symlink (rmtree does not)."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def replace_file(self, path: Path, data: bytes, mode: int) -> None:
        """Replace a small file so that a reader sees the old text or the new, after a crash too."""
        aside = path.with_name(f".{path.name}.new")
        self.write(aside, data, mode)
        self.rename(aside, path)
        self.sync_directory(path.parent)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
