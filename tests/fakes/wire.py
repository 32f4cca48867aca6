"""Servers that say exactly what a test tells them to, byte by byte, where `tests.fakes.hub` is too
well behaved; a forward proxy; and certificates.

    with Wire(lambda head: reply(200, b"hello")) as wire:
        fetch(wire.url("/model.bin"))
        assert b"Range: bytes=5-" in wire.heads[1]
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from urllib.parse import urlsplit

__all__ = ["Certificates", "Proxy", "Wire", "make_certificates", "reply"]

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def reply(status: int, body: bytes = b"", headers: Mapping[str, str] = _NO_HEADERS) -> bytes:
    """An answer with its length, unless the headers say otherwise how it ends."""
    lines = [f"HTTP/1.1 {status} Told"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if not {"content-length", "transfer-encoding"} & {name.lower() for name in headers}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class _Server:
    """A loopback port with a thread per connection, all of which end with it."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.heads: list[bytes] = []
        """Every request's line and headers, in the order they came in."""

    def __enter__(self) -> _Server:
        self._spawn(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.drop()
        for thread in self._threads:
            thread.join()

    def drop(self) -> None:
        """Cut every connection there is."""
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def url(self, path: str, *, host: str = "127.0.0.1") -> str:
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{host}:{self.port}{path}"

    def _spawn(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="wire", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self._spawn(lambda sock=sock: self._serve(sock))  # type: ignore[misc]

    def _serve(self, raw: socket.socket) -> None:
        with suppress(OSError), raw:
            sock = raw
            if self._tls is not None:
                sock = self._tls.wrap_socket(raw, server_side=True)
            with sock:
                self._hold(sock)
                try:
                    self.talk(sock)
                finally:
                    with self._lock:
                        self._open.discard(sock)

    def _hold(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.add(sock)

    def talk(self, sock: socket.socket) -> None:
        raise NotImplementedError

    def read_head(self, sock: socket.socket) -> bytes | None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = sock.recv(1)
            if not data or not (head + data)[:1].isalpha():  # the client left, or speaks TLS
                return None
            head += data
        with self._lock:
            self.heads.append(head)
        return head


class Wire(_Server):
    """Answers each request head with the bytes that `answer` makes of it; None: says nothing.

    `answers_each` closes a connection after so many answers, without having announced it.
    """

    def __init__(
        self,
        answer: Callable[[bytes], bytes | None],
        *,
        tls: ssl.SSLContext | None = None,
        answers_each: int | None = None,
    ) -> None:
        super().__init__(tls)
        self._answer = answer
        self._answers_each = answers_each

    def __enter__(self) -> Wire:
        super().__enter__()
        return self

    def talk(self, sock: socket.socket) -> None:
        answered = 0
        while answered != self._answers_each and (head := self.read_head(sock)) is not None:
            data = self._answer(head)
            if data is None:
                sock.recv(1)  # until the client leaves, or the test ends
                return
            sock.sendall(data)
            answered += 1
            if b"connection: close" in data.partition(b"\r\n\r\n")[0].lower():
                return


class Proxy(_Server):
    """A forward proxy: absolute URLs for http, CONNECT for the rest. `authorization` is what it
    wants to see in Proxy-Authorization; None: it does not look.
    """

    def __init__(self, authorization: str | None = None) -> None:
        super().__init__()
        self._authorization = authorization
        self.inside: list[bytes] = []
        """What it sent on to origins over http, heads only."""

    def __enter__(self) -> Proxy:
        super().__enter__()
        return self

    def talk(self, sock: socket.socket) -> None:
        head = self.read_head(sock)
        if head is None:
            return
        line, _, rest = head.partition(b"\r\n")
        method, target, _ = line.decode().split(" ")
        headers = [h for h in rest.decode("latin-1").split("\r\n") if h]
        wanted = self._authorization
        if wanted is not None and f"Proxy-Authorization: {wanted}" not in headers:
            sock.sendall(reply(407, b"", {"Connection": "close"}))
            return
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        with socket.create_connection((parts.hostname or "", parts.port or 80)) as origin:
            self._hold(origin)
            try:
                if method == "CONNECT":
                    sock.sendall(b"HTTP/1.1 200 Established\r\n\r\n")
                else:
                    kept = [h for h in headers if not h.lower().startswith("proxy-")]
                    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
                    lines = [f"{method} {path} HTTP/1.1", *kept, "Connection: close", "", ""]
                    self.inside.append("\r\n".join(lines).encode("latin-1"))
                    origin.sendall(self.inside[-1])
                self._tunnel(sock, origin)
            finally:
                with self._lock:
                    self._open.discard(origin)

    def _tunnel(self, one: socket.socket, other: socket.socket) -> None:
        back = threading.Thread(target=_pour, args=(one, other), name="wire", daemon=True)
        back.start()
        _pour(other, one)
        back.join()


def _pour(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for sock in (source, target):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Certificates:
    """An authority that nobody knows, and what a server for `localhost` shows."""

    authority: Path
    server: ssl.SSLContext


def make_certificates(root: Path) -> Certificates:
    """By openssl's command, as an operator of a private hub would."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=root, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca = "basicConstraints=critical,CA:TRUE"
    usage = "keyUsage=critical,keyCertSign"
    openssl(
        *("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2"),
        *("-subj", "/CN=nobody's authority", "-addext", ca, "-addext", usage),
    )
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (root / "names").write_text("subjectAltName=DNS:localhost\n")
    openssl(
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key"),
        *("-CAcreateserial", "-out", "server.pem", "-days", "2", "-extfile", "names"),
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(root / "server.pem", root / "server.key")
    return Certificates(root / "ca.pem", context)
