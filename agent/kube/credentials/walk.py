"""The walk over the rules, and its two ends: what must be read next, and what it comes to."""

import posixpath
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agent.kube.credentials.account import service_account
from agent.kube.credentials.config import CONFIG_MAP, Config, config_of
from agent.kube.credentials.container import storage_container
from agent.kube.credentials.nouns import Ask, Credentials, Kind, Need, Part, Steps
from agent.kube.credentials.objects import (
    NAME,
    data_of,
    field_of,
    invalid,
    is_texts,
    named,
    refused,
)
from agent.kube.credentials.spec import storage_spec

_CA_KEY = "cabundle.crt"


def ask(entry: Mapping[str, Any], *, config_namespace: str, job_namespace: str = "") -> Ask:
    """From an entry of a LocalModelNode, or the spec of a cache: both have the same fields.

    Raises InvalidSpec naming the field.
    """
    account = field_of(entry, "serviceAccountName")
    storage = entry.get("storage")
    if storage is not None and not isinstance(storage, Mapping):
        raise invalid("storage is not an object")
    key = None if storage is None or storage.get("key") is None else field_of(storage, "key")
    if storage is not None and key is None and not account:
        account = "default"  # parameters without a key are not read (kserve.md 3.4)
    if account and not NAME.fullmatch(account):
        raise invalid("serviceAccountName is not the name of a ServiceAccount")
    parameters = (storage or {}).get("parameters") or {}
    if not is_texts(parameters):
        raise invalid("storage.parameters is not an object of texts")
    return Ask(
        uri=field_of(entry, "sourceModelUri"),
        config_namespace=config_namespace,
        job_namespace=job_namespace,
        service_account=account,
        storage_key=key,
        parameters=parameters,
    )


def needs(asked: Ask, objects: Mapping[Need, Any]) -> list[Need]:
    """What must be read now, beyond what was. Nothing: `resolve` can answer. Raises AgentError."""
    return _walk(asked, objects)[0]


def resolve(asked: Ask, objects: Mapping[Need, Any]) -> Credentials:
    """From the objects that `needs` asked for, None for one that does not exist.

    Raises Unauthorized naming the object and its key, never what is in it.
    """
    missing, found = _walk(asked, objects)
    if found is None:
        raise LookupError(f"not read yet: {', '.join(map(str, missing))}")
    return found


def _walk(asked: Ask, objects: Mapping[Need, Any]) -> tuple[list[Need], Credentials | None]:
    steps = _steps(asked)
    read: dict[Need, bool] = {}  # and whether it is there
    try:
        wanted = next(steps)
        while True:
            if missing := [need for need in dict.fromkeys(wanted) if need not in objects]:
                return missing, None
            read |= {need: objects[need] is not None for need in wanted}
            wanted = steps.send(tuple(objects[need] for need in wanted))
    except StopIteration as done:
        result: Credentials = done.value
    told = {need: there for need, there in read.items() if need.name not in ("", CONFIG_MAP)}
    return [], replace(
        result,
        sources=tuple(need for need, there in told.items() if there),
        absent=tuple(
            need for need, there in told.items() if not there and need.kind is not Kind.CONFIG_MAP
        ),
    )


def _steps(asked: Ask) -> Steps:
    """The rules, in their order. The container's variables win (kserve.md 9.1.11)."""
    config_need = named(Kind.CONFIG_MAP, asked.config_namespace, CONFIG_MAP)
    containers_need = Need(Kind.STORAGE_CONTAINERS)
    raw_config, raw_containers = yield config_need, containers_need
    config = config_of(config_need, raw_config, asked)
    uri, inline = yield from _inline(asked, config)
    container = yield from storage_container(asked.uri, raw_containers, config.job_namespace)
    found = container.over(inline)
    bundle = yield from _ca_bundle(found, config)
    return Credentials(
        uri=uri,
        environment=found.environment,
        files=found.files,
        ca_bundle=bundle,
        web_identity=found.web_identity,
        own=asked.storage_key is not None or bool(asked.service_account),
    )


def _inline(asked: Ask, config: "Config") -> Steps:
    """What the cache itself names: a key of storage-config, else a ServiceAccount, never both."""
    if asked.storage_key is not None:
        return (yield from storage_spec(asked, config))
    if asked.service_account:
        return asked.uri, (yield from service_account(asked, config))
    return asked.uri, Part()


def _ca_bundle(found: Part, config: Config) -> Steps:
    """The one that the credentials name, which must be there; else the cluster's, if it is there.

    KServe's Jobs have neither; its init containers have both. Without the second, TLS fails and
    says so itself, for the models that need it alone.
    """
    key = posixpath.basename(found.environment.get("AWS_CA_BUNDLE", "")) or _CA_KEY
    unverified = found.environment.get("S3_VERIFY_SSL", "").lower() in ("0", "false")
    name = found.environment.get("AWS_CA_BUNDLE_CONFIGMAP")
    if name and not unverified:
        need = named(Kind.CONFIG_MAP, config.job_namespace, name)
        (raw,) = yield (need,)
        if raw is None:
            raise refused(f"{need}: the ConfigMap of the CA bundle is missing")
        bundle = data_of(need, raw)
        if not (present := next((k for k in (key, _CA_KEY) if k in bundle.data), "")):
            raise refused(f"{need}, key {_CA_KEY}: the ConfigMap has no such key")
        return bundle.text(present)
    if found.certificate or not config.ca_config_map:
        return "" if unverified else found.certificate
    need = named(Kind.CONFIG_MAP, config.namespace, config.ca_config_map)
    (raw,) = yield (need,)
    bundle = data_of(need, {} if raw is None else raw)
    return bundle.text(_CA_KEY) if _CA_KEY in bundle.data else ""
