"""The store dies between any two steps, twice in a row, and with the power gone.

Whatever happens: what is on offer is whole; a recovery ends in a state where another changes
nothing; a model that was on offer is on offer or waits to be proven again; and nothing lies about
that no list speaks of.
"""

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree

import pytest

from agent import layout
from agent.errors import AgentError, Reason
from agent.files import Files
from agent.model import Digest, RemoteFile
from agent.store import Store
from tests.edges.volume import (
    CONTENTS,
    HOW,
    Killed,
    Mortal,
    bring,
    bring_beside,
    check_accounted,
    check_offers,
    fast_directory,
    finish,
    held,
    holds,
    key_of,
    leave,
    listing,
    on_offer,
    sealed,
    sealed_store,
    snapshot,
    take_over,
    write,
)
from tests.machine import files_of

KEY, OTHER = key_of(), "hf://org/other"
NEWER = {**CONTENTS, "weights/shard.bin": b"n" * 70, "more/new.bin": b"new"}
KEPT = {path: data for path, data in CONTENTS.items() if path != "weights/shard.bin"}
LISTING, NEW_LISTING = listing(), listing(NEWER, revision="r2")
PACKED = replace(
    LISTING,
    files=(),
    archive=RemoteFile(path="m.tar", size=9, origin="m.tar", digest=Digest("sha256", "0" * 64)),
)


@pytest.fixture
def roots() -> Iterator[Iterator[Path]]:
    """One new root after the other."""
    with fast_directory() as directory:
        yield (directory / str(number) for number in range(1_000_000))


# -- the states of a volume ---------------------------------------------------------------------


def nothing(root: Path) -> None:
    _ready(root)


def _ready(root: Path) -> Store:
    store = Store(root)
    store.open()
    store.close()
    return store


def complete(root: Path) -> None:
    """Every file proven and in the tree, and one that nobody listed."""
    store = _ready(root)
    store.begin(listing())
    bring(store, KEY, CONTENTS)
    write(store.tree(KEY) / "weights/unlisted", b"?")
    store.write_progress(KEY, "wait 1 2 3")


def complete_over_an_empty_directory(root: Path) -> None:
    """As kubelet makes it for a pod that came too early."""
    complete(root)
    (root / layout.model(KEY)).mkdir()


def half_way(root: Path) -> None:
    """A part of the old revision is proven, another is partial."""
    store = _ready(root)
    store.begin(listing())
    bring(store, KEY, KEPT)
    write(store.partial(KEY) / "weights/shard.bin", b"aaa")


def on_offer_already(root: Path) -> None:
    sealed_store(root, files=Files()).close()


def damaged(root: Path) -> None:
    on_offer_already(root)
    (root / layout.model(KEY) / "config.json").unlink()


def damaged_beside_a_newer_ingest(root: Path) -> None:
    damaged(root)
    store = Store(root)
    store.begin(listing(NEWER, revision="r2"))
    bring(store, KEY, {"more/new.bin": NEWER["more/new.bin"]})


def emptied(root: Path) -> None:
    """The manifest is there and the directory is not."""
    on_offer_already(root)
    rmtree(root / layout.model(KEY))


def retiring(root: Path) -> None:
    on_offer_already(root)
    Store(root).begin_retire(KEY)


def unreadable(root: Path) -> None:
    on_offer_already(root)
    write(root / layout.manifest(KEY), b"# localmodel manif")


def unreadable_beside_an_ingest(root: Path) -> None:
    on_offer_already(root)
    store = Store(root)
    store.begin(listing(NEWER, revision="r2"))
    write(root / layout.manifest(KEY), b"")


def salvaged(root: Path) -> None:
    unreadable(root)
    Store(root).recover()


def looked_into(root: Path) -> None:
    salvaged(root)
    store = _ready(root)
    store.begin(PACKED)
    store.archive(KEY).write_bytes(bytes(9))
    store.close()


def trashed(root: Path) -> None:
    retiring(root)
    Store(root).finish_retire(KEY)


def beside_what_it_can_share(root: Path) -> None:
    """A newer revision was begun, and some of a file arrived that the older one has."""
    on_offer_already(root)
    store = Store(root)
    store.begin(NEW_LISTING)
    write(store.partial(KEY) / "config.json", b"{")


def all_of_it_shared(root: Path) -> None:
    """Complete, of links to a model that is in the trash by now."""
    other = key_of(OTHER)
    sealed_store(root, uri=OTHER, files=Files()).close()
    store = Store(root)
    store.begin(LISTING)
    for path in CONTENTS:
        assert store.link(KEY, path, store.model(other) / path)
    store.begin_retire(other)
    store.finish_retire(other)


def shared_with_the_trash(root: Path) -> None:
    all_of_it_shared(root)
    Store(root).seal(sealed(LISTING))


def half_sealed(root: Path) -> None:
    """The directory is in its place and the manifest is not; the disk failed, nobody died."""
    complete(root)
    manifests = root / layout.MANIFESTS

    class Failing(Files):
        def rename(self, source: Path, target: Path, *, below: Path | None = None) -> None:
            if target == manifests / KEY:
                raise OSError(5, "Input/output error")
            super().rename(source, target, below=below)

    with pytest.raises(Exception, match="Input/output"):
        Store(root, Failing()).seal(sealed(listing()))


THEIRS = {**CONTENTS, "weights/shard.bin": b"?" * 70, ".cache/huggingface/download/x": b"etag"}
"""Of which one file is wrong."""


def another_agents(root: Path) -> None:
    _ready(root)
    leave(root, THEIRS)


def proven_beside_another_agents(root: Path) -> None:
    another_agents(root)
    bring_beside(Store(root), LISTING)


def half_exchanged(root: Path) -> None:
    """The other's directory has left its place, and ours has not got it."""
    proven_beside_another_agents(root)
    Store(root).make_ready(sealed(LISTING))
    (root / layout.model(KEY)).rename(root / layout.ingest(KEY) / layout.REPLACED)


def exchanged_and_not_published(root: Path) -> None:
    half_exchanged(root)
    Store(root).tree(KEY).rename(root / layout.model(KEY))


# -- what is done to them -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation on a state, and which bytes must be there whenever it is cut off."""

    prepare: Callable[[Path], None]
    act: Callable[[Store], object]
    keeps: dict[str, bytes] = field(default_factory=dict)
    offers: bool | None = None  # after recovery: on offer for sure, or surely not
    damaged: bool = False  # by somebody else, and not by the death
    foreign: bool = False  # until ours is on offer, `THEIRS` are in its place
    again: Callable[[Store], object] | None = None  # how a try that failed is repeated


def _retire(store: Store) -> None:
    store.begin_retire(KEY)
    store.finish_retire(KEY)


def _think_again(store: Store) -> None:
    store.begin_retire(KEY)
    store.cancel_retire(KEY)


def _adopt(store: Store) -> None:
    store.begin(LISTING)
    for path in KEPT:
        assert store.adopt(KEY, path, store.model(KEY) / path)


def _exchange(store: Store) -> None:
    store.make_ready(sealed(LISTING))
    store.exchange(sealed(LISTING))


def _do_not_exchange(store: Store) -> None:
    store.make_ready(sealed(LISTING))
    store.cancel_ready(KEY)


SPOILED = (damaged, damaged_beside_a_newer_ingest, emptied, unreadable, unreadable_beside_an_ingest)
ALL = dict(CONTENTS)
WITHOUT_CONFIG = {path: data for path, data in ALL.items() if path != "config.json"}

CASES = {
    "open": Case(prepare=lambda root: None, act=Store.open),
    "begin": Case(prepare=nothing, act=lambda s: s.begin(LISTING)),
    "begin again": Case(prepare=half_way, act=lambda s: s.begin(LISTING), keeps=KEPT),
    "begin a newer one": Case(prepare=half_way, act=lambda s: s.begin(NEW_LISTING), keeps=KEPT),
    "begin after a salvage": Case(prepare=salvaged, act=lambda s: s.begin(LISTING), keeps=ALL),
    "begin an archive": Case(  # whose files may be those of the tree
        prepare=salvaged, act=lambda s: s.begin(PACKED), keeps=ALL
    ),
    "begin what is in an archive": Case(
        prepare=looked_into,
        act=lambda s: s.begin(replace(LISTING, archive=PACKED.archive)),
        keeps=ALL,
    ),
    "begin after half a seal": Case(prepare=half_sealed, act=lambda s: s.begin(LISTING), keeps=ALL),
    "begin on an emptied one": Case(prepare=emptied, act=lambda s: s.begin(LISTING), offers=False),
    "begin beside the sealed": Case(
        prepare=on_offer_already, act=lambda s: s.begin(NEW_LISTING), keeps=ALL, offers=True
    ),
    "promote": Case(prepare=half_way, act=lambda s: s.promote(KEY, "weights/shard.bin")),
    "link": Case(
        prepare=beside_what_it_can_share,
        act=lambda s: s.link(KEY, "config.json", s.model(KEY) / "config.json"),
        keeps=ALL,
        offers=True,
        again=lambda s: s.begin(NEW_LISTING),  # what was linked is found there, and hashed
    ),
    "abandon": Case(prepare=half_way, act=lambda s: s.abandon(KEY), offers=False),
    "abandon half a seal": Case(prepare=half_sealed, act=lambda s: s.abandon(KEY), offers=False),
    "abandon a salvage": Case(prepare=salvaged, act=lambda s: s.abandon(KEY), offers=False),
    "seal": Case(
        prepare=complete,
        act=lambda s: s.seal(sealed(LISTING)),
        keeps=ALL,
        again=lambda s: finish(s, LISTING),
    ),
    "seal over an empty one": Case(
        prepare=complete_over_an_empty_directory,
        act=lambda s: s.seal(sealed(LISTING)),
        keeps=ALL,
        again=lambda s: finish(s, LISTING),
    ),
    "seal what is shared": Case(
        prepare=all_of_it_shared,
        act=lambda s: s.seal(sealed(LISTING)),
        keeps=ALL,
        again=lambda s: finish(s, LISTING),
    ),
    "sweep what is shared": Case(
        prepare=shared_with_the_trash, act=Store.sweep, keeps=ALL, offers=True
    ),
    "begin beside another agent's": Case(
        prepare=another_agents, act=lambda s: s.begin(LISTING), offers=False, foreign=True
    ),
    "adopt": Case(
        prepare=another_agents,
        act=_adopt,
        offers=False,
        foreign=True,
        again=lambda s: bring_beside(s, LISTING),
    ),
    "abandon beside another agent's": Case(
        prepare=proven_beside_another_agents,
        act=lambda s: s.abandon(KEY),
        offers=False,
        foreign=True,
    ),
    "abandon half an exchange": Case(
        prepare=half_exchanged, act=lambda s: s.abandon(KEY), offers=False, foreign=True
    ),
    "exchange": Case(
        prepare=proven_beside_another_agents,
        act=_exchange,
        keeps=ALL,
        foreign=True,
        again=lambda s: take_over(s, LISTING),
    ),
    "think again of an exchange": Case(
        prepare=proven_beside_another_agents,
        act=_do_not_exchange,
        keeps=ALL,
        offers=False,
        foreign=True,
    ),
    "recover half an exchange": Case(
        prepare=half_exchanged, act=Store.recover, keeps=ALL, offers=False, foreign=True
    ),
    "recover an exchange": Case(
        prepare=exchanged_and_not_published,
        act=Store.recover,
        keeps=ALL,
        offers=False,
        foreign=True,
    ),
    "begin after half an exchange": Case(
        prepare=exchanged_and_not_published,
        act=lambda s: s.begin(LISTING),
        keeps=ALL,
        offers=False,
        foreign=True,
    ),
    "reopen": Case(
        prepare=damaged, act=lambda s: s.reopen(KEY), keeps=WITHOUT_CONFIG, damaged=True
    ),
    "reopen beside a newer one": Case(
        prepare=damaged_beside_a_newer_ingest,
        act=lambda s: s.reopen(KEY),
        keeps=WITHOUT_CONFIG,
        damaged=True,
    ),
    "reopen a whole one": Case(  # its bytes are wrong, perhaps, and its names are not
        prepare=on_offer_already, act=lambda s: s.reopen(KEY), keeps=ALL
    ),
    "reopen an emptied one": Case(prepare=emptied, act=lambda s: s.reopen(KEY), offers=False),
    "begin to retire": Case(
        prepare=on_offer_already, act=lambda s: s.begin_retire(KEY), keeps=ALL, offers=True
    ),
    "think again": Case(prepare=on_offer_already, act=_think_again, keeps=ALL, offers=True),
    "retire": Case(prepare=on_offer_already, act=_retire),
    "sweep": Case(prepare=trashed, act=Store.sweep, offers=False),
    "recover a retire": Case(prepare=retiring, act=Store.recover, keeps=ALL, offers=True),
    "recover half a seal": Case(prepare=half_sealed, act=Store.recover, keeps=ALL, offers=False),
    "recover an emptied one": Case(prepare=emptied, act=Store.recover, offers=False),
    "salvage": Case(prepare=unreadable, act=Store.recover, keeps=ALL, offers=False),
    "salvage beside an ingest": Case(
        prepare=unreadable_beside_an_ingest, act=Store.recover, keeps=ALL, offers=False
    ),
}


def steps(case: Case, roots: Iterator[Path]) -> int:
    """How many verbs an undisturbed run takes."""
    root, files = next(roots), Mortal()
    case.prepare(root)
    store = Store(root, files)
    case.act(store)
    store.close()
    return len(files.steps)


def killed(root: Path, act: Callable[[Store], object], at: int, how: str) -> bool:
    """Act with a store that dies at that step; whether it got so far."""
    store = Store(root, Mortal(at, how))
    try:
        act(store)
    except Killed:
        return True
    finally:
        store.close()
    return False


def begin_a_new_life(root: Path, *, damaged: bool = False, foreign: bool = False) -> Store:
    """Recover, and see that a second recovery finds nothing to do."""
    store = Store(root)
    store.open()
    reported = store.recover()
    assert reported == ([KEY] if foreign and KEY not in on_offer(root) else [])
    if reported:
        assert files_of(root / layout.model(KEY)) == THEIRS
    check_offers(root, vandalised=[KEY] if damaged else [])
    check_accounted(root, foreign=reported)
    before = snapshot(root)
    assert store.recover() == reported
    assert snapshot(root) == before
    return store


def check(case: Case, root: Path) -> None:
    if case.prepare not in SPOILED and case.act is not Store.open:
        check_offers(root)  # pods read the manifests while no agent runs
    store = begin_a_new_life(root, damaged=case.damaged, foreign=case.foreign)
    if case.offers is not None:
        assert (KEY in on_offer(root)) is case.offers
    assert held(root, KEY, case.keeps)
    if KEY not in on_offer(root) or store.damage(KEY, sealed(LISTING)):
        if KEY in on_offer(root):
            store.reopen(KEY)
        take_over(store, LISTING)
    store.sweep()
    store.close()
    check_offers(root)
    assert on_offer(root) == [KEY]
    assert holds(root / layout.model(KEY), CONTENTS)
    assert not any((root / layout.INGEST).iterdir())
    rmtree(root)


@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_step(name: str, roots: Iterator[Path]) -> None:
    case = CASES[name]
    count = steps(case, roots)
    assert count > 0
    for at in range(count):
        for how in HOW:
            root = next(roots)
            case.prepare(root)
            assert killed(root, case.act, at, how)
            check(case, root)


def test_killed_at_no_step(roots: Iterator[Path]) -> None:
    for case in CASES.values():
        root = next(roots)
        case.prepare(root)
        assert not killed(root, case.act, 1_000_000, "before")
        check(case, root)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["begin a newer one", "seal", "exchange", "reopen", "retire", "salvage beside an ingest"],
)
def test_killed_again_while_recovering(name: str, roots: Iterator[Path]) -> None:
    case = CASES[name]
    for at in range(steps(case, roots)):
        again = 0
        while True:
            root = next(roots)
            case.prepare(root)
            assert killed(root, case.act, at, "after")
            if not killed(root, Store.recover, again, HOW[again % 3]):
                break
            check(case, root)
            again += 1


# -- a disk that fails, and nobody dies ---------------------------------------------------------


class Failing(Mortal):
    """One verb fails, and all after it succeed again."""

    def _step(
        self, what: str, act: Callable[[], None], torn: Callable[[], None] | None = None
    ) -> None:
        self.steps.append(what)
        if len(self.steps) - 1 == self.at:
            if self.how == "torn" and torn is not None:
                torn()
            raise OSError(errno.ENOSPC, "No space left on device")
        act()


@pytest.mark.parametrize("how", ["before", "torn"])
@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_at_every_step(name: str, how: str, roots: Iterator[Path]) -> None:
    """It is DiskFull, nothing wrong is published, and the same life may simply try again."""
    case = CASES[name]
    for at in range(steps(case, roots)):
        root = next(roots)
        case.prepare(root)
        store = Store(root, Failing(at, how))
        reason = None
        try:
            case.act(store)
        except AgentError as error:
            reason = error.reason
        if case.prepare not in SPOILED and name != "open":
            check_offers(root)
        if reason is None and name.startswith(("recover", "salvage")):
            case.act(store)  # one key that cannot be mended now does not stop the others' start
        elif reason is None:  # what comes after a seal may fail unheard
            assert on_offer(root) == [KEY]
        else:
            assert reason is Reason.DISK_FULL
            (case.again or case.act)(store)
        store.close()
        check(case, root)


# -- a power cut --------------------------------------------------------------------------------

Edit = tuple[int, str, int | None]  # a name in a directory, and what it means from now on


class Platter(Files):
    """A disk that keeps only what was fsynced, and of the rest whatever it likes.

    Files and directories are inodes. A rename or an unlink is one operation, and pending until one
    of the directories it touches is fsynced; a cut keeps any of the pending ones, in an order that
    respects the names. So the disk is meaner than ext4 and XFS, which keep a prefix. Bytes are
    always fsynced by their writer here: `settle` and `remember` stand for the transfer engine.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._directories: dict[int, dict[str, int]] = {}
        self._contents: dict[int, tuple[bytes, int, int]] = {}
        self._pending: list[list[Edit]] = []
        self.settle()

    def settle(self) -> None:
        """All that is there now survives."""
        self._pending.clear()
        for path in [self._root, *self._root.rglob("*")]:
            if path.is_dir():
                names = {child.name: child.lstat().st_ino for child in path.iterdir()}
                self._directories[path.lstat().st_ino] = names
            else:
                self.remember(path)

    def remember(self, path: Path) -> None:
        found = path.lstat()
        mode, time = found.st_mode & 0o777, found.st_mtime_ns
        self._contents[found.st_ino] = (path.read_bytes(), mode, time)

    def _name(self, path: Path) -> tuple[int, str]:
        return path.parent.lstat().st_ino, path.name

    def make_directory(self, path: Path, mode: int, *, below: Path | None = None) -> None:
        new = not path.exists()
        super().make_directory(path, mode, below=below)
        if new:
            self._directories[path.lstat().st_ino] = {}
            self._pending.append([(*self._name(path), path.lstat().st_ino)])

    def write(self, path: Path, data: bytes, mode: int) -> None:
        super().write(path, data, mode)
        self.remember(path)
        self._pending.append([(*self._name(path), path.lstat().st_ino)])

    def set_mode(self, path: Path, mode: int, *, below: Path | None = None) -> None:
        super().set_mode(path, mode, below=below)
        if path.is_file():
            self.remember(path)

    def backdate(self, path: Path, latest: int, *, below: Path | None = None) -> None:
        super().backdate(path, latest, below=below)
        self.remember(path)

    def link(self, source: Path, target: Path, *, below: Path | None = None) -> None:
        super().link(source, target, below=below)
        self._pending.append([(*self._name(target), target.lstat().st_ino)])

    def rename(self, source: Path, target: Path, *, below: Path | None = None) -> None:
        edits: list[Edit] = [
            (*self._name(source), None),
            (*self._name(target), source.lstat().st_ino),
        ]
        super().rename(source, target, below=below)
        self._pending.append(edits)

    def unlink(self, path: Path, *, below: Path | None = None) -> None:
        if path.exists():
            self._pending.append([(*self._name(path), None)])
        super().unlink(path, below=below)

    def remove_directory(self, path: Path, *, below: Path | None = None) -> None:
        self._pending.append([(*self._name(path), None)])
        super().remove_directory(path, below=below)

    def remove_tree(self, path: Path) -> None:
        self._pending.append([(*self._name(path), None)])
        super().remove_tree(path)

    def sync_directory(self, path: Path) -> None:
        directory = path.lstat().st_ino
        self._keep(lambda edits: any(edit[0] == directory for edit in edits))

    def _keep(self, chosen: Callable[[list[Edit]], bool]) -> None:
        """Make the chosen operations durable, and those before them on the same names."""
        names: set[tuple[int, str]] = set()
        kept: list[list[Edit]] = []
        rest: list[list[Edit]] = []
        for edits in reversed(self._pending):
            touched = {edit[:2] for edit in edits}
            if chosen(edits) or touched & names:
                names |= touched
                kept.append(edits)
            else:
                rest.append(edits)
        for edits in reversed(kept):
            for directory, name, inode in edits:
                if inode is None:
                    self._directories[directory].pop(name, None)
                else:
                    self._directories[directory][name] = inode
        self._pending = rest[::-1]

    def cut(self, target: Path, dice: random.Random) -> None:
        """Build what is found when the power is back."""
        share = dice.choice((0.0, 0.5, 1.0))
        self._keep(lambda edits: dice.random() < share)
        self._build(self._root.lstat().st_ino, target)

    def _build(self, inode: int, target: Path) -> None:
        if inode in self._directories:
            target.mkdir(mode=0o755)
            for name, child in self._directories[inode].items():
                self._build(child, target / name)
        else:
            data, mode, time = self._contents[inode]
            write(target, data, mode=mode)
            os.utime(target, ns=(time, time))


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.act not in (Store.open, Store.sweep)]
)
def test_the_power_is_cut_at_every_step(name: str, roots: Iterator[Path]) -> None:
    case, dice = CASES[name], random.Random(name)
    for at in range(steps(case, roots)):
        for _ in range(3):
            root, found = next(roots), next(roots)
            case.prepare(root)
            disk = Platter(root)
            store = Store(root, Mortal(at, "after", disk))
            with pytest.raises(Killed):
                case.act(store)
            disk.cut(found, dice)
            rmtree(root)
            check(case, found)


def test_a_seal_survives_a_power_cut_the_moment_it_is_done(roots: Iterator[Path]) -> None:
    for seed in range(20):
        root, found = next(roots), next(roots)
        complete(root)
        disk = Platter(root)
        Store(root, disk).seal(sealed(LISTING))
        disk.cut(found, random.Random(seed))
        begin_a_new_life(found).close()
        assert on_offer(found) == [KEY]


def test_so_does_the_first_model_of_a_new_disk(roots: Iterator[Path]) -> None:
    """Were the directory of the manifests lost, the model would be taken for somebody else's."""
    for seed in range(20):
        root, found = next(roots), next(roots)
        root.mkdir()
        disk = Platter(root)
        store = Store(root, disk)
        store.open()
        store.begin(LISTING)
        for path, data in CONTENTS.items():
            write(store.partial(KEY) / path, data)
            disk.remember(store.partial(KEY) / path)
            store.promote(KEY, path)
        store.seal(sealed(LISTING))
        store.close()
        disk.cut(found, random.Random(seed))
        begin_a_new_life(found).close()
        assert on_offer(found) == [KEY]
        rmtree(root)
        rmtree(found)
