"""One GET, from the request to a body of known place and length. What a status means is said here.

Redirects are followed by hand, because credentials must not be: what a source gave for its own
origin stays there. A range is asked for from the middle of a file, and the answer is believed only
if it says that it is that range of that whole.
"""

import contextlib
import http.client
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from urllib.parse import quote, urljoin

from agent.backoff import retry_after_seconds
from agent.errors import AgentError, Reason
from agent.model import HttpLocator
from agent.transfer.connections import (
    Cancellation,
    Connection,
    Connections,
    Origin,
    origin_of,
    without_query,
)

_MAX_REDIRECTS = 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_URL_SYNTAX = "%/:?#[]@!$&'()*+,;=~"

_VERSIONS = {"If-Match": "ETag", "If-Unmodified-Since": "Last-Modified"}
"""What asks for one version of a file, and where the answer says which it is."""

# Answers that a fresh link may cure, when they come from where the link points and not from the
# source itself.
_EXPIRED = frozenset({401, 403, 410})
_EXPIRED_CODES = frozenset({"ExpiredToken", "InvalidToken"})  # of S3, with status 400

_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
"""In the error document of an object store: S3, GCS and Azure have the same."""

_CODES = {
    "ExpiredToken": Reason.UNAUTHORIZED,
    "InvalidToken": Reason.UNAUTHORIZED,
    "InvalidObjectState": Reason.SOURCE_UNREADABLE,  # archived
    "RequestTimeout": Reason.SERVER_ERROR,
    "SlowDown": Reason.RATE_LIMITED,
}


class Body:
    """The rest of a file: `start` is the offset of its first byte."""

    def __init__(
        self, response: http.client.HTTPResponse, *, start: int, length: int | None, where: str
    ) -> None:
        self.start = start
        self.where = where
        self._response = response
        self._left = length
        self._begun = False

    def read_into(self, view: memoryview) -> int:
        """One read of the socket, at most; 0 at the end. Never more than was announced."""
        with network_errors(f"read {self.where}"):
            return self._read_into(view)

    def _read_into(self, view: memoryview) -> int:
        if self._left is None:  # chunked: http.client must decode it, at the price of a copy
            data = self._response.read1(len(view))
            view[: len(data)] = data
            return len(data)
        if self._left == 0:
            return 0
        # BufferedReader.readinto1 goes straight to recv_into for buffers as large as ours.
        # HTTPResponse.readinto would not return before the buffer is full: a server that
        # dribbles one byte a second could not be told from a fast one.
        fp, view = self._response.fp, view[: self._left]
        if not self._begun:
            # What came along with the headers is taken by itself: readinto1 would wait for more,
            # and lose it if no more comes.
            self._begun = True
            view = view[: len(fp.peek(1))]
        count: int = fp.readinto1(view) if view else 0
        self._left -= count
        return count

    @property
    def complete(self) -> bool:
        """Whether the connection can carry another request."""
        return self._left == 0 or self._response.isclosed()


class Exchange:
    """Makes GETs over kept connections."""

    def __init__(self, connections: Connections, user_agent: str) -> None:
        self._connections = connections
        self._user_agent = user_agent

    @contextlib.contextmanager
    def get(
        self, locator: HttpLocator, *, start: int, size: int, cancellation: Cancellation
    ) -> Iterator[Body]:
        """The bytes of a file of `size` from `start` on; the body may begin at 0 all the same.

        Raises AgentError with the reason that the answer means.
        """
        connection, response, url = self._follow(locator, start, cancellation)
        reuse = False
        try:
            where = without_query(url)
            linked = origin_of(url) != origin_of(locator.url)
            _check_status(response, where, linked=linked or _stale(locator))
            _check_version(response, locator, where)
            at, length = _placed(response, start=start, size=size, where=where)
            body = Body(response, start=at, length=length, where=where)
            yield body
            reuse = body.complete and not response.will_close
        finally:
            response.close()
            if reuse:
                self._connections.give(connection, cancellation)
            else:
                self._connections.drop(connection, cancellation)

    def _follow(
        self, locator: HttpLocator, start: int, cancellation: Cancellation
    ) -> tuple[Connection, http.client.HTTPResponse, str]:
        url = locator.url
        home = origin_of(url)
        for _ in range(_MAX_REDIRECTS):
            origin = origin_of(url)
            # What the source gave for itself is for its own origin: not for the host it
            # redirects to, and not for itself without TLS.
            # Which version it is, is no secret, and is asked of whoever sends the bytes.
            own = {
                name: value
                for name, value in locator.headers.items()
                if origin == home or name in _VERSIONS
            }
            with network_errors(f"reach {origin.scheme}://{origin.host}:{origin.port}"):
                connection, response = self._ask(
                    origin, url, self._headers(own, start), locator.verify, cancellation
                )
            if response.status not in (301, 302, 303, 307, 308):
                return connection, response, url
            target = response.headers.get("Location")
            self._finish_redirect(connection, response, cancellation)
            if not target:
                raise AgentError(
                    Reason.BAD_RESPONSE, f"a redirect without a target from {without_query(url)}"
                )
            url = _joined(url, target)
        raise AgentError(
            Reason.BAD_RESPONSE,
            f"more than {_MAX_REDIRECTS} redirects from {without_query(locator.url)}",
        )

    def _headers(self, own: Mapping[str, str], start: int) -> dict[str, str]:
        for name, value in own.items():
            if not (value.isascii() and value.isprintable()):
                # Said here, without it: http.client's own complaint would quote a secret.
                raise AgentError(
                    Reason.UNAUTHORIZED, f"the {name} header holds characters it must not"
                )
        headers = {"User-Agent": self._user_agent, "Accept-Encoding": "identity", **own}
        if start:
            headers["Range"] = f"bytes={start}-"
        return headers

    def _ask(
        self,
        origin: Origin,
        url: str,
        headers: dict[str, str],
        verify: bool | str,
        cancellation: Cancellation,
    ) -> tuple[Connection, http.client.HTTPResponse]:
        """Send the request; once more on a new connection if a kept one had been closed."""
        connection = self._connections.take(origin, cancellation, fresh=False, verify=verify)
        try:
            return connection, connection.get(url, headers)
        except BaseException as error:
            self._connections.drop(connection, cancellation)
            closed_meanwhile = isinstance(error, (ConnectionError, ssl.SSLError))
            if connection.fresh or not closed_meanwhile:
                raise
        cancellation.check()
        connection = self._connections.take(origin, cancellation, fresh=True, verify=verify)
        try:
            return connection, connection.get(url, headers)
        except BaseException:
            self._connections.drop(connection, cancellation)
            raise

    def _finish_redirect(
        self,
        connection: Connection,
        response: http.client.HTTPResponse,
        cancellation: Cancellation,
    ) -> None:
        """Keep the connection if the body of the redirect is as small as it should be."""
        reuse = False
        try:
            if response.length is not None and response.length <= 65536:
                with network_errors("read a redirect"):
                    response.read()
                reuse = not response.will_close
        finally:
            response.close()
            if reuse:
                self._connections.give(connection, cancellation)
            else:
                self._connections.drop(connection, cancellation)


def _joined(url: str, target: str) -> str:
    """Where a Location points to. What no URL may hold is escaped, as browsers do."""
    try:
        return urljoin(url, quote(target.encode("latin-1", "replace"), safe=_URL_SYNTAX))
    except ValueError as error:
        where = without_query(url)
        raise AgentError(Reason.BAD_RESPONSE, f"{where} redirects to no URL") from error


def _placed(
    response: http.client.HTTPResponse, *, start: int, size: int, where: str
) -> tuple[int, int | None]:
    """Offset and length of the body, once it is sure which part of which whole it is."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise AgentError(Reason.BAD_RESPONSE, f"{where} answers with encoding {encoding[:40]!r}")
    placed = response.headers.get("Content-Range")
    if response.status == 206:
        match = _CONTENT_RANGE.fullmatch(placed or "")
        if match is None or int(match[1]) != start or int(match[2]) != int(match[3]) - 1:
            raise AgentError(
                Reason.BAD_RESPONSE,
                f"{where} was asked from byte {start} and sends {(placed or '')[:80]!r}",
            )
        _check_size(int(match[3]), size, where)
        return start, _announced(response, size - start, where)
    if placed is not None:
        # Seen from real servers: status 200, a part of the file, and a Content-Range.
        raise AgentError(
            Reason.BAD_RESPONSE, f"{where} sends status 200 with Content-Range {placed[:80]!r}"
        )
    return 0, _announced(response, size, where)


def _announced(response: http.client.HTTPResponse, expected: int, where: str) -> int | None:
    """The length of the body; None if it is chunked (then the end of the stream decides)."""
    if response.length is None:
        return None
    _check_size(response.length, expected, where)
    return expected


def _check_size(found: int, size: int, where: str) -> None:
    if found != size:
        raise AgentError(
            Reason.SIZE_MISMATCH, f"{where} has {found} bytes where the listing says {size}"
        )


def _stale(locator: HttpLocator) -> bool:
    return locator.fresh_until is not None and time.monotonic() > locator.fresh_until


def _check_version(response: http.client.HTTPResponse, locator: HttpLocator, where: str) -> None:
    """Some servers ignore what they were asked; what they send says its version all the same.

    A time must be there, and the same: nothing else holds two halves of such a file together.
    """
    for name, said in _VERSIONS.items():
        asked, sent = locator.headers.get(name), response.headers.get(said)
        other = sent is not None and _bare(asked) != _bare(sent)
        if asked and (other or (sent is None and said == "Last-Modified")):
            raise AgentError(Reason.SOURCE_CHANGED, f"{where} is another version than was listed")


def _bare(version: str | None) -> str:
    return (version or "").strip().removeprefix("W/").strip('"')


def _code(response: http.client.HTTPResponse) -> str:
    """What a refusal is called, if its document comes soon: nobody waits for it for long."""
    document, end = b"", time.monotonic() + 2.0
    if "xml" not in response.headers.get("Content-Type", "").lower():
        return ""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while len(document) < 4096 and time.monotonic() < end:
            if not (data := response.read1(4096)):
                break
            document += data
    found = _CODE.search(document)
    return found[1].decode() if found else ""


def _check_status(response: http.client.HTTPResponse, where: str, *, linked: bool) -> None:
    """Raise for every status that is not a body.

    `linked`: it is not the source itself that refuses, but where its link points, or the link.
    """
    status = response.status
    if status in (200, 206):
        return
    # The standard's phrase and not the server's, which may be anything.
    said = f"{where} answers {status} {http.client.responses.get(status, '')}".rstrip()
    code = _code(response)
    if code:
        said = f"{said}: {code}"
    if linked and (status in _EXPIRED or code in _EXPIRED_CODES):
        raise AgentError(Reason.LINK_EXPIRED, said)
    if code in _CODES:
        raise AgentError(_CODES[code], said, retry_after_seconds=_asked(response))
    if status == 429:
        raise AgentError(
            Reason.RATE_LIMITED,
            said,
            retry_after_seconds=_asked(response),
        )
    if status in (401, 403) and response.headers.get("X-Error-Code") == "GatedRepo":
        raise AgentError(Reason.GATED, said)
    if status in (412, 416):
        # Not the version, or not the length, that the listing pinned.
        raise AgentError(Reason.SOURCE_CHANGED, said)
    if status == 408 or status >= 500:
        raise AgentError(
            Reason.SERVER_ERROR,
            said,
            retry_after_seconds=_asked(response),
        )
    reasons = {
        401: Reason.UNAUTHORIZED,
        403: Reason.UNAUTHORIZED,
        404: Reason.FILE_NOT_FOUND,
        410: Reason.FILE_NOT_FOUND,
    }
    raise AgentError(reasons.get(status, Reason.BAD_RESPONSE), said)


def _asked(response: http.client.HTTPResponse) -> float | None:
    return retry_after_seconds(response.headers.get("Retry-After"), now=time.time())


@contextlib.contextmanager
def network_errors(what: str) -> Iterator[None]:
    """Map what sockets and http.client raise to reasons."""
    try:
        yield
    except TimeoutError as error:
        raise AgentError(Reason.STALLED, f"cannot {what}: nothing came in time") from error
    except http.client.HTTPException as error:
        what_else = type(error).__name__ if not str(error) else str(error)
        raise AgentError(Reason.NETWORK, f"cannot {what}: {what_else[:200]}") from error
    except UnicodeError as error:  # a host name that DNS cannot carry
        raise AgentError(Reason.BAD_RESPONSE, f"cannot {what}: not a host name") from error
    except OSError as error:  # refused, reset, no route, no such host, TLS
        text = error.strerror or str(error)
        raise AgentError(Reason.NETWORK, f"cannot {what}: {text[:200]}") from error
