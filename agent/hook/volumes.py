"""Which claims and volumes there must be, and the next step to that. Pure (design D8, D12).

A pod can mount only a claim of its own namespace. So each namespace that carries our label has a
claim `localmodel-<group>` for every node group, bound to a volume of its own that is made from the
group's. They are made before any pod needs them: a hook that made one would make the pod wait.

Nothing that a pod mounts is taken away: what is not wanted any more, or is out of date, goes when
its last pod has gone.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from agent.hook.spec import Json, at
from agent.hook.world import Group
from agent.kube.parse import ANNOTATIONS
from agent.model import claim_name

MANAGED = ("app.kubernetes.io/managed-by", "localmodel-agent")
"""The label of what is ours: only that is ever changed or deleted."""

GROUP_NOTE = f"{ANNOTATIONS}/node-group"  # no label: a group's name may be longer than 63
_HASH_NOTE = f"{ANNOTATIONS}/spec-hash"

Place = tuple[str, str]
"""A namespace and a node group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A PersistentVolumeClaim of ours."""

    name: str
    namespace: str
    group: str
    phase: str = ""
    uid: str = ""
    volume: str = ""
    deleting: bool = False

    @property
    def place(self) -> Place:
        return self.namespace, self.group

    @property
    def ours(self) -> bool:
        """Anybody who may make a claim may give it our label."""
        return self.name == claim_name(self.group)

    @property
    def bound(self) -> bool:
        return self.phase == "Bound" and not self.deleting


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A PersistentVolume of ours."""

    name: str
    spec_hash: str
    phase: str = ""
    version: str = ""
    deleting: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    """`path` is the collection that the object goes into."""

    path: str
    body: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """`uid` of what was looked at: a claim of the same name that somebody made meanwhile stays."""

    path: str
    uid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """A merge patch."""

    path: str
    change: Json


Action = Create | Delete | Mend


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now, by place; `wait` are the places whose pods are waited for."""

    actions: Mapping[Place, Action]
    wait: frozenset[Place]


def plan(
    groups: Iterable[Group],
    namespaces: Collection[str],
    claims: Iterable[Claim],
    volumes: Iterable[Volume],
    *,
    used: Collection[Place] | None,
) -> Plan:
    """One step for each place; the next follows when its effect is seen.

    `used` are the places whose claim a pod mounts; None: that is not known, so nothing is deleted
    that a pod could mount, and all of these are in `wait`.
    """
    known = {group.name: group for group in groups}
    hashes = {name: _hash(group) for name, group in known.items()}
    wanted = {(space, group): known[group] for space in namespaces for group in known}
    there = {claim.place: claim for claim in claims if claim.ours}
    made = {volume.name: volume for volume in volumes}
    ours = {volume_name(place): place for place in (*wanted, *there)}
    orphans = {("", name): Delete(path=_VOLUME + name) for name in made if name not in ours}
    actions: dict[Place, Action] = {
        place: action for place, action in orphans.items() if not made[place[1]].deleting
    }
    wait = set()
    for place in sorted({*wanted, *there}):
        claim, volume = there.get(place), made.get(volume_name(place))
        group = wanted.get(place)
        stale = group is None or (volume is not None and volume.spec_hash != hashes[group.name])
        stale = stale or (claim is not None and claim.phase == "Lost")  # its volume was taken away
        going = claim is not None and stale and not claim.deleting
        if going and (used is None or place in used):
            wait.add(place)
        elif action := _step(place, group, claim, volume, stale=stale):
            actions[place] = action
    return Plan(actions=actions, wait=frozenset(wait))


def offered(
    groups: Iterable[Group],
    namespaces: Collection[str],
    claims: Iterable[Claim],
    volumes: Iterable[Volume],
) -> frozenset[Place]:
    """The places whose claim a new pod may be given: bound to the volume that is made of the group
    as it is now, and to stay. One on its way out would never go while pods come, and the volume of
    a group as it was holds a pod on nodes that the group does not select any more."""
    hashes = {group.name: _hash(group) for group in groups}
    current = {volume.name: volume.spec_hash for volume in volumes if not volume.deleting}
    return frozenset(
        claim.place
        for claim in claims
        if claim.ours
        and claim.bound
        and claim.namespace in namespaces
        and claim.group in hashes
        and claim.volume == volume_name(claim.place)
        and current.get(claim.volume) == hashes[claim.group]
    )


def _step(
    place: Place, group: Group | None, claim: Claim | None, volume: Volume | None, *, stale: bool
) -> Action | None:
    if (claim is not None and claim.deleting) or (volume is not None and volume.deleting):
        return None  # until it has gone
    if claim is not None and stale:
        return Delete(path=_claim_path(claim.namespace, claim.name), uid=claim.uid)
    if volume is not None and (stale or volume.phase == "Failed"):
        return Delete(path=_VOLUME + volume.name)
    if group is None:
        return None
    if volume is None:
        return Create(path=_VOLUME.rstrip("/"), body=volume_body(place, group))
    if volume.phase == "Released":
        # Its claim was deleted, and may have been made again. It would stay so, and the new claim
        # pending, for good (kserve-observed.md 2, 24).
        change = {
            "metadata": {"resourceVersion": volume.version},
            "spec": {"claimRef": {"uid": None, "resourceVersion": None}},
        }
        return Mend(path=_VOLUME + volume.name, change=change)
    if claim is None:
        return Create(path=_claim_path(place[0]), body=claim_body(place, group))
    return None


_VOLUME = "/api/v1/persistentvolumes/"


def _claim_path(namespace: str, name: str = "") -> str:
    path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
    return f"{path}/{name}" if name else path


def volume_name(place: Place) -> str:
    """The hash keeps `a` + `b-c` and `a-b` + `c` apart (kserve.md 2.8)."""
    digest = hashlib.sha256("/".join(place).encode()).hexdigest()[:10]
    return f"localmodel-{place[1][:200]}-{digest}"


def volume_body(place: Place, group: Group) -> Json:
    """The group's volume, bound to our claim before anybody else can ask for it.

    Read-only where the volume allows it to be said (a hostPath refuses mount options): then no pod
    can change a model, however it mounts the claim, nor kubelet give it to another group (node.md).
    """
    namespace, name = place
    spec = {**group.volume, "persistentVolumeReclaimPolicy": "Retain"}
    if "local" in spec:
        spec["mountOptions"] = sorted({*(spec.get("mountOptions") or ()), "ro"} - {"rw"})
    spec["claimRef"] = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "namespace": namespace,
        "name": claim_name(name),
    }
    notes = {GROUP_NOTE: name, _HASH_NOTE: _hash(group)}
    metadata = {"name": volume_name(place), "labels": dict([MANAGED]), "annotations": notes}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": metadata,
        "spec": spec,
    }


def claim_body(place: Place, group: Group) -> Json:
    namespace, name = place
    spec = {
        **group.claim,
        "volumeName": volume_name(place),
        # Of the volume: left out, the cluster's default class would come in, and never match.
        "storageClassName": group.volume.get("storageClassName") or "",
    }
    metadata = {
        "name": claim_name(name),
        "namespace": namespace,
        "labels": dict([MANAGED]),
        "annotations": {GROUP_NOTE: name},
    }
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": spec,
    }


def _hash(group: Group) -> str:
    text = json.dumps([group.volume, group.claim], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def claim(raw: Json) -> Claim:
    metadata = at(raw, "metadata")
    return Claim(
        name=metadata["name"],
        namespace=metadata["namespace"],
        group=at(metadata, "annotations").get(GROUP_NOTE) or "",
        phase=at(raw, "status").get("phase") or "",
        uid=metadata.get("uid") or "",
        volume=at(raw, "spec").get("volumeName") or "",
        deleting="deletionTimestamp" in metadata,
    )


def volume(raw: Json) -> Volume:
    metadata = at(raw, "metadata")
    return Volume(
        name=metadata["name"],
        spec_hash=at(metadata, "annotations").get(_HASH_NOTE) or "",
        phase=at(raw, "status").get("phase") or "",
        version=metadata.get("resourceVersion") or "",
        deleting="deletionTimestamp" in metadata,
    )


def mounted(pod: Json) -> frozenset[Place]:
    """The places whose claims a pod mounts that has not ended."""
    if at(pod, "status").get("phase") in ("Succeeded", "Failed"):
        return frozenset()
    namespace = at(pod, "metadata").get("namespace") or ""
    names = {
        at(volume, "persistentVolumeClaim").get("claimName") or ""
        for volume in at(pod, "spec").get("volumes") or ()
    }
    prefix = claim_name("")
    return frozenset((namespace, n.removeprefix(prefix)) for n in names if n.startswith(prefix))
