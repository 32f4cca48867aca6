"""The verbs of an operator who keeps house: why, plan, pin, unpin, evict. Each yields events.

Nothing is decided here: `plan` and `why` are asked with the facts of this moment, and what changes
something goes through the loop like everything else.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Any

from agent.errors import AgentError, Reason
from agent.events import Event, error_event, is_named
from agent.fetch import Fetcher
from agent.index import Index
from agent.model import Abandon, CacheKey, Evict, Fetch, Ingest, ModelRef, Want, cache_key
from agent.plan import plan
from agent.quantities import parse_size
from agent.reconcile import Reconciler, Seen
from agent.victims import keeps
from agent.why import KEPT, Case, explain

Verb = Callable[[Mapping[str, Any]], AsyncGenerator[Event, None]]

_PREVIEW = "size:"
"""No source has this scheme: a model of which only the size is known."""


class Curator:
    """Verbs over one running reconciler."""

    def __init__(
        self,
        *,
        fetcher: Fetcher,
        reconciler: Reconciler,
        index: Index,
        who_uses: Callable[[CacheKey], list[str]],
    ) -> None:
        self._fetcher = fetcher
        self._reconciler = reconciler
        self._index = index
        self._who_uses = who_uses
        self.verbs: Mapping[str, Verb] = {
            "why": self.why,
            "plan": self.plan,
            "pin": self.pin,
            "unpin": self.unpin,
            "evict": self.evict,
        }

    async def why(self, request: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """One `why` event: the answer and what supports it, a sentence each."""
        try:
            key, uri = self._named(request)
            wants = self._reconciler.wants()
            seen = await self._reconciler.observe(wants)
            facts = self._reconciler.facts().get(key)
            past = await self._index.past(key)
        except AgentError as error:
            yield error_event(error)
            return
        case = Case(
            key=key,
            wants=wants,
            actual=seen.actual,
            volume=seen.volume,
            now=seen.now,
            facts=facts,
            past=past,
            users=self._who_uses(key),
        )
        answer, *support = explain(case)
        known = uri or (facts.ref.uri if facts else past[-1].uri if past else "")
        yield {"event": "why", "key": key, "uri": known, "answer": answer, "support": support}

    async def plan(self, request: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """One `plan` event: whether a model, or so many bytes, would fit, and what would go."""
        try:
            want, ingest = await self._imagined(str(request.get("model") or ""))
            wants = self._reconciler.wants()
            seen = await self._reconciler.observe(wants)
        except AgentError as error:
            yield error_event(error)
            return
        yield _preview(want, ingest, wants, seen)

    async def _imagined(self, text: str) -> tuple[Want, Ingest]:
        """A model as it would be when its listing has just arrived."""
        try:
            size, ref = parse_size(text), ModelRef(uri=f"{_PREVIEW}{text}")
        except ValueError:
            want = Want(ref=ModelRef(uri=text))
            self._fetcher.check(want)
            size, ref = (await self._fetcher.today(want)).bytes, want.ref
        return Want(ref=ref), Ingest(ref=ref, revision="", total=size, done=0)

    async def pin(self, request: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Keep a model whatever room is needed: one `pinned` event."""
        async for event in self._pin(request, pinned=True):
            yield event

    async def unpin(self, request: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """The reverse: one `unpinned` event."""
        async for event in self._pin(request, pinned=False):
            yield event

    async def _pin(
        self, request: Mapping[str, Any], *, pinned: bool
    ) -> AsyncGenerator[Event, None]:
        try:
            key, uri = self._named(request)
            await self._reconciler.pin(key, pinned=pinned)
        except AgentError as error:
            yield error_event(error)
            return
        here = key in self._reconciler.sealed()
        name = "pinned" if pinned else "unpinned"
        yield {"event": name, "key": key, "uri": uri, "here": here}

    async def evict(self, request: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Take models away: one `evicted` event each, with the bytes that this frees, or an error
        with what keeps it. With `dry_run`, what would happen."""
        for name in request.get("models") or ():
            try:
                key, uri = self._named({"model": name})
                dry = bool(request.get("dry_run"))
                size = await (self._would_free(key) if dry else self._reconciler.evict(key))
            except AgentError as error:
                yield error_event(error)
                continue
            yield {"event": "evicted", "key": key, "uri": uri, "bytes": size, "dry_run": dry}

    async def _would_free(self, key: CacheKey) -> int:
        wants = self._reconciler.wants()
        seen = await self._reconciler.observe(wants)
        seen = replace(seen, actual=replace(seen.actual, outcast=frozenset({key})))
        decided = plan(wants, seen.actual, seen.volume, now=seen.now)
        for action in decided.actions:
            if isinstance(action, Evict) and action.key == key:
                return action.bytes
        entry = seen.actual.entries.get(key)
        if entry is None:
            raise AgentError(Reason.INVALID_SPEC, f"{key} is not on offer here")
        kept = keeps(key, wants, seen.actual, seen.volume, seen.now)
        raise AgentError(Reason.KEPT, f"{entry.ref.uri}: {KEPT[kept] if kept else 'it stays'}")

    def _named(self, request: Mapping[str, Any]) -> tuple[CacheKey, str]:
        """The key and the URI of what a user's word means; a URI need not be here."""
        name = str(request.get("model") or "")
        facts = self._reconciler.facts()
        found = [f for key, f in facts.items() if is_named(name, key, f.ref.uri, f.names)]
        if len(found) == 1:
            return found[0].key, found[0].ref.uri
        if len(found) > 1:
            raise AgentError(
                Reason.INVALID_SPEC, f"{name[:200]!r} means {len(found)} models; give more of a key"
            )
        if not name.isprintable() or ("/" not in name and not name.startswith(_PREVIEW)):
            raise AgentError(
                Reason.INVALID_SPEC, f"{name[:200]!r} is no URI, and no cache or key here"
            )
        return cache_key(name), name


def _preview(want: Want, ingest: Ingest, wants: Mapping[CacheKey, Want], seen: Seen) -> Event:
    """What the plan would do if this came now, at the back of no queue."""
    key, actual = want.key, seen.actual
    described: Event = {
        "event": "plan",
        "uri": "" if want.ref.uri.startswith(_PREVIEW) else want.ref.uri,
        "bytes": ingest.total,
        "fits": True,
        "here": key in actual.entries,
        "evicts": [],
        "message": "",
    }
    if key in actual.entries:
        return described
    imagined = replace(
        actual,
        ingests={**actual.ingests, key: actual.ingests.get(key, ingest)},
        attempts={k: a for k, a in actual.attempts.items() if k != key},
        demanded=actual.demanded | {key},
    )
    volume = replace(seen.volume, max_fetches=len(wants) + len(actual.jobs) + 1)
    decided = plan({**wants, key: wants.get(key, want)}, imagined, volume, now=seen.now)
    before = plan(wants, actual, volume, now=seen.now)
    gone = [
        a for a in decided.actions if isinstance(a, Evict | Abandon) and a not in before.actions
    ]
    begun = key in actual.jobs or any(
        isinstance(a, Fetch) and a.key == key for a in decided.actions
    )
    block = decided.blocked.get(key)
    return {
        **described,
        "fits": begun,
        "evicts": [
            {"key": a.key, "uri": _uri(actual.entries, actual.ingests, a.key), "bytes": a.bytes}
            for a in gone
        ],
        "message": block.message if block is not None else "",
    }


def _uri(entries: Mapping[CacheKey, Any], ingests: Mapping[CacheKey, Ingest], key: CacheKey) -> str:
    found = entries.get(key) or ingests.get(key)
    return found.ref.uri if found is not None else ""
