"""Kubernetes objects -> our nouns. The only file that knows field names of a custom resource."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.errors import AgentError, Reason
from agent.layout import is_one_line
from agent.model import ModelRef, Want

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


def cache(raw: Any) -> Cache:
    """A LocalModelCache from its object. Raises InvalidSpec naming the field."""
    if not isinstance(raw, Mapping):
        raise _invalid("the document is not an object")
    if raw.get("apiVersion") != f"{GROUP}/{VERSION}":
        raise _invalid(f"apiVersion is {_shown(raw.get('apiVersion'))}, not {GROUP}/{VERSION}")
    if raw.get("kind") != "LocalModelCache":
        raise _invalid(f"kind is {_shown(raw.get('kind'))}, not LocalModelCache")
    metadata = _mapping(raw, "metadata")
    name = metadata.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _invalid(
            f"metadata.name {_shown(name)} is not a name (lower case letters, digits, - and .)"
        )
    spec = _mapping(raw, "spec")
    uri = spec.get("sourceModelUri")
    if not isinstance(uri, str) or not uri or not uri.isprintable():
        raise _invalid(f"spec.sourceModelUri {_shown(uri)} is not a URI")
    notes = _annotations(metadata)
    ref = ModelRef(
        uri=uri,
        include=patterns(notes.get("include", "")),
        exclude=patterns(notes.get("exclude", "")),
    )
    return Cache(
        name=name,
        want=Want(
            ref=ref,
            names=frozenset({name}),
            priority=_integer(notes, "priority"),
            expect_fingerprint=fingerprint(notes.get("expect-fingerprint")),
        ),
    )


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


def _mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if not isinstance(value, Mapping):
        raise _invalid(f"{name} is missing")
    return value


def _annotations(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Ours, without their prefix."""
    found = metadata.get("annotations") or {}
    if not isinstance(found, Mapping):
        raise _invalid("metadata.annotations is not an object")
    prefix = f"{ANNOTATIONS}/"
    result = {}
    for key, value in found.items():
        if isinstance(key, str) and key.startswith(prefix):
            if not isinstance(value, str):
                raise _invalid(f"the annotation {key} must be a string: quote its value")
            result[key.removeprefix(prefix)] = value
    return result


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
