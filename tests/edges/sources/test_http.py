"""One file of a web server, through the real engine: what it promises, and how it can cheat."""

import base64
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from aiohttp import web

from agent.errors import AgentError, Reason
from agent.model import Digest, HttpLocator, ModelRef
from agent.sources.http import Web
from agent.sources.http import _refused as _refusal_of
from tests.contracts.source_contract import bring

WEIGHTS = b"w" * 300_000


@dataclass
class Server:
    """Serves one file as its attributes say."""

    url: str = ""
    data: bytes = WEIGHTS
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    status: int = 200
    chunked: bool = False
    heedless: bool = False
    asked: list[dict[str, str]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(dict(request.headers))
        if self.status != 200:
            return web.Response(status=self.status, headers=self.headers)
        if request.headers.get("If-Match", self.headers.get("ETag")) != self.headers.get("ETag"):
            return web.Response(status=412)
        since, now = request.headers.get("If-Unmodified-Since"), self.headers.get("Last-Modified")
        if since and since != now and not self.heedless:
            return web.Response(status=412)
        if self.chunked:
            response = web.StreamResponse(headers=self.headers)
            response.enable_chunked_encoding()
            await response.prepare(request)
            await response.write(self.data)
            return response
        return web.Response(body=self.data, headers=self.headers)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    app = web.Application()
    app.router.add_get("/{path:.*}", found.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


def _ref(server: Server, path: str = "/models/tiny%20q4.gguf?sig=sesame") -> ModelRef:
    return ModelRef(uri=server.url + path)


async def _refused(ref: ModelRef) -> AgentError:
    with pytest.raises(AgentError) as caught:
        await Web().list(ref)
    assert "sesame" not in caught.value.message
    return caught.value


async def test_a_file_comes_under_its_own_name(server: Server, tmp_path: Path) -> None:
    source = Web({"127.0.0.1-headers": '{"Authorization": "Bearer sesame"}'})
    listing = await source.list(_ref(server))
    (file,) = listing.files
    assert (file.path, file.size, file.digest, file.version) == (
        "tiny q4.gguf",
        len(WEIGHTS),
        None,
        '"one"',
    )
    assert await source.list(_ref(server)) == listing
    assert await bring(source, listing, tmp_path) == {"tiny q4.gguf": WEIGHTS}
    assert {asked.get("Authorization") for asked in server.asked} == {"Bearer sesame"}
    located = await source.locate(listing, file)
    assert isinstance(located, HttpLocator)
    assert "sesame" not in repr(located) + repr(source) + repr(listing.files)


@pytest.mark.parametrize("header", ["Repr-Digest", "Digest"])
async def test_a_digest_is_a_promise_that_is_kept(
    header: str, server: Server, tmp_path: Path
) -> None:
    digest = hashlib.sha256(WEIGHTS).digest()
    text = base64.b64encode(digest).decode()
    server.headers[header] = f"sha-256=:{text}:" if header == "Repr-Digest" else f"SHA-256={text}"
    listing = await Web().list(_ref(server))
    assert listing.files[0].digest == Digest("sha256", digest.hex())
    server.data = b"x" * len(WEIGHTS)
    with pytest.raises(AgentError) as caught:
        await bring(Web(), listing, tmp_path)
    assert caught.value.reason is Reason.DIGEST_MISMATCH


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"ETag": '"one"'}, {"ETag": '"two"'}),
        (
            {"ETag": 'W/"one"', "Last-Modified": "Wed, 21 Oct 2026 07:28:00 GMT"},
            {"ETag": 'W/"one"', "Last-Modified": "Wed, 21 Oct 2026 07:28:01 GMT"},
        ),
    ],
)
async def test_another_version_is_never_mixed_in(
    first: dict[str, str], second: dict[str, str], server: Server, tmp_path: Path
) -> None:
    server.headers = first
    listing = await Web().list(_ref(server))
    server.headers, server.data = second, b"x" * len(WEIGHTS)
    with pytest.raises(AgentError) as caught:
        await bring(Web(), listing, tmp_path)
    assert caught.value.reason is Reason.SOURCE_CHANGED
    assert (await Web().list(_ref(server))).revision != listing.revision


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}, {"ETag": "bare"}, {"ETag": '""'}])
async def test_what_has_no_version_is_refused(headers: dict[str, str], server: Server) -> None:
    server.headers = headers
    error = await _refused(_ref(server))
    assert error.reason is Reason.UNSUPPORTED
    assert "could mix two versions" in error.message


async def test_what_does_not_say_its_size_is_refused(server: Server) -> None:
    server.chunked = True
    assert (await _refused(_ref(server))).reason is Reason.BAD_RESPONSE


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, Reason.UNAUTHORIZED),
        (403, Reason.UNAUTHORIZED),
        (404, Reason.FILE_NOT_FOUND),
        (410, Reason.FILE_NOT_FOUND),
        (418, Reason.BAD_RESPONSE),
        (206, Reason.BAD_RESPONSE),
        (429, Reason.RATE_LIMITED),
        (503, Reason.SERVER_ERROR),
    ],
)
async def test_what_it_answers_is_its_reason(status: int, reason: Reason, server: Server) -> None:
    server.status, server.headers = status, {"Retry-After": "7"}
    error = await _refused(_ref(server))
    assert error.reason is reason
    waits = reason in (Reason.RATE_LIMITED, Reason.SERVER_ERROR)
    assert error.retry_after_seconds == (7.0 if waits else None)
    assert str(status) in error.message


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": "x\\ny"}', '{"a": "\u00e9"}'])
async def test_headers_that_are_none_are_refused_unsaid(text: str, server: Server) -> None:
    with pytest.raises(AgentError) as caught:
        await Web({"127.0.0.1-headers": text}).list(_ref(server))
    assert caught.value.reason is Reason.UNAUTHORIZED
    assert text not in caught.value.message
    assert server.asked == []


async def test_nobody_there_is_a_network_error() -> None:
    error = await _refused(ModelRef(uri="http://127.0.0.1:9/x.gguf?sig=sesame"))
    assert error.reason is Reason.NETWORK


async def test_a_redirect_without_an_end_is_no_answer(server: Server) -> None:
    server.status, server.headers = 302, {"Location": "/again"}
    assert (await _refused(_ref(server))).reason is Reason.BAD_RESPONSE


@pytest.mark.parametrize(
    "uri",
    [
        *("http://", "https:///x", "https://host", "https://host/", "https://host/dir/"),
        *("https://user:sesame@host/x", "ftp://host/x", "https://[::1/x", "x"),
    ],
)
def test_what_is_no_file_of_a_host_is_refused(uri: str) -> None:
    with pytest.raises(AgentError) as caught:
        Web().check(ModelRef(uri=uri))
    assert caught.value.reason is Reason.INVALID_SPEC


@pytest.mark.parametrize("name", ["m.tar.gz", "m.TGZ", "m.zip", "m.tar"])
async def test_an_archive_is_to_be_unpacked(server: Server, name: str) -> None:
    listing = await Web().list(_ref(server, f"/models/{name}?sig=sesame"))
    assert listing.files == ()
    assert listing.archive is not None
    assert (listing.archive.path, listing.archive.version) == (name, '"one"')


async def test_an_archive_that_is_not_unpacked_says_what_to_do(server: Server) -> None:
    error = await _refused(_ref(server, "/m.tar.xz?sig=sesame"))
    assert error.reason is Reason.UNSUPPORTED
    assert "pack it as .tar" in error.message


async def test_a_mend_asks_for_no_version_that_it_does_not_know(server: Server) -> None:
    """The manifest has none; an empty condition would be refused by a strict server."""
    listing = await Web().list(_ref(server))
    bare = replace(listing.files[0], version=None, origin="")
    locator = await Web().locate(listing, bare)
    assert isinstance(locator, HttpLocator)
    assert locator.headers == {}


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("https://host/org/model.git", "use hf:// for a hub's"),
        ("https://acct.blob.core.windows.net/container", "name one blob"),
        ("https://acct.blob.core.windows.net/container/prefix/", "name one blob"),
        ("https://ACCT.z5.blob.storage.azure.net/container/", "name one blob"),
        ("https://acct.file.core.windows.net/share", "name one blob"),
    ],
)
def test_what_kserve_takes_for_more_than_a_file_says_what_to_do(uri: str, advice: str) -> None:
    with pytest.raises(AgentError) as caught:
        Web().check(ModelRef(uri=uri))
    assert caught.value.reason is Reason.UNSUPPORTED
    assert advice in caught.value.message


@pytest.mark.parametrize("status", [403, 404, 409])
def test_a_prefix_of_a_container_is_said_to_be_none(status: int) -> None:
    uri = "https://acct.blob.core.windows.net/container/prefix?sig=sesame"
    Web().check(ModelRef(uri=uri))  # it may be a blob
    error = _refusal_of(uri, status, None)
    assert "a prefix of a container is not listed" in error.message
    assert "sesame" not in error.message
    assert "container" not in _refusal_of("https://host/file", status, None).message


@pytest.fixture
async def two(server: Server) -> AsyncIterator[tuple[Server, Server]]:
    """One that redirects to the other; and the other."""
    other = Server()
    app = web.Application()
    app.router.add_get("/{path:.*}", other.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    other.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    server.status = 302
    server.headers = {"Location": f"{other.url}/moved.gguf?X=1"}
    yield server, other
    await runner.cleanup()


async def test_headers_do_not_go_where_a_redirect_leads(
    two: tuple[Server, Server], tmp_path: Path
) -> None:
    server, other = two
    headers = '{"PRIVATE-TOKEN": "sesame", "Authorization": "Bearer sesame"}'
    source = Web({"127.0.0.1-headers": headers})
    listing = await source.list(_ref(server))
    assert await bring(source, listing, tmp_path) == {"tiny q4.gguf": WEIGHTS}
    assert all(asked["PRIVATE-TOKEN"] == "sesame" for asked in server.asked)
    assert len(other.asked) == 2
    assert not [asked for asked in other.asked if "sesame" in str(asked)]


@pytest.mark.parametrize("target", ["ftp://host/x?X-Amz-Signature=sesame", "http://[::1/?sesame"])
async def test_a_redirect_to_nowhere_says_nothing_of_where(server: Server, target: str) -> None:
    server.status, server.headers = 302, {"Location": target}
    error = await _refused(_ref(server, "/m.gguf"))
    assert error.reason is Reason.BAD_RESPONSE


@pytest.mark.parametrize("says", [True, False], ids=["another time", "no time"])
async def test_a_file_of_a_time_is_never_of_two_times(
    two: tuple[Server, Server], tmp_path: Path, says: bool
) -> None:
    """Where the host that a redirect leads to ignores the condition: half of it is here."""
    server, other = two
    first = {"Last-Modified": "Sat, 21 Nov 2026 10:00:00 GMT"}
    second = {"Last-Modified": "Sat, 21 Nov 2026 11:00:00 GMT"} if says else {}
    other.headers, other.heedless = first, True
    listing = await Web().list(_ref(server))
    other.headers, other.data = second, b"x" * len(WEIGHTS)
    with pytest.raises(AgentError) as caught:
        await bring(Web(), listing, tmp_path)
    assert caught.value.reason is Reason.SOURCE_CHANGED
    assert {asked["If-Unmodified-Since"] for asked in other.asked[1:]} == set(first.values())
