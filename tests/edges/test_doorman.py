"""Who is let in at a port: by which addresses, and how many at once."""

import socket
from contextlib import closing

import pytest

from agent.doorman import Doorman


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="NOT TESTED: this machine has no ::1")


def port_of(doorman: Doorman) -> int:
    return int(doorman.getsockname()[1])


def reaches(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except ConnectionRefusedError:
        return False


@needs_ipv6
def test_without_a_host_it_is_reached_by_ipv4_and_by_ipv6() -> None:
    """A pod of a cluster with IPv6 alone has no other address."""
    with closing(Doorman("", 0, most=10)) as doorman:
        assert reaches("127.0.0.1", port_of(doorman))
        assert reaches("::1", port_of(doorman))


def test_on_a_machine_without_ipv6_it_is_reached_by_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with closing(Doorman("", 0, most=10)) as doorman:
        assert doorman.family == socket.AF_INET
        assert reaches("127.0.0.1", port_of(doorman))


@needs_ipv6
@pytest.mark.parametrize(("host", "other"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
def test_a_host_that_is_named_is_the_only_one(host: str, other: str) -> None:
    with closing(Doorman(host, 0, most=10)) as doorman:
        assert reaches(host, port_of(doorman))
        assert not reaches(other, port_of(doorman))
