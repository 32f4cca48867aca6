"""Requests to the Kubernetes API: JSON in, JSON out, every failure an AgentError.

Nothing here knows a kind, or a field beyond `Status` and what every object has; nothing is retried
here but a token that has been rotated. Who asks decides what a failure means to it. An answer that
is not what was asked for (a gateway's 200 with `{}`, say) is a failure like any other.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import aiohttp
from yaml import YAMLError

from agent.errors import AgentError, Reason
from agent.kube.light import (
    ConfigException,
    Configuration,
    RESTClientObject,
    load_incluster_config,
    load_kube_config,
)

Json = dict[str, Any]

MERGE_PATCH = "application/merge-patch+json"
_METADATA = "application/json;as={kind};g=meta.k8s.io;v=v1,application/json"

_NO_JSON = (ValueError, RecursionError)  # the second: a hundred thousand brackets

_PAGE = 500
_REQUEST_SECONDS = 15.0
_SILENCE_SECONDS = 150.0
"""The server sends a bookmark a minute: a watch that is silent for longer has lost its server
without a word (a node pulled out of the network sends no RST)."""

_RETRY_AFTER_SECONDS = 60.0
"""The most that a server may ask for. It asks for seconds; a day is somebody else's answer, and
would make us deaf for a day."""


class ApiError(AgentError):
    """An answer that is no success. `status` is the HTTP status, 0 where there was no answer."""

    def __init__(self, status: int, message: str, *, retry_after: float | None = None) -> None:
        refused = status in (401, 403)
        reason = Reason.FORBIDDEN if refused else Reason.API_SERVER
        super().__init__(reason, message, retry_after_seconds=retry_after)
        self.status = status


class Api:
    """One API server, as one identity."""

    def __init__(self, environment: Mapping[str, str], *, user_agent: str) -> None:
        self._environment = environment
        self._user_agent = user_agent
        self._configuration: Any = None
        self._rest: Any = None

    async def open(self) -> None:
        """Find out where the server is and who we are. Raises InvalidSpec saying what to set."""
        self._configuration = await self._load()
        try:
            self._rest = RESTClientObject(self._configuration)
        except (OSError, ssl.SSLError) as error:
            raise _no_configuration(error) from error

    async def close(self) -> None:
        if self._rest is not None:
            await self._rest.close()

    async def _load(self) -> Any:
        configuration = Configuration()
        file = self._environment.get("KUBECONFIG")
        try:
            if file:
                await load_kube_config(
                    config_file=file, client_configuration=configuration, persist_config=False
                )
            else:
                # The token is read again when it is refused, not every minute.
                load_incluster_config(configuration, try_refresh_token=False)
        except (ConfigException, OSError, YAMLError, ValueError, KeyError, TypeError) as error:
            raise _no_configuration(error) from error
        return configuration

    # -- requests -----------------------------------------------------------------------------

    async def get(self, path: str) -> Json:
        """One object."""
        return _object("GET", path, await self._request("GET", path))

    async def list(
        self, path: str, params: Mapping[str, str] | None = None, *, metadata: str = ""
    ) -> Json:
        """One page of a collection. `metadata` names the kind that its objects are reduced to."""
        page = await self._request("GET", path, params=params, headers=_accept(metadata))
        if not _is_list(page):
            raise ApiError(0, f"GET {path}: the answer is no list of objects")
        return page

    async def pages(
        self, path: str, params: Mapping[str, str] | None = None, *, metadata: str = ""
    ) -> AsyncGenerator[Json, None]:
        """A whole collection, page by page, as it was at one moment; `list` has the arguments."""
        asked = {**(params or {}), "limit": str(_PAGE)}
        while True:
            page = await self.list(path, asked, metadata=metadata)
            yield page
            if not (rest := page["metadata"].get("continue")):
                return
            asked["continue"] = rest

    async def create(self, path: str, body: Json) -> Json:
        return _object("POST", path, await self._request("POST", path, body=body))

    async def replace(self, path: str, body: Json) -> Json:
        return _object("PUT", path, await self._request("PUT", path, body=body))

    async def patch(self, path: str, body: Json) -> Json:
        """A JSON merge patch (RFC 7396): a null removes."""
        headers = {"Content-Type": MERGE_PATCH}
        answer = await self._request("PATCH", path, body=body, headers=headers)
        return _object("PATCH", path, answer)

    async def delete(self, path: str, *, uid: str = "") -> None:
        """`uid`, where it is given, of the only object that may go; another one is a 409."""
        body = {"preconditions": {"uid": uid}} if uid else {}
        await self._request("DELETE", path, body=body)

    async def watch(
        self, path: str, params: Mapping[str, str], *, metadata: str = ""
    ) -> AsyncGenerator[Json, None]:
        """The events of one watch, until the server ends it. The first item, and no other, is {}:
        it is open."""
        timeout = aiohttp.ClientTimeout(total=None, connect=_REQUEST_SECONDS, sock_read=None)
        headers = _accept(metadata)
        try:
            # A server that hangs before its headers: no limit of aiohttp's is about that alone.
            async with asyncio.timeout(_REQUEST_SECONDS):
                response = await self._send("GET", path, params, headers, None, timeout)
        except TimeoutError as error:
            raise ApiError(0, f"the watch of {path} does not begin") from error
        try:
            yield {}
            rest = b""
            while True:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    data = await response.content.readany()
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if not event or not isinstance(event, dict):
                        raise ValueError(f"{line[:80]!r} is no event")
                    yield event
        except (aiohttp.ClientError, OSError, TimeoutError, *_NO_JSON) as error:
            raise ApiError(0, f"the watch of {path} broke: {_named(error)}") from error
        finally:
            response.close()

    async def _request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
        response = await self._send(method, path, params, headers, body, timeout)
        try:
            found = json.loads(await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError, *_NO_JSON) as error:
            raise ApiError(0, f"{method} {path}: {_named(error)}") from error
        finally:
            response.release()
        if not isinstance(found, dict):
            raise ApiError(0, f"{method} {path}: the answer is no JSON object")
        return found

    async def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
        body: Json | None,
        limits: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        """An answer that is a success. A token that is refused is read again, once."""
        used = self._token()
        response = await self._try(method, path, params, headers, body, limits)
        if response.status == 401:
            response.close()
            if self._token() == used:  # else another request has read it meanwhile
                try:
                    fresh = await self._load()
                except AgentError as error:  # the file is being replaced, say
                    raise ApiError(401, error.message) from error
                self._configuration.api_key = fresh.api_key
            response = await self._try(method, path, params, headers, body, limits)
        if response.status >= 300:
            raise await _refusal(method, path, response)
        return response

    def _token(self) -> str:
        token: str = self._configuration.api_key.get("BearerToken", "")
        return token

    async def _try(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
        body: Json | None,
        limits: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        sent = {"User-Agent": self._user_agent, **(headers or {})}
        if token := self._token():
            sent["Authorization"] = token
        try:
            response: aiohttp.ClientResponse = await self._rest.request(
                method,
                self._configuration.host + path,
                query_params=dict(params or {}),
                headers=sent,
                body=body,
                _preload_content=False,
                _request_timeout=limits,
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiError(0, f"{method} {path}: {_named(error)}") from error
        return response


def _object(method: str, path: str, found: Json) -> Json:
    spec = found.get("spec")
    if not _is_named(found) or not _version(found) or not isinstance(spec, dict | None):
        raise ApiError(0, f"{method} {path}: the answer is no object")
    return found


def _is_list(page: Json) -> bool:
    """What is no list is not an empty one: a gateway's `{}` does not say that no model is used."""
    items = page.get("items", "")
    items = [] if items is None else items  # Go's empty slice, of metadata only
    return (
        isinstance(page.get("metadata"), dict)
        and bool(_version(page))
        and isinstance(items, list)
        and all(map(_is_named, items))
    )


def _is_named(raw: Any) -> bool:
    metadata = raw.get("metadata") if isinstance(raw, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return isinstance(name, str) and name != ""


def _version(raw: Json) -> str:
    """Where a watch goes on, and what a replacement is compared with; "" for none."""
    version = raw["metadata"].get("resourceVersion")
    return version if isinstance(version, str) else ""


def _accept(metadata: str) -> dict[str, str]:
    return {"Accept": _METADATA.format(kind=metadata) if metadata else "application/json"}


async def _refusal(method: str, path: str, response: aiohttp.ClientResponse) -> ApiError:
    """What the server said, in its own words where it sent a Status."""
    try:
        raw = await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError):
        raw = b""
    finally:
        response.release()
    try:
        said = json.loads(raw).get("message") or ""
    except (*_NO_JSON, AttributeError):
        said = raw[:200].decode(errors="replace")
    message = f"{method} {path}: {response.status} {said}".strip()
    return ApiError(response.status, message[:1000], retry_after=_retry_after(response))


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "")
    if not text.isdecimal():  # a date is for caches; no API server sends one
        return None
    return min(float(text[:9]), _RETRY_AFTER_SECONDS)


def _named(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _no_configuration(error: BaseException) -> AgentError:
    return AgentError(
        Reason.INVALID_SPEC,
        f"there is no way to the API server: {_named(error)}; set KUBECONFIG, or run in a pod"
        " with a service account",
    )
