"""Settings: where each comes from, and what each refuses, by the name the user gave it."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import ControllerSettings, Settings, listen_address, read, unify_ca_variables
from agent.errors import AgentError, Reason
from agent.quantities import parse_size


def test_flags_win_over_the_environment_and_that_over_the_defaults(tmp_path: Path) -> None:
    environment = {"LOCALMODEL_CONNECTIONS": "3", "LOCALMODEL_MAX_FETCHES": "5"}
    found = read({"connections": "4", "root": str(tmp_path)}, environment, Settings)
    assert (found.connections, found.max_fetches) == (4, 5)
    assert found.marks(shared=False) == (95.0, 90.0)
    assert found.marks(shared=True) == (78.0, 72.0)
    assert found.state_directory == tmp_path / ".localmodel/state"
    assert read({"state": "/elsewhere"}, {}, Settings).state_directory == Path("/elsewhere")


def test_the_default_root_is_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert read({}, {}, Settings).root == Path("/somewhere/localmodel")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert read({}, {}, Settings).root == Path("/home/me/.cache/localmodel")


def test_paths_are_absolute_because_others_are_told_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = read({"root": "r", "state": "s", "desired": "d"}, {}, Settings)
    assert (found.root, found.state, found.desired) == (
        tmp_path / "r",
        tmp_path / "s",
        tmp_path / "d",
    )


@pytest.mark.parametrize(
    ("flags", "environment", "says"),
    [
        ({"connections": "many"}, {}, "--connections: "),
        ({}, {"LOCALMODEL_MAX_RATE": "fast"}, "LOCALMODEL_MAX_RATE: 'fast' is not a size"),
        ({"connections": "0"}, {}, "at least 1"),
        ({"high": "101"}, {}, "0 < low <= high <= 100"),
        ({"high": "nan"}, {}, "0 < low <= high <= 100"),
        ({"low": "0"}, {}, "0 < low <= high <= 100"),
        ({"high": "80", "low": "90"}, {}, "--low 90 and --high 80"),
        ({"stall_seconds": "nan"}, {}, "--stall-seconds"),
        ({"stall_seconds": "inf"}, {}, "--stall-seconds"),
        ({"stall_seconds": "0"}, {}, "--stall-seconds"),
        ({"max_rate": "0"}, {}, "--max-rate"),
        ({"root": ""}, {}, "--root is empty"),
        ({"listen": "localhost"}, {}, "--listen"),
        ({"listen": "localhost:99999"}, {}, "--listen"),
        ({"listen": "localhost:\u00b2"}, {}, "--listen"),
    ],
)
def test_nonsense_is_refused_by_its_name(
    flags: dict[str, str], environment: dict[str, str], says: str
) -> None:
    with pytest.raises(AgentError) as caught:
        read(flags, environment, Settings)
    assert caught.value.reason is Reason.INVALID_SPEC
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1048576),
        ("500Gi", 500 * 1024**3),
        ("1.5T", 1_500_000_000_000),
        ("1k", 1000),
        ("0.1Gi", 107374182),
        ("2MiB", 2 * 1024**2),
        (" 7 ", 7),
        ("123456789012345678", 123456789012345678),
    ],
)
def test_sizes_are_those_of_kubernetes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(alphabet="0123456789.kKMGTPiBeE+- \u0663"))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        (":9810", ("", 9810)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_listen_addresses(text: str, address: tuple[str, int]) -> None:
    assert listen_address(text) == address


def test_one_bundle_of_certificates_for_every_library() -> None:
    environment = {"REQUESTS_CA_BUNDLE": "/a"}
    unify_ca_variables(environment)
    assert environment["SSL_CERT_FILE"] == "/a"
    environment = {"CURL_CA_BUNDLE": "/a", "SSL_CERT_FILE": "/b"}
    unify_ca_variables(environment)
    assert environment["SSL_CERT_FILE"] == "/b"


def test_every_setting_says_what_it_is() -> None:
    for setting in Settings.__dataclass_fields__.values():
        assert setting.metadata["help"]


def test_a_controller_knows_kserves_images_and_is_told_of_others() -> None:
    found = read(
        {"mode": "kserve", "entrypoints": "mine=/bin/own --x, b=/b"}, {}, ControllerSettings
    )
    assert found.entrypoints["mine"] == ("/bin/own", "--x")
    assert found.entrypoints["b"] == ("/b",)
    for image in ("storage-initializer", "odh-kserve-storage-initializer-rhel9"):
        (command,) = found.entrypoints[image]
        assert command == "/storage-initializer/scripts/initializer-entrypoint"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({}, "--mode is missing"),
        ({"mode": "both"}, "'both' is not kserve or standalone"),
        ({"mode": "kserve", "listen": "443"}, "--listen '443' must be host:port"),
        ({"mode": "kserve", "health_listen": "80"}, "--health-listen '80' must be host:port"),
        ({"mode": "kserve", "entrypoints": "a/b=/x"}, "is not NAME=/path"),
        ({"mode": "kserve", "entrypoints": "a=x"}, "is not NAME=/path"),
        ({"mode": "kserve", "drain_seconds": "3600"}, "from 0 to 60"),
        ({"mode": "kserve", "listen": ":9810"}, "must be two ports"),
    ],
)
def test_what_a_controller_cannot_be(flags: dict[str, str], told: str) -> None:
    with pytest.raises(AgentError, match=re.escape(told)):
        read(flags, {}, ControllerSettings)
