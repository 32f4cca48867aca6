"""An AdmissionReview in, an AdmissionReview out. Pure."""

import base64
import json
from dataclasses import dataclass
from typing import Any

from agent.hook.admission import QUIET, Mutation, mutate
from agent.hook.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`outcome` for a metric, `note` for the log."""

    body: bytes
    outcome: str
    note: str = ""


def mutating(raw: bytes, world: World) -> Answer:
    request = json.loads(raw)["request"]
    decision = mutate(request["object"], world, namespace=request.get("namespace") or "")
    response: dict[str, Any] = {"uid": request["uid"], "allowed": True}
    if isinstance(decision, Mutation):
        patch = base64.b64encode(json.dumps(decision.patch).encode()).decode()
        response |= {"patchType": "JSONPatch", "patch": patch}
        outcome, note = decision.note.partition(":")[0], decision.note
    else:
        outcome, note = decision.why.value, decision.message
        if decision.why not in QUIET:
            response["warnings"] = [f"localmodel: {decision.message}"[:256]]
    review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
    return Answer(body=json.dumps(review).encode(), outcome=outcome, note=note)


def validating(raw: bytes, world: World) -> Answer:
    request = json.loads(raw)["request"]
    response = {"uid": request["uid"], "allowed": True}
    review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
    return Answer(body=json.dumps(review).encode(), outcome="allowed")
