"""An S3 server: moto, behind a gate that is as strict as AWS where moto is not.

moto by itself accepts any signed link (expired, tampered with, of nobody's key). The gate checks
every signature, in the header and in the link, with botocore's own signer; it keeps the clock; and
it can be told to answer otherwise.

    with Store() as store:
        store.put("bucket", {"a/config.json": b"{}"})
        source = S3(store.environment)
"""

from __future__ import annotations

import fnmatch
import hmac
import io
import logging
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit
from xml.sax.saxutils import escape

import boto3
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from moto.backends import get_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

__all__ = ["KEY", "REGION", "SECRET", "Answer", "Quiet", "Seen", "Store"]

KEY = "AKIAFAKEFAKEFAKE1234"
SECRET = "s3sesame/very+secret/0123456789abcdefghi"
REGION = "eu-central-1"


@dataclass(frozen=True)
class Answer:
    """What the gate says instead of moto: an error document, or (cut) the start of the truth."""

    status: int = 200
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut: int | None = None
    then: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    query: str
    headers: Mapping[str, str]


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # kept connections

    def send_response(self, code: int, message: str | None = None) -> None:
        self.send_response_only(code, message)  # werkzeug sends a Date if there is none

    def log(self, type: str, message: str, *args: Any) -> None:
        pass

    def connection_dropped(self, error: BaseException, environ: Any = None) -> None:
        pass


class Store:
    """Also a context manager. `skew` is how far the server's clock is ahead of ours."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._tls = tls
        self.public = False
        self.secrets = {KEY: SECRET}
        self.region = REGION
        self.skew = timedelta()
        self.denied: set[str] = set()  # operations: "LIST", "HEAD", "GET"
        self.seen: list[Seen] = []
        self._faults: list[tuple[str, str, Answer, int | None]] = []
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None
        self.port = 0

    def __enter__(self) -> Store:
        for account in get_backend("s3").values():
            for backend in account.values():
                backend.reset()
        self._server = make_server(
            "127.0.0.1", 0, self._gate, threaded=True, request_handler=Quiet, ssl_context=self._tls
        )
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.daemon = True
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    # -- for a test ------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        return f"https://localhost:{self.port}" if self._tls else f"http://127.0.0.1:{self.port}"

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
        """A plain boto3 client: how people put things here, and the oracle of what is here."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(s3={"addressing_style": "path"}),
        )

    def put(self, bucket: str, files: Mapping[str, bytes]) -> None:
        """Make exactly these the bucket's objects, whatever their keys; without a checksum."""
        backend = get_backend("s3")["123456789012"]["aws"]
        if bucket in backend.buckets:
            backend.buckets[bucket].keys.clear()
        else:
            backend.create_bucket(bucket, REGION)
        for key, data in files.items():
            backend.put_object(bucket, key, data)

    def fault(self, method: str, pattern: str, answer: Answer, *, times: int | None = None) -> None:
        """Answer so to requests of this kind (LIST, HEAD, GET) whose path matches."""
        with self._lock:
            self._faults.append((method, pattern, answer, times))

    def mend(self) -> None:
        with self._lock:
            self._faults.clear()

    def of(self, method: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == method]

    # -- the gate --------------------------------------------------------------------------------

    def _gate(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        raw = environ.get("REQUEST_URI") or environ["RAW_URI"]
        parts = urlsplit(raw)
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").lower(): value
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        method = environ["REQUEST_METHOD"]
        if method == "GET" and "list-type=2" in parts.query:
            method = "LIST"
        with self._lock:
            self.seen.append(Seen(method, parts.path, parts.query, headers))
            fault = self._told(method, parts.path)
        if fault is not None and fault.cut is None:
            fault.then()
            return _say(start, method, fault)
        if not (self.public and "authorization" not in headers and not parts.query.count("X-Amz-")):
            refused = self._refuse(environ["REQUEST_METHOD"], parts.path, parts.query, headers)
            if refused is not None:
                return _say(start, method, refused)
        if method in self.denied:
            return _say(start, method, Answer(403, "AccessDenied"))
        environ.pop("HTTP_AUTHORIZATION", None)
        environ["HTTP_AUTHORIZATION"] = _moto_authorization()
        if "X-Amz-Signature" in parts.query:  # moto shall not think about it
            left = [pair for pair in parse_qsl(parts.query) if not pair[0].startswith("X-Amz-")]
            environ["QUERY_STRING"] = "&".join(f"{quote(k)}={quote(v)}" for k, v in left)
            bare = parts.path + (f"?{environ['QUERY_STRING']}" if left else "")
            environ["REQUEST_URI"] = environ["RAW_URI"] = bare

        def begin(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            found = {name.lower(): value for name, value in headers}
            if "x-amz-bucket-region" in found:
                found["x-amz-bucket-region"] = self.region
            return start(status, list(found.items()), *more)

        answer: Iterable[bytes] = self._moto(environ, begin)
        if fault is not None:
            return _cut(answer, fault)
        return answer

    def _told(self, method: str, path: str) -> Answer | None:
        for at, (of, pattern, answer, times) in enumerate(self._faults):
            if of == method and fnmatch.fnmatchcase(path, pattern):
                if times is not None:
                    if times == 1:
                        del self._faults[at]
                    else:
                        self._faults[at] = (of, pattern, answer, times - 1)
                return answer
        return None

    def _refuse(
        self, method: str, path: str, query: str, headers: Mapping[str, str]
    ) -> Answer | None:
        asked = dict(parse_qsl(query))
        now = datetime.now(UTC) + self.skew
        if "X-Amz-Signature" in asked:
            credential, signed = asked["X-Amz-Credential"], asked["X-Amz-SignedHeaders"]
            given, date = asked.pop("X-Amz-Signature"), asked["X-Amz-Date"]
            bare = "&".join(p for p in query.split("&") if not p.startswith("X-Amz-Signature="))
        elif headers.get("authorization", "").startswith("AWS4-HMAC-SHA256 "):
            fields = dict(
                part.strip().split("=", 1)
                for part in headers["authorization"].partition(" ")[2].split(",")
            )
            credential, signed = fields["Credential"], fields["SignedHeaders"]
            given, date, bare = fields["Signature"], headers["x-amz-date"], query
        else:
            return Answer(403, "AccessDenied")
        key, _, region, *_ = credential.split("/")
        if key not in self.secrets:
            return Answer(403, "InvalidAccessKeyId")
        if region != self.region:
            return Answer(400, "AuthorizationHeaderMalformed", {"x-amz-bucket-region": self.region})
        at = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if "X-Amz-Expires" in asked:
            if (
                not timedelta(minutes=-15)
                < now - at
                < timedelta(seconds=int(asked["X-Amz-Expires"]))
            ):
                return Answer(403, "AccessDenied")
        elif abs(now - at) > timedelta(minutes=15):
            said = now.strftime("%a, %d %b %Y %H:%M:%S GMT")
            return Answer(403, "RequestTimeTooSkewed", {"Date": said})
        expected = self._sign(method, path, bare, headers, signed, key, region, date)
        if not hmac.compare_digest(expected, given):
            return Answer(403, "SignatureDoesNotMatch")
        return None

    def _sign(
        self,
        method: str,
        path: str,
        query: str,
        headers: Mapping[str, str],
        signed: str,
        key: str,
        region: str,
        date: str,
    ) -> str:
        """botocore's signature of what was received."""
        kind = S3SigV4QueryAuth if "X-Amz-Credential" in query else S3SigV4Auth
        signer = kind(Credentials(key, self.secrets[key]), "s3", region)
        request = AWSRequest(method, f"http://{headers['host']}{path}" + (query and f"?{query}"))
        for name in signed.split(";"):
            request.headers[name] = headers.get(name, "")
        request.context["timestamp"] = date
        request.context["payload_signing_enabled"] = False
        canonical = signer.canonical_request(request)
        return str(signer.signature(signer.string_to_sign(request, canonical), request))


def _moto_authorization() -> str:
    return (
        "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/s3/aws4_request, "
        "SignedHeaders=host, Signature=0"
    )


def _say(start: Any, method: str, answer: Answer) -> Iterable[bytes]:
    body = answer.body
    if body is None:
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{escape(answer.code)}</Code><Message>told</Message>"
            f"<RequestId>1</RequestId></Error>"
        ).encode()
    if method == "HEAD":
        body = b""
    headers = {"Content-Type": "application/xml", "Content-Length": str(len(body))}
    start(f"{answer.status} Told", list({**headers, **answer.headers}.items()))
    return io.BytesIO(body) if body else []


def _cut(answer: Iterable[bytes], fault: Answer) -> Iterable[bytes]:
    left = fault.cut or 0
    for chunk in answer:
        yield chunk[:left]
        left -= len(chunk[:left])
        if left == 0:
            break
    fault.then()
    raise ConnectionResetError("told")
