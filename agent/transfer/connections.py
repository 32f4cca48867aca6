"""Sockets for one GET at a time: TLS, proxies, keep-alive, and a way to interrupt them.

`http.client` and not a pooling library: it is the only one that reads a body straight into our
buffers (`readinto`), which is worth a third of the CPU of a download.
"""

import base64
import contextlib
import http.client
import socket
import ssl
import threading
import urllib.request
from collections import defaultdict
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from agent.errors import AgentError, Reason


class Cancelled(Exception):
    """The job was cancelled from outside; not an error, and never shown."""


class Cancellation:
    """Interrupts worker threads: sets a flag, and shuts the sockets they may be blocked on."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()

    def cancel(self) -> None:
        with self._lock:
            self._flag.set()
            for sock in self._sockets:
                # The base class on purpose: SSLSocket.shutdown drops its TLS state, which the
                # thread blocked in recv is using. The close belongs to that thread.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def check(self) -> None:
        if self._flag.is_set():
            raise Cancelled

    def wait(self, seconds: float) -> None:
        """Sleep, unless cancelled."""
        if self._flag.wait(seconds):
            raise Cancelled

    def attach(self, sock: socket.socket) -> None:
        with self._lock:
            self.check()
            self._sockets.add(sock)

    def detach(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(sock)


class Origin(NamedTuple):
    """What a connection, and a credential, belongs to."""

    scheme: str
    host: str
    port: int


def origin_of(url: str) -> Origin:
    """Raises BadResponse for a URL that is not plain http or https."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AgentError(Reason.BAD_RESPONSE, f"not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AgentError(Reason.BAD_RESPONSE, f"not an http or https URL: {without_query(url)}")
    return Origin(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80))


def without_query(url: str) -> str:
    """A URL fit for a message: no signature, no user info."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"[:200]


class Connection:
    """One connection, through a proxy where the environment names one."""

    def __init__(
        self, origin: Origin, raw: http.client.HTTPConnection, prefix: str, proxy_auth: str
    ) -> None:
        self.origin = origin
        self.raw = raw
        self.fresh = True  # nothing was asked on it yet: a failure is not a stale keep-alive
        self._prefix = prefix
        self._proxy_auth = proxy_auth

    def get(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        extra = {"Proxy-Authorization": self._proxy_auth} if self._proxy_auth else {}
        self.raw.request("GET", self._prefix + target, headers={**headers, **extra})
        return self.raw.getresponse()

    def close(self) -> None:
        self.raw.close()


class Connections:
    """Idle connections, kept for the next file of the same origin. Thread-safe."""

    def __init__(self, *, connect_seconds: float, stall_seconds: float, keep: int) -> None:
        self._connect_seconds = connect_seconds
        self._stall_seconds = stall_seconds
        self._keep = keep
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[Connection]] = defaultdict(list)
        self._tls: ssl.SSLContext | None = None

    def take(self, origin: Origin, cancellation: Cancellation, *, fresh: bool) -> Connection:
        """A connection that this thread owns until `give` or `drop`."""
        with self._lock:
            idle = self._idle[origin]
            connection = idle.pop() if idle and not fresh else None
        if connection is None:
            connection = self._connect(origin)
        sock = connection.raw.sock
        assert sock is not None  # connected in _connect, and kept only while open
        try:
            cancellation.attach(sock)
        except Cancelled:
            connection.close()
            raise
        return connection

    def give(self, connection: Connection, cancellation: Cancellation) -> None:
        """The body was read to its end and the server keeps the connection open."""
        cancellation.detach(connection.raw.sock)
        connection.fresh = False
        with self._lock:
            idle = self._idle[connection.origin]
            if len(idle) < self._keep:
                idle.append(connection)
                return
        connection.close()

    def drop(self, connection: Connection, cancellation: Cancellation) -> None:
        cancellation.detach(connection.raw.sock)
        connection.close()

    def close(self) -> None:
        with self._lock:
            for connection in (c for idle in self._idle.values() for c in idle):
                connection.close()
            self._idle.clear()

    def _connect(self, origin: Origin) -> Connection:
        proxy = _proxy_for(origin)
        host, port = (
            (proxy.hostname or "", proxy.port or 80) if proxy else (origin.host, origin.port)
        )
        auth = _proxy_authorization(proxy)
        raw: http.client.HTTPConnection
        prefix = ""
        if origin.scheme == "https":
            raw = http.client.HTTPSConnection(
                host, port, timeout=self._connect_seconds, context=self._tls_context()
            )
            if proxy:
                headers = {"Proxy-Authorization": auth} if auth else {}
                raw.set_tunnel(origin.host, origin.port, headers=headers)
            auth = ""  # goes to the proxy with CONNECT, and never to the origin
        else:
            raw = http.client.HTTPConnection(host, port, timeout=self._connect_seconds)
            if proxy:
                prefix = f"http://{_bracketed(origin.host)}:{origin.port}"
        raw.connect()
        assert raw.sock is not None
        raw.sock.settimeout(self._stall_seconds)
        return Connection(origin, raw, prefix, auth)

    def _tls_context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()  # honours SSL_CERT_FILE, SSL_CERT_DIR
            return self._tls


def _proxy_for(origin: Origin) -> SplitResult | None:
    """As curl and requests read the environment: http_proxy, https_proxy, all_proxy, no_proxy."""
    if urllib.request.proxy_bypass(f"{_bracketed(origin.host)}:{origin.port}"):
        return None
    proxies = urllib.request.getproxies()
    url = proxies.get(origin.scheme) or proxies.get("all")
    if not url:
        return None
    proxy = urlsplit(url if "://" in url else f"http://{url}")
    if proxy.scheme != "http":
        raise AgentError(
            Reason.UNSUPPORTED,
            f"the {origin.scheme}_proxy variable names a {proxy.scheme} proxy; use an http one",
        )
    return proxy


def _proxy_authorization(proxy: SplitResult | None) -> str:
    if proxy is None or proxy.username is None:
        return ""
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return "Basic " + base64.b64encode(user.encode()).decode()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
