"""Whoever reaches the hook's port can say anything: it goes on answering, in bounded memory.

In a cluster that is every pod, where no network policy says otherwise.
"""

import asyncio
import gzip
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from agent.server import MOST_CONNECTIONS
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import Controller, controllers
from tests.hook.pods import golden
from tests.machine import until

MIB = 2**20
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TLS.check_hostname, TLS.verify_mode = False, ssl.CERT_NONE
LIMIT = 384 * MIB
"""What a controller may take at its peak: the shipped Deployment kills it at 512 MiB."""
GROWTH = 128 * MIB
"""What one of these may add to the memory of a controller."""


@pytest.fixture(scope="module")
def plane(module_control_plane: Callable[..., ControlPlane]) -> ControlPlane:
    made: ControlPlane = module_control_plane()
    return made


@pytest.fixture(scope="module")
def running(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    home: Path = tmp_path_factory.mktemp("attack") / "controllers"
    with controllers(plane, home) as replicas:
        controller = replicas.start()
        replicas.called(controller)
        for _ in range(50):  # what it takes at rest is what it takes after some work
            assert asked(controller, review()) == 200
        yield controller


@pytest.fixture
def controller(running: Controller) -> Iterator[Controller]:
    """After the test it answers still, and is far from its limit."""
    yield running
    assert asked(running, review()) == 200
    assert rss(running) < LIMIT


def rss(controller: Controller) -> int:
    return int(psutil.Process(controller.pid).memory_info().rss)


def review(pod: dict[str, Any] | None = None) -> bytes:
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    made = pod or golden("uncached-hf")
    request = {"uid": "u", "kind": kind, "operation": "CREATE", "object": made, "namespace": "x"}
    body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
    return json.dumps(body).encode()


def connected(controller: Controller) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", controller.hook_port), 30)
    return TLS.wrap_socket(raw)


def head(length: int | None, *lines: str, version: str = "1.1") -> bytes:
    found = [f"POST /mutate HTTP/{version}", "Host: hook", "Connection: close", *lines]
    if length is not None:
        found.append(f"Content-Length: {length}")
    return "\r\n".join([*found, "", ""]).encode()


def answered(connection: socket.socket) -> int:
    """The status, 0 where it was hung up on."""
    with suppress(OSError):
        line = connection.recv(12)
        return int(line[9:12] or 0)
    return 0


def asked(controller: Controller, body: bytes, *lines: str, version: str = "1.1") -> int:
    with connected(controller) as connection:
        with suppress(OSError):  # it may refuse before it has read all
            connection.sendall(head(len(body), *lines, version=version) + body)
        return answered(connection)


# -- bodies --------------------------------------------------------------------------------------


def test_a_body_that_is_too_large(controller: Controller) -> None:
    assert asked(controller, b"[" * (9 * MIB)) == 413


def test_a_body_that_is_announced_as_huge(controller: Controller) -> None:
    with connected(controller) as connection:
        connection.sendall(head(10**12))
        with suppress(OSError):
            for _ in range(64):
                connection.sendall(b"[" * MIB)
        assert answered(connection) in (413, 0)


def test_a_body_without_an_end(controller: Controller) -> None:
    with connected(controller) as connection:
        connection.sendall(head(None, "Transfer-Encoding: chunked"))
        with suppress(OSError):
            for _ in range(64):
                connection.sendall(b"100000\r\n" + b"[" * MIB + b"\r\n")
        assert answered(connection) in (413, 0)


def test_a_body_that_grows_when_it_is_unpacked(controller: Controller) -> None:
    bomb = gzip.compress(b"[" * (256 * MIB), 9)
    with Peak(controller) as peak:
        assert asked(controller, bomb, "Content-Encoding: gzip") in (400, 413, 415)
    assert peak.grown < GROWTH


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"request":' * 100_000,
        b'{"request": {"uid": "x", "object": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_002,
        b"",
        b"null",
        b"\xff\xfe\x00",
        b'{"request": {"uid": ["x"]}}',
        b"1" * 100_000,
        b'{"request": {"uid": "x", "n": ' + b"9" * 1_000_000 + b"}}",
    ],
    ids=range(9),
)
def test_what_is_no_review(controller: Controller, body: bytes) -> None:
    assert asked(controller, body) == 400


def test_a_pod_nested_too_deep_is_no_pod_of_ours(controller: Controller) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"a": [deep]}
    pod = golden("uncached-hf")
    pod["spec"]["affinity"] = deep
    assert asked(controller, review(pod)) == 200


def test_a_large_pod_is_answered_in_time(controller: Controller) -> None:
    pod = golden("uncached-hf")
    pod["spec"]["containers"] *= 1500
    begun = time.monotonic()
    assert asked(controller, review(pod)) == 200
    assert time.monotonic() - begun < 3


# -- HTTP, or not --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "a" * 4000]
)
def test_whatever_it_calls_itself_the_body_counts(controller: Controller, kind: str) -> None:
    assert asked(controller, review(), f"Content-Type: {kind}") == 200
    assert asked(controller, b"--x\r\n\r\n", "Content-Type: multipart/form-data; boundary=x") == 400


def test_old_http_is_answered(controller: Controller) -> None:
    assert asked(controller, review(), version="1.0") == 200


def test_no_tls(controller: Controller) -> None:
    with socket.create_connection(("127.0.0.1", controller.hook_port), 30) as connection:
        connection.sendall(head(2) + b"{}")
        assert b"HTTP" not in connection.recv(100)


@pytest.mark.parametrize(
    "said",
    [
        b"\x00" * 70_000,
        b"POST /mutate HTTP/1.1\r\n" + b"x: y\r\n" * 20_000,
        b"POST /mutate HTTP/1.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /" + b"y" * 100_000 + b" HTTP/1.1\r\n\r\n",
        head(1, "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        b"POST /mutate HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /../../etc/passwd HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=range(9),
)
def test_what_is_no_request_for_it(controller: Controller, said: bytes) -> None:
    with connected(controller) as connection:
        with suppress(OSError):
            connection.sendall(said)
        assert answered(connection) in (0, 400, 404, 405)


# -- many ----------------------------------------------------------------------------------------


class Peak:
    """How far a process grew meanwhile."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self.grown = self.most = 0

    def __enter__(self) -> "Peak":
        Path(f"/proc/{self._controller.pid}/clear_refs").write_text("5")
        self._before = rss(self._controller)
        return self

    def __exit__(self, *_: object) -> None:
        status = Path(f"/proc/{self._controller.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        self.most = int(line.split()[1]) * 1024
        self.grown = self.most - self._before


async def test_thousands_at_once(controller: Controller) -> None:
    body, statuses = review(), []
    url = f"https://127.0.0.1:{controller.hook_port}/mutate"

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=300)) as session:

        async def one() -> None:
            async with session.post(url, data=body, ssl=False) as answer:
                statuses.append(answer.status)

        with Peak(controller) as peak:
            await asyncio.gather(*(one() for _ in range(3000)))
        await asyncio.sleep(0.2)  # transports close in a turn of the loop of their own
    assert statuses == [200] * 3000
    assert peak.grown < 2 * GROWTH


@pytest.mark.parametrize("said", [b"", b"POST /mutate HTTP/1.1\r\nx: ", head(1000) + b"{"])
def test_many_who_say_nothing(controller: Controller, said: bytes) -> None:
    with ExitStack() as opened, Peak(controller) as peak:
        for _ in range(MOST_CONNECTIONS + 100):
            connection = opened.enter_context(connected(controller))
            with suppress(OSError):
                connection.sendall(said)
        assert asked(controller, review()) == 200
        until(lambda: connections(controller) <= MOST_CONNECTIONS)
    assert peak.grown < GROWTH


def connections(controller: Controller) -> int:
    found = psutil.Process(controller.pid).net_connections()
    return sum(
        one.laddr.port == controller.hook_port and one.status == psutil.CONN_ESTABLISHED
        for one in found
    )


def test_many_large_ones_at_once(controller: Controller) -> None:
    body = b"[" * (7 * MIB)
    with ThreadPoolExecutor(50) as threads, Peak(controller) as peak:
        statuses = set(threads.map(lambda _: asked(controller, body), range(100)))
    assert statuses <= {400, 408, 0}
    assert 400 in statuses
    assert peak.most < LIMIT


def test_who_is_slow_holds_up_nobody(controller: Controller) -> None:
    """The small reviews of others go past; and nobody is waited for very long."""
    with ExitStack() as opened:
        slow = [opened.enter_context(connected(controller)) for _ in range(8)]
        for one in slow:
            one.sendall(head(MIB) + b"[" * (MIB // 2))
        begun = time.monotonic()
        assert asked(controller, review()) == 200
        assert time.monotonic() - begun < 2
        assert [answered(one) for one in slow] == [408] * 8


def test_a_flood_does_not_cut_off_another_address(controller: Controller) -> None:
    """An API server keeps its connections for long: they are the oldest."""
    place = ("127.0.0.1", controller.hook_port)
    raw = socket.create_connection(place, 30, source_address=("127.0.0.2", 0))
    body = review()
    with TLS.wrap_socket(raw) as theirs, ExitStack() as opened:
        for _ in range(MOST_CONNECTIONS + 50):
            opened.enter_context(socket.create_connection(place, 30))
        until(lambda: connections(controller) <= MOST_CONNECTIONS)
        theirs.sendall(head(len(body)) + body)
        assert answered(theirs) == 200


def test_many_who_do_not_even_speak_tls(controller: Controller) -> None:
    with ExitStack() as opened, Peak(controller) as peak:
        for _ in range(1500):
            opened.enter_context(socket.create_connection(("127.0.0.1", controller.hook_port), 30))
        assert asked(controller, review()) == 200
    assert peak.grown < GROWTH
