"""`hf://` against hubs that page, gate, stall and lie, with the real client in between."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from agent.errors import AgentError, Reason
from agent.model import HttpLocator, Listing, ModelRef
from agent.sources import Sources
from agent.sources.hf import HuggingFace
from tests.contracts.source_contract import bring, refusal
from tests.fakes.hub import Dribble, Fault, Hub, Long, Stall, Status, Truncate
from tests.fakes.wire import Certificates, Proxy, Wire, make_certificates, reply

REPO = "acme/tiny"
URI = f"hf://{REPO}"
FILES: dict[str, bytes | Path] = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 1000,
    "gguf/q4.gguf": b"4" * 100,
    "gguf/q8.gguf": b"8" * 100,
    "gguf/notes/read.me": b"notes",
}
COMMIT = "c0ffee" * 6 + "beef"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No token and no proxy of this machine; a session of its own, which reads the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub", page_size=2) as hub:
        hub.add(REPO, FILES)
        yield hub


def _source(endpoint: str, token: str | None = None, **bounds: Any) -> HuggingFace:
    return HuggingFace(endpoint, lambda: token, **{"answer_seconds": 5.0, **bounds})


async def _list(hub: Hub, uri: str = URI, **options: Any) -> Listing:
    return await _source(hub.endpoint).list(ModelRef(uri=uri, **options))


def _paths(listing: Listing) -> list[str]:
    return [file.path for file in listing.files]


# --- what it lists ------------------------------------------------------------------------------


async def test_pages(hub: Hub) -> None:
    listing = await _list(hub)
    assert _paths(listing) == sorted(FILES)
    assert len([r for r in hub.requests if "/tree/" in r.path]) == 4, "of 7 entries, 2 a page"


async def test_a_tree_of_many_pages(hub: Hub) -> None:
    names = {f"part-{n:03}.bin": b"%d" % n for n in range(101)}
    hub.add(REPO, dict(names))
    assert _paths(await _list(hub)) == sorted(names)


async def test_every_kind_of_revision_is_pinned_to_its_commit(hub: Hub) -> None:
    first = hub.add(REPO, FILES)
    hub.tag(REPO, "v1/final", first)
    second = hub.add(REPO, {"config.json": b"second"})
    proposed = hub.add(REPO, {"config.json": b"proposed"}, branch="refs/pr/1")
    expected = {
        "": second,
        ":": second,
        ":main": second,
        ":v1%2Ffinal": first,
        f":{first}": first,
        ":refs%2Fpr%2F1": proposed,
    }
    for revision, commit in expected.items():
        listing = await _list(hub, URI + revision)
        assert listing.revision == commit, revision
        locator = await _source(hub.endpoint).locate(listing, listing.files[0])
        assert isinstance(locator, HttpLocator)
        assert f"/resolve/{commit}/" in locator.url


async def test_the_tree_is_that_of_the_commit(hub: Hub) -> None:
    """A branch that moves between the two questions."""
    listing = await _list(hub, f"{URI}:main")
    trees = [r.path for r in hub.requests if "/tree/" in r.path]
    assert all(path.endswith(f"/tree/{listing.revision}") for path in trees)


@pytest.mark.parametrize(
    ("below", "published"),
    [
        ("/gguf", ["notes/read.me", "q4.gguf", "q8.gguf"]),
        ("/gguf/", ["notes/read.me", "q4.gguf", "q8.gguf"]),
        ("/gguf/notes", ["read.me"]),
        ("/gguf/q4.gguf", ["q4.gguf"]),
        ("/model.safetensors", ["model.safetensors"]),
    ],
)
async def test_below(hub: Hub, tmp_path: Path, below: str, published: list[str]) -> None:
    listing = await _list(hub, f"{URI}:main{below}")
    assert _paths(listing) == published
    brought = await bring(_source(hub.endpoint), listing, tmp_path)
    root = below.strip("/")
    for path in published:
        assert brought[path] == FILES[root if root in FILES else f"{root}/{path}"]


async def test_what_a_manifest_remembers_is_enough_to_locate(hub: Hub, tmp_path: Path) -> None:
    """A repair has a listing without the names at the source."""
    for below in ("", "/gguf", "/gguf/q4.gguf"):
        listing = await _list(hub, URI + below)
        bare = replace(listing, files=tuple(replace(f, origin="") for f in listing.files))
        brought = await bring(_source(hub.endpoint), bare, tmp_path)
        assert brought == await bring(_source(hub.endpoint), listing, tmp_path)


async def test_patterns_are_of_the_published_names(hub: Hub) -> None:
    assert _paths(await _list(hub, f"{URI}/gguf", include=("q*",))) == ["q4.gguf", "q8.gguf"]


async def test_promises(hub: Hub) -> None:
    digests = {file.path: file.digest for file in (await _list(hub)).files}
    assert digests["config.json"] is not None
    assert digests["config.json"].algorithm == "git-sha1"
    assert digests["model.safetensors"] is not None
    assert digests["model.safetensors"].algorithm == "sha256"


# --- who asks -----------------------------------------------------------------------------------


async def test_the_token_of_the_environment_may_change(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.private(REPO, tokens={"hf_one", "hf_two", "hf_file"})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    source, ref = Sources().of(URI), ModelRef(uri=URI)
    assert (await refusal(source, ref)).reason is Reason.REPOSITORY_NOT_FOUND
    (tmp_path / "token").write_text("hf_file\n")
    for token in ("hf_file", "hf_one", "hf_two"):
        if token != "hf_file":
            monkeypatch.setenv("HF_TOKEN", f" {token}\n")
        hub.clear()
        listing = await source.list(ref)
        assert {r.authorization for r in hub.requests} == {f"Bearer {token}"}
        locator = await source.locate(listing, listing.files[0])
        assert isinstance(locator, HttpLocator)
        assert locator.headers == {"Authorization": f"Bearer {token}"}
        assert token not in repr(locator)
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    assert (await refusal(source, ref)).reason is Reason.UNAUTHORIZED


async def test_a_token_that_cannot_be_sent(hub: Hub) -> None:
    source = _source(hub.endpoint, "hf_\u20acuro")
    error = await refusal(source, ModelRef(uri=URI))
    assert error.reason is Reason.UNAUTHORIZED
    assert "uro" not in repr(error)
    listing = await _list(hub)
    with pytest.raises(AgentError):
        await source.locate(listing, listing.files[0])


async def test_a_gated_repository_is_listed_and_not_given(hub: Hub, tmp_path: Path) -> None:
    hub.gate(REPO, tokens={"hf_friend"})
    hub.accept("hf_stranger")
    for token in (None, "hf_stranger"):
        source = _source(hub.endpoint, token)
        listing = await source.list(ModelRef(uri=URI))
        with pytest.raises(AgentError) as caught:
            await bring(source, listing, tmp_path)
        assert caught.value.reason is Reason.GATED
    await bring(_source(hub.endpoint, "hf_friend"), listing, tmp_path)
    assert not hub.cdn_saw_authorization


@pytest.mark.parametrize(
    "endpoint",
    ["https://user:password@host", "ftp://host", "host", "https://host?x", "https://host#x", ""],
)
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(AgentError) as caught:
        HuggingFace(endpoint, lambda: None)
    assert caught.value.reason is Reason.INVALID_SPEC
    assert "password@" not in caught.value.message


async def test_an_endpoint_below_a_path(hub: Hub) -> None:
    def answer(head: bytes) -> bytes:
        if b" /mirror/api/models/acme/tiny/tree/" in head:
            return _json([_file("a", b"1")])
        return _json({"id": REPO, "sha": COMMIT}) if b" /mirror/api/" in head else reply(404)

    with Wire(answer) as wire:
        source = _source(wire.url("/mirror"))
        listing = await source.list(ModelRef(uri=URI))
        locator = await source.locate(listing, listing.files[0])
        assert isinstance(locator, HttpLocator)
        assert locator.url == wire.url(f"/mirror/acme/tiny/resolve/{COMMIT}/a")


# --- answers that are none ----------------------------------------------------------------------


@pytest.mark.parametrize("api", ["/api/models/acme/tiny", "/api/*/tree/*"], ids=["info", "tree"])
@pytest.mark.parametrize(
    ("fault", "reason", "after"),
    [
        (Status(429, {"Retry-After": "3600"}), Reason.RATE_LIMITED, 3600),
        (Status(429), Reason.RATE_LIMITED, None),
        (Status(500), Reason.SERVER_ERROR, None),
        (Status(503, {"Retry-After": "7"}), Reason.SERVER_ERROR, 7),
        (Status(504, body=b"<html>" * 1000), Reason.SERVER_ERROR, None),
        (Status(408), Reason.SERVER_ERROR, None),
        (Status(401), Reason.UNAUTHORIZED, None),
        (Status(403), Reason.UNAUTHORIZED, None),
        (Status(403, {"X-Error-Code": "GatedRepo"}), Reason.GATED, None),
        (
            Status(403, {"X-Error-Message": "Access to this resource is disabled."}),
            Reason.REPOSITORY_NOT_FOUND,
            None,
        ),
        (Status(404), Reason.REPOSITORY_NOT_FOUND, None),
        (Status(404, {"X-Error-Code": "RepoNotFound"}), Reason.REPOSITORY_NOT_FOUND, None),
        (Status(404, {"X-Error-Code": "RevisionNotFound"}), Reason.REVISION_NOT_FOUND, None),
        (Status(404, {"X-Error-Code": "EntryNotFound"}), Reason.FILE_NOT_FOUND, None),
        (Status(400), Reason.BAD_RESPONSE, None),
        (Status(418), Reason.BAD_RESPONSE, None),
        (Status(200, {}, b"<html>sign in to the network</html>"), Reason.BAD_RESPONSE, None),
        (Status(200, {}, b""), Reason.BAD_RESPONSE, None),
        (Status(200, {}, b"\xff\xfe"), Reason.BAD_RESPONSE, None),
        (Status(200, {}, b"[" * 100_000), Reason.BAD_RESPONSE, None),
        (Status(200, {}, b"null"), Reason.BAD_RESPONSE, None),
        (Status(200, {}, b'"text"'), Reason.BAD_RESPONSE, None),
        (Status(200, {"Content-Encoding": "gzip"}, b"no gzip"), Reason.NETWORK, None),
        (Truncate(10), Reason.NETWORK, None),
        (Stall(0), Reason.STALLED, None),
        (Stall(10), Reason.STALLED, None),
        (Dribble(bytes_per_second=30), Reason.STALLED, None),
    ],
    ids=lambda value: repr(value)[:60],
)
async def test_every_answer_has_its_reason_at_once(
    hub: Hub, api: str, fault: Fault, reason: Reason, after: float | None
) -> None:
    """The client by itself would try six times, and sleep for as long as it is told to."""
    hub.fault(api, fault)
    begun = time.monotonic()
    source = _source(hub.endpoint, answer_seconds=0.3, listing_seconds=1.5)
    error = await refusal(source, ModelRef(uri=URI))
    assert error.reason is reason
    assert error.retry_after_seconds == after
    assert time.monotonic() - begun < 5
    assert len([r for r in hub.requests if r.path.endswith(REPO)]) <= 1
    assert len([r for r in hub.requests if "/tree/" in r.path]) <= 1
    assert len(error.message) < 500


async def test_refused(hub: Hub) -> None:
    hub.stop()
    begun = time.monotonic()
    error = await refusal(_source(hub.endpoint), ModelRef(uri=URI))
    assert error.reason is Reason.NETWORK
    assert "refused" in error.message
    assert hub.endpoint in error.message
    assert time.monotonic() - begun < 5
    hub.start()
    assert (await _list(hub)).files


@pytest.mark.parametrize("endpoint", ["http://localmodel.invalid", "http://host:port"])
async def test_no_such_host(endpoint: str) -> None:
    error = await refusal(_source(endpoint), ModelRef(uri=URI))
    assert error.reason is Reason.NETWORK


async def test_a_hub_that_was_restarted(hub: Hub) -> None:
    """A kept connection that went stale is the client's to replace."""
    for _ in range(3):
        assert (await _list(hub)).files
        hub.stop()
        hub.start()


def _json(value: object, headers: dict[str, str] | None = None) -> bytes:
    return reply(200, json.dumps(value).encode(), headers or {})


def _file(path: object, data: bytes, **other: Any) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": "0" * 40, **other}


def _hub_of(
    tree: object, info: object = None, headers: dict[str, str] | None = None
) -> Callable[[bytes], bytes]:
    def answer(head: bytes) -> bytes:
        if b"/tree/" in head.partition(b"\r\n")[0]:
            return _json(tree, headers)
        return _json({"id": REPO, "sha": COMMIT} if info is None else info)

    return answer


@pytest.mark.parametrize(
    "tree",
    [
        {"error": "no list"},
        ["text"],
        [{}],
        [{"type": "file"}],
        [_file(None, b"1")],
        [_file(7, b"1")],
        [_file("a", b"1", size=-1)],
        [_file("a", b"1", size=10**20)],
        [_file("a", b"1", size=2**63)],
        [_file("a", b"1", size=2**62), _file("b", b"1", size=2**62)],
        [_file("a", b"1", lfs={"oid": "0" * 64, "size": 2**63, "pointerSize": 1})],
        [_file("a", b"1", size="1")],
        [_file("a", b"1", size=1.5)],
        [_file("a", b"1", size=True)],
        [_file("a", b"1", size=None)],
        [_file("a", b"1", oid="xyz")],
        [_file("a", b"1", oid=None)],
        [_file("a", b"1", oid="0" * 40 + "\nx")],
        [_file("a", b"1", lfs={})],
        [_file("a", b"1", lfs={"oid": "0" * 40, "size": 1, "pointerSize": 1})],
        [_file("a", b"1", lfs={"oid": "0" * 64, "size": "1", "pointerSize": 1})],
        [_file("a", b"1", lfs="text")],
    ],
    ids=lambda value: repr(value)[:70],
)
async def test_a_tree_that_is_none(tree: object) -> None:
    with Wire(_hub_of(tree)) as wire:
        error = await refusal(_source(wire.url("")), ModelRef(uri=URI))
    assert error.reason is Reason.BAD_RESPONSE
    assert error.message.isprintable()


@pytest.mark.parametrize(
    "info",
    [{}, {"id": REPO}, {"id": REPO, "sha": None}, {"id": REPO, "sha": 7}, [1], 7]
    + [{"id": REPO, "sha": sha} for sha in ("main", "../..", "a\nb", "0" * 41, "")],
    ids=repr,
)
async def test_a_commit_that_is_none(info: object) -> None:
    with Wire(_hub_of([_file("a", b"1")], info)) as wire:
        error = await refusal(_source(wire.url("")), ModelRef(uri=URI))
    assert error.reason is Reason.BAD_RESPONSE


async def test_xet_is_not_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub names it in the tree and in the headers of every file; we ask for the plain bytes."""
    weights = b"w" * 1000
    lfs = {"oid": hashlib.sha256(weights).hexdigest(), "size": 1000, "pointerSize": 130}
    xet = {"X-Xet-Hash": "f" * 64, "Link": '<http://127.0.0.1:1/xet>; rel="xet-auth"'}

    def answer(head: bytes) -> bytes:
        if b"/resolve/" in head:
            return reply(200, weights, xet)
        return _hub_of([_file("w.bin", weights, lfs=lfs, xetHash="f" * 64)], headers=xet)(head)

    with Wire(answer) as wire:
        source = _source(wire.url(""))
        listing = await source.list(ModelRef(uri=URI))
        assert await bring(source, listing, tmp_path) == {"w.bin": weights}


async def test_a_listing_without_an_end_ends() -> None:
    def answer(head: bytes) -> bytes:
        return _hub_of([_file("a", b"1")], headers=following)(head)

    with Wire(answer) as wire:
        following = {"Link": f'<{wire.url("/api/x/tree/y?again")}>; rel="next"'}
        begun = time.monotonic()
        error = await refusal(_source(wire.url(""), listing_seconds=0.5), ModelRef(uri=URI))
        assert error.reason is Reason.STALLED
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("how", ["next page", "redirect"])
async def test_the_token_goes_to_the_hub_only(how: str) -> None:
    """A mirror that passes the hub's own pages on; one that sends its users away."""

    def answer(head: bytes) -> bytes:
        if how == "redirect" and b"/tree/" in head:
            return reply(302, b"", {"Location": other.url("/api/models/x/tree/y")})
        link = {"Link": f'<{other.url("/api/models/x/tree/y")}>; rel="next"'}
        return _hub_of([_file("a", b"1")], headers=link)(head)

    with Wire(_hub_of([_file("b", b"1")])) as other, Wire(answer) as hub:
        source = _source(hub.url(""), "hf_secret")
        listing = await source.list(ModelRef(uri=URI))
    assert _paths(listing) == (["b"] if how == "redirect" else ["a", "b"])
    assert all(b"Bearer hf_secret" in head for head in hub.heads)
    assert len(other.heads) == 1
    assert b"hf_secret" not in other.heads[0]


async def test_cancelled_while_the_hub_says_nothing() -> None:
    """The thread is left to its time limit, and is none that the end of the process waits for."""
    with Wire(lambda head: None) as wire:
        task = asyncio.create_task(_source(wire.url("")).list(ModelRef(uri=URI)))
        while not wire.heads:
            await asyncio.sleep(0.01)
        task.cancel()
        begun = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - begun < 1
        left = [thread for thread in threading.enumerate() if thread.name == "source"]
        assert all(thread.daemon for thread in left)
    for thread in left:
        thread.join(timeout=10)


async def test_listings_do_not_disturb_each_other(hub: Hub, tmp_path: Path) -> None:
    """One session for all: a listing that fails must not take the others' connections with it."""
    with Hub(tmp_path / "gone") as gone:
        pass
    results = await asyncio.gather(
        *(_list(hub) for _ in range(10)),
        *(refusal(_source(gone.endpoint), ModelRef(uri=URI)) for _ in range(10)),
    )
    assert [type(result) for result in results] == [Listing] * 10 + [AgentError] * 10


# --- through what -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


async def test_tls(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub(tmp_path / "hub", tls=certificates.server, page_size=2) as hub:
        hub.add(REPO, FILES)
        error = await refusal(_source(hub.endpoint), ModelRef(uri=URI))
        assert error.reason is Reason.NETWORK
        assert "certificate" in error.message.lower()
        assert hub.requests == []

        huggingface_hub.close_session()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
        source = _source(hub.endpoint)
        listing = await source.list(ModelRef(uri=URI))
        assert await bring(source, listing, tmp_path) == FILES


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_through_a_proxy(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    basic = "Basic dXNlcjpwQHNz"  # user:p@ss
    context = certificates.server if tls else None
    with Hub(tmp_path / "hub", tls=context) as hub, Proxy(basic) as proxy:
        hub.add(REPO, FILES)
        hub.accept("hf_secret")
        proxy_url = f"http://user:p%40ss@127.0.0.1:{proxy.port}"
        monkeypatch.setenv("https_proxy" if tls else "http_proxy", proxy_url)
        source = _source(hub.endpoint, "hf_secret")
        listing = await source.list(ModelRef(uri=URI))
        listed = len(proxy.heads)
        assert listed
        assert await bring(source, listing, tmp_path) == FILES
        assert len(proxy.heads) > listed, "the files go the same way"
    for head in proxy.heads:
        assert f"Proxy-Authorization: {basic}".encode() in head
        assert not tls or b"hf_secret" not in head
    assert all(b"Proxy-" not in head for head in proxy.inside)


async def test_around_a_proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:password@127.0.0.1:1")
    error = await refusal(_source(hub.endpoint), ModelRef(uri=URI))
    assert error.reason is Reason.NETWORK
    assert "password" not in repr(error) + repr(error.__cause__)
    huggingface_hub.close_session()
    monkeypatch.setenv("no_proxy", "10.0.0.0/8,127.0.0.0/8")
    assert (await _list(hub)).files


async def test_a_proxy_that_cannot_be_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://user:password@127.0.0.1:1")
    error = await refusal(_source(hub.endpoint), ModelRef(uri=URI))
    assert error.reason is Reason.UNSUPPORTED
    assert "password" not in repr(error)


async def test_more_than_was_announced(hub: Hub) -> None:
    hub.fault("/api/*", Long(5), times=1)
    error = await refusal(_source(hub.endpoint), ModelRef(uri=URI))
    assert error.reason is Reason.BAD_RESPONSE
