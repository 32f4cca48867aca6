"""Writes the status of one LocalModelNode: soon, seldom, and only what differs (design D15).

One write makes KServe's controller reconcile every cache of the node (91 models: 456 requests,
kserve-observed.md 11). So the first change goes out at once, those that follow share a write two
seconds later, and how far a download is goes out once a minute. Only that a model is not on offer
any more waits for nothing: pods are sent to it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from agent.errors import RULES, AgentError, Reason
from agent.kube import parse
from agent.kube.client import Api, ApiError, Json
from agent.kube.nodestatus import Field, lost, merge_patch, no_more_downloaded, urgent, without
from agent.kube.parse import NodeObject
from agent.tasks import flagged

_log = logging.getLogger(__name__)

_TOGETHER_SECONDS = 2.0
_PROGRESS_SECONDS = 60.0
_CONTEST_SECONDS = 120.0  # between two writes, at most, however often somebody undoes ours
_CONTEST_MEMORY_SECONDS = 600.0
_CONTESTS = 3
_DROPPED_SECONDS = 3600.0
"""How long is not offered what the server does not keep, or refuses: until then, its kind may have
been changed."""

_ESSENTIAL = frozenset({"modelStatus", "conditions"})
_INVALID = frozenset({400, 422})

Status = Mapping[str, Any]


class StatusWriter:
    """Makes the status on the API server what was offered last."""

    def __init__(
        self,
        api: Api,
        node: str,
        *,
        compose: Callable[[NodeObject], Status | None],
        contested: Callable[[], None],
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """`compose` gives the status of this object as it should be now; None: leave it alone.

        `contested` is called when somebody else keeps writing it too.
        """
        self._api = api
        self._path = f"/apis/{parse.GROUP}/{parse.VERSION}/localmodelnodes/{node}/status"
        self._compose = compose
        self._contested = contested
        self._ticks = ticks
        self._flag = asyncio.Event()
        self._base: NodeObject | None = None
        self._written_at = -float("inf")
        self._owned: frozenset[str] = frozenset()  # the fields that `compose` gave last
        self._wrote: Status | None = None
        self._words: Mapping[str, str] = {}
        self._taken_back: set[str] = set()
        self._contests = 0
        self._contested_at = -float("inf")
        self._dropped: dict[Field, float] = {}
        self._plain_until = -float("inf")

    def changed(self) -> None:
        """Something that the status says may have changed."""
        self._flag.set()

    def seen(self, node: NodeObject | None) -> None:
        """The object as the watch has it."""
        if node is None or self._base is None or node.uid != self._base.uid:
            self._base, self._wrote = node, None
            self._dropped, self._plain_until = {}, -float("inf")
        elif _later(node, self._base):
            if self._wrote is not None and self._wrote != _part(node, self._wrote):
                self._note_contest()
            self._base = node
        self.changed()

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            self._flag.clear()
            base, patch = self._base, self._patch()
            wait = self._due(patch) - self._ticks() if patch else None
            if wait is None or wait > 0:
                await flagged(self._flag, wait)
                continue
            try:
                await self._write(patch)
                failures = 0
            except ApiError as error:
                failures += 1
                # It is gone, and the watch tells when there is another one: or has told meanwhile.
                if error.status == 404 and self._base is base:
                    self._base = None
                if error.status in _INVALID:
                    self._be_plain()
                _log.log(
                    logging.WARNING if failures == 1 else logging.DEBUG,
                    "status is not written: %s",
                    error.message,
                )
                await asyncio.sleep(_delay(error, failures))

    async def flush(self) -> None:
        """Write what is still unsaid, once, whatever the time."""
        if patch := self._patch():
            await self._write(patch)

    def _patch(self) -> dict[str, Any]:
        if self._base is None:
            return {}
        status = self._compose(self._base)
        if status is None:
            return {}
        now = self._ticks()
        if now < self._plain_until:
            status = {name: value for name, value in status.items() if name in _ESSENTIAL}
        self._owned = frozenset(status)
        self._note_words(status)
        dropped = {field for field, until in self._dropped.items() if now < until}
        return without(merge_patch(self._base.status, status), dropped)

    def _note_words(self, status: Status) -> None:
        """What we take back ourselves; what somebody else says wrongly is a contest."""
        words = status.get("modelStatus", self._words)
        self._taken_back |= no_more_downloaded(self._words, words)
        self._words = words

    def _due(self, patch: Mapping[str, Any]) -> float:
        if self._takes_back(patch):
            return -float("inf")
        pause = _TOGETHER_SECONDS if self._urgent(patch) else _PROGRESS_SECONDS
        if self._contests > 1:
            pause = max(pause, min(_CONTEST_SECONDS, _TOGETHER_SECONDS * 2.0**self._contests))
        return self._written_at + pause

    def _takes_back(self, patch: Mapping[str, Any]) -> bool:
        assert self._base is not None  # there is a patch
        before, changes = self._base.status.get("modelStatus"), patch.get("modelStatus")
        if not isinstance(before, Mapping) or not isinstance(changes, Mapping):
            return False
        return not self._taken_back.isdisjoint(no_more_downloaded(before, changes))

    def _urgent(self, patch: Mapping[str, Any]) -> bool:
        return self._base is not None and urgent(patch, self._base.status)

    async def _write(self, patch: dict[str, Any]) -> None:
        self._written_at = self._ticks()
        # The watch may show what we write before the answer does: nobody else wrote that.
        self._wrote, ours = None, self._owned
        answer = _node(await self._api.patch(self._path, {"status": patch}))
        self._taken_back.clear()
        self._wrote = _part(answer, ours)
        self._note_lost(lost(patch, answer.status))
        if self._base is None or _later(answer, self._base):
            self._base = answer

    def _note_lost(self, fields: set[Field]) -> None:
        """KServe's own CRD drops what it does not know, and an older one of ours some of it. What
        KServe reads is offered all the same, but as to somebody who undoes it."""
        until = self._ticks() + _DROPPED_SECONDS
        if any(field[0] == "modelStatus" for field in fields):
            self._note_contest()
        self._dropped |= {field: until for field in fields if field[0] != "modelStatus"}

    def _be_plain(self) -> None:
        """One field that the server refuses must not silence the node."""
        if self._ticks() >= self._plain_until:
            _log.warning("for an hour, only %s are written", " and ".join(sorted(_ESSENTIAL)))
        self._plain_until = self._ticks() + _DROPPED_SECONDS

    def _note_contest(self) -> None:
        now = self._ticks()
        if now - self._contested_at > _CONTEST_MEMORY_SECONDS:
            self._contests = 0
        self._contested_at = now
        self._contests += 1
        self._wrote = None
        if self._contests == _CONTESTS:
            self._contested()


def _node(raw: Json) -> NodeObject:
    try:
        return parse.node(raw)
    except (AgentError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ApiError(0, f"the answer is no LocalModelNode: {error}") from error


def _part(node: NodeObject, names: Iterable[str]) -> Status:
    return {name: node.status.get(name) for name in names}


def _later(node: NodeObject, other: NodeObject) -> bool:
    """Whether an object is no older than another. A version that is no number decides nothing."""
    if node.version.isdecimal() and other.version.isdecimal():
        return int(node.version) >= int(other.version)
    return True


def _delay(error: ApiError, failures: int) -> float:
    rule = RULES[Reason.API_SERVER]
    backoff = min(rule.cap_seconds, rule.first_seconds * 2.0 ** min(failures, 16))
    return max(backoff, error.retry_after_seconds or 0.0)
