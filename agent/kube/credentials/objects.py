"""Reading a Kubernetes object without a word of what is in it.

A decoder's error holds the text it failed at, so nothing is raised while one is handled.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from agent.errors import AgentError, Reason
from agent.kube.credentials.nouns import Kind, Need

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # RFC 1123 subdomain
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Data:
    """The data of a Secret, or of a ConfigMap, which is not in base64."""

    need: Need
    data: Mapping[str, Any] = field(repr=False)
    annotations: Mapping[str, Any] = field(repr=False)

    def content(self, key: str) -> bytes:
        where, value = f"{self.need}, key {key[:100]!a}", self.data.get(key)
        if key not in self.data:
            raise refused(f"{where}: the secret has no such key")
        if not isinstance(value, str):
            raise refused(f"{where}: it is not a text")
        if self.need.kind is Kind.SECRET:
            return from_base64(where, value)
        return value.encode(errors="surrogatepass")

    def text(self, key: str) -> str:
        content = self.content(key)
        with suppress(UnicodeDecodeError):
            return content.decode()
        raise refused(f"{self.need}, key {key[:100]!a}: it is not UTF-8")


def data_of(need: Need, raw: Any) -> Data:
    annotations = mapping(need, raw, "metadata", "annotations")
    return Data(need, mapping(need, raw, "data"), annotations)


def mapping(where: object, raw: Any, *path: str) -> Mapping[str, Any]:
    """What is at a path, {} where there is nothing."""
    value = raw
    if not isinstance(value, Mapping):
        raise refused(f"{where} is not an object")
    for depth, name in enumerate(path, start=1):
        value = value.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise refused(f"{where}: {'.'.join(path[:depth])} is not an object")
    return value


def objects_of(where: object, raw: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    listed = raw.get(name) or []
    if not isinstance(listed, list):
        raise refused(f"{where}: {name} is not a list")
    for item in listed:
        if not isinstance(item, Mapping):
            raise refused(f"{where}: {name} holds what is not an object")
        yield item


def text_of(where: object, values: Mapping[str, Any], name: str) -> str:
    """What is there by a name, "" where there is nothing."""
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise refused(f"{where}: {name} is not a text")
    return value or ""


def json_object(where: str, text: Any) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):  # the last: a hundred thousand brackets
        value = None
    if not isinstance(value, Mapping):
        raise refused(f"{where}: it is not a JSON object")
    return value


def json_texts(where: str, text: str) -> Mapping[str, str]:
    value = json_object(where, text)
    if not is_texts(value):
        raise refused(f"{where}: it is not an object of texts (quote numbers, true and false)")
    return value


def is_texts(value: Any) -> bool:
    """Half a character (JSON can say one) would fail much later, in words that hold the text."""
    return isinstance(value, Mapping) and all(
        isinstance(part, str) and not _SURROGATE.search(part)
        for pair in value.items()
        for part in pair
    )


def from_base64(where: str, text: str) -> bytes:
    with suppress(ValueError):
        return base64.b64decode(text)
    raise refused(f"{where}: it is not base64")


def named(kind: Kind, namespace: str, name: str) -> Need:
    """Both become part of an API server's path, and come from objects that others write."""
    if not NAME.fullmatch(namespace):
        raise refused(f"the namespace in which a {kind} is looked up is not a name")
    if not NAME.fullmatch(name):
        raise refused(f"a {kind} is named in {namespace} by what is not a name")
    return Need(kind, namespace, name)


def field_of(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(f"{name} is not a text")
    return value or ""


def invalid(message: str) -> AgentError:
    return AgentError(Reason.INVALID_SPEC, message)


def refused(message: str) -> AgentError:
    """To be tried again: objects are created and mended without a word to us."""
    return AgentError(Reason.UNAUTHORIZED, message)


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """A token as the hub's own client reads it: without the line end that `echo` left in it."""
    return {
        name: re.sub(r"[\r\n]", "", value).strip() if name == "HF_TOKEN" else value
        for name, value in environment.items()
    }
