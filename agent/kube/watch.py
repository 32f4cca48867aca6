"""One resource, listed once and then watched: what the API server says now, in memory.

List, then watch from where the list ended; a watch that ends goes on from its last event or
bookmark. 410 (the server has forgotten that point) lists again. Nothing is polled: while nothing
changes, the only request is a new watch every five to ten minutes.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from agent.errors import AgentError
from agent.kube.client import Api, ApiError, Json

_log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_SECONDS = 0.5
_CAP_SECONDS = 30.0
_ABSENT_SECONDS = 300.0
_GONE_SECONDS = 300.0
"""How long a kind that was there must be unknown to be gone. While its CRD or our role is written
anew, or an API server of several has not heard of it, it is away for seconds; what we drop then is
annotations or patterns, and without them other bytes are wanted."""

_LASTED_SECONDS = 5.0
"""A watch that ends sooner, and has said nothing, is none: something answers in its place."""

_ENDED_CAP_SECONDS = 5.0
"""The longest pause after such a watch. It may also be a proxy that closes what is idle: then this
is how long we hear nothing."""
_WATCH_SECONDS = (300, 600)  # as client-go: spread, so that a fleet does not come back at once
_CHANGES = ("ADDED", "MODIFIED", "DELETED")


class Watch(Generic[T]):
    """The objects at one path.

    `parse` makes ours of theirs; one that it refuses is left out, with a log line, and stops no
    other. `changed` is called after every change, on the loop. `none_on` are the HTTP statuses that
    mean that there is nothing to be had, and nothing wrong with that: 404 where the kind may be
    absent, 403 where it may be none of our business.
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
        none_on: Collection[int] = (),
        dice: Callable[[], float] = random.random,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._path = path
        self._parse = parse
        self._changed = changed
        self._params = dict(params or {})
        self._metadata_only = metadata_only
        self._none_on = none_on
        self._dice = dice
        self._ticks = ticks
        self._version = ""
        self._failures = 0
        self._exists = False
        self._unknown_since: float | None = None
        self.objects: dict[str, T] = {}
        """By namespace/name, or by name for what has no namespace."""
        self.listed = asyncio.Event()
        """Set when a list has arrived: from then on an absent object is absent."""
        self.unreadable: set[str] = set()
        """Names of objects that `parse` refused: nobody knows what is in them."""
        self.current = False
        """Whether the last we heard of the server was no failure."""
        self.failure = ""
        """What was the last failure, until something has gone well since."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if not self._version:
                    await self._list()
                if await self._follow():
                    # The server ended it: no failure, no hurry.
                    delay = _FIRST_SECONDS * self._dice()
                else:
                    delay = self._later(_ENDED_CAP_SECONDS)
            except ApiError as error:
                delay = self._failed(error)
            await asyncio.sleep(delay)

    def _failed(self, error: ApiError) -> float:
        """Seconds to the next try."""
        absent = error.status in self._none_on
        if not absent:
            self._unknown_since = None
        if error.status == 410:
            # Too old a version. What we know stays known until the new list has come.
            self._version = ""
            return self._later()
        if absent:
            self._version = ""
            if self._is_gone():
                self._exists = False
                self._replace({})
                return _ABSENT_SECONDS * (0.5 + self._dice())
        if self.failure != error.message:
            _log.warning("%s", error.message)
        self.failure = error.message
        if self.current:
            self.current = False
            self._changed()
        return max(self._later(), error.retry_after_seconds or 0.0)

    def _is_gone(self) -> bool:
        """Whether the kind is not there, and not only away for a moment."""
        if not self._exists:
            return True
        now = self._ticks()
        if self._unknown_since is None:
            self._unknown_since = now
        return now - self._unknown_since >= _GONE_SECONDS

    def _later(self, cap: float = _CAP_SECONDS) -> float:
        delay = min(cap, _FIRST_SECONDS * 2.0**self._failures) * (0.5 + self._dice())
        self._failures = min(self._failures + 1, 16)
        return delay

    async def _list(self) -> None:
        """Everything, page by page, from the state that a quorum of etcd agrees on."""
        found: dict[str, T] = {}
        seen: set[str] = set()
        metadata = "PartialObjectMetadataList" if self._metadata_only else ""
        async for page in self._api.pages(self._path, self._params, metadata=metadata):
            for raw in page["items"] or ():
                seen.add(_name(raw))
                self._put(found, raw)
        self._version = page["metadata"]["resourceVersion"]
        self.unreadable &= seen
        self._exists, self._unknown_since = True, None
        self._replace(found)

    def _replace(self, found: dict[str, T]) -> None:
        self.objects = found
        self.current, self.failure = True, ""
        self.listed.set()
        self._changed()

    async def _follow(self) -> bool:
        """One watch, to its end. Whether it was one: only that ends the failures in a row. A list
        before it, or its mere beginning, may well succeed each time that the rest fails."""
        low, high = _WATCH_SECONDS
        params = {
            **self._params,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(int(low + (high - low) * self._dice())),
        }
        metadata = "PartialObjectMetadata" if self._metadata_only else ""
        began_at, proven = self._ticks(), False
        try:
            async with aclosing(self._api.watch(self._path, params, metadata=metadata)) as events:
                async for event in events:
                    if event:
                        self._take(event)
                        proven = True
                    elif not self.current:
                        self.current = True
                        self._changed()
        finally:  # also of one that broke
            if proven or self._ticks() - began_at >= _LASTED_SECONDS:
                proven, self._failures, self.failure = True, 0, ""
        return proven

    def _take(self, event: Json) -> None:
        try:
            kind, raw = event["type"], event["object"]
            if kind == "ERROR":
                raise _ended(self._path, raw)
            version = _text(raw["metadata"]["resourceVersion"])
            name = _name(raw) if kind in _CHANGES else ""
            if not name and kind != "BOOKMARK":
                raise ValueError(kind)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ApiError(0, f"the watch of {self._path} sends something else") from error
        self._version = version
        if not name:
            return
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


def _ended(path: str, status: Mapping[str, Any]) -> ApiError:
    code, said = status.get("code"), status.get("message") or ""
    code = code if type(code) is int else 0
    return ApiError(code, f"the watch of {path} ended: {code} {said}"[:1000])


def _name(raw: Mapping[str, Any]) -> str:
    metadata = raw["metadata"]
    namespace, name = metadata.get("namespace"), _text(metadata["name"])
    return f"{namespace}/{name}" if namespace else name


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return value
