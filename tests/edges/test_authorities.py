"""What TLS trusts for one model: put together in a private file, found again by its content."""

import os
import ssl
import stat
from pathlib import Path

import pytest

from agent.authorities import Authorities
from agent.errors import AgentError, Reason
from tests.fakes.wire import Certificates, make_certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def bundle(certificates: Certificates) -> str:
    return certificates.authority.read_text()


def _count(path: str | Path) -> int:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=str(path))
    return len(context.get_ca_certs())


def test_it_is_private_and_holds_the_machines_own_beside_it(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "others").mkdir()
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "others"))
    machine = make_certificates(tmp_path / "others").authority
    monkeypatch.setenv("SSL_CERT_FILE", str(machine))
    path = Path(Authorities(tmp_path / "state").file(bundle))
    assert _count(path) == 2
    assert machine.read_text().strip() in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_directory_of_the_machine_counts_as_openssl_counts_it(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "others").mkdir()
    machine = make_certificates(tmp_path / "others").authority
    (tmp_path / "others/0a1b2c3d.0").symlink_to(machine)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "others"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "absent"))
    assert _count(Authorities(tmp_path / "state").file(bundle)) == 2


def test_only_certificates_are_written_down(tmp_path: Path, bundle: str) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nc2VzYW1l\n-----END PRIVATE KEY-----\n"
    path = Path(Authorities(tmp_path / "state").file(f"# Name: \xe9\n{key}{bundle}"))
    assert "PRIVATE" not in path.read_text()
    assert "c2VzYW1l" not in path.read_text()


def test_the_same_bundle_is_the_same_file_and_one_that_was_spoilt_is_written_again(
    tmp_path: Path, bundle: str
) -> None:
    authorities = Authorities(tmp_path / "state")
    path = Path(authorities.file(bundle))
    before = path.read_bytes()
    inode = path.stat().st_ino
    assert authorities.file(bundle) == str(path)
    assert path.stat().st_ino == inode
    path.write_bytes(b"")  # as a power cut may leave it
    assert authorities.file(bundle) == str(path)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_the_oldest_of_many_goes_and_not_the_one_in_use(
    tmp_path: Path, bundle: str, certificates: Certificates
) -> None:
    """A bundle that is made anew every hour does not fill the disk."""
    authorities = Authorities(tmp_path / "state")
    used = Path(authorities.file(bundle))
    for age in range(30):
        other = used.with_name(f"{age:064}.pem")
        other.write_text("x")
        os.utime(other, (age, age))
    os.utime(used, (1, 1))
    assert authorities.file(bundle) == str(used)
    leaf = (certificates.authority.parent / "server.pem").read_text()
    newest = Path(authorities.file(bundle + leaf))
    assert newest != used
    assert {used, newest} < set(used.parent.iterdir())
    assert len(list(used.parent.iterdir())) == 16


@pytest.mark.parametrize(
    "text",
    ["", "PEM", "-----BEGIN CERTIFICATE-----\nc2VzYW1l\n-----END CERTIFICATE-----"],
)
def test_a_bundle_without_a_certificate_is_refused_unsaid(tmp_path: Path, text: str) -> None:
    with pytest.raises(AgentError) as caught:
        Authorities(tmp_path / "state").file(text)
    assert caught.value.reason is Reason.UNAUTHORIZED
    assert "c2VzYW1l" not in repr(caught.value)
    assert not (tmp_path / "state").exists()


def test_a_disk_that_is_full_is_the_disks_reason(tmp_path: Path, bundle: str) -> None:
    (tmp_path / "state").write_text("no directory")
    with pytest.raises(AgentError) as caught:
        Authorities(tmp_path / "state").file(bundle)
    assert caught.value.reason is Reason.DISK_ERROR
