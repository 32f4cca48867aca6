"""The way out: is the hub there, what does its clock say, and is there a token."""

import http.client
import os
import socket
import ssl
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from agent import __version__
from agent.doctor.check import FAIL, OK, WARN, Check, Scene
from agent.doctor.contents import ahead
from agent.errors import RULES, AgentError, Reason
from agent.sources.hf import HuggingFace
from agent.transfer import connections

SECONDS = 5.0
_APART_SECONDS = 30.0
_DEFAULT_ENDPOINT = "https://huggingface.co"
_PATH = "/api/models?limit=1"  # small, and every hub has it
_TOKEN_LENGTH = 4096

_ADVICE = {
    "DNS": "check this machine's resolver (/etc/resolv.conf) and HF_ENDPOINT",
    "TCP": "check routes and firewalls, or set HTTPS_PROXY where a proxy is needed",
    "proxy": "check the proxy and its name and password, or except the hub by NO_PROXY",
    "TLS": "check the clock; where a gateway opens TLS, name its CA by SSL_CERT_FILE",
    "HTTP": "check that HF_ENDPOINT names a hub",
}


@dataclass(slots=True)
class Visit:
    """One question to the hub: how far it came. Filled while it goes on, for a deadline to read."""

    endpoint: str
    step: str = "DNS"
    via: str = ""
    status: int = 0
    seconds: float = 0.0
    failure: str = ""
    refused: AgentError | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    answered_at: float = 0.0


def endpoint_of(environment: Mapping[str, str]) -> str:
    return (environment.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT).rstrip("/")


def visit(found: Visit) -> None:
    """Ask, without a token, step by step as the transfer does; what went wrong is in the visit."""
    begun = time.monotonic()
    try:
        _ask(found)
    except AgentError as error:
        found.refused = error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, ssl.SSLError):
            found.step = "TLS"
        text = getattr(error, "strerror", None) or str(error)
        found.failure = f"{type(error).__name__}: {text}"
    found.seconds = time.monotonic() - begun


def _ask(found: Visit) -> None:
    HuggingFace(found.endpoint, lambda: None)  # refuses what is no endpoint, without showing it
    origin = connections.origin_of(found.endpoint)
    # The transfer's own: another reading of the environment would vouch for another way.
    proxy = connections.proxy_for(origin)
    host, port = origin.host, origin.port
    if proxy is not None:
        host, port = proxy.hostname or "", proxy.port or 80
        found.via = f"{host}:{port} ({_variable(origin.scheme)})"
    socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found.step = "TCP"
    socket.create_connection((host, port), timeout=SECONDS).close()
    auth = connections.proxy_authorization(proxy)
    headers = {"Proxy-Authorization": auth} if auth else {}
    path = urlsplit(found.endpoint).path.rstrip("/") + _PATH
    raw: http.client.HTTPConnection
    if origin.scheme == "https":
        context = ssl.create_default_context()
        raw = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
        if proxy is not None:
            raw.set_tunnel(origin.host, origin.port, headers=headers)
        found.step, headers = "proxy" if proxy is not None else "TLS", {}
    else:
        raw = http.client.HTTPConnection(host, port, timeout=SECONDS)
        path = found.endpoint + _PATH if proxy is not None else path
    try:
        raw.connect()
        found.step = "HTTP"
        raw.request("GET", path, headers={"User-Agent": f"localmodel/{__version__}", **headers})
        answer = raw.getresponse()
        found.answered_at = time.time()
        found.headers = {name.lower(): value for name, value in answer.getheaders()}
        found.status = answer.status
    finally:
        raw.close()


def _variable(scheme: str) -> str:
    """Which one names the proxy; small letters win, as everywhere."""
    names = [
        case for name in (scheme, "all") for case in (f"{name}_proxy", f"{name}_PROXY".upper())
    ]
    return next((name for name in names if os.environ.get(name)), "of the environment")


def hub(scene: Scene, found: Visit) -> Check:
    """Never more than a warning: models that are here are served without it."""
    name = "hub"
    if found.refused is not None:
        return Check(name, WARN, found.refused.message, RULES[found.refused.reason].advice)
    via = f" through the proxy {found.via}" if found.via else ""
    where = f"{found.endpoint}{via}"
    if found.failure:
        seen = f"{where}: {found.step} failed after {found.seconds:.1f} s: {found.failure}"
        return Check(name, WARN, seen, _ADVICE[found.step])
    if not found.status:
        seen = f"{where}: {found.step} took longer than {SECONDS:g} s (TimeoutError)"
        return Check(name, WARN, seen, _ADVICE[found.step])
    seen = f"{where} answers {found.status} in {1000 * found.seconds:.0f} ms"
    if found.status == 429:
        return Check(name, WARN, seen, RULES[Reason.RATE_LIMITED].advice)
    if found.status in (403, 407) or found.status >= 500:
        return Check(name, WARN, seen, _ADVICE["proxy" if found.via else "HTTP"])
    return Check(name, OK, seen)


def clock(scene: Scene, found: Visit) -> Check:
    """By the newest manifest, and by the hub. A clock that is wrong spoils TLS, links and LRU."""
    name = "clock"
    if wrong := ahead(scene):
        advice = "the clock was set back, or was wrong: look at NTP (`timedatectl`)"
        return Check(name, WARN, wrong, advice)
    at = _said_by(found)
    if at is None:
        return Check(name, OK, "no model is from the future; no hub to ask for the time")
    apart = found.answered_at - at
    if abs(apart) > _APART_SECONDS:
        way = "ahead of" if apart > 0 else "behind"
        advice = "signed links and TLS fail by it: look at NTP (`timedatectl`)"
        return Check(name, WARN, f"{abs(apart):.0f} s {way} the hub's", advice)
    return Check(name, OK, f"within {_APART_SECONDS:g} s of the hub's, no model is from the future")


def _said_by(found: Visit) -> float | None:
    """The hub's time. A cache in between repeats an old answer, and says how old it is."""
    try:
        said = parsedate_to_datetime(found.headers["date"]).timestamp()
        return said + float(found.headers.get("age", "0"))
    except (LookupError, ValueError, TypeError):
        return None


# -- the token ----------------------------------------------------------------------------------


def token_file(environment: Mapping[str, str]) -> Path:
    """Where the hub's client looks for one."""
    if path := environment.get("HF_TOKEN_PATH"):
        return Path(os.path.expandvars(path)).expanduser()
    caches = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "~")) / ".cache")
    home = environment.get("HF_HOME") or str(Path(caches) / "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "token"


def credentials(scene: Scene) -> Check:
    """Whether there are any; of a token nothing is said, not even its length."""
    name, path = "credentials", token_file(scene.environment)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if scene.environment.get(variable, "").strip():
            return _judged(name, f"{variable} is set", scene.environment[variable])
    if scene.environment.get("HF_OIDC_RESOURCE"):
        return Check(name, OK, "none kept: HF_OIDC_RESOURCE is set, a token is asked for each time")
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8", errors="replace")[:_TOKEN_LENGTH]
    except (FileNotFoundError, NotADirectoryError):
        return Check(name, OK, "no token: public models only (HF_TOKEN, or `hf auth login`)")
    except OSError as error:
        seen = f"the token file {path} cannot be read ({error.strerror})"
        return Check(name, FAIL, seen, f"give it to user {os.geteuid()}, or set HF_TOKEN")
    if not text.strip():
        return Check(name, WARN, f"the token file {path} is empty", "write one, or remove it")
    found = _judged(name, f"the token file {path} is there", text)
    if found.level is OK and mode & (stat.S_IRGRP | stat.S_IROTH):
        return Check(name, WARN, f"{found.seen}, readable by others", f"chmod 600 {path}")
    return found


def _judged(name: str, seen: str, text: str) -> Check:
    token = text.strip()
    if token.isascii() and token.isprintable() and " " not in token:
        return Check(name, OK, seen)
    advice = "give it anew: a token is one word of printable ASCII"
    return Check(name, WARN, f"{seen}, and holds characters that no token has", advice)
