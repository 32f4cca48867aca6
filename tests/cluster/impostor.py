"""Who answers in the hook's place, by TLS, as badly as a test wants."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from agent.certificates import Held, renewed
from agent.tls import ServerTLS

Review = dict[str, Any]


def certified(*names: str, days_ago: int = 0) -> Held:
    """An authority and a certificate for these names, made so many days ago: it lasts 90."""
    now = time.time() - days_ago * 24 * 3600
    return renewed(Held(), names=names or ("127.0.0.1",), now=now, settled=0.0)


def review_of(review: Review, **response: Any) -> bytes:
    """An AdmissionReview that answers this one."""
    answer = {"uid": review["request"]["uid"], **response}
    return json.dumps(
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer}
    ).encode()


class Impostor:
    """`answer` makes status, content type and body of a review."""

    def __init__(self, held: Held, answer: Callable[[Review], tuple[int, str, bytes]]) -> None:
        self._answer = answer
        self.asked = 0
        impostor = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                impostor.asked += 1
                review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, kind, body = impostor._answer(review)
                with suppress(OSError):  # the API server did not wait for it
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # handshakes that fail are what it is for

            def finish_request(self, request: Any, client_address: Any) -> None:
                with tls.context.wrap_socket(request, server_side=True) as wrapped:
                    Handler(wrapped, client_address, self)

        tls = ServerTLS()
        tls.show(held.certificate, held.key)
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"https://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator["Impostor"]:
        thread = threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def closed_port() -> str:
    """Where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"https://127.0.0.1:{one.getsockname()[1]}"
