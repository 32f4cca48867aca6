"""The values that credentials are made of. No `repr` shows what came from a Secret."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What is read. All but the last by name; that one is listed, for any of them may match."""

    CONFIG_MAP = "ConfigMap"
    SERVICE_ACCOUNT = "ServiceAccount"
    SECRET = "Secret"
    STORAGE_CONTAINERS = "ClusterStorageContainers"


@dataclass(frozen=True, slots=True)
class Need:
    """One object to read; for STORAGE_CONTAINERS the list, as the API server answers it."""

    kind: Kind
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.name else str(self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one cache says of its credentials, and where they are looked up.

    An empty `service_account` and no `storage_key`: it names none. An empty `storage_key` is not
    none: KServe then looks for `default` or `default_<type>`. `job_namespace` wins over the
    ConfigMap's. `annotations` may name another secret; KServe's agent gives none of a cache.
    """

    uri: str
    config_namespace: str
    job_namespace: str = ""
    service_account: str = ""
    storage_key: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)
    annotations: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebIdentity:
    """An AWS role that this ServiceAccount may assume with a token of its own (IRSA).

    KServe's Jobs never did (kserve.md 3.4). Static keys beside it win, as in AWS's own order.
    """

    role: str
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Credentials:
    """What a source may use for one cache. `repr` says where it is from, and nothing of it.

    `uri` is what to read: the cache's own, but where it has a placeholder for a scheme.
    `environment` has KServe's names; an empty value is as good as none. `files` are those that a
    variable names, by their path in KServe's container. `ca_bundle` is PEM, to be trusted beside
    the machine's own; `AWS_CA_BUNDLE`, a path in that container, says nothing here.
    `own`: the cache itself names credentials, found or not, so that nobody else's may stand in for
    them, and they must be proven before it is ready (design D12). `absent` are the account and the
    secrets that were named and are not there, which KServe bears: worth telling who is then refused
    by the source.
    """

    uri: str
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    ca_bundle: str = ""
    web_identity: WebIdentity | None = None
    own: bool = False
    sources: tuple[Need, ...] = ()
    absent: tuple[Need, ...] = ()

    def __repr__(self) -> str:
        return f"<Credentials from {', '.join(map(str, self.sources)) or 'nowhere'}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Credentials in the making."""

    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    certificate: str = field(default="", repr=False)
    web_identity: WebIdentity | None = None

    def over(self, lower: "Part") -> "Part":
        return Part(
            environment={**lower.environment, **self.environment},
            files={**lower.files, **self.files},
            certificate=self.certificate or lower.certificate,
            web_identity=self.web_identity or lower.web_identity,
        )


Steps = Generator[tuple[Need, ...], tuple[Any, ...], Any]
"""Says which objects it needs next, is sent them (None for one that is not there), returns."""
