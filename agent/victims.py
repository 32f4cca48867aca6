"""What may go to make room, the least recently used first, and what its going frees. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agent.model import Actual, CacheKey, Entry, Foreign, Ingest, Kept, Volume, Want


def keeps(
    key: CacheKey, desired: Mapping[CacheKey, Want], actual: Actual, volume: Volume, now: float
) -> Kept | None:
    """Why a sealed model is no victim; None where it is one. `now` is Unix seconds."""
    want, entry = desired.get(key), actual.entries[key]
    if want is not None and not want.on_demand:
        return Kept.WANTED
    if key in actual.pinned or (want is not None and want.pinned):
        return Kept.PINNED
    if key in actual.jobs or key in actual.staged:
        return Kept.BUSY
    if key in actual.damaged:
        return Kept.DAMAGED
    if actual.in_use is None:
        return Kept.UNKNOWN_USE
    if key in actual.in_use:
        return Kept.IN_USE
    if key in actual.demanded:
        return Kept.DEMANDED
    if key in actual.kept:
        return Kept.UNCONFIRMED
    if 0 <= now - entry.sealed_at < volume.min_age_seconds:  # not of a clock that was set back
        return Kept.YOUNG
    return None


@dataclass(frozen=True, slots=True)
class Victim:
    """Something that may go: a sealed model, or what was begun of one that nobody waits for."""

    key: CacheKey
    bytes: int
    shared: frozenset[tuple[int, int]] = frozenset()
    sealed: bool = True
    groups: frozenset[str] = frozenset()


def victims(
    desired: Mapping[CacheKey, Want], actual: Actual, volume: Volume, now: float
) -> list[Victim]:
    """All that may go, in the order in which it goes: half a model is of no use to anybody."""
    entries = actual.entries
    ranked = sorted(
        (entry.last_used, entry.sealed_at, key)
        for key, entry in entries.items()
        if entry.bytes > 0 and keeps(key, desired, actual, volume, now) is None
    )
    whole = (
        Victim(key, entries[key].bytes, entries[key].shared, groups=_groups(desired, key))
        for *_, key in ranked
    )
    return [*_partial(desired, actual), *whole]


def _partial(desired: Mapping[CacheKey, Want], actual: Actual) -> list[Victim]:
    if actual.in_use is None:  # a pod may be reading what was withdrawn to be mended
        return []
    needed = actual.in_use | actual.demanded | actual.kept | actual.pinned
    needed |= actual.jobs.keys() | actual.entries.keys()
    return [
        Victim(key, ingest.done, ingest.shared, sealed=False, groups=_groups(desired, key))
        for key, ingest in sorted(actual.ingests.items())
        if key not in needed and ingest.done > 0 and (key not in desired or desired[key].on_demand)
    ]


def _groups(desired: Mapping[CacheKey, Want], key: CacheKey) -> frozenset[str]:
    want = desired.get(key)
    return want.groups if want is not None else frozenset()


class Links:
    """How many models, also begun ones and another agent's, hold each file with several names."""

    def __init__(self, models: Iterable[Entry | Ingest | Foreign]) -> None:
        self._holders = Counter(file for model in models for file in model.shared)

    @property
    def saved(self) -> int:
        """The bytes that models have in common, counted once less than they are held."""
        return sum(size * (holders - 1) for (_, size), holders in self._holders.items())

    def drop(self, victim: Victim | Entry) -> int:
        """One holder less; the bytes that this frees."""
        freed = victim.bytes
        for file in victim.shared:
            self._holders[file] -= 1
            if self._holders[file] > 0:
                freed -= file[1]
        return freed

    def just_enough(
        self, candidates: Iterable[Victim], short: int, *, chosen: Sequence[Victim] = ()
    ) -> tuple[list[Victim], int]:
        """`chosen`, and the first of the candidates that together free `short` bytes, or all of
        them if that is not enough; and what they free. Nothing is dropped by asking.
        """
        trial = Links(())
        trial._holders = self._holders.copy()
        found = list(chosen)
        freed = sum(trial.drop(victim) for victim in found)
        for victim in candidates:
            if freed >= short:
                break
            if victim not in chosen:
                found.append(victim)
                freed += trial.drop(victim)
        return [v for v in found if v in chosen or not trial._in_vain(v)], freed

    def _in_vain(self, victim: Victim) -> bool:
        """Whether all bytes of one that was dropped are held by others that stay."""
        held = sum(size for (file, size) in victim.shared if self._holders[file, size] > 0)
        return victim.bytes == held
