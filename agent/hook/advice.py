"""What a pod is told at its admission, as warnings that kubectl shows. Pure, and five rules.

Each is a way for a pod to fail late and in words that do not say why: found after twenty minutes,
in a log of a process that has gone. Nothing is changed and nothing refused for any of them.
"""

import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import Any

from agent.hook.scheduling import extended
from agent.hook.spec import Json, at, mounts
from agent.hook.world import World
from agent.model import CacheKey, quantity
from agent.quantities import parse_size

_SERVER = re.compile(r"vllm|triton", re.IGNORECASE)
_PARALLEL = re.compile(r"(?:--tensor-parallel-size|-tp)(?:[ =])(\d+)")
_DEFAULT_BYTES = 2 * 1024**3
"""What KServe's ServingRuntimes give a predictor that asks for nothing."""


def advise(pod: Json, world: World, keys: Iterable[CacheKey], group: str) -> tuple[str, ...]:
    """For a pod that is to use these models of this node group; `group` "" where none is known."""
    spec = pod.get("spec") or {}
    wanted = sorted(set(keys))
    return (
        *_without_resources(spec),
        *_without_shared_memory(spec),
        *_too_small_a_directory(spec, world, wanted),
        *_without_such_a_gpu(spec, world, group),
        *_without_room(world, wanted, group),
    )


def _without_resources(spec: Json) -> Iterator[str]:
    for container in _servers(spec):
        limits = at(container, "resources", "limits")
        memory = _bytes(limits.get("memory"))
        if extended({"containers": [container]}) or (memory or 0) > _DEFAULT_BYTES:
            continue
        has = f"{quantity(memory)} of memory" if memory else "no limits"
        yield (
            f"container {container.get('name')} has {has} and no GPU, what KServe gives a predictor"
            ' without resources: the vLLM backend then ends with "Stub process is not healthy"; set'
            " resources.limits (nvidia.com/gpu, memory) of the predictor"
        )


def _without_shared_memory(spec: Json) -> Iterator[str]:
    for container in _servers(spec):
        places = {posixpath.normpath(m.get("mountPath") or ".") for m in mounts(container)}
        if "/dev/shm" in places or not _is_parallel(container):
            continue
        yield (
            f"container {container.get('name')} has 64 MiB of /dev/shm, too little for tensor"
            " parallelism (a bus error in NCCL); mount an emptyDir with medium: Memory there"
        )


def _too_small_a_directory(spec: Json, world: World, keys: Iterable[CacheKey]) -> Iterator[str]:
    """ModelMesh gives 1.5 times the memory of the runtime."""
    largest = max((world.sizes.get(key, 0) for key in keys), default=0)
    for volume in spec.get("volumes") or ():
        directory = volume.get("emptyDir") or {}
        limit = _bytes(directory.get("sizeLimit"))
        if limit is None or limit >= largest or directory.get("medium") == "Memory":
            continue
        yield (
            f"the emptyDir {volume.get('name')} may hold {quantity(limit)}, and the model has"
            f" {quantity(largest)}: downloaded into it, the pod would be evicted; raise its"
            " sizeLimit"
        )


def _without_such_a_gpu(spec: Json, world: World, group: str) -> Iterator[str]:
    if group not in world.groups:
        return
    nodes = world.in_group(group)
    there = {name for node in world.nodes if node.name in nodes for name in node.extended}
    for name in sorted(extended(spec) - there) if nodes else ():
        yield f"no node of the group {group} has any {name}, which the pod asks for"


def _without_room(world: World, keys: Iterable[CacheKey], group: str) -> Iterator[str]:
    if group not in world.groups:
        return
    rooms = [world.capacity[name] for name in world.in_group(group) if name in world.capacity]
    for key in keys:
        size = world.sizes.get(key, 0)
        if rooms and size > max(rooms):
            yield (
                f"the model has {quantity(size)}, and no cache of the group {group} holds more than"
                f" {quantity(max(rooms))}: it is downloaded by each pod; give the group a larger"
                " disk or limit"
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


def _bytes(value: Any) -> int | None:
    try:
        return None if value is None else parse_size(str(value))
    except ValueError:
        return None
