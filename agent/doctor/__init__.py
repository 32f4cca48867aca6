"""What a machine has, says and lacks for a cache. Looks at everything and changes nothing.

    check       what a check is, what it looks at, what must not be said
    machine     this Python, the cache directory, its file system, its room
    contents    the state directory, the agent, the index, models and leftovers
    hub         the endpoint, the clock, the token of the hub
    identity    the token of the API server
    node        the cluster, as this node's agent sees it

A check takes what it looks at and returns a `Check`. One that raises, or hangs on a dead disk,
costs its own line and no other.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from agent.config import Settings
from agent.doctor import contents, hub, identity, machine, node
from agent.doctor.check import FAIL, Check, Level, Scene, secrets_in, without
from agent.errors import RULES, AgentError
from agent.threads import looking

__all__ = ["Check", "Level", "examine"]

_DISK_SECONDS = 10.0
_MODELS_SECONDS = 60.0  # a hundred thousand files on a slow disk

_QUICK: tuple[tuple[str, Callable[[Scene], Check]], ...] = (
    ("versions", machine.versions),
    ("descriptors", machine.descriptors),
    ("cache", machine.cache),
    ("directories", machine.directories),
    ("file-system", machine.file_system),
    ("rename", machine.rename),
    ("volume", machine.volume),
    ("kubelet", machine.kubelet),
    ("state", contents.state),
    ("index", contents.index),
)
_SLOW: tuple[tuple[str, Callable[[Scene], Check]], ...] = (
    ("space", machine.space),
    ("models", contents.models),
    ("foreign", contents.foreign),
    ("leftovers", contents.leftovers),
)


async def examine(settings: Settings, environment: Mapping[str, str], now: float) -> list[Check]:
    """Every check that makes sense here, in an order to be read in. `now` is Unix seconds."""
    scene = Scene(
        settings=settings,
        environment=environment,
        now=now,
        mounts=_text(Path("/proc/self/mountinfo")),
        locks=_text(Path("/proc/locks")),
    )
    parts = await asyncio.gather(
        *(_on_disk(name, scene, look, _DISK_SECONDS) for name, look in _QUICK),
        _guarded("agent", contents.agent(scene)),
        *(_on_disk(name, scene, look, _MODELS_SECONDS) for name, look in _SLOW),
        _of_the_hub(scene),
        _of_the_cluster(scene),
    )
    secrets = await looking(partial(_secrets, scene))
    return [without(check, secrets) for part in parts for check in part]


async def _on_disk(
    name: str, scene: Scene, look: Callable[[Scene], Check], seconds: float
) -> list[Check]:
    return await _guarded(name, looking(partial(look, scene)), seconds)


async def _guarded(
    name: str, work: Awaitable[Check], seconds: float = _DISK_SECONDS
) -> list[Check]:
    """Whatever goes wrong is the line of this check."""
    try:
        async with asyncio.timeout(seconds):
            return [await work]
    except TimeoutError:
        seen = f"no answer within {seconds:g} s (TimeoutError)"
        return [Check(name, FAIL, seen, "a disk or a mount hangs: see `dmesg`")]
    except AgentError as error:
        return [Check(name, FAIL, error.message, RULES[error.reason].advice)]
    except OSError as error:
        seen = f"{type(error).__name__}: {error.strerror or error}"
        where = f" ({error.filename})" if error.filename else ""
        return [Check(name, FAIL, f"cannot be looked at: {seen}{where}", "")]
    except Exception as error:  # noqa: BLE001 - a check that is wrong must not hide the others
        seen = f"this check failed: {type(error).__name__}: {error}"
        return [Check(name, FAIL, seen, "report it: this is a bug")]


async def _of_the_hub(scene: Scene) -> list[Check]:
    found = hub.Visit(hub.endpoint_of(scene.environment))
    # A resolver cannot be interrupted: it is left behind, and the visit says how far it came.
    with suppress(TimeoutError):
        async with asyncio.timeout(hub.SECONDS):
            await looking(partial(hub.visit, found))
    found = replace(found)  # what was left behind may go on
    looks = (
        ("hub", partial(hub.hub, scene, found)),
        ("clock", partial(hub.clock, scene, found)),
        ("credentials", partial(hub.credentials, scene)),
    )
    return [check for name, look in looks for check in await _guarded(name, looking(look))]


async def _of_the_cluster(scene: Scene) -> list[Check]:
    if not scene.in_a_cluster:
        return []
    found = await _guarded("token", looking(partial(identity.token, scene)))
    try:
        answers = await node.ask(scene)
    except AgentError as error:
        found.append(Check("api-server", FAIL, error.message, RULES[error.reason].advice))
    else:
        for name, look in node.CHECKS:
            found += await _guarded(name, looking(partial(look, scene, answers)))
    return found if scene.of_a_node else [node.only_a_warning(check) for check in found]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _secrets(scene: Scene) -> frozenset[str]:
    """All that is secret here, so that no error's text can say it."""
    variables = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    texts = [scene.environment.get(name, "") for name in variables]
    path, _ = identity.token_of(scene.environment)
    for file in (hub.token_file(scene.environment), path):
        if file is not None and os.access(file, os.R_OK):
            with suppress(OSError):
                texts.append(identity.text_of(file))
    return secrets_in(texts)
