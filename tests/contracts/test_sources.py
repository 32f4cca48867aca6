"""The source contract, run on each of them; and the patterns, against the hub client's own."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined] # lazily
from hypothesis import example, given
from hypothesis import strategies as st

from agent.errors import AgentError, Reason
from agent.model import ModelRef, RemoteFile
from agent.sources import Source, Sources
from agent.sources.base import selected
from agent.sources.hf import HuggingFace
from agent.sources.local import LocalPath
from agent.sources.s3 import S3
from tests import stores
from tests.contracts.source_contract import FILES, SourceContract, World, bring
from tests.fakes.hub import Hub
from tests.fakes.s3 import SECRET, Store
from tests.fakes.source import FakeSource
from tests.stores import AGREEING, RealStore

REPO = "acme/tiny"
EVERYWHERE_HOSTILE = [["line\nfeed"], ["back\\slash"], ["\x1b[31mred"], ["sub/bell\x07"]]
NOT_ON_DISK = [
    ["../../x"],
    ["/etc/x"],
    ["a\0b"],
    ["n" * 300],
    ["a//b"],
    [""],
    ["."],
    ["a/../b"],
    ["\ud800"],
    ["twice", "twice"],
    ["both", "both/and"],
    ["/".join(["deep"] * 300)],
]


class FakeWorld(World):
    malformed = (
        "fake://",
        "fake://a/b",
        "fake://A",
        "hf://a/b",
        "fake:x",
        "",
    )
    well_formed = (
        "fake://tiny",
        "fake://a-1",
    )
    missing = (("fake://absent", Reason.REPOSITORY_NOT_FOUND),)

    def __init__(self, root: Path) -> None:
        self.fake = FakeSource(root)
        self.source: Source = self.fake

    def publish(self, files: Mapping[str, bytes]) -> str:
        self.fake.add("fake://tiny", files)
        return "fake://tiny"

    def hostile(self) -> Sequence[Sequence[str]]:
        return EVERYWHERE_HOSTILE + NOT_ON_DISK

    def publish_names(self, names: Sequence[str]) -> str:
        files = (RemoteFile(path=name, size=1, origin=name) for name in ["good.txt", *names])
        self.fake.describe("fake://odd", files)
        return "fake://odd"


class HubWorld(World):
    secrets = ("hf_sesame",)
    malformed = (
        *("hf://", "hf://owner", "hf://owner/", "hf:///name", "hf://owner/:main", "hf://gpt2"),
        *("hf://o/m/", "hf://o/m//below", "hf://o/m/a//b", "hf://o/m/../x", "hf://o/m/./x"),
        *("hf://o/..", "hf://../m", "hf://o--o/m", "hf://o/m.git", "hf://-o/m", "hf://o/m?x=1"),
        *("hf://o/m#x", "hf://o/m@rev", "hf://o o/m", "hf://o/m:a/../b", "hf://o/m:.."),
        *("hf://o/m:a..b", "hf://o/m:x%0ay", "hf://o/m/x\ny", "hf://o/" + "m" * 200, "o/m"),
        *("hf://o/m:%2e%2e", "hf://ö/m", "HF://o/m", "hf://o:r/m"),
    )
    well_formed = (
        *("hf://o/m", "hf://o/m:", "hf://o/m:main", "hf://o/m:v1.0", "hf://o/m:refs%2Fpr%2F1"),
        *("hf://Qwen/Qwen2-0.5B-Instruct", "hf://o/m:" + "0" * 40, "hf://o/m/sub", "hf://o/m/sub/"),
        *("hf://o/m/sub/file.gguf", "hf://o/m:v1/sub/file with space.gguf", "hf://o/m:/x"),
    )
    missing = (
        ("hf://acme/absent", Reason.REPOSITORY_NOT_FOUND),
        ("hf://acme/tiny:absent", Reason.REVISION_NOT_FOUND),
        ("hf://acme/tiny:" + "0" * 40, Reason.REVISION_NOT_FOUND),
        ("hf://acme/tiny/absent", Reason.FILE_NOT_FOUND),
        ("hf://acme/tiny/sub/dee", Reason.FILE_NOT_FOUND),
        ("hf://acme/tiny/config.json/x", Reason.FILE_NOT_FOUND),
    )

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        hub.accept("hf_sesame")
        hub.add(REPO, FILES)
        self.source: Source = HuggingFace(hub.endpoint, lambda: "hf_sesame")

    def publish(self, files: Mapping[str, bytes]) -> str:
        self.hub.add(REPO, files)
        return f"hf://{REPO}"

    def hostile(self) -> Sequence[Sequence[str]]:
        return EVERYWHERE_HOSTILE + NOT_ON_DISK

    def publish_names(self, names: Sequence[str]) -> str:
        self.hub.raw_tree(
            "acme/odd",
            [
                {"type": "file", "path": name, "size": 1, "oid": "0" * 40}
                for name in ["good.txt", *names]
            ],
        )
        return "hf://acme/odd"


class LocalWorld(World):
    malformed = (
        *("file://host/x", "file://", "file://x", "file:x", "relative", "", "file:///a?b"),
        *("file:///a#b", "file:///a%00b", "file://localhost", "/a\0b"),
    )

    def __init__(self, root: Path) -> None:
        self.root = root
        self.well_formed = ["file:///x", "file://localhost/x", "/x", "/x?y#z", "file:///a%23b", "/"]
        self.missing = [
            (f"file://{root}/absent", Reason.FILE_NOT_FOUND),
            (f"{root}/absent", Reason.FILE_NOT_FOUND),
            (f"file://{Path(__file__)}/below", Reason.FILE_NOT_FOUND),
        ]
        self.source: Source = LocalPath()

    def _empty(self, name: str) -> Path:
        shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / name).mkdir(parents=True)
        return self.root / name

    def publish(self, files: Mapping[str, bytes]) -> str:
        root = self._empty("model")
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return f"file://{root}"

    def hostile(self) -> Sequence[Sequence[str]]:
        return [*EVERYWHERE_HOSTILE, [os.fsdecode(b"latin-\xe9")]]

    def publish_names(self, names: Sequence[str]) -> str:
        root = self._empty("odd")
        for name in ["good.txt", *names]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")
        return str(root)


class StoreWorld(World):
    secrets = (SECRET,)
    malformed = (
        *("s3://", "s3:///key", "s3:bucket", "S3://bucket", "s3://b", "s3://bucket:1/x", ""),
        *("s3://user@bucket/x", "s3://bücket/x", "s3://bucket/a\nb", "s3://bu cket", "bucket/x"),
        *("s3://" + "b" * 64, "s3://bucket?x=1", "s3://arn:aws:s3:::bucket/x"),
    )
    well_formed = (
        *("s3://bucket", "s3://bucket/", "s3://foo.bar-1/x", "s3://Old_Bucket/x", "s3://bucket/a/"),
        *("s3://bucket//a", "s3://bucket/a b+c%20d?e#f", "s3://bucket/zoë", "s3://bucket/a/../b"),
    )
    missing = (
        ("s3://absent", Reason.REPOSITORY_NOT_FOUND),
        ("s3://absent/tiny", Reason.REPOSITORY_NOT_FOUND),
        ("s3://models/absent", Reason.EMPTY_LISTING),
        ("s3://models/tin", Reason.EMPTY_LISTING),
        ("s3://models/tiny/config.json/", Reason.EMPTY_LISTING),
    )

    def __init__(self, store: Store | RealStore) -> None:
        self.store = store
        self.publish(FILES)
        self.source: Source = S3(store.environment)

    def publish(self, files: Mapping[str, bytes]) -> str:
        below = {f"tiny/{path}": data for path, data in files.items()}
        self.store.put("models", {**below, "tiny-2/not.bin": b"ours", "tiny2.txt": b"not"})
        return "s3://models/tiny"

    def hostile(self) -> Sequence[Sequence[str]]:
        impossible = ([""], ["\ud800"], ["twice", "twice"])
        return [names for names in EVERYWHERE_HOSTILE + NOT_ON_DISK if names not in impossible]

    def publish_names(self, names: Sequence[str]) -> str:
        self.store.put("odd", {f"x/{name}": b"x" for name in ["good.txt", *names]})
        return "s3://odd/x"


class RealStoreWorld(StoreWorld):
    """It refuses most odd names itself."""

    secrets = (stores.SECRET,)

    def __init__(self, store: RealStore) -> None:
        super().__init__(store)
        self._odd = {"versitygw": "back\\slash", "SeaweedFS": "\x1b[31mred"}[store.name]

    def hostile(self) -> Sequence[Sequence[str]]:
        return [[self._odd]]


class TestFake(SourceContract):
    @pytest.fixture
    def world(self, tmp_path: Path) -> World:
        return FakeWorld(tmp_path / "origin")


class TestHuggingFace(SourceContract):
    @pytest.fixture
    def world(self, tmp_path: Path) -> Iterator[World]:
        huggingface_hub.close_session()
        with Hub(tmp_path / "hub", page_size=3) as hub:
            yield HubWorld(hub)
        huggingface_hub.close_session()


class TestLocal(SourceContract):
    @pytest.fixture
    def world(self, tmp_path: Path) -> World:
        return LocalWorld(tmp_path / "disk")


class TestS3(SourceContract):
    @pytest.fixture
    def world(self) -> Iterator[World]:
        with Store() as store:
            yield StoreWorld(store)


@pytest.fixture(scope="module", params=AGREEING)
def real_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealStore]:
    with AGREEING[request.param](tmp_path_factory.mktemp(request.param)) as store:
        yield store


class TestRealStores(SourceContract):
    @pytest.fixture
    def world(self, real_store: RealStore) -> World:
        return RealStoreWorld(real_store)


# --- patterns -----------------------------------------------------------------------------------

_TEXT = st.text(alphabet="ab./*?[]!-\\é\n", max_size=6)


@given(
    paths=st.lists(_TEXT, max_size=6),
    include=st.lists(_TEXT, max_size=3),
    exclude=st.lists(_TEXT, max_size=3),
)
@example(paths=["sub/a", "sub"], include=["sub/"], exclude=[])
@example(paths=["sub\\a"], include=["sub/*"], exclude=[])
@example(paths=["a/b/c"], include=["a*c"], exclude=["a\\b\\"])
def test_patterns_mean_what_the_hubs_client_means(
    paths: list[str], include: list[str], exclude: list[str]
) -> None:
    ref = ModelRef(uri="fake://x", include=tuple(include), exclude=tuple(exclude))
    theirs = filter_repo_objects(paths, allow_patterns=include or None, ignore_patterns=exclude)
    assert [path for path in paths if selected(path, ref)] == list(theirs)


# --- the fake's own means -----------------------------------------------------------------------


async def test_the_fake_fails_as_told(tmp_path: Path) -> None:
    source = FakeSource(tmp_path)
    source.add("fake://tiny", {"a": b"1"})
    ref = ModelRef(uri="fake://tiny")
    source.fail("list", AgentError(Reason.NETWORK, "no route"), times=1)
    with pytest.raises(AgentError, match="no route"):
        await source.list(ref)
    listing = await source.list(ref)
    source.fail("locate", AgentError(Reason.GATED, "no"))
    for _ in range(3):
        with pytest.raises(AgentError, match="no"):
            await source.locate(listing, listing.files[0])
    source.mend()
    assert await bring(source, listing, tmp_path) == {"a": b"1"}
    assert source.calls == [("list", ref.uri)] * 2 + [("locate", "a")] * 4


async def test_the_fake_waits_as_told(tmp_path: Path) -> None:
    source = FakeSource(tmp_path)
    source.add("fake://tiny", {"a": b"1"})
    with source.held("list"):
        task = asyncio.create_task(source.list(ModelRef(uri="fake://tiny")))
        await asyncio.sleep(0.05)
        assert not task.done()
    await task
    source.slow("list", 0.05)
    begun = time.monotonic()
    await source.list(ModelRef(uri="fake://tiny"))
    assert time.monotonic() - begun >= 0.05


async def test_the_fake_can_be_spoilt(tmp_path: Path) -> None:
    source = FakeSource(tmp_path / "origin", promise=False)
    source.add("fake://tiny", {"a": b"1"})
    listing = await source.list(ModelRef(uri="fake://tiny"))
    assert listing.files[0].digest is None
    source.place("fake://tiny", "a").write_bytes(b"2")
    with pytest.raises(AgentError) as caught:
        await bring(source, listing, tmp_path)
    assert caught.value.reason is Reason.SOURCE_CHANGED


# --- schemes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "reason", "said"),
    [
        ("pvc://claim/x", Reason.UNSUPPORTED, "name it in the InferenceService"),
        ("oci://registry/x", Reason.UNSUPPORTED, "image volume"),
        ("gopher://x", Reason.UNSUPPORTED, "file://, gs://, hf://"),
        ("owner/name", Reason.INVALID_SPEC, "neither"),
        ("", Reason.INVALID_SPEC, "neither"),
    ],
)
def test_a_scheme_without_a_source(uri: str, reason: Reason, said: str) -> None:
    with pytest.raises(AgentError, match=said) as caught:
        Sources().of(uri)
    assert caught.value.reason is reason


def test_a_source_is_made_once() -> None:
    sources = Sources()
    assert isinstance(sources.of("hf://a/b"), HuggingFace)
    assert sources.of("hf://a/b") is sources.of("hf://c/d")
    assert sources.of("/a") is sources.of("file:///b")
