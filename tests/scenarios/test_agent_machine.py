"""Any history of a whole agent: wishes, pods, sources, disks, clocks and deaths, in any order.

Hypothesis looks for a bad one. After every rule the loop turns until it is at rest, and then all
that the README promises of eviction must hold. `MACHINE_EXAMPLES=1000` looks longer.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent import layout
from agent.errors import AgentError, Reason
from agent.events import Event
from agent.model import Abandon, CacheKey, Evict, Fetch, ModelRef, Resolve, Want, cache_key
from agent.transfer.pump import DEPTH
from agent.victims import Links
from tests.edges.volume import HOW, fast_directory, leave, sha256
from tests.fakes.source import Operation
from tests.machine import files_of
from tests.scenarios.loop import (
    REST_SECONDS,
    Decision,
    Fuse,
    Life,
    decisions,
    inodes_below,
    meddle,
    offered,
)

_T = TypeVar("_T")

CAPACITY = 1_000_000
SIZES = (300, *[90_000] * 2, *[250_000] * 4, *[400_000] * 4, 700_000, 1_200_000)
BASE = random.Random(0).randbytes(120_000)
"""A file that half of the models have in common."""

BUFFER = 4096
AHEAD = 8 * DEPTH * BUFFER
"""What the engine may hold that has come and is not written: such bytes are in no account."""

IDLE_TURNS = 3
"""In a row; the first of them may have begun before the last stimulus."""

URIS = tuple(f"fake://m{n}" for n in range(7))
uris = st.sampled_from(URIS)
few = st.sets(uris, max_size=3)
seconds = st.sampled_from([-5000.0, -50.0, 1.0, 31.0, 700.0, 3700.0, 90_000.0, 9e5])
wants = st.builds(
    Want,
    ref=st.just(ModelRef(uri="")),
    on_demand=st.sampled_from([True, True, True, False]),
    pinned=st.sampled_from([False] * 7 + [True]),
    priority=st.integers(0, 2),
    ttl_seconds=st.sampled_from([None, None, None, 3600.0, 200_000.0]),
    retain_seconds=st.sampled_from([None, None, 0.0, 600.0]),
)
failures = st.sampled_from(
    [Reason.NETWORK, Reason.RATE_LIMITED, Reason.REPOSITORY_NOT_FOUND, Reason.SOURCE_CHANGED]
)


@lru_cache(maxsize=256)
def _weights(seed: str, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


class Agent(RuleBasedStateMachine):
    """`published` is what the source ever had under a URI, as path and SHA-256 of every file;
    `left` what another agent left in the place of a model, until ours is on offer there."""

    @initialize(
        min_age=st.sampled_from([0.0, 0.0, 600.0]),
        retain=st.sampled_from([0.0, 600.0, 7 * 86400.0]),
        limit=st.sampled_from([None, None, None, 700_000]),
        sizes=st.tuples(*(st.sampled_from(SIZES) for _ in URIS)),
        asked=st.dictionaries(uris, wants, min_size=2, max_size=6),
        pods=few,
    )
    def start(
        self,
        min_age: float,
        retain: float,
        limit: int | None,
        sizes: tuple[int, ...],
        asked: dict[str, Want],
        pods: set[str],
    ) -> None:
        self.stack = ExitStack()
        self.home = self.stack.enter_context(fast_directory())
        self.runner = self.stack.enter_context(asyncio.Runner())
        self.stack.enter_context(decisions(self._heard))
        self.stack.enter_context(patch("agent.transfer.pump.BUFFER_BYTES", BUFFER))
        self.settings: dict[str, Any] = {
            "min_age_seconds": min_age,
            "retain_seconds": retain,
            "limit": limit,
        }
        self.published: dict[CacheKey, set[frozenset[tuple[str, str]]]] = {}
        self.newest: dict[str, dict[str, bytes]] = {}
        self.sizes: dict[str, int] = {}
        self.versions: Counter[str] = Counter()
        self.wishes: dict[CacheKey, Want] = {}
        self.pods: frozenset[CacheKey] = frozenset()
        self.pins: set[CacheKey] = set()
        self.left: dict[CacheKey, dict[str, bytes]] = {}
        self.life = Life(self.home, fuse=Fuse(), **self.settings)
        self.life.capacity = CAPACITY
        for uri, size in zip(URIS, sizes, strict=True):
            self._publish(uri, size)
        self.offers: frozenset[CacheKey] = frozenset()
        self.ours = 0
        self.stop_after: float | None = None
        self._new_step()
        self._run(self.life.begin())
        self._wish(asked)
        self._pods(pods)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            with suppress(AssertionError):  # a failure that is under way is the one to be shown
                self._run(self.life.end())
            self.stack.close()

    # -- the world ----------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self.runner.run(work)

    def _new_step(self) -> None:
        self.heard: list[Decision] = []
        self.peak = 0
        self.vandalised: set[CacheKey] = set()
        self.disturbed = False
        self.looks = 0
        self.deaths = 0
        self.life.reported.clear()
        self.asking: list[asyncio.Task[None]] = []

    def _heard(self, decision: Decision) -> None:
        self.heard.append(decision)
        self.peak = max(self.peak, self._ours())

    def _ours(self) -> int:
        """The bytes of models, whole and begun; not those on their way out."""
        ingest = self.life.store.root / layout.INGEST
        begun = [path for top in (layout.TREE, layout.PARTIAL) for path in ingest.glob(f"*/{top}")]
        found = inodes_below(self.life.store.root / layout.MODELS, *begun)
        return sum(size for size, _ in found.values())

    def _publish(self, uri: str, size: int) -> None:
        self.versions[uri] += 1
        seed = f"{uri} {self.versions[uri]} {size}"
        files = {"config.json": seed.encode(), "w/weights.bin": _weights(seed, size)}
        if int(uri[-1]) % 2:
            files["base.bin"] = BASE
        self.newest[uri] = files
        self.sizes[uri] = max(self.sizes.get(uri, 0), sum(map(len, files.values())))
        self.life.source.add(uri, files)
        whole = frozenset((path, sha256(data)) for path, data in files.items())
        self.published.setdefault(cache_key(uri), set()).add(whole)

    # -- rules --------------------------------------------------------------------------------

    @rule(asked=st.dictionaries(uris, wants, min_size=1, max_size=3))
    def somebody_wants(self, asked: dict[str, Want]) -> None:
        self._wish(asked)

    @rule(asked=st.sets(uris, min_size=1, max_size=3))
    def nobody_wants(self, asked: set[str]) -> None:
        for uri in asked:
            self.wishes.pop(cache_key(uri), None)
        self._wish({})

    def _wish(self, asked: dict[str, Want]) -> None:
        for uri, want in asked.items():
            ref, names = ModelRef(uri=uri), frozenset({uri})
            self.wishes[cache_key(uri)] = replace(want, ref=ref, names=names)
        self.life.wish(self.wishes)

    @rule(pods=few, after=st.sampled_from([0.0, 1.0, 61.0]))
    def pods_come_and_go(self, pods: set[str], after: float) -> None:
        self._pods(pods)
        self._later(after)

    @rule(pods=few)
    def pods_come_the_day_after(self, pods: set[str]) -> None:
        """Whatever was here is old by now, and what failed is due again."""
        self._pods(pods)
        self._later(90_000.0)

    def _pods(self, pods: set[str]) -> None:
        self.pods = frozenset(map(cache_key, pods))
        self.life.users = lambda: self.pods

    def _later(self, after: float) -> None:
        self.life.now += after
        self.life.reconciler.wake()

    @rule(uri=uris, looks=st.integers(1, 6), asked=st.dictionaries(uris, wants, max_size=2))
    def a_pod_starts_in_a_moment(self, uri: str, looks: int, asked: dict[str, Want]) -> None:
        """Between two looks of one turn, or of one eviction."""
        self.disturbed = True
        self.looks = looks

        def users() -> frozenset[CacheKey]:
            self.looks -= 1
            if self.looks <= 0:
                self.pods |= {cache_key(uri)}
            return self.pods

        self.life.users = users
        self._wish(asked)

    @rule()
    def nobody_can_tell_who_uses_what(self) -> None:
        self.life.users = lambda: None
        self.life.reconciler.wake()

    @rule(uri=uris, verb=st.sampled_from(["pin", "unpin", "evict"]))
    def an_operator_acts(self, uri: str, verb: str) -> None:
        if verb == "evict":
            self._verb(self.life.curator.evict({"models": [uri]}))
            return
        self._run(self.life.reconciler.pin(cache_key(uri), pinned=verb == "pin"))
        (self.pins.add if verb == "pin" else self.pins.discard)(cache_key(uri))

    @rule(asked=st.sets(uris, min_size=1, max_size=3))
    def somebody_pulls(self, asked: set[str]) -> None:
        self.disturbed = True
        for uri in sorted(asked):
            self._verb(self.life.service.pull({"uri": uri}))

    def _verb(self, events: AsyncGenerator[Event, None]) -> None:
        async def listen() -> None:
            async for _ in events:
                pass

        async def begin() -> asyncio.Task[None]:
            task = asyncio.create_task(listen())
            await asyncio.sleep(0)
            return task

        self.asking.append(self._run(begin()))

    @rule(uri=uris, size=st.sampled_from([None, *SIZES]))
    def the_source_changes(self, uri: str, size: int | None) -> None:
        """It has something newer; or (None) the same, but who has the old listing cannot know."""
        source = self.life.source
        if size is not None:
            self._publish(uri, size)
            return
        held = {path: source.place(uri, path) for path in self.newest[uri]}
        for place in held.values():
            place.touch()
        source.add(uri, {path: place.read_bytes() for path, place in held.items()})

    @rule(
        operation=st.sampled_from(["list", "locate"]),
        reason=failures,
        times=st.sampled_from([1, 1, 2, None]),
    )
    def the_source_fails(self, operation: Operation, reason: Reason, times: int | None) -> None:
        self.life.source.fail(operation, AgentError(reason, "as told"), times=times)

    @rule(slow=st.sampled_from([0.0, 0.0, 0.01]))
    def the_source_is_well(self, slow: float) -> None:
        self.life.source.mend()
        self.life.source.slow("locate", slow)
        self._later(700.0)

    @rule(after=seconds)
    def the_clock_jumps(self, after: float) -> None:
        self._later(after)

    @rule(foreign=st.sampled_from([0, 0, 1_000, 200_000, 450_000, 1_000_000]))
    def somebody_else_takes_space(self, foreign: int) -> None:
        self.life.foreign = foreign
        self.life.reconciler.wake()

    @rule(uri=uris, how=st.sampled_from(["whole", "whole", "cut", "wrong", "strange"]), pods=few)
    def another_agent_leaves_something(self, uri: str, how: str, pods: set[str]) -> None:
        key = cache_key(uri)
        if key in self.offers or self.life.store.model(key).exists():
            return
        files = dict(self.newest[uri])
        weights = files["w/weights.bin"]
        if how == "cut":
            files["w/weights.bin"] = weights[: len(weights) // 2]
        elif how == "wrong":
            files["w/weights.bin"] = bytes(len(weights))
        elif how == "strange":
            files = {"strange": b"not of this model"}
        self.left[key] = files | {".cache/huggingface/x": b"etag"}
        leave(self.life.store.root, self.left[key], uri=uri)
        self.disturbed = True
        self.ours = self._ours()
        self._pods(pods)
        self._later(90_000.0)

    @rule(pick=st.integers(0, 6), how=st.sampled_from(["directory", "file", "truncate", "write"]))
    def somebody_meddles(self, pick: int, how: str) -> None:
        if not self.offers:
            return
        top = self.life.store.model(sorted(self.offers)[pick % len(self.offers)])
        touched = inodes_below(top)
        for key in self.offers:
            if touched.keys() & inodes_below(self.life.store.model(key)).keys():
                self.vandalised.add(key)
        meddle(top, how)
        self._later(31.0)

    @rule(verbs=st.integers(0, 40), how=st.sampled_from(HOW), pods=few)
    def it_is_killed(self, verbs: int, how: str, pods: set[str]) -> None:
        """At one of the next verbs that it says to its disk, whenever that is."""
        assert self.life.fuse is not None
        self.life.fuse.arm(verbs, how)
        self.pods_come_the_day_after(pods)

    @rule(after=st.sampled_from([0.0, 0.002, 0.005, 0.01, 0.02, 0.05]), pods=few)
    def it_is_stopped(self, after: float, pods: set[str]) -> None:
        self.stop_after = after
        self.pods_come_the_day_after(pods)

    # -- to rest ------------------------------------------------------------------------------

    async def _live_again(self) -> None:
        self.deaths += 1
        await self.life.end()
        self.life = Life(self.home, before=self.life, fuse=Fuse(), **self.settings)
        await self.life.begin()

    async def _settle(self) -> None:
        if self.stop_after is not None:
            await asyncio.sleep(self.stop_after)
            self.stop_after = None
            await self._live_again()
        async with asyncio.timeout(REST_SECONDS):
            idle = 0
            while idle < IDLE_TURNS:
                await self._turn()
                last = self.heard[-1]
                trash = any((self.life.store.root / layout.TRASH).iterdir())
                busy = last.plan.actions or last.actual.jobs or last.volume.reclaiming or trash
                idle = 0 if busy or self.looks > 0 else idle + 1
            for task in self.asking:  # whoever waits for what cannot come now goes away
                task.cancel()
            if self.asking:
                await asyncio.wait(self.asking)

    async def _turn(self) -> None:
        """One more plan; by the next life, if this one ends first."""
        before = len(self.heard)
        self.life.reconciler.wake()
        while len(self.heard) == before:
            assert self.life.fuse is not None
            assert self.life.loop is not None
            if self.life.fuse.blown:
                await self._live_again()
            elif self.life.loop.done():
                self.life.loop.result()
            await asyncio.sleep(0.0005)

    @invariant()
    def at_rest(self) -> None:
        if not hasattr(self, "life"):
            return
        self._run(self._settle())
        self._check()
        self.offers = frozenset(offered(self.life.store.root))
        self.ours = self._ours()
        self._new_step()

    # -- what must be true --------------------------------------------------------------------

    def _check(self) -> None:
        now = offered(self.life.store.root)
        for key, files in now.items():
            assert files in self.published[key], f"{key} was never published like this"
        self._nothing_needed_is_gone(frozenset(now))
        self._bounded()
        self._accounted()
        self._no_churn()
        self._every_want_is_answered(frozenset(now))
        self._nothing_of_others_is_lost(frozenset(now))
        for uri in URIS:
            assert self._run(self.life.why(uri))

    def _nothing_of_others_is_lost(self, now: frozenset[CacheKey]) -> None:
        """It is there as it was left, or ours is on offer in its place; or was, and was evicted."""
        actions = [action for decision in self.heard for action in decision.plan.actions]
        evicted = {action.key for action in actions if isinstance(action, Evict)}
        for key in list(self.left):
            if key in now | evicted:
                del self.left[key]
            else:
                assert files_of(self.life.store.model(key)) == self.left[key], key

    def _nothing_needed_is_gone(self, now: frozenset[CacheKey]) -> None:
        eager = {key for key, want in self.wishes.items() if not want.on_demand or want.pinned}
        stay = self.offers & (eager | self.pins)
        if self.life.users() is None:
            stay |= self.offers
        else:
            stay |= self.life.reported & self.pods
        gone = stay - now - self.vandalised
        assert not gone, f"gone, and needed: {gone}"

    def _bounded(self) -> None:
        """What is begun fits: models and what is begun of them never take more than the high mark
        leaves them, unless they did before somebody else came. Trash comes on top of that: its
        bytes count as free from the moment that they are retired. A file that is mended is there
        twice where others have the old one.

        Of a limit, one model more: what has arrived since the last look at what is begun is in no
        account (tests/scenarios/test_small_disk.py has the test to be mended).
        """
        room = self.life.capacity - self.life.foreign
        limit = self.settings["limit"]
        if limit is not None:
            room = min(room, limit + max(self.sizes.values()))
        mended = sum(size for key in self.vandalised for size, _ in self._inodes(key))
        theirs = sum(len(data) for files in self.left.values() for data in files.values())
        most = max(room, self.ours) + mended + theirs + AHEAD
        assert self.peak <= most, f"{self.peak} at the worst, and {most} is allowed"

    def _inodes(self, key: CacheKey) -> list[tuple[int, int]]:
        return list(inodes_below(self.life.store.model(key)).values())

    def _accounted(self) -> None:
        entries = self.heard[-1].actual.entries.values()
        known = sum(entry.bytes for entry in entries) - Links(entries).saved
        models = map(self.life.store.model, offered(self.life.store.root))
        found = inodes_below(*models)
        assert known == sum(size for size, _ in found.values())
        assert abs(known - sum(taken for _, taken in found.values())) <= 4096 * len(found)

    def _no_churn(self) -> None:
        """Without new stimuli, no key is both evicted and fetched; and at rest nothing happens."""
        if self.disturbed or self.deaths:
            return
        gone: set[CacheKey] = set()
        for decision in self.heard:
            for action in decision.plan.actions:
                if isinstance(action, Evict | Abandon):
                    gone.add(action.key)
                elif isinstance(action, Fetch | Resolve):
                    assert action.key not in gone, f"{action.key} went and came: {self.heard}"

    def _every_want_is_answered(self, now: frozenset[CacheKey]) -> None:
        facts = self.life.reconciler.facts()
        used = self.life.users() or frozenset()
        for key, want in self.wishes.items():
            if key in now or (want.on_demand and key not in used):
                continue
            waits = facts[key].staged and facts[key].foreign  # for its pods to go
            assert facts[key].block or facts[key].attempt or waits, facts[key]


_EXAMPLES = os.environ.get("MACHINE_EXAMPLES")

Agent.TestCase.settings = settings(
    max_examples=int(_EXAMPLES or "40"),
    stateful_step_count=25,
    deadline=None,
    phases=[phase for phase in Phase if not (_EXAMPLES and phase is Phase.shrink)],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestAgent = pytest.mark.slow(Agent.TestCase)
