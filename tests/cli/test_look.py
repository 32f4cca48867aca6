"""`ls`, `show` and `verify`: looking at a cache, and mending it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agent import layout
from agent.model import cache_key
from tests.conftest import FILES, REPO, URI
from tests.fakes.hub import Hub, Slow, Status
from tests.machine import Agent, Machine, files_of, until

KEY = cache_key(URI)
LISTED_FIELDS = {"key", "uri", "revision", "bytes", "state", "last_used", "fingerprint"}


def _spoil(path: Path, *, at: int = 0) -> None:
    """One wrong byte, the size unchanged."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))
    path.chmod(0o444)


# -- ls and show --------------------------------------------------------------------------------


def test_ls_of_nothing_is_an_empty_list(localmodel: Machine) -> None:
    assert localmodel("ls", "-o", "json").ok().json == []
    assert localmodel("ls").ok().stdout.split() == [
        *("KEY", "STATE", "SIZE", "REVISION", "LAST", "USED", "URI")
    ]
    assert not localmodel.root.exists()


@pytest.mark.parametrize("through_an_agent", [False, True])
def test_ls_lists_what_is_ready(localmodel: Machine, hub: Hub, through_an_agent: bool) -> None:
    if through_an_agent:
        localmodel.agent().wait_ready()
    pulled = localmodel("pull", URI, "-o", "json").ok().json
    (listed,) = localmodel("ls", "-o", "json").ok().json
    assert set(listed) >= LISTED_FIELDS
    same = LISTED_FIELDS - {"state", "last_used"}
    assert {name: listed[name] for name in same} == {name: pulled[name] for name in same}
    assert listed["state"] == "Ready"
    assert listed["last_used"].endswith("Z")
    _, row = localmodel("ls").ok().stdout.splitlines()
    assert row.split()[:4] == [KEY, "Ready", "488.3", "KiB"]
    assert row.endswith(URI)


@pytest.mark.parametrize("through_an_agent", [False, True])
def test_a_killed_pull_leaves_a_partial_model(
    localmodel: Machine, hub: Hub, through_an_agent: bool
) -> None:
    hub.fault("model-1.safetensors", Slow(bytes_per_second=100_000))
    command = localmodel.start("pull", URI)
    until(lambda: hub.bytes_sent("model-1.safetensors") > 50_000)
    until((localmodel.root / layout.ingest(KEY) / "tree/model-2.safetensors").exists)
    command.kill()
    if through_an_agent:
        localmodel.agent().wait_ready()
    (listed,) = localmodel("ls", "-o", "json").ok().json
    assert (listed["state"], listed["bytes"]) == ("Partial", sum(map(len, FILES.values())))
    assert 200_000 < listed["downloaded_bytes"] < listed["bytes"]
    assert " of " in localmodel("ls").ok().stdout


def test_looking_needs_neither_the_lock_nor_a_right_to_write(
    localmodel: Machine, hub: Hub, tmp_path: Path
) -> None:
    localmodel("pull", URI).ok()
    hub.add("acme/slow", {"slow.bin": bytes(500_000)})
    hub.fault("slow.bin", Slow(bytes_per_second=1000))
    uri = "hf://acme/slow"
    other = localmodel.start("pull", uri)  # holds the lock
    until((localmodel.root / layout.ingest(cache_key(uri)) / layout.LISTING).exists)
    readable = tmp_path / "read-only"
    readable.mkdir()
    subprocess.run(["mount", "--bind", localmodel.root, readable], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", readable], check=True)
        listed = localmodel("ls", "-o", "json", root=readable).ok().json
        assert {model["state"] for model in listed} == {"Ready", "Partial"}
        localmodel("show", URI, root=readable).ok()
        localmodel("verify", "--all", root=readable).ok()
        refused = localmodel("pull", f"{URI}/sub", "-o", "json", root=readable)
        assert (refused.code, refused.json["reason"]) == (1, "ReadOnly")
        assert "--root" in refused.json["advice"]
    finally:
        subprocess.run(["umount", readable], check=True)
    other.kill()


@pytest.mark.parametrize("agent_runs", [False, True])
def test_another_user_may_look_at_what_is_on_offer(localmodel: Machine, agent_runs: bool) -> None:
    """Partial files and the socket are the agent's own; what is on offer is everybody's."""
    localmodel("pull", URI).ok()
    if agent_runs:
        localmodel.agent().wait_ready()
    for path in (localmodel.root, *localmodel.root.rglob("*")):
        shutil.chown(path, user=12345)
    # Another user is whoever may not overrule modes: to leave our own user would need an
    # interpreter that any user may run.
    powers = ",".join(f"-{power}" for power in ("dac_override", "dac_read_search", "fowner"))
    bare = ("setpriv", "--inh-caps", powers, "--bounding-set", powers)
    listed = localmodel("ls", "-o", "json", under=bare).ok().json
    assert [(model["key"], model["state"]) for model in listed] == [(KEY, "Ready")]
    localmodel("verify", URI, under=bare).ok()
    refused = localmodel("pull", URI, "-o", "json", under=bare)
    assert (refused.code, refused.json["reason"]) == (1, "PermissionDenied")


def test_show_finds_a_model_by_its_uri_its_key_and_the_beginning_of_its_key(
    localmodel: Machine,
) -> None:
    localmodel("pull", URI).ok()
    shown = [localmodel("show", name, "-o", "json").ok().json for name in (URI, KEY, KEY[:4])]
    assert shown[0] == shown[1] == shown[2]
    assert [file["path"] for file in shown[0]["file_list"]] == sorted(FILES)
    assert {file["path"]: file["bytes"] for file in shown[0]["file_list"]} == {
        path: len(data) for path, data in FILES.items()
    }
    promises = {file["path"]: file["promised"].split(":")[0] for file in shown[0]["file_list"]}
    assert promises["config.json"] == "git-sha1"
    assert promises["model-1.safetensors"] == "sha256"
    text = localmodel("show", URI).ok().stdout
    assert "fingerprint" in text
    assert "sub/notes.md" in text


def test_show_and_why_know_a_model_by_the_name_of_its_cache(localmodel: Machine, hub: Hub) -> None:
    agent = localmodel.agent().wait_ready()
    localmodel.want("tiny", URI)
    agent.wait_state("tiny", "Ready")
    shown = localmodel("show", "tiny", "-o", "json").ok().json
    assert shown == localmodel("show", URI, "-o", "json").ok().json
    assert (shown["key"], shown["names"], shown["groups"]) == (KEY, ["tiny"], [])
    assert "modelmesh" not in shown, "a directory of YAML knows no node groups"
    rows = [line.split() for line in localmodel("show", "tiny").ok().stdout.splitlines()]
    assert ["names", "tiny"] in rows
    assert "asked for by tiny" in localmodel("why", "tiny").ok().stdout
    agent.stop()
    assert localmodel("show", "tiny").code == 2
    assert localmodel("show", URI, "-o", "json").ok().json["names"] == []


def test_a_word_for_two_models_is_refused_with_what_to_do(localmodel: Machine, hub: Hub) -> None:
    """A cache may have the name that another model's key begins with."""
    hub.add("acme/other", {"a.bin": b"a"})
    agent = localmodel.agent().wait_ready()
    localmodel.want("tiny", URI)
    localmodel.want(KEY[:6], "hf://acme/other")
    agent.wait_state("tiny", "Ready")
    agent.wait_state(KEY[:6], "Ready")
    for verb in ("show", "why", "pin"):
        refused = localmodel(verb, KEY[:6])
        assert refused.code == 2
        assert "means 2 models" in refused.stderr


def test_show_refuses_what_is_not_here(localmodel: Machine) -> None:
    localmodel("pull", URI).ok()
    for name in ("hf://acme/other", "ffff", KEY[:3], "\udcff"):
        done = localmodel.inline("show", name, "-o", "json")
        assert (done.code, done.json["reason"]) == (2, "InvalidSpec")
        assert "is not here" in done.json["message"]
        assert localmodel.inline("verify", name).code == 2


# -- verify -------------------------------------------------------------------------------------


def _extra(model: Path) -> None:
    (model / "stray.safetensors").write_bytes(b"not upstream's")


_DAMAGES = {
    "model-2.safetensors": lambda model: _spoil(model / "model-2.safetensors", at=123_456),
    "config.json": lambda model: os.truncate(model / "config.json", 3),
    "sub/notes.md": lambda model: (model / "sub/notes.md").unlink(),
    "stray.safetensors": _extra,
}


@pytest.mark.parametrize("bad", _DAMAGES)
def test_verify_names_exactly_the_bad_file_and_repairs_only_that(
    localmodel: Machine, hub: Hub, bad: str
) -> None:
    localmodel.inline("pull", URI).ok()
    assert localmodel.inline("verify", URI).ok().stdout.startswith(f"ok        {URI} (4 files")
    hub.clear()
    _DAMAGES[bad](localmodel.model(URI))
    said = localmodel("verify", "--all")
    assert (said.code, said.stdout) == (1, f"bad       {URI}: {bad}\n")
    assert hub.requests == []

    repaired = localmodel("verify", "--all", "--repair")
    assert repaired.code == 1
    assert repaired.stdout == f"bad       {URI}: {bad}\nrepaired  {URI}: {bad}\n"
    assert files_of(localmodel.model(URI)) == FILES
    assert hub.bytes_sent() == len(FILES.get(bad, b""))
    localmodel.inline("verify", "--all").ok()
    localmodel.check_offers()


def test_verify_works_through_a_running_agent(localmodel: Machine, agent: Agent, hub: Hub) -> None:
    localmodel.inline("pull", URI).ok()
    hub.clear()
    _spoil(localmodel.model(URI) / "model-2.safetensors", at=100_000)
    found = localmodel.inline("verify", KEY, "-o", "json")
    assert (found.code, [event["bad"] for event in found.json]) == (1, [["model-2.safetensors"]])
    mended = localmodel.inline("verify", KEY, "--repair", "-o", "json")
    assert mended.code == 1
    assert [event["event"] for event in mended.json] == ["verified", "repaired"]
    assert files_of(localmodel.model(URI)) == FILES
    assert hub.bytes_sent() == len(FILES["model-2.safetensors"])
    assert agent.metrics()["localmodel_verifications_total hash damaged"] == 2


def test_verify_all_checks_every_model(localmodel: Machine) -> None:
    localmodel("pull", URI).ok()
    localmodel("pull", f"{URI}/sub").ok()
    _spoil(localmodel.model(f"{URI}/sub") / "notes.md")
    done = localmodel("verify", "--all", "-o", "json")
    assert done.code == 1
    assert {event["uri"]: event["bad"] for event in done.json} == {
        URI: [],
        f"{URI}/sub": ["notes.md"],
    }
    localmodel("verify", URI).ok()
    assert localmodel("verify", KEY, f"{URI}/sub").code == 1


def test_verify_wants_a_name_or_all(localmodel: Machine) -> None:
    assert localmodel("verify").code == 2
    assert localmodel("verify", "--all", URI).code == 2
    localmodel("verify", "--all").ok()


def test_a_repair_whose_source_is_gone_says_why_and_leaves_the_rest(
    localmodel: Machine, hub: Hub
) -> None:
    localmodel("pull", URI).ok()
    _spoil(localmodel.model(URI) / "config.json")
    hub.fault("config.json", Status(404))
    done = localmodel("verify", URI, "--repair", "-o", "json")
    assert done.code == 1
    verified, failed = done.json
    assert verified["bad"] == ["config.json"]
    assert failed["reason"] == "FileNotFound"
    assert localmodel.sealed() == set(), "wrong bytes are off offer"
    hub.clear_faults()
    hub.clear()
    localmodel("pull", URI).ok()
    assert hub.bytes_sent() == len(FILES["config.json"]), "the good files were kept"
    localmodel.check_offers()


def test_a_repair_brings_the_sealed_revision_and_not_a_newer_one(
    localmodel: Machine, hub: Hub
) -> None:
    before = localmodel("pull", URI, "-o", "json").ok().json
    hub.add(REPO, {**FILES, "config.json": b"{}"})
    _spoil(localmodel.model(URI) / "model-1.safetensors")
    assert localmodel("verify", URI, "--repair").code == 1
    after = localmodel("pull", URI, "-o", "json").ok().json
    assert after["result"] == "hit"
    assert after["fingerprint"] == before["fingerprint"]
    assert after["revision"] == before["revision"]


def test_a_pull_heals_what_was_deleted_behind_our_back(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    localmodel("pull", URI).ok()
    hub.clear()
    (localmodel.model(URI) / "config.json").unlink()
    found = localmodel("pull", URI, "-o", "json").ok().json
    assert found["result"] in ("downloaded", "joined")
    assert files_of(localmodel.model(URI)) == FILES
    assert hub.bytes_sent() == len(FILES["config.json"])
