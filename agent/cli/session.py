"""The verbs' way to a volume: through the running agent, or to the disk where there is none."""

import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any, Protocol

from agent import layout
from agent.catalog import Catalog
from agent.config import Settings
from agent.errors import AgentError, Reason
from agent.events import Event, error_event, model_event, select, verified_event
from agent.model import CacheKey, Ingest
from agent.status import Facts

if TYPE_CHECKING:
    from agent.app import Cache

_ALIVE_SECONDS = 10.0
"""An agent that is only busy answers in milliseconds; one that is stopped never does."""


class Reader(Protocol):
    """What a verb that only looks needs. The events are those of `Service`."""

    def models(self) -> AsyncGenerator[Event, None]: ...
    def verify(self, request: dict[str, Any]) -> AsyncGenerator[Event, None]: ...


class Session(Reader, Protocol):
    """What a verb that changes something needs. `remote`: a running agent does it."""

    remote: bool

    def pull(self, request: dict[str, Any]) -> AsyncGenerator[Event, None]: ...
    def curate(self, verb: str, request: dict[str, Any]) -> AsyncGenerator[Event, None]: ...


@contextlib.asynccontextmanager
async def reading(settings: Settings) -> AsyncIterator[Reader]:
    """The agent if one runs, else the disk.

    Reading a disk needs neither the lock nor a right to write: the manifests are the truth.
    """
    async with _agent(settings) as agent:
        yield agent or _Disk(settings)


@contextlib.asynccontextmanager
async def changing(settings: Settings) -> AsyncIterator[Session]:
    """The agent if one runs, else this process is the agent for a moment, under the same lock."""
    async with contextlib.AsyncExitStack() as stack:
        agent = await stack.enter_async_context(_agent(settings))
        if agent is not None:
            yield agent
            return
        from agent.app import open_cache, turning  # slow to import, and often not needed
        from agent.wishes import NOTHING

        cache = await stack.enter_async_context(open_cache(settings))
        await stack.enter_async_context(turning(cache, NOTHING))
        yield _Local(cache)


@contextlib.asynccontextmanager
async def _agent(settings: Settings) -> AsyncIterator["_Remote | None"]:
    state = settings.state_directory
    # access, not exists: in a private directory of another user there is no socket for us.
    if not os.access(state / layout.SOCKET, os.F_OK):
        yield None
        return
    import aiohttp

    from agent.server import socket_address

    name, directory = socket_address(state)
    try:
        connector = aiohttp.UnixConnector(name)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
            remote = _Remote(http)
            yield remote if await remote.alive() else None
    finally:
        if directory is not None:
            os.close(directory)


class _Local:
    """The verbs of this very process."""

    remote = False

    def __init__(self, cache: "Cache") -> None:
        self._curator = cache.curator
        self.models = cache.service.models
        self.pull = cache.service.pull
        self.verify = cache.service.verify

    def curate(self, verb: str, request: dict[str, Any]) -> AsyncGenerator[Event, None]:
        return self._curator.verbs[verb](request)


class _Remote:
    """The verbs of a running agent."""

    remote = True

    def __init__(self, http: Any) -> None:
        self._http = http

    async def alive(self) -> bool:
        """Whether somebody listens. A socket that nobody listens on was left by a kill."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=_ALIVE_SECONDS)
        try:
            async with self._http.get("http://agent/v1", timeout=timeout):
                return True
        except TimeoutError as error:
            raise AgentError(
                Reason.LOCKED, f"the agent does not answer within {_ALIVE_SECONDS:g} s"
            ) from error
        except aiohttp.ClientError:
            return False

    def models(self) -> AsyncGenerator[Event, None]:
        return self._events("GET", "models", None)

    def pull(self, request: dict[str, Any]) -> AsyncGenerator[Event, None]:
        return self._events("POST", "pull", request)

    def verify(self, request: dict[str, Any]) -> AsyncGenerator[Event, None]:
        return self._events("POST", "verify", request)

    def curate(self, verb: str, request: dict[str, Any]) -> AsyncGenerator[Event, None]:
        return self._events("POST", verb, request)

    async def _events(
        self, method: str, verb: str, body: dict[str, Any] | None
    ) -> AsyncGenerator[Event, None]:
        import aiohttp

        try:
            async with self._http.request(method, f"http://agent/v1/{verb}", json=body) as response:
                response.raise_for_status()
                rest = b""
                # Not by `readline`, which has a limit: a line may name ten thousand bad files.
                async for data in response.content.iter_any():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        yield json.loads(line)
        except aiohttp.ClientError as error:
            yield error_event(
                AgentError(Reason.NETWORK, f"the agent went away: {type(error).__name__}")
            )


class _Disk:
    """Reading without an agent: what the manifests and the pinned listings say."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._catalog = Catalog(settings.root)

    async def models(self) -> AsyncGenerator[Event, None]:
        facts = {}
        for key, ingest in self._ingests().items():
            facts[key] = Facts(key=key, ref=ingest.ref, wanted=False, ingest=ingest)
        for key, found, used in self._catalog.manifests():
            damaged = bool(self._catalog.damage(key, found))
            entry = found.entry(last_used=used)
            facts[key] = Facts(key=key, ref=found.ref, wanted=False, entry=entry, damaged=damaged)
        for key in sorted(facts):
            event = model_event(facts[key], path=str(self._catalog.model(key)))
            if event is not None:
                yield event

    def _ingests(self) -> dict[CacheKey, Ingest]:
        """Partial files are the agent's own: to another user there are none."""
        try:
            return self._catalog.ingests()
        except AgentError as error:
            if error.reason is not Reason.PERMISSION_DENIED:
                raise
            return {}

    async def verify(self, request: dict[str, Any]) -> AsyncGenerator[Event, None]:
        from agent.transfer import Engine
        from agent.verify import damaged

        sealed = {key: found for key, found, _ in self._catalog.manifests()}
        engine = Engine(connections=self._settings.connections)
        try:
            keys = select({k: found.ref for k, found in sealed.items()}, request.get("models"))
        except AgentError as error:
            yield error_event(error)
            return
        for key in keys:
            bad = await damaged(engine, self._catalog.model(key), sealed[key])
            yield verified_event(sealed[key], bad)
