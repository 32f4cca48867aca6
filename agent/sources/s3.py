"""`s3://bucket`, `s3://bucket/prefix`, `s3://bucket/key`: a model in an object store.

The listing comes from boto3; the bytes are plain HTTPS from a signed link, asked for with the ETag
that was listed, so that no two versions of an object are ever put together. A prefix ends at a `/`:
`s3://b/a` is the object `a`, published under its own name, or everything below `a/`, and nothing of
`ab/`. Keys that end in `/` are how consoles draw directories, and are not files.

What a file is promised by is what the store says of the whole object: SHA-256, CRC64NVME, CRC32C
or CRC32, or else the MD5 that an ETag is where the object was put in one part and without a key of
the customer's. Of an object in parts without such a checksum nothing is promised.
"""

import asyncio
import functools
import hashlib
import os
import re
import threading
import time
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from agent.errors import AgentError, Reason
from agent.layout import is_one_line
from agent.model import (
    HEX_DIGITS,
    Algorithm,
    Digest,
    HttpLocator,
    Listing,
    Locator,
    ModelRef,
    RemoteFile,
)
from agent.sources.aws import CONNECTIONS, Settings, is_region, of_cache, of_process, s3_errors
from agent.sources.base import is_archive, pack, pin, selected
from agent.threads import looking

_URI = re.compile(
    r"(?P<scheme>[a-z0-9]+)://(?P<bucket>[A-Za-z0-9._-]{3,63})(?:/(?P<below>.*))?", re.DOTALL
)

_LISTING_SECONDS = 300.0
"""100,000 objects are a hundred pages, and as many questions for their checksums, 16 at a time."""
_LINK_SECONDS = 3600
_FRESH_SECONDS = 60.0
_SIZES = 2**63  # an API server refuses a status with more, and with it what is said of all models
_REMEMBERED = 50_000

_CHECKSUMS: tuple[tuple[str, Algorithm], ...] = (
    ("ChecksumSHA256", "sha256"),
    ("ChecksumCRC64NVME", "crc64nvme"),
    ("ChecksumCRC32C", "crc32c"),
    ("ChecksumCRC32", "crc32"),
)
_GOOGLES = "x-goog-hash"
_GOOGLES_CHECKSUMS: tuple[tuple[str, Algorithm], ...] = (("md5", "md5"), ("crc32c", "crc32c"))
_PLAIN = (None, "AES256")  # with a key of KMS, or of the customer, an ETag is no MD5
_MD5 = re.compile(r'"([0-9a-f]{32})"')


@dataclass(frozen=True, slots=True)
class _Address:
    """A parsed URI. `below` is a key or, with or without its slash, a prefix."""

    bucket: str
    below: str

    @property
    def prefix(self) -> str:
        return f"{self.below.rstrip('/')}/" if self.below else ""

    @property
    def key(self) -> str | None:
        """The object that it may name."""
        return None if not self.below or self.below.endswith("/") else self.below


class S3:
    """An object store, with the credentials and settings of one environment."""

    scheme = "s3"
    _asking: Mapping[str, str] = {"ChecksumMode": "ENABLED"}

    def __init__(
        self,
        environment: Mapping[str, str],
        authorities: str = "",
        *,
        listing_seconds: float = _LISTING_SECONDS,
    ) -> None:
        self._settings = Settings(environment, authorities)
        self._listing_seconds = listing_seconds
        self._lock = threading.Lock()
        self._clients: dict[str, Any] = {}
        self._regions: dict[str, str] = {}
        # An ETag is never of two contents: what was asked of one need not be asked again.
        self._known: dict[tuple[str, str, str], Digest | None] = {}

    def __repr__(self) -> str:
        return f"S3({self._settings.where!r})"

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, authorities: str = ""
    ) -> "S3":
        """With the variables of one cache, or (None) with those of this process. The same one for
        the same variables: it holds connections, and what it has learned of a bucket."""
        given = cls._given(environment)
        kept = frozenset(given.items())
        return _kept(cls, kept, authorities)  # type: ignore[arg-type] # a class can be hashed

    @classmethod
    def _given(cls, environment: Mapping[str, str] | None) -> dict[str, str]:
        return of_process(os.environ) if environment is None else of_cache(environment)

    def check(self, ref: ModelRef) -> None:
        _parse(ref.uri, self.scheme)

    def host(self, ref: ModelRef) -> str:
        return self._settings.where

    async def list(self, ref: ModelRef) -> Listing:
        address = _parse(ref.uri, self.scheme)
        try:
            async with asyncio.timeout(self._listing_seconds):
                found, packed = await looking(lambda: self._find(ref, address))
                revision = _revision(found)
                if packed:
                    pack(ref, revision, found[0])  # nor here is anything asked of an unsafe name
                    (archive,) = await self._promised(address, found)
                    return pack(ref, revision, archive)
                # Nothing is asked of an unsafe name.
                listing = pin(ref, revision, found, chosen=_is_named(address, found))
                return replace(listing, files=await self._promised(address, listing.files))
        except TimeoutError as error:
            raise AgentError(
                Reason.STALLED, f"{ref.uri}: {self._settings.where} did not finish in time"
            ) from error

    async def locate(self, listing: Listing, file: RemoteFile) -> Locator:
        return await looking(
            lambda: self._locate(_parse(listing.ref.uri, self.scheme), listing, file)
        )

    def _client(self, bucket: str) -> Any:
        """The client of the bucket's region: boto3 follows a listing there, but it signs links for
        the region that it was made for, and those are refused."""
        if bucket not in self._regions:
            self._learn(bucket)
        return self._of(self._regions.get(bucket, self._settings.region))

    def _of(self, region: str) -> Any:
        with self._lock:
            if region not in self._clients:
                self._clients[region] = self._settings.client(region)
            return self._clients[region]

    def _learn(self, bucket: str) -> None:
        from botocore.exceptions import ClientError

        try:
            answer = self._of(self._settings.region).head_bucket(Bucket=bucket)
        except ClientError as error:
            if error.operation_name != "HeadBucket":  # the credentials could not be had
                raise
            answer = error.response  # AWS says it even to who may not see the bucket
        about = answer["ResponseMetadata"]
        region = about["HTTPHeaders"].get("x-amz-bucket-region", "")
        if is_region(region):
            self._regions[bucket] = region
        elif about["HTTPStatusCode"] < 400 or self._settings.endpoint is not None:
            self._regions[bucket] = self._settings.region

    def _locate(self, address: _Address, listing: Listing, file: RemoteFile) -> Locator:
        with s3_errors(f"{self.scheme}://{address.bucket}", self._settings):
            client = self._client(address.bucket)
            key = file.origin or self._origin(client, address, listing, file)
            url = client.generate_presigned_url(
                "get_object",
                Params={"Bucket": address.bucket, "Key": key},
                ExpiresIn=_LINK_SECONDS,
            )
        return HttpLocator(
            url=url,
            # Not in the signature: a proxy or a gateway that touches the header would break it.
            headers={} if file.version is None else {"If-Match": file.version},
            fresh_until=time.monotonic() + _FRESH_SECONDS,
            verify=self._settings.verify,
        )

    def _origin(self, client: Any, address: _Address, listing: Listing, file: RemoteFile) -> str:
        """The key, where the listing was made from a manifest, which does not know it."""
        from botocore.exceptions import ClientError

        name = (address.key or "").rpartition("/")[2]
        alone = len(listing.files) == 1 or listing.archive is not None
        if alone and name == file.path:  # the object, or the one below it
            with suppress(ClientError):
                client.head_object(Bucket=address.bucket, Key=address.key)
                return address.key or ""
        return address.prefix + file.path

    # -- listing ---------------------------------------------------------------------------------

    def _find(self, ref: ModelRef, address: _Address) -> tuple[Sequence[RemoteFile], bool]:
        """The selected files, sorted, with their versions and without their digests; or the one
        archive there is, and True."""
        with s3_errors(ref.uri, self._settings):
            client = self._client(address.bucket)
            found = [_object(entry) for entry in self._entries(client, ref, address)]
            if sum(file.size for file in found) >= _SIZES:
                raise ValueError("it lists more bytes than there can be")
        if is_archive([file.path for file in found]):
            return found, True
        single = _is_named(address, found)
        chosen = [file for file in found if single or selected(file.path, ref)]
        return sorted(chosen, key=lambda file: file.path.encode(errors="surrogatepass")), False

    def _entries(
        self, client: Any, ref: ModelRef, address: _Address
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What the URI means: published name, and what the store says of the object."""
        from botocore.exceptions import ClientError

        refusal = None
        if address.key is not None:
            try:
                head = client.head_object(Bucket=address.bucket, Key=address.key)
            except ClientError as error:
                # The answer to a HEAD has no words. The listing will say what is wrong; without
                # the right to list, the object must be there.
                refusal = error
            else:
                entry = {"Key": address.key, "Size": head["ContentLength"], "ETag": head["ETag"]}
                yield address.key.rpartition("/")[2], entry
                return
        end = time.monotonic() + self._listing_seconds
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=address.bucket, Prefix=address.prefix
        )
        empty = True
        for page in pages:
            if time.monotonic() > end:  # nobody waits any more; a listing may have no end
                raise AgentError(Reason.STALLED, f"{ref.uri}: the listing has no end")
            if "IsTruncated" not in page:  # any other XML looks like an empty one
                raise ValueError("it sends no listing")
            for entry in page.get("Contents", ()):
                empty, key = False, entry["Key"]
                if not key.startswith(address.prefix):
                    raise ValueError(f"it lists {key!r:.80} below {address.prefix!r:.80}")
                if not key.endswith("/"):
                    yield key.removeprefix(address.prefix), entry
        if empty and refusal is not None and _status(refusal) != 404:
            raise refusal

    async def _promised(
        self, address: _Address, files: Sequence[RemoteFile]
    ) -> tuple[RemoteFile, ...]:
        """The same, with what the store promises of each: one more request for each new one."""
        limit = asyncio.Semaphore(CONNECTIONS)

        async def one(file: RemoteFile) -> RemoteFile:
            if file.size == 0:  # nothing that could be wrong
                return file
            known = (address.bucket, file.origin, file.version or "")
            if known not in self._known:
                async with limit:
                    digest = await looking(lambda: self._digest(address, file))
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[known] = digest
            return replace(file, digest=self._known[known])

        tasks = [asyncio.ensure_future(one(file)) for file in files]
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _digest(self, address: _Address, file: RemoteFile) -> Digest | None:
        what = f"{self.scheme}://{address.bucket}/{file.origin}"
        with s3_errors(what if is_one_line(what) else ascii(what), self._settings):
            head = self._client(address.bucket).head_object(
                Bucket=address.bucket, Key=file.origin, **self._asking
            )
            if (head["ETag"], head["ContentLength"]) != (file.version, file.size):
                raise AgentError(Reason.SOURCE_CHANGED, f"{what[:200]!a} changed while listed")
            return _promise(head, address.bucket)


@functools.lru_cache(maxsize=16)
def _kept(made: type[S3], given: frozenset[tuple[str, str]], authorities: str) -> S3:
    return made(dict(given), authorities)


def _parse(uri: str, scheme: str) -> _Address:
    match = _URI.fullmatch(uri)
    if match is None or match["scheme"] != scheme or not is_one_line(uri):
        form = f"{scheme}://bucket[/prefix or key]"
        raise AgentError(Reason.INVALID_SPEC, f"{uri[:200]!a} must be {form}")
    # As KServe: no key begins with a slash.
    return _Address(match["bucket"], (match["below"] or "").lstrip("/"))


def _is_named(address: _Address, files: Iterable[RemoteFile]) -> bool:
    """Whether the URI names this one object: then patterns choose nothing, as in KServe."""
    return any(file.origin == address.key for file in files)


def _revision(files: Iterable[RemoteFile]) -> str:
    """The same for the same content."""
    pinned = "".join(f"{file.path}\0{file.size}\0{file.version}\0" for file in files)
    return hashlib.sha256(pinned.encode(errors="surrogatepass")).hexdigest()[:40]


def _object(found: tuple[str, Mapping[str, Any]]) -> RemoteFile:
    path, entry = found
    size, etag = entry["Size"], entry.get("ETag")
    if type(size) is not int or not 0 <= size < _SIZES:
        raise ValueError(f"it lists the size {size!r:.40} for {path!a:.80}")
    if not etag or not (etag.isascii() and etag.isprintable() and len(etag) <= 200):
        raise ValueError(f"it lists no ETag for {path!a:.80}, which could not be pinned")
    if not etag.endswith('"'):  # rclone lists it bare, and answers a HEAD with the quotes
        etag = f'"{etag}"'
    return RemoteFile(path=path, size=size, origin=entry["Key"], version=etag)


def _promise(head: Mapping[str, Any], bucket: str) -> Digest | None:
    """What is known of the whole object. A checksum of checksums of its parts is none."""
    kind, in_parts = head.get("ChecksumType"), "-" in head["ETag"]
    for field, algorithm in _CHECKSUMS:
        value = head.get(field)
        # Some stores do not say which kind it is; CRC64NVME is of the whole object always.
        whole = kind == "FULL_OBJECT" or algorithm == "crc64nvme"
        if value and (whole or (kind is None and not in_parts and "-" not in value)):
            digits = b64decode(value, validate=True).hex()
            if len(digits) != HEX_DIGITS[algorithm]:
                raise ValueError(f"{value!a:.100} is no {algorithm}")
            return Digest(algorithm, digits)
    if (said := _googles(head)) is not None:
        return said
    md5 = _MD5.fullmatch(head["ETag"])
    theirs = "SSECustomerAlgorithm" in head or head.get("ServerSideEncryption") not in _PLAIN
    if md5 is None or theirs or bucket.endswith("--x-s3"):
        return None
    return Digest("md5", md5[1])


def _googles(head: Mapping[str, Any]) -> Digest | None:
    """What Google Cloud Storage says of any object: `crc32c=..,md5=..`, of a composed one the first
    alone."""
    headers = head.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    said = dict(part.strip().partition("=")[::2] for part in headers.get(_GOOGLES, "").split(","))
    for name, algorithm in _GOOGLES_CHECKSUMS:
        if name in said:
            digits = b64decode(said[name], validate=True).hex()
            if len(digits) != HEX_DIGITS[algorithm]:
                raise ValueError(f"{said[name]!a:.100} is no {algorithm}")
            return Digest(algorithm, digits)
    return None


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
