"""A Kubernetes API server in memory, as far as a node agent can tell: lists, watches, patches.

It passes the contract suite that the real one passes (tests/contracts/cluster_contract.py). Faults
are told to it by the test: see `Faults`. It has no RBAC and no schemas; what those say is asked of
the real one, in tests/cluster.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

Json = dict[str, Any]

_HISTORY = 10_000


@dataclass
class Faults:
    """What goes wrong from now on."""

    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Status and headers of the next answers to anything but a watch."""
    close_watches_after: float | None = None
    instead: Callable[[web.Request], web.Response | None] = lambda request: None
    """What is answered in place of this server, by a gateway say; None: nothing is."""
    refuse: bool = False
    """Close every connection: the server is away."""


class FakeCluster:
    """Objects by their path, each change with a version of its own."""

    def __init__(
        self, directory: Path, *, kinds: set[str] | None = None, keeps: set[str] | None = None
    ) -> None:
        self.directory = directory
        self.faults = Faults()
        self.token = "first"
        self.requests: Counter[str] = Counter()
        self.kinds = kinds
        """The plurals that exist; None: all."""
        self.keeps = keeps
        """What a status may hold, any other field is dropped; None: all."""
        self._objects: dict[str, Json] = {}
        self._version = 100
        self._oldest = 0
        self._events: list[tuple[int, str, Json]] = []
        self._changed = asyncio.Condition()
        self._port = 0

    # -- what a test does -----------------------------------------------------------------------

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig whose token is in a file, as kubelet mounts it."""
        path = self.directory / "kubeconfig"
        self.token_file.write_text(self.token)
        user = {"name": "agent", "user": {"tokenFile": str(self.token_file)}}
        server = f"http://127.0.0.1:{self._port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": server}}],
            "users": [user],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "agent"}}],
            "current-context": "fake",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    @property
    def token_file(self) -> Path:
        return self.directory / "token"

    def object(self, path: str) -> Json | None:
        return self._objects.get(path)

    def get(self, path: str) -> Json:
        """An object, or the list of a collection, as another client would see it."""
        items = [body for at, body in self._objects.items() if at.rpartition("/")[0] == path]
        found = self._objects.get(path) or {"items": items}
        return deepcopy(found)

    async def put(self, path: str, body: Mapping[str, Any]) -> Json:
        """Create or replace, as another client would."""
        kind = "MODIFIED" if path in self._objects else "ADDED"
        return await self._store(kind, path, dict(deepcopy(body)))

    async def patch(self, path: str, patch: Json) -> Json:
        """A merge patch; of the status alone, where the path names it."""
        target = path.removesuffix("/status")
        found = self._objects[target]
        if path != target:
            patch = {"status": patch.get("status") or {}}
        after: Json = merged(found, patch)
        if self.keeps is not None and "status" in after:
            after["status"] = {k: v for k, v in after["status"].items() if k in self.keeps}
        if after == found:  # the real one writes nothing either
            return found
        return await self._store("MODIFIED", target, deepcopy(after))

    async def delete(self, path: str) -> None:
        await self._record("DELETED", path, self._objects.pop(path))

    async def forget(self) -> None:
        """Compaction: what happened until now cannot be watched any more. Ends the watches."""
        self._oldest = self._version
        async with self._changed:
            self._changed.notify_all()

    async def _store(self, kind: str, path: str, body: Json) -> Json:
        metadata = body.setdefault("metadata", {})
        before = self._objects.get(path, {}).get("metadata", {})
        metadata.setdefault("name", path.rpartition("/")[2])
        metadata.setdefault("uid", before.get("uid", f"uid-{self._version}"))
        metadata.setdefault("creationTimestamp", f"2026-01-01T00:00:{self._version % 60:02}Z")
        if "/namespaces/" in path:
            metadata.setdefault("namespace", path.split("/namespaces/")[1].split("/")[0])
        self._objects[path] = body
        return await self._record(kind, path, body)

    async def _record(self, kind: str, path: str, body: Json) -> Json:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, path, {"type": kind, "object": deepcopy(body)}))
        del self._events[:-_HISTORY]
        async with self._changed:
            self._changed.notify_all()
        return body

    # -- the server -----------------------------------------------------------------------------

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["FakeCluster"]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.faults.refuse and request.transport is not None:
            request.transport.abort()
            raise ConnectionResetError
        watched = request.query.get("watch") == "1"
        self.requests["WATCH" if watched else request.method] += 1
        if request.headers.get("Authorization", "").lower() != f"bearer {self.token}":
            return _status(401, "Unauthorized")
        if (other := self.faults.instead(request)) is not None:
            return other
        if self.faults.answers and not watched:
            code, headers = self.faults.answers.pop(0)
            return _status(code, "as the test says", headers)
        plural = request.path.split("/")[-1]
        if self.kinds is not None and request.method == "GET" and plural not in self.kinds:
            return _status(404, "the server could not find the requested resource")
        match request.method:
            case "GET" if watched:
                return await self._watch(request)
            case "GET":
                return self._get(request)
            case "POST":
                return await self._create(request)
            case "PUT":
                return await self._replace(request)
            case "PATCH":
                return await self._patch(request)
        return _status(405, request.method)

    def _get(self, request: web.Request) -> web.Response:
        found = self._objects.get(request.path)
        if found is not None:
            return web.json_response(_shown(request, found))
        if not _is_collection(request.path):
            return _status(404, f"{request.path} not found")
        items = [body for path, body in self._objects.items() if _matches(request, path, body)]
        # Unlike the real one's, a second page is not of the same moment as the first.
        begin, size = int(request.query.get("continue", "0")), int(request.query.get("limit", "0"))
        end = begin + size if size else len(items)
        shown = [_shown(request, body) for body in items[begin:end]]
        metadata = {"resourceVersion": str(self._version)}
        if end < len(items):
            metadata["continue"] = str(end)
        return web.json_response({"kind": "List", "metadata": metadata, "items": shown})

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        path = f"{request.path}/{body['metadata']['name']}"
        if path in self._objects:
            return _status(409, f"{path} already exists")
        return web.json_response(await self._store("ADDED", path, body), status=201)

    async def _replace(self, request: web.Request) -> web.Response:
        body, found = await request.json(), self._objects.get(request.path)
        if found is None:
            return _status(404, f"{request.path} not found")
        asked = body["metadata"].get("resourceVersion")
        if asked not in (None, found["metadata"]["resourceVersion"]):
            return _status(409, "the object has been modified")
        return web.json_response(await self._store("MODIFIED", request.path, body))

    async def _patch(self, request: web.Request) -> web.Response:
        if request.path.removesuffix("/status") not in self._objects:
            return _status(404, f"{request.path} not found")
        return web.json_response(await self.patch(request.path, await request.json()))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        since = int(request.query["resourceVersion"])
        lasts = float(request.query.get("timeoutSeconds", "1800"))
        if self.faults.close_watches_after is not None:
            lasts = self.faults.close_watches_after
        try:
            async with asyncio.timeout(lasts):
                while since >= self._oldest:
                    for version, path, event in self._events:
                        if version > since and _matches(request, path, event["object"]):
                            shown = {**event, "object": _shown(request, event["object"])}
                            await response.write(json.dumps(shown).encode() + b"\n")
                    if self._version > since:
                        since = self._version
                        mark = {"metadata": {"resourceVersion": str(since)}}
                        bookmark = {"type": "BOOKMARK", "object": mark}
                        await response.write(json.dumps(bookmark).encode() + b"\n")
                    async with self._changed:
                        await self._changed.wait_for(
                            lambda: self._version > since or self._oldest > since  # noqa: B023
                        )
        except TimeoutError:
            return response
        gone = {"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}}
        await response.write(json.dumps(gone).encode() + b"\n")
        return response


def _is_collection(path: str) -> bool:
    """Whether a path names a kind and not an object: it ends in a plural that we use."""
    return path.rpartition("/")[2].endswith(("s", "caches", "nodes", "groups")) and (
        path.count("/") != 4 or "namespaces" not in path
    )


def _matches(request: web.Request, path: str, body: Json) -> bool:
    """Whether an object is in the collection of a request, by its path and field selector."""
    plural = request.path.rpartition("/")[2]
    if "/namespaces/" in request.path:
        if path.rpartition("/")[0] != request.path:
            return False
    else:
        version = request.path.rpartition("/")[0]
        if not path.startswith(version) or path.split("/")[-2] != plural:
            return False
    name, _, value = request.query.get("fieldSelector", "").partition("=")
    found: Any = body
    for part in name.split(".") if name else ():
        found = (found or {}).get(part)
    return not name or found == value


def _shown(request: web.Request, body: Json) -> Json:
    if "PartialObjectMetadata" in request.headers.get("Accept", ""):
        return {"kind": "PartialObjectMetadata", "metadata": body["metadata"]}
    return body


def merged(before: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(before) if isinstance(before, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def _status(code: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": code, "message": message}
    return web.json_response(body, status=code, headers=headers)
