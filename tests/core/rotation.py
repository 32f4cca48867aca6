"""Years of certificates in a simulated cluster, with everything late that may be late.

Two API servers get each bundle up to OVERLAP_SECONDS after it was written, two replicas the Secret
up to a minute after; one leader or two at once sleep and die between any two of their calls.
`Cluster.years` raises AssertionError the moment an API server would refuse a replica.
"""

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count

from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from agent.certificates import (
    OVERLAP_SECONDS,
    Held,
    Settling,
    due_in,
    expires_at,
    from_secret,
    renewed,
)

NAMES = ("localmodel-hook.localmodel-system.svc", "localmodel-hook.localmodel-system")
START = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
DAY = 86400.0

_LOAD_SECONDS = 60.0
_SKEW_SECONDS = 60.0
_LOOK_SECONDS = 7 * DAY  # a leader looks at least so often
_DEAD_SECONDS = (5.0, 180.0, 660.0, 7200.0, 5 * DAY)
_PAUSE_SECONDS = (0.01, 0.01, 0.01, 0.01, 0.1, 1.0, 5.0, 120.0, 900.0)
_LEADERLESS_SECONDS = 15 * DAY  # a certificate lives thirty days on after it became due


Waiting = Callable[[Held, float, float], float]
"""What a leader makes of it: what it read, its wall clock, and for how long that was in place."""


def as_told(_: Held, now: float, settled: float) -> float:
    return settled


def accepts(bundle: str, certificate: str, name: str, now: float) -> bool:
    """Whether a client with the rules of browsers and of Go takes this: no name in the subject."""
    if not bundle or not certificate:
        return False
    trusted = Store(x509.load_pem_x509_certificates(bundle.encode()))
    at = datetime.fromtimestamp(now, UTC)
    verifier = PolicyBuilder().store(trusted).time(at).build_server_verifier(x509.DNSName(name))
    try:
        verifier.verify(x509.load_pem_x509_certificate(certificate.encode()), [])
    except VerificationError:
        return False
    return True


@lru_cache(maxsize=1024)
def _accepts_on(bundle: str, certificate: str, day: float) -> bool:
    return all(accepts(bundle, certificate, name, day * DAY) for name in NAMES)


@dataclass(eq=False)
class Versioned:
    """An object of the API server: a write needs the version that was read."""

    value: dict[str, str]
    version: int = 0


@dataclass
class Leader:
    """A turn as the module's docstring has it, one call of the API server at a time."""

    clock: float
    boot: float
    settled: Waiting
    settling: Settling = field(default_factory=Settling)

    def turn(self, cluster: "Cluster") -> Iterator[float]:
        """Yields before each call; the last value is for how long to sleep."""
        configurations = [(c.version, c.value["caBundle"]) for c in cluster.configurations]
        yield 0.0
        version, data = cluster.secret.version, cluster.secret.value
        held = from_secret(data)
        bundles = [bundle for _, bundle in configurations]
        now = cluster.now + self.clock
        seconds = self.settling.seconds(held, bundles, cluster.now + self.boot)
        settled = self.settled(held, now, seconds)
        new = renewed(held, names=NAMES, now=now, settled=settled)
        wrote = False
        if new.to_secret() != data:
            yield 0.0
            if not cluster.write(cluster.secret, version, new.to_secret()):
                yield 1.0
                return
            wrote = True
        for configuration, (seen, bundle) in zip(
            cluster.configurations, configurations, strict=True
        ):
            if bundle != new.ca_bundle:
                yield 0.0
                if not cluster.write(configuration, seen, {"caBundle": new.ca_bundle}):
                    yield 1.0
                    return
                wrote = True
        if wrote:  # its own change wakes it
            yield 1.0
        else:
            cluster.last_turn = cluster.now
            wait = due_in(new, names=NAMES, now=now, settled=settled)
            yield min(max(wait, 1.0), _LOOK_SECONDS)


class Cluster:
    def __init__(self, dice: random.Random, settled: Waiting = as_told) -> None:
        self.now = START
        self.last_turn = START
        self.secret = Versioned({})
        self.configurations = [Versioned({"caBundle": ""}), Versioned({"caBundle": ""})]
        self.authorities: set[str] = set()
        self.certificates: set[str] = set()
        self.most_trusted = 0
        self.calls = 0
        self._dice = dice
        self._settled = settled
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._bundles = {(s, c): "" for s in range(2) for c in range(2)}  # server, configuration
        self._shown = ["", ""]  # by each replica
        self._skews = [dice.uniform(-_SKEW_SECONDS, _SKEW_SECONDS) for _ in range(2)]

    def years(self, years: float) -> Held:
        """Live on; what the Secret holds in the end."""
        end = START + years * 365 * DAY
        for _ in range(self._dice.choice([1, 2])):
            self._lead()
        while self.now < end:
            self.now, _, act = heapq.heappop(self._events)
            act()
            self._check()
        return from_secret(self.secret.value)

    def write(self, target: Versioned, version: int, value: dict[str, str]) -> bool:
        if version != target.version:
            return False
        target.value, target.version = value, version + 1
        held = from_secret(self.secret.value)
        self.authorities |= set(held.authorities)
        self.certificates.add(held.certificate)
        self.most_trusted = max(self.most_trusted, len(held.authorities))
        for each in range(2):
            if target is self.secret:
                self._in(self._dice.uniform(0, _LOAD_SECONDS), self._load, each)
            else:
                late = self._dice.choice([0.0, self._dice.random(), 1.0]) * OVERLAP_SECONDS
                self._in(late, self._hear, each, self.configurations.index(target))
        return True

    def _in(self, seconds: float, act: Callable[..., None], *arguments: int) -> None:
        event = (self.now + seconds, next(self._order), lambda: act(*arguments))
        heapq.heappush(self._events, event)

    def _load(self, replica: int) -> None:
        self._shown[replica] = from_secret(self.secret.value).certificate

    def _hear(self, server: int, configuration: int) -> None:
        bundle = from_secret({"ca.crt": self.configurations[configuration].value["caBundle"]})
        self._bundles[server, configuration] = bundle.bundle

    def _lead(self) -> None:
        """A leader begins, perhaps in place of one that died."""
        skew = self._dice.uniform(-_SKEW_SECONDS, _SKEW_SECONDS)
        leader = Leader(skew, self._dice.uniform(0, 1e6), self._settled)
        self._step(leader, leader.turn(self))

    def _step(self, leader: Leader, turn: Iterator[float]) -> None:
        if self._dice.random() < 0.1 and self.now - self.last_turn < _LEADERLESS_SECONDS:
            self._in(self._dice.choice(_DEAD_SECONDS), self._lead)
            return
        sleep = next(turn, None)
        if sleep is None:
            turn = leader.turn(self)
            sleep = 0.0
        if sleep == 0.0:  # between two calls: at times somebody else gets far
            sleep = self._dice.choice(_PAUSE_SECONDS)
        event = (self.now + sleep, next(self._order), lambda: self._step(leader, turn))
        heapq.heappush(self._events, event)

    def _check(self) -> None:
        if "" in self._shown or "" in self._bundles.values():
            return  # the hook is being installed
        for (server, _), bundle in self._bundles.items():
            for certificate in self._shown:
                self.calls += 1
                now = self.now + self._skews[server]
                assert now < expires_at(certificate), f"expired: {self}"
                assert _accepts_on(bundle, certificate, now // DAY + 1), f"refused: {self}"

    def __repr__(self) -> str:
        days = (self.now - START) / DAY
        return f"<day {days:.2f}: {len(self.authorities)} CAs, {len(self.certificates)} pairs>"
