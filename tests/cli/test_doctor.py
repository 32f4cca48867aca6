"""`doctor`: what it says of real directories, mounts, processes, hubs and tokens."""

import base64
import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from agent import layout
from agent.config import Settings
from agent.doctor import check, contents, examine, hub, identity, machine
from agent.doctor.check import Check, Level, Scene
from agent.model import cache_key
from tests.cli.test_kubectl import Plugin, plugin
from tests.cluster.nodes import group, local_model_node
from tests.conftest import FILES, URI
from tests.edges.volume import fill
from tests.fakes.cluster import FakeCluster
from tests.fakes.hub import Hub, Slow
from tests.machine import Done, Machine, until

__all__ = ["plugin"]

KEY = cache_key(URI)
NOW = 1_800_000_000.0
HUB_TOKEN = "hf_TheHubMustNotBeToldOfSesame"
SERVING = "/apis/serving.kserve.io/v1alpha1"
OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL


def doctor(localmodel: Machine, *arguments: str, **environment: str) -> dict[str, dict[str, str]]:
    done = localmodel.inline("doctor", "-o", "json", *arguments, environment=environment)
    found = {line["name"]: line for line in done.json}
    assert done.code == int(any(line["level"] == "fail" for line in done.json)), done
    return found


def levels(found: Mapping[str, Mapping[str, str]], level: str) -> set[str]:
    return {name for name, line in found.items() if line["level"] == level}


def snapshot(root: Path) -> dict[str, tuple[int, ...]]:
    """All that a change would change, times included."""
    return {
        str(path): (
            found.st_ino,
            found.st_mode,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
        )
        for path in (root, *root.rglob("*"))
        for found in (path.lstat(),)
    }


def contents_of(root: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.iterdir()}


def scene(root: Path, *, mounts: str = "", locks: str = "", **settings: Any) -> Scene:
    given = Settings(root=root, **settings)
    return Scene(settings=given, environment={}, now=NOW, mounts=mounts, locks=locks)


# -- the whole ----------------------------------------------------------------------------------


def test_a_fresh_machine_is_well_and_stays_as_it_is(localmodel: Machine) -> None:
    before = snapshot(localmodel.home)
    found = doctor(localmodel)
    assert levels(found, "fail") == set()
    assert levels(found, "warn") == {"cache"}
    assert next(iter(found)) == "versions"
    assert "Python 3." in found["versions"]["seen"]
    assert "huggingface_hub" in found["versions"]["seen"]
    assert snapshot(localmodel.home) == before


@pytest.mark.parametrize("agent_runs", [False, True])
def test_a_cache_in_use_is_well_and_stays_as_it_is(localmodel: Machine, agent_runs: bool) -> None:
    running = localmodel.agent().wait_ready() if agent_runs else None
    localmodel("pull", URI).ok()
    before = snapshot(localmodel.root)
    done = localmodel("doctor").ok()
    if running is not None:  # it turns, and notes what it does
        before = {path: before[path] for path in before if "state" not in path}
    now = snapshot(localmodel.root)
    assert {path: now[path] for path in before} == before
    assert set(now) >= set(before)
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok  ")] == []
    (agent_line,) = [line for line in lines if line.split()[1] == "agent"]
    if running is not None:
        assert f"one runs and answers; process {running.pid} has the lock" in agent_line
    else:
        assert "none runs: nobody has the lock" in agent_line
    (models_line,) = [line for line in lines if line.split()[1] == "models"]
    assert "1 on offer, 488Ki" in models_line


def test_it_needs_no_right_to_write(localmodel: Machine, tmp_path: Path) -> None:
    localmodel("pull", URI).ok()
    readable = tmp_path / "read-only"
    readable.mkdir()
    bound = subprocess.run(["mount", "--bind", localmodel.root, readable], check=False)
    if bound.returncode != 0:
        pytest.skip("NOT TESTED, no mount without root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", readable], check=True)
        done = localmodel("doctor", "-o", "json", root=readable)
    finally:
        subprocess.run(["umount", readable], check=True)
    found = {line["name"]: line for line in done.json}
    assert done.code == 1
    assert levels(found, "fail") == {"cache", "file-system", "state"}
    assert "read-only" in found["file-system"]["seen"]
    assert "1 model" in found["index"]["seen"]


@pytest.mark.parametrize("agent_runs", [False, True])
def test_another_user_hears_what_it_may(localmodel: Machine, agent_runs: bool) -> None:
    """A running agent can write; without one, this process is the one that would."""
    localmodel("pull", URI).ok()
    if agent_runs:
        localmodel.agent().wait_ready()
    for path in (localmodel.root, *localmodel.root.rglob("*")):
        shutil.chown(path, user=12345)
    powers = ",".join(f"-{power}" for power in ("dac_override", "dac_read_search", "fowner"))
    bare = ("setpriv", "--inh-caps", powers, "--bounding-set", powers)
    found = {line["name"]: line for line in localmodel("doctor", "-o", "json", under=bare).json}
    failed = set() if agent_runs else {"cache", "state"}
    assert levels(found, "fail") == failed
    assert {"index", "leftovers", "volume"} <= levels(found, "warn")
    assert found["models"]["seen"].startswith("1 on offer")


async def test_a_check_that_raises_costs_its_own_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    async def broken(scene: Scene) -> Check:
        raise ZeroDivisionError(f"with {HUB_TOKEN}")

    monkeypatch.setattr(contents, "agent", broken)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": HUB_TOKEN, "HOME": str(tmp_path)}
    found = await examine(Settings(root=tmp_path / "none"), environment, time.time())
    (line,) = [check for check in found if check.level is FAIL]
    assert (line.name, line.seen) == (
        "agent",
        "this check failed: ZeroDivisionError: with [not shown]",
    )
    assert len(found) > 15


async def test_a_disk_that_hangs_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    def hangs(scene: Scene) -> Check:
        time.sleep(5)
        raise AssertionError("nobody waits for this")

    monkeypatch.setattr("agent.doctor._QUICK", (("cache", hangs),))
    monkeypatch.setattr("agent.doctor._DISK_SECONDS", 0.2)
    environment = {"HF_ENDPOINT": hub.endpoint, "HOME": str(tmp_path)}
    found = await examine(Settings(root=tmp_path / "none"), environment, time.time())
    assert [(line.name, line.seen) for line in found if line.level is FAIL] == [
        ("cache", "no answer within 0.2 s (TimeoutError)")
    ]


def test_few_descriptors(localmodel: Machine) -> None:
    done = localmodel("doctor", "-o", "json", under=("prlimit", "--nofile=512"))
    found = {line["name"]: line for line in done.ok().json}
    assert found["descriptors"]["level"] == "warn"
    assert found["descriptors"]["seen"] == "512 at once"


def test_marks_that_make_no_sense_end_it_before_it_begins(localmodel: Machine) -> None:
    assert localmodel.inline("doctor", "--high", "10", "--low", "20").code == 2


# -- the directory and its file system ----------------------------------------------------------


def test_a_directory_that_is_none(localmodel: Machine) -> None:
    root = localmodel.root
    root.symlink_to(root)
    assert "leads to itself" in doctor(localmodel)["cache"]["seen"]
    root.unlink()
    root.symlink_to(root.parent / "nowhere")
    assert "symlink to nothing" in doctor(localmodel)["cache"]["seen"]
    root.unlink()
    root.write_text("a file")
    found = doctor(localmodel)
    assert "is no directory" in found["cache"]["seen"]
    assert found["cache"]["level"] == "fail"


def test_top_directories_that_are_not_as_the_agent_makes_them(localmodel: Machine) -> None:
    localmodel("pull", URI).ok()
    root = localmodel.root
    (root / layout.PINS).rmdir()
    (root / layout.MODELS).chmod(0o2775)
    found = doctor(localmodel)["directories"]
    assert found["level"] == "warn"
    assert "models has mode 2775, not 0755" in found["seen"]
    assert ".localmodel/pins is missing" in found["seen"]
    assert "fsGroup" in found["advice"]
    os.chown(root, 12345, 12345)
    found = doctor(localmodel)["directories"]
    assert found["level"] == "fail"
    assert "models is of user 0, the cache of 12345" in found["seen"]
    (root / layout.TRASH).rmdir()
    (root / layout.TRASH).symlink_to("/tmp")
    assert ".localmodel/trash is no directory" in doctor(localmodel)["directories"]["seen"]


def test_memory_and_a_mount_inside_are_noticed(
    localmodel: Machine, mount: Callable[[str], Path]
) -> None:
    root = mount("8m")
    found = {line["name"]: line for line in localmodel("doctor", "-o", "json", root=root).json}
    assert found["file-system"]["level"] == "warn"
    assert "tmpfs" in found["file-system"]["seen"]
    assert "a file system of its own" in found["volume"]["seen"]
    assert found["space"]["seen"].startswith("0 of 8Mi used (0%)")
    models = root / layout.MODELS
    models.mkdir()
    subprocess.run(["mount", "--bind", models, models], check=True)
    try:
        done = localmodel("doctor", "-o", "json", root=root)
    finally:
        subprocess.run(["umount", models], check=True)
    found = {line["name"]: line for line in done.json}
    assert (done.code, levels(found, "fail")) == (1, {"rename"})
    assert "models is a mount of its own" in found["rename"]["seen"]


@pytest.mark.parametrize(
    ("type", "options", "level"),
    [
        ("ext4", "rw", OK),
        ("xfs", "ro", FAIL),
        ("overlay", "rw", WARN),
        ("nfs4", "rw", WARN),
        ("cifs", "rw", WARN),
        ("fuse.s3fs", "rw", WARN),
        ("vfat", "rw", FAIL),
    ],
)
def test_a_file_system_is_judged_by_its_type(
    tmp_path: Path, type: str, options: str, level: Level
) -> None:
    root = tmp_path / "a place"
    text = (
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"23 22 0:50 / {str(root).replace(' ', chr(92) + '040')} rw,relatime shared:1"
        f" - {type} source {options}\n"
    )
    found = machine.file_system(scene(root, mounts=text))
    assert (found.level, found.seen.split(",")[0]) == (level, type)
    there = contents.state(scene(tmp_path / "x", state=root, mounts=text))
    assert there.level is OK  # not there yet
    root.mkdir(mode=0o700)
    judged = contents.state(scene(tmp_path / "x", state=root, mounts=text))
    assert judged.level is (FAIL if type in ("nfs4", "cifs") else OK)


def test_a_disk_that_is_away_and_one_that_was_changed(
    localmodel: Machine, mount: Callable[[str], Path], tmp_path: Path
) -> None:
    disk, state = mount("8m"), tmp_path / "state"
    localmodel("pull", URI, "--state", str(state), root=disk).ok()

    def volume() -> dict[str, str]:
        done = localmodel("doctor", "-o", "json", "--state", str(state), root=disk)
        found: dict[str, str] = {line["name"]: line for line in done.json}["volume"]
        return found

    assert volume()["level"] == "ok"
    assert "as this machine remembers it" in volume()["seen"]
    (disk / layout.VOLUME).write_text('{"id": "another", "dedicated": true}')
    assert (volume()["level"], "volume another" in volume()["seen"]) == ("warn", True)
    subprocess.run(["umount", "--lazy", disk], check=True)
    try:
        assert volume()["level"] == "fail"
        assert "its disk is not mounted" in volume()["seen"]
    finally:  # for the fixture to unmount
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=True)


def test_room_and_marks(localmodel: Machine, mount: Callable[[str], Path]) -> None:
    root = mount("8m")
    (root / "filler").write_bytes(bytes(5 << 20))

    def space(*flags: str, **environment: str) -> dict[str, dict[str, str]]:
        done = localmodel("doctor", "-o", "json", *flags, root=root, environment=environment)
        return {line["name"]: line for line in done.json}

    assert space()["space"]["level"] == "ok"
    tight = space("--high", "60", "--low", "50", "--limit", "1Gi")["space"]
    assert tight["level"] == "warn"
    assert "marks 50% and 60%" in tight["seen"]
    assert "above the high mark" in tight["seen"]
    assert "models take 0 of --limit 1Gi, which is more than the disk has" in tight["seen"]
    fill(root)
    assert space()["space"]["level"] == "fail"
    assert "of its own" in space(NODE_NAME="n", KUBECONFIG="/none")["kubelet"]["seen"]


@pytest.mark.parametrize(("high", "level"), [(None, OK), (82.0, WARN), (85.0, FAIL)])
def test_kubelets_thresholds_on_a_shared_file_system(
    tmp_path: Path, high: float | None, level: Level
) -> None:
    found = machine.kubelet(scene(tmp_path, node_name="gpu-1", high=high))
    assert found.level is level, found
    assert "85% down to 80%" in found.seen
    assert machine.kubelet(scene(tmp_path, high=high)).level is OK


# -- state, agent, index ------------------------------------------------------------------------


def test_a_state_directory_that_is_not_private_or_not_ours(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    found = contents.state(scene(tmp_path, state=state))
    assert (found.level, "not private" in found.seen) == (WARN, True)
    (state / "passwords.txt").touch()
    found = contents.state(scene(tmp_path, state=state))
    assert (found.level, "passwords.txt" in found.seen) == (FAIL, True)


def test_a_stale_socket_a_stopped_agent_and_a_command(localmodel: Machine, hub: Hub) -> None:
    localmodel("pull", URI).ok()
    with socket.socket(socket.AF_UNIX) as stale, contextlib.chdir(localmodel.state):
        stale.bind(layout.SOCKET)  # the whole path may be too long for an address
    found = doctor(localmodel)["agent"]
    assert found["level"] == "warn"
    assert "is stale (ConnectionRefusedError)" in found["seen"]
    hub.add("acme/slow", {"slow.bin": bytes(500_000)})
    hub.fault("slow.bin", Slow(bytes_per_second=1000))
    other = localmodel.start("pull", "hf://acme/slow")
    until((localmodel.root / layout.ingest(cache_key("hf://acme/slow")) / layout.LISTING).exists)
    found = doctor(localmodel)["agent"]
    assert f"process {other.pid} has the lock; the socket" in found["seen"]
    assert (found["level"], "a command works" in found["advice"]) == ("warn", True)
    (localmodel.state / layout.SOCKET).unlink()
    found = doctor(localmodel)["agent"]
    assert (found["level"], f"process {other.pid} has" in found["seen"]) == ("ok", True)
    other.kill()


def test_an_agent_that_does_not_answer(
    localmodel: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = localmodel.agent().wait_ready()
    monkeypatch.setattr(contents, "_ANSWER_SECONDS", 0.3)
    agent.process.send_signal(19)
    try:
        found = doctor(localmodel)["agent"]
    finally:
        agent.process.send_signal(18)
    assert found["level"] == "fail"
    assert f"process {agent.pid} has the lock, and the socket gives no answer" in found["seen"]


def test_a_damaged_index_is_left_as_it_is(localmodel: Machine) -> None:
    localmodel("pull", URI).ok()
    path = localmodel.state / layout.INDEX
    path.write_bytes(b"no database" + path.read_bytes()[11:])
    before = snapshot(localmodel.state)
    found = doctor(localmodel)["index"]
    assert (found["level"], "damaged" in found["seen"]) == ("warn", True)
    assert snapshot(localmodel.state) == before
    path.unlink()
    assert doctor(localmodel)["index"]["seen"].startswith("none yet")
    assert not path.exists()


@pytest.mark.parametrize("shared", [True, False])
def test_an_index_with_a_log_of_a_killed_agent_is_not_replayed(
    tmp_path: Path, shared: bool
) -> None:
    """With the shared memory beside it, it can be read; without, only a writer could make it."""
    live, state = tmp_path / "live", tmp_path / "state"
    live.mkdir()
    connection = sqlite3.connect(live / layout.INDEX)
    connection.execute("pragma journal_mode = wal")
    connection.execute("create table models (key text)")
    connection.execute("insert into models values ('a')")
    connection.commit()
    shutil.copytree(live, state)
    connection.close()
    if not shared:
        (state / f"{layout.INDEX}-shm").unlink()
    before = contents_of(state)
    found = contents.index(scene(tmp_path, state=state))
    assert contents_of(state) == before
    assert (found.level, "1 model" in found.seen) == ((OK, True) if shared else (WARN, False))


# -- models and what is left --------------------------------------------------------------------


def test_manifests_models_and_what_is_not_ours(localmodel: Machine) -> None:
    localmodel("pull", URI).ok()
    root = localmodel.root
    manifests, models = root / layout.MANIFESTS, root / layout.MODELS
    (manifests / ("a" * 16)).write_text("not a manifest")
    (models / ("b" * 16)).mkdir()
    (models / ("c" * 16)).mkdir()
    (models / ("c" * 16) / "weights").touch()
    (models / "old-model").mkdir()
    found = doctor(localmodel)
    assert found["models"]["level"] == "warn"
    assert f"cannot be read: {'a' * 16}" in found["models"]["seen"]
    assert found["foreign"]["level"] == "warn"
    assert f"1 without a manifest: {'c' * 16}" in found["foreign"]["seen"]
    assert "as by KServe <= 0.17: old-model" in found["foreign"]["seen"]
    assert "1 empty ones" in found["foreign"]["seen"]
    (models / KEY / "config.json").unlink()
    found = doctor(localmodel)
    assert (found["models"]["level"], KEY in found["models"]["seen"]) == ("fail", True)
    shutil.rmtree(models / KEY)
    assert f"manifests without a model: {KEY}" in doctor(localmodel)["models"]["seen"]


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED, only root can be two users")
def test_what_the_agent_could_not_take_over_and_how_it_can(localmodel: Machine) -> None:
    theirs = localmodel.root / layout.MODELS / ("c" * 16)
    theirs.mkdir(parents=True)
    (theirs / "weights").touch()
    for path in (theirs, theirs / "weights"):
        os.chown(path, 1000, 1000)
    localmodel.inline("prepare", "--owner", "64000").ok()
    assert "prepare --adopt" in doctor(localmodel)["foreign"]["advice"]
    localmodel.inline("prepare", "--owner", "64000", "--adopt").ok()
    assert "prepare --adopt" not in doctor(localmodel)["foreign"]["advice"]


def test_leftovers_with_their_bytes(localmodel: Machine, hub: Hub) -> None:
    hub.fault("model-1.safetensors", Slow(bytes_per_second=100_000))
    command = localmodel.start("pull", URI)
    until((localmodel.root / layout.ingest(KEY) / "tree/model-2.safetensors").exists)
    command.kill()
    gone = localmodel.root / layout.TRASH / f"{KEY}.0"
    gone.mkdir()
    (gone / "weights").write_bytes(bytes(1 << 20))
    found = doctor(localmodel)["leftovers"]
    assert found["level"] == "warn"
    assert found["seen"].startswith("1 begun (")
    assert "1 in the trash (1Mi)" in found["seen"]
    (localmodel.root / layout.ingest(KEY) / layout.LISTING).unlink()
    assert f"without a manifest: {KEY}" in doctor(localmodel)["leftovers"]["seen"]


# -- the clock, the hub, the token --------------------------------------------------------------


def test_a_manifest_of_the_future(localmodel: Machine) -> None:
    localmodel("pull", URI).ok()
    assert "within 30 s of the hub's" in doctor(localmodel)["clock"]["seen"]
    later = time.time() + 7200
    os.utime(localmodel.root / layout.manifest(KEY), (later, later))
    found = doctor(localmodel)["clock"]
    assert found["level"] == "warn"
    assert f"{KEY} was used 7" in found["seen"]


@pytest.mark.parametrize(
    ("headers", "level"),
    [
        ({"date": formatdate(NOW)}, OK),
        ({"date": formatdate(NOW - 600)}, WARN),
        ({"date": formatdate(NOW + 31)}, WARN),
        ({"date": formatdate(NOW - 600), "age": "595"}, OK),
        ({"date": "yesterday"}, OK),
        ({}, OK),
    ],
)
def test_the_hubs_clock(tmp_path: Path, headers: dict[str, str], level: Level) -> None:
    answer = hub.Visit("http://hub", status=200, headers=headers, answered_at=NOW)
    assert hub.clock(scene(tmp_path), answer).level is level


def test_a_hub_that_cannot_be_reached_is_a_warning_with_the_step_that_failed(
    localmodel: Machine, tmp_path: Path
) -> None:
    found = doctor(localmodel, HF_ENDPOINT="http://no-such-host.invalid")["hub"]
    assert found["level"] == "warn"
    assert "DNS failed" in found["seen"]
    assert "gaierror" in found["seen"]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        found = doctor(localmodel, HF_ENDPOINT=f"http://127.0.0.1:{port}")["hub"]
        assert "TCP failed" in found["seen"]
        assert "ConnectionRefusedError" in found["seen"]
    through = doctor(localmodel, http_proxy=f"http://me:pa55word@127.0.0.1:{port}", no_proxy="")
    assert f"through the proxy 127.0.0.1:{port} (http_proxy): TCP failed" in through["hub"]["seen"]
    endpoint = localmodel.environment["HF_ENDPOINT"].replace("http:", "https:")
    found = doctor(localmodel, HF_ENDPOINT=endpoint)["hub"]
    assert "TLS failed" in found["seen"]
    assert "SSLError" in found["seen"]


def test_a_hub_that_is_silent_is_given_five_seconds(
    localmodel: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = doctor(localmodel, HF_ENDPOINT=endpoint)["hub"]
    assert found["level"] == "warn"
    assert "HTTP" in found["seen"]
    assert "TimeoutError" in found["seen"]


def test_a_token_is_found_and_never_said(localmodel: Machine, hub: Hub, tmp_path: Path) -> None:
    del localmodel.environment["HF_TOKEN"]
    assert doctor(localmodel)["credentials"]["seen"].startswith("no token")
    home = tmp_path / "hf"
    home.mkdir()
    file = home / "token"
    said: list[Done] = []

    def credentials(**environment: str) -> tuple[str, str]:
        done = localmodel.inline("doctor", "-o", "json", environment=environment)
        said.extend((done, localmodel.inline("doctor", environment=environment)))
        found = {line["name"]: line for line in done.json}["credentials"]
        return found["level"], found["seen"]

    assert credentials(HF_TOKEN=HUB_TOKEN) == ("ok", "HF_TOKEN is set")
    assert credentials(HF_TOKEN=f"{HUB_TOKEN}\r\nmore of it")[0] == "warn"
    file.write_text(f"{HUB_TOKEN}\n")
    file.chmod(0o644)
    level, seen = credentials(HF_HOME=str(home))
    assert (level, "readable by others" in seen) == ("warn", True)
    file.chmod(0o600)
    assert credentials(HF_HOME=str(home))[0] == "ok"
    assert credentials(HF_TOKEN_PATH=str(file))[0] == "ok"
    file.write_text("\n")
    assert credentials(HF_HOME=str(home))[0] == "warn"
    file.unlink()
    file.mkdir()
    assert credentials(HF_HOME=str(home))[0] == "fail"
    assert credentials(HF_ENDPOINT=f"http://me:{HUB_TOKEN}@127.0.0.1:1")[0] == "ok"
    assert credentials(http_proxy=f"http://me:{HUB_TOKEN}@127.0.0.1:1")[0] == "ok"
    assert credentials(http_proxy=f"socks5://me:{HUB_TOKEN}@127.0.0.1:1")[0] == "ok"
    assert not [done for done in said if HUB_TOKEN in done.stdout + done.stderr]
    assert {request.authorization for request in hub.requests} == {None}


def test_nothing_said_leaves_its_line_or_tells_a_secret() -> None:
    secrets = check.secrets_in([f"{HUB_TOKEN}\n", "ab"])
    told = check.without(Check("x", OK, f"a\nb \x1b[31m {HUB_TOKEN}", "http://a:b@c/ ab"), secrets)
    assert told.seen == "a b \\x1b[31m [not shown]"
    assert told.advice == "http://[not shown]@c/ ab"


# -- a node -------------------------------------------------------------------------------------


def jwt(claims: Any) -> str:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'RS256'})}.{part(claims)}.signature"


def claims(node: str | None = "gpu-1", *, iat: float = NOW - 60, exp: float = NOW + 3540) -> Any:
    bound = {
        "namespace": "localmodel-system",
        "serviceaccount": {"name": "localmodel-agent", "uid": "u"},
        "pod": {"name": "localmodel-agent-x", "uid": "u"},
        **({"node": {"name": node, "uid": "u"}} if node else {}),
    }
    return {"iat": iat, "exp": exp, "kubernetes.io": bound}


@pytest.mark.parametrize(
    ("text", "level", "seen"),
    [
        (jwt(claims()), OK, "of localmodel-system/localmodel-agent, pod localmodel-agent-x"),
        (jwt(claims()), OK, "bound to node gpu-1, 1m old, 59m left"),
        (jwt(claims(iat=NOW - 7200, exp=NOW - 60)), FAIL, "expired 1m ago"),
        (jwt(claims(iat=NOW - 3500, exp=NOW + 100)), WARN, "1m40s left"),
        (jwt(claims("gpu-2")), FAIL, "bound to node gpu-2, and NODE_NAME is gpu-1"),
        (jwt(claims(None)), FAIL, "bound to no node"),
        (jwt(claims(iat=NOW + 3600, exp=NOW + 7200)), WARN, "made 1h from now"),
        (jwt({"kubernetes.io": claims()["kubernetes.io"]}), WARN, "never expires"),
        (jwt({"exp": "soon", "kubernetes.io": ["x"]}), FAIL, "of nobody it names"),
        (jwt([1]), WARN, "holds no JWT"),
        ("a.!!.c", WARN, "holds no JWT"),
        ("opaque", WARN, "holds no JWT"),
        ("\n", FAIL, "is empty"),
    ],
)
def test_the_claims_of_a_token(text: str, level: Level, seen: str) -> None:
    found = identity.judged(text, "/token", node="gpu-1", now=NOW)
    assert found.level is level, found
    assert seen in found.seen
    assert text.strip() == "" or text not in found.seen + found.advice


class Surroundings:
    """A fake API server, and a machine that is its node `gpu-1`."""

    def __init__(self, cluster: FakeCluster, localmodel: Machine) -> None:
        self.cluster = cluster
        self.localmodel = localmodel
        self.kubeconfig = cluster.kubeconfig
        self.give(jwt(claims(iat=time.time() - 60, exp=time.time() + 3540)))

    def give(self, token: str) -> None:
        """The fake compares tokens in small letters."""
        self.cluster.token_file.write_text(token)
        self.cluster.token = token.lower()

    async def __call__(self, **environment: str) -> dict[str, Check]:
        settings = Settings(root=self.localmodel.root, node_name="gpu-1", pod_name="agent-x")
        given = {**self.localmodel.environment, **environment}
        given.setdefault("KUBECONFIG", str(self.kubeconfig))
        found = await examine(settings, given, time.time())
        secret = self.cluster.token_file.read_text()
        assert not [line for line in found if secret in line.seen + line.advice]
        return {line.name: line for line in found}

    async def set_up(self) -> None:
        await self.cluster.put(
            f"{SERVING}/localmodelnodegroups/gpu", group("gpu", str(self.localmodel.root))
        )
        entry = {"modelName": "tiny", "sourceModelUri": URI, "nodeGroup": "gpu"}
        await self.cluster.put(f"{SERVING}/localmodelnodes/gpu-1", local_model_node("gpu-1", entry))


CLUSTER = ("token", "api-server", "crds", "node", "rivals", "groups", "read-only")


async def test_a_node_that_is_well(tmp_path: Path, localmodel: Machine) -> None:
    async with FakeCluster(tmp_path).serving() as cluster:
        around = Surroundings(cluster, localmodel)
        await around.set_up()
        found = await around()
        assert {name: found[name].level for name in CLUSTER} == {
            **dict.fromkeys(CLUSTER, OK),
            "read-only": WARN,
        }
        assert cluster.requests.keys() == {"GET"}
        assert "asks for 1 model" in found["node"].seen
        assert "groups whose volumes are writable: gpu" in found["read-only"].seen
        spec = group("gpu", str(localmodel.root))
        spec["spec"]["persistentVolumeSpec"]["mountOptions"] = ["ro"]
        await cluster.put(f"{SERVING}/localmodelnodegroups/gpu", spec)
        volume = {"spec": {"local": {"path": str(localmodel.root)}}}
        await cluster.put("/api/v1/persistentvolumes/tiny-gpu", volume)
        found = await around()
        assert found["read-only"].level is WARN
        assert "PersistentVolumes that are writable: tiny-gpu" in found["read-only"].seen
        volume["spec"]["mountOptions"] = ["ro"]  # type: ignore[assignment]
        await cluster.put("/api/v1/persistentvolumes/tiny-gpu", volume)
        assert (await around())["read-only"].level is OK


async def test_a_node_with_other_groups_and_bad_entries(
    tmp_path: Path, localmodel: Machine
) -> None:
    async with FakeCluster(tmp_path).serving() as cluster:
        around = Surroundings(cluster, localmodel)
        found = await around()
        assert (found["node"].level, found["groups"].level) == (WARN, WARN)
        assert "there is no LocalModelNode gpu-1" in found["node"].seen
        await around.set_up()
        await cluster.put(f"{SERVING}/localmodelnodegroups/other", group("other", "/elsewhere"))
        assert "elsewhere: other (/elsewhere)" in (await around())["groups"].seen
        await cluster.put(f"{SERVING}/localmodelnodegroups/gpu", group("gpu", "/mnt/models"))
        condition = {"type": "Degraded", "status": "True", "reason": "PathMismatch"}
        raw = cluster.get(f"{SERVING}/localmodelnodes/gpu-1")
        raw["spec"]["localModels"].append({"modelName": "bad"})
        raw["status"] = {"conditions": [{**condition, "message": "the volumes\nare elsewhere"}]}
        await cluster.put(f"{SERVING}/localmodelnodes/gpu-1", raw)
        found = await around()
        assert found["groups"].level is FAIL
        assert "elsewhere, and used here: gpu (/mnt/models)" in found["groups"].seen
        assert "nobody can understand: bad" in found["node"].seen
        assert "Degraded by PathMismatch: the volumes are elsewhere" in found["node"].seen


async def test_a_cluster_that_lacks_refuses_or_is_away(tmp_path: Path, localmodel: Machine) -> None:
    async with FakeCluster(tmp_path, kinds={"pods"}).serving() as cluster:
        around = Surroundings(cluster, localmodel)
        found = await around()
        assert found["api-server"].level is OK
        assert found["agent"].level is WARN
        assert found["crds"].level is FAIL
        assert "localmodelnodes" in found["crds"].seen
        assert "were not looked at" in found["read-only"].seen or found["read-only"].level is FAIL
        cluster.faults.answers = [(403, {})] * 6
        found = await around()
        assert "no right to list localmodelnodes" in found["crds"].seen
        around.give(jwt(claims("gpu-2")))
        good, cluster.token = cluster.token, "another"
        found = await around()
        assert (found["token"].level, found["api-server"].level) == (FAIL, FAIL)
        assert "does not know our token" in found["api-server"].seen
        cluster.token = good
        cluster.faults.refuse = True
        assert (await around())["api-server"].level is FAIL
    found = await around(KUBECONFIG="/none")
    assert found["api-server"].level is FAIL
    assert "set KUBECONFIG" in found["api-server"].seen


def test_in_some_pod_of_a_cluster_nothing_of_it_fails(localmodel: Machine) -> None:
    found = doctor(localmodel, KUBERNETES_SERVICE_HOST="127.0.0.1", KUBERNETES_SERVICE_PORT="1")
    assert levels(found, "fail") == set()
    assert {"token", "api-server"} <= levels(found, "warn")


def test_kubectl_runs_it_on_the_node(plugin: Plugin) -> None:
    assert plugin("doctor", "--node", "gpu-7", FAKE_PODS="pod/agent-x\n").code == 0
    assert plugin.asked[-1].endswith("pod/agent-x -- localmodel doctor")


def test_the_files_of_a_model_are_not_read(localmodel: Machine) -> None:
    """Names and sizes only: a bit that went bad is `verify`'s to find."""
    localmodel("pull", URI).ok()
    path = localmodel.root / layout.model(KEY) / "config.json"
    found = path.lstat()
    path.chmod(0o644)
    path.write_bytes(bytes(len(FILES["config.json"])))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert doctor(localmodel)["models"]["level"] == "ok"
