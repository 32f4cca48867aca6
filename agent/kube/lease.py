"""The Lease of a node: says that an agent lives there, and which one (design D15).

One agent a node: whoever holds the Lease manages the node's cache, another one waits until it is
released, has expired, or its holder has left the node. It is also the heartbeat, because a write
into the status would make KServe's controller look at every cache of the node.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from agent.errors import AgentError, Reason
from agent.kube.client import Api, ApiError, Json
from agent.unchanged import Unchanged

_log = logging.getLogger(__name__)

DURATION_SECONDS = 120
_RENEW_SECONDS = 40.0
_RETRY_SECONDS = 5.0
_CONFLICT_SECONDS = 0.1
_LONGEST_SECONDS = 30.0  # whatever the server asks for: it must be renewed before it has ended


class Lease:
    """One Lease, held or waited for."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        *,
        holder: str,
        gone: Callable[[str], bool],
        changed: Callable[[], None],
        what: str = "this node, which has one agent at most",
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """`gone` tells whether another holder is known to have left: then nobody need wait. `what`
        it is the lease of, for messages."""
        self._api = api
        self._list = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace = namespace
        self._name = name
        self._holder = holder
        self._gone = gone
        self._changed = changed
        self._what = what
        self._clock = clock
        self._ticks = ticks
        self._object: Json | None = None
        self._conflicts = 0
        self._seen = Unchanged[object]()
        self.answered = asyncio.Event()
        """Set when the server has said for the first time whose it is."""
        self._refusal: AgentError | None = None
        self.failure = ""
        """What was the last failure, while it is the last we heard of the server."""

    def obstacle(self) -> AgentError | None:
        """Why this agent may not manage the node now; None while it holds the Lease.

        Who held it and cannot renew it goes on for as long as it lasts, also when the server is
        away; and beyond, as long as nobody else can have taken it: nobody can, without a server.
        Means nothing before `answered`.
        """
        return self._refusal

    async def run(self) -> None:
        """Hold it, or try to; until cancelled."""
        while True:
            try:
                await self._turn()
                delay = _RENEW_SECONDS if self._refusal is None else _RETRY_SECONDS
                self.answered.set()
                self.failure, self._conflicts = "", 0
            except ApiError as error:
                if self.failure != error.message:
                    _log.warning("%s", error.message)
                self.failure = error.message
                self._object = None  # somebody was quicker, or it is gone: look again
                delay = self._delay(error)
            self._changed()
            await asyncio.sleep(delay)

    def _delay(self, error: ApiError) -> float:
        self._conflicts = self._conflicts + 1 if error.status == 409 else 0
        if self._conflicts == 1:  # one is somebody who was quicker; a second one in a row is odd
            return _CONFLICT_SECONDS
        return max(_RETRY_SECONDS, min(_LONGEST_SECONDS, error.retry_after_seconds or 0.0))

    async def release(self) -> None:
        """Give it up, so that the next agent need not wait for its end."""
        if self._object is None or self._refusal is not None or not self.answered.is_set():
            return
        spec = {**_spec(self._object), "holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            await self._api.replace(f"{self._list}/{self._name}", {**self._object, "spec": spec})
        except ApiError as error:
            _log.info("the lease is left to expire: %s", error.message)

    async def _turn(self) -> None:
        if self._object is None:
            try:
                self._object = await self._api.get(f"{self._list}/{self._name}")
            except ApiError as error:
                if error.status != 404:
                    raise
                self._held(await self._api.create(self._list, self._body({})))
                return
        holder = _spec(self._object).get("holderIdentity") or ""
        if holder not in ("", self._holder) and not self._has_ended(holder):
            self._refused(holder)
            self._object = None  # look again
            return
        body = self._body(self._object)
        self._held(await self._api.replace(f"{self._list}/{self._name}", body))

    def _has_ended(self, holder: str) -> bool:
        """Whether another holder's Lease is over."""
        assert self._object is not None
        spec = _spec(self._object)
        stamp = (holder, spec.get("renewTime"), self._object["metadata"].get("resourceVersion"))
        silent = self._seen.seconds(stamp, self._ticks())
        lasts = spec.get("leaseDurationSeconds") or DURATION_SECONDS
        return self._gone(holder) or silent > lasts

    def _held(self, answer: Json) -> None:
        """By what the server has now, and not by what it was sent."""
        if _spec(answer).get("holderIdentity") != self._holder:
            raise ApiError(0, f"the lease {self._name} was written, and does not name us")
        self._object = answer
        if self._refusal is not None:
            _log.info("holds the lease %s again", self._name)
        self._refusal = None

    def _refused(self, holder: str) -> None:
        message = f"{holder} holds the lease of {self._what}"
        if self._refusal is None:
            _log.info("%s", message)  # whether that is bad, who asked for it knows
        self._refusal = AgentError(Reason.OTHER_AGENT, message)

    def _body(self, before: Json) -> Json:
        spec = _spec(before)
        now = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        ours = spec.get("holderIdentity") == self._holder
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": before.get("metadata")
            or {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._holder,
                "leaseDurationSeconds": DURATION_SECONDS,
                "acquireTime": spec.get("acquireTime") if ours else now,
                "renewTime": now,
                "leaseTransitions": (spec.get("leaseTransitions") or 0) + (bool(spec) and not ours),
            },
        }


def _spec(lease: Json) -> Json:
    """What a Lease says, as far as it is of the kind that it must be: every field is optional."""
    kinds = {"holderIdentity": str, "leaseDurationSeconds": int, "leaseTransitions": int}
    spec: Json = lease.get("spec") or {}
    return {
        name: value for name, value in spec.items() if isinstance(value, kinds.get(name, object))
    }
