"""Kubernetes objects -> what the hook knows. Pure; `kube.parse` is the same for the node agent."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from agent.errors import AgentError
from agent.hook.scheduling import Node, extended_of
from agent.hook.spec import Json, at
from agent.hook.world import Cache, Group
from agent.kube.credentials import storage_patterns
from agent.kube.parse import node as parse_node
from agent.kube.parse import size_of, want
from agent.model import CacheKey, cache_key
from agent.phases import Phase
from agent.status import KSERVE_STATUS

_DOWNLOADED = KSERVE_STATUS[Phase.READY]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheObject:
    """A LocalModelCache, or, with a namespace, a LocalModelNamespaceCache."""

    name: str
    namespace: str
    uri: str
    groups: tuple[str, ...]
    annotations: Mapping[str, Any]
    deleting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a LocalModelNode says that it has. `sizes` and `capacity` are in bytes; an API server
    with KServe's own CRD keeps neither."""

    keys: frozenset[CacheKey] = frozenset()
    sizes: Mapping[CacheKey, int] = field(default_factory=dict)
    capacity: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A Lease. `renewed_at` is by its holder's clock, as Unix time; `seconds` is how long it
    lasts from there."""

    holder: str
    renewed_at: float
    seconds: float


def cache(raw: Json) -> CacheObject:
    metadata, spec = at(raw, "metadata"), at(raw, "spec")
    return CacheObject(
        name=metadata["name"],
        namespace=metadata.get("namespace") or "",
        uri=str(spec.get("sourceModelUri") or ""),
        groups=tuple(map(str, spec.get("nodeGroups") or ())),
        annotations=dict(metadata.get("annotations") or {}),
        deleting="deletionTimestamp" in metadata,
    )


def usable(found: Iterable[CacheObject], containers: Any) -> tuple[Cache, ...]:
    """The caches that pods can be given. Not those that are going, nor those that no node fetches
    because of what is wrong with them: their agents say so. `containers` is the list of
    ClusterStorageContainers, whose patterns make another model of a URI (`wishes.of_node`)."""
    return tuple(
        made for one in found if not one.deleting and (made := _cache(one, containers)) is not None
    )


def _cache(found: CacheObject, containers: Any) -> Cache | None:
    try:
        files = storage_patterns(found.uri, containers)
        ref = want(found.uri, found.name, found.annotations, files=files).ref
    except AgentError:
        return None
    return Cache(
        name=found.name,
        namespace=found.namespace,
        uri=found.uri,
        groups=found.groups,
        include=ref.include,
        exclude=ref.exclude,
    )


def group(raw: Json) -> Group:
    spec = at(raw, "spec")
    volume = spec.get("persistentVolumeSpec") or {}
    return Group(
        name=at(raw, "metadata")["name"],
        uid=at(raw, "metadata").get("uid") or "",
        selector=at(volume, "nodeAffinity").get("required"),
        volume=volume,
        claim=spec.get("persistentVolumeClaimSpec") or {},
        limit=size_of(spec.get("storageLimit")),
    )


def node(raw: Json) -> Node | None:
    """None for one that is not Ready: nothing is scheduled there."""
    status, spec, metadata = at(raw, "status"), at(raw, "spec"), at(raw, "metadata")
    conditions = {one.get("type"): one.get("status") for one in status.get("conditions") or ()}
    if conditions.get("Ready") != "True":
        return None
    return Node(
        name=metadata["name"],
        labels=dict(metadata.get("labels") or {}),
        taints=tuple(
            {name: str(taint.get(name) or "") for name in ("key", "value", "effect")}
            for taint in spec.get("taints") or ()
        ),
        extended=extended_of(at(status, "allocatable")),
    )


def holding(raw: Json) -> Holding:
    found = parse_node(raw)
    words = found.status.get("modelStatus") or {}
    models = found.status.get("models") or {}
    uris = {entry.name: entry.uri for entry in found.entries}
    sizes = {
        cache_key(uri): size
        for name, uri in uris.items()
        if isinstance(size := (models.get(name) or {}).get("bytes"), int)
    }
    return Holding(
        keys=frozenset(cache_key(u) for n, u in uris.items() if words.get(n) == _DOWNLOADED),
        sizes=sizes,
        capacity=size_of((found.status.get("disk") or {}).get("limit")),
    )


_LONG_AGO = "1970-01-01T00:00:00Z"


def heartbeat(raw: Json) -> Heartbeat:
    spec = at(raw, "spec")
    return Heartbeat(
        holder=str(spec.get("holderIdentity") or ""),
        renewed_at=datetime.fromisoformat(str(spec.get("renewTime") or _LONG_AGO)).timestamp(),
        seconds=float(spec.get("leaseDurationSeconds") or 0),
    )


def is_staying(raw: Json) -> bool:
    """Of an object of which only that it is there counts; not while it is going."""
    return "deletionTimestamp" not in at(raw, "metadata")
