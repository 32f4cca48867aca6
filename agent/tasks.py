"""How tasks of ours wait: for each other's failure, for the signal to stop, for something to do."""

import asyncio
import logging
import signal
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

_log = logging.getLogger(__name__)


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
