"""Who this agent is to the API server: the claims of its token. The token itself is never shown."""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from agent.doctor.check import FAIL, OK, WARN, Check, Level, Scene, worst
from agent.quantities import duration

_IN_A_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_LONGEST = 64 * 1024
_LATE = 0.1
"""Kubelet renews a token when 80 percent of its life are over."""

_BOUND = "the API server refuses what this agent writes: its token must be of a pod on this node"


def token_of(environment: Mapping[str, str]) -> tuple[Path | None, str]:
    """Where the token is, or why there is none to look at. Reads a kubeconfig as far as that."""
    named = environment.get("KUBECONFIG", "")
    if not named:
        return _IN_A_POD, ""
    path = Path(named)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        contexts = {item["name"]: item["context"] for item in config["contexts"]}
        users = {item["name"]: item["user"] for item in config["users"]}
        user = users[contexts[config["current-context"]]["user"]]
        file = user.get("tokenFile")
    except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        return None, f"the kubeconfig {path} does not say"
    if file is not None:
        return path.parent / str(file), ""
    kinds = ("token", "client-certificate", "client-certificate-data", "exec", "username")
    kind = next((kind for kind in kinds if kind in user), "nothing")
    return None, f"the kubeconfig {path} has {kind} in place of a token's file"


def text_of(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_LONGEST)


def token(scene: Scene) -> Check:
    name = "token"
    path, why = token_of(scene.environment)
    if path is None:
        return Check(name, OK, why)
    try:
        text = text_of(path)
    except OSError as error:
        advice = "mount a projected serviceAccountToken, as the DaemonSet does, or set KUBECONFIG"
        return Check(name, FAIL, f"{path} cannot be read ({error.strerror})", advice)
    return judged(text, str(path), node=scene.settings.node_name, now=scene.now)


def judged(text: str, where: str, *, node: str | None, now: float) -> Check:
    """What the claims say, against the node that we work for and the time."""
    claims = _claims(text.strip())
    if not text.strip():
        return Check("token", FAIL, f"{where} is empty", "delete the pod: kubelet writes it anew")
    if claims is None:
        advice = "nobody can tell whose it is and how long it lasts; see api-server"
        return Check("token", WARN, f"{where} holds no JWT", advice)
    problems: list[tuple[Level, str, str]] = [(OK, f"{where}: {_owner(claims)}", "")]
    bound = _text(_part(claims, "node"), "name")
    if bound:
        problems.append((OK, f"bound to node {bound}", ""))
    if node is not None and not bound:
        problems.append((FAIL, "bound to no node", f"{_BOUND} (Kubernetes 1.30 or newer)"))
    elif node is not None and bound != node:
        problems.append((FAIL, f"and NODE_NAME is {node}", _BOUND))
    problems += _ages(claims, now)
    return Check("token", *worst(problems))


def _ages(claims: Mapping[str, Any], now: float) -> list[tuple[Level, str, str]]:
    begun, ends = _seconds(claims, "iat"), _seconds(claims, "exp")
    found: list[tuple[Level, str, str]] = []
    if begun is not None and begun > now + 60:
        found.append(
            (WARN, f"made {duration(begun - now)} from now", "this node's clock is behind")
        )
    elif begun is not None:
        found.append((OK, f"{duration(max(0.0, now - begun))} old", ""))
    if ends is None:
        found.append((WARN, "never expires", "use a projected token, which kubelet renews"))
    elif ends <= now:
        advice = "kubelet does not renew it: delete the pod; look at the clock"
        found.append((FAIL, f"expired {duration(now - ends)} ago", advice))
    else:
        late = begun is not None and ends - now < _LATE * (ends - begun)
        advice = "kubelet should have renewed it: see its log" if late else ""
        found.append((WARN if late else OK, f"{duration(ends - now)} left", advice))
    return found


def _claims(token: str) -> Mapping[str, Any] | None:
    """The second part of a JWT, unproven: the API server judges it. None for anything else."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        padded = parts[1] + "=" * (-len(parts[1]) % 4)
        found = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _owner(claims: Mapping[str, Any]) -> str:
    bound = claims.get("kubernetes.io")
    namespace = _text(bound, "namespace")
    account, pod = (
        _text(_part(claims, "serviceaccount"), "name"),
        _text(_part(claims, "pod"), "name"),
    )
    if not account:
        return "of nobody it names"
    return f"of {namespace}/{account}" + (f", pod {pod}" if pod else "")


def _part(claims: Mapping[str, Any], name: str) -> Any:
    bound = claims.get("kubernetes.io")
    return bound.get(name) if isinstance(bound, dict) else None


def _text(raw: Any, name: str) -> str:
    value = raw.get(name) if isinstance(raw, dict) else None
    return value[:253] if isinstance(value, str) else ""


def _seconds(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**40:
        return float(value)
    return None
