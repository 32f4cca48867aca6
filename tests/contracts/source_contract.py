"""What every source keeps, the fake one included. Run by `test_sources.py`.

A `World` is one source with the means to put something behind it. What no `World` of a kind can
hold (a file system has no `..` among its names) is not asked of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.errors import AgentError, Reason
from agent.layout import unsafe
from agent.model import Listing, ModelRef
from agent.sources import Source
from agent.transfer import Engine, FileJob

WEIGHTS = random.Random(3).randbytes(700_000)
FILES: Mapping[str, bytes] = {
    "model.safetensors": WEIGHTS,
    "config.json": b'{"model_type": "tiny"}\n',
    "empty.txt": b"",
    "B.txt": b"capital",
    "a.txt": b"small",
    "sub/deep/notes.md": b"# notes\n",
    "sub.txt": b"before sub/, as bytes",
    "sub/name with space & ünïcode #1?.txt": b"quoted\n",
    "zoë/ʃ.txt": b"two bytes each",
    "percent%20sign.txt": b"not a space",
}


_ODD = "aZ09 -_.+%&$@=;:,?#'()!*~ü漢😀"


def generated(seed: int) -> dict[str, bytes]:
    """A model of odd names that every kind of source can hold, and a file system too."""
    dice = random.Random(seed)

    def name() -> str:
        made = "".join(dice.choices(_ODD, k=dice.randint(1, 8)))
        return made if made.strip(".") else made + "x"

    files: dict[str, bytes] = {}
    for _ in range(dice.randint(1, 25)):
        depth = dice.choice([1, 1, 2, 3])
        # Each directory of its own kind of name, so that none is also a file.
        path = "".join(f"d{name()}/" for _ in range(depth - 1)) + f"f{name()}"
        files[path] = dice.randbytes(dice.choice([0, 0, 1, 100, 70_000]))
    return files


class World(ABC):
    """One source, and what is behind it."""

    source: Source
    secrets: tuple[str, ...] = ()
    """What it uses to get in, if anything."""

    malformed: Sequence[str]
    well_formed: Sequence[str]
    missing: Sequence[tuple[str, Reason]]

    @abstractmethod
    def publish(self, files: Mapping[str, bytes]) -> str:
        """Make exactly these files what a URI means from now on; the URI, the same each time."""

    @abstractmethod
    def hostile(self) -> Sequence[Sequence[str]]:
        """Sets of names of which each holds one that must not be created."""

    @abstractmethod
    def publish_names(self, names: Sequence[str]) -> str:
        """As `publish`, with `good.txt` and these names, however odd."""


async def bring(source: Source, listing: Listing, into: Path) -> dict[str, bytes]:
    """Every file of a listing, through the engine, proven."""
    engine = Engine(stall_seconds=5.0)
    brought = {}
    try:
        for file in listing.files:
            path = into / hashlib.sha256(file.path.encode()).hexdigest()

            async def locate(file=file):  # type: ignore[no-untyped-def]
                return await source.locate(listing, file)

            digest = await engine.fetch(
                FileJob(
                    path=path,
                    size=file.size,
                    promised=file.digest,
                    locate=locate,
                    on_bytes=lambda done, received: None,
                    on_retry=lambda error: None,
                )
            )
            brought[file.path] = path.read_bytes()
            assert digest == hashlib.sha256(brought[file.path]).hexdigest()
    finally:
        engine.close()
    return brought


async def refusal(source: Source, ref: ModelRef) -> AgentError:
    with pytest.raises(AgentError) as caught:
        await source.list(ref)
    return caught.value


@contextmanager
def suppress_only(reason: Reason) -> Iterator[None]:
    try:
        yield
    except AgentError as error:
        if error.reason is not reason:
            raise


class SourceContract:
    """Subclasses give a fixture `world`."""

    async def test_a_listing_is_complete_sorted_and_stable(self, world: World) -> None:
        ref = ModelRef(uri=world.publish(FILES))
        world.source.check(ref)
        listing = await world.source.list(ref)
        assert [file.path for file in listing.files] == sorted(FILES, key=lambda p: p.encode())
        assert listing.ref == ref
        assert listing.revision
        assert await world.source.list(ref) == listing

    async def test_what_it_says_is_what_comes(self, world: World, tmp_path: Path) -> None:
        listing = await world.source.list(ModelRef(uri=world.publish(FILES)))
        assert {file.path: file.size for file in listing.files} == {
            path: len(data) for path, data in FILES.items()
        }
        assert await bring(world.source, listing, tmp_path) == FILES

    async def test_a_listing_is_pinned(self, world: World, tmp_path: Path) -> None:
        """What comes later is what was listed, or nothing."""
        uri = world.publish(FILES)
        listing = await world.source.list(ModelRef(uri=uri))
        assert world.publish({**FILES, "config.json": b"{}", "model.safetensors": b"new"}) == uri
        assert (await world.source.list(ModelRef(uri=uri))).revision != listing.revision
        brought: Mapping[str, bytes] = FILES
        with suppress_only(Reason.SOURCE_CHANGED):
            brought = await bring(world.source, listing, tmp_path)
        assert brought == FILES

    @pytest.mark.parametrize(
        ("include", "exclude", "left"),
        [
            (("*.txt",), (), {p for p in FILES if p.endswith(".txt")}),
            (("sub/",), (), {p for p in FILES if p.startswith("sub/")}),
            (("sub\\*",), (), {p for p in FILES if p.startswith("sub/")}),
            ((), ("*",), set()),
            ((), ("*.txt", "*.md", "zo*"), {"model.safetensors", "config.json"}),
            (("*.json", "*.md"), ("sub/*",), {"config.json"}),
            (("CONFIG.JSON",), (), set()),
            (("[ab].txt",), (), {"a.txt"}),
        ],
    )
    async def test_patterns(
        self, world: World, include: tuple[str, ...], exclude: tuple[str, ...], left: set[str]
    ) -> None:
        ref = ModelRef(uri=world.publish(FILES), include=include, exclude=exclude)
        if left:
            assert {file.path for file in (await world.source.list(ref)).files} == left
        else:
            assert (await refusal(world.source, ref)).reason is Reason.EMPTY_LISTING

    async def test_nothing_is_no_model(self, world: World) -> None:
        error = await refusal(world.source, ModelRef(uri=world.publish({})))
        assert error.reason is Reason.EMPTY_LISTING

    async def test_names_cannot_escape(self, world: World) -> None:
        for names in world.hostile():
            uri = world.publish_names(names)
            error = await refusal(world.source, ModelRef(uri=uri))
            assert error.reason is Reason.UNSAFE_PATH, names
            assert "\n" not in error.message
            assert error.message.isprintable()
            ref = ModelRef(uri=uri, include=("good.txt",))
            assert [file.path for file in (await world.source.list(ref)).files] == ["good.txt"]
            for file in (await world.source.list(ref)).files:
                assert unsafe(file.path) is None

    async def test_what_is_not_there_says_so(self, world: World) -> None:
        for uri, reason in world.missing:
            world.source.check(ModelRef(uri=uri))
            assert (await refusal(world.source, ModelRef(uri=uri))).reason is reason, uri

    async def test_uris(self, world: World) -> None:
        for uri in world.well_formed:
            world.source.check(ModelRef(uri=uri))
        for uri in world.malformed:
            with pytest.raises(AgentError) as caught:
                world.source.check(ModelRef(uri=uri))
            assert caught.value.reason is Reason.INVALID_SPEC, uri
            assert caught.value.message.isprintable(), uri
            # Nobody has to have asked first.
            assert (await refusal(world.source, ModelRef(uri=uri))).reason is Reason.INVALID_SPEC

    async def test_secrets_are_kept(self, world: World) -> None:
        ref = ModelRef(uri=world.publish(FILES))
        listing = await world.source.list(ref)
        shown = [repr(world.source), str(world.source), repr(listing), str(listing)]
        for file in listing.files:
            locator = await world.source.locate(listing, file)
            shown += [repr(locator), str(locator)]
        refused = [await refusal(world.source, ModelRef(uri=uri)) for uri, _ in world.missing]
        for error in refused:
            chain: BaseException | None = error
            while chain is not None:
                shown += [repr(chain), str(chain)]
                chain = chain.__cause__ or chain.__context__
        for secret in world.secrets:
            assert not [text for text in shown if secret in text]

    async def test_a_listing_can_be_cancelled(self, world: World) -> None:
        task = asyncio.create_task(world.source.list(ModelRef(uri=world.publish(FILES))))
        await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=1)
        assert done == {task}
        assert task.cancelled() or task.result().files
