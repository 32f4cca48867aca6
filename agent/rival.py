"""Whether KServe's own local model controller runs: beside it, `--mode standalone` keeps nothing.

Both would write the same objects, each against the other. Who runs is said by KServe's Lease of its
leader, and asked again and again: it may be installed later, and it may go.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from agent.errors import AgentError, Reason
from agent.hook.objects import Heartbeat, heartbeat
from agent.kube.client import Api, ApiError
from agent.unchanged import Unchanged

_log = logging.getLogger(__name__)

LEASE = "kserve-local-model-manager-leader-lock"
LOOK_SECONDS = 10.0


class Rival:
    """KServe's local model controller, as its Lease tells of it."""

    def __init__(
        self,
        api: Api,
        *,
        namespace: str,
        tell: Callable[[AgentError], None],
        changed: Callable[[], None],
        look_seconds: float = LOOK_SECONDS,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """`namespace` is KServe's. `tell` is called with what becomes an obstacle, `changed`
        whenever there is another one, or none any more."""
        self._api = api
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{LEASE}"
        self._name = f"{namespace}/{LEASE}"
        self._tell = tell
        self._changed = changed
        self._look_seconds = look_seconds
        self._ticks = ticks
        self._seen = Unchanged[Heartbeat]()
        self._obstacle: AgentError | None = AgentError(
            Reason.OTHER_AGENT, f"waits for the Lease {self._name}"
        )
        self.there = False
        """Whether it is known to run."""

    def obstacle(self) -> AgentError | None:
        """Why nothing may be kept now. Also before the server has said whose the Lease is; a
        server that goes away later changes nothing."""
        return self._obstacle

    async def run(self) -> None:
        """Look, until cancelled."""
        answered = False
        while True:
            try:
                beat = await self._ask()
            except (ApiError, LookupError, TypeError, ValueError, AttributeError) as error:
                if not answered:
                    message = f"cannot tell whether KServe's own controller runs: {error}"
                    self._set(AgentError(Reason.OTHER_AGENT, message))
            else:
                answered = True
                self.there = beat is not None and self._lives(beat)
                self._set(self._beside(beat) if beat is not None and self.there else None)
            await asyncio.sleep(self._look_seconds)

    async def _ask(self) -> Heartbeat | None:
        """None where there is none, nor a namespace for it."""
        try:
            return heartbeat(await self._api.get(self._path))
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    def _lives(self, beat: Heartbeat) -> bool:
        silent = self._seen.seconds(beat, self._ticks())
        return bool(beat.holder) and silent <= beat.seconds

    def _beside(self, beat: Heartbeat) -> AgentError:
        return AgentError(
            Reason.OTHER_AGENT,
            f"KServe's own local model controller runs (Lease {self._name}, {beat.holder}), and"
            " with --mode=standalone this one keeps nothing beside it: apply the overlay kserve, or"
            " remove KServe's",
        )

    def _set(self, obstacle: AgentError | None) -> None:
        before, self._obstacle = self._obstacle, obstacle
        if str(before) == str(obstacle):
            return
        if obstacle is not None:
            self._tell(obstacle)
        else:
            _log.info("KServe's own local model controller does not run")
        self._changed()
