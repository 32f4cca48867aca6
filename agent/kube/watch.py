"""One resource, listed once and then watched: what the API server says now, in memory.

List, then watch from where the list ended; a watch that ends goes on from its last event or
bookmark. 410 (the server has forgotten that point) lists again. Nothing is polled: while nothing
changes, the only request is a new watch every five to ten minutes.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from agent.errors import AgentError
from agent.kube.client import Api, ApiError, Json

_log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_SECONDS = 0.5
_CAP_SECONDS = 30.0
_ABSENT_SECONDS = 300.0
_WATCH_SECONDS = (300, 600)  # as client-go: spread, so that a fleet does not come back at once
_PAGE = 500


class Watch(Generic[T]):
    """The objects at one path.

    `parse` makes ours of theirs; one that it refuses is left out, with a log line, and stops no
    other. `changed` is called after every change, on the loop.
    """

    def __init__(
        self,
        api: Api,
        path: str,
        *,
        parse: Callable[[Json], T],
        changed: Callable[[], None],
        params: Mapping[str, str] | None = None,
        metadata_only: bool = False,
        may_be_absent: bool = False,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._api = api
        self._path = path
        self._parse = parse
        self._changed = changed
        self._params = dict(params or {})
        self._metadata_only = metadata_only
        self._may_be_absent = may_be_absent
        self._dice = dice
        self._version = ""
        self._failures = 0
        self.objects: dict[str, T] = {}
        """By namespace/name, or by name for what has no namespace."""
        self.listed = asyncio.Event()
        """Set when a list has arrived: from then on an absent object is absent."""
        self.unreadable: set[str] = set()
        """Names of objects that `parse` refused: nobody knows what is in them."""
        self.current = False
        """Whether the last we heard of the server was no failure."""
        self.failure = ""
        """What was the last failure, while it is the last we heard."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._follow()
                delay = _FIRST_SECONDS * self._dice()  # the server ended it: no failure, no hurry
            except ApiError as error:
                delay = self._failed(error)
            await asyncio.sleep(delay)

    def _failed(self, error: ApiError) -> float:
        """Seconds to the next try."""
        if error.status == 410:
            # Too old a version. What we know stays known until the new list has come.
            self._version = ""
            return self._later()
        if error.status == 404 and self._may_be_absent:
            self._version = ""
            self._replace({})
            return _ABSENT_SECONDS * (0.5 + self._dice())
        if self.failure != error.message:
            _log.warning("%s", error.message)
        self.failure = error.message
        if self.current:
            self.current = False
            self._changed()
        return max(self._later(), error.retry_after_seconds or 0.0)

    def _later(self) -> float:
        delay = min(_CAP_SECONDS, _FIRST_SECONDS * 2.0**self._failures) * (0.5 + self._dice())
        self._failures = min(self._failures + 1, 16)
        return delay

    async def _list(self) -> None:
        """Everything, page by page, from the state that a quorum of etcd agrees on."""
        found: dict[str, T] = {}
        seen: set[str] = set()
        metadata = "PartialObjectMetadataList" if self._metadata_only else ""
        params = {**self._params, "limit": str(_PAGE)}
        while True:
            page = await self._api.get(self._path, params, metadata=metadata)
            for raw in items(page):
                seen.add(_name(raw))
                self._put(found, raw)
            meta = page["metadata"]
            if not meta.get("continue"):
                break
            params["continue"] = meta["continue"]
        self._version = meta["resourceVersion"]
        self.unreadable &= seen
        self._replace(found)

    def _replace(self, found: dict[str, T]) -> None:
        self.objects = found
        self._well()
        self.listed.set()
        self._changed()

    def _well(self) -> None:
        self.current, self._failures, self.failure = True, 0, ""

    async def _follow(self) -> None:
        """One watch, to its end."""
        low, high = _WATCH_SECONDS
        params = {
            **self._params,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(int(low + (high - low) * self._dice())),
        }
        metadata = "PartialObjectMetadata" if self._metadata_only else ""
        async with aclosing(self._api.watch(self._path, params, metadata=metadata)) as events:
            async for event in events:
                if event:
                    self._take(event)
                    continue
                was_current = self.current
                self._well()
                if not was_current:
                    self._changed()

    def _take(self, event: Json) -> None:
        try:
            kind, raw = event["type"], event["object"]
            if kind == "ERROR":
                code, said = raw.get("code") or 0, raw.get("message") or ""
                raise ApiError(code, f"the watch of {self._path} ended: {code} {said}")
            self._version = raw["metadata"]["resourceVersion"]
            if kind == "BOOKMARK":
                return
            name = _name(raw)
        except (LookupError, TypeError, AttributeError) as error:
            raise ApiError(0, f"the watch of {self._path} sends something else") from error
        before = self.objects.get(name), name in self.unreadable
        if kind == "DELETED":
            self.objects.pop(name, None)
            self.unreadable.discard(name)
        else:
            self._put(self.objects, raw)
        # A cache's status changes with every node's; of its metadata nothing does.
        if (self.objects.get(name), name in self.unreadable) != before:
            self._changed()

    def _put(self, objects: dict[str, T], raw: Json) -> None:
        name = _name(raw)
        try:
            objects[name] = self._parse(raw)
            self.unreadable.discard(name)
        except (AgentError, LookupError, TypeError, AttributeError, ValueError) as error:
            objects.pop(name, None)
            self.unreadable.add(name)
            _log.warning("%s/%s cannot be understood: %s", self._path, name, error)


def items(page: Json) -> list[Json]:
    """The objects of a list. What is no list is none of nothing: a gateway's `{}` with a 200 must
    not mean that no pod uses anything."""
    found, metadata = page.get("items", ""), page.get("metadata")
    found = [] if found is None else found  # Go's empty slice, of metadata only
    if (
        not isinstance(found, list)
        or not isinstance(metadata, dict)
        or not metadata.get("resourceVersion")
        or not all(isinstance(raw, dict) and _is_object(raw) for raw in found)
    ):
        raise ApiError(0, "the answer is no list of objects")
    return found


def _is_object(raw: Json) -> bool:
    metadata = raw.get("metadata")
    return isinstance(metadata, dict) and isinstance(metadata.get("name"), str)


def _name(raw: Mapping[str, Any]) -> str:
    metadata = raw["metadata"]
    namespace = metadata.get("namespace")
    return f"{namespace}/{metadata['name']}" if namespace else str(metadata["name"])
