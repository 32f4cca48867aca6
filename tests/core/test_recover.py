"""Recovery over every combination of facts, carried out on a model of the disk.

The model is the facts themselves: what a fix does to a disk is a change of `Found`. Beside it
stands what the facts cannot say: whose directory it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import product

import pytest

from agent.recover import Fix, Found, recover

NAMES = [field.name for field in fields(Found)]
ALL = [
    Found(**dict(zip(NAMES, flags, strict=True)))
    for flags in product((False, True), repeat=len(NAMES))
]


def possible(found: Found) -> bool:
    """Whether a disk can look like this."""
    if found.unreadable and found.manifest and found.retiring:
        return False  # one of the two is the damaged one
    if found.replaced and not found.ingest:
        return False  # it is in there; a salvage has never had one
    if not found.ingest:
        # A tree alone is a salvage that waits for somebody to ask for it.
        return not found.listing and not (found.tree and found.directory and found.unreadable)
    return True


POSSIBLE = [found for found in ALL if possible(found)]


def ours(found: Found) -> bool:
    """Whether the directory under `models/` is one that we began.

    A manifest of any kind says so. A listing or a sealing manifest says so only when the tree that
    was built has left the ingest: beside a tree, something else was in the way of the seal.
    """
    if not found.directory:
        return False
    began = (found.sealing or found.listing) and not found.tree
    return found.manifest or found.retiring or found.unreadable or began


def _reopen(found: Found) -> Found:
    assert found.directory
    assert found.listing or found.sealing or found.manifest, "by what would it be mended?"
    assert not found.tree, "a rename does not replace a tree that holds something"
    return replace(found, directory=False, manifest=False, ingest=True, listing=True, tree=True)


def _salvage(found: Found) -> Found:
    assert found.directory
    assert not found.ingest, "a rename does not replace a tree that holds something"
    # Without a listing: `Found.ingest` is false for what only waits for somebody to ask for it.
    return replace(found, directory=False, tree=True)


def _restore(found: Found) -> Found:
    assert found.retiring
    return replace(found, retiring=False, manifest=True)


def _put_back(found: Found) -> Found:
    assert found.replaced
    assert not found.directory, "a rename does not replace a directory that holds something"
    return replace(found, replaced=False, directory=True, tree=True)


EFFECTS: dict[Fix, Callable[[Found], Found]] = {
    Fix.RESTORE_MANIFEST: _restore,
    Fix.DROP_RETIRING: lambda found: replace(found, retiring=False),
    Fix.WITHDRAW_MANIFEST: lambda found: replace(found, manifest=False, unreadable=False),
    Fix.DROP_SEALING: lambda found: replace(found, sealing=False),
    Fix.REOPEN: _reopen,
    Fix.SALVAGE: _salvage,
    Fix.PUT_BACK: _put_back,
    Fix.DROP_INGEST: lambda found: replace(
        found, ingest=False, listing=False, tree=False, replaced=False
    ),
    Fix.REPORT_FOREIGN: lambda found: found,
}


def carried_out(found: Found) -> Iterator[Found]:
    """The disk after each fix; first as it was found."""
    yield found
    for fix in recover(found):
        found = EFFECTS[fix](found)
        if found.manifest and fix is Fix.DROP_RETIRING:
            found = replace(found, unreadable=False)  # with a good manifest, it was the other
        yield found


def end(found: Found) -> Found:
    return list(carried_out(found))[-1]


def shown(found: Found) -> str:
    return "+".join(name for name in NAMES if getattr(found, name)) or "nothing"


def each_disk(check: Callable[[Found], None]) -> Callable[[], None]:
    """One test over every possible disk: as parameters they would cost seconds."""

    def test() -> None:
        for found in POSSIBLE:
            try:
                check(found)
            except AssertionError as error:
                raise AssertionError(f"{shown(found)}: {recover(found)}: {error}") from error

    test.__doc__ = check.__doc__
    return test


def test_the_facts_are_enumerated() -> None:
    assert len(ALL) == 2 ** len(NAMES)
    assert 100 < len(POSSIBLE) < len(ALL)
    assert {fix for found in POSSIBLE for fix in recover(found)} == set(Fix)


@each_disk
def test_a_second_recovery_has_nothing_to_do(found: Found) -> None:
    assert set(recover(end(found))) <= {Fix.REPORT_FOREIGN}


@each_disk
def test_killed_between_two_fixes_the_next_start_comes_to_the_same_end(found: Found) -> None:
    for half_way in carried_out(found):
        assert end(half_way) == end(found)


@each_disk
def test_what_is_on_offer_has_its_directory(found: Found) -> None:
    after = end(found)
    assert after.directory or not after.manifest
    notes = (after.unreadable, after.retiring, after.sealing)
    assert not any(notes)


@each_disk
def test_a_sealed_model_stays_sealed(found: Found) -> None:
    """Through every single fix."""
    if found.manifest and found.directory:
        for half_way in carried_out(found):
            assert half_way.manifest
            assert half_way.directory


@each_disk
def test_a_model_killed_while_retiring_is_sealed_again(found: Found) -> None:
    if found.retiring and found.directory and not found.unreadable:
        assert end(found).manifest
        assert end(found).directory


@each_disk
def test_a_directory_that_is_not_ours_is_reported_and_not_touched(found: Found) -> None:
    foreign = found.directory and not ours(found)
    after = end(found)
    put_back = found.replaced and not after.manifest and not after.replaced and after.directory
    assert (Fix.REPORT_FOREIGN in recover(found)) is (foreign or put_back)
    if foreign:
        assert after.directory
        assert not after.manifest


@each_disk
def test_what_was_to_be_replaced_is_lost_only_to_what_is_on_offer(found: Found) -> None:
    """It was not ours: until ours is on offer, it is in its place, or where it is put back from."""
    for half_way in carried_out(found):
        if found.replaced and not (half_way.replaced or half_way.directory):
            assert half_way.manifest or found.unreadable


@each_disk
def test_a_directory_of_ours_ends_sealed_or_where_it_is_hashed_again(found: Found) -> None:
    """Never lost, and never on offer on the word of a size."""
    if ours(found):
        after = end(found)
        unsealed = after.tree and (found.replaced or not after.directory)
        assert (after.manifest and after.directory) or unsealed


@each_disk
def test_a_listing_is_lost_only_to_what_replaces_it(found: Found) -> None:
    """A download goes on where it was; unless a sealed model or a salvage has its place."""
    if found.listing and not end(found).listing:
        assert found.directory
        assert found.manifest or found.retiring or found.unreadable


@each_disk
def test_what_is_left_of_an_ingest_is_worth_something(found: Found) -> None:
    after = end(found)
    assert after.listing or after.replaced or not after.ingest


@pytest.mark.parametrize(
    ("found", "fixes"),
    [
        (Found(), ()),
        (Found(manifest=True, directory=True), ()),
        (Found(directory=True), (Fix.REPORT_FOREIGN,)),
        (Found(manifest=True), (Fix.WITHDRAW_MANIFEST,)),
        (Found(ingest=True, listing=True, tree=True), ()),
        (Found(ingest=True, tree=True), (Fix.DROP_INGEST,)),
        (Found(tree=True), ()),
        # Killed in a seal: before the rename, after it, after the manifest.
        (Found(sealing=True, ingest=True, listing=True, tree=True), (Fix.DROP_SEALING,)),
        (
            Found(sealing=True, ingest=True, listing=True, directory=True),
            (Fix.REOPEN, Fix.DROP_SEALING),
        ),
        (Found(manifest=True, ingest=True, listing=True, directory=True), (Fix.DROP_INGEST,)),
        # Killed in a retire: before the rename to the trash, after it.
        (Found(retiring=True, directory=True), (Fix.RESTORE_MANIFEST,)),
        (Found(retiring=True), (Fix.DROP_RETIRING,)),
        # Killed while a repair took it back.
        (Found(ingest=True, listing=True, directory=True), (Fix.REOPEN,)),
        # Killed in an exchange: ready, between its two renames, after them, after the manifest.
        (
            Found(sealing=True, ingest=True, listing=True, tree=True, directory=True),
            (Fix.DROP_SEALING, Fix.REPORT_FOREIGN),
        ),
        (
            Found(sealing=True, ingest=True, listing=True, tree=True, replaced=True),
            (Fix.PUT_BACK, Fix.DROP_SEALING, Fix.REPORT_FOREIGN),
        ),
        (
            Found(sealing=True, ingest=True, listing=True, directory=True, replaced=True),
            (Fix.REOPEN, Fix.PUT_BACK, Fix.DROP_SEALING, Fix.REPORT_FOREIGN),
        ),
        (
            Found(manifest=True, ingest=True, listing=True, directory=True, replaced=True),
            (Fix.DROP_INGEST,),
        ),
        # A damaged retiring manifest says nothing against a good manifest.
        (Found(unreadable=True, manifest=True, directory=True), (Fix.DROP_RETIRING,)),
        (
            Found(unreadable=True, directory=True),
            (Fix.SALVAGE, Fix.DROP_RETIRING, Fix.WITHDRAW_MANIFEST),
        ),
    ],
    ids=str,
)
def test_the_rows_of_the_crash_table(found: Found, fixes: tuple[Fix, ...]) -> None:
    assert recover(found) == fixes
