"""`https://host/path/model.gguf` and `http://`: one file of any web server, or what is in it where
it is an archive.

Pinned by the server's ETag or by its time: what is fetched in pieces is fetched from one version. A
server that says neither is refused, because an interrupted download could mix two versions without
anybody noticing. `Digest` and `Repr-Digest` are promises where they are given; an ETag is none.
"""

import base64
import binascii
import functools
import hashlib
import json
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from urllib.parse import unquote, urlsplit

import aiohttp
from yarl import URL

from agent.backoff import retry_after_seconds
from agent.errors import AgentError, Reason
from agent.model import Digest, HttpLocator, Listing, Locator, ModelRef, RemoteFile
from agent.sources.base import is_archive, pack, pin
from agent.threads import looking

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 10
_SECONDS = 30.0  # until the headers are there
_SHA256 = re.compile(r"sha-256=:?([A-Za-z0-9+/]{43}=):?", re.IGNORECASE)
_MOST_BYTES = 2**63
_AZURE = re.compile(r"\.(blob|file)\.(core\.windows|storage\.azure)\.net$", re.IGNORECASE)
_ONE_BLOB = "name one blob, or one archive of all, with a SAS where it is not public"


class Web:
    """Files of web servers. `<host>-headers` of the environment is the JSON of headers for that
    host (kserve.md 5.2)."""

    def __init__(self, environment: Mapping[str, str] | None = None, authorities: str = "") -> None:
        self._environment = dict(environment or {})
        self._authorities = authorities

    def __repr__(self) -> str:
        return "<Web>"

    def check(self, ref: ModelRef) -> None:
        _name(ref.uri)

    def host(self, ref: ModelRef) -> str:
        return urlsplit(ref.uri).netloc

    async def list(self, ref: ModelRef) -> Listing:
        name = _name(ref.uri)
        found = await self._looked_at(ref.uri)
        size = found.get("Content-Length", "")
        if not size.isdecimal() or int(size) >= _MOST_BYTES:
            raise AgentError(Reason.BAD_RESPONSE, f"{_shown(ref.uri)} does not say its size")
        version = _version(found)
        if version is None:
            raise AgentError(
                Reason.UNSUPPORTED,
                f"{_shown(ref.uri)} has neither ETag nor Last-Modified: an interrupted download"
                " could mix two versions of it",
            )
        revision = hashlib.sha256(f"{version}\0{size}".encode()).hexdigest()[:40]
        file = RemoteFile(
            path=name, size=int(size), origin=name, digest=_promised(found), version=version
        )
        return pack(ref, revision, file) if is_archive([name]) else pin(ref, revision, [file])

    async def locate(self, listing: Listing, file: RemoteFile) -> Locator:
        headers = self._headers(listing.ref.uri)
        if file.version is not None:  # a manifest knows of none; the digest must do
            strong = file.version.startswith('"')
            headers["If-Match" if strong else "If-Unmodified-Since"] = file.version
        return HttpLocator(url=listing.ref.uri, headers=headers, verify=self._authorities or True)

    def _headers(self, uri: str) -> dict[str, str]:
        host = urlsplit(uri).hostname or ""
        try:
            found = json.loads(self._environment.get(f"{host}-headers") or "{}")
            good = all(_is_header(name, value) for name, value in found.items())
        except (ValueError, AttributeError, RecursionError):
            good = False
        if not good:
            message = f"the headers for {host} are not a JSON object of texts"
            raise AgentError(Reason.UNAUTHORIZED, message) from None
        return dict(found)

    async def _looked_at(self, uri: str) -> Mapping[str, str]:
        """The headers of the file. By GET, which a signed link allows where it forbids HEAD."""
        timeout = aiohttp.ClientTimeout(total=_SECONDS)
        with _errors(uri):
            trust = await looking(lambda: _trust(self._authorities))
            async with aiohttp.ClientSession(
                timeout=timeout, trust_env=True, connector=aiohttp.TCPConnector(ssl=trust)
            ) as session:
                return await self._followed(session, uri)

    async def _followed(self, session: aiohttp.ClientSession, uri: str) -> Mapping[str, str]:
        """By hand: aiohttp would take a token of ours along, unless it is called Authorization."""
        own, home = self._headers(uri), URL(uri)
        url = home
        for _ in range(_MOST_REDIRECTS):
            headers = own if url.origin() == home.origin() else {}
            async with session.get(
                url, headers={**headers, "Accept-Encoding": "identity"}, allow_redirects=False
            ) as answer:
                answer.close()  # the body is not wanted
                target = answer.headers.get("Location")
                if answer.status in _REDIRECTS and target:
                    url = _joined(url, target, uri)
                    continue
                if answer.status != 200:
                    raise _refused(uri, answer.status, answer.headers.get("Retry-After"))
                if answer.headers.get("Content-Encoding", "identity") != "identity":
                    raise AgentError(
                        Reason.BAD_RESPONSE, f"{_shown(uri)} is sent compressed though not asked to"
                    )
                return answer.headers
        raise AgentError(Reason.BAD_RESPONSE, f"{_shown(uri)} redirects without an end")


def _joined(url: URL, target: str, uri: str) -> URL:
    """Where a redirect leads. Its text may be a signature, so nothing of it is said."""
    with suppress(ValueError):
        joined = url.join(URL(target))
        if joined.scheme in ("http", "https") and joined.host:
            return joined
    raise AgentError(Reason.BAD_RESPONSE, f"{_shown(uri)} redirects to what is no web page")


@functools.lru_cache(maxsize=16)
def _trust(authorities: str) -> ssl.SSLContext | bool:
    """The file is named by its content: one that changed has another name."""
    return ssl.create_default_context(cafile=authorities) if authorities else True


def _name(uri: str) -> str:
    """The name of the file. Raises InvalidSpec for what names none, and Unsupported for what KServe
    would take for more than a file."""
    try:
        parts = urlsplit(uri)
        host = parts.hostname
    except ValueError as error:
        raise AgentError(Reason.INVALID_SPEC, f"{_shown(uri)}: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise AgentError(
            Reason.INVALID_SPEC,
            f"{_shown(uri)} must be https://host/path/file, without a user in it",
        )
    if _AZURE.search(host) and (parts.path.endswith("/") or "/" not in parts.path.strip("/")):
        raise AgentError(
            Reason.UNSUPPORTED, f"{_shown(uri)} is a container, and none is listed; {_ONE_BLOB}"
        )
    name = unquote(parts.path.rpartition("/")[2], errors="surrogateescape")
    if not name:
        raise AgentError(Reason.INVALID_SPEC, f"{_shown(uri)} names no file")
    if name.endswith(".git"):
        raise AgentError(
            Reason.UNSUPPORTED,
            f"{_shown(uri)} is a git repository; use hf:// for a hub's, or an archive of it",
        )
    return name


def _version(found: Mapping[str, str]) -> str | None:
    """A weak ETag names no bytes, and cannot be asked for."""
    etag = found.get("ETag", "")
    if etag.startswith('"') and etag.endswith('"') and len(etag) > 2 and etag.isprintable():
        return etag
    return found.get("Last-Modified") or None


def _promised(found: Mapping[str, str]) -> Digest | None:
    """RFC 9530 and its predecessor, where the digest is a SHA-256."""
    for name in ("Repr-Digest", "Digest"):
        match = _SHA256.search(found.get(name, ""))
        if match is not None:
            try:
                return Digest("sha256", base64.b64decode(match[1], validate=True).hex())
            except binascii.Error:
                continue
    return None


def _is_header(name: str, value: object) -> bool:
    return isinstance(value, str) and all(
        text.isascii() and text.isprintable() for text in (name, value)
    )


def _shown(uri: str) -> str:
    """Without its query, which may be a signature."""
    return uri.partition("?")[0][:200]


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        message = f"{_shown(uri)} does not answer within {_SECONDS:g} s"
        raise AgentError(Reason.NETWORK, message) from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        why = type(error).__name__ if "?" in uri else str(error)[:200]
        raise AgentError(Reason.NETWORK, f"cannot reach {_shown(uri)}: {why}") from error


def _refused(uri: str, status: int, retry_after: str | None) -> AgentError:
    said = f"{_shown(uri)} answers {status}"
    if _AZURE.search(urlsplit(uri).hostname or ""):
        said += f"; a prefix of a container is not listed: {_ONE_BLOB}"
    if status in (408, 429) or status >= 500:
        reason = Reason.RATE_LIMITED if status == 429 else Reason.SERVER_ERROR
        seconds = retry_after_seconds(retry_after, now=time.time())
        return AgentError(reason, said, retry_after_seconds=seconds)
    reasons = {
        401: Reason.UNAUTHORIZED,
        403: Reason.UNAUTHORIZED,
        409: Reason.UNAUTHORIZED,  # PublicAccessNotPermitted, of Azure
        404: Reason.FILE_NOT_FOUND,
        410: Reason.FILE_NOT_FOUND,
    }
    return AgentError(reasons.get(status, Reason.BAD_RESPONSE), said)
