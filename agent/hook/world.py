"""What the hook knows when a pod comes: watched objects, as values."""

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from agent import layout
from agent.hook.scheduling import Node, selects
from agent.model import CacheKey, cache_key, rest_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A LocalModelCache, or, with a namespace, a LocalModelNamespaceCache."""

    name: str
    uri: str
    groups: tuple[str, ...]
    namespace: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def key(self) -> CacheKey:
        return cache_key(self.uri)

    @property
    def prefix(self) -> str:
        return self.uri.removesuffix("/")

    def rest(self, uri: str) -> str | None:
        """What of this cache a URI names, "" for the whole; None if it names something else, or
        what no model holds: a way out of it (`..`), which the API server takes in no `subPath`."""
        rest = rest_of(uri, self.uri)
        return None if rest and layout.unsafe(rest) else rest

    def part(self, uri: str) -> str | None:
        """Where that is in the volume of a node group."""
        rest = self.rest(uri)
        return None if rest is None else posixpath.join(layout.model(self.key), rest).rstrip("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A LocalModelNodeGroup. `selector` is what its volumes require of a node, None: nothing, as
    for a volume that all nodes share; `volume` and `claim` are the specs that those are made of;
    `limit` is what its models may take on each node, in bytes."""

    name: str
    selector: Mapping[str, Any] | None
    uid: str = ""
    limit: int | None = None
    volume: Mapping[str, Any] = field(default_factory=dict)
    claim: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class World:
    """What the hook has watched: nothing is asked for while a pod waits.

    `claims` are the namespace and the group of each `localmodel-<group>` that may be mounted
    (`volumes.offered`); `inject` the namespaces that carry our label; `live` the nodes whose agent
    renews its Lease; `holders` the nodes that have a model; `entrypoints` lead from the last part
    of an image's name, without tag or digest, to what the image runs; `sizes` are those of the
    models that a node has, and `capacity` what the cache of a node may hold, both in bytes;
    `job_namespace` is where KServe downloads.
    """

    caches: tuple[Cache, ...] = ()
    groups: Mapping[str, Group] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    claims: frozenset[tuple[str, str]] = frozenset()
    inject: frozenset[str] = frozenset()
    live: frozenset[str] = frozenset()
    holders: Mapping[CacheKey, frozenset[str]] = field(default_factory=dict)
    entrypoints: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[CacheKey, int] = field(default_factory=dict)
    capacity: Mapping[str, int] = field(default_factory=dict)
    job_namespace: str = ""

    def holding(self, uri: str) -> Iterator[Cache]:
        """The caches of a URI, or of what it is a part of, of whatever namespace."""
        asked = uri.removesuffix("/")
        for length, found in self._by_prefix.items():
            if asked[length : length + 1] in ("", "/"):
                yield from found.get(asked[:length], ())

    @cached_property
    def _by_prefix(self) -> Mapping[int, Mapping[str, list[Cache]]]:
        """By its length first: a URI has as many beginnings as slashes, and somebody else wrote
        it."""
        found: dict[int, dict[str, list[Cache]]] = {}
        for cache in self.caches:
            same_length = found.setdefault(len(cache.prefix), {})
            same_length.setdefault(cache.prefix, []).append(cache)
        return found

    def in_group(self, group: str) -> frozenset[str]:
        return self._members[group]

    def offered(self, group: str) -> frozenset[str]:
        """The extended resources that a node of this group has some of."""
        return self._offered[group]

    @cached_property
    def _members(self) -> Mapping[str, frozenset[str]]:
        """Once for all pods: of a thousand nodes it takes milliseconds."""
        return {
            name: frozenset(
                node.name
                for node in self.nodes
                if group.selector is None or selects(group.selector, node)
            )
            for name, group in self.groups.items()
        }

    @cached_property
    def _offered(self) -> Mapping[str, frozenset[str]]:
        return {
            name: frozenset(
                resource
                for node in self.nodes
                if node.name in members
                for resource in node.extended
            )
            for name, members in self._members.items()
        }
