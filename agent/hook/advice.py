"""What a pod is told at its admission, as warnings that kubectl shows. Pure, and five rules.

Each is a way for a pod to fail late and in words that do not say why: found after twenty minutes,
in a log of a process that has gone. Nothing is changed and nothing refused for any of them.
"""

import posixpath
import re
from collections.abc import Iterable, Iterator

from agent.hook.scheduling import extended
from agent.hook.spec import Json, at, containers, cut, mounts, name_of
from agent.hook.world import World
from agent.kube.parse import size_of
from agent.model import CacheKey, claim_name, quantity

_SERVER = re.compile(r"vllm|triton", re.IGNORECASE)
_PARALLEL = re.compile(r"(?:--tensor-parallel-size|-tp)(?:[ =])(\d{1,9})")
_DEFAULT_BYTES = 2 * 1024**3
"""What KServe's ServingRuntimes give a predictor that asks for nothing."""

MODELMESH = "modelmesh-service"
"""A label of the pods that ModelMesh makes of a ServingRuntime."""

_Model = tuple[str, CacheKey, str]
"""How a model is called, its key, and a node group that has it."""

_THE_MODEL = "the model"


def advise(
    pod: Json, world: World, *, keys: Iterable[CacheKey], group: str, namespace: str
) -> tuple[str, ...]:
    """For a pod that is to use these models of this node group; `group` "" where none is known."""
    spec = pod.get("spec") or {}
    wanted = sorted(set(keys))
    models = [(_THE_MODEL, key, group) for key in wanted]
    if MODELMESH in at(pod, "metadata", "labels"):
        models += _of_modelmesh(spec, world, namespace)
    return (
        *_without_resources(spec),
        *_without_shared_memory(spec),
        *_too_small_a_directory(spec, world, models),
        *_without_such_a_gpu(spec, world, group),
        *_without_room(world, wanted, group),
    )


def _without_resources(spec: Json) -> Iterator[str]:
    for container in _servers(spec):
        limits = at(container, "resources", "limits")
        memory = size_of(limits.get("memory"))
        if extended({"containers": [container]}) or (memory or 0) > _DEFAULT_BYTES:
            continue
        has = f"{quantity(memory)} of memory" if memory else "no limits"
        yield (
            f"container {_short(container)} has {has} and no GPU, as where nothing is asked"
            ' for: vLLM then ends with "Stub process is not healthy"; set resources.limits'
            " (nvidia.com/gpu, memory) of the predictor"
        )


def _without_shared_memory(spec: Json) -> Iterator[str]:
    for container in _servers(spec):
        places = {posixpath.normpath(m.get("mountPath") or ".") for m in mounts(container)}
        if "/dev/shm" in places or not _is_parallel(container):
            continue
        yield (
            f"container {_short(container)} has 64 MiB of /dev/shm, too little for tensor"
            " parallelism (a bus error in NCCL); mount an emptyDir with medium: Memory there"
        )


def _too_small_a_directory(spec: Json, world: World, models: Iterable[_Model]) -> Iterator[str]:
    """For ModelMesh it is 1.5 times the memory of the runtime, if nobody said otherwise."""
    sizes = {model: world.sizes.get(model[1], 0) for model in models}
    if not sizes:
        return
    name, _, group = largest = max(sizes, key=lambda model: (sizes[model], model))
    for volume in spec.get("volumes") or ():
        directory = volume.get("emptyDir") or {}
        limit = size_of(directory.get("sizeLimit"))
        if limit is None or limit >= sizes[largest] or directory.get("medium") == "Memory":
            continue
        mend = "raise its sizeLimit"
        if name != _THE_MODEL:
            mend = (
                f"mount the claim localmodel-{cut(group, 25)}: `localmodel show NAME -o json`"
                " prints the storage stanza"
            )
        yield (
            f"emptyDir {cut(name_of(volume), 24)} may hold {quantity(limit)}, and {name} has"
            f" {quantity(sizes[largest])}: the pod is evicted then; {mend}"
        )


def _of_modelmesh(spec: Json, world: World, namespace: str) -> list[_Model]:
    """Those that a ModelMesh runtime may be told to load, as its namespace may use them, if it does
    not read them from the node's cache."""
    ours = {claim_name(group) for group in world.groups}
    claims = {
        name_of(volume)
        for volume in spec.get("volumes") or ()
        if at(volume, "persistentVolumeClaim").get("claimName") in ours
    }
    if any(name_of(mount) in claims for _, one in containers(spec) for mount in mounts(one)):
        return []
    return [
        (f"the cached model {cut(cache.name, 30)}", cache.key, group)
        for cache in world.caches
        if cache.namespace in ("", namespace)
        for group in cache.groups[:1]
    ]


def _without_such_a_gpu(spec: Json, world: World, group: str) -> Iterator[str]:
    if group not in world.groups:
        return
    missing = extended(spec) - world.offered(group) if world.in_group(group) else ()
    for name in sorted(missing):
        yield (
            f"no node of the group {cut(group, 60)} has any {cut(name, 80)}, which the pod asks"
            " for; ask for what its nodes have, or name another group"
        )


def _without_room(world: World, keys: Iterable[CacheKey], group: str) -> Iterator[str]:
    if group not in world.groups:
        return
    rooms = [world.capacity[name] for name in world.in_group(group) if name in world.capacity]
    for key in keys:
        size = world.sizes.get(key, 0)
        if rooms and size > max(rooms):
            yield (
                f"the model has {quantity(size)}, and no cache of the group {cut(group, 60)} holds"
                f" more than {quantity(max(rooms))}: it is downloaded by each pod; give the group a"
                " larger disk or limit"
            )


def _servers(spec: Json) -> Iterator[Json]:
    """Containers that run vLLM or Triton, by their image or how they are begun."""
    for container in spec.get("containers") or ():
        if _SERVER.search(f"{container.get('image')} {_begun(container)}"):
            yield container


def _is_parallel(container: Json) -> bool:
    found = _PARALLEL.search(_begun(container))
    return found is not None and int(found[1]) > 1


def _begun(container: Json) -> str:
    return " ".join(map(str, [*(container.get("command") or ()), *(container.get("args") or ())]))


def _short(named: Json) -> str:
    return cut(name_of(named), 63)
