"""The credentials that a cache names, read at use and by name (design D11, kserve.md 5.2).

What must be read is decided in `kube.credentials`; here it is read, and kept for a minute: a model
of many files asks often, and a Secret that was mended should be believed soon. What is the same for
all caches is watched (`kserve`), and asked for by nobody.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from agent.errors import AgentError, Reason
from agent.kube.client import Api, ApiError
from agent.kube.credentials import PATTERNS, Credentials, Kind, Need, ask, needs, resolve
from agent.model import Want
from agent.sources import OWN, Given
from agent.threads import changing

_log = logging.getLogger(__name__)

_KEPT_SECONDS = 60.0
_PATHS: Mapping[Kind, str] = {
    Kind.CONFIG_MAP: "/api/v1/namespaces/{namespace}/configmaps/{name}",
    Kind.SERVICE_ACCOUNT: "/api/v1/namespaces/{namespace}/serviceaccounts/{name}",
    Kind.SECRET: "/api/v1/namespaces/{namespace}/secrets/{name}",
}


Watched = Callable[[Need], tuple[bool, Any]]


class Access:
    """Reads as this agent. `config_namespace` is where KServe has its configuration; `watched` says
    of an object whether it is known without asking, and what it is; `authorities` makes a file of a
    CA bundle, and waits for a disk."""

    def __init__(
        self,
        api: Api,
        *,
        config_namespace: str,
        watched: Watched,
        authorities: Callable[[str], str],
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._config_namespace = config_namespace
        self._watched = watched
        self._authorities = authorities
        self._ticks = ticks
        self._read: dict[Need, tuple[float, Any]] = {}

    async def given(self, want: Want) -> Given:
        """What a source is to work with for one model.

        Raises Unauthorized for what is missing, malformed or of no use outside of a container, and
        Forbidden for what must not be read.
        """
        if not want.access:
            return OWN
        asked = ask(json.loads(want.access), config_namespace=self._config_namespace)
        objects: dict[Need, Any] = {}
        while wanted := needs(asked, objects):
            objects |= {need: await self._object(need) for need in wanted}
        found = resolve(asked, objects)
        _refuse_what_is_not_carried(found, want.ref.uri)
        # Patterns are a part of what is wanted, and nobody's credentials.
        environment = {k: v for k, v in found.environment.items() if k not in PATTERNS}
        # Where it names its own, nobody else's may stand in for them (design D12).
        mine = not found.own and not environment
        return Given(None if mine else environment, await self._trusted(found))

    async def _trusted(self, found: Credentials) -> str:
        """The file of those whom TLS trusts; "" for whom the machine trusts."""
        if not found.ca_bundle:
            return ""
        try:
            return await changing(lambda: self._authorities(found.ca_bundle))
        except AgentError as error:
            named = ", ".join(map(str, found.sources))
            raise AgentError(error.reason, f"{error.message} (from {named})") from error

    async def _object(self, need: Need) -> Any:
        known, found = self._watched(need)
        if known:
            return found
        kept = self._read.get(need)
        if kept is not None and self._ticks() - kept[0] < _KEPT_SECONDS:
            return kept[1]
        path = _PATHS[need.kind].format(namespace=need.namespace, name=need.name)
        try:
            found = await self._api.get(path)
        except ApiError as error:
            common = need.kind is Kind.CONFIG_MAP and need.namespace == self._config_namespace
            if error.status not in (403, 404):
                raise
            if error.status == 404 and not common:
                return None  # it may be made at any moment
            if common:
                # The bundle of the whole cluster: TLS says so where a server needs it.
                if need not in self._read:
                    _log.warning("%s, which KServe's configuration names: %s", need, error.message)
                self._read[need] = self._ticks(), None
                return None
            raise AgentError(
                Reason.FORBIDDEN,
                f"{need} must not be read; bind the role localmodel-agent-credentials there",
            ) from error
        self._read[need] = self._ticks(), found
        return found


def _refuse_what_is_not_carried(found: Credentials, uri: str) -> None:
    """What a container would have, and a source of ours does not: said, not left out.

    Tried again, because the object may be changed.
    """
    if found.uri != uri:
        raise AgentError(
            Reason.UNAUTHORIZED, f"write the scheme and the bucket into sourceModelUri of {uri}"
        )
    if found.web_identity is not None and "AWS_ACCESS_KEY_ID" not in found.environment:
        raise AgentError(
            Reason.UNAUTHORIZED,
            "a role for a ServiceAccount (IRSA) is not assumed for it; give the role to the"
            " agent's own ServiceAccount, or keys in a Secret",
        )
