"""Looking at the names and sizes of sealed models, and what is noted of one that is damaged."""

import logging
from collections.abc import Callable
from functools import partial

from agent.adoption import Adoption
from agent.errors import AgentError
from agent.known import Known
from agent.metrics import Metrics
from agent.model import CacheKey
from agent.store import Store
from agent.threads import looking

_log = logging.getLogger(__name__)


class Looks:
    """Of one volume. `changed` is called when a model turns out to be damaged."""

    def __init__(
        self,
        known: Known,
        *,
        store: Store,
        adoption: Adoption,
        metrics: Metrics,
        changed: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._known = known
        self._store = store
        self._adoption = adoption
        self._metrics = metrics
        self._changed = changed
        self._clock = clock
        self._look_at = 0.0

    async def at(self, key: CacheKey) -> bool:
        """Whether the files of a sealed model are all there, in their sizes."""
        missing = await looking(partial(self._store.damage, key, self._known.sealed[key]))
        self._note(key, missing, kind="look")
        return not missing

    async def at_all(self, every_seconds: float) -> None:
        """Of every sealed model, unless that was done less than so long ago."""
        if 0 < self._look_at - self._clock() <= every_seconds:  # else the clock was set back
            return
        self._look_at = self._clock() + every_seconds
        for key, found in list(self._known.sealed.items()):
            try:
                wrong = await looking(partial(self._store.damage, key, found))
            except (
                AgentError
            ) as error:  # nobody can tell now; the others are looked at all the same
                _log.warning("cannot look at %s: %s", found.ref.uri, error.message)
            else:
                self._note(key, wrong, kind="look")

    def suspect(self, key: CacheKey, paths: list[str], *, kind: str = "hash") -> None:
        """Files of a sealed model, or of what another agent left, turned out wrong."""
        if key in self._known.sealed:
            self._note(key, paths, kind=kind)
            return
        foreign = self._known.foreign.get(key)
        sizes_differ = foreign.lacking if foreign is not None else None
        wrong = sorted(set(paths) - (sizes_differ or frozenset()))
        if foreign is not None and wrong:
            what = f"{', '.join(wrong[:5])} in {self._store.model(key)}"
            _log.error("%s: left by another agent, and wrong", what, extra={"key": key})
            self._adoption.doubt(key, wrong)
            self._changed()

    def _note(self, key: CacheKey, missing: list[str], *, kind: str) -> None:
        self._metrics.verifications.labels(kind=kind, result="damaged" if missing else "ok").inc()
        if missing and key in self._known.sealed and key not in self._known.damaged:
            uri = self._known.sealed[key].ref.uri
            _log.error("%s is damaged: %s", uri, ", ".join(missing[:5]), extra={"key": key})
            self._known.damaged[key] = missing
            self._changed()
