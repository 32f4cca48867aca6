"""Kubernetes Events, aggregated: what `kubectl describe` shows of a node's models and its pods.

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
    api: str = f"{GROUP}/{VERSION}"


@dataclass(frozen=True, slots=True)
class _Said:
    subject: Subject
    kind: Kind
    reason: str
    message: str
    topic: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two of them the same Event."""
        return self.subject.uid or self.subject.name, self.reason, self.topic


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
        self._queue: asyncio.Queue[_Said] = asyncio.Queue(_QUEUE)
        self._told: OrderedDict[tuple[str, str, str], _Told] = OrderedDict()

    def say(
        self, subject: Subject, kind: Kind, reason: str, message: str, *, topic: str = ""
    ) -> None:
        """`topic` tells apart what one object has several of: the models of a node."""
        said = _Said(subject, kind, reason, message[:_MESSAGE_CHARACTERS], topic)
        try:
            self._queue.put_nowait(said)
        except asyncio.QueueFull:
            _log.warning("too many Events; this one is dropped: %s: %s", reason, message)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            item = await self._queue.get()
            try:
                await self._send(item)
            except ApiError as error:
                _log.warning("an Event is lost: %s", error.message)

    async def _send(self, said: _Said) -> None:
        now, key = self._clock(), said.key
        told = self._told.get(key)
        if told is not None and now - told.begun_at < _LIFE_SECONDS:
            told.count += 1
            if now - told.sent_at < _AGAIN_SECONDS:
                return
            told.sent_at = now
            change = {"count": told.count, "lastTimestamp": rfc3339(now), "message": said.message}
            try:
                await self._api.patch(told.path, change)
                return
            except ApiError as error:
                if error.status != 404:
                    raise
        await self._create(said, now)

    async def _create(self, said: _Said, now: float) -> None:
        subject = said.subject
        # Events about what has no namespace live in `default`; the API server insists.
        namespace = subject.namespace or "default"
        name = f"{subject.name[:200]}.{uuid.uuid4().hex[:16]}"
        path = f"/api/v1/namespaces/{namespace}/events"
        about = {
            "apiVersion": subject.api,
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
            "type": said.kind,
            "reason": said.reason,
            "message": said.message,
            "count": 1,
            "firstTimestamp": rfc3339(now),
            "lastTimestamp": rfc3339(now),
            "source": {"component": "localmodel-agent", "host": self._node},
        }
        await self._api.create(path, body)
        self._told[said.key] = _Told(f"{path}/{name}", 1, now, now)
        while len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)
