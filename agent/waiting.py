"""Pods that wait for a model are told so, by Events: how far it is, or why it does not come.

A pod is told when it has waited for some seconds, and again when something else is to be said.
What is known of that is kept in memory: an agent that starts tells those who still wait once more.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agent.kube.podspec import Pod
from agent.model import CacheKey
from agent.reconcile import Reconciler
from agent.wishes import Desired
from agent.words import Said, Word, of_waiting

Tell = Callable[[Pod, Word], None]

_PATIENCE_SECONDS = 5.0
"""What is here by then needs no Event; and the entry that asks for a model comes by another watch,
a moment after the pod that waits for it."""

_AGAIN_SECONDS = 60.0  # how often the same is said with other numbers
_REMIND_SECONDS = 600.0
"""How often it is said unchanged: a server forgets Events after an hour, and one may be lost."""


@dataclass(slots=True)
class _Told:
    since: float
    word: Word | None = None
    at: float = 0.0


class Waiting:
    """Over one open cache. `ticks` is monotonic."""

    def __init__(
        self, reconciler: Reconciler, tell: Tell, *, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        self._reconciler = reconciler
        self._tell = tell
        self._ticks = ticks
        self._told: dict[str, _Told] = {}

    def see(self, pods: Mapping[str, tuple[Pod, frozenset[CacheKey]]], desired: Desired) -> None:
        """The pods of the node that have not ended, by UID, with the models that they name."""
        now = self._ticks()
        for uid in self._told.keys() - pods.keys():
            del self._told[uid]
        waiting = {u: pod for u, pod in pods.items() if not pod[0].started or u in self._told}
        facts = self._reconciler.facts() if waiting else {}
        for uid, (pod, keys) in waiting.items():
            told = self._told.setdefault(uid, _Told(now))
            word = of_waiting(keys, facts, desired)
            if word is not None and _is_news(word, told, now, started=pod.started):
                told.word, told.at = word, now
                self._tell(pod, word)
            if pod.started:
                del self._told[uid]


def _is_news(word: Word, told: _Told, now: float, *, started: bool) -> bool:
    if word.reason == Said.READY:  # whose models were here from the beginning never waited
        return told.word is not None and told.word.reason != Said.READY
    if started:  # with what it fetched itself
        return False
    if told.word is None:
        return now - told.since >= _PATIENCE_SECONDS
    pause = _REMIND_SECONDS if word == told.word else _AGAIN_SECONDS
    return word.reason != told.word.reason or now - told.at >= pause
