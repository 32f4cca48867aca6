"""AdmissionReviews (`admission.k8s.io/v1`): the request as it came, the answer as it goes. Pure.

    read(body)                  -> Request; ValueError where nobody could be answered
    mutated(request, world)     -> Answer for /mutate: a patch and warnings, or warnings alone
    validated(request, world)   -> Answer for /validate: allowed, or refused with what to do

A pod is never refused. Whatever is odd, and whatever is wrong with ourselves, lets the object
through as it is: that is `Unreadable` and `Error` in the metric, and no pod that does not start.
"""

import base64
import json
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from agent.hook.admission import mutate
from agent.hook.advice import MODELMESH, advise
from agent.hook.decisions import QUIET, Mutation, Skip, Why
from agent.hook.patch import applied
from agent.hook.spec import WARNING, Json, at, cut
from agent.hook.validation import NOBODY, Users, services_of, validate
from agent.hook.world import World
from agent.kube.parse import GROUP, VERSION
from agent.kube.podspec import KSERVE_LABEL, is_disabled
from agent.model import CacheKey, cache_key

API = "admission.k8s.io/v1"
_MOST_WARNINGS = 5
_MOST_TEXT = 1000  # characters of a refusal, of what the audit log and ours get
_POD = (("", "v1", "Pod"),)
_CACHES = tuple((GROUP, VERSION, kind) for kind in ("LocalModelCache", "LocalModelNamespaceCache"))


class Outcome(StrEnum):
    """What became of a request; for a pod that is left as it is, its `Why` says it instead."""

    PATCHED = "Patched"
    ALLOWED = "Allowed"
    REFUSED = "Refused"
    UNREADABLE = "Unreadable"  # no object of the kind that this path is for
    ERROR = "Error"  # a bug of ours


_LET_THROUGH = (Outcome.UNREADABLE, Outcome.ERROR)
OF_PODS = (Outcome.PATCHED, *_LET_THROUGH, *Why)
OF_CACHES = (Outcome.ALLOWED, Outcome.REFUSED, *_LET_THROUGH)
"""All values of the metrics' labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. All but `uid` is as the API server sent it, and may be anything."""

    uid: str
    version: Any
    raw: Json

    @property
    def operation(self) -> str:
        return str(self.raw.get("operation") or "")

    @property
    def namespace(self) -> str:
        return str(self.raw.get("namespace") or "")

    @property
    def about(self) -> str:
        """For a log line: a pod of a Deployment has only the beginning of a name yet."""
        made = self.raw.get("object")
        metadata = made.get("metadata") if isinstance(made, dict) else None
        begins = metadata.get("generateName") if isinstance(metadata, dict) else None
        return cut(f"{self.namespace}/{self.raw.get('name') or begins or '?'}", 300)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`body` for the API server; `outcome` for the metric, with `detail` for the log."""

    body: bytes
    outcome: Outcome | Why
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What must be known of others before a cache may go: the pods that rely on `key`, in
    `namespace` ("" for all), and which services exist still, by their API paths."""

    key: CacheKey
    namespace: str
    services: tuple[str, ...]


def read(body: bytes) -> Request:
    """Raises ValueError where there is no uid to answer to: the server says 400."""
    try:
        raw = json.loads(body)
    except RecursionError as error:
        raise ValueError("the body is nested too deep") from error
    request = raw.get("request") if isinstance(raw, dict) else None
    uid = request.get("uid") if isinstance(request, dict) else None
    if not isinstance(request, dict) or not isinstance(uid, str) or not uid:
        raise ValueError("the body is no AdmissionReview with a request and its uid")
    return Request(uid=uid, version=raw.get("apiVersion"), raw=request)


def mutated(request: Request, world: World) -> Answer:
    """For a pod that is being created, dry run or not."""
    problem = _unreadable(request, _POD, {"CREATE": ("object",)})
    if problem:
        return _answer(request, Outcome.UNREADABLE, problem)
    pod: Json = request.raw["object"]
    try:
        decision = mutate(pod, world, namespace=request.namespace)
        if isinstance(decision, Mutation):
            # `failurePolicy: Ignore` is for no answer, and not for a patch that does not apply:
            # with that the pod would be refused.
            applied(pod, decision.patch)
        advice = _advice(pod, decision, world, request.namespace)
    except Exception as error:  # noqa: BLE001 - a bug of ours must not keep a pod from starting
        return _answer(request, Outcome.ERROR, repr(error))
    if isinstance(decision, Mutation):
        return _answer(request, Outcome.PATCHED, decision.note, advice, patch=decision.patch)
    said = () if decision.why in QUIET else (decision.message,)
    return _answer(request, decision.why, decision.detail, (*said, *advice))


def deletion(request: Request) -> Deletion | None:
    """None for all other requests."""
    if request.operation != "DELETE" or _unreadable(request, _CACHES, _OPERATIONS):
        return None
    old: Json = request.raw["oldObject"]
    try:
        return Deletion(
            key=cache_key(str(at(old, "spec").get("sourceModelUri"))),
            namespace=request.namespace,
            services=services_of(old),
        )
    except (AttributeError, TypeError, UnicodeEncodeError):  # no cache that could be in use
        return None


def validated(
    request: Request,
    world: World,
    *,
    check: Callable[[str], object],
    users: Users = NOBODY,
) -> Answer:
    """For a cache of either kind; `users` as `deletion` asks for them, `check` as in `validate`."""
    problem = _unreadable(request, _CACHES, _OPERATIONS)
    if problem:
        return _answer(request, Outcome.UNREADABLE, problem)
    new, old = request.raw.get("object") or {}, request.raw.get("oldObject") or {}
    try:
        verdict = validate(request.operation, new, old, world, check=check, users=users)
    except Exception as error:  # noqa: BLE001 - nor a cache from being written
        return _answer(request, Outcome.ERROR, repr(error))
    if verdict.refusal:
        return _answer(request, Outcome.REFUSED, verdict.refusal, refused=True)
    return _answer(request, Outcome.ALLOWED, "", verdict.warnings)


def undecided(request: Request, why: str) -> Answer:
    """Refused, because what must be known is not: a deletion can be asked for again."""
    return _answer(request, Outcome.REFUSED, f"{why}; try again", refused=True)


_OPERATIONS = {
    "CREATE": ("object",),
    "UPDATE": ("object", "oldObject"),
    "DELETE": ("oldObject",),
}
"""Which objects come with an operation."""


def _unreadable(
    request: Request,
    kinds: Container[tuple[Any, ...]],
    operations: Mapping[str, tuple[str, ...]],
) -> str:
    """Why this is no request for us, "" if it is one."""
    raw, kind = request.raw, request.raw.get("kind")
    found = kind if isinstance(kind, dict) else {}
    if request.version != API:
        return f"apiVersion is not {API}"
    if tuple(found.get(name) for name in ("group", "version", "kind")) not in kinds:
        return "not the kind of object that this is for"
    if raw.get("subResource"):
        return "a sub-resource"
    if request.operation not in operations:
        return "not an operation that this is for"
    if not all(isinstance(raw.get(name), dict) for name in operations[request.operation]):
        return "the object is missing"
    return ""


def _advice(pod: Json, decision: Mutation | Skip, world: World, namespace: str) -> tuple[str, ...]:
    """To those that serve a model, whether or not it comes from the cache."""
    if isinstance(decision, Mutation):
        return advise(pod, world, keys=decision.keys, group=decision.group, namespace=namespace)
    metadata = at(pod, "metadata")
    if is_disabled(at(metadata, "annotations")):
        return ()
    labels = {KSERVE_LABEL, MODELMESH} & at(metadata, "labels").keys()
    if decision.why is Why.NOT_OURS and not labels:
        return ()
    return advise(pod, world, keys=(), group="", namespace=namespace)


def _answer(
    request: Request,
    outcome: Outcome | Why,
    detail: str,
    warnings: Iterable[str] = (),
    *,
    patch: Iterable[Json] = (),
    refused: bool = False,
) -> Answer:
    detail = cut(detail, _MOST_TEXT)
    decision = cut(f"{outcome}: {detail}" if detail else str(outcome), _MOST_TEXT)
    response: dict[str, Any] = {
        "uid": request.uid,
        "allowed": not refused,
        "auditAnnotations": {"decision": decision},
    }
    if refused:
        response["status"] = {"code": 403, "reason": "Forbidden", "message": detail}
    if shown := [cut(warning, WARNING) for warning in warnings][:_MOST_WARNINGS]:
        response["warnings"] = shown
    if steps := list(patch):
        encoded = base64.b64encode(json.dumps(steps).encode()).decode()
        response |= {"patchType": "JSONPatch", "patch": encoded}
    review = {"apiVersion": API, "kind": "AdmissionReview", "response": response}
    return Answer(body=json.dumps(review).encode(), outcome=outcome, detail=detail)
