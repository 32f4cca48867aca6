"""A 429 that one request got is for the whole node: until its time, nobody asks that host again.

What waits in place waits here; a longer pause is raised as RateLimited without a request, so that
the model's own back-off has it and its connection is free for others.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from agent.backoff import IN_PLACE_CAP_SECONDS, RETRY_AFTER_CAP_SECONDS, Dice
from agent.errors import AgentError, Reason

_UNSAID_SECONDS = 5.0  # a 429 that does not say for how long


class RateLimits:
    """Which hosts asked for a pause, and until when. For one event loop."""

    def __init__(
        self, *, ticks: Callable[[], float] = time.monotonic, dice: Dice = random.random
    ) -> None:
        self._ticks = ticks
        self._dice = dice
        self._until: dict[str, float] = {}

    async def pause(self, host: str) -> None:
        """Return when the host may be asked. Raises RateLimited where that is long from now."""
        while (left := self._until.get(host, 0.0) - self._ticks()) > 0:
            if left > IN_PLACE_CAP_SECONDS:
                raise AgentError(
                    Reason.RATE_LIMITED,
                    f"{host} asked this node for fewer requests, and to wait {left:.0f} s",
                    retry_after_seconds=left,
                )
            await asyncio.sleep(left + self._dice())  # not all of them at the same moment

    def heed(self, host: str, error: AgentError) -> None:
        """Remember what a refusal asks for; any other failure is not about the host's limit."""
        if error.reason is Reason.RATE_LIMITED and host:
            asked = error.retry_after_seconds
            pause = _UNSAID_SECONDS if asked is None else min(asked, RETRY_AFTER_CAP_SECONDS)
            self._until[host] = max(self._until.get(host, 0.0), self._ticks() + pause)

    @asynccontextmanager
    async def heeding(self, host: str) -> AsyncIterator[None]:
        """Around requests to a host: `pause` before them, `heed` what they raise."""
        await self.pause(host)
        try:
            yield
        except AgentError as error:
            self.heed(host, error)
            raise
