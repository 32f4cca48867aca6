"""Which nodes a selector allows, as the scheduler decides it, from labels and taints alone. Pure.

Only what excludes a node for certain is read here: selectors, required affinity, taints that are
not tolerated, extended resources (GPUs) that it has none of. A node that is only full, or that a
spread constraint or another pod's affinity excludes, still counts as allowed: who asks wants to
know whether a pod could go anywhere else.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from agent.hook.spec import Json, at, containers

_KEEPS_AWAY = frozenset({"NoSchedule", "NoExecute"})
_NUMBERS: Mapping[str, Callable[[int, int], bool]] = {"Gt": operator.gt, "Lt": operator.lt}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that is Ready. `extended` are the resources that it has some of, by their full name
    (`nvidia.com/gpu`)."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Mapping[str, str], ...] = ()
    extended: frozenset[str] = frozenset()


def selects(selector: Any, node: Node) -> bool:
    """A NodeSelector: its terms are alternatives, and each must hold whole. One without terms, or a
    term without expressions, selects nothing."""
    terms = (selector or {}).get("nodeSelectorTerms") or []
    return any(_term_holds(term, node) for term in terms)


def allowed(pod: Json, nodes: Iterable[Node]) -> frozenset[str]:
    """The names of the nodes on which the scheduler could put a pod with this spec at all."""
    left = list(nodes)
    for demand in _demands(pod):
        left = [node for node in left if demand(node)]
    return frozenset(node.name for node in left)


def _demands(pod: Json) -> Iterator[Callable[[Node], bool]]:
    """What this pod asks of a node, and nothing else: a cluster has thousands, and a pod may be
    large, so it is read once."""
    if name := pod.get("nodeName"):
        yield lambda node: node.name == name
    if chosen := (pod.get("nodeSelector") or {}).items():
        yield lambda node: chosen <= node.labels.items()
    required = at(pod, "affinity", "nodeAffinity").get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    )
    if required is not None:
        yield partial(selects, required)
    if needs := extended(pod):
        yield lambda node: needs <= node.extended
    tolerations = pod.get("tolerations") or []
    yield lambda node: all(_tolerated(taint, tolerations) for taint in node.taints)


def _term_holds(term: Json, node: Node) -> bool:
    on_labels, on_fields = term.get("matchExpressions") or [], term.get("matchFields") or []
    fields = {"metadata.name": node.name}
    return bool(on_labels or on_fields) and (
        all(_holds(expression, node.labels) for expression in on_labels)
        and all(_holds(expression, fields) for expression in on_fields)
    )


def _holds(expression: Json, labels: Mapping[str, str]) -> bool:
    """An operator that is not known holds nowhere, like a number that is none."""
    found, values = labels.get(str(expression.get("key"))), expression.get("values") or []
    match expression.get("operator"):
        case "In":
            return found in values
        case "NotIn":
            return found not in values
        case "Exists":
            return found is not None
        case "DoesNotExist":
            return found is None
        case "Gt" | "Lt" as name if found is not None and len(values) == 1:
            try:
                return _NUMBERS[name](int(found), int(values[0]))
            except ValueError:
                return False
    return False


def _tolerated(taint: Mapping[str, str], tolerations: Iterable[Json]) -> bool:
    if taint.get("effect") not in _KEEPS_AWAY:
        return True
    return any(
        toleration.get("effect") in (None, "", taint.get("effect"))
        and toleration.get("key") in (None, "", taint.get("key"))
        and (
            toleration.get("operator") == "Exists"
            or (
                bool(toleration.get("key"))
                and (toleration.get("value") or "") == (taint.get("value") or "")
            )
        )
        for toleration in tolerations
    )


def extended(pod: Json) -> frozenset[str]:
    """The resources that it asks for by a vendor's name."""
    asked = (at(container, "resources", "limits") for _, container in containers(pod))
    return frozenset[str]().union(*map(extended_of, asked))


def extended_of(quantities: Json) -> frozenset[str]:
    """Those with a vendor's name (`nvidia.com/gpu`) that there is some of."""
    return frozenset(
        name
        for name, number in quantities.items()
        if "/" in name and "kubernetes.io/" not in name and str(number) not in ("", "0")
    )
