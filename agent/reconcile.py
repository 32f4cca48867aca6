"""The loop: observe everything, plan, apply, publish. Level-triggered: a stimulus only sets a flag.

There is no handler for case X. A finished job, a changed wish, a timer or a damaged file all end in
the same turn, which looks at the facts and asks `plan` what to do. Only this module changes what is
known (the fields of `Reconciler`); jobs return values.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any

from agent.backoff import Dice, next_attempt
from agent.desired import Desired
from agent.errors import AgentError, Reason
from agent.fetch import Fetcher, Tally, scheme
from agent.index import Index
from agent.known import Known, agree
from agent.manifest import Manifest
from agent.metrics import Metrics
from agent.model import (
    Action,
    Actual,
    Attempt,
    CacheKey,
    Cancel,
    Evict,
    Fetch,
    ModelRef,
    Plan,
    Resolve,
    Space,
    Stage,
    Volume,
    Want,
    Withdraw,
)
from agent.plan import plan
from agent.publish import Publisher
from agent.pulls import Pull, Pulls
from agent.status import Facts
from agent.store import Store

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 30.0
"""How often names and sizes of every sealed model are looked at: what was deleted or truncated by
hand is off offer within a minute."""

_PROGRESS_SECONDS = 5.0
_TOUCH_SECONDS = 300.0

# These reasons say that the pinned listing is not to be trusted any more.
_LIST_AGAIN = frozenset({Reason.SOURCE_CHANGED, Reason.FILE_NOT_FOUND, Reason.SIZE_MISMATCH})

InUse = Callable[[], Awaitable[frozenset[CacheKey] | None]]


async def unknown_use() -> frozenset[CacheKey] | None:
    """Without a cluster nobody can list the users of a model: so none is ever evicted."""
    return None


@dataclass(slots=True)
class _Running:
    """One job: its task, and how far it is."""

    task: asyncio.Task[Manifest | None]
    tally: Tally


@dataclass(slots=True, kw_only=True)
class Policy:
    """The numbers of `Volume` that are settings."""

    high: float
    low: float
    max_fetches: int


class Reconciler:
    """One volume, held as it is desired."""

    def __init__(
        self,
        *,
        store: Store,
        index: Index,
        fetcher: Fetcher,
        publisher: Publisher,
        metrics: Metrics,
        space: Callable[[], Space],
        policy: Policy,
        in_use: InUse = unknown_use,
        clock: Callable[[], float] = time.time,
        dice: Dice = random.random,
    ) -> None:
        self._store = store
        self._index = index
        self._fetcher = fetcher
        self._publisher = publisher
        self._metrics = metrics
        self._space = space
        self._policy = policy
        self._in_use = in_use
        self._clock = clock
        self._dice = dice
        self._flag = asyncio.Event()
        self._known = Known()
        self._pulls = Pulls()
        self._running: dict[CacheKey, _Running] = {}
        self._list_again: set[CacheKey] = set()
        self._trash = asyncio.Event()
        self._reclaiming = 0
        self._look_at = 0.0
        self.turned_at = clock()
        self.ready = asyncio.Event()
        """Set after the first turn: what is on offer is known."""

    # -- stimuli ------------------------------------------------------------------------------

    def wake(self) -> None:
        self._flag.set()

    def desire(self, desired: Desired) -> None:
        """What should be here from now on. Failures of wishes that changed are forgotten."""
        before = self._known.desired
        for key, want in desired.wants.items():
            if before.wants.get(key, want) != want:
                self._known.attempts.pop(key, None)
        for error in desired.errors:
            if error not in before.errors:
                _log.warning("%s is refused: %s", error.name, error.message)
        self._known.desired = desired
        self.wake()

    def pull(self, want: Want) -> Pull:
        """Ask for one model now, whatever failed before. Raises InvalidSpec, Conflict, ..."""
        self._fetcher.check(want)
        if (other := self._wants().get(want.key)) is not None:
            agree(want, other)
        pull = self._pulls.join(want, self.running(want.key))
        if want.key not in self._running:
            self._known.attempts.pop(want.key, None)
        self.wake()
        return pull

    def release(self, pull: Pull) -> None:
        """Nobody waits any more: what only this pull wanted is cancelled, and kept for a resume."""
        self._pulls.leave(pull)
        self.wake()

    def mend(self, ref: ModelRef, bad: list[str]) -> Pull:
        """Take a damaged model off offer and bring what is wrong of it again."""
        if ref.key in self._known.sealed:  # else it was found damaged meanwhile, and is on its way
            self._known.damaged[ref.key] = bad
        return self.pull(Want(ref=ref))

    # -- asking -------------------------------------------------------------------------------

    def sealed(self) -> Mapping[CacheKey, Manifest]:
        return self._known.sealed

    def withdrawn(self) -> Mapping[CacheKey, tuple[Manifest, list[str]]]:
        """Models that were found damaged and are being mended, with what was wrong."""
        return self._known.withdrawn

    def running(self, key: CacheKey) -> Tally | None:
        found = self._running.get(key)
        return found.tally if found else None

    def failure(self, key: CacheKey) -> Attempt | None:
        return self._known.attempts.get(key)

    async def look(self, key: CacheKey) -> bool:
        """Whether a model is on offer and its files are all there, in their sizes."""
        found = self._known.sealed.get(key)
        if found is None or key in self._known.damaged:
            return False
        missing = await asyncio.to_thread(self._store.damage, key, found)
        self._note_damage(key, missing)
        return not missing

    async def use(self, key: CacheKey) -> None:
        """Somebody used a sealed model now."""
        now = self._clock()
        before = self._known.last_used.get(key, 0.0)
        self._known.last_used[key] = max(now, before)
        await self._index.record_use(key, now)
        if now - before >= _TOUCH_SECONDS:
            with suppress(AgentError):  # a mirror; the index has it
                await asyncio.to_thread(self._store.touch, key, now)

    def facts(self) -> dict[CacheKey, Facts]:
        """Everything known of every key there is something to say of."""
        jobs = {
            key: (running.tally.want.ref, running.tally.job)
            for key, running in self._running.items()
        }
        return self._known.facts(self._wants(), jobs)

    # -- the loop -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the disk into order and learn what is there. Before `run`."""
        known = self._known
        for key in await asyncio.to_thread(self._store.recover):
            _log.warning("%s is not ours and stays untouched", self._store.model(key))
        self._trash.set()
        await self._index.open()
        found_attempts = await self._index.attempts()
        # A restart is a reason to try what would otherwise never be tried again.
        known.attempts = {k: a for k, a in found_attempts.items() if a.retry_at != inf}
        self._list_again = {k for k, a in found_attempts.items() if a.reason in _LIST_AGAIN}
        for key, found, used in await asyncio.to_thread(lambda: list(self._store.manifests())):
            known.sealed[key], known.last_used[key] = found, used
        for key, used in (await self._index.last_uses()).items():
            known.last_used[key] = max(used, known.last_used.get(key, 0.0))
        known.ingests = await asyncio.to_thread(self._store.ingests)
        known.mend_what_is_complete()

    async def run(self) -> None:
        """Turn until cancelled; then stop the jobs, keeping what they brought."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._turns())
                group.create_task(self._progress())
                group.create_task(self._sweep())
        finally:
            for running in self._running.values():
                running.task.cancel()
            if self._running:
                await asyncio.wait([running.task for running in self._running.values()])
            message = "the agent stops; what arrived is kept for the next time"
            self._pulls.refuse_all(AgentError(Reason.NETWORK, message))

    async def _turns(self) -> None:
        while True:
            self._flag.clear()
            wake_at = self._clock() + _LOOK_SECONDS
            try:
                decided = await self._turn()
                wake_at = min(wake_at, decided.wake_at or wake_at)
                self._metrics.turns.labels(result="ok").inc()
                self.turned_at = self._clock()
                self._metrics.last_turn.set(self.turned_at)
            except AgentError as error:
                # The disk is away, say. Nothing was decided; look again soon.
                _log.warning("cannot observe the cache: %s", error.message)
                self._metrics.turns.labels(result="failed").inc()
            self.ready.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.05, wake_at - self._clock())):
                    await self._flag.wait()

    async def _progress(self) -> None:
        """Keep the lines of waiting pods moving, also while nothing else happens."""
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            await asyncio.to_thread(self._publisher.progress, self.facts().values())
            self._publish()  # bytes of running downloads

    async def _turn(self) -> Plan:
        await self._settle_jobs()
        await self._look_at_all()
        actual = await self._observe()
        # As they are now: by the time an action is carried out, somebody may have gone.
        wants = self._wants()
        decided = plan(wants, actual, self._volume(), now=self._clock())
        self._known.blocked = decided.blocked
        for action in decided.actions:
            if not await self._apply(action, wants):
                break  # what follows may count on room that it did not make
        self._pulls.answer(self._known, self._running)
        self._publish()
        return decided

    def _wants(self) -> dict[CacheKey, Want]:
        """The desired state, beside it what somebody waits for, and what is being mended."""
        return {**self._known.mending, **self._pulls.wants(), **self._known.desired.wants}

    async def _observe(self) -> Actual:
        known = self._known
        return Actual(
            entries=known.entries(),
            damaged=frozenset(known.damaged),
            ingests={k: i for k, i in known.ingests.items() if k not in self._list_again},
            jobs={key: running.tally.job for key, running in self._running.items()},
            attempts=known.attempts,
            in_use=await self._in_use(),
        )

    def _volume(self) -> Volume:
        space = self._space()
        return Volume(
            capacity=space.capacity,
            free=space.free,
            reclaiming=self._reclaiming,
            high=self._policy.high,
            low=self._policy.low,
            max_fetches=self._policy.max_fetches,
        )

    async def _look_at_all(self) -> None:
        """Names and sizes of every sealed model, twice a minute."""
        if self._clock() < self._look_at:
            return
        self._look_at = self._clock() + _LOOK_SECONDS
        for key, found in list(self._known.sealed.items()):
            self._note_damage(key, await asyncio.to_thread(self._store.damage, key, found))

    def _note_damage(self, key: CacheKey, missing: list[str]) -> None:
        self._metrics.verifications.labels(kind="look", result="damaged" if missing else "ok").inc()
        if missing and key in self._known.sealed and key not in self._known.damaged:
            uri = self._known.sealed[key].ref.uri
            _log.error("%s is damaged: %s", uri, ", ".join(missing[:5]), extra={"key": key})
            self._known.damaged[key] = missing
            self.wake()

    # -- acting -------------------------------------------------------------------------------

    async def _apply(self, action: Action, wants: Mapping[CacheKey, Want]) -> bool:
        """Carry one action out; False if the facts have changed so that it could not be."""
        match action:
            case Resolve(key):
                tally = Tally(wants[key], stage=Stage.RESOLVING)
                self._run_job(tally, self._fetcher.resolve(tally.want))
            case Fetch(key):
                ingest = self._known.ingests[key]
                stage = Stage.VERIFYING if ingest.done else Stage.FETCHING
                tally = Tally(wants[key], stage=stage, total=ingest.total)
                self._run_job(tally, self._fetcher.fetch(tally))
            case Cancel(key):
                if (running := self._running.get(key)) is not None:  # else it has just ended
                    running.task.cancel()
                    await asyncio.wait([running.task])
                    await self._settle_jobs()
            case Withdraw(key):
                await self._withdraw(key)
            case Evict(key, size):
                return await self._evict(key, size)
        return True

    def _run_job(self, tally: Tally, work: Coroutine[Any, Any, Manifest | None]) -> None:
        key = tally.want.key
        self._known.started.setdefault(key, self._clock())
        task = asyncio.create_task(work, name=f"{tally.job.stage} {tally.want.ref.uri}")
        task.add_done_callback(lambda _: self.wake())
        self._running[key] = _Running(task, tally)
        self._pulls.begun(tally)

    async def _withdraw(self, key: CacheKey) -> None:
        """Off offer first; then it is a want like any other, with most of its bytes there."""
        found = self._known.sealed[key]
        try:
            await asyncio.to_thread(self._store.reopen, key)
        except AgentError as error:
            _log.error("%s is damaged and cannot be withdrawn: %s", found.ref.uri, error.message)
            return
        self._known.withdraw(key)
        await self._index.record_gone(key)
        self._known.ingests = await asyncio.to_thread(self._store.ingests)
        self.wake()

    async def _evict(self, key: CacheKey, size: int) -> bool:
        """Design D3: off offer, look once more who uses it, then away. False: somebody came."""
        await asyncio.to_thread(self._store.begin_retire, key)
        used = await self._in_use()
        if used is None or key in used:
            await asyncio.to_thread(self._store.cancel_retire, key)
            self.wake()
            return False
        await asyncio.to_thread(self._store.finish_retire, key)
        self._known.sealed.pop(key)
        await self._index.record_gone(key)
        self._metrics.evictions.inc()
        self._metrics.evicted_bytes.inc(size)
        self._reclaiming += size
        self._trash.set()
        return True

    async def _sweep(self) -> None:
        """The one worker that unlinks; its bytes count as reclaimed until it is done."""
        while True:
            await self._trash.wait()
            self._trash.clear()
            promised = self._reclaiming
            try:
                await asyncio.to_thread(self._store.sweep)
            except AgentError as error:
                _log.warning("%s", error.message)
            self._reclaiming -= promised
            self.wake()

    # -- results ------------------------------------------------------------------------------

    async def _settle_jobs(self) -> None:
        """Learn from every job that ended."""
        ended = [key for key, running in self._running.items() if running.task.done()]
        if ended:
            self._known.ingests = await asyncio.to_thread(self._store.ingests)
        for key in ended:
            running = self._running.pop(key)
            if running.task.cancelled():
                await self._note_a_late_seal(key)
                continue
            error = running.task.exception()
            if error is None:
                await self._succeeded(key, running.task.result())
            elif isinstance(error, AgentError):
                await self._failed(running.tally.want, error)
            else:
                _log.error("a job for %s failed", running.tally.want.ref.uri, exc_info=error)
                what = f"{type(error).__name__}: {str(error)[:200]}"
                await self._failed(running.tally.want, AgentError(Reason.INTERNAL, what))

    async def _note_a_late_seal(self, key: CacheKey) -> None:
        """A job that was cancelled while it sealed has sealed all the same."""
        sealed = await asyncio.to_thread(self._store.manifest, key)
        if sealed is not None and key not in self._known.sealed:
            await self._succeeded(key, sealed)

    async def _succeeded(self, key: CacheKey, sealed: Manifest | None) -> None:
        self._list_again.discard(key)
        if sealed is None:  # a listing: the failures in a row end with the seal
            return
        now = self._clock()
        self._known.seal(key, sealed, now)
        self._trash.set()  # what is left of the ingest
        await self._index.record_seal(sealed.entry(last_used=now))

    async def _failed(self, want: Want, error: AgentError) -> None:
        key = want.key
        attempt = next_attempt(
            key, self._known.attempts.get(key), error, now=self._clock(), dice=self._dice
        )
        self._known.attempts[key] = attempt
        if error.reason in _LIST_AGAIN:
            self._list_again.add(key)
        self._metrics.download_failed(scheme(want), error.reason)
        self._publish()  # now: a pull that comes before the end of this turn forgives it
        await self._index.record_attempt(attempt)

    def _publish(self) -> None:
        self._publisher.publish(self.facts(), self._known.desired)
