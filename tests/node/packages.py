"""Programs and base files from the host's own Debian or Ubuntu packages, unpacked, not installed.

apt knows where packages come from and checks their signatures; `dpkg` unpacks them into a cache
directory outside the checkout. No package's script ever runs and the host stays as it was.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localmodel-agent/node"

_HOST_TOOLS = ("apt-get", "dpkg", "ldconfig", "unshare", "nsenter", "setpriv", "ip", "openssl")


def lacks() -> str:
    """Why no node can run here; "" where one can."""
    missing = [tool for tool in _HOST_TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}; a Debian or Ubuntu machine has them"
    return "" if os.geteuid() == 0 else "needs root"


def need_host() -> None:
    """Skip, with one line that says why, where no node can run; with CI=true that is a failure."""
    if not (lack := lacks()):
        return
    told = f"NOT TESTED on a real node: {lack}"
    if os.environ.get("CI") == "true":
        pytest.fail(told, pytrace=False)
    pytest.skip(told)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Alone among all test runs of this machine: a second one waits here for the first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, which `make` fills if it is not there. One that was cut off leaves no half of it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
        make(aside)
        aside.rename(path)
    return path


def unpacked(*names: str) -> Path:
    """A directory tree with these packages alone."""

    def make(tree: Path) -> None:
        tree.mkdir()
        run("apt-get", "--quiet=2", "download", *names, cwd=tree)
        _unpack(tree, tree)

    return made_once(_place("packages", names), make)


def unpacked_with_dependencies(*names: str, on_host: bool) -> Path:
    """The same with what they depend on: all of it, or, `on_host`, only what this host lacks."""

    def make(tree: Path) -> None:
        archives = tree.with_name(f"{tree.name}.debs")
        # Debian's own layout: these four are links, and `tar` keeps them so.
        for name in ("bin", "sbin", "lib", "lib64"):
            (tree / "usr" / name).mkdir(parents=True)
            (tree / name).symlink_to(f"usr/{name}")
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        installed = () if on_host else ("--option=Dir::State::status=/dev/null",)
        run("apt-get", "--quiet=2", "--yes", "--download-only", "--no-install-recommends",
            f"--option=Dir::Cache::archives={archives}", "--option=Debug::NoLocking=1",
            *installed, "install", *names)  # fmt: skip
        _unpack(archives, tree)
        shutil.rmtree(archives)

    return made_once(_place("on-host" if on_host else "complete", names), make)


def make_mount_points(*paths: str) -> None:
    for path in paths:
        Path(path).mkdir(parents=True, exist_ok=True)


def remove_mount_points(*paths: str) -> None:
    for path in paths:
        with suppress(OSError):  # the host has it in use
            Path(path).rmdir()


def run(*command: str | Path, **options: object) -> str:
    """What a command prints. If it fails, the error holds what it said."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout}")
    return str(done.stdout)


def _place(kind: str, names: Sequence[str]) -> Path:
    return CACHE / kind / hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]


def _unpack(archives: Path, tree: Path) -> None:
    for package in sorted(archives.glob("*.deb")):
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
        ) as opened:
            subprocess.run(
                ["tar", "--extract", "--keep-directory-symlink", "--directory", tree],
                stdin=opened.stdout,
                check=True,
            )
        if opened.returncode != 0:
            raise RuntimeError(f"{package} does not unpack")
        package.unlink()
