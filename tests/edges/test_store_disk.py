"""The store on real, tiny file systems: full ones, such without inodes, read-only ones."""

import errno
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from agent import layout
from agent.errors import AgentError, Reason
from agent.store import Store
from agent.transfer.sink import Sink
from tests.edges.volume import (
    CONTENTS,
    UNSHARE,
    bring,
    check_accounted,
    check_offers,
    fill,
    finish,
    in_child,
    key_of,
    listing,
    mounted,
    needs_mounts,
    on_offer,
    sealed,
    snapshot,
)

KEY = key_of()
OTHER = "hf://org/other"
pytestmark = needs_mounts


def refused(act: Callable[[], object]) -> Reason:
    with pytest.raises(AgentError) as caught:
        act()
    return caught.value.reason


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


# -- in the child -------------------------------------------------------------------------------


def full_at_begin() -> None:
    with mounted("size=2m") as root:
        store = Store(root)
        store.open()
        filler = fill(root)
        assert refused(lambda: store.begin(listing())) is Reason.DISK_FULL
        assert store.ingests() == {}
        filler.unlink()
        finish(store, listing())
        check_offers(root)
        check_accounted(root)


def full_while_writing() -> None:
    with mounted("size=2m") as root:
        store = Store(root)
        store.open()
        store.begin(listing())
        path = store.partial(KEY) / "weights/shard.bin"
        sink = Sink(path, size=1 << 23, promised=None)
        assert refused(lambda: sink.write(memoryview(bytes(1 << 23)))) is Reason.DISK_FULL
        assert store.ingests()[KEY].done == 70  # no more than was announced, whatever is written
        sink.close()
        path.unlink()
        finish(store, listing())
        check_offers(root)


def full_at_seal() -> None:
    with mounted("size=2m") as root:
        store = Store(root)
        store.open()
        store.begin(listing())
        bring(store, KEY, CONTENTS)
        filler = fill(root)
        assert refused(lambda: store.seal(sealed(listing()))) is Reason.DISK_FULL
        assert list((root / layout.MANIFESTS).iterdir()) == []
        assert list((root / layout.MODELS).iterdir()) == []
        assert store.ingests()[KEY].remaining == 0
        filler.unlink()
        store.seal(sealed(listing()))
        check_offers(root)
        check_accounted(root)
        assert on_offer(root) == [KEY]


def full_at_start() -> None:
    """Starting, recovering and evicting must not need a byte: they are the way out."""
    with mounted("size=2m") as root:
        store = Store(root)
        store.open()
        finish(store, listing())
        weights = {"shard.bin": b"w" * (1 << 20)}
        finish(store, listing(weights, uri=OTHER), weights)
        store.begin_retire(KEY)
        fill(root)
        store.close()
        store = Store(root)
        store.open()
        assert store.recover() == []
        assert on_offer(root) == sorted([KEY, key_of(OTHER)])
        store.begin_retire(key_of(OTHER))
        store.finish_retire(key_of(OTHER))
        assert store.sweep() >= 1
        finish(store, listing(weights, uri=OTHER), weights)
        check_offers(root)


def full_at_progress() -> None:
    with mounted("size=2m") as root:
        store = Store(root)
        store.open()
        store.write_progress(KEY, "wait 1 2 3")
        filler = fill(root)
        assert refused(lambda: store.write_progress(KEY, "wait 2 2 3")) is Reason.DISK_FULL
        assert (root / layout.progress(KEY)).read_text() == "wait 1 2 3\n"
        filler.unlink()
        store.write_progress(KEY, "wait 2 2 3")
        store.recover()
        assert list((root / layout.PROGRESS).iterdir()) == []


def reason_of_failing(store: Store) -> Reason | None:
    try:
        store.open()
        finish(store, listing())
    except AgentError as error:
        return error.reason
    except OSError as error:  # the test's own writes
        return Reason.DISK_FULL if error.errno == errno.ENOSPC else Reason.DISK_ERROR
    return None


def without_inodes() -> None:
    """At whatever file or directory they end, once more space is there it goes on."""
    for number in range(10, 40):
        with mounted(f"size=2m,nr_inodes={number}") as root:
            store = Store(root)
            assert reason_of_failing(store) in (None, Reason.DISK_FULL)
            store.close()
            run("mount", "-o", "remount,nr_inodes=0", str(root))
            store.open()
            assert store.recover() == []
            check_offers(root)
            if not store.entries():
                finish(store, listing())
            check_offers(root)
            check_accounted(root)
            store.close()


def no_link_across_mounts() -> None:
    """Not even within one file system, and so it is on many a cluster's volumes."""
    with mounted("size=2m") as root:
        store = Store(root)
        store.open()
        finish(store, listing(uri=OTHER))
        model = str(store.model(key_of(OTHER)))
        store.begin(listing())
        run("mount", "--bind", model, model)
        assert not store.link(KEY, "config.json", store.model(key_of(OTHER)) / "config.json")
        run("umount", model)
        assert store.link(KEY, "config.json", store.model(key_of(OTHER)) / "config.json")
        finish(store, listing())
        check_offers(root)


def no_more_links_than_there_can_be() -> None:
    """65000 on ext4."""
    with mounted("size=64m") as memory, TemporaryDirectory() as name:
        image, root = memory / "image", Path(name)
        run("truncate", "--size", "32m", str(image))
        try:
            run("mkfs.ext4", "-q", str(image))
            run("mount", "-o", "loop", str(image), str(root))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no ext4 can be made and mounted: {error}")
            return
        try:
            store = Store(root)
            store.open()
            finish(store, listing(uri=OTHER))
            store.begin(listing())
            source = store.model(key_of(OTHER)) / "config.json"
            with suppress(OSError):
                for number in range(70_000):
                    os.link(source, root / f"{number}")
            assert source.stat().st_nlink == 65_000
            assert not store.link(KEY, "config.json", source)
            (root / "0").unlink()
            assert store.link(KEY, "config.json", source)
        finally:
            run("umount", "--lazy", str(root))


def read_only() -> None:
    with mounted("size=2m") as root:
        store = Store(root)
        store.open()
        finish(store, listing())
        store.begin(listing(uri=OTHER))
        bring(store, key_of(OTHER), CONTENTS)
        store.close()
        before = snapshot(root)
        run("mount", "-o", "remount,ro", str(root))
        assert refused(Store(root).open) is Reason.READ_ONLY
        assert refused(lambda: store.begin(listing())) is Reason.READ_ONLY
        assert refused(lambda: store.seal(sealed(listing(uri=OTHER)))) is Reason.READ_ONLY
        assert refused(lambda: store.begin_retire(KEY)) is Reason.READ_ONLY
        assert refused(lambda: store.reopen(KEY)) is Reason.READ_ONLY
        assert refused(lambda: store.touch(KEY, 1.0)) is Reason.READ_ONLY
        assert refused(lambda: store.write_progress(KEY, "wait")) is Reason.READ_ONLY
        assert [entry.key for entry in store.entries()] == [KEY]  # reading goes on
        assert snapshot(root) == before


def read_only_from_the_start() -> None:
    with mounted("size=2m,ro") as root:
        assert refused(Store(root).open) is Reason.READ_ONLY
        assert refused(Store(root / "deeper/still").open) is Reason.READ_ONLY


@pytest.mark.parametrize(
    "child",
    [
        full_at_begin,
        full_while_writing,
        full_at_seal,
        full_at_start,
        full_at_progress,
        without_inodes,
        no_link_across_mounts,
        read_only,
        read_only_from_the_start,
    ],
    ids=lambda child: child.__name__,
)
def test_on_a_file_system_of_its_own(child: Callable[[], None]) -> None:
    in_child(child, wrap=UNSHARE)


def test_on_an_ext4_of_its_own() -> None:
    done = in_child(no_more_links_than_there_can_be, wrap=UNSHARE)
    if done.stdout:
        pytest.skip(f"EMLINK IS NOT TESTED for real: {done.stdout}")
