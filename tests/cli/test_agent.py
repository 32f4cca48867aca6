"""`localmodel agent` as a command, and how the verbs find it: lock, socket, state directory."""

import os
import signal
import stat
from pathlib import Path

from agent import layout
from agent.model import cache_key
from tests.conftest import FILES, URI
from tests.fakes.hub import Hub, Slow
from tests.machine import Agent, Machine, files_of, until


def test_a_pull_goes_through_the_socket_of_a_running_agent(
    localmodel: Machine, agent: Agent
) -> None:
    found = localmodel.inline("pull", URI, "-o", "json").ok().json
    assert found["result"] == "downloaded"
    assert agent.said(f"{URI} is Ready")
    assert localmodel.inline("pull", URI, "-o", "json").ok().json["result"] == "hit"
    assert agent.metrics()["localmodel_requests_total hit"] == 1


def test_the_socket_is_for_the_agents_user_alone(localmodel: Machine, agent: Agent) -> None:
    assert stat.S_IMODE(localmodel.state.stat().st_mode) == 0o700
    assert stat.S_ISSOCK((localmodel.state / layout.SOCKET).stat().st_mode)


def test_a_socket_that_a_killed_agent_left_is_in_nobodys_way(
    localmodel: Machine, agent: Agent
) -> None:
    agent.kill()
    assert (localmodel.state / layout.SOCKET).exists()
    assert localmodel.inline("ls", "-o", "json").ok().json == []
    assert localmodel.inline("pull", URI, "-o", "json").ok().json["result"] == "downloaded"
    again = localmodel.agent().wait_ready()
    assert localmodel.inline("pull", URI, "-o", "json").ok().json["result"] == "hit"
    assert again.stop() == 0
    assert not (localmodel.state / layout.SOCKET).exists()


def test_a_second_agent_refuses_and_names_the_first(localmodel: Machine, agent: Agent) -> None:
    second = localmodel.agent()
    assert second.process.wait(timeout=30) == 1
    assert f"(process {agent.pid}) already manages {localmodel.root}" in second.log_text()
    assert "(Locked)" in second.log_text()
    assert "stop the other agent" in second.log_text()
    assert agent.get("/healthz") == (200, "ok\n")
    # The first one's socket was not taken away.
    assert localmodel.inline("ls", "-o", "json").ok().json == []


def test_a_verb_that_changes_something_refuses_where_only_the_lock_is_seen(
    localmodel: Machine, agent: Agent, tmp_path: Path
) -> None:
    """With another --state the agent cannot be found, and its volume must not be touched."""
    refused = localmodel.inline("pull", URI, "-o", "json", "--state", str(tmp_path / "elsewhere"))
    assert (refused.code, refused.json["reason"]) == (1, "Locked")
    assert f"process {agent.pid}" in refused.json["message"]
    assert "--state" in refused.json["advice"]


def test_a_socket_is_found_below_any_length_of_path(localmodel: Machine) -> None:
    state = localmodel.home / ("long-" * 20) / ("deep-" * 20) / "state"
    assert len(os.fsencode(state)) > 200
    localmodel.state = state
    agent = localmodel.agent("--state", str(state)).wait_ready()
    pulled = localmodel.inline("pull", URI, "-o", "json", "--state", str(state)).ok().json
    assert pulled["result"] == "downloaded"
    assert agent.said(f"{URI} is Ready")
    assert (state / layout.INDEX).exists()
    assert agent.stop() == 0


def test_a_state_directory_that_holds_other_things_is_left_alone(
    localmodel: Machine, tmp_path: Path
) -> None:
    """`--state /tmp` must not close /tmp to everybody else."""
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "somebody's file").touch()
    refused = localmodel.inline("pull", URI, "-o", "json", "--state", str(shared))
    assert (refused.code, refused.json["reason"]) == (2, "InvalidSpec")
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755
    assert [path.name for path in shared.iterdir()] == ["somebody's file"]


def test_a_pull_whose_agent_stops_is_told_so_and_loses_nothing(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    hub.fault("model-1.safetensors", Slow(bytes_per_second=50_000))
    command = localmodel.start("pull", URI, "-o", "json")
    until(lambda: hub.bytes_sent("model-1.safetensors") > 20_000)
    assert agent.stop() == 0
    done = command.done()
    assert done.code == 1
    assert "the agent stops" in done.json["message"]
    assert "Traceback" not in done.stderr
    hub.clear_faults()
    hub.clear()
    localmodel.inline("pull", URI).ok()
    assert 0 < hub.bytes_sent("model-1.safetensors") < len(FILES["model-1.safetensors"])


def test_a_pull_whose_agent_is_killed_is_told_so(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    hub.fault("model-1.safetensors", Slow(bytes_per_second=50_000))
    command = localmodel.start("pull", URI, "-o", "json")
    until(lambda: hub.bytes_sent("model-1.safetensors") > 20_000)
    agent.kill()
    done = command.done()
    assert done.code == 1
    assert "the agent went away" in done.json["message"]
    assert "Traceback" not in done.stderr


def test_a_download_that_nobody_waits_for_any_more_is_stopped(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    hub.fault("model-1.safetensors", Slow(bytes_per_second=50_000))
    command = localmodel.start("pull", URI)
    until(lambda: hub.bytes_sent("model-1.safetensors") > 20_000)
    command.kill()
    until(lambda: agent.said(f"{URI} is Partial"), agent.log_text)
    # A progress line would promise something to a waiting pod.
    until(lambda: not (localmodel.root / layout.progress(cache_key(URI))).exists())
    assert agent.metrics()["localmodel_models Partial"] == 1


def test_sigint_stops_an_agent_like_sigterm(localmodel: Machine, agent: Agent) -> None:
    assert agent.stop(signal.SIGINT) == 0
    assert agent.said("stopping")


def test_an_agent_says_what_is_wrong_with_its_flags(localmodel: Machine, hub: Hub) -> None:
    for flags, says in (
        (["--listen", "nowhere"], "--listen 'nowhere' must be host:port"),
        (["--listen", "127.0.0.1:²"], "must be host:port"),
        (["--high", "50", "--low", "60"], "must be 0 < low <= high <= 100"),
        (["--max-rate", "0"], "--max-rate must be greater than 0"),
        (["--root", ""], "--root is empty"),
    ):
        done = localmodel.inline("agent", *flags)
        assert done.code == 2, flags
        assert says in done.stderr
    taken = hub.endpoint.removeprefix("http://")
    done = localmodel("agent", "--listen", taken)
    assert done.code == 2
    assert f"cannot listen on {taken}: " in done.stderr


def test_an_agent_without_a_desired_directory_serves_pulls(localmodel: Machine) -> None:
    missing = localmodel.home / "not" / "there"
    agent = localmodel.agent(desired=missing).wait_ready()
    localmodel.inline("pull", URI).ok()
    assert files_of(localmodel.model(URI)) == FILES
    assert agent.said(str(missing)), "a directory that is not there is complained of"
    assert not missing.exists(), "and not made: its name may be mistyped"
