"""What a LocalModelCache may not say, told when it is written and not when pods wait for it. Pure.

KServe's validator refuses two caches of one URI, and a deletion while services use it; so does this
one, for both kinds of cache. Besides, it refuses what could never be fetched, and warns of what
will be seen late. An update is held to what it changes: a finalizer or a label of an object that
was accepted can always be written.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agent.errors import AgentError
from agent.hook.spec import Json, at, cut, few
from agent.hook.world import World
from agent.kube.parse import ANNOTATIONS, GROUP, check_not_of_node, size_of, source_uri, want
from agent.kube.podspec import KSERVE_LABEL
from agent.model import quantity

_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

_LATE = (
    "nvidia.com/gpu.",
    "nvidia.com/mig",
    "nvidia.com/cuda",
    "nvidia.com/gfd",
    "amd.com/gpu.",
    "gpu.intel.com/",
    "feature.node.kubernetes.io/",
)
"""How labels begin that pods on the node find out (GPU feature discovery, node feature discovery,
the vendors' labellers): an autoscaler that asks whether a node *would* fit does not see them, if
nobody wrote them into its node template."""

_SERVICES: Mapping[str, tuple[str, str]] = {
    "inferenceServices": ("v1beta1", "inferenceservices"),
    "llmInferenceServices": ("v1alpha1", "llminferenceservices"),
}
"""Lists in the status of a cache: the version and the resource of what they name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Users:
    """Who was found to use a cache that is to be deleted.

    `services` are the objects that `services_of` names and that exist still; `pods` are the names,
    with namespaces, of those that rely on its key (`kube.podspec.Pod.keys`) and have not finished.
    """

    services: tuple[Json, ...] = ()
    pods: tuple[str, ...] = ()


NOBODY = Users()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Refused, and what to do about it; or, with "", let through with these warnings."""

    refusal: str = ""
    warnings: tuple[str, ...] = ()


def services_of(cache: Json) -> tuple[str, ...]:
    """The API paths of the services that its status names: to be asked for before it is deleted.
    KServe refuses where one of them has gone; here that is no user."""
    return tuple(
        f"/apis/{GROUP}/{version}/namespaces/{item.get('namespace')}/{resource}/{item.get('name')}"
        for name, (version, resource) in _SERVICES.items()
        for item in at(cache, "status").get(name) or ()
    )


def validate(
    operation: str,
    new: Json,
    old: Json,
    world: World,
    *,
    check: Callable[[str], object],
    users: Users = NOBODY,
) -> Verdict:
    """A cache of either kind; `new` {} for a DELETE, `old` {} for a CREATE. `check` raises for a
    URI that no source knows. What is being deleted already may always be written and deleted."""
    if at(new or old, "metadata").get("deletionTimestamp"):
        return Verdict()
    if operation == "DELETE":
        return Verdict(refusal=_in_use(old, users))
    change = _Change(new, old, world)
    refusals = (
        *_bad_uri(change, check),
        *_taken_uri(change),
        *_bad_annotations(change),
        *_without_groups(change),
        *_unknown_groups(change),
        *_larger_than_all(change),
    )
    if refusals:
        return Verdict(refusal="; ".join(refusals))
    return Verdict(warnings=(*_singular(change), *_larger_than_some(change), *_late(change)))


@dataclass(frozen=True, slots=True)
class _Change:
    new: Json
    old: Json
    world: World

    @property
    def name(self) -> str:
        return str(at(self.new, "metadata").get("name") or "")

    @property
    def namespace(self) -> str:
        return str(at(self.new, "metadata").get("namespace") or "")

    @property
    def spec(self) -> Json:
        return at(self.new, "spec")

    @property
    def groups(self) -> list[str]:
        return _groups(self.new)

    @property
    def added(self) -> list[str]:
        """The groups that it did not have before."""
        before = _groups(self.old)
        return [name for name in self.groups if name not in before]

    def of(self, *names: str) -> bool:
        """Whether it changes one of these fields of the spec."""
        before = at(self.old, "spec")
        return any(self.spec.get(name) != before.get(name) for name in names)

    def too_small(self) -> dict[str, int]:
        """The limits of its groups that are below its size, in bytes."""
        size = size_of(self.spec.get("modelSize"))
        known = [self.world.groups[name] for name in self.groups if name in self.world.groups]
        if size is None or not self.of("modelSize", "nodeGroups"):
            return {}
        return {g.name: g.limit for g in known if g.limit is not None and g.limit < size}


# -- refused ---------------------------------------------------------------------------------------


def _bad_uri(change: _Change, check: Callable[[str], object]) -> Iterator[str]:
    if change.of("sourceModelUri"):
        try:
            uri = source_uri(change.spec, "spec.sourceModelUri")
            check(uri)
            check_not_of_node(uri)
        except AgentError as error:
            yield error.message


def _taken_uri(change: _Change) -> Iterator[str]:
    """KServe's rule, word for word: the same string, and cluster caches only."""
    uri = change.spec.get("sourceModelUri")
    if change.namespace or not change.of("sourceModelUri"):
        return
    for other in change.world.caches:
        if other.uri == uri and not other.namespace and other.name != change.name:
            yield (
                f"LocalModelCache {other.name} has the same sourceModelUri {cut(str(uri), 200)}:"
                " add the node groups to that one"
            )
            return


def _bad_annotations(change: _Change) -> Iterator[str]:
    notes = _ours(change.new)
    if notes != _ours(change.old):
        try:
            want(str(change.spec.get("sourceModelUri")), change.name, notes)
        except AgentError as error:
            yield error.message


def _without_groups(change: _Change) -> Iterator[str]:
    found = _mistyped(change.new)
    if found is not None and not change.groups:
        yield f"spec.nodeGroup is no field; did you mean nodeGroups: [{cut(found, 100)}]?"


def _unknown_groups(change: _Change) -> Iterator[str]:
    """Of those that it adds: one may have been deleted since the others were accepted."""
    missing = [name for name in change.added if name not in change.world.groups]
    if missing:
        known = few(sorted(change.world.groups)) or "none"
        yield (
            f"there is no LocalModelNodeGroup {few(missing)}; there are: {known}."
            " Create it first, or correct spec.nodeGroups"
        )


def _larger_than_all(change: _Change) -> Iterator[str]:
    small = change.too_small()
    if small and small.keys() >= set(change.groups):
        yield (
            f"modelSize {change.spec['modelSize']} is more than the storageLimit of every node"
            f" group that it names ({_numbers(small)}): raise one of them, or correct modelSize"
        )


def _in_use(cache: Json, users: Users) -> str:
    metadata = at(cache, "metadata")
    ours = {
        KSERVE_LABEL: str(metadata.get("name") or ""),
        f"{KSERVE_LABEL}-namespace": str(metadata.get("namespace") or ""),
    }
    found = [
        f"{service.get('kind')} {_path(service)}"
        for service in users.services
        if all((at(service, "metadata", "labels").get(k) or "") == v for k, v in ours.items())
    ]
    found += [f"pod {name}" for name in users.pods]
    if not found:
        return ""
    name = ours[KSERVE_LABEL]
    return f"{name} is in use by {few(found)}: delete these, or give them another model, first"


# -- let through with a warning --------------------------------------------------------------------


def _singular(change: _Change) -> Iterator[str]:
    found = _mistyped(change.new)
    if found is not None and found != _mistyped(change.old):
        yield (
            f"spec.nodeGroup ({cut(found, 100)}) is no field and says nothing; did you mean"
            " nodeGroups?"
        )


def _larger_than_some(change: _Change) -> Iterator[str]:
    small = change.too_small()
    if small:
        yield (
            f"modelSize {cut(str(change.spec['modelSize']), 30)} is more than the storageLimit of"
            f" {_numbers(small)}: not cached there, cached on the others"
        )


def _late(change: _Change) -> Iterator[str]:
    for name in change.added:
        group = change.world.groups[name]
        terms = (group.selector or {}).get("nodeSelectorTerms") or []
        labels = [_late_label(term) for term in terms]
        if labels and all(labels):
            yield (
                f"node group {cut(name, 60)} selects nodes by {cut(labels[0], 60)}, which a node"
                " has only some time after it joined: an autoscaler cannot scale this group from"
                " zero; select a label of the node pool"
            )


def _late_label(term: Json) -> str:
    """One that a node must have for this term, and that it has late; "" for none."""
    for expression in term.get("matchExpressions") or ():
        label = str(expression.get("key"))
        if label.startswith(_LATE) and expression.get("operator") not in ("NotIn", "DoesNotExist"):
            return label
    return ""


# -- reading ---------------------------------------------------------------------------------------


def _groups(cache: Json) -> list[str]:
    return [str(name) for name in at(cache, "spec").get("nodeGroups") or ()]


def _ours(cache: Json) -> dict[str, Any]:
    notes = at(cache, "metadata", "annotations")
    return {name: value for name, value in notes.items() if name.startswith(f"{ANNOTATIONS}/")}


def _mistyped(cache: Json) -> str | None:
    """The value of a `nodeGroup`. Where the schema dropped it, kubectl's own note still has it."""
    spec = at(cache, "spec")
    if "nodeGroup" not in spec:
        try:
            spec = json.loads(at(cache, "metadata", "annotations").get(_APPLIED) or "{}")["spec"]
            return str(spec["nodeGroup"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
    return str(spec["nodeGroup"])


def _path(service: Json) -> str:
    metadata = at(service, "metadata")
    return f"{metadata.get('namespace')}/{metadata.get('name')}"


def _numbers(limits: Mapping[str, int]) -> str:
    return few(f"{cut(name, 40)} {quantity(limit)}" for name, limit in limits.items())
