"""Every byte of every sealed model is read and hashed again now and then, slowly (bit rot).

What a look at names and sizes cannot see: a sector that went bad, a write that never reached the
disk, somebody with root and an editor. One model after the other, the one that was proven longest
ago first, at a rate that leaves the disk to those who serve.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from math import inf

from agent.errors import AgentError
from agent.index import Index
from agent.manifest import Manifest
from agent.metrics import Metrics
from agent.model import CacheKey
from agent.store import Store
from agent.transfer import Engine
from agent.verify import damaged

_log = logging.getLogger(__name__)

_LONGEST_SECONDS = 60.0  # what is sealed meanwhile is looked at soon enough, also by a wrong clock


class Scrub:
    """Of one volume. `every_seconds` is the age at which a proof is made again."""

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        index: Index,
        metrics: Metrics,
        every_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._engine = engine
        self._index = index
        self._metrics = metrics
        self._every_seconds = every_seconds
        self._clock = clock
        self._proven: dict[CacheKey, float] = {}
        self._doubted: set[CacheKey] = set()

    async def run(
        self,
        sealed: Callable[[], Mapping[CacheKey, Manifest]],
        found: Callable[[CacheKey, list[str]], None],
    ) -> None:
        """Until cancelled. `found` is told of each model that turned out damaged."""
        self._proven = await self._index.proven()
        while True:
            models = sealed()
            self._proven = {key: at for key, at in self._proven.items() if key in models}
            now = self._clock()
            ages = {key: now - self._proof(key, model) for key, model in models.items()}
            self._doubted &= models.keys()
            ages |= dict.fromkeys(self._doubted, inf)
            due = [key for key, age in ages.items() if age >= self._every_seconds]
            if not due:
                oldest = max(ages.values(), default=0.0)
                await asyncio.sleep(min(_LONGEST_SECONDS, self._every_seconds - oldest))
                continue
            key = max(due, key=lambda key: (ages[key], key))
            await self._prove(key, models[key], sealed, found)

    def _proof(self, key: CacheKey, model: Manifest) -> float:
        """The later one, unless it is of the future: a clock was there, and was set back."""
        proofs = (self._proven.get(key, 0.0), float(model.sealed_at))
        return max((at for at in proofs if at <= self._clock()), default=0.0)

    async def _prove(
        self,
        key: CacheKey,
        model: Manifest,
        sealed: Callable[[], Mapping[CacheKey, Manifest]],
        found: Callable[[CacheKey, list[str]], None],
    ) -> None:
        try:
            bad = await damaged(self._engine, self._store.model(key), model)
        except AgentError as error:  # cannot be read now: neither good nor bad
            _log.warning("cannot scrub %s: %s", model.ref.uri, error.message)
            await asyncio.sleep(_LONGEST_SECONDS)
            return
        if sealed().get(key) is not model:
            return  # it was retired or mended while we read
        now = self._clock()
        self._metrics.scrubbed_bytes.inc(model.bytes)
        if bad:
            found(key, bad)
            self._doubt_those_that_share(model, set(bad), sealed())
        self._proven[key] = now
        self._doubted.discard(key)
        await self._index.record_proven(key, now)

    def _doubt_those_that_share(
        self, model: Manifest, bad: set[str], models: Mapping[CacheKey, Manifest]
    ) -> None:
        """The same bytes may be the same file: those that have them are next."""
        wrong = {file.sha256 for file in model.files if file.path in bad}
        for key, other in models.items():
            if other is not model and wrong & {file.sha256 for file in other.files}:
                self._doubted.add(key)
