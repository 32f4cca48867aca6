"""The store on an ordinary day, and beside people who touch its directories."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from unittest.mock import patch

import pytest

from agent import layout
from agent.errors import AgentError, Reason
from agent.files import Files
from agent.model import Digest, Listing, ModelRef, RemoteFile
from agent.store import Store
from tests.edges.volume import (
    CONTENTS,
    Killed,
    Mortal,
    bring,
    bring_beside,
    check_offers,
    fast_directory,
    files_below,
    finish,
    holds,
    in_child,
    key_of,
    leave,
    listing,
    mode_of,
    on_offer,
    sealed,
    sha256,
    snapshot,
    take_over,
    write,
)

KEY = key_of()
NEWER = {**CONTENTS, "weights/shard.bin": b"n" * 70, "more/new.bin": b"new"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "volume"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    opened = Store(root)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def offered(store: Store) -> Store:
    """With one model sealed."""
    finish(store, listing())
    return store


def reason(caught: pytest.ExceptionInfo[AgentError]) -> Reason:
    return caught.value.reason


# -- the lock -----------------------------------------------------------------------------------


def test_a_second_store_is_told_who_has_the_volume(store: Store, root: Path) -> None:
    with pytest.raises(AgentError, match=rf"process {os.getpid()}\) already manages") as caught:
        Store(root).open()
    assert reason(caught) is Reason.LOCKED


def test_closing_frees_the_volume(store: Store, root: Path) -> None:
    store.close()
    store.close()  # twice is no harm
    again = Store(root)
    again.open()
    again.close()


_HOLD = """
import sys, time
from pathlib import Path
from agent.store import Store
Store(Path(sys.argv[1])).open()
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_frees_the_volume_when_it_is_killed(root: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(root)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AgentError, match=f"process {holder.pid}"):
            Store(root).open()
        holder.send_signal(signal.SIGKILL)
    store = Store(root)
    store.open()
    store.close()


def test_a_failed_open_does_not_lock_out_the_next(root: Path) -> None:
    class Once(Files):
        failed = False

        def make_directory(self, path: Path, mode: int, *, below: Path | None = None) -> None:
            if path.name == layout.MODELS and not self.failed:
                self.failed = True
                raise OSError(28, "No space left on device")
            super().make_directory(path, mode, below=below)

    store = Store(root, Once())
    with pytest.raises(AgentError) as caught:
        store.open()
    assert reason(caught) is Reason.DISK_FULL
    store.open()
    store.close()


def test_a_lock_that_is_a_symlink_is_not_followed(root: Path, tmp_path: Path) -> None:
    (root / layout.HIDDEN).mkdir(parents=True)
    (root / layout.LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AgentError):
        Store(root).open()
    assert not (tmp_path / "elsewhere").exists()


# -- where it may not write ---------------------------------------------------------------------


def test_a_read_only_file_system_is_named_as_such(root: Path) -> None:
    class ReadOnly(Files):
        def make_directory(self, path: Path, mode: int, *, below: Path | None = None) -> None:
            raise OSError(30, "Read-only file system")

    with pytest.raises(AgentError, match="Read-only file system") as caught:
        Store(root, ReadOnly()).open()
    assert reason(caught) is Reason.READ_ONLY


def test_a_file_in_the_place_of_the_volume_is_an_error_of_ours(root: Path) -> None:
    root.write_text("not a directory")
    with pytest.raises(AgentError) as caught:
        Store(root).open()
    assert reason(caught) is Reason.DISK_ERROR


def open_as_nobody(root: str) -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        Store(Path(root)).open()
    except AgentError as error:
        print(error.reason.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: another user is to be refused")
@pytest.mark.parametrize("prepared", [False, True])
def test_another_user_is_denied(prepared: bool) -> None:
    with fast_directory() as directory:
        directory.chmod(0o711)
        if prepared:
            store = Store(directory / "volume")
            store.open()
            store.close()
        done = in_child(open_as_nobody, directory / "volume")
    assert done.stdout == f"{Reason.PERMISSION_DENIED.value}\n"


# -- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(root: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = Store(root)
        store.open()
        store.begin(listing())
        for path, data in CONTENTS.items():
            write(store.partial(KEY) / path, data)  # the engine's own mode does not matter either
            store.promote(KEY, path)
        store.write_progress(KEY, "wait 1 2 3")
        assert mode_of(root / layout.progress(KEY)) == 0o644
        assert mode_of(root / layout.ingest(KEY)) == 0o700
        store.seal(sealed(listing()))
        store.close()
    finally:
        os.umask(before)
    private = {layout.INGEST, layout.TRASH}
    for name in (layout.MODELS, layout.HIDDEN, layout.MANIFESTS, layout.PROGRESS, layout.PINS):
        assert mode_of(root / name) == 0o755, name
    assert {mode_of(root / name) for name in private} == {0o700}
    assert mode_of(root) == 0o755
    assert mode_of(root / layout.manifest(KEY)) == 0o644
    check_offers(root)  # 0755 and 0444 in the model


def test_modes_that_somebody_opened_are_closed_again(offered: Store, root: Path) -> None:
    """As kubelet does for a pod with an fsGroup, through a mount that is not read-only."""
    for path in [root / layout.model(KEY), *(root / layout.model(KEY)).rglob("*")]:
        path.chmod(0o2775 if path.is_dir() else 0o664)
    (root / layout.INGEST).chmod(0o2775)
    offered.reopen(KEY)
    finish(offered, listing())
    check_offers(root)
    offered.reopen(KEY)
    (offered.tree(KEY) / "weights").chmod(0o2775)  # a pod that mounts it may start at any time
    offered.seal(sealed(listing()))
    check_offers(root)
    offered.close()
    offered.open()
    assert mode_of(root / layout.INGEST) == 0o700


# -- an ingest ----------------------------------------------------------------------------------


def test_an_ingest_is_what_was_begun_and_how_far_it_is(store: Store) -> None:
    store.begin(listing())
    (ingest,) = store.ingests().values()
    assert (ingest.ref.uri, ingest.revision, ingest.total, ingest.done) == (
        listing().ref.uri,
        "r1",
        105,
        0,
    )
    bring(store, KEY, {"config.json": b"{}"})
    write(store.partial(KEY) / "weights/shard.bin", b"a" * 30)
    assert store.ingests()[KEY].done == 32
    write(store.partial(KEY) / "weights/shard.bin", b"a" * 300)  # more than is counted
    assert store.ingests()[KEY].remaining == 33
    assert store.listing(KEY) == listing()


def test_the_same_listing_is_continued(store: Store, root: Path) -> None:
    store.begin(listing())
    bring(store, KEY, {"config.json": b"{}"})
    write(store.partial(KEY) / "weights/shard.bin", b"aaa")
    inodes = {path: path.stat().st_ino for path in files_below(root) if path.name != "listing.json"}
    store.begin(listing())
    assert inodes.items() <= {path: path.stat().st_ino for path in files_below(root)}.items()


def test_the_same_listing_is_continued_even_without_promises(store: Store) -> None:
    """The revision pins the bytes; what has no promise is the fetcher's to distrust."""
    store.begin(listing(promised=False))
    bring(store, KEY, {"config.json": b"{}"})
    store.begin(listing(promised=False))
    assert (store.tree(KEY) / "config.json").exists()


def test_another_listing_keeps_what_can_be_proven_and_drops_the_rest(store: Store) -> None:
    store.begin(listing())
    bring(store, KEY, {path: CONTENTS[path] for path in ("config.json", "weights/shard.bin")})
    write(store.partial(KEY) / "weights/deep/b.bin", b"b" * 10)
    newer = {path: data for path, data in NEWER.items() if path != "weights/deep/b.bin"}
    store.begin(listing(newer, revision="r2"))
    assert _names(store.tree(KEY)) == ["config.json"]
    assert _names(store.partial(KEY)) == []
    assert not (store.partial(KEY) / "weights/deep").exists()
    finish(store, listing(newer, revision="r2"), newer)


def test_another_listing_without_promises_keeps_nothing(store: Store) -> None:
    """There would be nothing to compare the bytes with."""
    store.begin(listing(promised=False))
    bring(store, KEY, {"config.json": b"{}"})
    store.begin(listing(promised=False, revision="r2"))
    assert _names(store.tree(KEY)) == []


def test_a_repair_that_is_listed_again_keeps_its_bytes(offered: Store) -> None:
    """A repair's listing names our own digests, and no origins; the source's names both anew."""
    offered.reopen(KEY)
    pinned = offered.listing(KEY)
    assert pinned is not None
    assert {file.origin for file in pinned.files} == {""}
    config = RemoteFile(path="config.json", size=2, origin="x", digest=Digest("git-sha1", "0" * 40))
    offered.begin(replace(listing(), files=(config, *listing().files[1:])))
    assert _names(offered.tree(KEY)) == sorted(CONTENTS)


def test_a_file_may_become_a_directory_and_the_reverse(store: Store) -> None:
    first = {"a": b"file", "b/c": b"in a directory"}
    second = {"a/d": b"in a directory", "b": b"file"}
    for contents, revision in ((first, "r1"), (second, "r2"), (first, "r3")):
        pinned = listing(contents, revision=revision)
        store.begin(pinned)
        bring(store, KEY, contents)
    finish(store, pinned, first)
    assert holds(store.model(KEY), first)


def test_what_turned_out_wrong_is_discarded(store: Store) -> None:
    store.begin(listing())
    bring(store, KEY, {"config.json": b"[]"})
    store.discard(KEY, "config.json")
    store.discard(KEY, "config.json")  # nothing there is what was wanted
    assert _names(store.tree(KEY)) == []
    assert store.ingests()[KEY].done == 0


def test_begin_clears_what_nobody_listed(store: Store, tmp_path: Path) -> None:
    store.begin(listing())
    write(store.tree(KEY) / "litter", b"?")
    (store.tree(KEY) / "weights/deep").rmdir()
    write(store.tree(KEY) / "weights/deep", b"a file where a directory belongs")
    (store.partial(KEY) / "out").symlink_to(tmp_path)
    store.begin(listing())
    assert _names(store.tree(KEY)) == []
    assert (store.tree(KEY) / "weights/deep").is_dir()
    assert tmp_path.exists()


def test_hostile_names_are_refused_before_anything_is_made(store: Store, root: Path) -> None:
    before = snapshot(root)
    for name in ("../../outside", "/absolute", "a\nb", "a/../../b"):
        with pytest.raises(AgentError) as caught:
            store.begin(listing({name: b""}))
        assert reason(caught) is Reason.UNSAFE_PATH
    assert snapshot(root) == before


def test_a_listing_that_cannot_be_read_is_none(store: Store, root: Path) -> None:
    store.begin(listing())
    path = root / layout.ingest(KEY) / layout.LISTING
    other = json.loads(path.read_bytes())
    other["ref"]["uri"] = "hf://org/other"
    for data in (b"", b"{", b"[]", b"null", b'{"ref": 1}', b"\xff", json.dumps(other).encode()):
        write(path, data)
        assert store.listing(KEY) is None
        assert store.ingests() == {}


def test_abandoning_gives_the_bytes_to_the_sweeper(store: Store, root: Path) -> None:
    store.begin(listing())
    bring(store, KEY, {"config.json": b"{}"})
    store.write_progress(KEY, "wait 1 2 3")
    store.abandon(KEY)
    store.abandon(KEY)  # nothing to give up is no harm
    assert store.ingests() == {}
    assert not (root / layout.progress(KEY)).exists()
    assert store.sweep() == 1
    assert _names(root / layout.TRASH) == []


# -- the seal -----------------------------------------------------------------------------------


def test_a_sealed_model_is_exactly_its_files(offered: Store, root: Path) -> None:
    check_offers(root)
    assert on_offer(root) == [KEY]
    assert offered.ingests() == {}
    assert offered.manifest(KEY) == sealed(listing())
    assert [entry.bytes for entry in offered.entries()] == [105]
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", str(root / layout.manifest(KEY))],
        cwd=offered.model(KEY),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_nobody_listed_is_never_sealed(store: Store, root: Path, tmp_path: Path) -> None:
    store.begin(listing())
    bring(store, KEY, CONTENTS)
    write(store.tree(KEY) / "weights/extra", b"?")
    (store.tree(KEY) / "unlisted/empty").mkdir(parents=True)
    (store.tree(KEY) / "to-a-file").symlink_to("/etc/passwd")
    (store.tree(KEY) / "to-a-directory").symlink_to(tmp_path)
    write(tmp_path / "theirs", b"?")
    store.seal(sealed(listing()))
    check_offers(root)
    assert sorted(path.name for path in store.model(KEY).iterdir()) == [
        "config.json",
        "empty",
        "weights",
    ]
    assert (tmp_path / "theirs").exists()


@pytest.mark.parametrize("how", ["missing", "short", "symlink", "directory", "linked parent"])
def test_what_is_not_there_is_not_sealed(store: Store, root: Path, how: str) -> None:
    store.begin(listing())
    bring(store, KEY, CONTENTS)
    _damage(store.tree(KEY), how)
    with pytest.raises(AgentError, match=r"weights/(shard|deep).* changed on the disk") as caught:
        store.seal(sealed(listing()))
    assert reason(caught) is Reason.DISK_ERROR
    assert list((root / layout.MANIFESTS).iterdir()) == []
    finish(store, listing())
    check_offers(root)


def test_an_empty_directory_is_sealed_over(store: Store, root: Path) -> None:
    (root / layout.model(KEY)).mkdir()
    finish(store, listing())
    check_offers(root)


@pytest.mark.parametrize("kind", ["directory", "file", "symlink", "dangling"])
def test_what_is_not_ours_is_never_replaced(
    store: Store, root: Path, tmp_path: Path, kind: str
) -> None:
    store.begin(listing())
    bring(store, KEY, CONTENTS)
    target = root / layout.model(KEY)
    _put(target, kind, tmp_path)
    before = snapshot(root)
    with pytest.raises(AgentError, match="exists and is not ours") as caught:
        store.seal(sealed(listing()))
    assert reason(caught) is Reason.FOREIGN_DIRECTORY
    assert snapshot(root) == before  # above all: no note that would call it ours
    assert not (tmp_path / "elsewhere/config.json").exists()
    if kind != "directory":  # whose place can be taken, with more ado: `exchange`
        with pytest.raises(AgentError) as caught:
            store.begin(listing())  # not one more byte for a seal that cannot be
        assert reason(caught) is Reason.FOREIGN_DIRECTORY
    assert store.recover() == [KEY]
    assert store.entries() == []
    _remove(target)
    finish(store, listing())
    check_offers(root)


def test_what_another_wrote_is_durable_before_it_has_a_name_of_ours(root: Path) -> None:
    """It may be in the page cache only, and would be hashed there."""
    files = Mortal()
    store = Store(root, files)
    store.open()
    source = leave(root, CONTENTS) / "config.json"
    store.begin(listing())
    files.steps.clear()
    assert store.adopt(KEY, "config.json", source)
    target = store.tree(KEY) / "config.json"
    assert files.steps[:2] == [f"sync {source}", f"link {source} {target}"]
    assert not store.adopt(KEY, "weights/shard.bin", source.with_name("no")), "it has gone"
    store.close()


@pytest.mark.parametrize("by", ["partial", "tree"])
def test_another_file_begun_in_its_place_says_that_it_was_wrong(
    store: Store, root: Path, by: str
) -> None:
    leave(root, CONTENTS)
    store.begin(listing())
    found = store.foreign(KEY)
    assert found is not None
    assert found.whole
    if by == "tree":
        bring(store, KEY, {"config.json": CONTENTS["config.json"]})
    else:
        write(store.partial(KEY) / "config.json", b"")
    found = store.foreign(KEY)
    assert found is not None
    assert found.lacking == frozenset({"config.json"})


def test_what_is_ours_or_empty_is_not_foreign(store: Store, root: Path) -> None:
    assert store.foreign(KEY) is None
    (root / layout.model(KEY)).mkdir()
    assert store.foreign(KEY) is None
    finish(store, listing())
    assert store.foreign(KEY) is None
    store.begin_retire(KEY)
    assert store.foreign(KEY) is None


def test_of_two_that_are_not_ours_neither_is_lost(store: Store, root: Path) -> None:
    """Killed between the two renames, and somebody was faster than the next start."""
    target, aside = root / layout.model(KEY), root / layout.ingest(KEY) / layout.REPLACED
    leave(root, {"theirs": b"1"})
    bring_beside(store, listing())
    store.make_ready(sealed(listing()))
    target.rename(aside)
    leave(root, {"theirs": b"2"})
    for _ in range(2):
        assert store.recover() == [KEY]
        assert (aside / "theirs").read_bytes() == b"1"
        assert (target / "theirs").read_bytes() == b"2"
    with pytest.raises(AgentError, match="move one away") as caught:
        store.exchange(sealed(listing()))
    assert reason(caught) is Reason.FOREIGN_DIRECTORY
    store.abandon(KEY)
    assert store.ingests() == {}
    assert store.recover() == [KEY]
    assert (aside / "theirs").read_bytes() == b"1"
    _remove(target)
    assert store.recover() == [KEY]
    assert (target / "theirs").read_bytes() == b"1", "back in its place"
    take_over(store, listing())
    check_offers(root)
    assert _names(root / layout.INGEST) == []


def test_what_appears_in_the_last_moment_is_not_replaced_either(root: Path) -> None:
    target = root / layout.model(KEY)

    class Late(Files):
        def rename(self, source: Path, target_: Path, *, below: Path | None = None) -> None:
            if target_ == target and not target.exists():
                target.mkdir()
                write(target / "theirs", b"?")
            super().rename(source, target_, below=below)

    store = Store(root, Late())
    store.open()
    with pytest.raises(AgentError) as caught:
        finish(store, listing())
    assert reason(caught) is Reason.FOREIGN_DIRECTORY
    assert _names(root / layout.MANIFESTS) == []
    store.abandon(KEY)
    assert store.recover() == [KEY]
    assert _names(target) == ["theirs"]
    store.close()


def test_a_seal_that_is_published_has_not_failed(root: Path) -> None:
    """What is left to tidy up after it must not look like an error to anybody."""

    class Untidy(Files):
        def rename(self, source: Path, target: Path, *, below: Path | None = None) -> None:
            if layout.TRASH in str(target):
                raise OSError(28, "No space left on device")
            super().rename(source, target, below=below)

    store = Store(root, Untidy())
    store.open()
    finish(store, listing())
    check_offers(root)
    store.close()
    again = Store(root)
    again.open()
    again.recover()
    assert again.ingests() == {}
    again.close()


def test_a_seal_that_failed_half_way_is_taken_up_by_the_next_try(root: Path) -> None:
    """Not at the next start only: the directory is in its place, and nobody but us put it there."""

    class Failing(Files):
        fails = True

        def sync_directory(self, path: Path) -> None:
            if path == root / layout.MODELS and self.fails:
                raise OSError(5, "Input/output error")
            super().sync_directory(path)

    files = Failing()
    store = Store(root, files)
    store.open()
    with pytest.raises(AgentError) as caught:
        finish(store, listing())
    assert reason(caught) is Reason.DISK_ERROR
    assert store.entries() == []
    files.fails = False
    inode = (store.model(KEY) / "config.json").stat().st_ino
    finish(store, listing())
    check_offers(root)
    assert (store.model(KEY) / "config.json").stat().st_ino == inode  # nothing was fetched again
    store.close()


# -- looking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["missing", "short", "symlink", "directory", "linked parent", "linked root", "all"]
)
def test_damage_is_seen(offered: Store, how: str) -> None:
    found = offered.manifest(KEY)
    assert found is not None
    assert offered.damage(KEY, found) == []
    _damage(offered.model(KEY), how)
    assert "weights/deep/b.bin" in offered.damage(KEY, found)


def test_a_file_that_was_written_after_the_seal_is_damage(offered: Store) -> None:
    """Whatever its size: wrong bytes may be of the right one."""
    found = offered.manifest(KEY)
    assert found is not None
    path = offered.model(KEY) / "weights/shard.bin"
    for late in (0, 999_999_999):  # the seal knows whole seconds only
        os.utime(path, ns=(0, found.sealed_at * 10**9 + late))
        assert offered.damage(KEY, found) == []
    os.utime(path, ns=(0, (found.sealed_at + 1) * 10**9))
    assert offered.damage(KEY, found) == ["weights/shard.bin"]
    write(path, b"short")
    assert offered.damage(KEY, found) == ["weights/shard.bin"], "once, and not twice"


def test_a_clock_that_was_set_back_damages_nothing(store: Store) -> None:
    finish(store, listing())
    store.reopen(KEY)
    for path in CONTENTS:
        os.utime(store.tree(KEY) / path, (0, 4_000_000_000))
    store.seal(sealed(listing()))
    found = store.manifest(KEY)
    assert found is not None
    assert store.damage(KEY, found) == []


def test_what_was_written_after_its_proof_is_not_sealed(store: Store) -> None:
    """Nor is its time put back, which would hide it from every look."""
    path = _proven(store) / "weights/shard.bin"
    proven = store.versions(sealed(listing()))
    path.chmod(0o644)
    path.write_bytes(b"w" * 70)
    with pytest.raises(AgentError, match=r"weights/shard.bin of .* changed on the disk") as caught:
        store.seal(sealed(listing()), proven)
    assert reason(caught) is Reason.DISK_ERROR
    assert path.stat().st_mtime > sealed(listing()).sealed_at
    assert store.entries() == []


def test_what_is_written_during_its_seal_is_not_sealed(root: Path) -> None:
    """In the second of the seal, or with a time of its own: no later look would tell."""

    class Late(Files):
        def write(self, path: Path, data: bytes, mode: int) -> None:
            super().write(path, data, mode)
            if path == root / layout.sealing(KEY) and shard.read_bytes() == proven:
                write(shard, b"w" * 70, mode=0o444)
                os.utime(shard, (0, 1_600_000_000))

    store = Store(root, Late())
    store.open()
    shard, proven = _proven(store) / "weights/shard.bin", CONTENTS["weights/shard.bin"]
    with pytest.raises(AgentError, match=r"weights/shard.bin of .* changed on the disk") as caught:
        store.seal(sealed(listing()))
    assert reason(caught) is Reason.DISK_ERROR
    assert list((root / layout.MANIFESTS).iterdir()) == []
    assert shard.read_bytes() != proven
    store.close()


def test_what_is_written_before_the_exchange_does_not_take_the_place(
    store: Store, root: Path
) -> None:
    theirs = snapshot(leave(root, {"config.json": b"{}"}))
    shard = _proven(store) / "weights/shard.bin"
    ready = store.make_ready(sealed(listing()))
    write(shard, b"w" * 70, mode=0o444)
    os.utime(shard, (0, 1_600_000_000))
    with pytest.raises(AgentError, match=r"weights/shard.bin of .* changed on the disk"):
        store.exchange(sealed(listing()), ready)
    assert snapshot(store.model(KEY)) == theirs
    assert list((root / layout.MANIFESTS).iterdir()) == [], "nothing that says it were ours"


def _proven(store: Store) -> Path:
    """The tree of an ingest that is complete."""
    store.begin(listing())
    bring(store, KEY, CONTENTS)
    return store.tree(KEY)


# -- sharing ------------------------------------------------------------------------------------


def test_the_copies_of_a_file_are_known_by_its_bytes(offered: Store) -> None:
    other = key_of("hf://org/other")
    contents = {"a": CONTENTS["config.json"], "b": CONTENTS["config.json"], "c": b"c"}
    finish(offered, listing(contents, uri="hf://org/other"), contents)
    copies = offered.copies()
    config = CONTENTS["config.json"]
    found = copies[sha256(config), len(config)]
    assert sorted(found) == sorted([(KEY, "config.json"), (other, "a"), (other, "b")])
    assert (sha256(config), len(config) + 1) not in copies
    offered.begin_retire(other)
    assert offered.copies()[sha256(config), len(config)] == [(KEY, "config.json")]


def test_a_link_is_the_same_file_and_outlives_the_other(offered: Store) -> None:
    pinned = listing(NEWER, revision="r2")
    offered.begin(pinned)
    source = offered.model(KEY) / "config.json"
    write(offered.partial(KEY) / "config.json", b"{")
    assert offered.link(KEY, "config.json", source)
    linked = offered.tree(KEY) / "config.json"
    assert linked.samefile(source)
    assert not (offered.partial(KEY) / "config.json").exists()
    found = offered.manifest(KEY)
    assert found is not None
    assert offered.shared(KEY, found) == {(source.stat().st_ino, 2)}
    offered.discard(KEY, "config.json")
    assert source.read_bytes() == CONTENTS["config.json"]
    assert offered.shared(KEY, found) == frozenset()


def test_a_link_does_not_follow_what_leads_out_of_the_volume(
    offered: Store, tmp_path: Path
) -> None:
    offered.begin(listing(NEWER, revision="r2"))
    outside = tmp_path / "outside"
    offered.model(KEY).joinpath("weights").rename(outside)
    offered.model(KEY).joinpath("weights").symlink_to(outside)
    assert not offered.link(KEY, "config.json", offered.model(KEY) / "weights/shard.bin")
    assert not offered.link(KEY, "config.json", outside / "shard.bin")
    assert not offered.link(KEY, "config.json", offered.model(KEY) / "gone")
    assert offered.ingests()[KEY].done == 0


def test_unreadable_manifests_are_skipped(offered: Store, root: Path) -> None:
    other = key_of("hf://org/other")
    for name, data in {
        other: b"# localmodel manifest 1\n",
        "0" * 16: b"\xff\xfe",
        "f" * 16: b"",
        "README": b"not ours",
    }.items():
        write(root / layout.MANIFESTS / name, data)
        (root / layout.MODELS / name).mkdir()
    (root / layout.MANIFESTS / ("a" * 16)).mkdir()
    assert [key for key, _, _ in offered.manifests()] == [KEY]
    assert offered.manifest(other) is None


def test_a_manifest_of_another_uri_is_not_on_offer(offered: Store, root: Path) -> None:
    """Keys are 64-bit prefixes, and files can be copied."""
    other = key_of("hf://org/other")
    write(root / layout.manifest(other), (root / layout.manifest(KEY)).read_bytes())
    (root / layout.model(other)).mkdir()
    write(root / layout.model(other) / "theirs", b"?")
    assert [key for key, _, _ in offered.manifests()] == [KEY]
    assert offered.manifest(other) is None
    offered.recover()
    assert offered.salvaged() == [other]
    assert on_offer(root) == [KEY]


def test_a_manifest_without_its_directory_is_not_on_offer(
    offered: Store, root: Path, tmp_path: Path
) -> None:
    offered.model(KEY).rename(tmp_path / "moved")
    assert offered.entries() == []
    offered.model(KEY).symlink_to(tmp_path / "moved")
    assert offered.entries() == []
    assert offered.recover() == [KEY]
    assert on_offer(root) == []
    assert (tmp_path / "moved/config.json").exists()


def test_touch_is_mirrored_in_the_manifest(offered: Store, root: Path) -> None:
    offered.touch(KEY, 1_800_000_000.5)
    ((_, _, used),) = offered.manifests()
    assert used == 1_800_000_000.5
    offered.begin_retire(KEY)
    offered.touch(KEY, 1_900_000_000.0)  # gone meanwhile: no use to note, and no error
    offered.cancel_retire(KEY)
    ((_, _, used),) = offered.manifests()
    assert used == 1_800_000_000.5


def test_looking_beside_the_work_sees_only_whole_models(store: Store, root: Path) -> None:
    """No lock between them: the order of the steps is what protects the reader."""
    done, bad = threading.Event(), []

    def look() -> None:
        watching = Store(root)
        while not done.is_set():
            for key, found, _ in watching.manifests():
                # Retired behind our back is fine, as long as the manifest went first.
                if watching.damage(key, found) and watching.manifest(key) is not None:
                    bad.append(key)
            watching.ingests()

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for _ in range(20):
            finish(store, listing())
            store.begin_retire(KEY)
            store.finish_retire(KEY)
            store.sweep()
    finally:
        done.set()
        reader.join()
    assert bad == []


# -- reopen -------------------------------------------------------------------------------------


def test_a_pod_keeps_its_files_through_a_repair(offered: Store, root: Path) -> None:
    mounted = os.open(offered.model(KEY), os.O_RDONLY | os.O_DIRECTORY)
    try:
        offered.reopen(KEY)
        assert offered.entries() == []
        assert not offered.model(KEY).exists()
        names = os.listdir(mounted)  # noqa: PTH208 - of a descriptor, as a mount is
        assert sorted(names) == ["config.json", "empty", "weights"]
        offered.discard(KEY, "config.json")
        finish(offered, offered.listing(KEY) or listing())
        assert os.stat("config.json", dir_fd=mounted).st_size == 2
    finally:
        os.close(mounted)
    check_offers(root)


MISLED: dict[str, Callable[[Store, Path], object]] = {
    "discard": lambda store, other: store.discard(KEY, "weights/shard.bin"),
    "promote": lambda store, other: bring(store, KEY, {"weights/shard.bin": b"evil"}),
    "link": lambda store, other: store.link(KEY, "weights/new.bin", other / "config.json"),
    "look": lambda store, other: store.version(KEY, "weights/shard.bin"),
}


@pytest.mark.parametrize("act", MISLED)
def test_a_pod_leads_no_repair_into_another_model(offered: Store, root: Path, act: str) -> None:
    """Its mount goes on through the repair: of a directory, it can make a link to the other."""
    uri = "hf://org/other"
    finish(offered, listing(uri=uri), CONTENTS)
    other = offered.model(key_of(uri))
    mounted = os.open(offered.model(KEY), os.O_RDONLY | os.O_DIRECTORY)
    try:
        offered.reopen(KEY)
        offered.begin(listing())
        os.rename("weights", "away", src_dir_fd=mounted, dst_dir_fd=mounted)
        os.symlink(f"../../../../models/{other.name}/weights", "weights", dir_fd=mounted)
    finally:
        os.close(mounted)
    assert (offered.tree(KEY) / "weights").samefile(other / "weights"), "it does lead there"
    before = snapshot(other)
    with pytest.raises(AgentError, match="somebody else writes into the cache") as caught:
        MISLED[act](offered, other)
    assert reason(caught) is Reason.DISK_ERROR
    assert snapshot(other) == before
    finish(offered, listing())  # the next try
    assert snapshot(other) == before
    check_offers(root)


@pytest.mark.parametrize("verb", ["make_directory", "unlink", "set_mode", "backdate"])
def test_a_directory_that_becomes_a_link_in_the_last_moment_leads_nowhere(
    root: Path, tmp_path: Path, verb: str
) -> None:
    """After all that could be looked at was looked at."""
    real, outside = getattr(Files, verb), tmp_path / "outside"

    def meddled(files: Files, path: Path, *rest: object, **below: object) -> None:
        if path.parent == way and not way.is_symlink():
            way.rename(tmp_path / "away")
            way.symlink_to(outside)
        real(files, path, *rest, **below)

    (outside / "deep").mkdir(parents=True, mode=0o700)
    write(outside / "shard.bin", b"a" * 70)
    write(outside / "litter", b"?")
    before = snapshot(outside)
    store = Store(root)
    store.open()
    way = _proven(store) / "weights"
    write(way / "litter", b"?")
    begins = verb in ("make_directory", "unlink")
    with patch.object(Files, verb, meddled), pytest.raises(AgentError) as caught:
        store.begin(listing()) if begins else store.seal(sealed(listing()))
    assert reason(caught) is Reason.DISK_ERROR
    assert snapshot(outside) == before
    assert (outside / "shard.bin").stat().st_mtime > sealed(listing()).sealed_at
    finish(store, listing())
    check_offers(root)
    store.close()


def test_a_repair_displaces_what_was_begun_beside_it(offered: Store, root: Path) -> None:
    """An ingest of another revision must not make the model look like somebody else's."""
    offered.begin(listing(NEWER, revision="r2"))
    bring(offered, KEY, {"more/new.bin": b"new"})
    offered.reopen(KEY)
    pinned = offered.listing(KEY)
    assert pinned is not None
    assert pinned.revision == "r1"
    assert _names(offered.tree(KEY)) == sorted(CONTENTS)
    finish(offered, pinned)
    check_offers(root)


def test_a_model_that_vanished_is_reopened_empty(offered: Store) -> None:
    rmtree(offered.model(KEY))
    offered.reopen(KEY)
    assert offered.ingests()[KEY].done == 0
    finish(offered, listing())


def test_a_symlink_in_its_place_is_not_moved(offered: Store, tmp_path: Path) -> None:
    _damage(offered.model(KEY), "linked root")
    link = offered.model(KEY).readlink()
    offered.reopen(KEY)
    assert offered.model(KEY).readlink() == link
    assert _names(offered.tree(KEY)) == []


def test_what_is_unknown_cannot_be_reopened(store: Store) -> None:
    with pytest.raises(AgentError) as caught:
        store.reopen(KEY)
    assert reason(caught) is Reason.CONFLICT


# -- retire -------------------------------------------------------------------------------------


def test_a_retire_frees_the_name_at_once_and_the_bytes_later(offered: Store, root: Path) -> None:
    offered.begin_retire(KEY)
    assert offered.entries() == []
    assert offered.model(KEY).is_dir()
    offered.finish_retire(KEY)
    assert not offered.model(KEY).exists()
    assert _names(root / layout.MANIFESTS) == []
    assert len(list((root / layout.TRASH).iterdir())) == 2  # the model and its old ingest
    assert offered.sweep() == 2
    assert list((root / layout.TRASH).iterdir()) == []


def test_a_cancelled_retire_leaves_no_trace(offered: Store, root: Path) -> None:
    before = snapshot(root)
    offered.begin_retire(KEY)
    offered.cancel_retire(KEY)
    assert snapshot(root) == before


def test_each_step_of_a_retire_may_be_repeated(offered: Store, root: Path) -> None:
    """After an error the plan says it again, and has not heard how far it came."""
    offered.begin_retire(KEY)
    offered.begin_retire(KEY)
    offered.cancel_retire(KEY)
    offered.cancel_retire(KEY)
    offered.begin_retire(KEY)
    rmtree(offered.model(KEY))
    offered.finish_retire(KEY)
    offered.finish_retire(KEY)
    assert _names(root / layout.MANIFESTS) == []
    offered.begin_retire(KEY)


def test_what_is_not_ours_cannot_be_retired(store: Store, root: Path) -> None:
    _put(root / layout.model(KEY), "directory", root)
    with pytest.raises(AgentError):
        store.begin_retire(KEY)
    with pytest.raises(AgentError):
        store.cancel_retire(KEY)
    store.finish_retire(KEY)
    assert _names(root / layout.model(KEY)) == ["theirs"]


def test_sweeping_follows_no_symlink(store: Store, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    write(outside / "precious", b"!")
    retired = root / layout.TRASH / "0123456789abcdef.00000000"
    retired.mkdir()
    (retired / "directory").symlink_to(outside)
    (retired / "file").symlink_to(outside / "precious")
    (root / layout.TRASH / "link").symlink_to(outside)
    os.mkfifo(root / layout.TRASH / "pipe")
    assert store.sweep() == 3
    assert list((root / layout.TRASH).iterdir()) == []
    assert (outside / "precious").read_bytes() == b"!"


def test_one_tree_that_stays_does_not_keep_the_others(root: Path) -> None:
    class Stubborn(Files):
        def remove_tree(self, path: Path) -> None:
            if path.name == "b":
                raise PermissionError(1, "Operation not permitted")
            super().remove_tree(path)

    store = Store(root, Stubborn())
    store.open()
    for name in "abc":
        (root / layout.TRASH / name).mkdir()
    with pytest.raises(AgentError, match="unlink the retired b"):
        store.sweep()
    assert [path.name for path in (root / layout.TRASH).iterdir()] == ["b"]
    store.close()


def test_two_sweeps_at_once_do_not_meet(store: Store, root: Path) -> None:
    for number in range(20):
        directory = root / layout.TRASH / str(number)
        directory.mkdir()
        for name in range(20):
            write(directory / str(name), b"")
    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(store.sweep())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 20
    assert len(counts) == 4


# -- notes --------------------------------------------------------------------------------------


def test_a_progress_line_is_only_ever_seen_whole(store: Store, root: Path) -> None:
    path, done, seen = root / layout.progress(KEY), threading.Event(), set()

    def read() -> None:
        while not done.is_set():
            try:
                seen.add(path.read_text())
            except FileNotFoundError:
                seen.add("")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        lines = [f"wait {number} {'x' * (number % 50)} ." for number in range(500)]
        for line in lines:
            store.write_progress(KEY, line)
    finally:
        done.set()
        reader.join()
    assert len(seen) > 2
    assert seen <= {"", *(f"{line}\n" for line in lines)}
    finish(store, listing())
    assert list((root / layout.PROGRESS).iterdir()) == []


def test_progress_can_be_cleared_and_its_directory_may_be_gone(store: Store, root: Path) -> None:
    store.clear_progress(KEY)
    store.write_progress(KEY, "wait 1 2 3")
    store.clear_progress(KEY)
    (root / layout.PROGRESS).rmdir()
    store.clear_progress(KEY)
    store.write_progress(KEY, "wait 1 2 3")
    assert (root / layout.progress(KEY)).read_text() == "wait 1 2 3\n"


# -- start --------------------------------------------------------------------------------------


def test_a_damaged_manifest_costs_a_hash_and_not_a_download(offered: Store, root: Path) -> None:
    inodes = {path.name: path.stat().st_ino for path in files_below(offered.model(KEY))}
    write(root / layout.manifest(KEY), b"# localmodel manifest 1\n")
    for _ in range(2):  # an agent that is restarted before anybody asks must not forget it
        assert offered.recover() == []
        assert offered.salvaged() == [KEY]
        assert offered.ingests() == {}
    finish(offered, listing())
    assert offered.salvaged() == []
    assert {path.name: path.stat().st_ino for path in files_below(offered.model(KEY))} == inodes
    check_offers(root)


def test_a_salvage_nobody_wants_can_be_given_up(offered: Store, root: Path) -> None:
    write(root / layout.manifest(KEY), b"")
    offered.recover()
    offered.abandon(KEY)
    assert offered.salvaged() == []
    assert _names(root / layout.INGEST) == []


def test_a_stale_sealing_note_does_not_make_a_directory_ours(store: Store, root: Path) -> None:
    _put(root / layout.model(KEY), "directory", root)
    write(root / layout.sealing(KEY), b"# localmodel manif")
    assert store.recover() == [KEY]
    assert _names(root / layout.MANIFESTS) == []
    assert _names(root / layout.model(KEY)) == ["theirs"]


def test_a_stale_sealing_note_beside_a_sealed_model_is_dropped(offered: Store, root: Path) -> None:
    write(root / layout.sealing(KEY), (root / layout.manifest(KEY)).read_bytes())
    assert offered.recover() == []
    check_offers(root)
    assert _names(root / layout.MANIFESTS) == [KEY]


def test_recovery_reports_what_is_not_ours_and_leaves_it(store: Store, root: Path) -> None:
    other, third = key_of("hf://org/other"), key_of("hf://org/third")
    _put(root / layout.model(KEY), "directory", root)
    _put(root / layout.model(other), "file", root)
    (root / layout.model(third)).mkdir()
    _put(root / layout.MODELS / "not-a-key", "directory", root)
    before = snapshot(root)
    assert store.recover() == sorted([KEY, other])
    assert snapshot(root) == before


def test_the_trash_and_the_progress_of_an_earlier_life_go(store: Store, root: Path) -> None:
    store.begin(listing())
    store.write_progress(KEY, "wait 1 2 3")
    write(root / layout.PROGRESS / f".{KEY}.new", b"wait 1")
    store.recover()
    assert list((root / layout.PROGRESS).iterdir()) == []
    assert list(store.ingests()) == [KEY]


def test_a_real_kill_is_like_the_ones_we_play(root: Path) -> None:
    """A process that seals, reopens and retires for ever is killed at some moment, many times."""
    for number in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", _WORK, str(root)], stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "begun\n"
            time.sleep(0.003 * number)
            worker.kill()
        store = Store(root)
        store.open()
        assert store.recover() == []
        check_offers(root)
        before = snapshot(root)
        assert store.recover() == []
        assert snapshot(root) == before
        store.sweep()
        store.close()


_WORK = """
import sys
from pathlib import Path
from agent.store import Store
from tests.edges.volume import finish, key_of, listing
store = Store(Path(sys.argv[1]))
store.open()
print("begun", flush=True)
while True:
    finish(store, listing())
    store.reopen(key_of())
    finish(store, listing())
    store.begin_retire(key_of())
    store.finish_retire(key_of())
"""


def test_verbs_after_death_are_noticed(root: Path) -> None:
    """The harness itself: code that goes on after a kill would make every crash test a lie."""
    files = Mortal(0)
    with pytest.raises(Killed):
        Store(root, files).open()
    with pytest.raises(AssertionError, match="after death"):
        files.unlink(root)


# -- helpers ------------------------------------------------------------------------------------


def _names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in files_below(directory))


def _damage(directory: Path, how: str) -> None:
    """Do it to weights/shard.bin, or to what is above it."""
    path, parent = directory / "weights/deep/b.bin", directory / "weights/deep"
    match how:
        case "missing":
            path.unlink()
        case "short":
            write(path, b"b" * 32)
        case "symlink":
            path.rename(directory.parent / "elsewhere.bin")
            path.symlink_to(directory.parent / "elsewhere.bin")
        case "directory":
            path.unlink()
            path.mkdir()
        case "linked parent":
            parent.rename(directory.parent / "elsewhere")
            parent.symlink_to(directory.parent / "elsewhere")
        case "linked root":
            directory.rename(directory.parent / "elsewhere")
            directory.symlink_to(directory.parent / "elsewhere")
        case "all":
            rmtree(directory)


def _put(target: Path, kind: str, tmp_path: Path) -> None:
    match kind:
        case "directory":
            target.mkdir()
            write(target / "theirs", b"?")
        case "file":
            write(target, b"?")
        case "symlink":
            (tmp_path / "elsewhere").mkdir()
            target.symlink_to(tmp_path / "elsewhere")
        case "dangling":
            target.symlink_to(tmp_path / "nowhere")


def _remove(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        rmtree(target)
    else:
        target.unlink()


def test_a_lock_file_that_somebody_removed_lets_nobody_in(root: Path) -> None:
    store = Store(root)
    store.open()
    try:
        (root / layout.LOCK).unlink()
        with pytest.raises(AgentError) as caught:
            Store(root).open()
        assert caught.value.reason is Reason.LOCKED
    finally:
        store.close()
    again = Store(root)
    again.open()
    again.close()


def test_a_directory_that_somebody_removed_is_made_again(root: Path) -> None:
    store = Store(root)
    store.open()
    try:
        (root / layout.MODELS).rmdir()
        (root / layout.MANIFESTS).rmdir()
        listing = Listing(
            ref=ModelRef(uri="file:///x"),
            revision="1",
            files=(RemoteFile(path="a", size=0, origin="a"),),
        )
        store.begin(listing)
        assert (root / layout.MODELS).is_dir()
        assert (root / layout.MANIFESTS).is_dir()
    finally:
        store.close()
