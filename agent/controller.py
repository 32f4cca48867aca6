"""The controller: the admission hook in every replica, claims and certificates by one of them.

It holds nothing that a restart loses. The hook answers from watched objects and asks nobody while a
pod waits; where no controller answers, pods start as they would have without it.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from math import inf
from typing import Any

from prometheus_client import Counter

from agent import USER_AGENT, __version__
from agent.certificates import expires_at
from agent.config import ControllerSettings, Mode, listen_address
from agent.errors import AgentError
from agent.hook import review
from agent.hook.review import Answer, Outcome, Request
from agent.hook.validation import NOBODY
from agent.keeper import KEPT, Keeper
from agent.kube.client import Api
from agent.kube.events import Recorder, Subject
from agent.kube.lease import Lease
from agent.metrics import HookMetrics
from agent.rival import LOOK_SECONDS as RIVAL_SECONDS
from agent.rival import Rival
from agent.server import MOST_CONNECTIONS, health_app, hook_app, serve_tcp
from agent.signing import Signing
from agent.sources import scheme_of
from agent.tasks import first_of, until_told
from agent.tls import CertificateDirectory, ServerTLS
from agent.users import users_of
from agent.watched import Part, Watched

_log = logging.getLogger(__name__)

NAME = "localmodel-controller"
"""Of its Deployment, and of its Lease."""

SERVICE = "localmodel-hook"
LOOK_SECONDS = 60.0
"""How often the leader looks at what no watch tells: who still mounts a claim that is to go, and
whom the webhook configurations trust."""

_TURN_SECONDS = 5.0

_LATE_SECONDS = 1.0
"""What was written just before, a node group with its cache, has come by watch after this."""


async def run_controller(
    settings: ControllerSettings, *, look_seconds: float = LOOK_SECONDS
) -> None:
    """Run until SIGTERM or SIGINT."""
    await until_told(_serve(settings, look_seconds), said="")


async def _serve(settings: ControllerSettings, look_seconds: float) -> None:
    metrics = HookMetrics()
    api = Api(os.environ, user_agent=USER_AGENT)
    await api.open()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(api.close)
        controller = Controller(api, settings, metrics, look_seconds=look_seconds)
        host, port = listen_address(settings.health_listen)
        health = health_app(controller, metrics)
        bound = await stack.enter_async_context(serve_tcp(health, host, port))
        _log.info("controller %s, metrics on %s:%d", __version__, host, bound)
        stack.push_async_callback(controller.leave)
        tasks = [asyncio.create_task(work) for work in controller.work()]
        try:
            await first_of(tasks, controller.able.wait())
            host, port = listen_address(settings.listen)
            hook = hook_app(controller.mutate, controller.validate, metrics)
            bound = await stack.enter_async_context(
                serve_tcp(hook, host, port, tls=controller.tls.context, most=MOST_CONNECTIONS)
            )
            _log.info("the hook answers on %s:%d", host, bound)
            controller.serving = True
            try:
                await first_of(tasks, asyncio.Event().wait())
            except asyncio.CancelledError:
                controller.serving = False
                await asyncio.sleep(settings.drain_seconds)
                raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


class Controller:
    """One replica."""

    def __init__(
        self,
        api: Api,
        settings: ControllerSettings,
        metrics: HookMetrics,
        *,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._api = api
        self._settings = settings
        self._metrics = metrics
        self.able = asyncio.Event()
        """Set when everything was listed once, and there is a certificate to show."""
        self.serving = False
        self.turned_at = -inf
        self._led = False
        for pods in review.OF_PODS:  # a rate over a series that appears late is blind
            metrics.pods.labels(pods)
        for caches in review.OF_CACHES:
            metrics.validations.labels(caches)
        namespace = settings.pod_namespace
        self.tls = ServerTLS()
        self._recorder = Recorder(api, node=socket.gethostname())
        self._watched = Watched(
            api,
            namespace=namespace,
            kserve_namespace=settings.kserve_namespace,
            entrypoints=settings.entrypoints,
            changed=self._heard,
        )
        self._lease = Lease(
            api,
            namespace,
            NAME,
            holder=f"{namespace}/{settings.pod_name or socket.gethostname()}",
            gone=lambda holder: False,
            changed=self._changed,
            what="the controllers, and keeps their claims and certificates",
        )
        self._rival = self._find_rival(min(RIVAL_SECONDS, look_seconds))
        self._keeper = Keeper(
            api,
            self._watched,
            self._recorder,
            metrics,
            leads=self.leads,
            look_seconds=look_seconds,
        )
        self._signing = Signing(
            api,
            self.tls,
            metrics,
            namespace=namespace,
            names=settings.names or _names(namespace),
            leads=self.leads,
            tell=self._tell,
            changed=self._changed,
            look_seconds=look_seconds,
        )

    def _find_rival(self, look_seconds: float) -> Rival | None:
        """None where KServe's controller is no rival: it keeps the caches, and we the claims."""
        if self._settings.mode is Mode.KSERVE:
            return None
        return Rival(
            self._api,
            namespace=self._settings.kserve_namespace,
            tell=self._tell,
            changed=self._changed,
            look_seconds=look_seconds,
        )

    def work(self) -> list[Coroutine[Any, Any, None]]:
        """Everything that goes on, each until cancelled. Raises InvalidSpec for a `tls_dir` that
        cannot be used."""
        watches, directory = [*self._watched.watches], None
        if self._settings.tls_dir is not None:  # first: it may be no good
            directory = CertificateDirectory(self._settings.tls_dir, self.tls)
        others = [self._lease.run(), self._recorder.run(), self._keeper.run(), self._turn()]
        if self._rival is not None:
            others.append(self._rival.run())
        if directory is None:
            watches.append(self._signing.watch)
            others.append(self._signing.run())
        else:
            others.append(self._follow(directory))
        return [*(watch.run() for watch in watches), *others]

    async def _follow(self, directory: CertificateDirectory) -> None:
        while True:
            self._metrics.certificate_expiry.set(expires_at(self.tls.certificate))
            self._changed()
            await asyncio.sleep(_TURN_SECONDS)
            await asyncio.to_thread(directory.look)

    async def leave(self) -> None:
        """Let another replica lead."""
        await self._lease.release()

    def leads(self) -> bool:
        """Whether this replica is the one that writes. Nothing is decided before all was listed:
        absence is no command."""
        if self._rival is not None and self._rival.obstacle() is not None:
            return False
        answered = self._lease.answered.is_set()
        return answered and self._lease.obstacle() is None and self._watched.listed

    def _heard(self, part: Part) -> None:
        if part in KEPT:
            self._keeper.wake()
        self._changed()

    def _changed(self) -> None:
        if (leads := self.leads()) != self._led:
            self._led = leads
            self._keeper.wake()
            self._signing.wake()
        if not self.able.is_set() and self._watched.listed and self.tls.certificate:
            self.able.set()

    async def _turn(self) -> None:
        """What is to be looked at now and then, also while nobody asks."""
        while True:
            world = self._watched.world
            self._metrics.leader.set(self.leads())
            bound = len(world.claims)
            self._metrics.claims.labels(state="bound").set(bound)
            unbound = len(self._watched.claims.objects) - bound
            self._metrics.claims.labels(state="unbound").set(unbound)
            self.turned_at = time.monotonic()
            await asyncio.sleep(_TURN_SECONDS)

    # -- answering ------------------------------------------------------------------------------

    async def mutate(self, raw: bytes) -> Answer:
        """The answer to an AdmissionReview of a pod. Raises ValueError for what is none."""
        request = review.read(raw)
        # On a thread: somebody may send the pod that takes a second, on a cluster of 5000 nodes.
        found = await asyncio.to_thread(review.mutated, request, self._watched.world)
        return self._said(request, found, self._metrics.pods)

    async def validate(self, raw: bytes) -> Answer:
        """The answer to an AdmissionReview of a cache. Raises ValueError for what is none."""
        request, users = review.read(raw), NOBODY
        if (deletion := review.deletion(request)) is not None:
            try:
                users = await users_of(self._api, deletion)
            except (AgentError, LookupError, TypeError, AttributeError) as error:
                found = review.undecided(request, f"nobody can tell who uses it: {error}")
                return self._said(request, found, self._metrics.validations)
        found = review.validated(request, self._watched.world, check=scheme_of, users=users)
        if found.outcome is Outcome.REFUSED and request.operation != "DELETE":
            await asyncio.sleep(_LATE_SECONDS)
            found = review.validated(request, self._watched.world, check=scheme_of, users=users)
        return self._said(request, found, self._metrics.validations)

    def _said(self, request: Request, found: Answer, counter: Counter) -> Answer:
        counter.labels(found.outcome).inc()
        if found.outcome == Outcome.ERROR:
            _log.error("%s: %s", request.about, found.detail)
        elif found.detail:
            _log.info("%s: %s: %s", request.about, found.outcome, found.detail)
        return found

    def not_ready(self) -> str | None:
        """Why this replica is not to be asked, for its probe; None when it is."""
        if self._rival is not None and self._rival.there:
            return str(self._rival.obstacle())
        if self.serving:
            return None
        if self.able.is_set():
            return "it is about to begin, or to end"
        waits = [] if self._watched.listed else ["waits for the API server"]
        waits += [] if self.tls.certificate else ["waits for a certificate"]
        return "; ".join([*waits, *self._watched.failures])

    def _tell(self, error: AgentError) -> None:
        _log.warning("%s", error.message)
        subject = Subject("Deployment", self._settings.pod_namespace, NAME, "", api="apps/v1")
        self._recorder.say(subject, "Warning", error.reason.value, error.message)


def _names(namespace: str) -> tuple[str, ...]:
    """What the API server calls the hook by."""
    base = f"{SERVICE}.{namespace}"
    return f"{base}.svc", base, SERVICE
