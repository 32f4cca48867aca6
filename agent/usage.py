"""What the pods of a node mean to its cache: who uses what, and who must not be here. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent import layout
from agent.errors import AgentError, Reason
from agent.kube.podspec import Pod, PodRole
from agent.model import CacheKey, rest_of


def keys_of(
    pod: Pod, *, present: Iterable[CacheKey], groups: Iterable[str], served: str
) -> frozenset[CacheKey]:
    """The models that a pod uses. One that mounts the whole cache may read any of them.

    A claim on the cache of a group is named `<model>-<group>` by KServe and `localmodel-<group>` by
    us. The models are not compared: one that has left the spec is in use all the same. A group that
    has gone leaves its pods, and by its name nobody knows it any more: so whoever mounts a claim
    in the way of KServe's pods uses all of it, whatever the claim is called.
    """
    if pod.finished or pod.role in (PodRole.AGENT, PodRole.KSERVE_AGENT):
        return frozenset()
    ends = tuple(f"-{group}" for group in groups)
    keys = set(pod.keys)
    whole = pod.served_by_kserve or any(claim.endswith(ends) for claim in pod.claims)
    root = served.rstrip("/")
    for path in pod.directories:
        if path in (root, f"{root}/{layout.MODELS}"):
            whole = True
        elif path.startswith(f"{root}/") and (key := layout.key_in(path.removeprefix(root))):
            keys.add(key)
        # A pod that mounts a directory above it (a node exporter mounts `/`) reads no models.
    return frozenset(keys | set(present)) if whole else frozenset(keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model that an entry of this node has: for the pods of a namespace, or, "", of all, and
    since when its cache is there, RFC 3339."""

    uri: str
    namespace: str
    since: str


def bypassed(pod: Pod, offers: Iterable[Offer], *, since: str) -> tuple[str, Offer] | None:
    """What a pod downloads by itself though this node's cache is there for it, and that cache.

    Nothing of a pod that came before `since`, when somebody began to look, or before the cache: no
    hook could have helped it. Both times of the API server are whole seconds; of the same second
    nobody knows which was first.
    """
    if pod.finished or pod.created < since:
        return None
    for uri in pod.downloads:
        for offer in offers:
            seen = offer.namespace in ("", pod.namespace) and "" < offer.since < pod.created
            if seen and rest_of(uri, offer.uri) is not None:
                return uri, offer
    return None


def served_at(root: str, pods: Iterable[Pod], me: str) -> str:
    """Our cache's directory on the node: `root` as our own pod mounts it, or itself outside one."""
    own = next((pod for pod in pods if f"{pod.namespace}/{pod.name}" == me), None)
    return own.host_paths.get(root, root) if own is not None else root


def rival(pods: Iterable[Pod]) -> AgentError | None:
    """Who else writes into `models/` on this node: KServe's agent, or what it left behind."""
    found = sorted(
        (pod.role.value, pod.namespace, pod.name)
        for pod in pods
        if pod.role in (PodRole.KSERVE_AGENT, PodRole.DOWNLOAD_JOB) and not pod.finished
    )
    if not found:
        return None
    names = ", ".join(f"{namespace}/{name}" for _, namespace, name in found[:5])
    if any(role == PodRole.KSERVE_AGENT for role, *_ in found):
        return AgentError(
            Reason.OTHER_AGENT,
            f"KServe's node agent runs here ({names}) and would delete what this one keeps; remove"
            " its DaemonSet from this node",
        )
    return AgentError(
        Reason.OTHER_AGENT, f"waits for the downloads that KServe's agent began: {names}"
    )


def holder_is_gone(holder: str, pods: Mapping[str, Pod]) -> bool:
    """Whether the holder of a node's Lease was a pod that has left the node.

    `pods` are by namespace/name. A holder without a slash is no pod: only time tells.
    """
    pod = pods.get(holder)
    return "/" in holder and (pod is None or pod.finished)
