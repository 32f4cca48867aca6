"""One reconciler in this process, on a real disk, with a world that a test arranges."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from agent import layout
from agent.curator import Curator
from agent.fetch import Fetcher
from agent.index import Index
from agent.metrics import Metrics
from agent.model import CacheKey, ModelRef, Space, Want, cache_key
from agent.phases import TRANSITIONS, Phase
from agent.publish import Publisher
from agent.reconcile import Policy, Reconciler
from agent.scrub import Scrub
from agent.service import Service
from agent.sources import Sources
from agent.status import Facts
from agent.store import Store
from agent.transfer import Engine
from agent.wishes import Desired
from tests.fakes.source import FakeSource


class Witness(Publisher):
    """Notes every change of phase that is published, and refuses those that are not legal."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        super().__init__(store, metrics, None)
        self.seen: dict[CacheKey, list[Phase]] = {}
        self.illegal: list[str] = []

    def witness(self, facts: Mapping[CacheKey, Facts]) -> None:
        for key, fact in facts.items():
            history, now = self.seen.setdefault(key, []), fact.phase
            if now is None or (history and history[-1] is now):
                continue
            if history and now not in TRANSITIONS[history[-1]]:
                self.illegal.append(f"{fact.ref.uri}: {history[-1]} -> {now}")
            history.append(now)
        for key in set(self.seen) - set(facts):
            del self.seen[key]
        super().witness(facts)


class Volume:
    """The reconciler, and the levers of its world: clock, users, capacity, source."""

    def __init__(self, home: Path, *, store: Store | None = None, **settings: Any) -> None:
        self.settings = settings
        self.source = FakeSource(home / "origin")
        self.store = store or Store(home / "cache")
        self.metrics = Metrics()
        self.witness = Witness(self.store, self.metrics)
        self.now = 1_700_000_000.0
        self.capacity = 1_000_000
        self.users: Callable[[], frozenset[CacheKey] | None] = lambda: None
        self._engine = Engine()
        self.fetcher = Fetcher(
            store=self.store,
            sources=Sources({"fake": lambda environment: self.source}),
            engine=self._engine,
            metrics=self.metrics,
            clock=lambda: self.now,
        )
        self.index = Index(home / "index.sqlite3", rebuild=self.store.entries)
        self._slow = Engine(connections=1)
        scrub_seconds = settings.pop("scrub_seconds", None)
        scrub = None
        if scrub_seconds is not None:
            scrub = Scrub(
                store=self.store,
                engine=self._slow,
                index=self.index,
                metrics=self.metrics,
                every_seconds=scrub_seconds,
                clock=lambda: self.now,
            )
        self.reconciler = Reconciler(
            store=self.store,
            index=self.index,
            fetcher=self.fetcher,
            publisher=self.witness,
            metrics=self.metrics,
            space=self._space,
            policy=Policy(high=1.0, low=0.9, max_fetches=2, **self.settings),
            scrub=scrub,
            in_use=self._in_use,
            clock=lambda: self.now,
            dice=lambda: 0.5,
        )
        self.service = Service(
            store=self.store,
            fetcher=self.fetcher,
            reconciler=self.reconciler,
            metrics=self.metrics,
        )
        self.curator = Curator(
            fetcher=self.fetcher,
            reconciler=self.reconciler,
            index=self.index,
            who_uses=lambda key: [],
        )
        self.loop: asyncio.Task[None] | None = None

    async def _in_use(self) -> frozenset[CacheKey] | None:
        return self.users()

    def _space(self) -> Space:
        """What files of models take of the capacity, wherever they are on their way."""
        used = 0
        for top in (layout.MODELS, layout.INGEST, layout.TRASH):
            for directory, _, names in os.walk(self.store.root / top):
                for name in names:
                    with suppress(FileNotFoundError):
                        used += Path(directory, name).stat().st_size
        return Space(capacity=self.capacity, free=max(0, self.capacity - used))

    @asynccontextmanager
    async def turning(self) -> AsyncIterator["Volume"]:
        """Open, and turn until the block ends; then every change that was seen must be legal."""
        self.store.open()
        try:
            await self.reconciler.start()
            self.loop = asyncio.create_task(self.reconciler.run())
            try:
                yield self
            finally:
                self.loop.cancel()
                with suppress(asyncio.CancelledError):
                    await self.loop
        finally:
            await self.index.close()
            self._engine.close()
            self._slow.close()
            self.store.close()
        assert not self.witness.illegal, self.witness.illegal
        assert self.metrics.illegal_transitions._value.get() == 0

    def want(self, *uris: str, **said: Any) -> None:
        """`said` are fields of each `Want`."""
        wants = {cache_key(uri): Want(ref=ModelRef(uri=uri), **said) for uri in uris}
        self.reconciler.desire(Desired(wants=wants, names={}))

    async def why(self, uri: str) -> str:
        """The first sentence."""
        (event,) = [event async for event in self.curator.why({"model": uri})]
        answer: str = event["answer"]
        return answer

    def phase(self, uri: str) -> Phase | None:
        fact = self.reconciler.facts().get(cache_key(uri))
        return fact.phase if fact else None

    async def until(self, condition: Callable[[], object], *, seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                assert self.loop is None or not self.loop.done(), self.loop
                await asyncio.sleep(0.005)

    async def reach(self, uri: str, phase: Phase | None) -> None:
        try:
            await self.until(lambda: self.phase(uri) is phase)
        except TimeoutError:
            raise AssertionError(f"{uri} is {self.phase(uri)} and not {phase}") from None

    async def turn(self, times: int = 2) -> None:
        """Let whole turns pass: the first that begins now, and the next."""
        for _ in range(times):
            before = self._turns()
            self.reconciler.wake()
            await self.until(lambda before=before: self._turns() > before)  # type: ignore[misc] # a default pins the loop's value

    def _turns(self) -> float:
        counters = self.metrics.turns
        found: float = sum(counters.labels(result=r)._value.get() for r in ("ok", "failed"))
        return found

    async def later(self, seconds: float) -> None:
        self.now += seconds
        await self.turn()
