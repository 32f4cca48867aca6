"""Certificates are replaced under real connections over loopback, and nobody is cut off."""

import asyncio
import logging
import os
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from agent.certificates import Held, renewed
from agent.errors import AgentError, Reason
from agent.tls import CertificateDirectory, ServerTLS
from tests import leaks

NAME = "localmodel-hook.localmodel-system.svc"
NAMES = (NAME, "127.0.0.1")


TODAY = time.time()
FIRST = renewed(Held(), names=NAMES, now=TODAY, settled=0.0)
SECOND = renewed(replace(FIRST, certificate="", key=""), names=NAMES, now=TODAY, settled=0.0)
"""Another certificate of the same authority."""
STRANGER = renewed(Held(), names=NAMES, now=TODAY, settled=0.0)


def trusting(held: Held) -> ssl.SSLContext:
    """A client with rules as strict as OpenSSL has them, which knows no other authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.hostname_checks_common_name = False
    context.load_verify_locations(cadata=held.bundle)
    return context


def anybody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def rsa_pair() -> tuple[str, str]:
    """As cert-manager makes them unless told otherwise."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([])
    begins = datetime.fromtimestamp(TODAY, UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made.public_bytes(Encoding.PEM).decode(), text.decode()


class Connection:
    """One that stays open: HTTP/1.1 with keep-alive."""

    def __init__(self, port: int, context: ssl.SSLContext, name: str | None = NAME) -> None:
        self._port, self._context, self._name = port, context, name

    async def __aenter__(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._port, ssl=self._context, server_hostname=self._name or ""
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    @property
    def shown(self) -> str:
        connection: ssl.SSLObject = self._writer.get_extra_info("ssl_object")
        return ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True) or b"")

    async def ask(self) -> bytes:
        self._writer.write(b"GET / HTTP/1.1\r\nHost: hook\r\n\r\n")
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        return await self._reader.readexactly(2)


async def shown(port: int, context: ssl.SSLContext | None = None) -> str:
    async with Connection(port, context or anybody()) as connection:
        assert await connection.ask() == b"ok"
        return connection.shown


@pytest.fixture
def tls() -> ServerTLS:
    tls = ServerTLS()
    tls.show(FIRST.certificate, FIRST.key)
    return tls


@pytest.fixture
async def port(tls: ServerTLS) -> AsyncIterator[int]:
    async def ok(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_get("/", ok)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls.context).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


# -- handshakes ---------------------------------------------------------------------------------


async def test_a_connection_stays_open_while_new_ones_get_the_new_certificate(
    tls: ServerTLS, port: int
) -> None:
    async with Connection(port, trusting(FIRST)) as old:
        assert await old.ask() == b"ok"
        tls.show(SECOND.certificate, SECOND.key)
        assert await shown(port, trusting(FIRST)) == SECOND.certificate
        assert await old.ask() == b"ok"
        assert old.shown == FIRST.certificate
    assert tls.certificate == SECOND.certificate


async def test_handshakes_without_end_while_certificates_change(tls: ServerTLS, port: int) -> None:
    """Whichever it is, a client gets a certificate with its own key."""
    done = asyncio.Event()

    async def change() -> None:
        while not done.is_set():
            for held in (SECOND, FIRST):
                tls.show(held.certificate, held.key)
                await asyncio.sleep(0)

    changing = asyncio.create_task(change())
    for _ in range(10):
        seen = await asyncio.gather(*(shown(port, trusting(FIRST)) for _ in range(8)))
        assert set(seen) <= {FIRST.certificate, SECOND.certificate}
    done.set()
    await changing


async def test_an_rsa_pair_follows_an_ec_pair_and_back(tls: ServerTLS, port: int) -> None:
    """Loaded into one context, OpenSSL would keep both and show the old one."""
    certificate, key = rsa_pair()
    tls.show(certificate, key)
    assert await shown(port) == certificate
    tls.show(SECOND.certificate, SECOND.key)
    assert await shown(port) == SECOND.certificate


async def test_clients_verify_what_is_shown(port: int) -> None:
    for name in NAMES:
        async with Connection(port, trusting(FIRST), name) as connection:
            assert await connection.ask() == b"ok"
    for client, name in ((trusting(FIRST), "another.name"), (trusting(STRANGER), NAME)):
        with pytest.raises(ssl.SSLCertVerificationError):
            async with Connection(port, client, name):
                pass


async def test_a_client_that_names_nobody_gets_the_newest_too(tls: ServerTLS, port: int) -> None:
    tls.show(SECOND.certificate, SECOND.key)
    async with Connection(port, anybody(), None) as connection:
        assert connection.shown == SECOND.certificate


async def test_tls_1_2_is_the_oldest(tls: ServerTLS, port: int) -> None:
    old = trusting(FIRST)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    tls.show(SECOND.certificate, SECOND.key)
    assert await shown(port, old) == SECOND.certificate
    assert tls.context.minimum_version is ssl.TLSVersion.TLSv1_2


async def test_openssl_agrees(port: int, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text(FIRST.bundle)
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", NAME]
    command += ["-verify_hostname", NAME, "-verify_return_error", "-x509_strict", "-purpose"]
    command += ["sslserver", "-CAfile", str(tmp_path / "ca.crt"), "-no-CApath", "-tls1_3"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input="", capture_output=True, text=True, timeout=30)

    done = await asyncio.to_thread(run)
    assert done.returncode == 0, done.stderr
    assert "Verification: OK" in done.stdout


async def test_before_there_is_a_certificate_nobody_is_served(port: int, tls: ServerTLS) -> None:
    tls.context.sni_callback = ServerTLS().context.sni_callback
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await shown(port)


# -- what cannot be shown -----------------------------------------------------------------------


@pytest.mark.parametrize("half", ["certificate", "key"])
@pytest.mark.parametrize("value", ["", "no PEM", SECOND.bundle])
async def test_a_pair_that_is_none_leaves_the_old_one_shown(
    half: str, value: str, tls: ServerTLS, port: int
) -> None:
    pair = {"certificate": SECOND.certificate, "key": SECOND.key, half: value}
    with pytest.raises(AgentError) as caught:
        tls.show(**pair)
    assert caught.value.reason is Reason.INVALID_SPEC
    assert "give a PEM certificate with its own key" in caught.value.message
    assert tls.certificate == FIRST.certificate
    assert await shown(port, trusting(FIRST)) == FIRST.certificate


def test_the_key_of_another_certificate(tls: ServerTLS) -> None:
    with pytest.raises(AgentError, match="KEY_VALUES_MISMATCH"):
        tls.show(FIRST.certificate, SECOND.key)


def test_an_encrypted_key_asks_nobody_for_its_password(tmp_path: Path) -> None:
    """On a terminal OpenSSL would, and wait for ever."""
    key = load_pem_private_key(SECOND.key.encode(), password=None)
    locked = BestAvailableEncryption(leaks.MARK.encode())
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked).decode()
    write(tmp_path, replace(SECOND, key=text))
    code = (
        "import os, sys, pathlib; from agent.tls import *; "
        "os.open(os.ttyname(0), os.O_RDWR); "  # a session without a terminal takes this one
        "CertificateDirectory(pathlib.Path(sys.argv[1]), ServerTLS())"
    )
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path], stdin=theirs, start_new_session=True,
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    finally:
        os.close(ours)
        os.close(theirs)
    assert "not encrypted" in done.stderr.splitlines()[-1]


def test_nothing_is_left_open(tls: ServerTLS) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    tls.show(SECOND.certificate, SECOND.key)
    with pytest.raises(AgentError):
        tls.show(SECOND.certificate, FIRST.key)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# -- a directory of somebody else ---------------------------------------------------------------


def write(directory: Path, held: Held) -> None:
    (directory / "tls.crt").write_text(held.certificate)
    (directory / "tls.key").write_text(held.key)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path, FIRST)
    return tmp_path


async def test_a_directory_is_shown_and_looked_at_again(directory: Path) -> None:
    tls = ServerTLS()
    kept = CertificateDirectory(directory, tls)
    assert tls.certificate == FIRST.certificate
    assert not kept.look()
    write(directory, SECOND)
    assert kept.look()
    assert tls.certificate == SECOND.certificate
    assert not kept.look()


def test_a_mounted_secret_is_replaced_behind_a_link(tmp_path: Path) -> None:
    """As kubelet does it: `tls.crt -> ..data/tls.crt`, and `..data` is renamed over."""
    for name, held in (("one", FIRST), ("two", SECOND)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, held)
    (tmp_path / "..data").symlink_to("one")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    tls = ServerTLS()
    kept = CertificateDirectory(tmp_path, tls)
    (tmp_path / "..new").symlink_to("two")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert kept.look()
    assert tls.certificate == SECOND.certificate


def test_half_of_a_new_pair_is_not_shown_and_said_once(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = ServerTLS()
    kept = CertificateDirectory(directory, tls)
    (directory / "tls.crt").write_text(SECOND.certificate)
    with caplog.at_level(logging.WARNING):
        assert [kept.look(), kept.look()] == [False, False]
    assert tls.certificate == FIRST.certificate
    (said,) = caplog.messages
    assert "the hook shows its old certificate on" in said
    assert str(directory) in said
    (directory / "tls.key").write_text(SECOND.key)
    assert kept.look()
    assert tls.certificate == SECOND.certificate
    (directory / "tls.key").unlink()
    assert not kept.look()
    assert "tls.key: No such file or directory" in caplog.messages[-1]


@pytest.mark.parametrize("broken", ["absent", "not text", "mismatch"])
def test_a_directory_that_cannot_be_used_from_the_beginning(directory: Path, broken: str) -> None:
    if broken == "absent":
        (directory / "tls.key").unlink()
    elif broken == "not text":
        (directory / "tls.crt").write_bytes(b"\xff\x00")
    else:
        (directory / "tls.key").write_text(SECOND.key)
    with pytest.raises(AgentError) as caught:
        CertificateDirectory(directory, ServerTLS())
    assert caught.value.reason is Reason.INVALID_SPEC
    assert str(directory) in caught.value.message
    assert "give a PEM" in caught.value.message or "put tls.crt and tls.key" in caught.value.message
