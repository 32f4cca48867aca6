"""The certificates role: the Secret is kept fresh, the API servers are told whom to trust (D8).

Every replica shows what the Secret holds. One of them renews it, and writes the authorities into
the `caBundle` of our webhook configurations. `certificates` says what is due, and in which order.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from agent.certificates import Held, Settling, expires_at, from_secret, renewed
from agent.errors import AgentError, Reason
from agent.kube.client import Api, ApiError, Json
from agent.kube.watch import Watch
from agent.metrics import HookMetrics
from agent.tasks import flagged
from agent.tls import ServerTLS

_log = logging.getLogger(__name__)

SECRET = "localmodel-hook"
CONFIGURATION = "localmodel-hook"
"""Of both kinds. It sorts after KServe's `inferenceservice.serving.kserve.io`: the API server calls
webhooks in that order, and ours must see what KServe made of a pod."""

_AGAIN_SECONDS = 5.0
_REGISTRATION = "/apis/admissionregistration.k8s.io/v1"
_KINDS = ("mutatingwebhookconfigurations", "validatingwebhookconfigurations")


class Signing:
    """Our own authority in one Secret."""

    def __init__(
        self,
        api: Api,
        tls: ServerTLS,
        metrics: HookMetrics,
        *,
        namespace: str,
        names: Collection[str],
        leads: Callable[[], bool],
        tell: Callable[[AgentError], None],
        changed: Callable[[], None],
        look_seconds: float,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """`look_seconds` is how often the webhook configurations are read: nobody watches them."""
        self._api = api
        self._tls = tls
        self._metrics = metrics
        self._secrets = f"/api/v1/namespaces/{namespace}/secrets"
        self._names = tuple(names)
        self._leads = leads
        self._tell = tell
        self._changed = changed
        self._look_seconds = look_seconds
        self._clock = clock
        self._ticks = ticks
        self._settling = Settling()
        self._flag = asyncio.Event()
        self._shown: Held | None = None
        self.watch: Watch[Held] = Watch(
            api,
            self._secrets,
            parse=lambda raw: from_secret(raw.get("data") or {}),
            changed=self._heard,
            params={"fieldSelector": f"metadata.name={SECRET}"},
        )

    def wake(self) -> None:
        self._flag.set()

    def _heard(self) -> None:
        """Show what the Secret holds now; what is broken does not replace what works."""
        held = next(iter(self.watch.objects.values()), None)
        if held is not None and held.certificate and held != self._shown:
            self._tls.show(held.certificate, held.key)
            self._shown = held
            self._metrics.certificate_expiry.set(expires_at(held.certificate))
            _log.info("shows a new certificate")
        self._changed()
        self.wake()

    async def run(self) -> None:
        """Renew, where this replica leads; until cancelled."""
        while True:
            delay = self._look_seconds
            if self._leads():
                try:
                    await self._turn()
                except AgentError as error:
                    delay = _AGAIN_SECONDS
                    conflict = isinstance(error, ApiError) and error.status == 409
                    if not conflict:
                        self._tell(AgentError(Reason.CERTIFICATE_FAILED, error.message))
            await flagged(self._flag, delay)

    async def _turn(self) -> None:
        """The configurations are read before the Secret: no bundle is replaced by an older one."""
        configurations = [await self._configuration(kind) for kind in _KINDS]
        secret = await self._api.get(f"{self._secrets}/{SECRET}")
        data = secret.get("data") or {}
        held = from_secret(data)
        hooks = [hook for one in configurations for hook in (one or {}).get("webhooks") or ()]
        bundles = [(hook.get("clientConfig") or {}).get("caBundle") or "" for hook in hooks]
        settled = self._settling.seconds(held, bundles, self._ticks())
        held = renewed(held, names=self._names, now=self._clock(), settled=settled)
        if (wanted := held.to_secret()) != data:
            await self._api.replace(f"{self._secrets}/{SECRET}", {**secret, "data": wanted})
            _log.info("the certificates in the Secret %s are renewed", SECRET)
        for kind, found in zip(_KINDS, configurations, strict=True):
            if found is not None and (changed := _trusting(found, held.ca_bundle)) != found:
                await self._api.replace(f"{_REGISTRATION}/{kind}/{CONFIGURATION}", changed)
                _log.info("%s/%s trusts the authorities of the Secret", kind, CONFIGURATION)

    async def _configuration(self, kind: str) -> Json | None:
        """None where there is none: not every overlay has both."""
        try:
            return await self._api.get(f"{_REGISTRATION}/{kind}/{CONFIGURATION}")
        except ApiError as error:
            if error.status != 404:
                raise
            return None


def _trusting(configuration: Mapping[str, Any], bundle: str) -> Json:
    hooks = [
        {**hook, "clientConfig": {**(hook.get("clientConfig") or {}), "caBundle": bundle}}
        for hook in configuration.get("webhooks") or ()
    ]
    return {**configuration, "webhooks": hooks}
