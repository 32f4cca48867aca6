"""Whom the engine talks to: redirects and credentials, kept connections, proxies, TLS."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import Reason
from agent.transfer import Engine
from agent.transfer.connections import Cancellation, Connections, Origin, origin_of
from tests.edges.downloads import REPO, Download, an_engine, noise, url_of
from tests.fakes.hub import Hub
from tests.fakes.wire import Certificates, Proxy, Wire, make_certificates, reply

DATA = noise(600_000)
TOKEN = {"Authorization": "Bearer hf_sesame"}
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with an_engine() as engine:
        yield engine


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        hub.add(REPO, {"model.bin": DATA})
        hub.accept("hf_sesame")
        yield hub


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def _to(target: str, status: int = 302) -> bytes:
    return reply(status, b"", {"Location": target})


def _authorizations(server: Wire | Proxy) -> list[str | None]:
    lines = [head.decode().split("\r\n") for head in server.heads]
    return [
        next((line.split(": ", 1)[1] for line in head if line.startswith("Authorization:")), None)
        for head in lines
    ]


# --- redirects ----------------------------------------------------------------------------------


async def test_the_hub_gets_the_token_and_the_cdn_does_not(
    hub: Hub, engine: Engine, tmp_path: Path
) -> None:
    hub.private(REPO, tokens={"hf_sesame"})
    download = Download.of(url_of(hub, "model.bin"), tmp_path / "partial", DATA, headers=TOKEN)
    await download.run(engine)
    assert [r.authorization for r in hub.requests] == ["Bearer hf_sesame", None]
    assert not hub.cdn_saw_authorization


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"], ids=["port", "host and port"])
async def test_another_port_or_host_is_another_origin(
    engine: Engine, tmp_path: Path, status: int, host: str
) -> None:
    with (
        Wire(lambda head: reply(200, DATA)) as cdn,
        Wire(lambda head: _to(cdn.url("/b?sig=1", host=host), status)) as source,
    ):
        await Download.of(source.url("/a"), tmp_path / "partial", DATA, headers=TOKEN).run(engine)
    assert _authorizations(source) == ["Bearer hf_sesame"]
    assert _authorizations(cdn) == [None]
    assert cdn.heads[0].startswith(b"GET /b?sig=1 HTTP/1.1\r\n")


async def test_another_name_of_the_same_port_is_another_origin(
    engine: Engine, tmp_path: Path
) -> None:
    def answer(head: bytes) -> bytes:
        return reply(200, DATA) if b"GET /b" in head else _to(server.url("/b", host="localhost"))

    with Wire(answer) as server:
        await Download.of(server.url("/a"), tmp_path / "partial", DATA, headers=TOKEN).run(engine)
    assert _authorizations(server) == ["Bearer hf_sesame", None]


async def test_less_security_is_another_origin(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    with (
        an_engine() as engine,
        Wire(lambda head: reply(200, DATA)) as plain,
        Wire(
            lambda head: _to(plain.url("/b", host="localhost")), tls=certificates.server
        ) as source,
    ):
        url = source.url("/a", host="localhost")
        await Download.of(url, tmp_path / "partial", DATA, headers=TOKEN).run(engine)
    assert _authorizations(source) == ["Bearer hf_sesame"]
    assert _authorizations(plain) == [None]


@pytest.mark.parametrize(
    "target", ["/b", "b", "//{netloc}/b", "http://{netloc}/b", "http://user:pass@{netloc}/b#c"]
)
async def test_the_same_origin_keeps_the_token(engine: Engine, tmp_path: Path, target: str) -> None:
    def answer(head: bytes) -> bytes:
        if b"GET /b " in head:
            return reply(200, DATA)
        return _to(target.format(netloc=f"127.0.0.1:{server.port}"))

    with Wire(answer) as server:
        await Download.of(server.url("/a"), tmp_path / "partial", DATA, headers=TOKEN).run(engine)
    assert _authorizations(server) == ["Bearer hf_sesame"] * 2


async def test_and_so_does_the_way_back(engine: Engine, tmp_path: Path) -> None:
    def answer(head: bytes) -> bytes:
        return reply(200, DATA) if b"GET /home" in head else _to(away.url("/x"))

    with Wire(lambda head: _to(home.url("/home"))) as away, Wire(answer) as home:
        await Download.of(home.url("/a"), tmp_path / "partial", DATA, headers=TOKEN).run(engine)
    assert _authorizations(home) == ["Bearer hf_sesame"] * 2
    assert _authorizations(away) == [None]


async def test_a_loop_ends(engine: Engine, tmp_path: Path) -> None:
    with Wire(lambda head: _to("/again?sig=secret")) as server:
        error = await Download.of(server.url("/a"), tmp_path / "partial", DATA).fail(engine)
    assert error.reason is Reason.BAD_RESPONSE
    assert "redirects" in error.message
    assert "secret" not in error.message
    assert len(server.heads) == 10


@pytest.mark.parametrize(
    "target", ["/ünï cödé?sig=%2B+/=é", '/"quoted"<x>', "/tab\there", "/caf\u00e9"]
)
async def test_a_target_that_is_no_proper_url(engine: Engine, tmp_path: Path, target: str) -> None:
    def answer(head: bytes) -> bytes:
        return reply(200, DATA) if b"GET /a" not in head else _to(target)

    with Wire(answer) as server:
        await Download.of(server.url("/a"), tmp_path / "partial", DATA).run(engine)
    assert server.heads[1].isascii()


async def test_messages_hold_no_signature(engine: Engine, tmp_path: Path) -> None:
    for answer in (
        reply(302),
        reply(404),
        reply(200, b"short"),
        b"",
        reply(302, b"", {"Location": "x:y"}),
    ):
        with Wire(lambda head, answer=answer: answer, answers_each=1) as server:  # type: ignore[misc]
            url = server.url("/a?sig=secret").replace("//", "//user:password@")
            error = await Download.of(url, tmp_path / "partial", DATA).fail(engine)
        assert "secret" not in repr(error)
        assert "password" not in repr(error)


@pytest.mark.parametrize("body", [b"see there", b"x" * 70_000], ids=len)
async def test_a_redirect_has_a_body(engine: Engine, tmp_path: Path, body: bytes) -> None:
    """A small one is read so that the connection can be kept; a large one is not worth it."""

    def answer(head: bytes) -> bytes:
        return reply(200, DATA) if b"GET /b" in head else reply(302, body, {"Location": "/b"})

    with Wire(answer) as server:
        await Download.of(server.url("/a"), tmp_path / "partial", DATA).run(engine)


async def test_a_redirect_whose_body_is_torn(engine: Engine, tmp_path: Path) -> None:
    def answer(head: bytes) -> bytes:
        headers = {"Location": "/b", "Content-Length": "10", "Connection": "close"}
        return reply(302, b"torn", headers)

    with Wire(answer) as server:
        error = await Download.of(server.url("/a"), tmp_path / "partial", DATA).fail(engine)
    assert error.reason is Reason.NETWORK


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://Host/x", Origin("http", "host", 80)),
        ("HTTPS://host", Origin("https", "host", 443)),
        ("https://u:p@host:444/x", Origin("https", "host", 444)),
        ("http://[::1]:8080/x", Origin("http", "::1", 8080)),
    ],
)
def test_origins(url: str, origin: Origin) -> None:
    assert origin_of(url) == origin


# --- kept connections ---------------------------------------------------------------------------


async def test_connections_are_kept(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    with Wire(lambda head: reply(200, DATA)) as server:
        for n in range(5):
            await Download.of(server.url("/a"), tmp_path / str(n), DATA).run(engine)
        assert len(server._open) == 1


async def test_a_stale_connection_is_replaced_silently(engine: Engine, tmp_path: Path) -> None:
    with Wire(lambda head: reply(200, DATA), answers_each=1) as server:
        for n in range(3):
            download = Download.of(server.url("/a"), tmp_path / str(n), DATA)
            await download.run(engine)
            assert download.retries == []
    assert len(server.heads) == 3


async def test_a_stale_tls_connection_too(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    with (
        an_engine() as engine,
        Wire(lambda head: reply(200, DATA), answers_each=1, tls=certificates.server) as server,
    ):
        for n in range(3):
            download = Download.of(server.url("/", host="localhost"), tmp_path / str(n), DATA)
            await download.run(engine)
            assert download.retries == []


async def test_a_hub_that_was_restarted(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    for n in range(3):
        download = Download.of(url_of(hub, "model.bin"), tmp_path / str(n), DATA)
        await download.run(engine)
        assert download.retries == []
        hub.stop()
        hub.start()


async def test_a_server_that_hangs_up_on_everything_is_not_tried_for_ever(
    engine: Engine, tmp_path: Path
) -> None:
    with Wire(lambda head: b"", answers_each=1) as server:
        download = Download.of(server.url("/a"), tmp_path / "partial", DATA)
        assert (await download.fail(engine)).reason is Reason.NETWORK
    assert len(server.heads) == len(download.retries) + 1


def test_no_more_are_kept_than_asked_for() -> None:
    """Whatever the number of origins, and none after the end."""
    connections = Connections(connect_seconds=1, stall_seconds=1, keep=2)
    cancellation = Cancellation()
    with (
        Wire(lambda head: reply(200)) as one,
        Wire(lambda head: reply(200)) as two,
        Wire(lambda head: reply(200)) as three,
    ):
        origins = [origin_of(server.url("/")) for server in (one, two, three)]
        taken = [connections.take(o, cancellation, fresh=False) for o in origins]
        for connection in taken:
            connections.give(connection, cancellation)
        assert [c.raw.sock is None for c in taken] == [True, False, False]
        assert connections.take(origins[1], cancellation, fresh=False) is taken[1]
        connections.close()
        connections.give(taken[1], cancellation)
        assert [c.raw.sock for c in taken] == [None] * 3


# --- proxies ------------------------------------------------------------------------------------

BASIC = "Basic " + base64.b64encode(b"us er:p@ss/word").decode()


def _with_password(proxy: Proxy) -> str:
    return f"http://us%20er:p%40ss%2Fword@127.0.0.1:{proxy.port}"


async def test_http_goes_through_the_proxy(
    hub: Hub, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(BASIC) as proxy:
        monkeypatch.setenv("http_proxy", _with_password(proxy))
        url = url_of(hub, "model.bin")
        download = Download.of(url, tmp_path / "partial", DATA, headers=TOKEN)
        await download.run(engine)
    assert download.retries == []
    assert [head.split(b" ")[1].decode().partition("?")[0] for head in proxy.heads] == [
        url,
        next(hub.cdn_endpoint + r.path for r in hub.requests if r.origin == "cdn"),
    ]
    assert all(f"Proxy-Authorization: {BASIC}".encode() in head for head in proxy.heads)
    assert not any(b"proxy-" in head.lower() for head in proxy.inside)
    assert f"Host: {hub.endpoint.removeprefix('http://')}\r\n".encode() in proxy.heads[0]
    assert _authorizations(proxy) == ["Bearer hf_sesame", None]
    assert not hub.cdn_saw_authorization


async def test_https_goes_through_a_tunnel(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    with (
        Proxy(BASIC) as proxy,
        Hub(tmp_path / "hub", tls=certificates.server) as hub,
        an_engine() as engine,
    ):
        hub.add(REPO, {"model.bin": DATA})
        hub.accept("hf_sesame")
        monkeypatch.setenv("HTTPS_PROXY", _with_password(proxy))
        for n in range(2):
            download = Download.of(url_of(hub, "model.bin"), tmp_path / str(n), DATA, headers=TOKEN)
            await download.run(engine)
    assert [head.split(b" ")[0] for head in proxy.heads] == [b"CONNECT"] * 2, "and it was kept"
    assert all(f"Proxy-Authorization: {BASIC}".encode() in head for head in proxy.heads)
    assert _authorizations(proxy) == [None, None], "the proxy is no origin either"
    assert not hub.cdn_saw_authorization


async def test_the_origin_behind_a_tunnel_never_sees_the_proxys_password(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    with (
        Proxy(BASIC) as proxy,
        Wire(lambda head: reply(200, DATA), tls=certificates.server) as server,
        an_engine() as engine,
    ):
        monkeypatch.setenv("https_proxy", _with_password(proxy))
        url = server.url("/a", host="localhost")
        await Download.of(url, tmp_path / "partial", DATA).run(engine)
    assert b"proxy" not in server.heads[0].lower()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "http://{}"), ("http_proxy", "{}"), ("HTTP_PROXY", "http://{}/")],
)
async def test_ways_to_name_a_proxy(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    with Proxy() as proxy, Wire(lambda head: reply(200, DATA)) as server:
        monkeypatch.setenv(variable, value.format(f"127.0.0.1:{proxy.port}"))
        await Download.of(server.url("/a"), tmp_path / "partial", DATA).run(engine)
    assert len(proxy.heads) == 1


@pytest.mark.parametrize(
    ("no_proxy", "direct"),
    [
        ("127.0.0.1", True),
        ("*", True),
        ("10.0.0.0/8, 127.0.0.0/8", True),
        ("127.0.0.1/8", True),
        ("10.0.0.0/8,.svc,localhost,fe80::/10,not a network", False),
        ("", False),
    ],
)
async def test_no_proxy(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_proxy: str,
    direct: bool,
) -> None:
    with Proxy() as proxy, Wire(lambda head: reply(200, DATA)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", no_proxy)
        await Download.of(server.url("/a"), tmp_path / "partial", DATA).run(engine)
    assert bool(proxy.heads) is not direct


async def test_no_proxy_by_suffix(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy() as proxy, Wire(lambda head: reply(200, DATA)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "example.com, localhost")
        url = server.url("/a", host="localhost")
        await Download.of(url, tmp_path / "partial", DATA).run(engine)
    assert proxy.heads == []


@pytest.mark.parametrize(
    "value", ["socks5://user:password@127.0.0.1:1", "http://user:password@h:port", "https://h"]
)
async def test_a_proxy_that_cannot_be_used(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("http_proxy", value)
    error = await Download.of("http://host/x", tmp_path / "partial", DATA).fail(engine)
    assert error.reason is Reason.UNSUPPORTED
    assert "password" not in repr(error) + repr(error.__cause__)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_refuses(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with Proxy("Basic something else") as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", _with_password(proxy))
        error = await Download.of(f"{scheme}://host/x", tmp_path / "partial", DATA).fail(engine)
    assert error.reason in (Reason.NETWORK, Reason.BAD_RESPONSE)
    assert "407" in error.message
    assert "word" not in repr(error)


async def test_a_proxy_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(lambda head: None) as proxy, an_engine(connect_seconds=0.2) as engine:
        monkeypatch.setenv("https_proxy", proxy.url(""))
        error = await Download.of("https://host/x", tmp_path / "partial", DATA).fail(engine)
    assert error.reason is Reason.STALLED


# --- TLS ----------------------------------------------------------------------------------------


async def test_tls_by_an_authority_of_ones_own(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    with Hub(tmp_path / "hub", tls=certificates.server) as hub, an_engine() as engine:
        hub.add(REPO, {"model.bin": DATA})
        await Download.of(url_of(hub, "model.bin"), tmp_path / "partial", DATA).run(engine)
    assert (tmp_path / "partial").read_bytes() == DATA


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"], ids=["unknown", "other name"])
async def test_tls_that_proves_nothing(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    if host == "127.0.0.1":
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    with (
        Wire(lambda head: reply(200, DATA), tls=certificates.server) as server,
        an_engine() as engine,
    ):
        download = Download.of(
            server.url("/", host=host), tmp_path / "partial", DATA, headers=TOKEN
        )
        error = await download.fail(engine)
    assert error.reason is Reason.NETWORK
    assert "certificate" in error.message
    assert server.heads == [], "nothing was asked"


async def test_tls_to_a_port_without_it(engine: Engine, tmp_path: Path) -> None:
    with Wire(lambda head: reply(200, DATA)) as server:
        url = server.url("/").replace("http:", "https:")
        error = await Download.of(url, tmp_path / "partial", DATA).fail(engine)
    assert error.reason is Reason.NETWORK


async def test_a_header_that_cannot_be_sent(hub: Hub, engine: Engine, tmp_path: Path) -> None:
    """http.client would quote it: it is a secret."""
    for value in ("Bearer a\r\nb", "Bearer \u20ac"):
        headers = {"Authorization": value}
        download = Download.of(
            url_of(hub, "model.bin"), tmp_path / "partial", DATA, headers=headers
        )
        error = await download.fail(engine)
        assert error.reason is Reason.UNAUTHORIZED
        assert "Bearer" not in repr(error) + repr(error.__cause__)
