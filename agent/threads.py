"""Work in threads that the event loop waits for, with the two ways to be cancelled.

Daemon threads, and not an executor: its threads are joined at interpreter exit, so a hub that does
not answer, or a mount that hangs, would hold up the ten seconds that a pod has to stop.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

_T = TypeVar("_T")


def begin(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """Start it; its result or its exception comes to the future, unless that was cancelled."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if done.done():  # cancelled
            return
        if error is None:
            done.set_result(cast(_T, result))
        else:
            done.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - handed to the awaiter, whatever it is
            failure = error
        with suppress(RuntimeError):  # the loop is gone: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="work", daemon=True).start()
    return done


async def looking(work: Callable[[], _T]) -> _T:
    """A cancelled await leaves it behind: it only looks, or may be cut off anywhere."""
    return await begin(work)


async def changing(work: Callable[[], _T]) -> _T:
    """A cancelled await still waits until it is done.

    What it changes on the disk must not go on beside the next job of the same key, or behind a lock
    that was given up.
    """
    done = begin(work)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        while not done.done():
            with suppress(asyncio.CancelledError):  # cancelled twice: the disk is not faster for it
                await asyncio.wait({done})
        done.exception()  # seen: it came too late to matter
        raise
