"""plan, why, pin, unpin, evict: with an agent and without one they say and do the same."""

import os
import time
from pathlib import Path

import pytest

from agent import layout
from agent.cli.render import size
from agent.model import cache_key, quantity
from tests.conftest import FILES, REPO, URI
from tests.fakes.hub import Hub
from tests.machine import Machine, until

SIZE = sum(map(len, FILES.values()))
KEY = cache_key(URI)
OTHER = f"{URI}/sub"


@pytest.fixture(params=["agent", "alone"])
def served(request: pytest.FixtureRequest, localmodel: Machine, hub: Hub) -> Machine:
    """A machine with one model that nothing asks for, with an agent that runs or without."""
    hub.add(REPO, FILES)
    localmodel("pull", URI).ok()
    if request.param == "agent":
        localmodel.agent("--min-age", "0s").wait_ready()
    return localmodel


# -- why ------------------------------------------------------------------------------------------


def test_why_says_why_a_model_is_here_and_that_it_would_go(served: Machine) -> None:
    lines = served("why", URI, environment={"LOCALMODEL_MIN_AGE": "0s"}).ok().stdout.splitlines()
    assert lines[0] == "here, and would go if room were needed: 1 of 1 that may go"
    assert "  nothing in the desired state asks for it" in lines
    assert any(line.endswith(f"ago: complete and proven, {quantity(SIZE)}") for line in lines), (
        lines
    )
    by_key = served("why", KEY[:8], "-o", "json").ok().json
    assert (by_key["key"], by_key["uri"]) == (KEY, URI)


def test_why_of_what_is_not_here(served: Machine) -> None:
    done = served("why", OTHER).ok()
    assert done.stdout.startswith("not here: nothing asks for it")
    bad = served("why", "nonsense")
    assert bad.code == 2
    assert "'nonsense' is no URI, and no cache or key here" in bad.stderr


# -- pins and evictions ---------------------------------------------------------------------------


def test_what_is_pinned_stays_and_what_is_not_goes(served: Machine) -> None:
    assert served("pin", URI).ok().stdout == f"pinned  {URI}\n"
    assert (served.root / layout.PINS / KEY).exists()
    kept = served("evict", URI)
    assert kept.code == 1
    assert f"{URI}: it is pinned (Kept)" in kept.stderr
    assert "localmodel why" in kept.stderr
    assert served("why", URI).ok().stdout.startswith("here, and stays: it is pinned")

    assert served("unpin", URI).ok().stdout == f"unpinned  {URI}\n"
    would = served("evict", "--dry-run", URI).ok().stdout
    assert would == f"would go  {URI}, frees {size(SIZE)}\n"
    assert served.sealed() == {KEY}
    assert served("evict", URI).ok().stdout == f"evicted  {URI}, frees {size(SIZE)}\n"
    assert served.sealed() == set()
    assert not served.model(URI).exists()
    gone = served("why", URI).ok().stdout.splitlines()
    assert gone[0].endswith("ago, because an operator evicted it")
    assert "evicted, because an operator evicted it" in gone[-1]


def test_one_may_pin_what_is_not_here_yet(served: Machine) -> None:
    assert served("pin", OTHER).ok().stdout == f"pinned  {OTHER} (it is not here yet)\n"


def test_of_several_those_go_that_nothing_keeps(served: Machine) -> None:
    served("pull", OTHER).ok()
    served("pin", URI).ok()
    done = served("evict", URI, OTHER, "-o", "json")
    assert done.code == 1
    assert [event["event"] for event in done.json] == ["error", "evicted"]
    assert served.sealed() == {KEY}


def test_what_the_desired_state_wants_is_not_evicted(localmodel: Machine, hub: Hub) -> None:
    hub.add(REPO, FILES)
    agent = localmodel.agent().wait_ready()
    localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    done = localmodel("evict", URI)
    assert done.code == 1
    assert "the desired state wants it here at all times" in done.stderr


def test_what_a_process_reads_is_not_evicted(served: Machine) -> None:
    with (served.model(URI) / "model-1.safetensors").open("rb"):
        done = served("evict", URI)
    assert done.code == 1
    assert "in use" in done.stderr
    until(lambda: served("evict", URI).code == 0)  # who was spared is spared for some seconds


# -- plan -----------------------------------------------------------------------------------------


def test_plan_says_whether_a_size_fits_and_what_would_go(served: Machine) -> None:
    assert served("plan", "1Ki").ok().stdout == "it fits: 1.0 KiB, nothing would go for it\n"
    too_large = served("plan", "999P")
    assert too_large.code == 1
    assert too_large.stdout.startswith("it does not fit: needs 887Pi; this volume may hold ")


def test_plan_asks_the_source_for_a_uri_and_keeps_nothing_of_it(served: Machine, hub: Hub) -> None:
    assert served("plan", URI).ok().stdout == f"{URI} is here already\n"
    hub.clear()
    done = served("plan", OTHER, "-o", "json").ok().json
    assert (done["fits"], done["here"], done["uri"]) == (True, False, OTHER)
    assert 0 < done["bytes"] < SIZE
    assert hub.bytes_sent() == 0
    assert not list((served.root / layout.INGEST).iterdir())


def test_plan_names_what_would_go_by_limit(localmodel: Machine, hub: Hub) -> None:
    hub.add(REPO, FILES)
    localmodel("pull", URI).ok()
    flags = ("--limit", str(SIZE + 10), "--min-age", "0s")
    done = localmodel("plan", "100Ki", *flags, "-o", "json").ok().json
    assert [gone["uri"] for gone in done["evicts"]] == [URI]
    assert localmodel.sealed() == {KEY}
    young = localmodel("plan", "100Ki", "--limit", str(SIZE + 10))
    assert young.code == 1
    assert "are free below the limit and 0 could be evicted" in young.stdout


# -- limits of pull -------------------------------------------------------------------------------


def test_pulls_evict_each_other_within_the_limit(localmodel: Machine, hub: Hub) -> None:
    hub.add(REPO, FILES)
    other = "acme/other"
    hub.add(other, {"model.safetensors": b"o" * SIZE})
    localmodel("pull", URI).ok()
    flags = ("--limit", str(SIZE + 100), "--min-age", "0s")
    localmodel("pull", f"hf://{other}", *flags).ok()
    assert localmodel.sealed() == {cache_key(f"hf://{other}")}
    lines = localmodel("why", URI).ok().stdout.splitlines()
    assert lines[0].endswith("ago, because its room was needed")


def test_what_models_share_counts_once(localmodel: Machine, hub: Hub) -> None:
    """A fine-tune of 110 KiB beside its base of 100: a limit of 130 holds both, none is evicted."""
    weights = os.urandom(100 * 1024)
    hub.add("acme/base", {"model.safetensors": weights})
    tuned = {"model.safetensors": weights, "adapter.safetensors": os.urandom(10 * 1024)}
    hub.add("acme/tuned", tuned)
    localmodel.environment |= {"LOCALMODEL_LIMIT": "130Ki", "LOCALMODEL_MIN_AGE": "0s"}
    localmodel("pull", "hf://acme/base").ok()
    done = localmodel("pull", "hf://acme/tuned").ok()
    assert "100.0 KiB were here already" in done.stdout
    assert len(localmodel.sealed()) == 2
    frees = localmodel("evict", "--dry-run", "hf://acme/tuned").ok().stdout
    assert frees == "would go  hf://acme/tuned, frees 10.0 KiB\n"
    hub.add("acme/other", {"model.safetensors": os.urandom(100 * 1024)})
    localmodel("pull", "hf://acme/other").ok()
    assert localmodel.sealed() == {cache_key("hf://acme/other")}


def test_a_pull_that_does_not_fit_is_refused_with_the_numbers(
    localmodel: Machine, hub: Hub
) -> None:
    hub.add(REPO, FILES)
    done = localmodel("pull", URI, "--limit", "100Ki")
    assert done.code == 1
    assert f"needs {quantity(SIZE)}; this volume may hold 100Ki" in done.stderr
    assert hub.bytes_sent("model-1.safetensors") == 0


# -- what leaves the desired state ----------------------------------------------------------------


def _until_gone(machine: Machine) -> None:
    until(lambda: machine.sealed() == set(), seconds=40)


def test_what_left_is_kept_for_as_long_as_its_cache_said(localmodel: Machine, hub: Hub) -> None:
    hub.add(REPO, FILES)
    agent = localmodel.agent("--retain", "1h").wait_ready()
    path = localmodel.want("tiny", URI, retain="2s")
    agent.wait_state("tiny", "Ready")
    path.unlink()
    until(lambda: agent.status("tiny") == {})
    assert localmodel.sealed() == {KEY}
    _until_gone(localmodel)
    assert "because it had left the desired state" in localmodel("why", URI).ok().stdout
    assert agent.metrics()["localmodel_evictions_total Left"] == 1


def test_without_a_desired_state_a_command_takes_nothing_for_left(
    localmodel: Machine, hub: Hub
) -> None:
    """`localmodel ls` beside a stopped agent must not remove what its caches ask for."""
    hub.add(REPO, FILES)
    agent = localmodel.agent("--retain", "0s").wait_ready()
    localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    agent.stop()
    localmodel("why", URI, environment={"LOCALMODEL_RETAIN": "0s"}).ok()
    hub.add("acme/other", {"a.bin": b"a"})
    localmodel("pull", "hf://acme/other", "--retain", "0s").ok()
    assert KEY in localmodel.sealed()
    agent = localmodel.agent("--retain", "0s").wait_ready()
    time.sleep(0.5)
    assert KEY in localmodel.sealed()


def test_a_model_on_demand_waits_to_be_asked_for_and_expires(localmodel: Machine, hub: Hub) -> None:
    hub.add(REPO, FILES)
    agent = localmodel.agent().wait_ready()
    localmodel.want("tiny", URI, policy="on-demand", ttl="2s")
    status = agent.wait_state("tiny", "Pending")
    assert status["modelStatus"] == "ModelDownloadPending"
    assert hub.bytes_sent() == 0
    assert "nobody on this node asks for it" in localmodel("why", URI).ok().stdout
    localmodel("pull", URI).ok()
    agent.wait_state("tiny", "Ready")
    _until_gone(localmodel)
    agent.wait_state("tiny", "Pending")
    assert agent.metrics()["localmodel_evictions_total Expired"] == 1
    localmodel("pull", URI).ok()
    assert agent.metrics()["localmodel_ghost_hits_total"] == 1


def test_a_mistake_in_an_annotation_is_named(localmodel: Machine, hub: Hub, tmp_path: Path) -> None:
    agent = localmodel.agent().wait_ready()
    localmodel.want("a", URI, policy="lazy")
    localmodel.want("b", URI, ttl="1h")
    localmodel.want("c", URI, retain="a week")
    said = [
        agent.wait_state(name, "Failed", reason="InvalidSpec")["message"]
        for name in ("a", "b", "c")
    ]
    assert "localmodel-agent.io/policy is not eager or on-demand" in said[0]
    assert "localmodel-agent.io/ttl needs localmodel-agent.io/policy: on-demand" in said[1]
    assert "localmodel-agent.io/retain: 'a week' is not a duration" in said[2]
