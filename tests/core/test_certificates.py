"""What is due in the hook's certificates, and when. No clock runs here."""

import base64
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.certificates import (
    OVERLAP_SECONDS,
    Held,
    Settling,
    due_in,
    expires_at,
    from_secret,
    renewed,
)
from agent.errors import AgentError, Reason
from tests.core.rotation import DAY, NAMES, START, Cluster, Waiting, accepts

FIELDS = ("ca.crt", "ca.key", "tls.crt", "tls.key")
NEW = renewed(Held(), names=NAMES, now=START, settled=0.0)
OTHER = renewed(Held(), names=NAMES, now=START, settled=0.0)


def after(held: Held, days: float, *, settled: float = OVERLAP_SECONDS) -> Held:
    return renewed(held, names=NAMES, now=START + days * DAY, settled=settled)


def good(held: Held, now: float = START) -> bool:
    return all(accepts(held.bundle, held.certificate, name, now) for name in NAMES)


def joined() -> Held:
    """A new authority is in the bundle, and nothing is shown of it yet."""
    return after(NEW, 487, settled=0.0)


@cache
def lived() -> Held:
    """The first authority, with a certificate that is not due when the authority is."""
    return after(replace(NEW, certificate="", key=""), 480)


# -- the life of a certificate ------------------------------------------------------------------


def test_nothing_becomes_everything() -> None:
    assert len(NEW.authorities) == 1
    assert good(NEW)
    assert not accepts(NEW.bundle, NEW.certificate, "another.name", START)
    assert not accepts(OTHER.bundle, NEW.certificate, NAMES[0], START)


def test_where_nothing_is_due_it_is_the_same_object() -> None:
    assert after(NEW, 0) is NEW
    assert after(NEW, 59.9) is NEW


def test_what_is_shown_is_renewed_at_two_thirds_of_ninety_days() -> None:
    then = after(NEW, 60, settled=0.0)
    assert (then.authorities, then.authority_key) == (NEW.authorities, NEW.authority_key)
    assert then.certificate != NEW.certificate
    assert then.key != NEW.key
    assert expires_at(then.certificate) == START + 150 * DAY


def test_an_authority_at_two_thirds_of_two_years_gets_another_beside_it() -> None:
    held = lived()
    assert after(held, 486.6) is held
    then = after(held, 487)
    assert then.authorities[1:] == held.authorities
    assert then.authority_key != held.authority_key
    assert then.certificate == held.certificate, "no API server trusts the new one yet"


def test_the_new_authority_signs_once_it_was_everywhere_for_the_overlap() -> None:
    held = after(lived(), 487)
    assert after(held, 487, settled=OVERLAP_SECONDS - 1) is held
    then = after(held, 487)
    assert then.authorities == held.authorities
    assert accepts(then.authorities[0], then.certificate, NAMES[0], START + 487 * DAY)


def test_the_old_authority_goes_when_nobody_shows_its_certificates() -> None:
    held = after(after(lived(), 487), 487)
    assert after(held, 487, settled=OVERLAP_SECONDS - 1) is held
    then = after(held, 487)
    assert then.authorities == held.authorities[:1]
    assert then.certificate == held.certificate
    assert after(then, 487) is then


def test_what_is_due_beside_an_untrusted_authority_waits_for_it() -> None:
    """At day 545 the certificate of day 480 is past two thirds, and can be shown for 25 days."""
    held = after(lived(), 545)
    assert held.certificate == lived().certificate
    assert after(held, 545, settled=OVERLAP_SECONDS).certificate != held.certificate


def test_what_has_ended_waits_for_nobody() -> None:
    held = after(after(lived(), 487), 571, settled=0.0)
    assert good(held, START + 571 * DAY)


def test_an_authority_that_has_ended_leaves_the_bundle_at_once() -> None:
    then = after(joined(), 731, settled=0.0)
    assert len(then.authorities) == 1
    assert good(then, START + 731 * DAY)


def test_after_ten_years_alone_all_is_new() -> None:
    then = after(NEW, 3650)
    assert not set(then.authorities) & set(NEW.authorities)
    assert good(then, START + 3650 * DAY)


def authority(days: float, *, signs: bool = True) -> Held:
    """One that somebody else made, and put into the Secret."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ours")])
    begins = datetime.fromtimestamp(START, UTC)
    usage = x509.KeyUsage(not signs, False, False, False, False, signs, False, False, False)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return Held((made.public_bytes(Encoding.PEM).decode(),), text)


def test_a_certificate_never_outlives_its_authority() -> None:
    held = after(authority(30), 0)
    assert len(held.authorities) == 1
    assert good(held)
    assert expires_at(held.certificate) == START + 30 * DAY


def test_an_authority_must_be_one_that_signs() -> None:
    """Else nobody takes what it signed."""
    made = authority(700)
    assert from_secret(made.to_secret()) == made
    assert from_secret(authority(700, signs=False).to_secret()) == Held()


def test_clocks_that_differ_by_five_minutes() -> None:
    for skew in (-299, 299):
        assert renewed(NEW, names=NAMES, now=START + skew, settled=0.0) is NEW
        assert good(NEW, START + skew)


def test_what_a_clock_of_next_year_made_is_made_again() -> None:
    ahead = renewed(Held(), names=NAMES, now=START + 365 * DAY, settled=0.0)
    then = renewed(ahead, names=NAMES, now=START, settled=0.0)
    assert not set(then.authorities) & set(ahead.authorities)
    assert good(then)
    shown = replace(NEW, certificate="", key="")
    shown = renewed(shown, names=NAMES, now=START + 30 * DAY, settled=0.0)
    assert good(renewed(shown, names=NAMES, now=START, settled=0.0))


# -- names --------------------------------------------------------------------------------------


def test_another_name_is_shown_at_once() -> None:
    now = START + 487 * DAY
    held = after(lived(), 487)
    then = renewed(held, names=[*NAMES, "10.0.0.7", "fd00::7"], now=now, settled=0.0)
    assert accepts(then.bundle, then.certificate, NAMES[0], now)
    shown = x509.load_pem_x509_certificate(then.certificate.encode())
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "fd00::7"]
    assert names.get_values_for_type(x509.DNSName) == list(NAMES)


def test_a_name_too_many_goes_without_haste() -> None:
    fewer = renewed(NEW, names=NAMES[:1], now=START, settled=0.0)
    assert fewer.certificate != NEW.certificate
    assert not accepts(fewer.bundle, fewer.certificate, NAMES[1], START)
    held = after(lived(), 487)
    assert renewed(held, names=NAMES[:1], now=START + 487 * DAY, settled=0.0) is held


def test_the_order_of_names_is_nothing() -> None:
    assert renewed(NEW, names=NAMES[::-1], now=START, settled=0.0) is NEW


@pytest.mark.parametrize("names", [[], ["hook.näme"]])
def test_names_that_cannot_be(names: list[str]) -> None:
    with pytest.raises(AgentError) as caught:
        renewed(Held(), names=names, now=START, settled=0.0)
    assert caught.value.reason is Reason.INVALID_SPEC


# -- when to look again -------------------------------------------------------------------------


def due_days(held: Held, days: float, settled: float = 0.0) -> float:
    return days + due_in(held, names=NAMES, now=START + days * DAY, settled=settled) / DAY


def test_nothing_is_due_before_it_is_said_to_be() -> None:
    assert due_in(Held(), names=NAMES, now=START, settled=0.0) == 0.0
    assert due_days(NEW, 0) == pytest.approx(60, abs=0.01)
    assert due_days(lived(), 480) == pytest.approx(730 * 2 / 3, abs=0.01)
    held = after(lived(), 487)
    assert due_days(held, 487) == 487 + OVERLAP_SECONDS / DAY
    assert due_days(held, 487, 500) == 487 + (OVERLAP_SECONDS - 500) / DAY
    assert due_days(after(held, 487), 487, 599) == pytest.approx(487 + 1 / DAY)


@given(days=st.lists(st.floats(0, 400), min_size=1, max_size=6), settled=st.floats(0, 1200))
@settings(max_examples=60, deadline=None)
def test_what_is_due_is_done_then_and_not_before(days: list[float], settled: float) -> None:
    held, now = NEW, START
    for each in days:
        now += each * DAY
        wait = due_in(held, names=NAMES, now=now, settled=settled)
        then = renewed(held, names=NAMES, now=now, settled=settled)
        assert (then is not held) == (wait == 0.0)
        held = then
        assert good(held, now)


def test_settling_begins_anew_with_every_change() -> None:
    settling = Settling()
    there = [NEW.ca_bundle, NEW.ca_bundle]
    assert settling.seconds(NEW, there, 100.0) == 0.0
    assert settling.seconds(NEW, there, 130.0) == 30.0
    assert settling.seconds(NEW, [NEW.ca_bundle, ""], 140.0) == 0.0
    assert settling.seconds(NEW, [NEW.ca_bundle, ""], 150.0) == 0.0
    assert settling.seconds(NEW, there, 160.0) == 0.0
    assert settling.seconds(NEW, there, 161.0) == 1.0
    assert settling.seconds(OTHER, there, 170.0) == 0.0
    assert settling.seconds(NEW, there, 180.0) == 0.0, "it was away in between"


# -- the Secret ---------------------------------------------------------------------------------


def test_a_secret_and_back() -> None:
    for held in (Held(), NEW, joined()):
        assert from_secret(held.to_secret()) == held
    assert base64.b64decode(NEW.ca_bundle).decode() == NEW.bundle


def test_no_key_in_a_repr() -> None:
    assert "PRIVATE" not in repr(NEW)


def swapped(name: str) -> Mapping[str, str]:
    return {**NEW.to_secret(), name: OTHER.to_secret()[name]}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [None, "", "!", "AAAA", "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t"])
def test_a_field_that_is_lost_heals(name: str, value: str | None) -> None:
    data = {**NEW.to_secret(), name: value}
    healed = after(from_secret({k: v for k, v in data.items() if v is not None}), 0)
    assert good(healed)
    assert from_secret(healed.to_secret()) == healed


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_another_secret_heals(name: str) -> None:
    assert good(after(from_secret(swapped(name)), 0))


@pytest.mark.parametrize("name", ["ca.key", "tls.crt", "tls.key"])
def test_what_is_lost_of_the_rest_is_not_felt_by_clients(name: str) -> None:
    """Without `ca.key` another authority joins; the rest is signed by the one that is trusted."""
    healed = after(from_secret({**NEW.to_secret(), name: ""}), 0)
    assert set(NEW.authorities) <= set(healed.authorities)
    assert all(accepts(NEW.bundle, healed.certificate, each, START) for each in NAMES)


def test_an_authority_that_is_none_is_not_trusted() -> None:
    leaf = base64.b64encode((NEW.certificate + NEW.bundle).encode()).decode()
    assert from_secret({**NEW.to_secret(), "ca.crt": leaf}) == NEW


def test_a_good_authority_survives_rubbish_beside_it() -> None:
    rubbish = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    text = f"# ours\n{rubbish}" + NEW.bundle.replace("\n", " \r\n") + NEW.bundle
    for raw in (text.encode(), b"\xff" + text.encode()):
        data = {**NEW.to_secret(), "ca.crt": base64.b64encode(raw).decode()}
        assert from_secret(data) == NEW, "and Go reads what we write of it"


@pytest.mark.filterwarnings("ignore:.*serial number")  # it is read today, and refused tomorrow
@given(name=st.sampled_from(FIELDS), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_heals(name: str, where: float, bit: int) -> None:
    """In what the text stands for: a bit of the text itself seldom gets past base64."""
    text = base64.b64decode(NEW.to_secret()[name]).decode()
    head, *body, tail = text.strip().splitlines()
    raw = bytearray(base64.b64decode("".join(body)))
    raw[int(where * len(raw))] ^= 1 << bit
    text = "\n".join([head, base64.b64encode(raw).decode(), tail])
    data = {**NEW.to_secret(), name: base64.b64encode(text.encode()).decode()}
    healed = after(from_secret(data), 0)
    assert good(healed)
    load_pem_private_key(healed.key.encode(), password=None)


@given(data=st.dictionaries(st.sampled_from(FIELDS), st.text(max_size=40)))
@settings(max_examples=100, deadline=None)
def test_any_rubbish_heals(data: dict[str, str]) -> None:
    assert good(after(from_secret(data), 0))


# -- years of it --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_for_five_years_no_api_server_refuses_a_replica(seed: int) -> None:
    cluster = Cluster(random.Random(seed))
    held = cluster.years(5)
    assert len(cluster.authorities) >= 4
    assert len(cluster.certificates) >= 25
    assert cluster.most_trusted == 2
    assert cluster.calls > 2000
    assert len(held.authorities) <= 2


def never(_: Held, now: float, settled: float) -> float:
    return OVERLAP_SECONDS


def by_date(held: Held, now: float, settled: float) -> float:
    """As if a bundle were handed out on the day its newest authority is of."""
    if not held.certificate:
        return 0.0
    made = max(expires_at(held.authorities[0]) - 730 * DAY, expires_at(held.certificate) - 90 * DAY)
    return now - made


@pytest.mark.parametrize("waiting", [never, by_date])
def test_leaders_that_wait_otherwise_are_found_out(waiting: Waiting) -> None:
    """A leader that dies between its two writes makes a lie of the date."""

    def live() -> None:
        for seed in range(12):
            Cluster(random.Random(seed), waiting).years(2)

    with pytest.raises(AssertionError, match="refused"):
        live()


def test_an_agent_does_not_load_cryptography() -> None:
    """Its memory is a promise (README), and certificates are the controller's."""
    code = (
        "import sys, agent.__main__, agent.app, agent.server, agent.tls, agent.hook; "
        "assert 'cryptography' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
