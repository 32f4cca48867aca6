"""Pods -> our nouns: what they use of a cache, and what they would bring past it."""

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from agent import layout
from agent.kube.parse import ANNOTATIONS, mapping_of, text_of
from agent.model import CacheKey

KEYS = f"{ANNOTATIONS}/keys"
INJECTED = f"{ANNOTATIONS}/injected"
AGENT_LABEL = ("app.kubernetes.io/name", "localmodel-agent")

_DISABLE = f"{ANNOTATIONS}/disable"
_KSERVE_AGENT = "kserve-localmodelnode-agent"
KSERVE_LABEL = "internal.serving.kserve.io/localmodel"
KSERVE_CLAIM = "kserve-pvc-source"  # the volume's name in KServe's Jobs and in the pods it rewrote
INITIALIZER = "storage-initializer"

_MOST_DOWNLOADS, _LONGEST_URI = 16, 2048
"""Of one pod: KServe's have few, and a tenant may write a megabyte of arguments."""


class PodRole(StrEnum):
    """What a pod is to the cache, beside a user of models."""

    USER = "user"
    AGENT = "agent"  # of ours
    KSERVE_AGENT = "kserve-agent"
    DOWNLOAD_JOB = "download-job"  # KServe's


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod of the node, as far as the cache cares.

    `keys` are named by its mounts or by the hook; `claims` it mounts whole, so that it may read any
    model, and `served_by_kserve` says that it does so as KServe's pods do; `directories` are those
    of the node that it mounts; `host_paths` lead there from the path in its first container.
    `downloads` are the URIs that its initializer or an annotation names, past the cache: none for a
    pod that was given a claim or wants none. `started`: its containers have begun. `created` is by
    RFC 3339.
    """

    uid: str
    namespace: str
    name: str
    role: PodRole
    finished: bool
    keys: frozenset[CacheKey]
    claims: frozenset[str]
    served_by_kserve: bool
    directories: frozenset[str]
    host_paths: Mapping[str, str]
    downloads: tuple[str, ...]
    started: bool
    created: str


def pod(raw: Mapping[str, Any]) -> Pod:
    metadata, spec = mapping_of(raw, "metadata"), raw.get("spec") or {}
    labels, notes = metadata.get("labels") or {}, metadata.get("annotations") or {}
    phase = (raw.get("status") or {}).get("phase")
    volumes = {volume["name"]: volume for volume in spec.get("volumes") or []}
    keys: set[CacheKey] = set()
    claims: set[str] = set()  # mounted whole
    sources: set[str] = set()  # the volumes of these
    directories: set[str] = set()
    host_paths: dict[str, str] = {}
    for container in _containers(spec):
        for mount in container.get("volumeMounts") or []:
            volume = volumes.get(mount["name"], {})
            part = _part(mount)
            if (directory := volume.get("hostPath")) is not None:
                path = posixpath.normpath("/" + f"{text_of(directory, 'path')}/{part}".lstrip("/"))
                directories.add(path)
                host_paths.setdefault(text_of(mount, "mountPath"), path)
            elif (claim := volume.get("persistentVolumeClaim")) is None:
                continue
            elif key := layout.key_in(part):
                keys.add(key)
            elif part in (".", layout.MODELS):
                claims.add(text_of(claim, "claimName"))
                sources.add(text_of(volume, "name"))
    relied = notes.get(KEYS)
    # The hook says which models of the whole claim it meant. Of a pod that mounts no claim, anybody
    # said it: that would keep models on a node, and make it fetch them.
    if relied is not None and (claims or keys):
        named = [key.strip() for key in relied.split(",")]
        keys |= {CacheKey(key) for key in named if layout.is_key(key)}
        if all(map(layout.is_key, named)):  # else nobody knows what was meant
            claims.clear()
    return Pod(
        uid=text_of(metadata, "uid"),
        namespace=text_of(metadata, "namespace"),
        name=text_of(metadata, "name"),
        role=_role(metadata, labels, volumes),
        finished=phase in ("Succeeded", "Failed"),
        keys=frozenset(keys),
        claims=frozenset(claims),
        served_by_kserve=bool(claims) and (KSERVE_CLAIM in sources or KSERVE_LABEL in labels),
        directories=frozenset(directories),
        host_paths=host_paths,
        downloads=_downloads(spec, volumes, notes),
        started=phase not in (None, "", "Pending"),
        created=text_of(metadata, "creationTimestamp"),
    )


def is_disabled(notes: Mapping[str, Any]) -> bool:
    """Whether a pod's annotations opt it out of the cache: KServe's, or ours."""
    return "serving.kserve.io/disable-localmodel" in notes or notes.get(_DISABLE) == "true"


def writes(notes: Mapping[str, Any]) -> bool:
    """Whether a pod is to write to its model."""
    return notes.get("storage.kserve.io/readonly") == "false"


def _downloads(
    spec: Mapping[str, Any], volumes: Mapping[str, Any], notes: Mapping[str, Any]
) -> tuple[str, ...]:
    """The URIs of `uri destination [uri destination ...]`, and those that annotations name."""
    helped = INJECTED in notes or KEYS in notes or KSERVE_CLAIM in volumes
    if helped or is_disabled(notes) or writes(notes):
        return ()
    found = [c for c in spec.get("initContainers") or () if c.get("name") == INITIALIZER]
    words = [str(word) for container in found for word in container.get("args") or ()]
    uris = [*words[: 2 * _MOST_DOWNLOADS : 2], *sources(notes).values()][:_MOST_DOWNLOADS]
    return tuple(uri for uri in uris if len(uri) <= _LONGEST_URI)


def sources(notes: Mapping[str, Any]) -> dict[str, str]:
    """The URIs that annotations of a pod name, by the name behind the dot with its dot, "" for the
    one without."""
    prefix = f"{ANNOTATIONS}/source"
    found = {
        note.removeprefix(prefix): uri for note, uri in notes.items() if note.startswith(prefix)
    }
    return {name: str(found[name]) for name in sorted(found) if not name or name.startswith(".")}


def _containers(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        yield from spec.get(kind) or []


def _part(mount: Mapping[str, Any]) -> str:
    """The directory of its volume that a mount shows, "." for the whole.

    Kubelet replaces what an expression names by values of the container's environment: from there
    on it may be anything.
    """
    known = text_of(mount, "subPath")
    if expression := text_of(mount, "subPathExpr"):
        known, names, _ = expression.partition("$(")
        known = known.rpartition("/")[0] if names else known
    return posixpath.normpath(known.strip("/"))


def _role(
    metadata: Mapping[str, Any], labels: Mapping[str, str], volumes: Mapping[str, Any]
) -> PodRole:
    """Not by labels alone: those are anybody's to set, and would stop the node's cache."""
    owners = {owner.get("kind") for owner in metadata.get("ownerReferences") or []}
    on_host = any("hostPath" in volume for volume in volumes.values())
    if labels.get("control-plane") == _KSERVE_AGENT and "DaemonSet" in owners and on_host:
        return PodRole.KSERVE_AGENT
    if labels.get(AGENT_LABEL[0]) == AGENT_LABEL[1]:
        return PodRole.AGENT
    # Its Jobs carry these two (kserve.md 3.4).
    if "Job" in owners and KSERVE_CLAIM in volumes and {"model", "node"} <= set(labels):
        return PodRole.DOWNLOAD_JOB
    return PodRole.USER
