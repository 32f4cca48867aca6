"""Makes the claims and volumes that `hook.volumes` plans; one replica at a time (design D8).

Level-triggered: whatever changes, all of it is planned again. What failed is tried again, later
each time, and said on the node group.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Set
from math import inf
from typing import NamedTuple

from agent.backoff import doubling
from agent.errors import RULES, AgentError, Reason
from agent.hook.volumes import Action, Create, Delete, Mend, Place, mounted, plan
from agent.kube.client import Api, ApiError
from agent.kube.events import Recorder, Subject
from agent.metrics import HookMetrics
from agent.tasks import flagged
from agent.watched import Part, Watched

_log = logging.getLogger(__name__)

KEPT: frozenset[Part] = frozenset({"groups", "inject", "claims", "volumes"})
"""What is planned from. Leases and nodes change all the time, and mean nothing here."""

_GRACE_SECONDS = 15.0
"""A claim that is not offered any more may be in a pod that another replica answered just before,
and that is not in any list yet."""

_RULE = RULES[Reason.CLAIM_FAILED]


class _Failed(NamedTuple):
    """What the API server refused, how often in a row, and when it is tried again (ticks)."""

    action: Action
    times: int
    again_at: float


class Keeper:
    """The *volumes* role."""

    def __init__(
        self,
        api: Api,
        watched: Watched,
        recorder: Recorder,
        metrics: HookMetrics,
        *,
        leads: Callable[[], bool],
        look_seconds: float,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """`look_seconds` is how often the pods are asked that still keep a claim which is to go."""
        self._api = api
        self._watched = watched
        self._recorder = recorder
        self._metrics = metrics
        self._leads = leads
        self._look_seconds = look_seconds
        self._grace_seconds = min(_GRACE_SECONDS, look_seconds)
        self._ticks = ticks
        self._flag = asyncio.Event()
        self._failed: dict[Place, _Failed] = {}
        self._waiting: dict[Place, float] = {}
        self._asked: Set[Place] = frozenset()
        self._asked_at = -inf

    def wake(self) -> None:
        self._flag.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            delay = self._look_seconds
            if self._leads():
                delay = await self._turn()
            await flagged(self._flag, delay)

    async def _turn(self) -> float:
        """Seconds until the next one, if nothing changes before."""
        found = plan(*self._watched.kept, used=None)
        now = self._ticks()
        self._waiting = {place: self._waiting.get(place, now) for place in found.wait}
        ripe = {place for place, at in self._waiting.items() if now - at >= self._grace_seconds}
        # Asked anew each time that something is to be deleted: who came a minute ago counts.
        if ripe - self._asked or (ripe and now - self._asked_at >= self._look_seconds):
            self._asked_at, self._asked = now, ripe
            if (used := await self._ask()) is not None:
                found = plan(*self._watched.kept, used=used | (self._waiting.keys() - ripe))
        self._asked &= found.wait
        self._metrics.claims_waiting.set(len(found.wait))
        # What is to be done is another thing now: no reason to wait.
        self._failed = {
            place: failed
            for place, failed in self._failed.items()
            if found.actions.get(place) == failed.action
        }
        for place, action in found.actions.items():
            if place not in self._failed or self._failed[place].again_at <= now:
                await self._apply(place, action)
        again = [failed.again_at for failed in self._failed.values()]
        again += [self._waiting[place] + self._grace_seconds for place in found.wait - ripe]
        return max(1.0, min([self._look_seconds, *(at - now for at in again)]))

    async def _ask(self) -> frozenset[Place] | None:
        """The places that a pod uses; None where the API server cannot say."""
        used: frozenset[Place] = frozenset()
        try:
            async for page in self._api.pages("/api/v1/pods"):
                used = used.union(*map(mounted, page["items"] or ()))
        except (AgentError, LookupError, TypeError, AttributeError) as error:
            _log.warning("nobody can tell which claims are in use: %s", error)
            return None
        return used

    async def _apply(self, place: Place, action: Action) -> None:
        try:
            match action:
                case Create(path=path, body=body):
                    await self._api.create(path, dict(body))
                case Delete(path=path, uid=uid):
                    await self._api.delete(path, uid=uid)
                case Mend(path=path, change=change):
                    await self._api.patch(path, dict(change))
        except ApiError as error:
            if isinstance(action, Delete) and error.status == 404:
                return
            self._fail(place, action, error)
        else:
            self._failed.pop(place, None)
            _log.info("%s %s", type(action).__name__.lower(), _named(action))

    def _fail(self, place: Place, action: Action, error: ApiError) -> None:
        count = 1 + (self._failed[place].times if place in self._failed else 0)
        delay = doubling(_RULE.first_seconds, _RULE.cap_seconds, count)
        delay = max(delay, error.retry_after_seconds or 0.0)
        self._failed[place] = _Failed(action, count, self._ticks() + delay)
        namespace, name = place
        message = f"no claim of the node group {name} in {namespace}: {error.message}"
        if error.status == 409 and count > 1 and isinstance(action, Create):
            message += "; that one is not ours: rename it or remove it"
        late = error.status == 409 and count == 1  # our own view may be; it is looked at again
        _log.log(logging.INFO if late else logging.WARNING, "%s", message)
        group = self._watched.groups.objects.get(name)
        if group is not None and count > 1:  # the first may be our own view that is late
            subject = Subject("LocalModelNodeGroup", "", name, group.uid)
            self._recorder.say(
                subject, "Warning", Reason.CLAIM_FAILED.value, message, topic=namespace
            )


def _named(action: Action) -> str:
    if isinstance(action, Create):
        return f"{action.path}/{action.body['metadata']['name']}"
    return action.path
