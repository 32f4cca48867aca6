"""Sockets for one GET at a time: TLS, proxies, keep-alive, and a way to interrupt them.

`http.client` and not a pooling library: it is the only one that reads a body straight into our
buffers (`readinto`), which is worth a third of the CPU of a download.
"""

import base64
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.request
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
        self,
        origin: Origin,
        raw: http.client.HTTPConnection,
        prefix: str,
        proxy_auth: str,
        verify: bool | str,
    ) -> None:
        assert raw.sock is not None  # it is connected
        self.origin = origin
        self.verify = verify
        self.raw = raw
        # http.client forgets the socket of an answer that ends with its connection.
        self.sock: socket.socket = raw.sock
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
    """Idle connections, at most `keep`, for the next file of the same origin. Thread-safe."""

    def __init__(self, *, connect_seconds: float, stall_seconds: float, keep: int) -> None:
        self._connect_seconds = connect_seconds
        self._stall_seconds = stall_seconds
        self._keep = keep
        self._lock = threading.Lock()
        self._idle: list[Connection] = []  # the last given is the last to go stale
        self._closed = False
        self._tls: dict[bool | str, ssl.SSLContext] = {}

    def take(
        self,
        origin: Origin,
        cancellation: Cancellation,
        *,
        fresh: bool,
        verify: bool | str = True,
    ) -> Connection:
        """A connection that this thread owns until `give` or `drop`; `verify`: see HttpLocator."""
        connection = None if fresh else self._take_idle(origin, verify)
        if connection is None:
            connection = self._connect(origin, verify)
        try:
            cancellation.attach(connection.sock)
        except Cancelled:
            connection.close()
            raise
        return connection

    def _take_idle(self, origin: Origin, verify: bool | str) -> Connection | None:
        with self._lock:
            for at in reversed(range(len(self._idle))):
                if (self._idle[at].origin, self._idle[at].verify) == (origin, verify):
                    return self._idle.pop(at)
        return None

    def give(self, connection: Connection, cancellation: Cancellation) -> None:
        """The body was read to its end and the server keeps the connection open."""
        cancellation.detach(connection.sock)
        connection.fresh = False
        with self._lock:
            self._idle.append(connection)
            # One list for all origins: a source that redirects to ever new hosts must not
            # collect descriptors.
            keep = 0 if self._closed else self._keep
            surplus = self._idle[: max(0, len(self._idle) - keep)]
            del self._idle[: len(surplus)]
        for old in surplus:
            old.close()

    def drop(self, connection: Connection, cancellation: Cancellation) -> None:
        cancellation.detach(connection.sock)
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connect(self, origin: Origin, verify: bool | str) -> Connection:
        proxy = proxy_for(origin)
        host, port = (
            (proxy.hostname or "", proxy.port or 80) if proxy else (origin.host, origin.port)
        )
        auth = proxy_authorization(proxy)
        raw: http.client.HTTPConnection
        prefix = ""
        if origin.scheme == "https":
            raw = http.client.HTTPSConnection(
                host, port, timeout=self._connect_seconds, context=self._tls_context(verify)
            )
            if proxy:
                headers = {"Proxy-Authorization": auth} if auth else {}
                raw.set_tunnel(origin.host, origin.port, headers=headers)
            auth = ""  # goes to the proxy with CONNECT, and never to the origin
        else:
            raw = http.client.HTTPConnection(host, port, timeout=self._connect_seconds)
            if proxy:
                prefix = f"http://{_bracketed(origin.host)}:{origin.port}"
        try:
            raw.connect()
        except BaseException:
            raw.close()  # a proxy that accepts and then says nothing leaves the socket open
            raise
        connection = Connection(origin, raw, prefix, auth, verify)
        connection.sock.settimeout(self._stall_seconds)
        return connection

    def _tls_context(self, verify: bool | str) -> ssl.SSLContext:
        """Raises OSError for a bundle that is none. One that changes needs another name."""
        with self._lock:
            if verify not in self._tls:
                # Without a bundle it honours SSL_CERT_FILE and SSL_CERT_DIR.
                authorities = verify if isinstance(verify, str) else None
                context = ssl.create_default_context(cafile=authorities)
                if verify is False:
                    context.check_hostname = False
                    context.verify_mode = ssl.CERT_NONE
                self._tls[verify] = context
            return self._tls[verify]


def proxy_for(origin: Origin) -> SplitResult | None:
    """As curl and requests read the environment: http_proxy, https_proxy, all_proxy, no_proxy."""
    proxies = urllib.request.getproxies()
    url = proxies.get(origin.scheme) or proxies.get("all")
    if not url or _bypassed(origin, proxies.get("no", "")):
        return None
    try:
        proxy = urlsplit(url if "://" in url else f"http://{url}")
        usable = proxy.scheme == "http" and proxy.port != 0
    except ValueError:  # its text would quote the URL, which may hold a password
        usable = False
    if not usable:
        raise AgentError(
            Reason.UNSUPPORTED,
            f"the proxy of the environment for {origin.scheme} is not http://[user:pass@]host:port",
        )
    return proxy


def _bypassed(origin: Origin, no_proxy: str) -> bool:
    """Whether no_proxy excepts this origin: by name, by suffix, or by a network it is in.

    The standard library knows no networks, and a cluster's no_proxy is made of them; the hub's
    client knows them too, so a listing and its files go the same way.
    """
    if urllib.request.proxy_bypass(f"{_bracketed(origin.host)}:{origin.port}"):
        return True
    try:
        address = ipaddress.ip_address(origin.host)
    except ValueError:
        return False
    for entry in no_proxy.split(","):
        with contextlib.suppress(ValueError):
            if address in ipaddress.ip_network(entry.strip().strip("[]"), strict=False):
                return True
    return False


def proxy_authorization(proxy: SplitResult | None) -> str:
    if proxy is None or proxy.username is None:
        return ""
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return "Basic " + base64.b64encode(user.encode()).decode()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
