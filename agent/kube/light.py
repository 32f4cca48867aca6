"""The parts of the `kubernetes` package that we need, without the rest of it.

Its top package imports a class for every kind of the Kubernetes API, twice (the blocking client and
the async one): 108 MiB and 2 s, measured, in a process that may have 110 MiB. We speak JSON, and
need only its configuration loaders (kubeconfig with all its ways to log in, in-cluster) and its
connection. So the three packages on the way are entered without running their `__init__`: 4 MiB.
Where somebody has imported the whole package already, that one is used.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

_PACKAGES = ("kubernetes", "kubernetes.aio", "kubernetes.aio.client")


def _enter() -> None:
    if "kubernetes" in sys.modules:
        return
    spec = find_spec("kubernetes")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package kubernetes is not installed")
    root = spec.submodule_search_locations[0]
    for name in _PACKAGES:
        package = ModuleType(name)
        package.__path__ = [root + name.removeprefix("kubernetes").replace(".", "/")]
        sys.modules[name] = package
    from kubernetes.aio.client.configuration import Configuration

    # What the loaders ask of the package. They make no ApiClient unless asked for one.
    client = sys.modules["kubernetes.aio.client"]
    client.Configuration = Configuration  # type: ignore[attr-defined]
    client.ApiClient = None  # type: ignore[attr-defined]


_enter()

from kubernetes.aio.client.configuration import Configuration  # noqa: E402
from kubernetes.aio.client.rest import RESTClientObject  # noqa: E402
from kubernetes.aio.config import (  # noqa: E402
    ConfigException,
    load_incluster_config,
    load_kube_config,
)

__all__ = [
    "ConfigException",
    "Configuration",
    "RESTClientObject",
    "load_incluster_config",
    "load_kube_config",
]
