"""How tasks of ours wait: for each other's failure, for the signal to stop, for something to do."""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any

from agent.errors import AgentError, Reason
from agent.model import RemoteFile

_log = logging.getLogger(__name__)

# What one file's failure says about all others too: going on would only repeat it.
_HOPELESS = frozenset(
    {Reason.DISK_FULL, Reason.READ_ONLY, Reason.PERMISSION_DENIED, Reason.DISK_ERROR}
)


async def until_told(work: Coroutine[Any, Any, None], *, said: str) -> None:
    """Run it until SIGTERM or SIGINT, heard from the start; then cancel it and wait for its end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(work)
    try:
        await first_of([serving], stop.wait())
        _log.info("stopping%s", said)
    finally:
        serving.cancel()
        await asyncio.wait({serving})


async def first_of(tasks: Sequence[asyncio.Task[None]], event: Coroutine[Any, Any, object]) -> None:
    """Wait for an event, unless a task that should never end does: then raise what it raised."""
    waiting = asyncio.ensure_future(event)
    try:
        await asyncio.wait({*tasks, waiting}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        waiting.cancel()


async def flagged(flag: asyncio.Event, seconds: float | None) -> None:
    """Wait until it is set, or so long; None: for ever. It is not set any more then."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await flag.wait()
    flag.clear()


async def each(files: Iterable[RemoteFile], act: Callable[[RemoteFile], Awaitable[None]]) -> None:
    """Act on all files at once, and raise the first failure when all have ended.

    One file's failure does not stop the others, unless it is the disk's: bytes that come now need
    not come after the back-off.
    """
    failures: list[AgentError] = []

    async def one(file: RemoteFile) -> None:
        try:
            await act(file)
        except AgentError as error:
            failures.append(error)
            if error.reason in _HOPELESS:
                raise

    try:
        async with asyncio.TaskGroup() as group:
            # The largest first: the last connection busy should not be on a whole shard.
            for file in sorted(files, key=lambda file: -file.size):
                group.create_task(one(file))
    except* AgentError:
        pass  # in `failures`, like those that did not stop the group
    if failures:
        raise failures[0]
