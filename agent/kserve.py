"""What KServe's own objects say to node agents and to the hook: a ConfigMap, storage containers.

Watched and not asked for (design D16, kserve.md 9.1.10). Both may be absent, or not ours to read:
then KServe's defaults hold, and the log says so once.
"""

import logging
from collections.abc import Callable
from typing import Any

from agent.kube import parse
from agent.kube.client import Api, Json
from agent.kube.credentials import CONFIG_MAP, DEFAULT_JOB_NAMESPACE, Kind, Need
from agent.kube.watch import Watch

_log = logging.getLogger(__name__)

_NONE = frozenset({403, 404})


class KServe:
    """Its configuration as it is now. `namespace` is where it has its ConfigMap."""

    def __init__(self, api: Api, *, namespace: str, changed: Callable[[], None]) -> None:
        self._need = Need(Kind.CONFIG_MAP, namespace, CONFIG_MAP)
        self._changed = changed
        self._there: bool | None = None
        self._config: Watch[Json] = Watch(
            api,
            f"/api/v1/namespaces/{namespace}/configmaps",
            parse=parse.config_map,
            changed=self._heard,
            params={"fieldSelector": f"metadata.name={CONFIG_MAP}"},
            none_on=_NONE,
        )
        self._containers: Watch[Json] = Watch(
            api,
            f"/apis/{parse.GROUP}/{parse.VERSION}/clusterstoragecontainers",
            parse=parse.storage_container,
            changed=changed,
            none_on=_NONE,
        )

    @property
    def watches(self) -> tuple[Watch[Any], ...]:
        return self._config, self._containers

    @property
    def containers(self) -> Json:
        """As a list, by name: the API server's own order."""
        found = self._containers.objects
        return {"items": [found[name] for name in sorted(found)]}

    @property
    def look_seconds(self) -> float | None:
        """How often it wants models to be looked at, at least; None where it does not say."""
        return parse.look_seconds(self._map)

    @property
    def job_namespace(self) -> str:
        """Where its download Jobs are."""
        return parse.job_namespace(self._map) or DEFAULT_JOB_NAMESPACE

    def read(self, need: Need) -> tuple[bool, Any]:
        """Whether this object is watched, and what it is; None where there is none."""
        if need.kind is Kind.STORAGE_CONTAINERS:
            return True, self.containers
        if need == self._need:
            return True, self._map
        return False, None

    @property
    def _map(self) -> Json | None:
        return next(iter(self._config.objects.values()), None)

    def _heard(self) -> None:
        there = self._map is not None
        if there is not self._there and self._config.current:
            self._there = there
            told = "is read" if there else "is not there, or not ours to read: its defaults hold"
            _log.info("%s %s", self._need, told)
        self._changed()
