"""`s3://` against a store that checks signatures, refuses and lies; boto3 itself is the oracle."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import random
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from awscrt import checksums

from agent import layout, manifest, pinned
from agent.errors import AgentError, Reason
from agent.model import (
    HEX_DIGITS,
    Algorithm,
    Digest,
    HttpLocator,
    Listing,
    ModelRef,
    RemoteFile,
    cache_key,
)
from agent.sources import Given, Sources, s3
from agent.sources.s3 import S3
from agent.transfer import Engine, FileJob
from tests.contracts.source_contract import bring, generated
from tests.fakes.s3 import KEY, SECRET, Answer, Store
from tests.fakes.sts import TokenService
from tests.fakes.wire import Wire, make_certificates, reply
from tests.machine import machine

BUCKET = "models"
URI = f"s3://{BUCKET}/tiny"
FILES: Mapping[str, bytes] = {
    "tiny/config.json": b"{}",
    "tiny/sub/weights.bin": random.Random(1).randbytes(900_000),
    "tiny/empty": b"",
}
TOKEN = "session/sesame+token=="


@pytest.fixture(scope="module")
def _store() -> Iterator[Store]:
    with Store() as store:
        yield store


@pytest.fixture
def store(_store: Store) -> Iterator[Store]:
    """One server for all of them, as new."""
    _store.put(BUCKET, FILES)
    _store.seen.clear()
    yield _store
    _store.mend()
    _store.public, _store.skew, _store.region = False, timedelta(), "eu-central-1"
    _store.denied.clear()
    _store.secrets = {KEY: SECRET}


@pytest.fixture(autouse=True)
def _no_secret_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.DEBUG):
        yield
    assert not [secret for secret in (SECRET, TOKEN, "Signature=") if secret in caplog.text]


@pytest.fixture
def source(store: Store) -> S3:
    return S3(store.environment)


async def _list(source: S3, uri: str = URI) -> Listing:
    return await source.list(ModelRef(uri=uri))


def _sizes(listing: Listing) -> dict[str, int]:
    return {file.path: file.size for file in listing.files}


async def _refusal(source: S3, uri: str = URI) -> AgentError:
    """What it refuses with, once nothing in it tells a secret."""
    with pytest.raises(AgentError) as caught:
        await _list(source, uri)
    error: BaseException | None = caught.value
    shown = repr(source)
    while error is not None:
        shown += repr(error) + str(error)
        error = error.__cause__ or error.__context__
    for secret in (SECRET, TOKEN, KEY, "Signature="):
        assert secret not in shown
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600
    return caught.value


async def _fetch(
    source: S3, listing: Listing, file: RemoteFile, path: Path, retries: list[Reason]
) -> bytes:
    engine = Engine(stall_seconds=5.0, dice=lambda: 0.0)
    try:
        await engine.fetch(
            FileJob(
                path=path,
                size=file.size,
                promised=file.digest,
                locate=lambda: source.locate(listing, file),
                on_bytes=lambda done, received: None,
                on_retry=lambda error: retries.append(error.reason),
            )
        )
    finally:
        engine.close()
    return path.read_bytes()


# --- what a URI means ---------------------------------------------------------------------------

KEYS = {
    key: key.encode()
    for key in (
        *("a/x", "a/y/z", "a/", "a/y/", "ab/c", "a-b", "ab", "a.txt", "alone", "alone.not/x"),
        *("deep/er/file.gguf", "both", "both/below", "a/ünï code+%41 &?#=~ x", "a/+", "a/ "),
    )
} | {"a/empty": b""}
BELOW_A = {key.removeprefix("a/") for key in KEYS if key.startswith("a/") and not key.endswith("/")}


@pytest.mark.parametrize(
    ("below", "published"),
    [
        ("a", BELOW_A),
        ("a/", BELOW_A),
        ("/a", BELOW_A),
        ("a/y", {"z"}),
        ("a/y/z", {"z"}),
        ("a.txt", {"a.txt"}),
        ("ab", {"ab"}),
        ("ab/", {"c"}),
        ("alone", {"alone"}),
        ("deep/er/file.gguf", {"file.gguf"}),
        ("deep", {"er/file.gguf"}),
        ("both", {"both"}),  # as KServe
        ("both/", {"below"}),
        ("a/empty", {"empty"}),
    ],
)
async def test_below(
    store: Store, source: S3, tmp_path: Path, below: str, published: set[str]
) -> None:
    store.put(BUCKET, KEYS)
    listing = await _list(source, f"s3://{BUCKET}/{below}")
    assert {file.path for file in listing.files} == published
    brought = await bring(source, listing, tmp_path)
    root = below.strip("/")
    for path in published:
        exact = published == {root.rpartition("/")[2]} and not below.endswith("/")
        assert brought[path] == KEYS[root if exact else f"{root}/{path}"]
    # A repair has a listing without the names at the source.
    bare = replace(listing, files=tuple(replace(f, origin="", version=None) for f in listing.files))
    assert await bring(source, bare, tmp_path) == brought


async def test_9_1_12_patterns_choose_below_a_prefix_and_not_of_one_object(
    store: Store, source: S3, tmp_path: Path
) -> None:
    """As KServe: who names one object has named the files."""
    store.put(BUCKET, KEYS)

    async def published(below: str) -> set[str]:
        uri = f"s3://{BUCKET}/{below}"
        listing = await source.list(ModelRef(uri=uri, include=("x", "b*"), exclude=("both",)))
        (directory := tmp_path / below.replace("/", "_")).mkdir()
        await bring(source, listing, directory)
        return {file.path for file in listing.files}

    assert await published("a") == {"x"}
    assert await published("both/") == {"below"}
    assert await published("both") == {"both"}
    assert await published("a.txt") == {"a.txt"}


@pytest.mark.parametrize(
    ("below", "archive"),
    [
        ("one/m.tar.gz", "m.tar.gz"),
        ("one", "m.tar.gz"),  # alone below a prefix, as KServe counts
        ("one/", "m.tar.gz"),
        ("two", None),
        ("two/m.zip", "m.zip"),
    ],
)
async def test_an_archive_alone_is_to_be_unpacked(
    store: Store, source: S3, tmp_path: Path, below: str, archive: str | None
) -> None:
    keys = {"one/m.tar.gz": b"tar", "one/": b"", "two/m.zip": b"zip", "two/x": b"x"}
    store.put(BUCKET, keys)
    ref = ModelRef(uri=f"s3://{BUCKET}/{below}", include=("m.*", "none"))
    listing = await source.list(ref)
    if archive is None:  # also where the patterns leave nothing else
        assert listing.archive is None
        assert [file.path for file in listing.files] == ["m.zip"]
        return
    assert listing.archive is not None
    assert listing.files == ()
    assert listing.archive.path == archive
    assert listing.archive.digest is not None
    found = replace(listing, files=(listing.archive,))
    assert await bring(source, found, tmp_path) == {
        archive: archive.rpartition(".")[2].encode() if archive == "m.zip" else b"tar"
    }
    mended = replace(listing.archive, origin="", version=None)
    located = await source.locate(replace(listing, archive=mended), mended)
    assert isinstance(located, HttpLocator)
    assert f"{below.split('/')[0]}/{archive}?" in located.url


async def test_a_whole_bucket(store: Store, source: S3) -> None:
    for uri in (f"s3://{BUCKET}", f"s3://{BUCKET}/"):
        assert _sizes(await _list(source, uri)) == {k: len(v) for k, v in FILES.items()}


async def test_the_same_content_has_the_same_revision(store: Store, source: S3) -> None:
    first = await _list(source)
    store.put(BUCKET, dict(reversed(list(FILES.items()))))
    assert (await _list(S3(store.environment))).revision == first.revision
    store.put(BUCKET, {**FILES, "tiny/config.json": b"[]"})
    assert (await _list(source)).revision != first.revision


async def test_what_was_asked_once_is_not_asked_again(store: Store, source: S3) -> None:
    first = await _list(source)
    asked = len(store.of("HEAD"))
    assert await _list(source) == first
    assert len(store.of("HEAD")) == asked + 1, "whether the prefix is an object"


async def test_only_empty_markers(store: Store, source: S3) -> None:
    store.put(BUCKET, {"tiny/": b"", "tiny/sub/": b""})
    assert (await _refusal(source)).reason is Reason.EMPTY_LISTING


# --- the oracle: boto3 itself, and the initializer's rules --------------------------------------


def _downloaded(store: Store, prefix: str, only: set[str] | None = None) -> dict[str, bytes]:
    """All that boto3 finds below a prefix that ends with a slash."""
    client, found = store.client(), {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        for entry in page["Contents"]:
            path = entry["Key"].removeprefix(prefix)
            if not path.endswith("/") and path and (only is None or path in only):
                into = io.BytesIO()
                client.download_fileobj(BUCKET, entry["Key"], into)
                found[path] = into.getvalue()
    return found


@pytest.mark.parametrize("seed", range(5))
async def test_what_we_publish_is_what_boto3_downloads(
    store: Store, source: S3, tmp_path: Path, seed: int
) -> None:
    store.put(BUCKET, {f"pré fix+/{path}": data for path, data in generated(seed).items()})
    listing = await _list(source, f"s3://{BUCKET}/pré fix+")
    assert await bring(source, listing, tmp_path) == _downloaded(store, "pré fix+/")


async def test_3000_keys(store: Store, source: S3, tmp_path: Path) -> None:
    files = {f"tiny/{n % 7}/part-{n:04}": b"%d" % n if n % 5 == 0 else b"" for n in range(3000)}
    store.put(BUCKET, {**files, "tiny-not/x": b"x"})
    listing = await _list(source)
    assert len(store.of("LIST")) == 3
    assert _sizes(listing) == {path.removeprefix("tiny/"): len(d) for path, d in files.items()}
    some = tuple(file for file in listing.files if file.path.endswith(("00", "50", "99")))
    brought = await bring(source, replace(listing, files=some), tmp_path)
    assert brought == _downloaded(store, "tiny/", {file.path for file in some})


def test_the_command(store: Store, tmp_path: Path) -> None:
    """The published tree, and a manifest that says what was promised."""
    with machine(tmp_path / "machine") as localmodel:
        done = localmodel("pull", URI, environment=store.environment)
        assert done.code == 0, done.stderr
        key = cache_key(URI)
        root = localmodel.root / layout.model(key)
        published = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
        found = {path: file.read_bytes() for path, file in published.items()}
        assert found == _downloaded(store, "tiny/")
        sealed = manifest.parse((localmodel.root / layout.manifest(key)).read_text())
        promised = {file.path: file.promised for file in sealed.files}
        assert promised["empty"] is None
        assert (promised["sub/weights.bin"] or Digest("sha256", "")).algorithm == "md5"
        kept = [path.read_bytes() for path in localmodel.home.rglob("*") if path.is_file()]
        shown = done.stdout + done.stderr
    for secret in (SECRET, "Signature="):
        assert secret not in shown
        assert not [data for data in kept if secret.encode() in data], "nothing of it on the disk"


# --- checksums ----------------------------------------------------------------------------------

DATA = random.Random(2).randbytes(300_000)
DIGESTS: dict[Algorithm, str] = {
    "sha256": hashlib.sha256(DATA).hexdigest(),
    "crc32": f"{zlib.crc32(DATA):08x}",
    "crc32c": f"{checksums.crc32c(DATA):08x}",
    "crc64nvme": f"{checksums.crc64nvme(DATA):016x}",
    "md5": hashlib.md5(DATA, usedforsecurity=False).hexdigest(),
}


@pytest.mark.parametrize("algorithm", [*DIGESTS])
async def test_a_promised_checksum_is_checked(
    store: Store, source: S3, tmp_path: Path, algorithm: Algorithm
) -> None:
    options = {} if algorithm == "md5" else {"ChecksumAlgorithm": algorithm.upper()}
    if algorithm == "md5":
        store.put(BUCKET, {"tiny/w": DATA})
    else:
        store.put(BUCKET, {})
        store.client().put_object(Bucket=BUCKET, Key="tiny/w", Body=DATA, **options)
    listing = await _list(source)
    assert listing.files[0].digest == Digest(algorithm, DIGESTS[algorithm])
    assert await bring(source, listing, tmp_path) == {"w": DATA}
    # It says so in what is kept: in the pinned listing and in the manifest.
    assert pinned.parse(pinned.render(listing)) == listing
    sealed = manifest.seal(listing, {"w": hashlib.sha256(DATA).hexdigest()}, sealed_at=0)
    assert f"# file 300000 {algorithm}:{DIGESTS[algorithm]} w\n" in manifest.render(sealed)
    assert manifest.parse(manifest.render(sealed)) == sealed
    # One bit of what is sent is another.
    wrong = DATA[:-1] + bytes([DATA[-1] ^ 1])
    store.fault("GET", "*/w", Answer(200, body=wrong))
    with pytest.raises(AgentError) as caught:
        await _fetch(source, listing, listing.files[0], tmp_path / "wrong", [])
    assert caught.value.reason is Reason.DIGEST_MISMATCH


def _head(**said: Any) -> dict[str, Any]:
    return {"ETag": '"' + "0" * 32 + '"', "ContentLength": 3, **said}


def _of(algorithm: Algorithm) -> str:
    return base64.b64encode(bytes(HEX_DIGITS[algorithm] // 2)).decode()


@pytest.mark.parametrize(
    ("head", "promised"),
    [
        (_head(), "md5"),
        (_head(ServerSideEncryption="AES256"), "md5"),
        (_head(ServerSideEncryption="aws:kms"), None),
        (_head(ServerSideEncryption="aws:kms:dsse"), None),
        (_head(SSECustomerAlgorithm="AES256"), None),
        (_head(ETag='"' + "0" * 32 + '-2"'), None),
        (_head(ETag='"W/whatever"'), None),
        (_head(ChecksumSHA256=_of("sha256"), ChecksumType="FULL_OBJECT"), "sha256"),
        (_head(ChecksumSHA256=_of("sha256"), ChecksumCRC32=_of("crc32")), "sha256"),
        (_head(ChecksumSHA256=_of("sha256") + "-2", ChecksumType="COMPOSITE"), "md5"),
        (_head(ChecksumSHA256=_of("sha256") + "-2", ETag='"x-2"'), None),
        # moto: of parts, without saying so
        (_head(ChecksumSHA256=_of("sha256"), ETag='"' + "0" * 32 + '-2"'), None),
        (_head(ChecksumCRC32C=_of("crc32c"), ETag='"x-2"', ChecksumType="COMPOSITE"), None),
        (_head(ChecksumCRC32C=_of("crc32c"), ETag='"x-2"', ChecksumType="FULL_OBJECT"), "crc32c"),
        (_head(ChecksumCRC64NVME=_of("crc64nvme"), ETag='"x-2"'), "crc64nvme"),
        (_head(ServerSideEncryption="aws:kms", ChecksumCRC32=_of("crc32")), "crc32"),
    ],
)
def test_what_is_promised(head: dict[str, Any], promised: str | None) -> None:
    digest = s3._promise(head, BUCKET)
    assert (digest and digest.algorithm) == promised
    if promised == "md5":
        assert s3._promise(head, "express--euc1-az1--x-s3") is None


@pytest.mark.parametrize(
    ("algorithm", "promised"), [("CRC64NVME", "crc64nvme"), ("SHA256", None), (None, None)]
)
async def test_an_object_in_parts(
    store: Store, source: S3, tmp_path: Path, algorithm: str | None, promised: str | None
) -> None:
    store.put(BUCKET, {})
    client, where = store.client(), {"Bucket": BUCKET, "Key": "tiny/w"}
    options = {"ChecksumAlgorithm": algorithm} if algorithm else {}
    upload = {**where, "UploadId": client.create_multipart_upload(**where, **options)["UploadId"]}
    parts, whole = [], DATA * 20
    for number, at in enumerate(range(0, len(whole), 5_242_880), 1):
        body = whole[at : at + 5_242_880]
        put = client.upload_part(**upload, PartNumber=number, Body=body, **options)
        kept = {k: v for k, v in put.items() if k.startswith("Checksum") and algorithm}
        parts.append({"PartNumber": number, "ETag": put["ETag"], **kept})
    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    listing = await _list(source)
    digest = listing.files[0].digest
    assert (digest and digest.algorithm) == promised
    assert await bring(source, listing, tmp_path) == {"w": whole}


# --- one version --------------------------------------------------------------------------------


async def test_a_cut_download_goes_on_where_it_was(
    store: Store, source: S3, tmp_path: Path
) -> None:
    listing, retries = await _list(source), list[Reason]()
    file = listing.files[2]
    store.fault("GET", "*/weights.bin", Answer(cut=600_000), times=1)
    assert (
        await _fetch(source, listing, file, tmp_path / "w", retries) == FILES[f"tiny/{file.path}"]
    )
    assert retries == [Reason.NETWORK]
    first, second = store.of("GET")
    assert first.headers["if-match"] == second.headers["if-match"] == file.version
    assert second.headers["range"] == "bytes=600000-"


async def test_a_later_life_goes_on_too(store: Store, source: S3, tmp_path: Path) -> None:
    listing = await _list(source)
    file = listing.files[2]
    data = FILES[f"tiny/{file.path}"]
    (tmp_path / "w").write_bytes(data[:500_000])
    assert await _fetch(S3(store.environment), listing, file, tmp_path / "w", []) == data
    assert store.of("GET")[-1].headers["range"] == "bytes=500000-"


@pytest.mark.parametrize("ignores", [False, True], ids=["If-Match", "no If-Match"])
async def test_what_is_overwritten_meanwhile_is_never_spliced(
    store: Store, source: S3, tmp_path: Path, ignores: bool
) -> None:
    """Of the same size, and without a promise that would tell."""
    listing = await _list(source)
    file = replace(listing.files[2], digest=None)
    new = bytes(reversed(FILES[f"tiny/{file.path}"]))

    def overwrite() -> None:
        store.put(BUCKET, {**FILES, f"tiny/{file.path}": new})
        if ignores:
            etag = hashlib.md5(new, usedforsecurity=False).hexdigest()
            placed = {"ETag": f'"{etag}"', "Content-Range": "bytes 600000-899999/900000"}
            store.fault("GET", "*", Answer(206, "", placed, new[600_000:]))

    store.fault("GET", "*/weights.bin", Answer(cut=600_000, then=overwrite), times=1)
    with pytest.raises(AgentError) as caught:
        await _fetch(source, listing, file, tmp_path / "w", [])
    assert caught.value.reason is Reason.SOURCE_CHANGED
    store.mend()
    listing = await _list(source)
    assert await _fetch(source, listing, listing.files[2], tmp_path / "w", []) == new


async def test_overwritten_while_it_is_listed(store: Store, source: S3) -> None:
    headers = {"ETag": '"other"', "Content-Length": "2"}
    store.fault("HEAD", "*/config.json", Answer(200, "", headers))
    assert (await _refusal(source)).reason is Reason.SOURCE_CHANGED


async def test_the_version_is_asked_of_whoever_sends_the_bytes(tmp_path: Path) -> None:
    """And the credentials of nobody else."""
    with Wire(lambda head: reply(412)) as other:
        away = {"Location": other.url("/x")}
        with Wire(lambda head: reply(307, b"", away)) as home:
            headers = {"If-Match": '"v1"', "Authorization": "Bearer sesame"}
            with pytest.raises(AgentError) as caught:
                await _bring_link(HttpLocator(url=home.url("/x"), headers=headers), tmp_path)
    assert caught.value.reason is Reason.SOURCE_CHANGED
    assert b'If-Match: "v1"' in other.heads[0]
    assert b"sesame" not in other.heads[0]
    assert b"sesame" in home.heads[0]


async def _bring_link(locator: HttpLocator, tmp_path: Path) -> None:
    async def locate() -> HttpLocator:
        return locator

    engine = Engine(stall_seconds=5.0)
    try:
        await engine.fetch(
            FileJob(
                path=tmp_path / "x",
                size=3,
                promised=None,
                locate=locate,
                on_bytes=lambda done, received: None,
                on_retry=lambda error: None,
            )
        )
    finally:
        engine.close()


# --- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "status", "code", "reason"),
    [
        (True, 403, "AccessDenied", None),
        (True, 400, "ExpiredToken", None),
        (False, 403, "AccessDenied", Reason.UNAUTHORIZED),
        (False, 400, "ExpiredToken", Reason.UNAUTHORIZED),
        (True, 503, "SlowDown", None),
        (False, 403, "InvalidObjectState", Reason.SOURCE_UNREADABLE),
    ],
)
async def test_a_link_that_is_refused(
    store: Store,
    source: S3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: bool,
    status: int,
    code: str,
    reason: Reason | None,
) -> None:
    """One that may be too old is signed once more; a fresh one means what is said of it."""
    monkeypatch.setattr(s3, "_FRESH_SECONDS", -1.0 if old else 60.0)
    listing = await _list(source)
    store.fault("GET", "*", Answer(status, code), times=1)
    if reason is None:
        await _fetch(source, listing, listing.files[0], tmp_path / "x", [])
        assert len(store.of("GET")) == 2
        return
    with pytest.raises(AgentError) as caught:
        await _fetch(source, listing, listing.files[0], tmp_path / "x", [])
    assert caught.value.reason is reason
    assert code in caught.value.message
    assert SECRET not in caught.value.message


async def test_an_expired_link_really_is_refused(store: Store, source: S3, tmp_path: Path) -> None:
    """The gate is no paper tiger: a link of two hours ago, and one with another key's signature."""
    listing = await _list(source)
    store.skew = timedelta(hours=2)
    with pytest.raises(AgentError) as caught:
        await _fetch(source, listing, listing.files[0], tmp_path / "x", [])
    assert caught.value.reason is Reason.UNAUTHORIZED
    store.skew = timedelta()
    store.secrets[KEY] = "another"
    with pytest.raises(AgentError, match="SignatureDoesNotMatch"):
        await _fetch(source, listing, listing.files[0], tmp_path / "x", [])


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "headers", "reason", "said"),
    [
        (404, "NoSuchBucket", {}, Reason.REPOSITORY_NOT_FOUND, "no such bucket"),
        (403, "AccessDenied", {}, Reason.UNAUTHORIZED, "key that ends in 1234; it needs s3:List"),
        (403, "InvalidAccessKeyId", {}, Reason.UNAUTHORIZED, "not known there"),
        (403, "SignatureDoesNotMatch", {}, Reason.UNAUTHORIZED, "secret key is not that of"),
        (400, "ExpiredToken", {}, Reason.UNAUTHORIZED, "has expired"),
        (400, "InvalidToken", {}, Reason.UNAUTHORIZED, "not valid"),
        (403, "RequestTimeTooSkewed", {}, Reason.UNAUTHORIZED, "clock"),
        (301, "PermanentRedirect", {}, Reason.REPOSITORY_NOT_FOUND, "set AWS_REGION"),
        (503, "SlowDown", {"Retry-After": "7"}, Reason.RATE_LIMITED, "SlowDown"),
        (429, "TooManyRequests", {}, Reason.RATE_LIMITED, "fewer"),
        (503, "ServiceUnavailable", {"Retry-After": "7"}, Reason.SERVER_ERROR, "503"),
        (500, "InternalError", {}, Reason.SERVER_ERROR, "500"),
        (400, "RequestTimeout", {}, Reason.SERVER_ERROR, "gave up"),
        (403, "SomethingNew", {}, Reason.UNAUTHORIZED, "SomethingNew"),
        (418, "Teapot", {}, Reason.BAD_RESPONSE, "Teapot"),
    ],
)
async def test_every_refusal_has_its_reason(
    store: Store,
    source: S3,
    status: int,
    code: str,
    headers: dict[str, str],
    reason: Reason,
    said: str,
) -> None:
    store.fault("HEAD", "*/tiny", Answer(status, code, headers))
    store.fault("HEAD", f"/{BUCKET}", Answer(status, code, headers))
    store.fault("LIST", "*", Answer(status, code, headers))
    begun = time.monotonic()
    error = await _refusal(source)
    assert error.reason is reason
    assert said in error.message
    assert error.retry_after_seconds == (7.0 if headers else None)
    assert time.monotonic() - begun < 10


async def test_who_checks_signatures_says_which_key_is_wrong(store: Store) -> None:
    """Of the gate's own checks, not told."""
    wrong = {**store.environment, "AWS_SECRET_ACCESS_KEY": "no" + SECRET}
    assert "secret key is not that of" in (await _refusal(S3(wrong))).message
    unknown = {**store.environment, "AWS_ACCESS_KEY_ID": "AKIAUNKNOWNUNKN5678"}
    assert "ends in 5678 is not known" in (await _refusal(S3(unknown))).message
    trailing = {**store.environment, "AWS_SECRET_ACCESS_KEY": f"{SECRET}\n"}
    assert (await _list(S3(trailing))).files, "as `echo secret | base64` makes them"


@pytest.mark.parametrize("hours", [3, -3])
async def test_a_clock_that_is_wrong(store: Store, source: S3, hours: int) -> None:
    store.skew = timedelta(hours=hours)
    store.fault("HEAD", "*", Answer(403))
    error = await _refusal(source)
    assert error.reason is Reason.UNAUTHORIZED
    assert re.search(r"clock is 10(799|800|801) s", error.message)
    assert ("behind" if hours > 0 else "ahead of") in error.message


async def test_another_region_is_found(store: Store, source: S3, tmp_path: Path) -> None:
    store.region = "ap-southeast-2"
    listing = await _list(source)
    assert await bring(source, listing, tmp_path)
    assert "ap-southeast-2" in store.of("GET")[0].query


@pytest.mark.parametrize(
    ("denied", "uri", "works"),
    [
        ({"LIST"}, f"{URI}/config.json", True),
        ({"LIST"}, URI, False),
        ({"HEAD", "GET"}, URI, False),
        ({"HEAD", "GET"}, f"{URI}/config.json", False),
    ],
)
async def test_what_may_be_read_without_the_right_to_list(
    store: Store, source: S3, denied: set[str], uri: str, works: bool
) -> None:
    store.denied |= denied
    if works:
        assert _sizes(await _list(source, uri)) == {"config.json": 2}
    else:
        error = await _refusal(source, uri)
        assert error.reason is Reason.UNAUTHORIZED
        assert "s3:GetObject" in error.message


async def test_nobody_there(store: Store) -> None:
    error = await _refusal(S3({**store.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}))
    assert error.reason is Reason.NETWORK
    assert "refused" in error.message
    assert "127.0.0.1:1" in error.message


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply(200, b"<html>sign in to the network</html>"), Reason.BAD_RESPONSE),
        (reply(200, b"\xff\xfe"), Reason.SERVER_ERROR),
        (reply(502, b"<html>" * 1000), Reason.SERVER_ERROR),
        (b"nonsense\r\n\r\n", Reason.NETWORK),
        (None, Reason.STALLED),
    ],
    ids=["login", "bytes", "gateway", "nonsense", "silence"],
)
async def test_what_is_no_store(store: Store, answer: bytes | None, reason: Reason) -> None:
    with Wire(lambda head: reply(404) if head.startswith(b"HEAD") else answer) as wire:
        options = {"AWS_ENDPOINT_URL": wire.url(""), "S3_READ_TIMEOUT": "1"}
        assert (await _refusal(S3({**store.environment, **options}))).reason is reason


def _page(*entries: str, more: str = "") -> bytes:
    ends = f"<NextContinuationToken>{more}</NextContinuationToken>" if more else ""
    ends += f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
    listed = "".join(f"<Contents>{entry}</Contents>" for entry in entries)
    return f"<ListBucketResult>{ends}{listed}</ListBucketResult>".encode()


@pytest.mark.parametrize(
    "entry",
    [
        "<Key>tiny/x</Key><Size>-1</Size><ETag>x</ETag>",
        "<Key>tiny/x</Key><Size>9223372036854775808</Size><ETag>x</ETag>",
        "<Key>tiny/x</Key><Size>much</Size><ETag>x</ETag>",
        "<Key>tiny/x</Key><ETag>x</ETag>",
        "<Key>tiny/x</Key><Size>1</Size>",
        "<Key>tiny/x</Key><Size>1</Size><ETag></ETag>",
        "<Key>tiny/x</Key><Size>1</Size><ETag>ü</ETag>",
        "<Key>other/x</Key><Size>1</Size><ETag>x</ETag>",
        "<Size>1</Size><ETag>x</ETag>",
    ],
)
async def test_a_listing_that_is_none(store: Store, entry: str) -> None:
    def answer(head: bytes) -> bytes:
        return reply(404) if head.startswith(b"HEAD") else reply(200, _page(entry))

    with Wire(answer) as wire:
        error = await _refusal(S3({**store.environment, "AWS_ENDPOINT_URL": wire.url("")}))
    assert error.reason is Reason.BAD_RESPONSE


async def test_a_listing_without_an_end_ends(store: Store) -> None:
    pages = iter(range(10**9))

    def answer(head: bytes) -> bytes:
        return reply(404) if head.startswith(b"HEAD") else reply(200, _page(more=f"{next(pages)}"))

    with Wire(answer) as wire:
        environment = {**store.environment, "AWS_ENDPOINT_URL": wire.url("")}
        assert (await _refusal(S3(environment, listing_seconds=1.0))).reason is Reason.STALLED


# --- settings -----------------------------------------------------------------------------------


async def test_only_the_mapping_is_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has another endpoint, other credentials, files, and a profile that is not."""
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id=x\naws_secret_access_key=y")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAOFTHEPROCESS",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_SESSION_TOKEN": "other",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_DEFAULT_REGION": "nowhere-1",
        "AWS_PROFILE": "absent",
        "AWS_CA_BUNDLE": "/absent",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }.items():
        monkeypatch.setenv(name, value)
    source = S3(store.environment)
    assert await bring(source, await _list(source), tmp_path)
    bare = {k: v for k, v in store.environment.items() if "KEY" not in k}
    error = await _refusal(S3(bare))
    assert error.reason is Reason.UNAUTHORIZED
    assert "awsAnonymousCredential" in error.message


async def test_from_the_process(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "S3_"))]:
        monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        f"[mine]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n"
    )
    (tmp_path / ".aws/config").write_text("[profile mine]\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert (await _list(S3.from_environment())).files


async def test_anonymous(store: Store, tmp_path: Path) -> None:
    store.public = True
    source = S3({"AWS_ENDPOINT_URL": store.endpoint, "awsAnonymousCredential": "True"})
    assert await bring(source, await _list(source), tmp_path)
    assert not [
        seen for seen in store.seen if "authorization" in seen.headers or "X-Amz" in seen.query
    ]
    store.public = False
    assert "denied to an anonymous user" in (await _refusal(source)).message


async def test_a_session_token(store: Store, tmp_path: Path) -> None:
    source = S3({**store.environment, "AWS_SESSION_TOKEN": TOKEN})
    listing = await _list(source)
    assert await bring(source, listing, tmp_path)
    assert store.of("LIST")[0].headers["x-amz-security-token"] == TOKEN
    shown = repr(source) + repr(listing) + repr(await source.locate(listing, listing.files[0]))
    assert TOKEN not in shown
    assert SECRET not in shown


@pytest.mark.parametrize("allowed", [True, False])
async def test_web_identity(store: Store, tmp_path: Path, allowed: bool) -> None:
    """IRSA: a token of the service account for credentials of a role."""
    (tmp_path / "token").write_text("header.claims.signature")
    store.secrets["ASIAROLEROLEROLE9999"] = SECRET
    given = (
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
        f"<AccessKeyId>ASIAROLEROLEROLE9999</AccessKeyId><SecretAccessKey>{SECRET}"
        f"</SecretAccessKey><SessionToken>{TOKEN}</SessionToken>"
        "<Expiration>2126-01-01T00:00:00Z</Expiration></Credentials>"
        "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
    )
    refused = "<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>"

    def answer(head: bytes) -> bytes:
        return reply(200, given.encode()) if allowed else reply(403, refused.encode())

    with Wire(answer) as sts:
        environment = {k: v for k, v in store.environment.items() if "KEY" not in k} | {
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/models",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ENDPOINT_URL_STS": sts.url(""),
        }
        source = S3(environment)
        if not allowed:
            error = await _refusal(source)
            assert error.reason is Reason.UNAUTHORIZED
            assert "role/models; check the role's trust policy" in error.message
            (tmp_path / "token").unlink()
            assert (await _refusal(S3(environment))).reason is Reason.UNAUTHORIZED
            return
        assert await bring(source, await _list(source), tmp_path)
    assert store.of("LIST")[0].headers["x-amz-security-token"] == TOKEN


ROLE = "arn:aws:iam::123456789012:role/models"


async def test_the_agents_own_role_is_assumed_with_the_token_of_its_pod(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IRSA, from the variables that EKS puts into the agent's pod to the bytes; moto gives keys."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "S3_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("header.claims.signature")
    with TokenService(store) as sts:
        for name, value in sts.environment(ROLE, str(tmp_path / "token")).items():
            monkeypatch.setenv(name, value)
        source = Sources().of(URI)
        listing = await source.list(ModelRef(uri=URI))
        assert len(await bring(source, listing, tmp_path)) == len(FILES)
        asked = [a for a in sts.asked if a["Action"] == "AssumeRoleWithWebIdentity"]
        assert {(a["RoleArn"], a["WebIdentityToken"]) for a in asked} == {
            (ROLE, "header.claims.signature")
        }
        # A cache with credentials of its own gets nothing of that role.
        begun = len(sts.asked)
        given = Given({**sts.environment(ROLE, str(tmp_path / "token"))})
        with pytest.raises(AgentError, match="there are no credentials"):
            await Sources().of(URI, given).list(ModelRef(uri=URI))
        assert len(sts.asked) == begun


async def test_a_cache_cannot_use_the_identity_of_the_machine(store: Store, tmp_path: Path) -> None:
    """Nor have the agent's own token sent to a place of its choice."""
    (tmp_path / "token").write_text("the agent's")
    (tmp_path / "keys").write_text(f"[default]\naws_access_key_id={KEY}\naws_secret_access_key=x")
    with Wire(lambda head: reply(500)) as elsewhere:
        bare = {k: v for k, v in store.environment.items() if "KEY" not in k and "EC2" not in k}
        hostile = bare | {
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/x",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ENDPOINT_URL_STS": elsewhere.url(""),
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": elsewhere.url("/"),
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "keys"),
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": elsewhere.url("/"),
        }
        error = await _refusal(S3.from_environment(hostile))
    assert "there are no credentials" in error.message
    assert elsewhere.heads == []


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing and files alike: by the bundle, without a check, by the machine's, not otherwise."""
    certificates = make_certificates(tmp_path)
    with Store(tls=certificates.server) as secure:
        secure.put(BUCKET, FILES)
        bundle = {"AWS_CA_BUNDLE": str(certificates.authority)}
        for options in (bundle, {"S3_VERIFY_SSL": "0"}):
            source = S3({**secure.environment, **options})
            listing = await _list(source)
            assert len(await bring(source, listing, tmp_path)) == len(FILES)
        # One of a container is not here.
        source = S3({**secure.environment, "AWS_CA_BUNDLE": "/in/a/container.pem"})
        with monkeypatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(certificates.authority))
            assert await bring(source, await _list(source), tmp_path)
        source = S3(secure.environment)
        error = await _refusal(source)
        assert error.reason is Reason.NETWORK
        assert "certificate" in error.message.lower()
        source._regions[BUCKET] = "eu-central-1"
        with pytest.raises(AgentError, match="certificate"):
            await _fetch(source, listing, listing.files[0], tmp_path / "x", [])


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({}, "https://models.s3.eu-central-1.amazonaws.com/tiny/a%20b"),
        ({"AWS_ENDPOINT_URL": "https://s3.amazonaws.com"}, "https://models.s3.eu-central-1."),
        ({"S3_USE_ACCELERATE": "true"}, "https://models.s3-accelerate.amazonaws.com/tiny/"),
        ({"AWS_ENDPOINT_URL": "https://minio:9000"}, "https://minio:9000/models/tiny/a%20b?"),
        (
            {"AWS_ENDPOINT_URL": "https://minio:9000", "S3_USER_VIRTUAL_BUCKET": "true"},
            "https://models.minio:9000/tiny/",
        ),
    ],
)
async def test_addresses(options: dict[str, str], host: str) -> None:
    credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    source = S3({**credentials, "AWS_DEFAULT_REGION": "eu-central-1", **options})
    source._regions[BUCKET] = "eu-central-1"  # AWS itself is not asked
    file = RemoteFile(path="a b", size=1, origin="tiny/a b", version='"v"')
    listing = Listing(ref=ModelRef(uri=URI), revision="r", files=(file,))
    locator = await source.locate(listing, file)
    assert isinstance(locator, HttpLocator)
    assert locator.url.startswith(host)
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in locator.url
    assert locator.headers == {"If-Match": '"v"'}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"AWS_ENDPOINT_URL": "https://user:sesame@host"}, Reason.INVALID_SPEC),
        ({"AWS_ENDPOINT_URL": "minio:9000"}, Reason.INVALID_SPEC),
        ({"AWS_DEFAULT_REGION": "not a region"}, Reason.INVALID_SPEC),
        ({"AWS_SECRET_ACCESS_KEY": "ses\name"}, Reason.UNAUTHORIZED),
        ({"AWS_SESSION_TOKEN": "sesamé"}, Reason.UNAUTHORIZED),
    ],
)
def test_settings_that_cannot_be(options: dict[str, str], reason: Reason) -> None:
    with pytest.raises(AgentError) as caught:
        S3(options)
    assert caught.value.reason is reason
    assert "ses" not in caught.value.message.replace("must not", "")


def test_one_source_for_the_same_variables() -> None:
    made = S3.from_environment({"AWS_REGION": "eu-west-1"})
    assert S3.from_environment({"AWS_REGION": "eu-west-1"}) is made
    assert S3.from_environment({"AWS_REGION": "eu-west-2"}) is not made


def test_boto3_is_loaded_by_the_first_s3_only() -> None:
    code = (
        "import sys; from agent.sources import Sources; from agent.model import ModelRef; "
        "s = Sources(); s.of('hf://a/b'); "
        "s.of('s3://bucket/x').check(ModelRef(uri='s3://bucket/x')); import agent.transfer; "
        "assert not {'boto3', 'botocore', 'awscrt'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
