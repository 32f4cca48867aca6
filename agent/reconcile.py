"""The loop: observe everything, plan, apply, publish. Level-triggered: a stimulus only sets a flag.

There is no handler for case X. A finished job, a changed wish, a timer or a damaged file all end in
the same turn, which looks at the facts and asks `plan` what to do. Only this module, and `failures`
and `looks` for it, change what is `Known`; jobs return values.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf

from agent import layout
from agent.adoption import Adoption
from agent.backoff import Dice
from agent.errors import AgentError, Reason
from agent.failures import Failures
from agent.fetch import Fetcher, scheme
from agent.history import History
from agent.index import Index
from agent.jobs import Jobs, Work
from agent.known import Known, agree
from agent.looks import Looks
from agent.manifest import Manifest
from agent.metrics import Metrics
from agent.model import (
    Abandon,
    Action,
    Actual,
    Attempt,
    Blocked,
    CacheKey,
    Cancel,
    Evict,
    Exchange,
    Fetch,
    Ingest,
    ModelRef,
    Plan,
    Resolve,
    Space,
    Stage,
    Volume,
    Want,
    Why,
    Withdraw,
)
from agent.outcasts import Outcasts
from agent.pins import Pins
from agent.plan import plan
from agent.proofs import Proofs
from agent.publish import Publisher
from agent.pulls import Pull, Pulls
from agent.removal import InUse, Removal, unknown_use
from agent.scrub import Scrub
from agent.status import Facts
from agent.store import Store
from agent.tally import Tally
from agent.threads import changing, looking
from agent.wishes import Desired

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 30.0
"""How often names and sizes of every sealed model are looked at, at least: what was deleted or
truncated by hand is off offer within a minute."""

_SOONEST_LOOK_SECONDS = 5.0

_PROGRESS_SECONDS = 5.0
_SPARED_SECONDS = 10.0
_TOUCH_SECONDS = 300.0


@dataclass(slots=True, kw_only=True)
class Policy:
    """The numbers of `Volume` that are settings."""

    high: float
    low: float
    max_fetches: int
    limit: int | None = None
    min_age_seconds: float = 600.0
    retain_seconds: float = 7 * 86400.0
    """How long a model is kept that left the desired state, where its cache does not say."""
    look_seconds: float = _LOOK_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All that a plan is made from, beside what is wanted. `now` is Unix seconds."""

    actual: Actual
    volume: Volume
    now: float


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
        scrub: Scrub | None = None,
        in_use: InUse = unknown_use,
        in_use_now: InUse | None = None,
        clock: Callable[[], float] = time.time,
        dice: Dice = random.random,
    ) -> None:
        self._store = store
        self._index = index
        self._fetcher = fetcher
        self._publisher = publisher
        self._metrics = metrics
        self._space = space
        self.policy = policy
        self._in_use = in_use
        self._clock = clock
        self._flag = asyncio.Event()
        self._known = Known()
        self._pulls = Pulls()
        self._jobs = Jobs(ended=self.wake)
        self._removal = Removal(store, in_use_now or in_use, swept=self.wake)
        self._adoption = Adoption(store, fetcher, self._removal)
        self._scrub = scrub
        self._history = History(index, metrics, clock)
        self._pins = Pins(store.root)
        self._proofs = Proofs(index, fetcher.prove, changed=self.wake, clock=clock, dice=dice)
        self._outcasts = Outcasts(asked=self.wake)
        self._failures = Failures(self._known, index, clock=clock, dice=dice)
        self._looks = Looks(
            self._known,
            store=store,
            adoption=self._adoption,
            metrics=metrics,
            changed=self.wake,
            clock=clock,
        )
        fetcher.suspected = self._looks.suspect
        fetcher.listed = lambda key: self.wake()  # what is in its place can be compared now
        self._touched: dict[CacheKey, float] = {}
        self._hears = False
        self._spared: dict[CacheKey, float] = {}
        self.turned_at = time.monotonic()  # not `clock`: that one may be set, also by days
        self.trouble: AgentError | None = None
        """Why the last turn failed, if it did."""
        self.failed_turns = 0
        self.tried = asyncio.Event()
        """Set after the first turn, however it ended."""
        self.ready = asyncio.Event()
        """Set after the first turn: what is on offer is known."""

    # -- stimuli ------------------------------------------------------------------------------

    def wake(self) -> None:
        self._flag.set()

    def desire(self, desired: Desired) -> None:
        """What should be here from now on. Failures of wishes that changed are forgotten."""
        before = self._known.desired
        if self._hears:  # the first wishes after a restart are no new ones
            for key, want in desired.wants.items():
                if before.wants.get(key) != want:
                    self._failures.forgive(key)
        self._hears = True
        for error in desired.errors:
            if error not in before.errors:
                _log.warning("%s is refused: %s", error.name, error.message)
        self._known.desired = desired
        self.wake()

    def look_every(self, seconds: float | None) -> None:
        """How often somebody wants sealed models to be looked at; None: as often as we do."""
        wanted = max(_SOONEST_LOOK_SECONDS, _LOOK_SECONDS if seconds is None else seconds)
        if self.policy.look_seconds != (rather := min(_LOOK_SECONDS, wanted)):
            self.policy.look_seconds = rather
            self.wake()

    def pull(self, want: Want) -> Pull:
        """Ask for one model now, whatever failed before. Raises InvalidSpec, Conflict, ..."""
        self._fetcher.check(want)
        self._known.replace_what_is_left(want)
        if (other := self.wants().get(want.key)) is not None:
            agree(want, other)
        pull = self._pulls.join(want, self.running(want.key))
        if want.key not in self._jobs:
            self._failures.forgive(want.key)
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

    async def evict(self, key: CacheKey) -> int:
        """Take a sealed model away; the bytes that this frees. Raises Kept with what keeps it."""
        return await self._outcasts.evict(key)

    async def pin(self, key: CacheKey, *, pinned: bool) -> None:
        """Keep a model, or what will be one, whatever room is needed; or do not any more."""
        act = self._pins.add if pinned else self._pins.remove
        await changing(partial(act, key))
        self.wake()

    def not_ready(self) -> str | None:
        if self.trouble is not None:
            return f"{self.trouble.reason}: {self.trouble.message}"
        return None if self.ready.is_set() else "looks at the cache"

    # -- asking -------------------------------------------------------------------------------

    def sealed(self) -> Mapping[CacheKey, Manifest]:
        return self._known.sealed

    def withdrawn(self) -> Mapping[CacheKey, tuple[Manifest, list[str]]]:
        """Models that were found damaged and are being mended, with what was wrong."""
        return self._known.withdrawn

    def present(self) -> frozenset[CacheKey]:
        """What a pod that mounts the whole cache may read: also what another agent left."""
        return frozenset({*self._known.sealed, *self._known.foreign})

    def running(self, key: CacheKey) -> Tally | None:
        return self._jobs.tally(key)

    def on_its_way(self, key: CacheKey) -> bool:
        """Whether somebody asked for it already, and the last try has not failed. Between the
        listing and the download, and in the queue, no job runs and yet it is coming."""
        want = self._known.desired.wants.get(key)
        asked = key in self._pulls.wants() or key in self._known.mending
        wanted = key in self._jobs or asked or (want is not None and not want.on_demand)
        return wanted and key not in self._known.attempts

    def retiring(self, key: CacheKey) -> bool:
        """Whether it is half way gone: nobody can say yet whether it will be on offer again."""
        return key in self._removal.retiring

    def failure(self, key: CacheKey) -> Attempt | None:
        return self._known.attempts.get(key)

    async def look(self, key: CacheKey) -> bool:
        """Whether a model is on offer and its files are all there, in their sizes."""
        known = self._known
        if key not in known.sealed or key in known.damaged or key in self._removal.retiring:
            return False
        return await self._looks.at(key)

    async def look_beside(self, key: CacheKey) -> bool:
        """Whether another agent left it, as far as sizes tell: what a pod has started with."""
        foreign = await looking(lambda: self._store.foreign(key))
        return foreign is not None and foreign.may_be_whole

    async def use(self, key: CacheKey, *, uses: int = 1) -> None:
        """Somebody used a sealed model until now; `uses` is 0 for one who is counted already."""
        now = self._clock()
        before = self._known.last_used.get(key, 0.0)
        self._known.last_used[key] = max(now, before)
        await self._index.record_use(key, now, uses=uses)
        if now - self._touched.get(key, 0.0) >= _TOUCH_SECONDS:
            self._touched[key] = now
            with suppress(AgentError):  # a mirror; the index has it
                await changing(lambda: self._store.touch(key, now))

    def facts(self) -> dict[CacheKey, Facts]:
        """Everything known of every key there is something to say of."""
        tallies = self._jobs.tallies()
        jobs = {key: (tally.want.ref, tally.job) for key, tally in tallies.items()}
        return self._known.facts(self.wants(), jobs)

    # -- the loop -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the disk into order and learn what is there. Before `run`."""
        known = self._known
        for key in await changing(self._store.recover):
            path = self._store.model(key)
            _log.warning("%s is not ours, or cannot be read: it stays until it is wanted", path)
        if strangers := await looking(self._store.strangers):
            _log.warning(
                "not named by a key, as models of KServe <= 0.17: remove them from %s when no pod"
                " reads them: %s",
                self._store.root / layout.MODELS,
                ", ".join(strangers[:10]),
            )
        self._removal.sweep_soon()
        await self._index.open()
        failed_before = await self._failures.open()
        for key, found, used in await looking(lambda: list(self._store.manifests())):
            known.sealed[key], known.last_used[key] = found, used
        for key, used in (await self._index.last_uses()).items():
            known.last_used[key] = max(used, known.last_used.get(key, 0.0))
        known.asked_for = await self._index.asked()
        await self._note_the_shared()
        known.refreshed = await self._index.refreshed()
        await self._history.open()
        await self._proofs.open()
        known.ingests = await looking(self._store.ingests)
        known.foreign = await self._adoption.look(known.ingests)
        known.mend_what_is_complete(failed_before)

    async def run(self) -> None:
        """Turn until cancelled; then stop the jobs, keeping what they brought."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._turns())
                group.create_task(self._progress())
                group.create_task(self._removal.run())
                if self._scrub is not None:
                    found = partial(self._looks.suspect, kind="scrub")
                    group.create_task(self._scrub.run(self.sealed, found))
        finally:
            await self._jobs.stop()
            await self._proofs.stop()
            stopped = AgentError(Reason.STOPPED, "the agent stops; bytes are kept")
            self._pulls.refuse_all(stopped)
            self._outcasts.refuse_all(stopped, for_good=True)

    async def _turns(self) -> None:
        while True:
            self._flag.clear()
            wake_at = self._clock() + self.policy.look_seconds
            try:
                decided = await self._turn()
                due = (*self._spared.values(), self._proofs.next_at)
                wake_at = min(wake_at, decided.wake_at or wake_at, *due)
                self._metrics.turns.labels(result="ok").inc()
                self.turned_at = time.monotonic()
                self.trouble, self.failed_turns = None, 0
                self._metrics.last_turn.set(self._clock())
                self.ready.set()
            except AgentError as error:
                # The disk is away, say. Nothing was decided; look again soon.
                _log.warning("cannot observe the cache: %s", error.message)
                self._metrics.turns.labels(result="failed").inc()
                self.trouble, self.failed_turns = error, self.failed_turns + 1
                self._outcasts.refuse_all(error)
            self.tried.set()
            with suppress(TimeoutError):
                # A clock that was set back during the turn must not make this a day.
                seconds = min(self.policy.look_seconds, max(0.05, wake_at - self._clock()))
                async with asyncio.timeout(seconds):
                    await self._flag.wait()

    async def _progress(self) -> None:
        """Keep the lines of waiting pods moving, also while nothing else happens."""
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            await changing(partial(self._publisher.progress, self.facts().values()))
            if self._jobs:
                self.wake()  # the turn publishes how far they are

    async def _turn(self) -> Plan:
        await looking(self._store.check)
        await self._settle_jobs()
        await self._failures.forget_the_forgiven()
        await self._note_the_wanted()
        known = self._known
        await self._proofs.turn(known.desired.guarded, {*known.sealed, *known.ingests})
        await self._looks.at_all(self.policy.look_seconds)
        # As they are now: by the time an action is carried out, somebody may have gone.
        wants = self.wants()
        await self._look_at_the_foreign(wants)
        await self._cancel_the_outdated(wants)
        seen = await self.observe(wants)
        decided = plan(wants, seen.actual, seen.volume, now=seen.now)
        self._note_the_blocked(decided)
        for action in decided.actions:
            if not await self._attempt(action, wants):
                break  # what follows may count on room that it did not make
        self._outcasts.answer(wants, seen.actual, seen.volume, seen.now)
        self._pulls.answer(self._known, self._jobs)
        await self._publish()
        return decided

    async def _cancel_the_outdated(self, wants: Mapping[CacheKey, Want]) -> None:
        """A job for other patterns than those that are wanted now would publish the wrong files."""
        for key in self._known.overtaken(wants):
            del self._known.staged[key]  # nobody wants it in the place of the other any more
            await self._give_up(key)
        for key in self._known.needless(wants):
            if key not in self._jobs:
                await self._give_up(key)
        for key, tally in self._jobs.tallies().items():
            # Nor must a newer revision be waited for while the one on offer is wrong.
            wrong = key in self._known.damaged and key in self._known.sealed
            if wrong or (key in wants and tally.want.ref != wants[key].ref):
                await self._cancel(key)

    async def _give_up(self, key: CacheKey) -> None:
        """What is left of one model and cannot be removed now must not stop all others."""
        try:
            await self._abandon(key, 0)
        except AgentError as error:
            _log.warning("what was begun of %s stays for now: %s", key, error.message)

    def wants(self) -> dict[CacheKey, Want]:
        """The desired state, beside it what somebody waits for, and what is being mended."""
        return {**self._known.mending, **self._pulls.wants(), **self._known.desired.wants}

    async def observe(self, wants: Mapping[CacheKey, Want]) -> Seen:
        """Everything that a plan needs to know."""
        known, used = self._known, await self._used()
        for key in (used or frozenset()) & known.sealed.keys():
            await self.use(key, uses=0)  # until now; who ends while no agent runs has used it too
        known.pinned = await looking(self._pins.all)

        def usable(key: CacheKey, ingest: Ingest) -> bool:
            """Whether its pinned listing answers what is asked for now; else it is listed again."""
            asked = wants.get(key)
            return not self._failures.is_to_be_listed(key) and (
                asked is None or asked.ref == ingest.ref
            )

        actual = Actual(
            entries=known.entries(),
            damaged=frozenset(known.damaged),
            ingests={k: i for k, i in known.ingests.items() if usable(k, i)},
            jobs=self._jobs.jobs(),
            attempts=self._failures.attempts(),
            in_use=used,
            left=known.left(self.policy.retain_seconds) if self._hears else {},
            kept=self._kept(),
            begun=frozenset(known.ingests),
            demanded=frozenset({*(used or ()), *self._pulls.wants(), *known.mending}),
            pinned=known.pinned,
            outcast=self._outcasts.keys,
            outdated=known.outdated(wants),
            staged=frozenset(known.staged),
            foreign=known.foreign,
            waiting=known.waiting,
        )
        return Seen(actual=actual, volume=await self._volume(), now=self._clock())

    def _note_the_blocked(self, decided: Plan) -> None:
        known, now = self._known, self._clock()
        known.blocked = decided.blocked
        known.waiting = {
            key: min(now, known.waiting.get(key, now))
            for key, block in decided.blocked.items()
            if block.why is Blocked.INSUFFICIENT_CAPACITY
        }

    async def _used(self) -> frozenset[CacheKey] | None:
        """What pods use, and what was spared a moment ago."""
        used = await self._in_use()
        now = self._clock()  # and no pause before the next line: who asks why is here, too
        # A clock that was set back must not spare anything for longer.
        self._spared = {k: t for k, t in self._spared.items() if 0 < t - now <= _SPARED_SECONDS}
        return None if used is None else used | self._spared.keys()

    async def _note_the_wanted(self) -> None:
        """Remember which keys the desired state has asked for, also over a restart: what leaves it
        while no agent runs has left it all the same."""
        if not self._hears:
            return
        for key, asked in self._known.note_the_asked(self._clock()).items():
            if asked is None:
                await self._index.forget_asked(key)
            else:
                await self._index.record_asked(key, asked)

    def _kept(self) -> frozenset[CacheKey]:
        """What nobody wants now, and nobody said may go: its object is away, or cannot be read."""
        known, desired = self._known, self._known.desired
        if not desired.complete:  # also what was asked for before an index was lost
            return frozenset({*known.sealed, *known.ingests})
        return desired.spoken_for | (known.asked_for.keys() if desired.owner is None else set())

    async def _volume(self) -> Volume:
        space = await looking(self._space)
        return Volume(
            capacity=space.capacity,
            free=space.free,
            reclaiming=self._removal.reclaiming,
            high=self.policy.high,
            low=self.policy.low,
            max_fetches=self.policy.max_fetches,
            min_age_seconds=self.policy.min_age_seconds,
            limit=self.policy.limit,
            group_limits=self._known.desired.group_limits,
        )

    async def _look_at_the_foreign(self, wants: Mapping[CacheKey, Want]) -> None:
        """What somebody else left in the places of wanted models. Not where a job seals just now:
        half way, its directory looks like somebody else's."""
        jobs = self._jobs.tallies().items()
        sealing = {key for key, tally in jobs if tally.total is not None and not tally.staged}
        self._known.foreign = await self._adoption.look(wants.keys() - self._known.sealed - sealing)

    async def _note_the_shared(self) -> None:
        models = list(self._known.sealed.items())
        self._known.shared = await looking(
            lambda: {key: self._store.shared(key, found) for key, found in models}
        )

    # -- acting -------------------------------------------------------------------------------

    async def _attempt(self, action: Action, wants: Mapping[CacheKey, Want]) -> bool:
        """Carry one action out; one that fails is its own model's failure and nobody else's."""
        try:
            return await self._apply(action, wants)
        except AgentError as error:
            found = self._known.sealed.get(action.key)
            want = wants.get(action.key) or (Want(ref=found.ref) if found else None)
            _log.error("%s %s failed: %s", type(action).__name__, action.key, error.message)
            if want is not None:
                await self._failed((want, error))
            return not isinstance(action, Evict)

    async def _apply(self, action: Action, wants: Mapping[CacheKey, Want]) -> bool:
        """Carry one action out; False if the facts have changed so that it could not be."""
        match action:
            case Resolve(key):
                tally = Tally(wants[key], stage=Stage.RESOLVING)
                await self._history.wanted(key)
                self._run_job(tally, self._fetcher.resolve(tally.want, tally))
            case Fetch(key):
                ingest = self._known.ingests.get(key)
                if ingest is None:  # somebody removed it during this turn
                    return False
                stage = Stage.VERIFYING if ingest.done else Stage.FETCHING
                staged = key in self._known.sealed or key in self._known.foreign
                tally = Tally(wants[key], stage=stage, total=ingest.total, staged=staged)
                self._run_job(tally, self._fetch(tally))
            case Cancel(key):
                await self._cancel(key)
            case Withdraw(key):
                await self._withdraw(key)
            case Evict():
                return await self._evict(action)
            case Exchange(key):
                await self._exchange(key)
            case Abandon(key, size):
                await self._abandon(key, size)
        return True

    async def _fetch(self, tally: Tally) -> Manifest | None:
        await self._removal.given_back()
        return await self._fetcher.fetch(tally)

    async def _abandon(self, key: CacheKey, size: int) -> None:
        await self._removal.abandon(key, size)
        self._known.ingests = await looking(self._store.ingests)
        self._known.mending.pop(key, None)

    async def _exchange(self, key: CacheKey) -> None:
        """What is proven takes the place of what nobody uses."""
        staged = self._known.staged[key]
        try:
            await self._fetcher.check_proven(staged)  # before anything goes: else neither is there
            done = await self._take_place(key, staged)
        except AgentError:
            self._known.staged.pop(key, None)
            raise
        if not done:
            self._spared[key] = self._clock() + _SPARED_SECONDS
            return
        # Whoever asks for the next revision at this moment must not be given the listing of this.
        self._known.ingests = await looking(self._store.ingests)
        _log.info("%s is now at %s", staged.ref.uri, staged.revision, extra={"key": key})
        await self._succeeded(key, staged)

    async def _take_place(self, key: CacheKey, staged: Manifest) -> bool:
        """An old revision goes as any model goes; then the new one is sealed in its place. Killed
        between the two, the new one is complete, and is proven and sealed at the start."""
        still = partial(self._may_go, key)
        if key in self._known.foreign:
            return await self._adoption.exchange(staged, still)
        entry = self._known.entry(key)
        if entry is not None:
            freed = entry.bytes - sum(size for _, size in entry.shared)
            if not await self._removal.retire(key, freed, still=still):
                return False
            del self._known.sealed[key]
        self._known.mending[key] = Want(ref=staged.ref)  # if the seal fails, it is tried again
        await self._fetcher.seal(staged)
        return True

    async def _cancel(self, key: CacheKey) -> None:
        await self._jobs.cancel(key)
        await self._settle_jobs()

    def _run_job(self, tally: Tally, work: Work) -> None:
        self._known.started.setdefault(tally.want.key, self._clock())
        self._jobs.begin(tally, work)
        self._pulls.begun(tally)

    async def _withdraw(self, key: CacheKey) -> None:
        """Off offer first; then it is a want like any other, with most of its bytes there."""
        found = self._known.sealed[key]
        await self._publish()  # it is not Ready any more, and why: what follows may be over soon
        await changing(lambda: self._store.reopen(key, found))
        gone_for_good = self._known.left(self.policy.retain_seconds).get(key, inf) <= self._clock()
        await self._history.damaged(key, found.ref.uri, self._known.damaged[key])
        self._known.withdraw(key)
        if gone_for_good:  # nobody wants it whole again: what is left of it is given up next
            del self._known.mending[key]
        await self._index.record_gone(key)
        self._known.ingests = await looking(self._store.ingests)
        self._removal.sweep_soon()  # what had been begun beside it
        self.wake()

    async def _may_go(self, key: CacheKey, *, why: Why | None = None) -> bool:
        """Whether nobody has pinned it, or come to want it, since the plan was made. `why` is None
        for a model whose place a newer revision is to take."""
        want = self.wants().get(key)
        if why is None:
            return want is not None
        return (want is None or want.on_demand) and key not in await looking(self._pins.all)

    async def _evict(self, action: Evict) -> bool:
        key, entry = action.key, self._known.entry(action.key)
        assert entry is not None  # it was planned a moment ago, and only this loop changes it
        still = partial(self._may_go, key, why=action.why)
        if not await self._removal.retire(key, action.bytes, still=still):
            # The watch has not heard of the pod yet, or the server cannot answer. Tried again at
            # once, that would be a loop of requests. The next candidates wait as well.
            self._spared[key] = self._clock() + _SPARED_SECONDS
            return False
        del self._known.sealed[key]
        await self._index.record_gone(key)
        await self._history.evicted(entry, action.why, action.bytes)
        _log.info("%s is evicted: %s", entry.ref.uri, action.why.value, extra={"key": key})
        self._outcasts.gone(key, action.bytes)
        return True

    # -- results ------------------------------------------------------------------------------

    async def _settle_jobs(self) -> None:
        """Learn from every job that ended."""
        ended = self._jobs.take()
        if ended:
            self._known.ingests = await looking(self._store.ingests)
            await self._note_the_shared()  # files of any sealed model may have been linked
        failed, wants = [], self.wants()
        for end in ended:
            key = end.want.key
            if end.cancelled:
                await self._note_a_late_seal(key)
            elif end.error is None:
                if end.listed:
                    self._known.listed[key] = end.want.refresh
                await self._succeeded(key, end.sealed, staged=end.staged)
            else:
                if end.bug is not None:
                    _log.error("a job for %s failed", end.want.ref.uri, exc_info=end.bug)
                # What failed for a wish that has changed since says nothing of the new one: a file
                # policy that refused, say, and for good.
                if wants.get(key, end.want) == end.want:
                    failed.append((end.want, end.error))
        if failed:
            await self._failed(*failed)

    async def _note_a_late_seal(self, key: CacheKey) -> None:
        """A job that was cancelled while it sealed has sealed all the same."""
        sealed = await looking(lambda: self._store.manifest(key))
        if sealed is not None and key not in self._known.sealed:
            await self._succeeded(key, sealed)

    async def _succeeded(
        self, key: CacheKey, sealed: Manifest | None, *, staged: bool = False
    ) -> None:
        self._failures.listed(key)
        if sealed is None:  # a listing: the failures in a row end with the seal
            await self._note_what_has_not_changed(key)
            return
        if staged:
            self._known.staged[key] = sealed
            self._known.attempts.pop(key, None)
            return
        now = self._clock()
        self._known.seal(key, sealed, now)
        self._known.shared[key] = await looking(partial(self._store.shared, key, sealed))
        self._removal.sweep_soon()  # what is left of the ingest
        await self._index.record_seal(sealed.entry(last_used=now))
        await self._history.sealed(sealed.entry(last_used=now))
        await self._note_refreshed(key)

    async def _note_what_has_not_changed(self, key: CacheKey) -> None:
        """Asked again what a sealed model is, the source said: the same."""
        found, listing = self._known.sealed.get(key), self._known.ingests.get(key)
        if found is None or listing is None:
            return
        if (listing.revision, listing.ref) == (found.revision, found.ref):
            await self._abandon(key, 0)
            await self._note_refreshed(key)

    async def _note_refreshed(self, key: CacheKey) -> None:
        """The listing that is sealed now was made because of this value; a newer one came later."""
        token = self._known.listed.pop(key, "")
        if token not in ("", self._known.refreshed.get(key)):
            self._known.refreshed[key] = token
            await self._index.record_refreshed(key, token)

    async def _failed(self, *failures: tuple[Want, AgentError]) -> None:
        for want, error in failures:
            self._metrics.download_failed(scheme(want), error.reason)
        await self._failures.note(*failures)
        await self._publish()

    async def _publish(self) -> None:
        facts, desired, doubts = self.facts(), self._known.desired, self._proofs.doubts()
        self._publisher.witness(facts)
        await changing(lambda: self._publisher.write(facts, desired, doubts))
