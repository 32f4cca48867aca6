"""A private authority of one model's credentials: for its listing and its files, and no other's."""

import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from aiohttp import web

from agent.authorities import Authorities
from agent.errors import AgentError, Reason
from agent.model import ModelRef
from agent.sources import Given, Sources
from tests.contracts.source_contract import bring
from tests.fakes.hub import Hub
from tests.fakes.s3 import Store
from tests.fakes.wire import Certificates, make_certificates

FILES = {"config.json": b"{}", "weights.bin": b"w" * 100_000}
World = tuple[str, Mapping[str, str], Mapping[str, bytes]]
"""A URI, the variables that lead to it, and what it means."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(autouse=True)
def _own_session() -> Iterator[None]:
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@contextmanager
def _hub(home: Path, tls: ssl.SSLContext) -> Iterator[World]:
    with Hub(home / "hub", tls=tls) as hub:
        hub.add("acme/tiny", FILES)
        yield "hf://acme/tiny", {"HF_ENDPOINT": hub.endpoint}, FILES


@contextmanager
def _store(home: Path, tls: ssl.SSLContext) -> Iterator[World]:
    with Store(tls=tls) as store:
        store.put("models", {f"tiny/{path}": data for path, data in FILES.items()})
        yield "s3://models/tiny", store.environment, FILES


@asynccontextmanager
async def _web(home: Path, tls: ssl.SSLContext) -> AsyncIterator[World]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=FILES["weights.bin"], headers={"ETag": '"one"'})

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        uri = f"https://localhost:{runner.addresses[0][1]}/weights.bin"
        yield uri, {}, {"weights.bin": FILES["weights.bin"]}
    finally:
        await runner.cleanup()


@pytest.fixture(params=["hub", "store", "web"])
async def world(
    request: pytest.FixtureRequest, tmp_path: Path, certificates: Certificates
) -> AsyncIterator[World]:
    if request.param == "web":
        async with _web(tmp_path, certificates.server) as found:
            yield found
        return
    kinds: dict[str, Callable[[Path, ssl.SSLContext], AbstractContextManager[World]]]
    kinds = {"hub": _hub, "store": _store}
    with kinds[request.param](tmp_path, certificates.server) as found:
        yield found


async def _brings(world: World, into: Path, authorities: str) -> None:
    uri, environment, files = world
    source = Sources().of(uri, Given(environment, authorities))
    listing = await source.list(ModelRef(uri=uri))
    into.mkdir()
    assert await bring(source, listing, into) == files


async def _is_refused(world: World) -> None:
    uri, environment, _ = world
    with pytest.raises(AgentError) as caught:
        await Sources().of(uri, Given(environment)).list(ModelRef(uri=uri))
    assert caught.value.reason is Reason.NETWORK
    assert "certificate" in caught.value.message.lower()


async def test_9_1_10_a_ca_bundle_is_trusted_for_the_listing_and_the_files(
    world: World, tmp_path: Path, certificates: Certificates
) -> None:
    await _is_refused(world)
    path = Authorities(tmp_path / "state").file(certificates.authority.read_text())
    await _brings(world, tmp_path / "first", path)
    await _is_refused(world)  # nobody else's connections trust it now
    await _brings(world, tmp_path / "second", path)


async def test_the_machines_own_are_trusted_beside_it(
    world: World, tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    another = make_certificates(tmp_path / "other").authority.read_text()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    await _brings(world, tmp_path / "first", Authorities(tmp_path / "state").file(another))
