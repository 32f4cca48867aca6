"""`localmodel pull`: what it prints, what it leaves on the disk, and how it ends."""

import os
import pty
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import layout
from agent.model import cache_key
from tests.conftest import FILES, REPO, URI
from tests.fakes.hub import Hub, Slow, Status
from tests.machine import Agent, Done, Machine, everything_in, files_of, until

SIZE = sum(map(len, FILES.values()))
PROMISED_FIELDS = {
    "key",
    "uri",
    "revision",
    "path",
    "bytes",
    "files",
    "fingerprint",
    "downloaded_bytes",
    "seconds",
    "result",
}


def _pull(localmodel: Callable[..., Done], *arguments: str) -> dict[str, object]:
    found: dict[str, object] = localmodel("pull", *arguments, "-o", "json").ok().json
    return found


# -- what it brings ---------------------------------------------------------------------------


def test_a_model_is_downloaded_once_and_is_a_hit_after_that(localmodel: Machine, hub: Hub) -> None:
    commit = hub.add(REPO, FILES)
    first = _pull(localmodel, URI)
    assert set(first) >= PROMISED_FIELDS
    assert first["result"] == "downloaded"
    assert first["key"] == cache_key(URI)
    assert (first["uri"], first["revision"]) == (URI, commit)
    assert (first["bytes"], first["files"]) == (SIZE, len(FILES))
    assert first["downloaded_bytes"] == SIZE == hub.bytes_sent()
    assert files_of(Path(str(first["path"]))) == FILES

    hub.stop()
    second = _pull(localmodel, URI)
    assert set(second) >= PROMISED_FIELDS
    assert (second["result"], second["downloaded_bytes"]) == ("hit", 0)
    changing = {"result", "downloaded_bytes", "seconds"}
    assert {k: v for k, v in first.items() if k not in changing} == {
        k: v for k, v in second.items() if k not in changing
    }
    localmodel.check_offers()


def test_the_table_says_the_same_in_words(localmodel: Machine) -> None:
    done = localmodel("pull", URI).ok()
    first, second, third = done.stdout.splitlines()
    assert first.startswith(f"downloaded  {URI}  (488.3 KiB in ")
    assert second.startswith("4 files, 488.3 KiB, sha256:")
    assert third == str(localmodel.model(URI))
    assert done.stderr == ""
    assert localmodel("pull", URI).ok().stdout.startswith(f"hit  {URI}  (")


def test_two_pulls_through_one_agent_share_one_download(
    localmodel: Machine, agent: Agent, hub: Hub
) -> None:
    hub.fault("*.safetensors", Slow(bytes_per_second=150_000))
    commands = [localmodel.start("pull", URI, "-o", "json") for _ in range(2)]
    results = [command.done().ok().json for command in commands]
    assert sorted(found["result"] for found in results) == ["downloaded", "joined"]
    assert results[0]["fingerprint"] == results[1]["fingerprint"]
    assert hub.bytes_sent() == SIZE
    numbers = agent.metrics()
    assert numbers["localmodel_requests_total miss"] == 1
    assert numbers["localmodel_requests_total joined"] == 1
    assert numbers["localmodel_request_bytes_total joined"] == SIZE


def test_patterns_choose_the_files(localmodel: Machine, hub: Hub) -> None:
    found = _pull(
        localmodel, URI, "--include", "*.safetensors", "--include", "*.json", "--exclude", "*-2*"
    )
    assert set(files_of(Path(str(found["path"])))) == {"config.json", "model-1.safetensors"}
    assert hub.bytes_sent("model-2.safetensors") == 0
    shown = localmodel.inline("show", URI, "-o", "json").ok().json
    assert shown["include"] == ["*.safetensors", "*.json"]
    assert shown["exclude"] == ["*-2*"]


def test_another_choice_of_files_is_refused_while_the_first_is_on_offer(
    localmodel: Machine,
) -> None:
    localmodel.inline("pull", URI, "--include", "*.json").ok()
    refused = localmodel.inline("pull", URI, "-o", "json")
    assert refused.code == 2
    assert refused.json["reason"] == "Conflict"
    assert "include *.json" in refused.json["message"]


def test_a_pattern_that_no_manifest_can_hold_is_refused_before_the_first_byte(
    localmodel: Machine, hub: Hub
) -> None:
    refused = localmodel.inline("pull", URI, "--include", "*.json\n# revision forged", "-o", "json")
    assert (refused.code, refused.json["reason"]) == (2, "InvalidSpec")
    assert hub.requests == []


def test_the_expected_fingerprint_is_published_and_no_other(localmodel: Machine, hub: Hub) -> None:
    wrong = "sha256:" + "0" * 64
    refused = localmodel.inline("pull", URI, "--expect-fingerprint", wrong, "-o", "json")
    assert (refused.code, refused.json["reason"]) == (1, "FingerprintMismatch")
    assert wrong in refused.json["message"]
    assert not localmodel.model(URI).exists()

    # Another command must not publish it by the way, though every byte of it is here.
    localmodel.inline("pull", f"{URI}/config.json").ok()
    localmodel.inline("ls").ok()
    assert not localmodel.model(URI).exists()

    sent = hub.bytes_sent()
    right = next(
        word.strip(",") for word in refused.json["message"].split() if word.startswith("sha256:")
    )
    found = _pull(localmodel.inline, URI, "--expect-fingerprint", right)
    assert found["fingerprint"] == right
    assert hub.bytes_sent() == sent, "what was here was only proven again"

    refused = localmodel.inline("pull", URI, "--expect-fingerprint", wrong, "-o", "json")
    assert (refused.code, refused.json["reason"]) == (1, "FingerprintMismatch")
    assert localmodel.model(URI).is_dir(), "the one on offer was not what the second one asked for"


def test_a_revision_is_another_model(localmodel: Machine, hub: Hub) -> None:
    old = hub.add(REPO, FILES)
    hub.tag(REPO, "v1", old)
    new = hub.add(REPO, {**FILES, "config.json": b"{}"})
    assert _pull(localmodel.inline, f"{URI}:v1")["revision"] == old
    assert _pull(localmodel.inline, f"{URI}:{new}")["revision"] == new
    assert _pull(localmodel.inline, URI)["revision"] == new
    assert len(localmodel.sealed()) == 3


def test_a_path_below_a_repository_is_a_directory_or_one_file(localmodel: Machine) -> None:
    directory = _pull(localmodel.inline, f"{URI}/sub")
    assert files_of(Path(str(directory["path"]))) == {"notes.md": FILES["sub/notes.md"]}
    file = _pull(localmodel.inline, f"{URI}:main/sub/notes.md")
    assert files_of(Path(str(file["path"]))) == {"notes.md": FILES["sub/notes.md"]}
    missing = localmodel.inline("pull", f"{URI}/none.gguf", "-o", "json")
    assert (missing.code, missing.json["reason"]) == (1, "FileNotFound")


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_directory_of_this_machine_is_a_source(
    localmodel: Machine, tmp_path: Path, form: str
) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for path, data in FILES.items():
        (source / path).write_bytes(data)
    uri = form.format(source)
    found = _pull(localmodel.inline, uri)
    assert (found["uri"], found["result"]) == (uri, "downloaded")
    assert found["downloaded_bytes"] == SIZE
    assert files_of(Path(str(found["path"]))) == FILES
    assert files_of(source) == FILES
    localmodel.check_offers()


def test_one_local_file_is_a_model(localmodel: Machine, tmp_path: Path) -> None:
    (tmp_path / "only.gguf").write_bytes(b"weights")
    found = _pull(localmodel.inline, str(tmp_path / "only.gguf"))
    assert files_of(Path(str(found["path"]))) == {"only.gguf": b"weights"}


def test_a_relative_root_is_told_as_an_absolute_path(localmodel: Machine) -> None:
    found = localmodel("pull", URI, "-o", "json", root=Path("here")).ok().json
    assert found["path"] == str(localmodel.home / "here" / layout.model(cache_key(URI)))


# -- refusals: each its own reason, and what to do ----------------------------------------------


@pytest.mark.parametrize(
    ("uri", "code", "reason", "says"),
    [
        ("ftp://host/model", 2, "Unsupported", "there is no source for ftp://"),
        ("pvc://claim/model", 2, "Unsupported", "a volume is not downloaded"),
        ("hf://acme", 2, "InvalidSpec", "must be hf://owner/name[:revision][/path]"),
        ("hf://acme/../etc", 2, "InvalidSpec", "cannot start or end with '-' or '.'"),
        ("hf://acme/tiny/../../x", 2, "InvalidSpec", "must be hf://owner/name[:revision][/path]"),
        ("some/relative/path", 2, "InvalidSpec", "nor an absolute path"),
        ("", 2, "InvalidSpec", "URI is missing"),
        ("hf://acme/ti\nny", 2, "InvalidSpec", "control characters"),
        ("file://elsewhere/model", 2, "InvalidSpec", "on this machine"),
        ("/no/such/directory", 1, "FileNotFound", "does not exist"),
        ("hf://acme/nothing", 1, "RepositoryNotFound", "HF_TOKEN"),
        (f"{URI}:nothing", 1, "RevisionNotFound", "check the branch, tag or commit"),
    ],
)
def test_a_request_that_cannot_be_met_says_why_and_what_to_do(
    localmodel: Machine, uri: str, code: int, reason: str, says: str
) -> None:
    done = localmodel.inline("pull", uri, "-o", "json")
    assert done.code == code
    assert done.json["reason"] == reason
    assert set(done.json) == {"reason", "message", "advice"}
    assert done.json["advice"]
    assert says in f"{done.json['message']} {done.json['advice']}"
    # The same for people, on stderr.
    assert done.stderr.startswith("error: ")
    assert f"({reason})" in done.stderr
    assert done.json["advice"] in done.stderr
    assert localmodel.sealed() == set()


def test_a_gated_repository_says_to_accept_its_terms(localmodel: Machine, hub: Hub) -> None:
    hub.gate(REPO, tokens=["hf_member_sesame"])
    hub.accept("hf_stranger_sesame")
    for environment in ({}, {"HF_TOKEN": "hf_stranger_sesame"}):
        done = localmodel.inline("pull", URI, "-o", "json", environment=environment)
        assert (done.code, done.json["reason"]) == (1, "Gated")
        assert "accept the model's terms" in done.json["advice"]
        assert "hf_stranger_sesame" not in done.stdout + done.stderr
    assert localmodel.sealed() == set()
    localmodel.inline("pull", URI, environment={"HF_TOKEN": "hf_member_sesame"}).ok()
    assert not hub.cdn_saw_authorization


def test_an_invalid_token_is_unauthorized(localmodel: Machine) -> None:
    done = localmodel.inline("pull", URI, "-o", "json", environment={"HF_TOKEN": "hf_wrong_sesame"})
    assert (done.code, done.json["reason"]) in {(1, "Unauthorized"), (1, "RepositoryNotFound")}
    assert "HF_TOKEN" in done.json["advice"]
    assert "hf_wrong_sesame" not in done.stdout + done.stderr


def test_a_listing_without_files_is_refused(localmodel: Machine, hub: Hub) -> None:
    hub.add("acme/empty", {})
    done = localmodel.inline("pull", "hf://acme/empty", "-o", "json")
    assert (done.code, done.json["reason"]) == (1, "EmptyListing")
    done = localmodel.inline("pull", URI, "--include", "*.gguf", "-o", "json")
    assert (done.code, done.json["reason"]) == (1, "EmptyListing")
    assert "*.gguf" in done.json["message"]
    assert "patterns" in done.json["advice"]


def test_a_hub_that_is_down_is_a_network_error(localmodel: Machine, hub: Hub) -> None:
    hub.stop()
    done = localmodel.inline("pull", URI, "-o", "json")
    assert (done.code, done.json["reason"]) == (1, "NetworkError")
    assert hub.endpoint in done.json["message"]
    assert "proxy" in done.json["advice"]


def test_a_rate_limited_listing_says_so_at_once(localmodel: Machine, hub: Hub) -> None:
    hub.fault("/api/*", Status(429, headers={"Retry-After": "3600"}))
    done = localmodel.inline("pull", URI, "-o", "json")
    assert (done.code, done.json["reason"]) == (1, "RateLimited")


def test_usage_errors_exit_with_2(localmodel: Machine) -> None:
    assert localmodel.inline("pull").code == 2
    assert localmodel.inline("pull", URI, "--connections", "0").code == 2
    assert localmodel.inline("pull", URI, "--max-rate", "fast").code == 2
    assert localmodel.inline("pull", URI, "--stall-seconds", "nan").code == 2
    bad = localmodel.inline("pull", URI, "--expect-fingerprint", "deadbeef", "-o", "json")
    assert (bad.code, bad.json["reason"]) == (2, "InvalidSpec")
    assert localmodel.sealed() == set()


def test_a_broken_environment_variable_is_named(localmodel: Machine) -> None:
    done = localmodel.inline("pull", URI, environment={"LOCALMODEL_CONNECTIONS": "many"})
    assert done.code == 2
    assert "LOCALMODEL_CONNECTIONS" in done.stderr


# -- terminals ----------------------------------------------------------------------------------


def test_no_bar_and_no_colour_where_nobody_looks(localmodel: Machine, hub: Hub) -> None:
    hub.fault("*.safetensors", Slow(bytes_per_second=500_000))
    done = localmodel("pull", URI, environment={"FORCE_COLOR": "1"}).ok()
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_a_terminal_sees_a_bar_that_no_color_makes_grey(
    localmodel: Machine, hub: Hub, no_colour: str
) -> None:
    hub.fault("*.safetensors", Slow(bytes_per_second=400_000))
    screen, terminal = pty.openpty()
    try:
        command = localmodel.start(
            "pull",
            URI,
            environment={"TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": no_colour},
            stderr=terminal,
        )
        os.close(terminal)
        seen = _read_to_the_end(screen)
    finally:
        os.close(screen)
    done = command.done().ok()
    assert "fetching" in seen
    assert "MiB" in seen or "KiB" in seen or "kB" in seen
    colours = "\x1b[3" in seen or "\x1b[38" in seen
    assert colours is not bool(no_colour)
    assert done.stdout.startswith("downloaded")


def _read_to_the_end(screen: int) -> str:
    seen = b""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if select.select([screen], [], [], 1)[0]:
            try:
                data = os.read(screen, 65536)
            except OSError:  # how a terminal says that nobody holds its other side
                break
            if not data:
                break
            seen += data
    return seen.decode(errors="replace")


def test_errors_are_red_on_a_terminal_only(localmodel: Machine) -> None:
    screen, terminal = pty.openpty()
    try:
        command = localmodel.start("pull", "ftp://x/y", stderr=terminal)
        os.close(terminal)
        seen = _read_to_the_end(screen)
    finally:
        os.close(screen)
    assert command.done().code == 2
    assert "\x1b[31merror\x1b[0m" in seen


# -- how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("through_an_agent", [False, True])
def test_ctrl_c_keeps_what_arrived_and_exits_130(
    localmodel: Machine, hub: Hub, through_an_agent: bool
) -> None:
    if through_an_agent:
        localmodel.agent().wait_ready()
    hub.fault("model-1.safetensors", Slow(bytes_per_second=100_000))
    command = localmodel.start("pull", URI)
    partial = localmodel.root / layout.ingest(cache_key(URI))
    until(lambda: (partial / "tree/model-2.safetensors").exists())
    until(lambda: hub.bytes_sent("model-1.safetensors") > 50_000)
    command.signal(signal.SIGINT)
    done = command.done(10)
    assert done.code == 130
    assert "kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert localmodel.sealed() == set()

    def interrupted() -> bool:
        (listed,) = localmodel("ls", "-o", "json").ok().json
        return bool(listed["state"] == "Partial" and 200_000 < listed["downloaded_bytes"] < SIZE)

    until(interrupted)
    hub.clear_faults()
    hub.clear()
    found = _pull(localmodel, URI)
    assert found["result"] == "downloaded"
    assert hub.bytes_sent("model-2.safetensors") == 0
    assert hub.bytes_sent("model-1.safetensors") < len(FILES["model-1.safetensors"])
    localmodel.check_offers()


def test_a_verb_on_a_broken_pipe_ends_quietly(localmodel: Machine) -> None:
    localmodel("pull", URI).ok()
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -1` does once it has its line
    try:
        done = localmodel.start("ls", stdout=writing).done()
    finally:
        os.close(writing)
    assert done.stderr == ""
    assert done.code == 1


def test_nothing_is_written_outside_the_root(localmodel: Machine) -> None:
    before = everything_in(localmodel.home)
    localmodel("pull", URI).ok()
    added = everything_in(localmodel.home, but=[localmodel.root]) - before
    assert added <= {str(localmodel.root)}
