"""What happened to models, told to the index and the metrics: for who asks why, and for sizing."""

from collections.abc import Callable

from agent.index import Index
from agent.metrics import Metrics
from agent.model import CacheKey, Entry, Past, Why

GHOST_SECONDS = 7 * 86400.0
"""A model that is wanted again so soon after it went should not have gone."""

_FOR_ROOM = frozenset({Why.SPACE, Why.EXPIRED})  # the others somebody has said


class History:
    """Of one volume. `clock` gives Unix seconds."""

    def __init__(self, index: Index, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._index = index
        self._metrics = metrics
        self._clock = clock
        self._ghosts: dict[CacheKey, Past] = {}

    async def open(self) -> None:
        """Learn what went not long ago, in an earlier life."""
        for past in await self._index.past(since=self._clock() - GHOST_SECONDS):
            if past.what == "Evicted" and past.why in _FOR_ROOM:
                self._ghosts[past.key] = past
            elif past.what in ("Sealed", "WantedAgain"):
                self._ghosts.pop(past.key, None)

    async def sealed(self, entry: Entry) -> None:
        self._ghosts.pop(entry.key, None)
        await self._note(entry.key, entry.ref.uri, "Sealed", size=entry.bytes)

    async def evicted(self, entry: Entry, why: Why, size: int) -> None:
        now = self._clock()
        self._metrics.evictions.labels(why=why.value).inc()
        self._metrics.evicted_bytes.inc(size)
        past = Past(
            at=now,
            key=entry.key,
            uri=entry.ref.uri,
            what="Evicted",
            why=why.value,
            bytes=size,
            age_seconds=now - entry.sealed_at,
            idle_seconds=now - entry.last_used,
        )
        if why in _FOR_ROOM:
            self._ghosts[entry.key] = past
        await self._index.record_past(past)

    async def damaged(self, key: CacheKey, uri: str, paths: list[str]) -> None:
        shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        await self._note(key, uri, "Damaged", why=shown)

    async def wanted(self, key: CacheKey) -> None:
        """It is fetched: a ghost hit, once, if it went not long ago."""
        ghost = self._ghosts.pop(key, None)
        if ghost is None or not 0 <= self._clock() - ghost.at <= GHOST_SECONDS:
            return
        self._metrics.ghost_hits.inc()
        self._metrics.ghost_bytes.inc(ghost.bytes)
        await self._note(key, ghost.uri, "WantedAgain", why=ghost.why, size=ghost.bytes)

    async def _note(
        self, key: CacheKey, uri: str, what: str, *, why: str = "", size: int = 0
    ) -> None:
        past = Past(at=self._clock(), key=key, uri=uri, what=what, why=why, bytes=size)
        await self._index.record_past(past)
