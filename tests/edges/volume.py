"""Small models on a volume, what must be true of that volume, and ways for its agent to die."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import pytest

from agent import layout, manifest
from agent.files import Files
from agent.manifest import Manifest
from agent.model import CacheKey, Digest, Listing, ModelRef, RemoteFile, cache_key
from agent.store import Store

URI = "hf://org/model"
CONTENTS: Mapping[str, bytes] = {
    "config.json": b"{}",
    "empty": b"",
    "weights/deep/b.bin": b"b" * 33,
    "weights/shard.bin": b"a" * 70,
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def listing(
    contents: Mapping[str, bytes] = CONTENTS,
    *,
    uri: str = URI,
    revision: str = "r1",
    promised: bool = True,
) -> Listing:
    return Listing(
        ref=ModelRef(uri=uri),
        revision=revision,
        files=tuple(
            RemoteFile(
                path=path,
                size=len(data),
                origin=path,
                digest=Digest("sha256", sha256(data)) if promised else None,
            )
            for path, data in sorted(contents.items())
        ),
    )


def sealed(pinned: Listing, contents: Mapping[str, bytes] = CONTENTS) -> Manifest:
    digests = {path: sha256(data) for path, data in contents.items()}
    return manifest.seal(pinned, digests, sealed_at=1_700_000_000)


def bring(store: Store, key: CacheKey, contents: Mapping[str, bytes]) -> None:
    """What the transfer engine leaves of files: written, proven, fsynced, named."""
    for path, data in contents.items():
        write(store.partial(key) / path, data, mode=layout.FILE_MODE)
        store.promote(key, path)


def write(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def finish(store: Store, pinned: Listing, contents: Mapping[str, bytes] = CONTENTS) -> None:
    """What a fetch does from any state: nothing that is found is believed before a hash."""
    key = pinned.key
    store.begin(pinned)
    for path, data in contents.items():
        found = store.tree(key) / path
        if found.is_symlink() or not found.is_file() or found.read_bytes() != data:
            store.discard(key, path)
            bring(store, key, {path: data})
    store.seal(sealed(pinned, contents))


def take_over(store: Store, pinned: Listing, contents: Mapping[str, bytes] = CONTENTS) -> None:
    """The same where somebody else's directory may have the place."""
    if store.foreign(pinned.key) is None:
        finish(store, pinned, contents)
    else:
        bring_beside(store, pinned, contents)
        store.make_ready(sealed(pinned, contents))
        store.exchange(sealed(pinned, contents))


def bring_beside(store: Store, pinned: Listing, contents: Mapping[str, bytes] = CONTENTS) -> None:
    """Adopt what is there and right, bring the rest."""
    key = pinned.key
    store.begin(pinned)
    for path, data in contents.items():
        found, theirs = store.tree(key) / path, store.model(key) / path
        if not found.is_file() or found.read_bytes() != data:
            store.discard(key, path)
            right = theirs.is_file() and theirs.read_bytes() == data
            if not (right and store.adopt(key, path, theirs)):
                bring(store, key, {path: data})


def leave(root: Path, contents: Mapping[str, bytes], *, uri: str = URI) -> Path:
    """What another agent leaves in the place of a model."""
    directory = root / layout.model(cache_key(uri))
    for path, data in contents.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        write(directory / path, data, mode=0o644)
    return directory


def sealed_store(
    root: Path, contents: Mapping[str, bytes] = CONTENTS, *, uri: str = URI, files: Files
) -> Store:
    """An open store with one sealed model."""
    store = Store(root, files)
    store.open()
    finish(store, listing(contents, uri=uri), contents)
    return store


# -- what must be true --------------------------------------------------------------------------


def on_offer(root: Path) -> list[CacheKey]:
    names = sorted(path.name for path in (root / layout.MANIFESTS).iterdir())
    return [CacheKey(name) for name in names if layout.is_key(name)]


def check_offers(root: Path, *, vandalised: Iterable[CacheKey] = ()) -> None:
    """Whatever has a manifest has a directory that matches it, byte for byte and mode for mode."""
    for key in on_offer(root):
        if key not in set(vandalised):
            text = (root / layout.manifest(key)).read_text()
            check_model(root / layout.model(key), manifest.parse(text))


def check_model(directory: Path, found: Manifest) -> None:
    files = {str(path.relative_to(directory)): path for path in files_below(directory)}
    assert sorted(files) == sorted(file.path for file in found.files)
    for file in found.files:
        path = files[file.path]
        assert mode_of(path) == 0o444, path
        data = path.read_bytes()
        assert (len(data), sha256(data)) == (file.size, file.sha256), path
    for name, _, _ in os.walk(directory):
        assert mode_of(Path(name)) == 0o755, name


def check_accounted(root: Path, *, foreign: Iterable[CacheKey] = ()) -> None:
    """After a recovery nothing lies about that no list of the store speaks of."""
    store, notes = Store(root), on_offer(root)
    assert sorted(path.name for path in (root / layout.MANIFESTS).iterdir()) == notes
    for directory in (root / layout.MODELS).iterdir():
        key = CacheKey(directory.name)
        assert key in notes or key in set(foreign) or not any(directory.iterdir()), directory
    for directory in (root / layout.INGEST).iterdir():
        key = CacheKey(directory.name)
        assert store.listing(key) is not None or key in store.salvaged(), directory
    assert not any((root / layout.PROGRESS).iterdir())
    hidden = {path.name for path in (root / layout.HIDDEN).iterdir()}
    assert hidden == {"manifests", "progress", "pins", "ingest", "trash", "lock"}
    assert {path.name for path in root.iterdir()} == {layout.MODELS, layout.HIDDEN}


def held(root: Path, key: CacheKey, contents: Mapping[str, bytes] = CONTENTS) -> bool:
    """Whether every byte of a model is still where a seal can be made of it, or was."""
    places = [root / layout.ingest(key) / layout.TREE]
    if key in on_offer(root):
        places.append(root / layout.model(key))
    return any(holds(place, contents) for place in places)


def holds(directory: Path, contents: Mapping[str, bytes]) -> bool:
    return all(
        (directory / path).is_file() and (directory / path).read_bytes() == data
        for path, data in contents.items()
    )


def files_below(root: Path) -> Iterator[Path]:
    for directory, directories, names in os.walk(root):
        links = [name for name in directories if Path(directory, name).is_symlink()]
        yield from (Path(directory, name) for name in (*names, *links))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Every name below, with what a second look would notice."""
    result: dict[str, tuple[object, ...]] = {}
    for directory, directories, names in os.walk(root):
        for path in (Path(directory, name) for name in (*directories, *names)):
            found = path.lstat()
            if path.is_symlink():
                body: object = str(path.readlink())
            else:
                body = path.read_bytes() if path.is_file() else None
            result[str(path.relative_to(root))] = (found.st_ino, mode_of(path), body)
    return result


# -- ways to die --------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is no more. Nothing may catch it but the test."""


class Mortal(Files):
    """A file system whose user dies at verb number `at`: before it, in the middle, or after it.

    A copy of `real` for the rest. `steps` are the verbs that were begun.
    """

    def __init__(
        self, at: int | None = None, how: str = "before", real: Files | None = None
    ) -> None:
        self.at = at
        self.how = how
        self.steps: list[str] = []
        self._real = real or Files()

    def _step(
        self, what: str, act: Callable[[], None], torn: Callable[[], None] | None = None
    ) -> None:
        assert self.at is None or len(self.steps) <= self.at, f"{what} after death"
        dies = len(self.steps) == self.at
        self.steps.append(what)
        if not dies:
            return act()
        if self.how == "after":
            act()
        elif self.how == "torn" and torn is not None:
            torn()
        raise Killed(f"{self.how} {what}")

    def make_directory(self, path: Path, mode: int, *, below: Path | None = None) -> None:
        def torn() -> None:  # made, and its mode not set: the umask's worst
            if not path.exists():
                path.mkdir(0o700)

        self._step(f"make {path}", lambda: self._real.make_directory(path, mode, below=below), torn)

    def write(self, path: Path, data: bytes, mode: int) -> None:
        def torn() -> None:
            path.unlink(missing_ok=True)
            path.write_bytes(data[: len(data) // 2])

        self._step(f"write {path}", lambda: self._real.write(path, data, mode), torn)

    def rename(self, source: Path, target: Path, *, below: Path | None = None) -> None:
        self._step(
            f"rename {source} {target}", lambda: self._real.rename(source, target, below=below)
        )

    def unlink(self, path: Path, *, below: Path | None = None) -> None:
        self._step(f"unlink {path}", lambda: self._real.unlink(path, below=below))

    def link(self, source: Path, target: Path, *, below: Path | None = None) -> None:
        self._step(f"link {source} {target}", lambda: self._real.link(source, target, below=below))

    def backdate(self, path: Path, latest: int, *, below: Path | None = None) -> None:
        self._step(f"backdate {path}", lambda: self._real.backdate(path, latest, below=below))

    def set_mode(self, path: Path, mode: int, *, below: Path | None = None) -> None:
        self._step(f"mode {path}", lambda: self._real.set_mode(path, mode, below=below))

    def sync_file(self, path: Path) -> None:
        self._step(f"sync {path}", lambda: self._real.sync_file(path))

    def sync_directory(self, path: Path) -> None:
        self._step(f"sync {path}", lambda: self._real.sync_directory(path))

    def remove_directory(self, path: Path, *, below: Path | None = None) -> None:
        self._step(f"rmdir {path}", lambda: self._real.remove_directory(path, below=below))

    def remove_tree(self, path: Path) -> None:
        def torn() -> None:
            for file in list(files_below(path))[:1]:
                file.unlink()

        self._step(f"remove {path}", lambda: self._real.remove_tree(path), torn)


HOW = ("before", "torn", "after")


# -- somewhere to do all this -------------------------------------------------------------------


@contextmanager
def fast_directory() -> Iterator[Path]:
    """In memory where possible: these tests fsync thousands of times, and prove no disk."""
    shm = Path("/dev/shm")
    path = Path(mkdtemp(prefix="localmodel-test-", dir=shm if os.access(shm, os.W_OK) else None))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def in_child(
    function: Callable[..., None], *arguments: object, wrap: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a function of a test module in a process of its own; its failure is the test's."""
    code = (
        f"import sys; from {function.__module__} import {function.__qualname__} as run; "
        "run(*sys.argv[1:])"
    )
    done = subprocess.run(
        [*wrap, sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


UNSHARE = ("unshare", "--mount", "--propagation", "private")

_mount = subprocess.run(
    [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
)
needs_mounts = pytest.mark.skipif(
    _mount.returncode != 0,
    reason="NEEDS ROOT: no file system can be mounted here; FULL DISKS ARE NOT TESTED for real",
)


@contextmanager
def mounted(options: str) -> Iterator[Path]:
    """A file system in memory, in the mount namespace of this process: a child under UNSHARE."""
    with TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "--lazy", name], check=True)


def fill(root: Path) -> Path:
    """Use the last byte; the file to remove to have space again."""
    filler = root / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (64 * 1024, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return filler


def key_of(uri: str = URI) -> CacheKey:
    return cache_key(uri)
