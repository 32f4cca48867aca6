"""Any history of a volume: work, vandals, deaths at any step. Hypothesis looks for a bad one.

The model knows what was put where and by whom. After every step: what is on offer and was not
vandalised is whole, what is somebody else's is untouched, and no model that was on offer is gone
unless it was retired. After every death: one recovery, and nothing is unaccounted for.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from shutil import rmtree

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent import layout
from agent.errors import AgentError, Reason
from agent.model import CacheKey, Listing
from agent.store import Store
from tests.edges.volume import (
    HOW,
    Killed,
    Mortal,
    bring,
    check_accounted,
    check_offers,
    fast_directory,
    files_below,
    finish,
    held,
    holds,
    key_of,
    listing,
    on_offer,
    sha256,
    snapshot,
    take_over,
    write,
)

URIS = ("hf://org/one", "hf://org/two", "s3://bucket/three")
REVISIONS: Mapping[str, Mapping[str, bytes]] = {
    "r1": {"config.json": b"{}", "a/shard.bin": b"a" * 40, "empty": b""},
    "r2": {"config.json": b"{}", "a/shard.bin": b"A" * 40, "a/b": b"b"},
    "r3": {"config.json": b"[]", "a": b"a file where a directory was"},
}
FOREIGN = {"theirs": b"not to be touched", "deep/theirs": b"nor this"}

keys = st.sampled_from([key_of(uri) for uri in URIS])
revisions = st.sampled_from(sorted(REVISIONS))
fates = st.none() | st.tuples(st.integers(0, 30), st.sampled_from(HOW))
Fate = tuple[int, str] | None


def listing_of(key: CacheKey, revision: str) -> Listing:
    (uri,) = (uri for uri in URIS if key_of(uri) == key)
    return listing(REVISIONS[revision], uri=uri, revision=revision)


class Volume(RuleBasedStateMachine):
    """`held` is what must not be lost: by key, the revision that was on offer whole."""

    @initialize()
    def start(self) -> None:
        self.stack = ExitStack()
        self.root = self.stack.enter_context(fast_directory()) / "volume"
        self.vandalised: set[CacheKey] = set()
        self.foreign: set[CacheKey] = set()
        self.held: dict[CacheKey, str] = {}
        self.store = Store(self.root)
        self.store.open()

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.store.close()
            self.stack.close()

    # -- work ---------------------------------------------------------------------------------

    def _do(self, fate: Fate, act: Callable[[Store], object]) -> bool:
        """Act, dying at a step or not; whether it was carried out to the end."""
        if fate is None:
            act(self.store)
            return True
        mortal = Mortal(*fate)
        self.store.close()
        self.store = Store(self.root, mortal)
        try:
            self.store.open()
            act(self.store)
        except Killed:
            self._live_again()
            return False
        finally:
            mortal.at = None  # it got away, perhaps with an error
        return True

    def _live_again(self, fate: Fate = None) -> None:
        self.store.close()
        if fate is not None:
            dying = Store(self.root, Mortal(*fate))
            with suppress(Killed):
                dying.open()
                dying.recover()
            dying.close()
        self.store = Store(self.root)
        self.store.open()
        assert set(self.store.recover()) == self.foreign
        check_accounted(self.root, foreign=self.foreign)
        before = snapshot(self.root)
        assert set(self.store.recover()) == self.foreign
        assert snapshot(self.root) == before

    def _unless_foreign(self, key: CacheKey, fate: Fate, act: Callable[[Store], object]) -> None:
        """It is refused if something is in the way, and only then."""
        done, refusal = False, None
        try:
            done = self._do(fate, act)
        except AgentError as error:
            refusal = error.reason
        if refusal is None:
            assert not (done and key in self.foreign)
        else:
            assert refusal is Reason.FOREIGN_DIRECTORY
            assert key in self.foreign

    def _free(self, key: CacheKey) -> bool:
        return key not in on_offer(self.root)

    @rule(key=keys, revision=revisions, fate=fates)
    def begin(self, key: CacheKey, revision: str, fate: Fate) -> None:
        """Of another revision too: then the model that waits to be proven again is given up."""
        if self._free(key):
            self._give_up(key, unless=revision)
            pinned = listing_of(key, revision)
            self._do(fate, lambda store: store.begin(pinned))

    def _give_up(self, key: CacheKey, *, unless: str) -> None:
        if self.held.get(key) != unless:
            self.held.pop(key, None)

    @rule(key=keys, data=st.data(), fate=fates)
    def fetch_some(self, key: CacheKey, data: st.DataObject, fate: Fate) -> None:
        pinned = self.store.listing(key)
        if pinned is None or not self.store.tree(key).is_dir() or key in self.foreign:
            return
        contents = REVISIONS[pinned.revision]
        path = data.draw(st.sampled_from(sorted(contents)))
        self.store.begin(pinned)
        write(self.store.partial(key) / path, contents[path][:3])
        self._do(fate, lambda store: bring(store, key, {path: contents[path]}))

    @rule(key=keys, revision=revisions, fate=fates)
    def fetch(self, key: CacheKey, revision: str, fate: Fate) -> None:
        if not self._free(key):
            return
        pinned, contents = listing_of(key, revision), REVISIONS[revision]
        self._give_up(key, unless=revision)
        self._unless_foreign(key, fate, lambda store: finish(store, pinned, contents))
        if not self._free(key):
            self.vandalised.discard(key)
            self.held[key] = revision

    @rule(key=keys, revision=revisions, fate=fates)
    def take_over(self, key: CacheKey, revision: str, fate: Fate) -> None:
        """Build beside somebody else's directory, and take its place."""
        if key not in self.foreign:
            return
        self._give_up(key, unless=revision)
        pinned, contents = listing_of(key, revision), REVISIONS[revision]
        self._do(fate, lambda store: take_over(store, pinned, contents))
        if not self._free(key):
            self.foreign.discard(key)
            self.vandalised.discard(key)
            self.held[key] = revision

    @rule(key=keys, other=keys, revision=revisions, fate=fates)
    def share(self, key: CacheKey, other: CacheKey, revision: str, fate: Fate) -> None:
        """Begin with what a model on offer has, as one that has hashed it."""
        if key in self.foreign or not self._free(key) or key == other:
            return
        self.fetch(key=other, revision=revision, fate=None)
        self._give_up(key, unless=revision)
        self.store.begin(listing_of(key, revision))
        for path, data in REVISIONS[revision].items():
            places = self.store.copies().get((sha256(data), len(data)), [])
            places = [place for place in places if place[0] not in self.vandalised]
            if places and not os.path.lexists(self.store.tree(key) / path):
                source = self.store.model(places[0][0]) / places[0][1]
                if not self._do(fate, lambda store: store.link(key, path, source)):  # noqa: B023 - done now
                    return

    @rule(key=keys, fate=fates)
    def reopen(self, key: CacheKey, fate: Fate) -> None:
        if self.store.manifest(key) is not None:
            self._do(fate, lambda store: store.reopen(key))

    @rule(key=keys, fate=fates, think_again=st.booleans())
    def retire(self, key: CacheKey, fate: Fate, think_again: bool) -> None:
        if self._free(key) or self.store.manifest(key) is None:
            return

        def act(store: Store) -> None:
            store.begin_retire(key)
            if think_again:
                store.cancel_retire(key)
            else:
                self.held.pop(key, None)
                store.finish_retire(key)

        self._do(fate, act)

    @rule(key=keys, fate=fates)
    def abandon(self, key: CacheKey, fate: Fate) -> None:
        if self._free(key):
            self.held.pop(key, None)
        self._do(fate, lambda store: store.abandon(key))

    @rule(fate=fates)
    def sweep(self, fate: Fate) -> None:
        self._do(fate, Store.sweep)

    @rule(key=keys)
    def say(self, key: CacheKey) -> None:
        self.store.write_progress(key, "wait 1 2 3")
        self.store.touch(key, 1_800_000_000.0)

    @rule(fate=fates)
    def restart(self, fate: Fate) -> None:
        self._live_again(fate)

    # -- vandals ------------------------------------------------------------------------------

    def _whole(self, key: CacheKey) -> Path | None:
        directory = self.root / layout.model(key)
        return directory if key in on_offer(self.root) and directory.is_dir() else None

    @rule(key=keys)
    def write_into_a_file(self, key: CacheKey) -> None:
        """In place: that is damage to all who share it, and it shows by its time."""
        directory = self._whole(key)
        path = None if directory is None else directory / "config.json"
        if path is None or path.is_symlink() or not path.is_file() or key in self.foreign:
            return
        inode = path.stat().st_ino
        path.chmod(0o644)
        path.write_bytes(b"?!")
        path.chmod(0o444)
        for shared in map(key_of, URIS):
            places = [self.root / layout.model(shared), self.store.tree(shared)]
            if inode in {file.stat().st_ino for place in places for file in _plain(place)}:
                self.held.pop(shared, None)
                if shared in on_offer(self.root):
                    self.vandalised.add(shared)
                    found = self.store.manifest(shared)
                    assert found is None or "config.json" in self.store.damage(shared, found)

    @rule(key=keys, how=st.sampled_from(["delete", "truncate", "symlink", "all"]))
    def damage(self, key: CacheKey, how: str) -> None:
        """The bytes of a model are somebody's to lose, and ours no more."""
        directory = self._whole(key)
        if directory is None or key in self.foreign:
            return
        self.vandalised.add(key)
        self.held.pop(key, None)
        path = directory / "config.json"
        if how == "all":
            rmtree(directory)
            return
        path.unlink(missing_ok=True)
        if how == "truncate":
            path.write_bytes(b"")
        elif how == "symlink":
            path.symlink_to("/etc/hostname")

    @rule(key=keys, keep=st.integers(0, 60))
    def corrupt_the_manifest(self, key: CacheKey, keep: int) -> None:
        if key in on_offer(self.root):
            path = self.root / layout.manifest(key)
            write(path, path.read_bytes()[:keep], mode=0o644)
            self.vandalised.add(key)

    @rule(key=keys)
    def leave_a_stale_sealing_note(self, key: CacheKey) -> None:
        write(self.root / layout.sealing(key), b"# localmodel", mode=0o644)

    @rule(key=keys)
    def litter_the_ingest(self, key: CacheKey) -> None:
        tree = self.store.tree(key)
        if tree.is_dir() and self.store.listing(key) is not None:
            write(tree / "litter", b"?")
            (tree / "links").unlink(missing_ok=True)
            (tree / "links").symlink_to("/etc")

    @precondition(lambda self: len(self.foreign) < 2)
    @rule(key=keys, empty=st.booleans())
    def put_a_directory_in_the_way(self, key: CacheKey, empty: bool) -> None:
        """Kubelet's, which is empty, or somebody's."""
        directory = self.root / layout.model(key)
        if directory.exists() or not self._free(key):
            return
        if empty:
            directory.mkdir()
            return
        self.foreign.add(key)
        for path, data in FOREIGN.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            write(directory / path, data)

    @rule(key=keys)
    def take_it_away_again(self, key: CacheKey) -> None:
        if key in self.foreign:
            self.foreign.discard(key)
            rmtree(self.root / layout.model(key))

    # -- always -------------------------------------------------------------------------------

    @invariant()
    def what_is_on_offer_is_whole(self) -> None:
        check_offers(self.root, vandalised=self.vandalised)

    @invariant()
    def what_is_foreign_is_untouched(self) -> None:
        for key in self.foreign:
            assert holds(self.root / layout.model(key), FOREIGN)

    @invariant()
    def nothing_is_lost(self) -> None:
        for key, revision in self.held.items():
            assert held(self.root, key, REVISIONS[revision]), (key, revision)

    @invariant()
    def what_the_store_says_is_so(self) -> None:
        said = {key: found for key, found, _ in self.store.manifests()}
        for key in set(on_offer(self.root)) - self.vandalised:
            assert not self.store.damage(key, said[key])
        for ingest in self.store.ingests().values():
            assert 0 <= ingest.done <= ingest.total


def _plain(directory: Path) -> list[Path]:
    return [path for path in files_below(directory) if path.is_file() and not path.is_symlink()]


Volume.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


TestVolume = pytest.mark.slow(Volume.TestCase)
