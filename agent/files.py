"""The verbs of a file system that a crash cannot tear: what `store` is written in.

The seam to the outside world of the store. Each verb is one step between two of which a machine can
die; the crash tests run the store on a subclass that dies at every one of them.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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

# Neither follows a symlink. A FIFO must not make us wait.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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


def version_at(path: Path, below: Path) -> str | None:
    """The version of a file, which real directories lead to from `below`; None: there is none.

    Raises DiskError where something else leads to it.
    """
    with suppress(OSError), _reached(path, below) as (name, parent):
        return version_of(os.stat(name, dir_fd=parent, follow_symlinks=False))
    return None


def version_here(path: Path) -> str | None:
    """The version of a file, whatever leads to it; of a symlink its own. None: there is none."""
    try:
        return version_of(path.lstat())
    except OSError:
        return None


def seconds_of(found: os.stat_result) -> int:
    """When a file was written, whole Unix seconds, rounded down: as a float it may round up."""
    return found.st_mtime_ns // 10**9


class Files:
    """The real file system.

    Where somebody else may write, as a pod may into a model that is being mended, he may put a
    symlink in the place of any directory, at any time. `below` is the last directory that he
    cannot touch: from there on no link is followed, and DiskError says where one is.
    """

    def make_directory(self, path: Path, mode: int, *, below: Path | None = None) -> None:
        """Make one directory, parents present, with exactly this mode whatever the umask.

        One that is there gets the mode too: its maker may have been killed before it came to that,
        and kubelet's fsGroup opens what it finds to a group.
        """
        with _reached(path, below) as (name, parent):
            try:
                os.mkdir(name, mode, dir_fd=parent)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                    raise
            with _opened(name, _DIRECTORY, parent) as descriptor:
                if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
                    with suppress(PermissionError):  # another's: whether we may write is seen soon
                        # Not `fchmod`: that needs a right to read, which may be what is lacking.
                        Path(f"/proc/self/fd/{descriptor}").chmod(mode)

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

    def rename(self, source: Path, target: Path, *, below: Path | None = None) -> None:
        """Atomic. Replaces a file, or an empty directory."""
        with _reached(source, below) as (old, origin), _reached(target, below) as (new, parent):
            os.rename(old, new, src_dir_fd=origin, dst_dir_fd=parent)

    def link(self, source: Path, target: Path, *, below: Path | None = None) -> None:
        """Give a file a second name on the same file system. No symlink is followed.

        `below` is of the target.
        """
        with _reached(target, below) as (name, parent):
            os.link(source, name, dst_dir_fd=parent, follow_symlinks=False)

    def unlink(self, path: Path, *, below: Path | None = None) -> None:
        with suppress(FileNotFoundError), _reached(path, below) as (name, parent):
            os.unlink(name, dir_fd=parent)

    def set_mode(self, path: Path, mode: int, *, below: Path | None = None) -> None:
        """Give a file or directory exactly this mode, durably. No symlink is followed."""
        with _reached(path, below) as (name, parent), _opened(name, _FILE, parent) as descriptor:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)

    def backdate(self, path: Path, latest: int, *, below: Path | None = None) -> None:
        """Take the time of a file that was written later (Unix seconds) back to that, durably."""
        with _reached(path, below) as (name, parent), _opened(name, _FILE, parent) as descriptor:
            found = os.fstat(descriptor)
            if seconds_of(found) > latest:
                os.utime(descriptor, ns=(found.st_atime_ns, latest * 10**9))
                os.fsync(descriptor)

    def sync_file(self, path: Path) -> None:
        """Make the bytes of a file that somebody else wrote survive a power cut."""
        _sync(path, _FILE)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory survive a power cut."""
        _sync(path, os.O_DIRECTORY)

    def remove_directory(self, path: Path, *, below: Path | None = None) -> None:
        """Remove an empty directory."""
        with _reached(path, below) as (name, parent):
            os.rmdir(name, dir_fd=parent)

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


@contextmanager
def _reached(path: Path, below: Path | None) -> Iterator[tuple[str, int | None]]:
    """The name of a path and the directory it is in, held open: for the `dir_fd` of a call.

    To check the path first would not do: it may change between the check and the call.
    """
    if below is None:
        yield str(path), None
        return
    *directories, name = path.relative_to(below).parts
    with ExitStack() as opened:
        parent = opened.enter_context(_opened(str(below), _DIRECTORY, None))
        for directory in directories:
            try:
                parent = opened.enter_context(_opened(directory, _DIRECTORY, parent))
            except NotADirectoryError as error:
                raise AgentError(
                    Reason.DISK_ERROR,
                    f"{directory}, on the way to {path}, is no directory any more:"
                    " somebody else writes into the cache",
                ) from error
        yield name, parent


@contextmanager
def _opened(name: str, flags: int, parent: int | None) -> Iterator[int]:
    descriptor = os.open(name, flags, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(path: Path, flags: int) -> None:
    with _opened(str(path), os.O_RDONLY | os.O_CLOEXEC | flags, None) as descriptor:
        os.fsync(descriptor)
