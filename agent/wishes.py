"""What should be here, put together from caches that may disagree. Pure.

Both deliverers of desired state end here: a directory of YAML, and a cluster's LocalModelNode.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agent.errors import AgentError, Reason
from agent.formats import strictest
from agent.kube.credentials import storage_patterns
from agent.kube.parse import Cache, CacheMeta, Group, NodeObject, check_not_of_node, want
from agent.model import CacheKey, Want, cache_key


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecError:
    """One cache that asks for nothing, and why. `name` is unique."""

    name: str
    message: str
    reason: Reason = Reason.INVALID_SPEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """What should be here. `names` leads from a cache's name to its key.

    `spoken_for` holds keys that are not wanted now and are no business of ours to remove either: an
    entry names them that is refused, or not yet understood; `refused` says what is wrong with the
    first. `complete` is False where an object that says it all is missing:
    absence is not a command, so nothing counts as having left.
    """

    wants: dict[CacheKey, Want]
    names: dict[str, CacheKey]
    errors: tuple[SpecError, ...] = ()
    spoken_for: frozenset[CacheKey] = frozenset()
    refused: Mapping[CacheKey, SpecError] = field(default_factory=dict)
    complete: bool = True
    group_limits: Mapping[str, int] = field(default_factory=dict)
    """What the models of a node group may take of this volume, in bytes."""
    guarded: Mapping[str, Want] = field(default_factory=dict)
    """By the name of a cache that must show that its own credentials lead to its model."""
    owner: str | None = ""
    """The identity of the object that says it all: what another one asked for has not left this.
    None where there is no desired state at all, only commands."""


NOTHING = Desired(wants={}, names={}, owner=None)


def join(caches: Iterable[tuple[str, Cache]], errors: Iterable[SpecError] = ()) -> Desired:
    """All caches together; of two that disagree, the later one is the newer one and is refused.

    Each comes with the place it is from, to begin its message with ("" for none).
    """
    wants: dict[CacheKey, Want] = {}
    names: dict[str, CacheKey] = {}
    found = list(errors)
    for where, cache in caches:
        problem = _conflict(cache, wants, names)
        if problem is not None:
            message = f"{where}: {problem}" if where else problem
            found.append(SpecError(name=cache.name, message=message))
            continue
        names[cache.name] = cache.want.key
        wants[cache.want.key] = _joined(wants.get(cache.want.key), cache.want)
    return Desired(wants=wants, names=names, errors=tuple(found))


def of_node(
    node: NodeObject | None,
    caches: Mapping[tuple[str, str], CacheMeta],
    groups: Mapping[str, Group],
    *,
    unconfirmed: Container[str] = (),
    check: Callable[[str], object],
    served: str,
    containers: Any = None,
) -> Desired:
    """What a LocalModelNode asks of its node; None where there is no such object.

    `caches` are by namespace ("" for a cluster cache) and name; an entry whose cache is gone is
    served as the entry says, once it is sure that it is gone: until then its status name is in
    `unconfirmed`, because its annotations may say which bytes are wanted. `check` raises for a URI
    that no source knows: such an entry is refused here, once, and costs no job and no retries.
    `served` is our cache's directory on the node; `containers` is the list of
    ClusterStorageContainers, whose patterns hold for a cache that has none of its own.
    """
    if node is None:
        return Desired(wants={}, names={}, complete=False)
    found: list[tuple[str, str, Cache]] = []
    errors = [SpecError(name=name, message=message) for name, message in node.refused]
    spoken_for: dict[CacheKey, SpecError | None] = {}
    guarded: dict[str, Want] = {}
    for entry in node.entries:
        meta = caches.get((entry.namespace, entry.model))
        if meta is None and entry.name in unconfirmed:
            spoken_for[cache_key(entry.uri)] = None
            continue
        try:
            check_not_of_node(entry.uri)
            check(entry.uri)
            _check_path(groups.get(entry.group), served)
            notes = meta.annotations if meta else {}
            files = storage_patterns(entry.uri, containers)
            asked = want(entry.uri, entry.name, notes, group=entry.group, files=files)
            group = groups.get(entry.group)
            policy = group.file_policy if group is not None else None
            asked = replace(asked, access=entry.access, file_policy=policy)
        except AgentError as error:
            wrong = SpecError(name=entry.name, message=error.message, reason=error.reason)
            errors.append(wrong)
            spoken_for[cache_key(entry.uri)] = wrong
            continue
        if entry.guarded:
            guarded[entry.name] = asked
        found.append((meta.created if meta else "", entry.name, Cache(name=entry.name, want=asked)))
    oldest_first = sorted(found, key=lambda item: item[:2])
    desired = join((("", cache) for *_, cache in oldest_first), errors)
    # An entry that cannot be read may name any model.
    return replace(
        desired,
        spoken_for=frozenset(spoken_for),
        refused={key: wrong for key, wrong in spoken_for.items() if wrong is not None},
        complete=not node.refused,
        owner=node.uid,
        guarded={name: want for name, want in guarded.items() if name in desired.names},
        group_limits={name: group.limit for name, group in groups.items() if group.limit},
    )


def _check_path(group: Group | None, served: str) -> None:
    """Raise PathMismatch where this group's pods read another directory than the one we fill."""
    if group is None or not group.path or group.path.rstrip("/") == served.rstrip("/"):
        return
    raise AgentError(
        Reason.PATH_MISMATCH,
        f"the volumes of the node group {group.name} are at {group.path}, and this agent keeps"
        f" {served}: pods would not find the model",
    )


def _conflict(cache: Cache, wants: dict[CacheKey, Want], names: dict[str, CacheKey]) -> str | None:
    if cache.name in names:
        return f"there is already a LocalModelCache {cache.name}; this one is ignored"
    other = wants.get(cache.want.key)
    if other is None or (
        other.ref == cache.want.ref and other.expect_fingerprint == cache.want.expect_fingerprint
    ):
        return None
    others = ", ".join(sorted(other.names))
    return (
        f"{cache.name} and {others} want {cache.want.ref.uri} with different patterns or"
        f" fingerprints; make them agree (this one is ignored)"
    )


def _joined(first: Want | None, second: Want) -> Want:
    if first is None:
        return second
    return replace(
        first,
        names=first.names | second.names,
        priority=max(first.priority, second.priority),
        on_demand=first.on_demand and second.on_demand,
        pinned=first.pinned or second.pinned,
        ttl_seconds=_longer(first.ttl_seconds, second.ttl_seconds),
        retain_seconds=_longer(first.retain_seconds, second.retain_seconds),
        floor=max(first.floor, second.floor),
        groups=first.groups | second.groups,
        file_policy=strictest((first.file_policy, second.file_policy)),
        refresh=" ".join(sorted({first.refresh, second.refresh} - {""})),
    )


def _longer(first: float | None, second: float | None) -> float | None:
    """None, nothing said, wins: the one who asked for less must not decide for the other."""
    return None if first is None or second is None else max(first, second)
