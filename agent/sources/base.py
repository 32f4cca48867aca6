"""What a source is, and what all of them share: patterns, and the order of a listing."""

import asyncio
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar, cast

from agent.errors import AgentError, Reason
from agent.layout import check_paths
from agent.model import Listing, Locator, ModelRef, RemoteFile

_T = TypeVar("_T")


class Source(Protocol):
    """The seam to one kind of origin. Contract: tests/contracts/source_contract.py."""

    def check(self, ref: ModelRef) -> None:
        """Raise InvalidSpec if the URI cannot be one of this scheme. Looks at nothing outside."""
        ...

    async def list(self, ref: ModelRef) -> Listing:
        """Pin the revision of today, with every selected file. Raises AgentError."""
        ...

    async def locate(self, listing: Listing, file: RemoteFile) -> Locator:
        """Where one file of a pinned listing can be had now; fresh credentials, fresh signature."""
        ...


def pin(ref: ModelRef, revision: str, files: Iterable[RemoteFile]) -> Listing:
    """The listing of what the patterns leave, sorted. Raises EmptyListing or UnsafePath.

    Only what is selected must be safe: a hostile or odd name can be excluded.
    """
    found = sorted(files, key=lambda file: file.path.encode(errors="surrogatepass"))
    left = tuple(file for file in found if selected(file.path, ref))
    if not left:
        patterns = f"include {list(ref.include)}, exclude {list(ref.exclude)}"
        why = f"no file is left by {patterns}" if ref.include or ref.exclude else "it has no files"
        raise AgentError(Reason.EMPTY_LISTING, f"{ref.uri} at {revision}: {why}")
    check_paths(file.path for file in left)
    return Listing(ref=ref, revision=revision, files=left)


def selected(path: str, ref: ModelRef) -> bool:
    """As the hub's client does: include first, then exclude; `*` crosses `/`; `dir/` is `dir/*`;
    a backslash is a slash.
    """

    def matches(patterns: tuple[str, ...]) -> bool:
        slashed = (pattern.replace("\\", "/") for pattern in patterns)
        return any(
            fnmatchcase(
                path.replace("\\", "/"), f"{pattern}*" if pattern.endswith("/") else pattern
            )
            for pattern in slashed
        )

    return (not ref.include or matches(ref.include)) and not matches(ref.exclude)


async def in_thread(work: Callable[[], _T]) -> _T:
    """Run in a daemon thread, which a cancelled await leaves behind: it only looks.

    Not an executor: its threads are joined at interpreter exit, so a hub that does not answer, or a
    mount that hangs, would hold up the seconds that a pod has to stop.
    """
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

    threading.Thread(target=run, name="source", daemon=True).start()
    return await done
