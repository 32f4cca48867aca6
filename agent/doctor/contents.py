"""What is in it: the state directory, the agent, the index, models and what is left of them."""

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from agent import layout, trees
from agent.catalog import Catalog
from agent.doctor.check import (
    FAIL,
    OK,
    WARN,
    Check,
    Level,
    Scene,
    counted,
    holder,
    may_write,
    some,
    there,
    worst,
)
from agent.doctor.machine import mount_of
from agent.errors import AgentError, Reason
from agent.manifest import Manifest
from agent.model import CacheKey, quantity
from agent.server import socket_address

_ANSWER_SECONDS = 5.0
_AHEAD_SECONDS = 60
"""A model that was used so long after now was used by another clock."""


def state(scene: Scene) -> Check:
    """The index, the socket and the memory of this machine are in it."""
    name, path = "state", scene.state
    try:
        found = path.lstat()
    except FileNotFoundError:
        if may_write(there(path)) or holder(scene) is not None:
            return Check(name, OK, f"{path} is not there yet: the agent makes it")
        seen = f"{path} is not there, and {there(path)} is not ours to write"
        return Check(
            name, FAIL, seen, f"make it for user {os.geteuid()}, or name another by --state"
        )
    except PermissionError:
        return _private(name, path)
    mount = mount_of(path, scene.mounts)
    problems: list[tuple[Level, str, str]] = []
    seen = f"{path}, of user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}"
    if not path.is_dir():
        return Check(name, FAIL, f"{path} is no directory", "name another by --state")
    problems.append((OK, seen, ""))
    if mount is not None and mount.of_network:
        advice = "name a directory of this machine by --state: no two machines may share it"
        problems.append((FAIL, f"on {mount.type}, a network's", advice))
    if stat.S_IMODE(found.st_mode) & 0o077:
        advice = f"chmod 700 {path}: whoever opens its socket may have things downloaded"
        problems.append((WARN, "not private", advice))
    if not may_write(path) and holder(scene) is None:
        advice = f"`localmodel prepare` as root gives it to user {os.geteuid()}; or run as its user"
        problems.append((FAIL, f"not writable by this process (user {os.geteuid()})", advice))
    try:
        names = [entry for entry in trees.names(path) if entry != "lost+found"]
    except AgentError as error:
        if error.reason is not Reason.PERMISSION_DENIED:
            raise
        problems.append((WARN, "another user's", "run the doctor as the agent's user to see all"))
        return Check(name, *worst(problems))
    ours = (layout.INDEX, layout.SOCKET, layout.STATUS, layout.KNOWN_VOLUME)
    if strange := [entry for entry in names if not entry.startswith(ours)]:
        advice = "name a directory of its own by --state: the agent refuses this one"
        problems.append((FAIL, f"it holds other things ({some(strange)})", advice))
    return Check(name, *worst(problems))


def _private(name: str, path: Path) -> Check:
    advice = "run the doctor as the agent's user to see it"
    return Check(name, WARN, f"{path} is another user's", advice)


async def agent(scene: Scene) -> Check:
    """Does somebody have the volume, and does it answer?"""
    name, process = "agent", holder(scene)
    keeps = f"process {process} has the lock" if process is not None else "nobody has the lock"
    path = scene.state / layout.SOCKET
    if not os.access(path, os.F_OK):
        if process is None and scene.of_a_node:
            seen = f"{keeps}: none runs, or something keeps it from managing the cache"
            return Check(name, WARN, seen, "see `volume`, `rivals`, its /readyz and its log")
        if process is None:
            return Check(name, OK, f"none runs: {keeps}")
        seen = f"{keeps}, and there is no socket that this user may ask"
        return Check(name, OK, seen, "a command works, or another user's agent")
    answer = await _asked(scene.state)
    if answer == "":
        return Check(name, OK, f"one runs and answers; {keeps}")
    if answer.startswith("no answer"):  # a stopped process still has its socket
        who = process or "its pid"
        advice = f"see its log; a stopped one (kill -STOP) goes on by kill -CONT {who}"
        return Check(name, FAIL, f"{keeps}, and the socket gives {answer}", advice)
    seen = f"{keeps}; the socket {path} is stale ({answer})"
    advice = "an agent was killed; the next one replaces it"
    return Check(name, WARN, seen, advice if process is None else f"{advice}; a command works")


async def _asked(state: Path) -> str:
    """Why nobody answers; "" when somebody does."""
    import aiohttp

    socket, directory = socket_address(state)
    timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
    try:
        connector = aiohttp.UnixConnector(socket)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
            http.get("http://agent/v1"),
        ):
            return ""
    except TimeoutError:
        return f"no answer within {_ANSWER_SECONDS:g} s"
    except aiohttp.ClientError as error:
        return type(error.__cause__ or error).__name__
    finally:
        if directory is not None:
            os.close(directory)


# -- the index ----------------------------------------------------------------------------------


def index(scene: Scene) -> Check:
    """It is opened so that SQLite makes no file and replays nothing."""
    name, path = "index", scene.state / layout.INDEX
    try:
        bytes_there = path.lstat().st_size
    except FileNotFoundError:
        return Check(name, OK, "none yet: the agent makes it from the manifests")
    except PermissionError:
        return _private(name, path)
    if not os.access(path, os.R_OK, effective_ids=True):
        return _private(name, path)
    unseen = "the agent looks when it opens it, and rebuilds it from the manifests"
    log, memory = Path(f"{path}-wal"), Path(f"{path}-shm")
    how = "immutable=1"
    if log.exists() and log.stat().st_size > 0:
        if not memory.exists():
            seen = f"{log.name} has what was not taken over, and only a writer could read it"
            return Check(name, WARN, seen, unseen)
        how = "readonly_shm=1"
    kept = path.with_name(f"{path.name}.damaged")
    aside = f"; a damaged one is kept as {kept}" if kept.exists() else ""
    try:
        address = f"file:{quote(str(path))}?mode=ro&{how}"
        with closing(sqlite3.connect(address, uri=True, timeout=1.0)) as connection:
            said = [row[0] for row in connection.execute("pragma quick_check(3)").fetchall()]
            if said == ["ok"]:
                rows = connection.execute("select count(*) from models").fetchone()[0]
                seen = f"{quantity(bytes_there)}, as it should be, {counted(rows, 'model')}{aside}"
                return Check(name, OK, seen)
    except sqlite3.OperationalError as error:
        return Check(name, WARN, f"cannot be looked at without a change ({error})", unseen)
    except sqlite3.DatabaseError as error:
        said = [str(error)]
    advice = (
        "the agent rebuilds it from the manifests at its start; look for a failing disk (`dmesg`)"
    )
    return Check(name, WARN, f"damaged: {some(said)}{aside}", advice)


# -- models -------------------------------------------------------------------------------------


def models(scene: Scene) -> Check:
    """The manifests, and whether what they speak of is there: names and sizes, no byte is read."""
    catalog = Catalog(scene.root)
    notes = [
        CacheKey(name) for name in trees.names(scene.root / layout.MANIFESTS) if layout.is_key(name)
    ]
    found = {key: manifest for key, manifest, _ in catalog.manifests()}
    count = f"{len(found)} on offer, {quantity(sum(known.bytes for known in found.values()))}"
    problems: list[tuple[Level, str, str]] = [(OK, count, "")]
    unread = [key for key in notes if key not in found and catalog.manifest(key) is None]
    if unread:
        advice = "restart the agent: it proves their files again"
        problems.append((WARN, f"manifests that cannot be read: {some(unread)}", advice))
    if lost := [key for key in notes if key not in found and key not in unread]:
        advice = "the agent withdraws them and fetches what is asked for"
        problems.append((WARN, f"manifests without a model: {some(lost)}", advice))
    if broken := [key for key, known in found.items() if _is_broken(catalog, key, known)]:
        advice = "`localmodel verify --repair` with their keys"
        seen = f"files missing, cut or written to: {some(broken)}"
        problems.append((FAIL, seen, advice))
    return Check("models", *worst(problems))


def _is_broken(catalog: Catalog, key: CacheKey, found: Manifest) -> bool:
    """Not, if it was retired while we looked."""
    return bool(catalog.damage(key, found)) and catalog.manifest(key) is not None


def foreign(scene: Scene) -> Check:
    """What is among the models and this agent never made."""
    name, catalog = "foreign", Catalog(scene.root)
    left, empty = [], []
    for entry in trees.names(scene.root / layout.MODELS):
        if not layout.is_key(entry):
            continue
        path, key = scene.root / layout.MODELS / entry, CacheKey(entry)
        notes = (layout.manifest, layout.sealing, layout.retiring)
        if any(os.path.lexists(scene.root / note(key)) for note in notes):
            continue
        if trees.is_directory(path) and not trees.names(path):
            empty.append(entry)  # kubelet makes one for a pod that came before its model
        elif os.path.lexists(path):
            left.append(key)
    problems: list[tuple[Level, str, str]] = []
    if empty:
        problems.append((OK, f"{len(empty)} empty ones, which kubelet makes", ""))
    if left:
        advice = (
            "the agent takes over what a cache asks for; move the others away, if no pod reads them"
        )
        problems.append((WARN, f"{len(left)} without a manifest: {some(left)}", advice))
    if stuck := [key for key in left if _is_stuck(catalog, key)]:
        advice = "`localmodel prepare --adopt`, as root, gives them to the agent"
        problems.append((WARN, f"another user's, or not to be taken over: {some(stuck)}", advice))
    if strangers := catalog.strangers():
        advice = (
            "remove them when no pod reads them: nothing asks for models by such names any more"
        )
        seen = f"named by no key, as by KServe <= 0.17: {some(strangers)}"
        problems.append((WARN, seen, advice))
    if not problems:
        return Check(name, OK, f"everything in {layout.MODELS}/ is ours")
    return Check(name, *worst(problems))


def _is_stuck(catalog: Catalog, key: CacheKey) -> bool:
    """Whether the agent, whose `models/` is, cannot take it over: only root and itself see that."""
    agents = (catalog.root / layout.MODELS).lstat().st_uid
    found = catalog.foreign(key, user=agents) if os.geteuid() in (0, agents) else None
    return found is not None and bool(found.obstacle)


def leftovers(scene: Scene) -> Check:
    """What takes room and is no model: begun, salvaged, retired."""
    name, catalog = "leftovers", Catalog(scene.root)
    try:
        begun = trees.names(scene.root / layout.INGEST)
        retired = trees.names(scene.root / layout.TRASH)
    except AgentError as error:
        if error.reason is not Reason.PERMISSION_DENIED:
            raise
        advice = "run the doctor as the agent's user to see them"
        return Check(name, WARN, "partial files are the agent's own", advice)
    problems: list[tuple[Level, str, str]] = []
    if begun:
        salvaged, known = catalog.salvaged(), catalog.ingests()
        taken = quantity(_taken(scene.root / layout.INGEST))
        problems.append((OK, f"{len(begun)} begun ({taken}): the next pull goes on there", ""))
        if salvaged:
            advice = "pull them again: their files are proven, not downloaded"
            problems.append((WARN, f"without a manifest: {some(list(salvaged))}", advice))
        if odd := [entry for entry in begun if entry not in known and entry not in salvaged]:
            advice = "the agent's next start removes what is left of its own"
            problems.append((WARN, f"without a listing: {some(odd)}", advice))
    if retired:
        taken = quantity(_taken(scene.root / layout.TRASH))
        seen = f"{len(retired)} in the trash ({taken})"
        if holder(scene) is None:
            problems.append((WARN, seen, "the next agent or `localmodel pull` gives it back"))
        else:
            problems.append((OK, f"{seen}, on their way out", ""))
    if not problems:
        return Check(name, OK, "none")
    return Check(name, *worst(problems))


def _taken(root: Path) -> int:
    """Bytes on the disk that go with it: not those of files that have a name elsewhere."""
    total = 0
    for path in trees.files_below(root):
        try:
            found = path.lstat()
        except FileNotFoundError:  # promoted or swept meanwhile
            continue
        total += found.st_blocks * 512 if found.st_nlink == 1 else 0
    return total


def newest(scene: Scene) -> tuple[str, float] | None:
    """The manifest that was touched last, and when: the last use of its model."""
    found = ((key, used) for key, _, used in Catalog(scene.root).manifests())
    return max(found, key=lambda pair: pair[1], default=None)


def ahead(scene: Scene) -> str:
    """What is wrong with the clock by the newest manifest; "" for nothing."""
    last = newest(scene)
    if last is None or last[1] <= scene.now + _AHEAD_SECONDS:
        return ""
    return f"{last[0]} was used {int(last[1] - scene.now)} s from now"
