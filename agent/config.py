"""Settings: read once, by `app`. Flags win over the environment, which wins over the defaults."""

import argparse
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agent import layout
from agent.errors import AgentError, Reason
from agent.model import FilePolicy
from agent.quantities import parse_duration, parse_size

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")
_Name = TypeVar("_Name", bound=StrEnum)

_DAY = 86400.0


def _default_root() -> Path:
    try:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError as error:
        raise _invalid("there is no home directory to keep a cache in; give --root") from error
    return Path(base) / "localmodel"


def _directory(text: str) -> Path:
    """Absolute, because it is shown to people who are somewhere else."""
    return Path(text).absolute()


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _one_of(kind: type[_Name]) -> Callable[[str], _Name]:
    def parse(text: str) -> _Name:
        if text not in tuple(kind):
            raise ValueError(f"{text!r} is not {' or '.join(kind)}")
        return kind(text)

    return parse


def _setting(
    help: str, *, parse: Callable[[str], Any] = str, variable: str = "", **options: Any
) -> Any:
    """A field with its documentation: the help text of its flag, and of docs/settings.md.

    `variable` is its name in the environment, where the field gives another one than its own.
    """
    return field(metadata={"help": help, "parse": parse, "variable": variable}, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one agent runs. Each field is a flag `--<name>` and a variable `LOCALMODEL_<NAME>`,
    but for the names that a pod's downward API gives (`NODE_NAME`)."""

    root: Path = _setting(
        "the cache: the directory that the serving pods' volume points at (default:"
        " ~/.cache/localmodel)",
        parse=_directory,
        default_factory=_default_root,
    )
    state: Path | None = _setting(
        "where the index and the socket are, on this machine and never on a shared volume"
        " (default: <root>/.localmodel/state)",
        parse=_directory,
        default=None,
    )
    desired: Path | None = _setting(
        "a directory of LocalModelCache YAML: what this machine should hold",
        parse=_directory,
        default=None,
    )
    node_name: str | None = _setting(
        "the node of a cluster to work for: read its LocalModelNode, and say there what is here",
        variable="NODE_NAME",
        default=None,
    )
    pod_name: str | None = _setting(
        "the agent's own pod, where it runs in one", variable="POD_NAME", default=None
    )
    pod_namespace: str = _setting(
        "the namespace of the agent, and of its Lease",
        variable="POD_NAMESPACE",
        default="localmodel-system",
    )
    kserve_namespace: str = _setting(
        "where KServe has its ConfigMap inferenceservice-config", default="kserve"
    )
    require_dedicated: bool = _setting(
        "refuse a cache that is on the machine's own file system, also at the first start",
        parse=_boolean,
        default=False,
    )
    listen: str = _setting(
        "[host]:port of /metrics, /healthz and /readyz; no host: all addresses",
        default="127.0.0.1:9810",
    )
    connections: int = _setting("files in flight at once, over all models", parse=int, default=8)
    max_fetches: int = _setting("models in flight at once", parse=int, default=2)
    max_rate: int | None = _setting(
        "bandwidth cap of all downloads together, bytes a second, as 200Mi (default: none)",
        parse=parse_size,
        default=None,
    )
    stall_seconds: float = _setting(
        "a source that sends next to nothing for so long is tried again",
        parse=float,
        default=30.0,
    )
    high: float | None = _setting(
        "percent of the file system above which nothing is begun (default: 95; on a node whose"
        " kubelet has the same file system 78)",
        parse=float,
        default=None,
    )
    low: float | None = _setting(
        "percent of the file system down to which room is made (default: 90; on a node whose"
        " kubelet has the same file system 72)",
        parse=float,
        default=None,
    )
    limit: int | None = _setting(
        "what the cache itself may take, as 500Gi, however much room there is (default: none)",
        parse=parse_size,
        default=None,
    )
    min_age: float = _setting(
        "a model is no victim for so long after it came, as 10m",
        parse=parse_duration,
        default=600.0,
    )
    file_policy: FilePolicy = _setting(
        "what is done about files that run code when they are loaded (pickle) and broken"
        " safetensors: warn, refuse or off; a node group's annotation file-policy wins",
        parse=_one_of(FilePolicy),
        default=FilePolicy.WARN,
    )
    scrub_days: float = _setting(
        "every model is read and hashed again after so many days; 0: never",
        parse=float,
        default=30.0,
    )
    scrub_rate: int = _setting(
        "how fast that is done, bytes a second, as 100Mi", parse=parse_size, default=100 * 1024**2
    )
    retain: float | None = _setting(
        "how long a model is kept that left the desired state, unless its room is needed"
        " (default: 7d; in a cluster 0s, as KServe)",
        parse=parse_duration,
        default=None,
    )

    def __post_init__(self) -> None:
        if self.node_name and self.desired:
            raise _invalid("--desired is for a machine without a cluster: NODE_NAME names a node")
        self.marks(shared=False)
        if self.scrub_rate < 1 or not 0 <= self.scrub_days <= 3650:
            raise _invalid("--scrub-rate must be greater than 0, and --scrub-days from 0 to 3650")
        if self.limit is not None and self.limit < 1:
            raise _invalid("--limit must be greater than 0")
        if self.connections < 1 or self.max_fetches < 1:
            raise _invalid("--connections and --max-fetches must be at least 1")
        if not 0 < self.stall_seconds <= _DAY:  # also not a number that is none
            raise _invalid("--stall-seconds must be greater than 0, and a day at most")
        if self.max_rate is not None and self.max_rate < 1:
            raise _invalid("--max-rate must be greater than 0")
        listen_address(self.listen)

    def marks(self, *, shared: bool) -> tuple[float, float]:
        """The high and the low mark, in percent; `shared`: kubelet has the same file system.

        Its image garbage collection begins at 85 percent and stops at 80, and finds no images to
        blame where models fill the disk: it would delete those of the node for ever (design D6).
        Raises InvalidSpec.
        """
        high, low = (78.0, 72.0) if shared else (95.0, 90.0)
        high = high if self.high is None else self.high
        low = min(low, high) if self.low is None else self.low
        if not 0 < low <= high <= 100:
            raise _invalid(f"--low {low:g} and --high {high:g} must be 0 < low <= high <= 100")
        return high, low

    @property
    def state_directory(self) -> Path:
        return self.state or self.root / layout.STATE


class Mode(StrEnum):
    """Who keeps the caches' objects: KServe's controller, or nobody but us."""

    KSERVE = "kserve"
    STANDALONE = "standalone"


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


_KSERVE_ENTRYPOINT = ("/storage-initializer/scripts/initializer-entrypoint",)
_KNOWN_ENTRYPOINTS: Mapping[str, tuple[str, ...]] = {
    "storage-initializer": _KSERVE_ENTRYPOINT,
    # Open Data Hub's and OpenShift AI's builds of the same, on UBI
    "kserve-storage-initializer": _KSERVE_ENTRYPOINT,
    "odh-kserve-storage-initializer-rhel8": _KSERVE_ENTRYPOINT,
    "odh-kserve-storage-initializer-rhel9": _KSERVE_ENTRYPOINT,
}


def _entrypoints(text: str) -> Mapping[str, tuple[str, ...]]:
    """Those that are known, and these."""
    found = dict(_KNOWN_ENTRYPOINTS)
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, command = part.partition("=")
        words = tuple(shlex.split(command))
        if not name or "/" in name or not words or not words[0].startswith("/"):
            raise ValueError(f"{part!r} is not NAME=/path/of/its/entrypoint")
        found[name] = words
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """How one replica of the controller runs; flags and variables as those of the agent."""

    mode: Mode = _setting(
        "required; kserve: beside KServe's local model controller; standalone: without it, keeping"
        " nothing where it runs",
        parse=_one_of(Mode),
    )
    listen: str = _setting(
        "[host]:port of the hook, by TLS; no host: all addresses", default=":9443"
    )
    health_listen: str = _setting(
        "[host]:port of /metrics, /healthz and /readyz; no host: all addresses",
        default="127.0.0.1:9810",
    )
    names: tuple[str, ...] = _setting(
        "what the API server calls the hook by, separated by commas (default: the names of the"
        " Service localmodel-hook)",
        parse=_names,
        default=(),
    )
    tls_dir: Path | None = _setting(
        "a directory with tls.crt and tls.key for the hook, which somebody else renews (default:"
        " our own authority, in the Secret localmodel-hook)",
        parse=_directory,
        default=None,
    )
    pod_name: str | None = _setting(
        "the controller's own pod, where it runs in one", variable="POD_NAME", default=None
    )
    pod_namespace: str = _setting(
        "the namespace of the controller, and of the agents' Leases",
        variable="POD_NAMESPACE",
        default="localmodel-system",
    )
    kserve_namespace: str = _setting(
        "where KServe has its ConfigMap inferenceservice-config", default="kserve"
    )
    entrypoints: Mapping[str, tuple[str, ...]] = _setting(
        "what more images of storage initializers run, as NAME=COMMAND by the last part of the"
        " image's name, separated by commas; those of KServe and Open Data Hub are known, and a pod"
        " with any other image is left alone",
        parse=_entrypoints,
        default_factory=lambda: _KNOWN_ENTRYPOINTS,
    )
    drain_seconds: float = _setting(
        "how long the hook goes on answering after SIGTERM, while the API servers hear of it",
        parse=float,
        default=5.0,
    )

    def __post_init__(self) -> None:
        hook, health = (
            listen_address(self.listen),
            listen_address(self.health_listen, "--health-listen"),
        )
        if hook[1] == health[1] != 0:
            raise _invalid("--listen and --health-listen must be two ports")
        if not 0 <= self.drain_seconds <= 60:
            raise _invalid("--drain-seconds must be from 0 to 60")


def listen_address(text: str, flag: str = "--listen") -> tuple[str, int]:
    """`host:port` or `[v6]:port`; or `:port` for all addresses of both kinds, whose host is "".
    Raises InvalidSpec naming the flag."""
    host, separator, port = text.rpartition(":")
    if not separator or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise _invalid(f"{flag} {text!r} must be host:port, for example 127.0.0.1:9810, or :port")
    return host.strip("[]"), int(port)


def variable_of(setting: "Field[Any]") -> str:
    """The name of a setting in the environment."""
    return setting.metadata["variable"] or f"LOCALMODEL_{setting.name.upper()}"


def add_flags(
    parser: argparse.ArgumentParser, *names: str, of: "type[DataclassInstance]" = Settings
) -> None:
    """Add the flags of these settings, or of all. What is not given stays out of the namespace."""
    for setting in fields(of):
        if not names or setting.name in names:
            options: dict[str, Any] = {"metavar": setting.name.upper()}
            if setting.type is bool:
                options |= {"nargs": "?", "const": "true"}
            parser.add_argument(
                f"--{setting.name.replace('_', '-')}",
                dest=setting.name,
                default=argparse.SUPPRESS,
                help=setting.metadata["help"],
                **options,
            )


def read(flags: Mapping[str, Any], environment: Mapping[str, str], of: type[S]) -> S:
    """The settings of this process. Raises InvalidSpec naming the flag or the variable."""
    values: dict[str, Any] = {}
    for setting in fields(of):
        variable = variable_of(setting)
        flag = f"--{setting.name.replace('_', '-')}"
        name, text = (
            (flag, flags[setting.name])
            if setting.name in flags
            else (variable, environment.get(variable))
        )
        if text is None or (text == "" and name == variable):
            if setting.default is MISSING and setting.default_factory is MISSING:
                raise _invalid(f"{flag} is missing: {setting.metadata['help']}")
            continue
        if text == "":
            raise _invalid(f"{flag} is empty")
        try:
            values[setting.name] = setting.metadata["parse"](text)
        except ValueError as error:
            raise _invalid(f"{name}: {error}") from error
    return of(**values)


def unify_ca_variables(environment: dict[str, str] | os._Environ[str]) -> None:
    """One CA bundle for every library: OpenSSL reads SSL_CERT_FILE, users often set another."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if environment.get(name) and not environment.get("SSL_CERT_FILE"):
            environment["SSL_CERT_FILE"] = environment[name]


def _invalid(message: str) -> AgentError:
    return AgentError(Reason.INVALID_SPEC, message)
