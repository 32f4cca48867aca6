"""Custom resources -> our nouns: the only file that knows their field names. Pods: `podspec`."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent.errors import AgentError, Reason
from agent.layout import is_one_line
from agent.model import FilePolicy, ModelRef, Want
from agent.quantities import parse_duration, parse_size

GROUP = "serving.kserve.io"
VERSION = "v1alpha1"
ANNOTATIONS = "localmodel-agent.io"

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # RFC 1123 subdomain
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One LocalModelCache, as far as a node cares."""

    name: str
    want: Want


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMeta:
    """A cache without its spec: what a node watches of it (design D16)."""

    kind: str
    namespace: str
    name: str
    uid: str
    created: str
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One entry of a LocalModelNode. `name` is the key of its status (kserve.md 9.1.3); `guarded`:
    it is of a namespace and names credentials (design D12)."""

    name: str
    namespace: str
    model: str
    uri: str
    group: str
    access: str = ""
    guarded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeObject:
    """A LocalModelNode. `refused` are entries that nobody can understand, with what is wrong."""

    uid: str
    version: str
    entries: tuple[ModelEntry, ...]
    refused: tuple[tuple[str, str], ...]
    status: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A LocalModelNodeGroup. `path` is the directory of its volume on a node, "" for a volume that
    has none (NFS, CSI); `limit` what its models may take on each node, in bytes, None for a size
    that nobody can read; `file_policy` what its annotation says, None for none."""

    name: str
    path: str
    limit: int | None = None
    file_policy: FilePolicy | None = None


def cache(raw: Any) -> Cache:
    """A LocalModelCache from its object. Raises InvalidSpec naming the field."""
    if not isinstance(raw, Mapping):
        raise _invalid("the document is not an object")
    if raw.get("apiVersion") != f"{GROUP}/{VERSION}":
        raise _invalid(f"apiVersion is {_shown(raw.get('apiVersion'))}, not {GROUP}/{VERSION}")
    if raw.get("kind") != "LocalModelCache":
        raise _invalid(f"kind is {_shown(raw.get('kind'))}, not LocalModelCache")
    metadata = mapping_of(raw, "metadata")
    name = metadata.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _invalid(
            f"metadata.name {_shown(name)} is not a name (lower case letters, digits, - and .)"
        )
    spec = mapping_of(raw, "spec")
    uri = source_uri(spec, "spec.sourceModelUri")
    asked = want(uri, name, _annotations(metadata))
    return Cache(name=name, want=replace(asked, floor=size_of(spec.get("modelSize")) or 0))


def want(
    uri: str,
    name: str,
    annotations: Mapping[str, str],
    *,
    group: str = "",
    files: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> Want:
    """What a cache asks for. `files` are the patterns, to take and to leave out, where the cache
    itself says nothing of either; an empty annotation says: none. Raises InvalidSpec naming the
    annotation."""
    notes = _ours(annotations)
    on_demand = _one_of(notes, "policy", "eager", "on-demand") == "on-demand"
    if "ttl" in notes and not on_demand:
        raise _invalid(
            f"the annotation {ANNOTATIONS}/ttl needs {ANNOTATIONS}/policy: on-demand; an eager"
            " model is always here"
        )
    ref = ModelRef(
        uri=uri,
        include=patterns(notes["include"]) if "include" in notes else files[0],
        exclude=patterns(notes["exclude"]) if "exclude" in notes else files[1],
    )
    return Want(
        ref=ref,
        names=frozenset({name}),
        priority=_integer(notes, "priority"),
        expect_fingerprint=fingerprint(notes.get("expect-fingerprint")),
        on_demand=on_demand,
        pinned=_one_of(notes, "pin", "false", "true") == "true",
        ttl_seconds=_seconds(notes, "ttl"),
        retain_seconds=_seconds(notes, "retain"),
        groups=frozenset({group} if group else ()),
        refresh=notes.get("refresh", ""),
    )


def cache_meta(raw: Mapping[str, Any], kind: str) -> CacheMeta:
    """From a PartialObjectMetadata, whose own kind says nothing."""
    metadata = mapping_of(raw, "metadata")
    return CacheMeta(
        kind=kind,
        namespace=text_of(metadata, "namespace"),
        name=text_of(metadata, "name"),
        uid=text_of(metadata, "uid"),
        created=text_of(metadata, "creationTimestamp"),
        annotations=_ours_only(_annotations(metadata)),
    )


def node(raw: Mapping[str, Any]) -> NodeObject:
    """A LocalModelNode; neither its spec nor its status need be there (kserve-observed.md 13)."""
    metadata = mapping_of(raw, "metadata")
    found = (raw.get("spec") or {}).get("localModels") or []
    entries: dict[str, ModelEntry] = {}
    refused: dict[str, str] = {}
    for item in found:
        model, namespace = text_of(item, "modelName"), text_of(item, "namespace")
        name = f"{namespace}/{model}" if namespace else model
        try:
            uri = source_uri(item, "sourceModelUri")
            if name in entries:
                raise _invalid(f"there are two entries for {name}; only the first is served")
        except AgentError as error:
            refused[name] = error.message
            continue
        entries[name] = ModelEntry(
            name=name,
            namespace=namespace,
            model=model,
            uri=uri,
            group=text_of(item, "nodeGroup"),
            access=_access(item),
            guarded=bool(namespace and (item.get("serviceAccountName") or item.get("storage"))),
        )
    return NodeObject(
        uid=text_of(metadata, "uid"),
        version=text_of(metadata, "resourceVersion"),
        entries=tuple(entries.values()),
        refused=tuple(refused.items()),
        status=mapping_of(raw, "status") if raw.get("status") else {},
    )


def _access(entry: Mapping[str, Any]) -> str:
    """What `credentials.ask` reads of an entry, in one way of writing it."""
    names = ("sourceModelUri", "serviceAccountName", "storage")
    return json.dumps({name: entry[name] for name in names if name in entry}, sort_keys=True)


def config_map(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Its data: who else wrote into the object is no change of it."""
    return {"data": raw.get("data")}


def storage_container(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A ClusterStorageContainer, as `credentials` reads it. What is wrong in it is said there, to
    those whom it concerns: left out, it would be as if it did not match them."""
    name = text_of(mapping_of(raw, "metadata"), "name")
    return {"metadata": {"name": name}, "spec": raw.get("spec"), "disabled": raw.get("disabled")}


def look_seconds(config: Mapping[str, Any] | None) -> float | None:
    """KServe's `reconcilationFrequencyInSecs` (its spelling); None where it says none."""
    value = _local_model(config).get("reconcilationFrequencyInSecs")
    return float(value) if type(value) is int and 0 < value < 2**31 else None


def job_namespace(config: Mapping[str, Any] | None) -> str:
    """Where KServe's download Jobs and their claims are; "" where it does not say."""
    value = _local_model(config).get("jobNamespace")
    return value if isinstance(value, str) else ""


def _local_model(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What the ConfigMap says of the cache; what is wrong in it is said where it is used."""
    try:
        section = json.loads(((config or {}).get("data") or {}).get("localModel") or "{}")
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return section if isinstance(section, Mapping) else {}


def group(raw: Mapping[str, Any]) -> Group:
    volume = (raw.get("spec") or {}).get("persistentVolumeSpec") or {}
    source = volume.get("local") or volume.get("hostPath") or {}
    metadata = mapping_of(raw, "metadata")
    return Group(
        name=text_of(metadata, "name"),
        path=text_of(source, "path"),
        limit=size_of((raw.get("spec") or {}).get("storageLimit")),
        file_policy=_file_policy(_annotations(metadata).get(f"{ANNOTATIONS}/file-policy")),
    )


def _file_policy(text: Any) -> FilePolicy | None:
    """Who writes it wants something to be done: a word that nobody knows is the strictest."""
    if text is None:
        return None
    known = [policy for policy in FilePolicy if policy == text]
    return known[0] if known else FilePolicy.REFUSE


def patterns(text: str) -> tuple[str, ...]:
    """Comma-separated globs."""
    return one_lines(part for part in (part.strip() for part in text.split(",")) if part)


def one_lines(found: Iterable[str]) -> tuple[str, ...]:
    """Globs, each fit for a line of a manifest. Raises InvalidSpec."""
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise _invalid("patterns must be a list of strings")
    result = tuple(found)
    if not all(isinstance(pattern, str) for pattern in result):
        raise _invalid("patterns must be a list of strings")
    for pattern in result:
        if not is_one_line(pattern):
            raise _invalid(f"the pattern {pattern[:100]!a} holds control characters")
    return result


def fingerprint(text: str | None) -> str | None:
    """`sha256:<64 hex digits>`, or None for none. Raises InvalidSpec for anything else."""
    if text is None or (isinstance(text, str) and _FINGERPRINT.fullmatch(text)):
        return text
    raise _invalid(f"the expected fingerprint {_shown(text)} is not sha256:<64 hex digits>")


def source_uri(raw: Mapping[str, Any], field: str) -> str:
    """Raises InvalidSpec naming the field."""
    uri = raw.get("sourceModelUri")
    if not isinstance(uri, str) or not uri or not uri.isprintable():
        raise _invalid(f"{field} {_shown(uri)} is not a URI")
    return uri


def check_not_of_node(uri: str) -> None:
    """Raise Unsupported for files of the node: a tenant who may create a cache could publish the
    agent's own token, or another tenant's model."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme.lower() == "file":
        raise AgentError(
            Reason.UNSUPPORTED,
            f"{uri} is a path, and in a cluster nobody's files are read from a node; use hf://",
        )


def size_of(value: Any) -> int | None:
    """Bytes of a quantity; None for none, 0, or one that nobody can read: KServe itself reads
    neither `modelSize` nor `storageLimit` (kserve.md 1), so a cache must not fail for them."""
    try:
        return parse_size(str(value)) or None
    except ValueError:
        return None


def mapping_of(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if not isinstance(value, Mapping):
        raise _invalid(f"{name} is missing")
    return value


def text_of(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise _invalid(f"{name} is {_shown(value)}, not a text")
    return value or ""


def _annotations(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    found = metadata.get("annotations") or {}
    if not isinstance(found, Mapping):
        raise _invalid("metadata.annotations is not an object")
    return found


def _ours_only(annotations: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in annotations.items() if key.startswith(f"{ANNOTATIONS}/")}


def _ours(annotations: Mapping[str, Any]) -> dict[str, str]:
    """Ours, without their prefix."""
    prefix = f"{ANNOTATIONS}/"
    result = {}
    for key, value in annotations.items():
        if isinstance(key, str) and key.startswith(prefix):
            if not isinstance(value, str):
                raise _invalid(f"the annotation {key} must be a string: quote its value")
            result[key.removeprefix(prefix)] = value
    return result


def _one_of(notes: Mapping[str, str], name: str, *known: str) -> str:
    """The first is the default."""
    found = notes.get(name, known[0])
    if found not in known:
        raise _invalid(f"the annotation {ANNOTATIONS}/{name} is not {' or '.join(known)}")
    return found


def _seconds(notes: Mapping[str, str], name: str) -> float | None:
    if name not in notes:
        return None
    try:
        return parse_duration(notes[name])
    except ValueError as error:
        raise _invalid(f"the annotation {ANNOTATIONS}/{name}: {error}") from error


def _integer(notes: Mapping[str, str], name: str) -> int:
    try:
        return int(notes.get(name, "0"))
    except ValueError as error:
        raise _invalid(f"the annotation {ANNOTATIONS}/{name} is not an integer") from error


def _shown(value: Any) -> str:
    """A value for a message. Only strings, and not much of them: the `repr` of a few nested YAML
    aliases can be larger than the memory of the node.
    """
    return f"{value[:100]!a}" if isinstance(value, str) else f"of type {type(value).__name__}"


def _invalid(message: str) -> AgentError:
    return AgentError(Reason.INVALID_SPEC, message)
