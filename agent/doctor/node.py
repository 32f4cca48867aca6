"""The cluster, as the agent of this node sees it. Only lists, and only those that its role has: but
for the volumes, which are asked for and may be refused."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent import __version__, usage
from agent.doctor.check import FAIL, OK, WARN, Check, Level, Scene, counted, some, worst
from agent.errors import RULES, AgentError, Reason
from agent.kube import parse, podspec
from agent.kube.client import Api, ApiError, Json

_SECONDS = 8.0
_SERVING = f"/apis/{parse.GROUP}/{parse.VERSION}"
_VOLUMES = "/api/v1/persistentvolumes"
_NODES, _GROUPS = "localmodelnodes", "localmodelnodegroups"
_CACHES, _NAMESPACE_CACHES = "localmodelcaches", "localmodelnamespacecaches"
_PODS = "pods"

Items = list[Json]


@dataclass(frozen=True, slots=True)
class Answers:
    """What the API server answered: the objects of each kind, or why not."""

    found: Mapping[str, Items | AgentError]
    seconds: float

    def of(self, kind: str) -> Items:
        """Raises AgentError."""
        answer = self.found[kind]
        if isinstance(answer, AgentError):
            raise answer
        return answer

    @property
    def failures(self) -> dict[str, AgentError]:
        return {kind: said for kind, said in self.found.items() if isinstance(said, AgentError)}


async def ask(scene: Scene) -> Answers:
    """All there is to ask, at once. Raises AgentError where there is no way to an API server."""
    api = Api(scene.environment, user_agent=f"localmodel-doctor/{__version__}")
    await api.open()
    node = scene.settings.node_name
    of_node = {"fieldSelector": f"metadata.name={node}"} if node else {"limit": "1"}
    on_node = {"fieldSelector": f"spec.nodeName={node}"} if node else {"limit": "1"}
    one = {"limit": "1"}
    begun = time.monotonic()
    try:
        asked = {
            _NODES: _list(api, f"{_SERVING}/{_NODES}", of_node),
            _GROUPS: _list(api, f"{_SERVING}/{_GROUPS}", {}),
            _CACHES: _list(api, f"{_SERVING}/{_CACHES}", one, "LocalModelCache"),
            _NAMESPACE_CACHES: _list(
                api, f"{_SERVING}/{_NAMESPACE_CACHES}", one, "LocalModelNamespaceCache"
            ),
            _PODS: _list(api, "/api/v1/pods", on_node),
            _VOLUMES: _list(api, _VOLUMES, {}),
        }
        answers = await asyncio.gather(*asked.values())
    finally:
        await api.close()
    return Answers(dict(zip(asked, answers, strict=True)), time.monotonic() - begun)


async def _list(
    api: Api, path: str, params: Mapping[str, str], metadata: str = ""
) -> Items | AgentError:
    try:
        async with asyncio.timeout(_SECONDS):
            page = await api.list(
                path, params, metadata="PartialObjectMetadataList" if metadata else ""
            )
            return list(page["items"] or ())
    except AgentError as error:
        return error
    except TimeoutError:
        return ApiError(0, f"GET {path}: no answer within {_SECONDS:g} s (TimeoutError)")


# -- the server ---------------------------------------------------------------------------------


def api_server(scene: Scene, answers: Answers) -> Check:
    name, failures = "api-server", answers.failures
    away = [error for error in failures.values() if _status(error) not in (401, 403, 404)]
    if any(_status(error) == 401 for error in failures.values()):
        seen = "it answers, and does not know our token (401)"
        return Check(name, FAIL, seen, "see `token`; is the ServiceAccount still there?")
    if away:
        advice = "check the way to it (NetworkPolicy, DNS) and its health"
        return Check(name, FAIL, away[0].message, advice)
    return Check(
        name, OK, f"answers, {len(answers.found)} lists in {1000 * answers.seconds:.0f} ms"
    )


def _status(error: AgentError) -> int:
    return getattr(error, "status", 0)


def crds(scene: Scene, answers: Answers) -> Check:
    """The kinds that the agent watches, and the right to list them and the node's pods."""
    name, failures = "crds", answers.failures
    problems: list[tuple[Level, str, str]] = []
    kinds = (_NODES, _GROUPS, _CACHES, _NAMESPACE_CACHES)
    if absent := [kind for kind in kinds if kind in failures and _status(failures[kind]) == 404]:
        missing = [kind for kind in absent if kind != _NAMESPACE_CACHES]
        if missing:
            advice = "install KServe, or `kubectl apply --server-side -k crds`"
            problems.append((FAIL, f"there are no {', '.join(missing)}", advice))
        elif absent:
            problems.append((OK, f"no {_NAMESPACE_CACHES} (KServe 0.17 and older)", ""))
    refused = [k for k in (*kinds, _PODS) if k in failures and _status(failures[k]) == 403]
    if refused:
        seen = f"no right to list {', '.join(refused)}"
        problems.append((FAIL, seen, "`kubectl apply -k daemonset/overlays/kserve` once more"))
    known = [kind for kind in kinds if kind not in failures]
    if known:
        problems.insert(0, (OK, f"{', '.join(known)} can be listed", ""))
    if not problems:
        return Check(name, FAIL, "nobody can tell", "see api-server")
    return Check(name, *worst(problems))


# -- the node -----------------------------------------------------------------------------------


def node(scene: Scene, answers: Answers) -> Check:
    """The LocalModelNode of this node, and what it says of the agent."""
    name, ours = "node", scene.settings.node_name
    if ours is None:
        advice = "set it from spec.nodeName, as the DaemonSet does; right outside of one"
        return Check(name, WARN, "NODE_NAME is not set: this is no node's agent", advice)
    raw = next((item for item in answers.of(_NODES) if item["metadata"]["name"] == ours), None)
    if raw is None:
        advice = (
            "KServe's controller makes it when a cache has a node group that selects this node"
            " (label kserve/localmodel: worker)"
        )
        return Check(name, WARN, f"there is no LocalModelNode {ours}", advice)
    found = parse.node(raw)
    problems: list[tuple[Level, str, str]] = [
        (OK, f"LocalModelNode {ours} asks for {counted(len(found.entries), 'model')}", "")
    ]
    if found.refused:
        seen = f"entries that nobody can understand: {some([name for name, _ in found.refused])}"
        problems.append((WARN, seen, found.refused[0][1]))
    for condition in found.status.get("conditions") or []:
        if condition.get("type") == "Degraded" and condition.get("status") == "True":
            reason = str(condition.get("reason"))
            rule = next((RULES[known] for known in Reason if known.value == reason), None)
            seen = f"Degraded by {reason}: {condition.get('message')}"
            problems.append((WARN, seen, rule.advice if rule else "see docs/reasons.md"))
    return Check(name, *worst(problems))


def rivals(scene: Scene, answers: Answers) -> Check:
    """KServe's own agent on this node: ours waits until it is gone."""
    name = "rivals"
    if not scene.of_a_node:
        return Check(name, OK, "not asked without NODE_NAME")
    pods = [podspec.pod(raw) for raw in answers.of(_PODS)]
    if (error := usage.rival(pods)) is not None:
        return Check(name, FAIL, error.message, RULES[error.reason].advice)
    return Check(name, OK, f"none among {counted(len(pods), 'pod')} of this node")


def _served(scene: Scene, answers: Answers) -> str:
    """Our directory by its name on the node, where the pods can be read."""
    settings = scene.settings
    try:
        pods = [podspec.pod(raw) for raw in answers.of(_PODS)] if scene.of_a_node else []
    except AgentError:
        pods = []
    me = f"{settings.pod_namespace}/{settings.pod_name}"
    return usage.served_at(str(settings.root), pods, me).rstrip("/")


def groups(scene: Scene, answers: Answers) -> Check:
    """Do the node groups' volumes point at the directory that we fill?"""
    name, served = "groups", _served(scene, answers)
    known = [parse.group(raw) for raw in answers.of(_GROUPS)]
    if not known:
        advice = "make one: KServe puts a cache on the nodes of its groups"
        return Check(name, WARN, "there is no LocalModelNodeGroup", advice)
    used = set()
    for raw in answers.of(_NODES):
        if raw["metadata"]["name"] == scene.settings.node_name:
            used = {entry.group for entry in parse.node(raw).entries}
    other = [group for group in known if group.path and group.path.rstrip("/") != served]
    ours = [group.name for group in known if group.path and group not in other]
    problems: list[tuple[Level, str, str]] = [(OK, f"{len(ours)} at {served}", "")]
    if wrong := [f"{group.name} ({group.path})" for group in other if group.name in used]:
        advice = "change the group's volume or the DaemonSet's hostPath, mountPath, LOCALMODEL_ROOT"
        problems.append((FAIL, f"elsewhere, and used here: {some(wrong)}", advice))
    if apart := [f"{group.name} ({group.path})" for group in other if group.name not in used]:
        advice = "right, if they are other nodes'"
        problems.append((WARN if not ours else OK, f"elsewhere: {some(apart)}", advice))
    if without := [group.name for group in known if not group.path]:
        problems.append((OK, f"without a path on the node: {some(without)}", ""))
    return Check(name, *worst(problems))


def read_only(scene: Scene, answers: Answers) -> Check:
    """Pods must not write into models: the local volumes of the groups want `ro` (design D12)."""
    name = "read-only"
    raw_groups = answers.of(_GROUPS)
    local = {
        raw["metadata"]["name"]: spec
        for raw in raw_groups
        if "local" in (spec := _spec(_spec(raw.get("spec")).get("persistentVolumeSpec")))
    }
    paths = {_spec(spec["local"]).get("path") for spec in local.values()}
    problems: list[tuple[Level, str, str]] = []
    advice = "add mountOptions: [ro] once KServe's download Jobs are gone"
    if writable := [group for group, spec in local.items() if not _is_ro(spec)]:
        problems.append((WARN, f"groups whose volumes are writable: {some(writable)}", advice))
    try:
        volumes = answers.of(_VOLUMES)
    except AgentError as error:
        why = "this role may not list them" if _status(error) == 403 else "they cannot be listed"
        problems.append((OK, f"their PersistentVolumes were not looked at: {why}", ""))
    else:
        made = {
            raw["metadata"]["name"]: spec
            for raw in volumes
            if _spec((spec := _spec(raw.get("spec"))).get("local")).get("path") in paths
        }
        if writable := [volume for volume, spec in made.items() if not _is_ro(spec)]:
            problems.append(
                (WARN, f"PersistentVolumes that are writable: {some(writable)}", advice)
            )
        else:
            problems.append((OK, f"{counted(len(made), 'PersistentVolume')}, all read-only", ""))
    return Check(name, *worst(problems))


def _spec(raw: Any) -> Mapping[str, Any]:
    return raw if isinstance(raw, dict) else {}


def _is_ro(spec: Mapping[str, Any]) -> bool:
    return "ro" in (spec.get("mountOptions") or ())


CHECKS: tuple[tuple[str, Callable[[Scene, Answers], Check]], ...] = (
    ("api-server", api_server),
    ("crds", crds),
    ("node", node),
    ("rivals", rivals),
    ("groups", groups),
    ("read-only", read_only),
)


def only_a_warning(check: Check) -> Check:
    """Without NODE_NAME the agent has nothing to do with the cluster it happens to be in."""
    return replace(check, level=WARN) if check.level is FAIL else check
