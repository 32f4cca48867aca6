"""AWS's token service, as moto has it: a role's credentials for a token of a ServiceAccount.

    with Store() as store, TokenService(store) as sts:
        environment = sts.environment(role, token_file)  # what EKS's webhook puts into a pod

What it hands out the store accepts from then on, as S3 does.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.fakes.s3 import Quiet, Store

_GIVEN = re.compile(rb"<AccessKeyId>([^<]+)</AccessKeyId>\s*<SecretAccessKey>([^<]+)<")


class TokenService:
    """A context manager. `asked` are the parameters of each request."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, request_handler=Quiet)
        self.asked: list[dict[str, str]] = []

    def __enter__(self) -> TokenService:
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
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, role: str, token_file: str) -> dict[str, str]:
        store = {k: v for k, v in self._store.environment.items() if "ACCESS_KEY" not in k}
        return store | {
            "AWS_ROLE_ARN": role,
            "AWS_WEB_IDENTITY_TOKEN_FILE": token_file,
            "AWS_ENDPOINT_URL_STS": f"http://127.0.0.1:{self._server.server_port}",
        }

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        self.asked.append({k: v[0] for k, v in parse_qs(body.decode()).items()})
        environ["wsgi.input"] = io.BytesIO(body)
        answer = b"".join(self._moto(environ, start))
        for key, secret in _GIVEN.findall(answer):
            self._store.secrets[key.decode()] = secret.decode()
        return [answer]
