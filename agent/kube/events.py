"""Kubernetes Events, aggregated: what `kubectl describe` shows of a node's models.

The same reason on the same object is one Event with a count. An Event that cannot be sent is worth
a log line and nothing more.
"""

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from agent.kube.client import Api, ApiError
from agent.kube.parse import GROUP, VERSION
from agent.status import rfc3339

_log = logging.getLogger(__name__)

_QUEUE = 200
_REMEMBERED = 1000
_AGAIN_SECONDS = 60.0  # the same Event is counted up at most once a minute
_LIFE_SECONDS = 3000.0  # a server forgets Events after an hour
_MESSAGE_CHARACTERS = 1000

Kind = Literal["Normal", "Warning"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The object that an Event is about. `namespace` is "" for a cluster's own."""

    kind: str
    namespace: str
    name: str
    uid: str


@dataclass(slots=True)
class _Told:
    path: str
    count: int
    begun_at: float
    sent_at: float


class Recorder:
    """Sends Events in the order in which they were said."""

    def __init__(self, api: Api, *, node: str, clock: Callable[[], float] = time.time) -> None:
        self._api = api
        self._node = node
        self._clock = clock
        self._queue: asyncio.Queue[tuple[Subject, Kind, str, str]] = asyncio.Queue(_QUEUE)
        self._told: OrderedDict[tuple[str, str], _Told] = OrderedDict()

    def say(self, subject: Subject, kind: Kind, reason: str, message: str) -> None:
        try:
            self._queue.put_nowait((subject, kind, reason, message[:_MESSAGE_CHARACTERS]))
        except asyncio.QueueFull:
            _log.warning("too many Events; this one is dropped: %s: %s", reason, message)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            item = await self._queue.get()
            try:
                await self._send(*item)
            except ApiError as error:
                _log.warning("an Event is lost: %s", error.message)

    async def _send(self, subject: Subject, kind: Kind, reason: str, message: str) -> None:
        now, key = self._clock(), (subject.uid or subject.name, reason)
        told = self._told.get(key)
        if told is not None and now - told.begun_at < _LIFE_SECONDS:
            told.count += 1
            if now - told.sent_at < _AGAIN_SECONDS:
                return
            told.sent_at = now
            change = {"count": told.count, "lastTimestamp": rfc3339(now), "message": message}
            try:
                await self._api.patch(told.path, change)
                return
            except ApiError as error:
                if error.status != 404:
                    raise
        await self._create(subject, kind, reason, message, now)

    async def _create(
        self, subject: Subject, kind: Kind, reason: str, message: str, now: float
    ) -> None:
        # Events about what has no namespace live in `default`; the API server insists.
        namespace = subject.namespace or "default"
        name = f"{subject.name[:200]}.{uuid.uuid4().hex[:16]}"
        path = f"/api/v1/namespaces/{namespace}/events"
        about = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": subject.kind,
            "name": subject.name,
            "uid": subject.uid,
        }
        if subject.namespace:
            about["namespace"] = subject.namespace
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": about,
            "type": kind,
            "reason": reason,
            "message": message,
            "count": 1,
            "firstTimestamp": rfc3339(now),
            "lastTimestamp": rfc3339(now),
            "source": {"component": "localmodel-agent", "host": self._node},
        }
        self._told[subject.uid or subject.name, reason] = _Told(f"{path}/{name}", 1, now, now)
        while len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)
        await self._api.create(path, body)
