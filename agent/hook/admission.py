"""What the hook does with a pod: a patch, or a reason for leaving it exactly as it is. Pure (D8).

Three shapes are helped. KServe's *initializer* is in the pod: it is wrapped (`hook.wrapper`), and
the claim of the node group is mounted, read-only, beside each destination. KServe has *rewritten*
the pod already, onto a claim of its own: that claim becomes read-only, so that kubelet makes no
empty directory in the cache and changes no owner in it. The pod *names* a model by our annotation:
it is mounted where the annotation says.

Admission comes before scheduling. So nothing is done that could keep a pod from a node on which it
could run: a claim of a group is mounted only if that claim is bound, the agents of all the group's
nodes live, and the pod can run on no other nodes or names the group itself.
"""

import json
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from agent.hook.asked import (
    MOST_MODELS,
    check_not_expanded,
    check_places,
    directory_of,
    named_in,
    pairs_of,
    volumes_of,
    wait_seconds,
)
from agent.hook.decisions import Left, Mutation, Skip, Why
from agent.hook.patch import append, escaped, put
from agent.hook.scheduling import allowed
from agent.hook.spec import Json, containers, few, mounts, name_of
from agent.hook.world import Cache, World
from agent.hook.wrapper import Pair, command, served
from agent.kube import podspec
from agent.kube.credentials import PATTERNS
from agent.kube.parse import ANNOTATIONS as PREFIX
from agent.kube.podspec import INITIALIZER, INJECTED, KEYS, KSERVE_CLAIM, KSERVE_LABEL
from agent.layout import is_key
from agent.model import CacheKey, cache_key, claim_name

VOLUME = "localmodel-cache"
MOUNT = "/mnt/localmodel"
"""Where the whole claim is in a wrapped pod: the same path in all containers, for the links."""

_WHOLE: Json = {"name": VOLUME, "mountPath": MOUNT}
_KSERVE = "internal.serving.kserve.io"
_NODE_GROUP = "serving.kserve.io/nodegroup"
_MOST_PAGE = 100 * 1024  # bytes: Linux takes no argument of 128 KiB, and starts nothing then
_MOST_ANNOTATIONS = 256 * 1024  # bytes of all that an object has; the API server's own limit
_MOST_MOUNTS = 1000  # that are added to one pod
_MOST_SCHEDULING = 16 * 1024  # bytes of what each node is compared with
_MOST_NODES = 100  # in the preference: a pod's spec is no place for a thousand names


def mutate(pod: Json, world: World, *, namespace: str) -> Mutation | Skip:
    """`pod` as the API server sends it, `namespace` of the request: a pod of a Deployment has none
    of its own yet. The same answer for the same arguments; of its own result, Skip(DONE)."""
    metadata, spec = pod.get("metadata") or {}, pod.get("spec") or {}
    volumes = spec.get("volumes") or ()
    scratch = frozenset(name_of(v) for v in volumes if v.get("emptyDir") is not None)
    asked = _Asked(
        pod=pod,
        spec=spec,
        labels=metadata.get("labels") or {},
        notes=metadata.get("annotations") or {},
        namespace=namespace,
        world=world,
        scratch=scratch,
    )
    try:
        return asked.answer()
    except Left as left:
        return left.skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One pod and all that is known; `scratch` are the names of its `emptyDir` volumes."""

    pod: Json
    spec: Json
    labels: Json
    notes: Json
    namespace: str
    world: World
    scratch: frozenset[str]

    def answer(self) -> Mutation:
        initializer = self._initializer()
        named = named_in(self.notes)
        rewritten = self._rewritten()
        if initializer is None and not named and rewritten is None:
            raise Left(Why.NOT_OURS)
        self._check_opt_outs()
        if any(name_of(volume) == VOLUME for volume in self._volumes()):
            return self._completed(initializer[1] if initializer is not None else None)
        compared = [self.spec.get(name) for name in ("nodeSelector", "affinity", "tolerations")]
        if len(json.dumps(compared)) > _MOST_SCHEDULING:
            raise Left(Why.ODD, "it has so many tolerations or so much affinity")
        if initializer is not None:
            return self._wrapped(*initializer)
        if rewritten is not None:
            return self._kept_from_writing(rewritten)
        return self._mounted(named)

    def _check_opt_outs(self) -> None:
        if podspec.is_disabled(self.notes):
            raise Left(Why.DISABLED)
        if podspec.writes(self.notes):
            raise Left(Why.WRITES)

    def _volumes(self) -> Sequence[Json]:
        return self.spec.get("volumes") or ()

    # -- KServe's initializer is in the pod -------------------------------------------------------

    def _initializer(self) -> tuple[int, Json] | None:
        for index, container in enumerate(self.spec.get("initContainers") or ()):
            if name_of(container) == INITIALIZER:
                return index, container
        return None

    def _wrapped(self, index: int, initializer: Json) -> Mutation:
        pairs = pairs_of(initializer.get("args") or ())
        variables = {name_of(v): _value(v) for v in initializer.get("env") or ()}
        found = self._cached(uri for uri, _ in pairs)
        if not found:
            raise Left(Why.NO_CACHE)
        check_not_expanded(initializer)
        if variables.get("CONFIDENTIAL_ENABLED", "").lower() not in ("", "false"):
            raise Left(Why.CONFIDENTIAL)
        self._check_patterns(initializer, variables, found.values())
        entrypoint = self._entrypoint(initializer)
        group = self._group(list(found.values()))
        taken = {uri: cache for uri, cache in found.items() if group in cache.groups}
        volumes = self._destinations(initializer, [place for uri, place in pairs if uri in taken])
        wrapped = command(
            [
                Pair(uri=uri, key=cache.key, cached=cache.uri, rest=cache.rest(uri) or "")
                for uri, cache in taken.items()
            ],
            root=MOUNT,
            limit_seconds=wait_seconds(self.notes.get(f"{PREFIX}/wait")),
            entrypoint=entrypoint,
        )
        if len(wrapped[2].encode(errors="replace")) > _MOST_PAGE:
            raise Left(Why.ODD, "its arguments are so long")
        patch = [
            *self._with_volume(group),
            put("command" in initializer, f"/spec/initContainers/{index}/command", wrapped),
        ]
        patch += self._with_mount(f"/spec/initContainers/{index}", initializer, _WHOLE)
        patch += self._with_links(volumes, initializer)
        keys = tuple(sorted({cache.key for cache in taken.values()}))
        patch += self._preferring(keys, group)
        return self._mutation(
            patch, keys, group, f"wrapped: {few(taken)} from the cache of {group}"
        )

    def _completed(self, initializer: Json | None) -> Mutation:
        """Another webhook may have added a container since, which finds nothing but links there."""
        if initializer is None:
            raise Left(Why.DONE)
        words = [str(word) for word in (initializer.get("args") or ())[: 2 * MOST_MODELS]]
        places = dict(zip(words[::2], words[1::2], strict=False))
        linked = [places[uri] for uri in served(initializer.get("command") or (), places)]
        volumes = self.scratch.intersection(volumes_of(linked, initializer).values())
        patch = self._with_links(volumes, initializer)
        if not patch:
            raise Left(Why.DONE)
        keys = tuple(filter(is_key, str(self.notes.get(KEYS) or "").split(",")))
        claims = [_claim(v).get("claimName") for v in self._volumes() if name_of(v) == VOLUME]
        group = next((name for name in self.world.groups if claim_name(name) in claims), "")
        note = "mounted in containers that others added"
        return Mutation(patch=tuple(patch), note=note, keys=tuple(map(CacheKey, keys)), group=group)

    def _with_links(self, volumes: Set[str], initializer: Json) -> list[Json]:
        """The whole claim in each other container that mounts one of these, and has it not yet."""
        patch: list[Json] = []
        made: Set[tuple[str, Any, Any]] = frozenset()
        for path, container in containers(self.spec):  # as they are started
            if container is initializer:
                made = {_shown(mount) for mount in mounts(container) if not mount.get("readOnly")}
            elif not (volumes.isdisjoint(map(name_of, mounts(container))) or _has_whole(container)):
                patch += self._with_mount(path, container, _WHOLE, made=made)
        return patch

    def _destinations(self, initializer: Json, places: Iterable[str]) -> Set[str]:
        """The volumes that these are in. Links are for this pod: in a volume that outlives it, or
        that others mount, they would lead nowhere."""
        found = volumes_of(places, initializer)
        for place, volume in found.items():
            if volume not in self.scratch:
                raise Left(Why.ODD, f"the volume {volume} of {place} is no emptyDir")
        return set(found.values())

    def _entrypoint(self, initializer: Json) -> Sequence[str]:
        """Of an image that nobody knows it is not known either whether it has a shell to run the
        wrapper: its command may be all that is in it."""
        image = str(initializer.get("image") or "")
        name = image.partition("@")[0].rpartition("/")[2].partition(":")[0]
        if name not in self.world.entrypoints:
            raise Left(Why.UNKNOWN_IMAGE, image)
        command = initializer.get("command")
        return [str(word) for word in command] if command else self.world.entrypoints[name]

    def _check_patterns(
        self, initializer: Json, variables: Mapping[str, str], caches: Iterable[Cache]
    ) -> None:
        """Of a container that chooses files nobody can say here whether they are the same; nor
        whether a map or a Secret chooses, which it takes its variables from."""
        chooses = [name for name in PATTERNS if variables.get(name)]
        prefixes = [str(source.get("prefix") or "") for source in initializer.get("envFrom") or ()]
        if any(name.startswith(prefix) for name in PATTERNS for prefix in prefixes):
            chooses.append("envFrom")
        if chooses or any(cache.include or cache.exclude for cache in caches):
            raise Left(Why.PATTERNS, ", ".join(chooses))

    # -- KServe has rewritten the pod -------------------------------------------------------------

    def _rewritten(self) -> int | None:
        """The index of its volume, which it shares a name with: download Jobs and plain `pvc://`."""
        claim = self.notes.get(f"{_KSERVE}/localmodel-pvc-name")
        if not claim or KSERVE_LABEL not in self.labels:
            return None
        if self.namespace == self.world.job_namespace:
            return None
        for index, volume in enumerate(self._volumes()):
            if name_of(volume) == KSERVE_CLAIM and _claim(volume).get("claimName") == claim:
                return index
        return None

    def _kept_from_writing(self, index: int) -> Mutation:
        uri = str(self.notes.get(f"{_KSERVE}/localmodel-sourceuri") or "")
        if not uri:
            raise Left(Why.ODD, "it does not say which model KServe gave it")
        patch: list[Json] = []
        claim = _claim(self._volumes()[index])
        if claim.get("readOnly") is not True:
            path = f"/spec/volumes/{index}/persistentVolumeClaim/readOnly"
            patch.append(put("readOnly" in claim, path, True))
        patch += self._mended(uri)
        if not patch:
            raise Left(Why.DONE)
        # KServe's name for it is CACHE-GROUP, and either may hold a hyphen.
        group = str(claim.get("claimName")).removeprefix(f"{self.labels[KSERVE_LABEL]}-")
        known = group if group in self.world.groups else ""
        note = f"read-only: {few([uri])} on KServe's claim"
        return self._mutation(patch, (cache_key(uri),), known, note)

    def _mended(self, uri: str) -> Iterable[Json]:
        """KServe cuts `s3://b/m/` off `s3://b/m`, and is left with all of it (kserve.md 4.4)."""
        service = str(self.notes.get(f"{_KSERVE}/storage-initializer-sourceuri") or "")
        whole = Cache(name="", uri=uri, groups=()).part(service)
        for path, container in containers(self.spec):
            for index, mount in enumerate(mounts(container)):
                part = str(mount.get("subPath") or "")
                if name_of(mount) == KSERVE_CLAIM and "://" in part and whole is not None:
                    yield put(True, f"{path}/volumeMounts/{index}/subPath", whole)

    # -- the pod names a model --------------------------------------------------------------------

    def _mounted(self, named: Mapping[str, tuple[str, str]]) -> Mutation:
        if self.namespace not in self.world.inject:
            raise Left(Why.NO_CLAIM, f"the namespace has no label {PREFIX}/inject: enabled")
        if len(named) > MOST_MODELS:
            raise Left(Why.ODD, f"it names more than {MOST_MODELS} models")
        found = self._cached(uri for uri, _ in named.values())
        if missing := sorted({uri for uri, _ in named.values()} - found.keys()):
            raise Left(Why.NO_SUCH_CACHE, few(missing))
        group = self._group(list(found.values()))
        if not all(group in cache.groups for cache in found.values()):
            raise Left(Why.NO_SUCH_CACHE, "no one node group has all of them")
        if len(named) * len(containers(self.spec)) > _MOST_MOUNTS:
            raise Left(Why.ODD, "so many models in so many containers")
        check_places([place for _, place in named.values()])
        mounted = [
            {"name": VOLUME, "mountPath": place, "subPath": found[uri].part(uri)}
            for uri, place in named.values()
        ]
        patch = self._with_volume(group)
        for path, container in containers(self.spec):
            patch += self._with_mount(path, container, *mounted)
        keys = tuple(sorted({cache.key for cache in found.values()}))
        patch += self._preferring(keys, group)
        return self._mutation(
            patch, keys, group, f"mounted: {few(found)} from the cache of {group}"
        )

    # -- which cache, which group -----------------------------------------------------------------

    def _cached(self, uris: Iterable[str]) -> dict[str, Cache]:
        """Those that a cache has, with it."""
        return {uri: cache for uri in uris if (cache := self._cache(uri)) is not None}

    def _cache(self, uri: str) -> Cache | None:
        """The longest that holds it; those of the namespace first, as KServe does."""
        holding = [
            cache
            for cache in self.world.holding(uri)
            if cache.namespace in ("", self.namespace) and cache.rest(uri) is not None
        ]
        return min(
            holding,
            key=lambda cache: (not cache.namespace, -len(cache.prefix), cache.name),
            default=None,
        )

    def _group(self, caches: Sequence[Cache]) -> str:
        """The group that has the most of these models and is the only place for this pod."""
        named = self.notes.get(_NODE_GROUP)
        order = list(dict.fromkeys(group for cache in caches for group in cache.groups))
        known = [group for group in order if group in self.world.groups]
        if named is not None:
            known = [group for group in known if group == named]
        if not known:
            detail = f"not in the node group {named}" if named else "its node groups do not exist"
            raise Left(Why.NO_SUCH_CACHE, detail)
        known.sort(key=lambda group: -sum(group in cache.groups for cache in caches))
        places = allowed(self.spec, self.world.nodes)
        refusals = []
        for group in known:
            refusal = self._refusal(group, places, named=named is not None)
            if refusal is None:
                return group
            refusals.append(refusal)
        raise refusals[0]

    def _refusal(self, group: str, places: frozenset[str], *, named: bool) -> Left | None:
        if (self.namespace, group) not in self.world.claims:
            return Left(Why.NO_CLAIM, f"{claim_name(group)} in {self.namespace}")
        nodes = self.world.in_group(group)
        if not nodes:
            return Left(Why.NO_AGENT, f"no node of {group} is Ready")
        if silent := sorted(nodes - self.world.live):
            return Left(Why.NO_AGENT, few(silent))
        if named and not places & nodes:
            return Left(Why.ODD, f"it names the group {group}, and can run on no node of it")
        if not named and (not places or places - nodes):
            return Left(Why.OTHER_NODES, few(sorted(places - nodes)) or "no node is known")
        return None

    # -- the patch --------------------------------------------------------------------------------

    def _with_volume(self, group: str) -> list[Json]:
        claim = {"claimName": claim_name(group), "readOnly": True}
        return append(
            self.spec, "/spec", "volumes", {"name": VOLUME, "persistentVolumeClaim": claim}
        )

    def _with_mount(
        self, path: str, container: Json, *added: Json, made: Container[Any] = ()
    ) -> list[Json]:
        """Read-only, where nothing is in the way. A mount needs a directory to be on: the runtime
        makes one in an emptyDir that may be written, and would fail in most other volumes, or
        leave it there. `made` is what a container mounts that ran before, and made it."""
        places = [(mount, mount.get("mountPath")) for mount in mounts(container)]
        places += [(item, item.get("devicePath")) for item in container.get("volumeDevices") or ()]
        ours = tuple(directory_of(mount["mountPath"]) for mount in added)
        for other, place in places:
            directory = directory_of(place)
            writable = not other.get("readOnly") or _shown(other) in made
            room = name_of(other) in self.scratch and writable
            if directory.startswith(ours) or (
                not room and any(one.startswith(directory) for one in ours)
            ):
                raise Left(Why.ODD, f"{name_of(container)} has something at {place}")
        return append(
            container, path, "volumeMounts", *({**mount, "readOnly": True} for mount in added)
        )

    def _preferring(self, keys: Sequence[CacheKey], group: str) -> list[Json]:
        """Ask for a node that has the models already, and require none (kserve#4681)."""
        nodes = self.world.in_group(group)
        having = nodes.intersection(*(self.world.holders.get(key, frozenset()) for key in keys))
        if not having or having == nodes or len(having) > _MOST_NODES:
            return []
        if self.world.groups[group].selector is None:  # a shared volume is as near everywhere
            return []
        terms = [{"weight": 50, "preference": _only(name)} for name in sorted(having)]
        affinity = self.spec.get("affinity") or {}
        node = affinity.get("nodeAffinity") or {}
        if not affinity:
            preferring = {"nodeAffinity": {_PREFERRED: terms}}
            return [put("affinity" in self.spec, "/spec/affinity", preferring)]
        if not node:
            path = "/spec/affinity/nodeAffinity"
            return [put("nodeAffinity" in affinity, path, {_PREFERRED: terms})]
        return append(node, "/spec/affinity/nodeAffinity", _PREFERRED, *terms)

    def _mutation(
        self, patch: list[Json], keys: tuple[CacheKey, ...], group: str, note: str
    ) -> Mutation:
        written = {INJECTED: note, KEYS: ",".join(keys)}
        if _bytes({**self.notes, **written}) > _MOST_ANNOTATIONS:
            raise Left(Why.ODD, "its annotations leave no room for ours")
        metadata = self.pod.get("metadata")
        if metadata is None:
            patch.append({"op": "add", "path": "/metadata", "value": {"annotations": written}})
        elif not metadata.get("annotations"):
            patch.append(put("annotations" in metadata, "/metadata/annotations", written))
        else:
            for name, value in written.items():
                path = f"/metadata/annotations/{escaped(name)}"
                patch.append(put(name in metadata["annotations"], path, value))
        return Mutation(patch=tuple(patch), note=note, keys=keys, group=group)


_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def _only(node: str) -> Json:
    """The API takes one name in a term, no more."""
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    return {"matchFields": [field]}


def _bytes(notes: Json) -> int:
    """What annotations take, as the API server counts them."""
    words = (word for note in notes.items() for word in map(str, note))
    return sum(len(word.encode(errors="replace")) for word in words)


def _has_whole(container: Json) -> bool:
    """Whether the links lead somewhere in this container."""
    return any((name_of(m), m.get("mountPath")) == (VOLUME, MOUNT) for m in mounts(container))


def _shown(mount: Json) -> tuple[str, Any, Any]:
    """What a mount shows, and where."""
    return name_of(mount), mount.get("mountPath"), mount.get("subPath")


def _value(variable: Json) -> str:
    """Of what is read elsewhere only that it is set."""
    return str(variable.get("value") or ("valueFrom" in variable and "$(...)") or "")


def _claim(volume: Json) -> Json:
    return volume.get("persistentVolumeClaim") or {}
