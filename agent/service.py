"""The operator's verbs, as streams of plain events: what the CLI shows and the socket carries.

The same object serves both: in the agent behind the Unix socket, and in a CLI that found no agent
and opened the volume itself. An event is a dict that JSON can carry; the last one of a stream is
`result` or `error`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from agent.errors import AgentError, Reason
from agent.events import Event, error_event, model_event, select, verified_event
from agent.fetch import Fetcher
from agent.known import objection
from agent.kube import parse
from agent.manifest import Manifest
from agent.metrics import Metrics, Result
from agent.model import CacheKey, Entry, ModelRef, Want
from agent.pulls import Pull
from agent.reconcile import Reconciler
from agent.store import Store

_PROGRESS_SECONDS = 0.2


class Service:
    """Verbs over one running reconciler."""

    def __init__(
        self, *, store: Store, fetcher: Fetcher, reconciler: Reconciler, metrics: Metrics
    ) -> None:
        self._store = store
        self._fetcher = fetcher
        self._reconciler = reconciler
        self._metrics = metrics

    async def pull(self, request: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Have a model here. Events: `progress` five times a second, then `result` or `error`."""
        begun = time.monotonic()
        try:
            want = _want(request)
            # Before anything is asked for: what is found missing here is brought, not answered.
            result = await self._lookup(want.key)
            pull = self._reconciler.pull(want)
            self._metrics.requests.labels(result=result).inc()
        except AgentError as error:
            yield error_event(error)
            return
        try:
            async for event in self._wait(pull):
                yield event
            entry = pull.done.result()
            if (problem := objection(want, entry)) is not None:
                raise problem
            self._metrics.request_bytes.labels(result=result).inc(entry.bytes)
            await self._reconciler.use(want.key)
            yield {
                "event": "result",
                **self._described(entry),
                "downloaded_bytes": pull.received,
                "linked_bytes": pull.linked,
                "seconds": round(time.monotonic() - begun, 3),
                "result": "downloaded" if result == "miss" else result,
            }
        except AgentError as error:
            yield error_event(error)
        finally:
            self._reconciler.release(pull)

    async def _lookup(self, key: CacheKey) -> Result:
        if await self._reconciler.look(key):
            return "hit"
        return "joined" if self._reconciler.on_its_way(key) else "miss"

    async def _wait(self, pull: Pull) -> AsyncGenerator[Event, None]:
        """Progress until the pull has its answer."""
        while not pull.done.done():
            await asyncio.wait({pull.done}, timeout=_PROGRESS_SECONDS)
            tally = self._reconciler.running(pull.want.key)
            if tally is not None:
                yield {
                    "event": "progress",
                    "stage": tally.job.stage.value,
                    "total_bytes": tally.total,
                    "done_bytes": tally.job.done,
                    "received_bytes": pull.received,
                }

    def _described(self, entry: Entry) -> Event:
        return {
            "key": entry.key,
            "uri": entry.ref.uri,
            "revision": entry.revision,
            "path": str(self._store.model(entry.key)),
            "bytes": entry.bytes,
            "files": entry.files,
            "fingerprint": entry.fingerprint,
            "warning": entry.warning,
        }

    async def models(self) -> AsyncGenerator[Event, None]:
        """One `model` event a model, in the order of keys."""
        for fact in self._reconciler.facts().values():
            event = model_event(fact, path=str(self._store.model(fact.key)))
            if event is not None:
                yield event

    async def verify(self, request: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Hash sealed models again. Events: `verified` a model; with `repair`, `repaired` too.

        What a look at names and sizes found already is reported as it was found, also where it is
        mended by the time that it is its turn.
        """
        withdrawn = dict(self._reconciler.withdrawn())
        damaged = {key: found for key, (found, _) in withdrawn.items()}
        models = {**damaged, **self._reconciler.sealed()}
        try:
            keys = select({k: found.ref for k, found in models.items()}, request.get("models"))
        except AgentError as error:
            yield error_event(error)
            return
        for key in keys:
            if key in withdrawn:
                found, bad = withdrawn[key]
            else:
                found = models[key]
                try:
                    bad = await self._fetcher.damaged(found)
                except AgentError as error:  # cannot be read: neither good nor bad
                    yield {**error_event(error), "uri": found.ref.uri}
                    continue
            yield verified_event(found, bad)
            if bad and request.get("repair"):
                async for event in self._repair(found, bad, mended=key in withdrawn):
                    yield event

    async def _repair(
        self, found: Manifest, bad: list[str], *, mended: bool
    ) -> AsyncGenerator[Event, None]:
        """`mended`: the agent is on it already, or done."""
        try:
            if mended:
                pull = self._reconciler.pull(Want(ref=found.ref))
            else:
                pull = self._reconciler.mend(found.ref, bad)
        except AgentError as error:
            yield error_event(error)
            return
        try:
            await asyncio.shield(pull.done)
            uri = found.ref.uri
            yield {"event": "repaired", "key": found.ref.key, "uri": uri, "repaired": bad}
        except AgentError as error:
            yield {**error_event(error), "uri": found.ref.uri}
        finally:
            self._reconciler.release(pull)


def _want(request: Mapping[str, Any]) -> Want:
    uri = request.get("uri")
    if not isinstance(uri, str) or not uri or not uri.isprintable():
        raise AgentError(Reason.INVALID_SPEC, "the URI is missing or holds control characters")
    return Want(
        ref=ModelRef(
            uri=uri,
            include=parse.one_lines(request.get("include") or ()),
            exclude=parse.one_lines(request.get("exclude") or ()),
        ),
        expect_fingerprint=parse.fingerprint(request.get("expect_fingerprint")),
    )
