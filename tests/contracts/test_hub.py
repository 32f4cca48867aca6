"""The fake hub against the real `huggingface_hub` client, and each fault against its promise.

Tests elsewhere trust the fake; this is where the trust comes from. The first half lets the original
client judge it, the second reads the wire with `http.client`, which hides nothing.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import HfApi, RepoFile, RepoFolder, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.fakes.hub import (
    Corrupt,
    Dribble,
    Fault,
    Hub,
    IgnoreRange,
    Long,
    PartialAs200,
    Reset,
    Short,
    Slow,
    Stall,
    Status,
    Truncate,
    WrongListing,
)

REPO = "acme/tiny"
WEIGHTS = random.Random(7).randbytes(300_000)
CONFIG = b'{"model_type": "tiny"}\n'
FILES: dict[str, bytes | Path] = {
    "config.json": CONFIG,
    "model.safetensors": WEIGHTS,
    "empty.txt": b"",
    "sub/deep/notes.md": b"# notes\n",
    "sub/name with space & ünïcode.txt": b"quoted\n",
}


@pytest.fixture(autouse=True)
def _only_this_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Xet and no stored token, whatever the environment said when the client was imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        hub.add(REPO, FILES)
        yield hub


# --- the real client ----------------------------------------------------------------------------


def _download(hub: Hub, cache: Path, *, token: str | bool = False) -> dict[str, bytes]:
    endpoint = hub.endpoint
    folder = Path(snapshot_download(REPO, endpoint=endpoint, cache_dir=cache, token=token))
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_snapshot_is_byte_identical_and_keeps_the_token_off_the_cdn(
    hub: Hub, tmp_path: Path
) -> None:
    hub.accept("hf_me")

    assert _download(hub, tmp_path / "cache", token="hf_me") == FILES

    assert {r.authorization for r in hub.requests if r.origin == "hub"} == {"Bearer hf_me"}
    assert [r.file for r in hub.requests if r.origin == "cdn"] == [f"{REPO}/model.safetensors"]
    assert not hub.cdn_saw_authorization
    assert hub.bytes_sent() == sum(map(len, FILES.values()))  # type: ignore[arg-type]


def test_small_files_come_from_the_hub_itself(hub: Hub, tmp_path: Path) -> None:
    path = hf_hub_download(REPO, "config.json", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert Path(path).read_bytes() == CONFIG
    assert [r.method for r in hub.requests] == ["HEAD", "GET"]
    assert {r.origin for r in hub.requests} == {"hub"}


def test_older_commits_tags_and_pull_requests_stay_resolvable(hub: Hub, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub.endpoint)
    first = api.model_info(REPO).sha
    assert first is not None
    hub.tag(REPO, "v1/final", first)
    second = hub.add(REPO, {"config.json": b"second"})
    proposal = hub.add(REPO, {"config.json": b"proposed"}, branch="refs/pr/1")
    assert hub.add(REPO, {"config.json": b"second"}) == second, "nothing to commit"

    expected = {"main": b"second", second: b"second", first: CONFIG, "v1/final": CONFIG}
    for revision, content in {**expected, "refs/pr/1": b"proposed", proposal: b"proposed"}.items():
        path = hf_hub_download(
            REPO, "config.json", revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path
        )
        assert Path(path).read_bytes() == content
    assert api.model_info(REPO, revision="refs/pr/1").sha == proposal
    assert api.model_info(REPO, revision="v1/final").sha == first


def test_the_same_steps_give_the_same_commit(tmp_path: Path) -> None:
    source = tmp_path / "config.json"
    source.write_bytes(CONFIG)
    one = Hub(tmp_path / "one").add(REPO, FILES)
    two = Hub(tmp_path / "two").add(REPO, {**FILES, "config.json": source})
    assert one == two


def test_model_info_with_file_metadata(hub: Hub) -> None:
    info = HfApi(endpoint=hub.endpoint).model_info(REPO, files_metadata=True)

    assert (info.id, info.private, info.gated, info.author) == (REPO, False, False, "acme")
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    assert siblings.keys() == FILES.keys()
    config, weights = siblings["config.json"], siblings["model.safetensors"]
    assert (config.size, config.lfs) == (len(CONFIG), None)
    assert config.blob_id == hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert (weights.size, weights.lfs.size) == (len(WEIGHTS), len(WEIGHTS))
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{weights.lfs.sha256}\n"
        f"size {len(WEIGHTS)}\n"
    ).encode()
    assert weights.lfs.pointer_size == len(pointer)
    assert weights.blob_id == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()


def test_git_agrees_about_blob_ids(hub: Hub) -> None:
    entry = next(
        entry
        for entry in HfApi(endpoint=hub.endpoint).list_repo_tree(REPO)
        if entry.path == "config.json"
    )
    git = subprocess.run(["git", "hash-object", "--stdin"], input=CONFIG, capture_output=True)
    assert isinstance(entry, RepoFile)
    assert entry.blob_id == git.stdout.decode().strip()


def test_tree_over_three_pages(tmp_path: Path) -> None:
    with Hub(tmp_path / "hub", page_size=10) as hub:
        names = {f"part-{n:02}.safetensors" for n in range(25)}
        hub.add(REPO, {name: name.encode() for name in names})
        api = HfApi(endpoint=hub.endpoint)

        assert {entry.path for entry in api.list_repo_tree(REPO, recursive=True)} == names
        assert len(hub.requests) == 3
        assert len(_download(hub, tmp_path / "cache")) == 25


def test_tree_levels(hub: Hub) -> None:
    api = HfApi(endpoint=hub.endpoint)

    def listed(folder: str | None = None, *, recursive: bool = False) -> set[str]:
        entries = api.list_repo_tree(REPO, folder, recursive=recursive, expand=True)
        return {f"{e.path}/" if isinstance(e, RepoFolder) else e.path for e in entries}

    unicode = "sub/name with space & ünïcode.txt"
    top = {"config.json", "model.safetensors", "empty.txt", "sub/"}
    assert listed() == top
    assert listed("sub") == {"sub/deep/", unicode}
    assert listed("sub/deep") == {"sub/deep/notes.md"}
    assert listed(recursive=True) == top | {"sub/deep/", "sub/deep/notes.md", unicode}
    with pytest.raises(EntryNotFoundError):
        listed("nowhere")


def test_empty_repository_lists_as_empty(hub: Hub) -> None:
    hub.add("acme/empty", {})
    api = HfApi(endpoint=hub.endpoint)
    assert list(api.list_repo_tree("acme/empty", recursive=True)) == []
    assert api.model_info("acme/empty").siblings == []


def test_hostile_listing_is_passed_on_as_it_is(hub: Hub) -> None:
    names = ["../../x", "/etc/x", "a\0b", "n" * 300, "line\nfeed\x1b[31m", "a//b", "", "."]
    hub.raw_tree(
        "acme/evil", [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in names]
    )
    entries = HfApi(endpoint=hub.endpoint).list_repo_tree("acme/evil", recursive=True)
    assert [entry.path for entry in entries] == names
    hub.raw_tree("acme/evil", None)
    assert list(HfApi(endpoint=hub.endpoint).list_repo_tree("acme/evil")) == []


def test_missing_things(hub: Hub, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub.endpoint)
    hub.accept("hf_me")
    for token in ("hf_me", False):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info("acme/absent", token=token)
        assert caught.value.response.status_code == (404 if token else 401)
    for revision in ("absent", "refs/pr/9", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision=revision)
        with pytest.raises(RevisionNotFoundError):
            list(api.list_repo_tree(REPO, revision=revision))
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "absent.json", endpoint=hub.endpoint, cache_dir=tmp_path)


def test_gated_repository_shows_its_listing_and_keeps_its_files(hub: Hub, tmp_path: Path) -> None:
    hub.gate(REPO, tokens={"hf_friend_sesame"})
    hub.accept("hf_stranger_sesame")
    api = HfApi(endpoint=hub.endpoint)

    assert api.model_info(REPO, token=False).gated == "manual"
    for token, status in ((False, 401), ("hf_stranger_sesame", 403)):
        with pytest.raises(GatedRepoError) as caught:
            snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "no", token=token)
        assert caught.value.response.status_code == status
    assert _download(hub, tmp_path / "yes", token="hf_friend_sesame") == FILES
    assert not hub.cdn_saw_authorization


def test_private_repository_does_not_exist_for_others(hub: Hub, tmp_path: Path) -> None:
    hub.private(REPO, tokens={"hf_friend_sesame"})
    hub.accept("hf_stranger_sesame")
    api = HfApi(endpoint=hub.endpoint)
    for token in (False, "hf_stranger_sesame"):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info(REPO, token=token)
        assert not isinstance(caught.value, GatedRepoError)
    assert _download(hub, tmp_path / "cache", token="hf_friend_sesame") == FILES


def test_unknown_token_is_refused_even_where_none_is_needed(hub: Hub) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=hub.endpoint).model_info(REPO, token="hf_revoked_sesame")
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)
    assert "Invalid credentials in Authorization header" in str(caught.value)


def test_client_recovers_from_a_truncated_body(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    # The client forgets a chunk it has not completed, and its chunks are 10 MiB.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.fault("*.safetensors", Truncate(after=105_000), times=1)
    assert _download(hub, tmp_path / "cache") == FILES
    assert [r.range for r in hub.requests if r.origin == "cdn"] == [None, "bytes=100000-"]
    assert hub.bytes_sent("model.safetensors") == len(WEIGHTS) + 5_000


def test_restart_keeps_the_ports(hub: Hub) -> None:
    api, before = HfApi(endpoint=hub.endpoint), (hub.endpoint, hub.cdn_endpoint)
    hub.stop()
    with pytest.raises(ConnectionRefusedError):
        _get(hub.endpoint)
    hub.start()
    assert (hub.endpoint, hub.cdn_endpoint) == before
    assert api.model_info(REPO).id == REPO


def test_as_a_process(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "model.safetensors").write_bytes(WEIGHTS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.fakes.hub", "--root", str(tmp_path / "hub")]
    with subprocess.Popen(
        [*command, "--port", str(port), "--add", f"{REPO}={folder}"],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"hub ready at http://127.0.0.1:{port}\n"
        path = hf_hub_download(
            REPO,
            "sub/model.safetensors",
            endpoint=f"http://127.0.0.1:{port}",
            cache_dir=tmp_path / "cache",
        )
        assert Path(path).read_bytes() == WEIGHTS
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0


# --- the wire -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Got:
    """An answer as it arrived. `ending` is what the body ended with, None where all was well."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    ending: type[Exception] | None
    seconds: float


def _get(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] = MappingProxyType({}),
    timeout: float = 5,
) -> Got:
    parts = urlsplit(url)
    assert parts.hostname is not None
    began = time.monotonic()
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    received = io.BytesIO()
    ending: type[Exception] | None = None
    try:
        connection.request(method, f"{parts.path}?{parts.query}", headers=headers)
        response = connection.getresponse()
        try:
            while data := response.read1(65536):
                received.write(data)
        except (TimeoutError, ConnectionResetError) as error:
            ending = type(error)
        promised = response.headers.get("Content-Length")
        if ending is None and method == "GET" and received.tell() < int(promised or 0):
            ending = EOFError
    finally:
        connection.close()
    seconds = time.monotonic() - began
    return Got(response.status, response.headers, received.getvalue(), ending, seconds)


def _url(hub: Hub, path: str) -> str:
    """Where the bytes of `path` are: on the hub, or behind the redirect."""
    url = f"{hub.endpoint}/{REPO}/resolve/main/{path}"
    head = _get(url, method="HEAD")
    return head.headers["Location"] if head.status == 302 else url


def test_redirect_names_the_file_behind_it(hub: Hub) -> None:
    url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
    for method in ("HEAD", "GET"):
        got = _get(url, method=method)
        assert got.status == 302
        assert got.headers["X-Linked-ETag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
        assert got.headers["X-Linked-Size"] == str(len(WEIGHTS))
        assert len(got.headers["X-Repo-Commit"]) == 40
        assert got.headers["Accept-Ranges"] == "bytes"
        assert got.headers["Location"].startswith(f"{hub.cdn_endpoint}/cdn/")
        assert not [name for name in got.headers if name.lower().startswith("x-xet")]


def test_cdn_etag_is_not_the_hubs(hub: Hub) -> None:
    got = _get(_url(hub, "model.safetensors"))
    assert (got.status, got.body) == (200, WEIGHTS)
    assert hashlib.sha256(WEIGHTS).hexdigest() not in got.headers["ETag"]


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("header", "status", "start", "stop"),
    [
        ("bytes=0-0", 206, 0, 1),
        ("bytes=3-9", 206, 3, 10),
        ("bytes=5-", 206, 5, None),
        ("bytes=-4", 206, -4, None),
        ("bytes=2-99999999", 206, 2, None),
        ("bytes=-99999999", 206, 0, None),
        ("bytes=99999999-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=9-3", 200, 0, None),
        ("bytes=x-y", 200, 0, None),
        ("bytes=--3", 200, 0, None),
        ("lines=1-2", 200, 0, None),
        ("bytes=0-1,4-5", 200, 0, None),
    ],
)
def test_ranges(
    hub: Hub, path: str, header: str, status: int, start: int, stop: int | None
) -> None:
    content = FILES[path]
    assert isinstance(content, bytes)
    got = _get(_url(hub, path), headers={"Range": header})
    expected = range(len(content))[start:stop]
    assert (got.status, got.body, got.ending) == (status, content[start:stop], None)
    assert got.headers["Accept-Ranges"] == "bytes"
    assert got.headers["Content-Range"] == {
        200: None,
        206: f"bytes {expected.start}-{expected.stop - 1}/{len(content)}",
        416: f"bytes */{len(content)}",
    }.get(status)


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
def test_conditions(hub: Hub, path: str) -> None:
    url = _url(hub, path)
    etag = _get(url, method="HEAD").headers["ETag"]
    cases = [
        ({"If-Range": etag}, 206),
        ({"If-Range": '"other"'}, 200),
        ({"If-Range": "Mon, 01 Jan 2024 00:00:00 GMT"}, 200),
        ({"If-Match": etag}, 206),
        ({"If-Match": f'"other", {etag}'}, 206),
        ({"If-Match": "*"}, 206),
        ({"If-Match": '"other"'}, 412),
    ]
    statuses = [
        (condition, _get(url, headers={"Range": "bytes=1-", **condition}).status)
        for condition, _ in cases
    ]
    assert statuses == cases


def test_an_empty_file_has_no_ranges(hub: Hub) -> None:
    assert _get(_url(hub, "empty.txt")).status == 200
    assert _get(_url(hub, "empty.txt"), headers={"Range": "bytes=0-"}).status == 416


def test_links_expire(hub: Hub, tmp_path: Path) -> None:
    old = _url(hub, "model.safetensors")
    assert _get(old.replace("expires=1", "expires=2")).status == 403, "the expiry is signed"
    hub.expire_links()
    assert _get(old).status == 403
    assert _get(_url(hub, "model.safetensors")).status == 200
    with Hub(tmp_path / "brief", link_seconds=-1) as brief:
        brief.add(REPO, FILES)
        assert _get(_url(brief, "model.safetensors")).status == 403


def test_cdn_remembers_a_leaked_token(hub: Hub) -> None:
    _get(_url(hub, "model.safetensors"), headers={"Authorization": "Bearer hf_me"})
    hub.clear()
    assert hub.requests == []
    assert hub.cdn_saw_authorization


def test_requests_are_on_record_while_they_are_answered(hub: Hub) -> None:
    hub.fault("config.json", Stall(after=3))
    url = _url(hub, "config.json")
    assert _get(url, timeout=0.2).ending is TimeoutError
    last = hub.requests[-1]
    assert (last.method, last.status, last.bytes_sent) == ("GET", 200, 3)
    assert (last.origin, last.file) == ("hub", f"{REPO}/config.json")


# --- faults -------------------------------------------------------------------------------------

SIZE = len(WEIGHTS)
FLIPPED = bytes([*WEIGHTS[:50], WEIGHTS[50] ^ 0xFF]) + WEIGHTS[51:]


@pytest.mark.parametrize("path", ["model.safetensors", "model.json"], ids=["cdn", "hub"])
@pytest.mark.parametrize(
    ("fault", "range_header", "status", "body", "promised", "ending"),
    [
        (Status(503, {"Retry-After": "7"}, b"later"), None, 503, b"later", 5, None),
        (Status(429), "bytes=5-", 429, b"", 0, None),
        (Truncate(1000), None, 200, WEIGHTS[:1000], SIZE, EOFError),
        (Truncate(1000), "bytes=50-", 206, WEIGHTS[50:1050], SIZE - 50, EOFError),
        (Truncate(0), None, 200, b"", SIZE, EOFError),
        (Short(10), None, 200, WEIGHTS[:-10], SIZE - 10, None),
        (Short(10), "bytes=50-", 206, WEIGHTS[50:-10], SIZE - 60, None),
        (Long(10), None, 200, WEIGHTS + bytes(10), SIZE + 10, None),
        (Long(10), f"bytes={SIZE - 5}-", 206, WEIGHTS[-5:] + bytes(10), 15, None),
        (Corrupt(50), None, 200, FLIPPED, SIZE, None),
        (Corrupt(50), "bytes=40-59", 206, FLIPPED[40:60], 20, None),
        (Corrupt(50), "bytes=51-", 206, WEIGHTS[51:], SIZE - 51, None),
        (Stall(1000), None, 200, WEIGHTS[:1000], SIZE, TimeoutError),
        (IgnoreRange(), "bytes=50-", 200, WEIGHTS, SIZE, None),
        (PartialAs200(), "bytes=50-", 200, WEIGHTS[50:], SIZE - 50, None),
        (Reset(1000), None, 200, WEIGHTS[:1000], SIZE, ConnectionResetError),
        (Slow(3_000_000), None, 200, WEIGHTS, SIZE, None),
        (Dribble(20_000), "bytes=0-1999", 206, WEIGHTS[:2000], 2000, None),
    ],
    ids=lambda value: f"{len(value)}B" if isinstance(value, bytes) else repr(value),
)
def test_faults(
    tmp_path: Path,
    path: str,
    fault: Fault,
    range_header: str | None,
    status: int,
    body: bytes,
    promised: int,
    ending: type[Exception] | None,
) -> None:
    with Hub(tmp_path / "hub") as hub:
        hub.add(REPO, {path: WEIGHTS})
        url = _url(hub, path)
        hub.fault("model.*", fault, times=1)
        headers = {} if range_header is None else {"Range": range_header}

        got = _get(url, headers=headers, timeout=0.2 if isinstance(fault, Stall) else 5)

        assert (got.status, len(got.body), got.ending) == (status, len(body), ending)
        assert got.body == body
        assert got.headers["Content-Length"] == str(promised)
        if isinstance(fault, Status):
            assert got.headers["Retry-After"] == fault.headers.get("Retry-After")
        if isinstance(fault, Slow | Dribble):
            assert got.seconds > 0.8 * len(body) / fault.bytes_per_second
        assert hub.requests[-1].bytes_sent == len(body)

        again = _get(url)
        if fault == Corrupt(50) and range_header == "bytes=51-":
            assert again.body == FLIPPED, "an answer it does not show in does not use it up"
        else:
            assert again.body == WEIGHTS, "used up"


def test_partial_as_200_still_says_which_part(hub: Hub) -> None:
    hub.fault("*.safetensors", PartialAs200())
    got = _get(_url(hub, "model.safetensors"), headers={"Range": "bytes=50-59"})
    assert got.headers["Content-Range"] == f"bytes 50-59/{SIZE}"


def test_wrong_listing(hub: Hub) -> None:
    hub.fault("model.safetensors", WrongListing(size_delta=-3), times=2)
    api = HfApi(endpoint=hub.endpoint)

    def listed() -> list[int]:
        tree = api.list_repo_tree(REPO)
        return [e.size for e in tree if isinstance(e, RepoFile) and e.path == "model.safetensors"]

    info = api.model_info(REPO, files_metadata=True)
    assert [s.size for s in info.siblings or () if s.rfilename == "model.safetensors"] == [SIZE - 3]
    assert listed() == [SIZE - 3]
    assert listed() == [SIZE]
    assert _get(_url(hub, "model.safetensors")).body == WEIGHTS


@pytest.mark.parametrize(
    ("glob", "method", "url", "status"),
    [
        ("/api/models/*", "GET", "/api/models/acme/tiny", 500),
        ("/api/*/tree/*", "GET", "/api/models/acme/tiny", 200),
        ("/api/*/tree/*", "GET", "/api/models/acme/tiny/tree/main", 500),
        ("*", "GET", "/api/models/acme/tiny", 200),
        ("*", "GET", "/acme/tiny/resolve/main/config.json", 500),
        ("*", "HEAD", "/acme/tiny/resolve/main/config.json", 200),
        ("*", "GET", "/acme/tiny/resolve/main/model.safetensors", 302),
        ("/*/resolve/*", "HEAD", "/acme/tiny/resolve/main/config.json", 500),
        ("/*/resolve/*", "GET", "/acme/tiny/resolve/main/model.safetensors", 500),
        ("acme/*/config.json", "GET", "/acme/tiny/resolve/main/config.json", 500),
        ("other/*", "GET", "/acme/tiny/resolve/main/config.json", 200),
    ],
)
def test_globs(hub: Hub, glob: str, method: str, url: str, status: int) -> None:
    hub.fault(glob, Status(500))
    assert _get(hub.endpoint + url, method=method).status == status
    hub.clear_faults()
    assert _get(hub.endpoint + url, method=method).status in (200, 302)


def test_listings_can_be_faulty_too(hub: Hub) -> None:
    hub.fault("/api/*", Truncate(after=10), times=1)
    got = _get(f"{hub.endpoint}/api/models/{REPO}")
    assert (len(got.body), got.ending) == (10, EOFError)


def test_stops_at_once_whatever_is_going_on(hub: Hub) -> None:
    """A stalled answer, and one whose client does not read, must not hold up the end of a test."""
    big = os.urandom(32 << 20)
    hub.add(REPO, {"big.bin": big, "stalled.json": CONFIG})
    hub.fault("stalled.json", Stall(after=1))
    sockets = []
    for url in (_url(hub, "big.bin"), _url(hub, "stalled.json")):
        parts = urlsplit(url)
        sock = socket.create_connection((parts.hostname, parts.port or 0))
        sock.sendall(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: hub\r\n\r\n".encode())
        assert sock.recv(1)
        sockets.append(sock)
    began = time.monotonic()
    hub.stop()
    assert time.monotonic() - began < 0.5
    for sock in sockets:
        sock.close()
    assert hub.bytes_sent("big.bin") < len(big), "what the client never took is not counted"
