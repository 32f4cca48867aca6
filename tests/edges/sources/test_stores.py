"""`s3://` against real stores that keep the rules (SeaweedFS, versitygw), and one that does not."""

import asyncio
import base64
import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from awscrt import checksums

from agent.errors import AgentError, Reason
from agent.model import Digest, Listing, ModelRef, RemoteFile
from agent.sources import s3
from agent.sources.s3 import S3
from agent.transfer import Engine, FileJob
from tests.contracts.source_contract import bring
from tests.stores import AGREEING, SECRET, RealStore, rclone

BUCKET = "models"
URI = f"s3://{BUCKET}/tiny"
OLD = random.Random(1).randbytes(900_000)
NEW = random.Random(2).randbytes(900_000)
PART = 5 * 1024 * 1024
_REFUSALS = (Reason.BAD_RESPONSE, Reason.SOURCE_CHANGED, Reason.DIGEST_MISMATCH)


@pytest.fixture(scope="module", params=AGREEING)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealStore]:
    with AGREEING[request.param](tmp_path_factory.mktemp(request.param)) as store:
        yield store


@pytest.fixture(scope="module")
def lax(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealStore]:
    """It ignores If-Match, and says 200 to a range while it sends the range."""
    with rclone(tmp_path_factory.mktemp("rclone")) as store:
        yield store


async def _list(store: RealStore, uri: str = URI, **environment: str) -> Listing:
    return await S3({**store.environment, **environment}).list(ModelRef(uri=uri))


async def _fetch(store: RealStore, listing: Listing, file: RemoteFile, path: Path) -> bytes:
    engine, source = Engine(stall_seconds=5.0, dice=lambda: 0.0), S3(store.environment)
    try:
        await engine.fetch(
            FileJob(
                path=path,
                size=file.size,
                promised=file.digest,
                locate=lambda: source.locate(listing, file),
                on_bytes=lambda done, received: None,
                on_retry=lambda error: None,
            )
        )
    finally:
        engine.close()
    return path.read_bytes()


# --- what is listed, and what is promised of it -------------------------------------------------


async def test_every_key_of_a_large_prefix_is_published(store: RealStore, tmp_path: Path) -> None:
    """More than a page, in an order that is not that of bytes everywhere."""
    names = [f"shard-{number:04}/a-b.bin" for number in range(1050)]
    names += ["a/x", "a-b/x", "a b+c%41&=.bin", "zoë/ʃ.txt", "empty"]
    client, bodies = store.client(), {name: name.encode()[:5] for name in names}
    bodies["empty"] = b""
    store.put("large", {})
    await asyncio.gather(
        *(
            asyncio.to_thread(client.put_object, Bucket="large", Key=f"p/{name}", Body=body)
            for name, body in bodies.items()
        )
    )
    listing = await _list(store, "s3://large/p")
    assert {file.path: file.size for file in listing.files} == {
        name: len(body) for name, body in bodies.items()
    }
    some = replace(listing, files=tuple(f for f in listing.files if "shard" not in f.path))
    brought = await bring(S3(store.environment), some, tmp_path)
    assert brought == {file.path: bodies[file.path] for file in some.files}


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("SHA256", Digest("sha256", hashlib.sha256(OLD).hexdigest())),
        ("CRC64NVME", Digest("crc64nvme", f"{checksums.crc64nvme(OLD):016x}")),
        ("CRC32C", Digest("crc32c", f"{checksums.crc32c(OLD):08x}")),
    ],
)
async def test_a_checksum_that_the_uploader_chose_is_the_promise(
    store: RealStore, tmp_path: Path, algorithm: str, expected: Digest
) -> None:
    store.put(BUCKET, {"tiny/w": OLD}, ChecksumAlgorithm=algorithm)
    listing = await _list(store)
    assert listing.files[0].digest == expected
    assert await bring(S3(store.environment), listing, tmp_path) == {"w": OLD}


async def test_parts_with_a_checksum_of_checksums_promise_nothing(
    store: RealStore, tmp_path: Path
) -> None:
    """`...-2` is of two digests, and to compare it with a file's would refuse every file."""
    whole = random.Random(3).randbytes(PART + 100)
    store.put(BUCKET, {})
    client, where = store.client(), {"Bucket": BUCKET, "Key": "tiny/w"}
    begun = client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256")
    upload = {**where, "UploadId": begun["UploadId"]}
    parts = []
    for number, body in enumerate((whole[:PART], whole[PART:]), 1):
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        put = client.upload_part(**upload, PartNumber=number, Body=body, ChecksumSHA256=digest)
        parts.append({"PartNumber": number, "ETag": put["ETag"], "ChecksumSHA256": digest})
    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    listing = await _list(store)
    assert [file.digest for file in listing.files] == [None]
    assert await bring(S3(store.environment), listing, tmp_path) == {"w": whole}


# --- one version --------------------------------------------------------------------------------


async def test_a_later_life_goes_on_behind_what_it_finds(store: RealStore, tmp_path: Path) -> None:
    store.put(BUCKET, {"tiny/w": OLD})
    listing = await _list(store)
    (tmp_path / "w").write_bytes(OLD[:500_000])
    assert await _fetch(store, listing, listing.files[0], tmp_path / "w") == OLD


async def test_what_was_overwritten_is_never_spliced(store: RealStore, tmp_path: Path) -> None:
    """Half of it is here, its size is the same, and no promise would tell."""
    store.put(BUCKET, {"tiny/w": OLD})
    listing = await _list(store)
    store.put(BUCKET, {"tiny/w": NEW})
    (tmp_path / "w").write_bytes(OLD[:500_000])
    with pytest.raises(AgentError) as caught:
        await _fetch(store, listing, replace(listing.files[0], digest=None), tmp_path / "w")
    assert caught.value.reason is Reason.SOURCE_CHANGED


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "environment", "reason", "said"),
    [
        (URI, {"AWS_SECRET_ACCESS_KEY": "no" + SECRET}, Reason.UNAUTHORIZED, "secret key is not"),
        ("s3://absent/tiny", {}, Reason.REPOSITORY_NOT_FOUND, "no such bucket"),
        (f"s3://{BUCKET}/absent", {}, Reason.EMPTY_LISTING, "no files"),
    ],
)
async def test_a_refusal_has_its_reason(
    store: RealStore, uri: str, environment: dict[str, str], reason: Reason, said: str
) -> None:
    store.put(BUCKET, {"tiny/w": OLD})
    with pytest.raises(AgentError) as caught:
        await _list(store, uri, **environment)
    assert caught.value.reason is reason
    assert said in caught.value.message
    assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r}"


async def test_a_link_that_expired_is_signed_anew(
    store: RealStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is refused although it is new says so."""
    store.put(BUCKET, {"tiny/w": OLD})
    listing = await _list(store)
    monkeypatch.setattr(s3, "_LINK_SECONDS", 1)
    monkeypatch.setattr(s3, "_FRESH_SECONDS", 0.5)
    links, source = [], S3(store.environment)
    engine = Engine(dice=lambda: 0.0)

    async def locate():  # type: ignore[no-untyped-def]
        links.append(await source.locate(listing, listing.files[0]))
        if len(links) == 1:
            await asyncio.sleep(2.5)  # a slot was long in coming
            monkeypatch.setattr(s3, "_LINK_SECONDS", 60)
        return links[-1]

    try:
        await engine.fetch(
            FileJob(
                path=tmp_path / "w",
                size=len(OLD),
                promised=listing.files[0].digest,
                locate=locate,
                on_bytes=lambda done, received: None,
                on_retry=lambda error: None,
            )
        )
    finally:
        engine.close()
    assert (tmp_path / "w").read_bytes() == OLD
    assert len(links) == 2


# --- a store that breaks the rules --------------------------------------------------------------


async def test_what_comes_whole_is_right(lax: RealStore, tmp_path: Path) -> None:
    lax.put(BUCKET, {"tiny/w": OLD, "tiny/config.json": b"{}"})
    listing = await _list(lax)
    assert await bring(S3(lax.environment), listing, tmp_path) == {
        "w": OLD,
        "config.json": b"{}",
    }


@pytest.mark.parametrize("promised", [True, False])
@pytest.mark.parametrize("now", [OLD, NEW], ids=["the same", "overwritten"])
async def test_a_200_with_a_part_of_the_file_is_not_put_behind_the_other_part(
    lax: RealStore, tmp_path: Path, now: bytes, promised: bool
) -> None:
    """The whole of one version, or an error; never the start of one and the end of another."""
    lax.put(BUCKET, {"tiny/w": OLD})
    listing = await _list(lax)
    file = listing.files[0] if promised else replace(listing.files[0], digest=None)
    lax.put(BUCKET, {"tiny/w": now})
    (tmp_path / "w").write_bytes(OLD[:500_000])
    found = await _outcome(lax, listing, file, tmp_path / "w")
    assert found in (OLD, *(() if promised else (NEW,)), *_REFUSALS)


async def _outcome(
    store: RealStore, listing: Listing, file: RemoteFile, path: Path
) -> bytes | Reason:
    try:
        return await _fetch(store, listing, file, path)
    except AgentError as error:
        return error.reason
