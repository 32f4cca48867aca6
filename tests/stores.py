"""Real object stores as processes: SeaweedFS and versitygw to agree with, rclone to survive.

    with seaweedfs(tmp_path) as store:
        store.put("models", {"tiny/config.json": b"{}"})
        source = S3(store.environment)

They differ from AWS and from each other: one lists out of byte order, one says no checksum type,
one ignores `If-Match` and answers a range with a 200.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

KEY = "AKIAREALREALREAL1234"
SECRET = "real/sesame+0123456789abcdefghijklmnop"
REGION = "us-east-1"
VERSITYGW = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"

_START_SECONDS = 60.0
_BEAR = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})


@dataclass(frozen=True)
class RealStore:
    """A running one. All of its buckets are a test's to fill."""

    name: str
    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """As a Job of KServe's would be given it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "S3_MAX_ATTEMPTS": "1",
        }

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def put(self, bucket: str, files: Mapping[str, bytes], **options: Any) -> None:
        """Make exactly these the bucket's objects."""
        client = self.client()
        try:
            client.create_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in _BEAR:
                raise
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        for key in [entry["Key"] for page in pages for entry in page.get("Contents", ())]:
            if key not in files:
                client.delete_object(Bucket=bucket, Key=key)
        for key, data in files.items():
            client.put_object(Bucket=bucket, Key=key, Body=data, **options)


def _ports(number: int) -> list[int]:
    """Free ones below 22,768: SeaweedFS has its gRPC ports 10,000 above them. At random: another
    process of the tests may be choosing, too."""
    candidates = random.SystemRandom().sample(range(12_000, 22_000), 200)
    with ExitStack() as stack:
        found: list[int] = []
        for port in candidates:
            try:
                for also in (port, port + 10_000):
                    stack.enter_context(socket.create_server(("127.0.0.1", also)))
            except OSError:
                continue
            found.append(port)
            if len(found) == number:
                return found
    raise RuntimeError("no free ports")


@contextmanager
def _running(
    name: str, command: list[str], endpoint: str, directory: Path, **environment: str
) -> Iterator[RealStore]:
    """Yield it when it lists its buckets. Killed, not asked: weed takes ten seconds to end."""
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ["PATH"], "HOME": str(directory), **environment},
        )
        try:
            store = RealStore(name, endpoint)
            _until_it_answers(store, process, log)
            yield store
        finally:
            process.kill()
            process.wait()


def _until_it_answers(store: RealStore, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        with suppress(BotoCoreError, ClientError):
            store.client().list_buckets()
            return
        if process.poll() is not None or time.monotonic() > end:
            said = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{store.name} did not come up: {said}")
        time.sleep(0.1)


def _tool(name: str) -> str:
    """From our own environment, where the lock file puts it."""
    beside = Path(sys.executable).with_name(name)
    if found := str(beside) if beside.exists() else shutil.which(name):
        return found
    raise RuntimeError(f"{name} is missing: make the environment anew (make clean test)")


@contextmanager
def seaweedfs(directory: Path) -> Iterator[RealStore]:
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    identities = directory / "identities.json"
    identities.write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3 = _ports(4)
    command = [
        *(_tool("weed"), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={directory}"),
        "-master.telemetry=false",  # its default reports to the vendor
        *(f"-master.port={master}", "-master.volumeSizeLimitMB=64"),
        *(f"-volume.port={volume}", "-volume.max=20"),
        *("-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}"),
        *(f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    with _running("SeaweedFS", command, f"http://127.0.0.1:{s3}", directory) as store:
        yield store


@contextmanager
def versitygw(directory: Path) -> Iterator[RealStore]:
    """Skipped, loudly, where there is no Go to build it with."""
    data = directory / "data"
    data.mkdir()
    (port,) = _ports(1)
    command = [_built(), "--port", f"127.0.0.1:{port}", "posix", str(data)]
    secrets = {"ROOT_ACCESS_KEY": KEY, "ROOT_SECRET_KEY": SECRET}
    with _running("versitygw", command, f"http://127.0.0.1:{port}", directory, **secrets) as store:
        yield store


def _built() -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    binary = cache / "localmodel-agent" / "stores" / VERSITYGW.rpartition("@")[2] / "versitygw"
    if not binary.exists():
        if shutil.which("go") is None:
            pytest.skip("versitygw is not tested: it is built with Go, and go is missing")
        binary.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["go", "install", VERSITYGW],
            env={**os.environ, "GOBIN": str(binary.parent), "CGO_ENABLED": "0"},
            check=True,
        )
    return str(binary)


@contextmanager
def rclone(directory: Path) -> Iterator[RealStore]:
    data = directory / "data"
    data.mkdir()
    (port,) = _ports(1)
    command = [
        *(_tool("rclone"), "serve", "s3", str(data), "--addr", f"127.0.0.1:{port}"),
        *("--auth-key", f"{KEY},{SECRET}", "--config", "/dev/null"),
    ]
    with _running("rclone", command, f"http://127.0.0.1:{port}", directory) as store:
        yield store


AGREEING: Mapping[str, Callable[[Path], Any]] = {"seaweedfs": seaweedfs, "versitygw": versitygw}
"""Those that keep the rules that we rely on."""
