"""`gs://` by its S3-compatible interface: whose keys, whose endpoint, whose checksums."""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agent.errors import AgentError, Reason
from agent.model import Digest, HttpLocator, ModelRef
from agent.sources import Sources
from agent.sources.gs import GoogleStorage
from agent.sources.s3 import _promise
from tests.contracts.source_contract import bring
from tests.fakes.s3 import KEY, SECRET, Answer, Store

BUCKET, URI = "models", "gs://models/tiny"
FILES = {"config.json": b"{}", "sub/model.bin": b"w" * 100_000}
OWN = {"GS_ACCESS_KEY_ID": KEY, "GS_SECRET_ACCESS_KEY": SECRET}
OF_CACHE = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
ACCOUNT = {"GOOGLE_APPLICATION_CREDENTIALS": "/var/secrets/gcloud-application-credentials.json"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name in (*OWN, *OF_CACHE, *ACCOUNT):
        monkeypatch.delenv(name, raising=False)
    with Store() as store:
        store.put(BUCKET, {f"tiny/{path}": data for path, data in FILES.items()})
        yield store


def _source(store: Store, environment: Mapping[str, str]) -> GoogleStorage:
    found = GoogleStorage.from_environment({"GS_ENDPOINT_URL": store.endpoint, **environment})
    assert isinstance(found, GoogleStorage)
    return found


@pytest.mark.parametrize("keys", [OWN, OF_CACHE, {**ACCOUNT, **OWN}], ids=["own", "cache", "both"])
async def test_with_hmac_keys(store: Store, tmp_path: Path, keys: dict[str, str]) -> None:
    source = _source(store, keys)
    listing = await source.list(ModelRef(uri=URI))
    assert {file.path for file in listing.files} == set(FILES)
    assert {file.digest for file in listing.files} == {
        Digest("md5", hashlib.md5(data, usedforsecurity=False).hexdigest())
        for data in FILES.values()
    }
    assert await bring(source, listing, tmp_path) == FILES
    assert not [seen for seen in store.seen if "x-amz-checksum-mode" in seen.headers]
    assert SECRET not in repr(source)


async def test_a_public_bucket_needs_none(store: Store, tmp_path: Path) -> None:
    store.public = True
    source = _source(store, {})
    listing = await source.list(ModelRef(uri=URI))
    assert await bring(source, listing, tmp_path) == FILES
    assert not [seen for seen in store.seen if "authorization" in seen.headers]


async def test_one_that_is_not_public_says_what_to_do(store: Store) -> None:
    with pytest.raises(AgentError) as caught:
        await _source(store, {}).list(ModelRef(uri=URI))
    assert caught.value.reason is Reason.UNAUTHORIZED
    assert "an anonymous user" in caught.value.message
    assert "gcloud storage hmac create" in caught.value.message


def test_a_service_account_is_never_silently_nobody(store: Store) -> None:
    """Its bucket may be public as well, and hold something else for everybody."""
    with pytest.raises(AgentError) as caught:
        _source(store, ACCOUNT)
    assert caught.value.reason is Reason.UNAUTHORIZED
    assert "gcloud storage hmac create" in caught.value.message


async def test_the_aws_keys_of_this_process_are_for_aws(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**OF_CACHE, "AWS_ENDPOINT_URL": store.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GS_ENDPOINT_URL", store.endpoint)
    with pytest.raises(AgentError) as caught:
        await Sources().of(URI).list(ModelRef(uri=URI))
    assert "an anonymous user" in caught.value.message
    assert not [seen for seen in store.seen if "authorization" in seen.headers]


async def test_where_it_goes_and_what_it_is_called(store: Store) -> None:
    source = GoogleStorage.from_environment({**OWN, "AWS_ENDPOINT_URL": store.endpoint})
    assert source is GoogleStorage.from_environment({**OWN, "AWS_ENDPOINT_URL": store.endpoint})
    assert repr(source) == "S3('https://storage.googleapis.com')"
    with pytest.raises(AgentError) as caught:
        source.check(ModelRef(uri="s3://models/tiny"))
    assert "gs://bucket" in caught.value.message


async def test_what_is_overwritten_meanwhile_is_not_published(store: Store, tmp_path: Path) -> None:
    source = _source(store, OWN)
    listing = await source.list(ModelRef(uri=URI))
    store.put(BUCKET, {f"tiny/{path}": data + b"!" for path, data in FILES.items()})
    located = await source.locate(listing, listing.files[0])
    assert isinstance(located, HttpLocator)
    assert located.headers == {"If-Match": listing.files[0].version}
    with pytest.raises(AgentError) as caught:
        await bring(source, listing, tmp_path)
    assert caught.value.reason is Reason.SOURCE_CHANGED


_MD5 = base64.b64encode(b"m" * 16).decode()


@pytest.mark.parametrize(
    ("said", "promised"),
    [
        (f"crc32c=AAAAAQ==,md5={_MD5}", Digest("md5", "6d" * 16)),
        (f"crc32c=AAAAAQ==, md5={_MD5}", Digest("md5", "6d" * 16)),
        ("crc32c=AAAAAQ==", Digest("crc32c", "00000001")),  # composed of others
        ("", None),
    ],
)
def test_googles_own_checksums_are_promises(said: str, promised: Digest | None) -> None:
    """Also where the ETag is none: of a composed object, or of one with a key of the customer's."""
    about = {"HTTPHeaders": {"x-goog-hash": said}}
    head = {"ETag": '"CKicn4fknukCEAE="', "ContentLength": 3, "ResponseMetadata": about}
    assert _promise(head, BUCKET) == promised


@pytest.mark.parametrize("said", ["md5=AAAA", "crc32c=!!"])
async def test_a_checksum_that_is_none_is_a_bad_response(store: Store, said: str) -> None:
    headers = {"x-goog-hash": said, "ETag": '"x"', "Content-Length": "2"}
    store.fault("HEAD", "*/config.json", Answer(200, headers=headers))
    with pytest.raises(AgentError) as caught:
        await _source(store, OWN).list(ModelRef(uri=f"{URI}/config.json"))
    assert caught.value.reason is Reason.BAD_RESPONSE
