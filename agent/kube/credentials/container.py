"""A ClusterStorageContainer: what each download of a kind of URI gets (kserve.md 1.5, 3.4)."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from agent.kube.credentials.nouns import Kind, Need, Part, Steps
from agent.kube.credentials.objects import (
    NAME,
    clean,
    data_of,
    json_texts,
    mapping,
    named,
    objects_of,
    refused,
    text_of,
)
from agent.kube.credentials.spec import spec_part

_DOWNLOADS = "localModelDownloadJob"  # the workloadType that is about us (kserve.md 1.5)
PATTERNS = ("STORAGE_ALLOW_PATTERNS", "STORAGE_IGNORE_PATTERNS")
_REFERENCE = re.compile(r"\$\$|\$\(([^)]*)\)")  # Kubernetes' own, in a container's env


def storage_container(uri: str, raw: Any, namespace: str) -> Steps:
    """The environment of the one for this URI."""
    if (found := matching(uri, raw)) is None:
        return Part()
    where, container = found
    environment = yield from _container_environment(where, container, namespace)
    return _applied(where, environment)


def matching(uri: str, raw: Any) -> tuple[str, Mapping[str, Any]] | None:
    """The container of the first that is for downloads and supports the URI, and what to call it.

    `raw` is the list as the API server answers it; None where there is no such kind.
    """
    need = Need(Kind.STORAGE_CONTAINERS)
    items = {} if raw is None else mapping(need, {"answer": raw}, "answer")
    for item in objects_of(need, items, "items"):
        name = text_of(need, mapping(need, item, "metadata"), "name")
        where = f"ClusterStorageContainer {name if NAME.fullmatch(name) else '?'}"
        spec = mapping(where, item, "spec")
        if item.get("disabled") is True or spec.get("workloadType") != _DOWNLOADS:
            continue
        if _supports(where, spec, uri):
            return where, mapping(where, spec, "container")
    return None


def _supports(where: str, spec: Mapping[str, Any], uri: str) -> bool:
    """By a prefix, else by a regular expression that matches anywhere."""
    for entry in objects_of(where, spec, "supportedUriFormats"):
        if prefix := text_of(where, entry, "prefix"):
            if uri.startswith(prefix):
                return True
        elif pattern := text_of(where, entry, "regex"):
            try:
                if re.search(pattern, uri):
                    return True
            except (re.error, OverflowError, RecursionError) as error:
                message = f"{where}: a regex of its supportedUriFormats is none that we can read"
                raise refused(message) from error
    return False


def _container_environment(where: str, container: Mapping[str, Any], namespace: str) -> Steps:
    """`envFrom`, then `env`, as kubelet does; what needs a pod (`fieldRef`) is left out."""
    environment: dict[str, str] = {}
    for item in objects_of(where, container, "envFrom"):
        for kind, reference in _references(where, item, "Ref"):
            values = yield from _values(where, kind, reference, namespace)
            prefix = text_of(where, item, "prefix")
            environment |= {prefix + key: values.text(key) for key in values.data}
    if late := environment.keys() & set(PATTERNS):
        # They were to be known before anything was asked of a source: see `patterns`.
        raise refused(f"{where}: {min(late)} must be a value of `env`, not of `envFrom`")
    for item in objects_of(where, container, "env"):
        name, source = text_of(where, item, "name"), mapping(where, item, "valueFrom")
        if not source:
            environment[name] = _expanded(text_of(where, item, "value"), environment)
        for kind, reference in _references(where, source, "KeyRef"):
            values = yield from _values(where, kind, reference, namespace)
            key = text_of(where, reference, "key")
            if key in values.data:
                environment[name] = values.text(key)
            elif reference.get("optional") is not True:
                raise refused(f"{where}: {values.need} has no key {key[:100]!a}")
    return environment


def _references(
    where: str, raw: Mapping[str, Any], suffix: str
) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
    for name, kind in ((f"secret{suffix}", Kind.SECRET), (f"configMap{suffix}", Kind.CONFIG_MAP)):
        if name in raw:
            yield kind, mapping(where, raw, name)


def _values(where: str, kind: Kind, reference: Mapping[str, Any], namespace: str) -> Steps:
    need = named(kind, namespace, text_of(where, reference, "name"))
    (raw,) = yield (need,)
    if raw is None and reference.get("optional") is not True:
        key = reference.get("key")
        wanted = f", key {key[:100]!a}" if isinstance(key, str) else ""
        raise refused(f"{where}: {need}{wanted} is missing")
    return data_of(need, {} if raw is None else raw)


def _expanded(value: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` of what was set above it; `$$` is a dollar; an unknown name stays as it is."""

    def put(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return _REFERENCE.sub(put, value)


def _applied(where: str, environment: dict[str, str]) -> Part:
    """A container may have STORAGE_CONFIG itself: the initializer reads it wherever it is from."""
    entry = dict(json_texts(f"{where}, STORAGE_CONFIG", environment.pop("STORAGE_CONFIG", "{}")))
    override = environment.pop("STORAGE_OVERRIDE_CONFIG", "{}")
    entry |= json_texts(f"{where}, STORAGE_OVERRIDE_CONFIG", override)
    return spec_part(where, entry.get("type", ""), entry).over(Part(environment=clean(environment)))
