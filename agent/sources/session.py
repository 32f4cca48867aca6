"""The HTTP session of the hub's client, with the bounds that the client itself does not set.

Left alone, `huggingface_hub` lists a tree without any timeout, asks for each page six times with
sleeps as long as the server likes (`Retry-After: 3600` parks a thread for five hours), and sends
its token to wherever the next page is said to be. All of that goes through one session per process,
which it lets its user provide. This one fails at once instead, with a reason: when to try again is
the reconciler's to say (design D4, D10).
"""

import functools
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined] # lazily

from agent.errors import AgentError, Reason


@dataclass(frozen=True, slots=True)
class _Bounds:
    endpoint: str
    origin: tuple[str, str, int | None]
    authorities: str
    answer_seconds: float
    deadline: float  # of time.monotonic

    def left(self) -> float:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise AgentError(Reason.STALLED, f"{self.endpoint} did not finish its listing in time")
        return seconds


# The way of a parameter through a library that has none for it: one listing, one thread.
_BOUNDS: ContextVar[_Bounds | None] = ContextVar("_BOUNDS", default=None)


@contextmanager
def bounded(
    endpoint: str, *, authorities: str = "", answer_seconds: float, seconds: float
) -> Iterator[None]:
    """Every request of the hub's client in this context: no wait for a byte is longer than
    `answer_seconds`, all of them together take at most `seconds`, none is repeated, the token goes
    to this endpoint only, and TLS trusts the `authorities` (the path of a file; "": the machine's).
    """
    _install()
    deadline = time.monotonic() + seconds
    origin = _origin(httpx2.URL(endpoint))
    bounds = _Bounds(endpoint, origin, authorities, answer_seconds, deadline)
    token = _BOUNDS.set(bounds)
    try:
        yield
    finally:
        _BOUNDS.reset(token)


@functools.cache
def _install() -> None:
    set_client_factory(lambda: _Session(follow_redirects=True, timeout=30.0))


@functools.lru_cache(maxsize=16)
def _trusting(authorities: str) -> httpx2.Client:
    """One for each file of authorities, which is named by its content."""
    context = ssl.create_default_context(cafile=authorities)
    return httpx2.Client(follow_redirects=True, timeout=30.0, verify=context)


class _Session(httpx2.Client):
    """Raises AgentError where the client would retry, and HfHubHTTPError for a refusal."""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        bounds = _BOUNDS.get()
        if bounds is None:  # not a listing: the client refreshes a token
            return super().send(request, **options)
        timeout = httpx2.Timeout(min(bounds.answer_seconds, bounds.left()))
        request.extensions = {**request.extensions, "timeout": timeout.as_dict()}
        if _origin(request.url) != bounds.origin:
            # A mirror that passes the hub's own pages on names the hub in them.
            request.headers.pop("Authorization", None)
        try:
            send = _trusting(bounds.authorities).send if bounds.authorities else super().send
            response = send(request, **{**options, "stream": True})
            response.stream = _Watched(response.stream, bounds)
            response.read()
        except httpx2.TimeoutException as error:
            raise AgentError(Reason.STALLED, f"{bounds.endpoint} did not answer in time") from error
        except httpx2.TransportError as error:
            raise AgentError(
                Reason.NETWORK, f"cannot reach {bounds.endpoint}: {str(error)[:200]}"
            ) from error
        hf_raise_for_status(response)
        return response


class _Watched(httpx2.SyncByteStream):
    """A body that may come slowly, but not for ever: a timeout alone never fires on a trickle."""

    def __init__(self, stream: Any, bounds: _Bounds) -> None:
        self._stream = stream
        self._bounds = bounds

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._bounds.left()
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
