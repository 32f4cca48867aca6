"""What a look at another agent's directory can say, and what it must not."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from agent.foreign import Seen, judge, unreadable
from agent.model import Foreign, Listing, ModelRef, RemoteFile

ME = 64000
SIZES = {"config.json": 2, "weights/a.bin": 100, "weights/b.bin": 50}


def listing(sizes: Mapping[str, int]) -> Listing:
    files = (RemoteFile(path=path, size=size, origin=path) for path, size in sizes.items())
    return Listing(ref=ModelRef(uri="hf://a/b"), revision="r", files=tuple(files))


def seen(sizes: Mapping[str, int | None], **about: object) -> list[Seen]:
    """A directory of mine with these files; `about` is of each of them."""
    files = [Seen(path=path, size=size, owner=ME) for path, size in sizes.items()]
    top = [Seen(path="", owner=ME), Seen(path="weights", owner=ME)]
    return [*top, *(_with(one, about) for one in files)]


def _with(one: Seen, about: Mapping[str, object]) -> Seen:
    fields = {name: getattr(one, name) for name in Seen.__slots__}
    return Seen(**{**fields, **about})


def found(sizes: Mapping[str, int | None], **about: object) -> Foreign:
    return judge("/models/k", seen(sizes, **about), listing(SIZES), user=ME)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {".cache/huggingface/download/config.json.metadata": 99, ".cache/huggingface/x": 0},
        {"-tune/config.json": 7},  # KServe's prefix of an object store is not bounded
    ],
)
def test_sizes_that_match_are_whole_whatever_else_is_there(more: dict[str, int]) -> None:
    judged = found(SIZES | more)
    assert judged.whole
    assert judged.obstacle == ""
    assert judged.bytes == sum(SIZES.values()) + sum(more.values())


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"config.json": 3}, frozenset({"config.json"})),
        ({"config.json": 0}, frozenset({"config.json"})),
        ({"config.json": None}, frozenset({"config.json"})),  # a symlink, or a directory
        ({"weights/a.bin": 99, "weights/b.bin": 51}, frozenset({"weights/a.bin", "weights/b.bin"})),
    ],
)
def test_what_is_not_there_in_its_size_is_lacking(
    change: dict[str, int | None], lacking: frozenset[str]
) -> None:
    judged = found({**SIZES, **change})
    assert judged.lacking == lacking
    assert not judged.whole


def test_missing_files_are_lacking_but_for_empty_ones() -> None:
    promised = listing({**SIZES, "empty": 0})
    assert judge("/m", seen(SIZES), promised, user=ME).whole
    judged = judge("/m", seen({"weights/a.bin": 100, "empty": 1}), promised, user=ME)
    assert judged.lacking == frozenset({"config.json", "weights/b.bin", "empty"})
    not_a_file = judge("/m", seen({**SIZES, "empty": None}), promised, user=ME)
    assert not_a_file.lacking == frozenset({"empty"})


def test_what_turned_out_wrong_is_lacking_whatever_its_size() -> None:
    assert found(SIZES, replaced=True).lacking == frozenset(SIZES)


def test_before_the_listing_nobody_can_tell() -> None:
    judged = judge("/m", seen(SIZES), None, user=ME)
    assert judged.lacking is None
    assert not judged.whole
    assert judged.obstacle == ""


def test_an_archive_is_compared_once_it_was_looked_into() -> None:
    packed = replace(listing({}), archive=listing({"m.tar": 1000}).files[0])
    judged = judge("/m", seen(SIZES), packed, user=ME)
    assert judged.lacking is None
    assert not judged.whole
    opened = replace(packed, files=listing(SIZES).files)
    assert judge("/m", seen(SIZES), opened, user=ME).whole


def test_only_root_takes_over_what_is_another_users() -> None:
    judged = found(SIZES, owner=1000)
    assert judged.whole, "it is served all the same"
    assert "user 1000, not of 64000" in judged.obstacle
    assert "prepare --adopt" in judged.obstacle
    assert judge("/m", seen(SIZES, owner=1000), listing(SIZES), user=0).obstacle == ""


def test_a_mount_in_it_is_named() -> None:
    inside = [*seen(SIZES), Seen(path="weights/disk", owner=ME, mounted=True)]
    judged = judge("/models/k", inside, listing(SIZES), user=0)
    assert "/models/k/weights/disk is on another file system" in judged.obstacle


def test_files_with_several_names_are_told_by_their_inode() -> None:
    judged = found({"config.json": 2, "empty": 0}, inode=7, names=2)
    assert judged.shared == {(7, 2)}


def test_what_cannot_be_read_says_how_it_can() -> None:
    assert "prepare --adopt" in unreadable("cannot look through /m: Permission denied")
