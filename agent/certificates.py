"""The hook's own certificates: what their Secret holds, and what is due in it (design D8).

    ca.crt           authorities, newest first: what API servers are told to trust (`caBundle`)
    ca.key           the key of the newest
    tls.crt tls.key  what the hook shows

A turn of the leader, each write with the resourceVersion that was read, 409 -> the turn again:

    read the webhook configurations, then the Secret: in this order, so that no bundle is ever
      replaced by one from an older Secret
    held = from_secret(data)
    new = renewed(held, names=..., now=..., settled=settling.seconds(...))
    write the Secret if new.to_secret() differs from data, then each caBundle that differs

API servers see a bundle late, replicas see the Secret late, and a leader may die between the two
writes. So of the steps that somebody could miss, each waits until the last one was in place
everywhere for OVERLAP_SECONDS, watched by this very leader: no date in a certificate tells when
its bundle was handed out. A new leader begins to count anew, which costs minutes of months.

Only who serves the hook may import this: cryptography is 14 MiB that no agent needs.
"""

import base64
import ipaddress
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.errors import AgentError, Reason
from agent.unchanged import Unchanged

OVERLAP_SECONDS = 600.0
"""By then every API server has a bundle, and every replica the Secret: both are watched."""

_DAY = 24 * 3600
_AUTHORITY_SECONDS = 730 * _DAY
_SERVING_SECONDS = 90 * _DAY

_SKEW_SECONDS = 300
"""Clocks differ: what is made is backdated by this, and what begins so much later is believed."""

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class Held:
    """What the Secret holds that can be used, as PEM; empty where there is no such thing.

    Every authority signs itself; the keys are those of the newest authority and of the certificate.
    """

    authorities: tuple[str, ...] = ()
    """Newest first."""

    authority_key: str = field(default="", repr=False)
    certificate: str = ""
    key: str = field(default="", repr=False)

    @property
    def bundle(self) -> str:
        """All authorities: whoever trusts them trusts what any replica shows."""
        return "".join(self.authorities)

    @property
    def ca_bundle(self) -> str:
        """The same as webhook configurations have it: in base64."""
        return _base64(self.bundle)

    def to_secret(self) -> dict[str, str]:
        """The `data` of a Secret."""
        return {
            "ca.crt": _base64(self.bundle),
            "ca.key": _base64(self.authority_key),
            "tls.crt": _base64(self.certificate),
            "tls.key": _base64(self.key),
        }


def from_secret(data: Mapping[str, str]) -> Held:
    """What can be used of the `data` of a Secret; what cannot is as if it were not there."""
    texts = {name: _text(data.get(name, "")) for name in ("ca.crt", "ca.key", "tls.crt", "tls.key")}
    authorities = tuple(
        dict.fromkeys(
            _pem(found)
            for match in _CERTIFICATE.finditer(texts["ca.crt"])
            if (found := _authority(match[0])) is not None
        )
    )
    held = Held(authorities)
    if authorities and _is_pair(authorities[0], texts["ca.key"]):
        held = replace(held, authority_key=texts["ca.key"])
    if _is_pair(texts["tls.crt"], texts["tls.key"]):
        certificate = _pem(_certificate(texts["tls.crt"]))
        held = replace(held, certificate=certificate, key=texts["tls.key"])
    return held


def renewed(held: Held, *, names: Collection[str], now: float, settled: float) -> Held:
    """What the Secret should hold: the very same object where nothing is due.

    names     what the hook is called by: DNS names and IP addresses
    now       Unix seconds
    settled   for how many seconds just this has been in place, by `Settling`

    Pure, but for the keys it makes. Raises InvalidSpec for a name that no certificate can have.
    """
    stay = tuple(a for a in held.authorities if _leaves_at(a, held, now, settled) > now)
    if _authority_due(held) <= now or stay[:1] != held.authorities[:1]:
        held, settled = _with_authority(replace(held, authorities=stay), now), 0.0
    elif stay != held.authorities:
        held = replace(held, authorities=stay)
    if _certificate_due(held, names, now, settled) <= now:
        held = _with_certificate(held, names, now)
    return held


def due_in(held: Held, *, names: Collection[str], now: float, settled: float) -> float:
    """Seconds until `renewed` should be asked again; it may find that nothing is due then."""
    moments = [_authority_due(held), _certificate_due(held, names, now, settled)]
    moments += [_leaves_at(authority, held, now, settled) for authority in held.authorities]
    return max(0.0, min(moments) - now)


def expires_at(certificate: str) -> float:
    """When a PEM certificate ends, Unix seconds; 0.0 where there is none: it is no good now."""
    with suppress(*_UNREADABLE):
        return _ends(_certificate(certificate))
    return 0.0


class Settling:
    """For how long one and the same has been in place, as far as this process saw it."""

    def __init__(self) -> None:
        self._in_place = Unchanged[Held]()

    def seconds(self, held: Held, ca_bundles: Collection[str], now: float) -> float:
        """`held` was just read, and the `caBundle` of every configuration; `now` is monotonic."""
        in_place = held if all(found == held.ca_bundle for found in ca_bundles) else None
        return self._in_place.seconds(in_place, now)


# -- when ---------------------------------------------------------------------------------------


def _authority_due(held: Held) -> float:
    """When a new authority is to join the bundle; what it signs comes later."""
    return _two_thirds(_certificate(held.authorities[0])) if held.authority_key else -inf


def _certificate_due(held: Held, names: Collection[str], now: float, settled: float) -> float:
    """When another certificate is to be shown: at once, where none can be shown now."""
    issuer = _issuer(held)
    if issuer is None:
        return -inf
    shown = _certificate(held.certificate)
    missing, superfluous = _differ(names, shown)
    if missing or _begins(shown) > now + _SKEW_SECONDS:
        return -inf
    if issuer != held.authorities[0]:  # its key is gone: wait until the newest is trusted
        return min(_ends(shown), now + OVERLAP_SECONDS - settled)
    return now if superfluous else _two_thirds(shown)


def _leaves_at(authority: str, held: Held, now: float, settled: float) -> float:
    """When an authority is to leave the bundle: nobody shows any more what it signed."""
    certificate = _certificate(authority)
    if _begins(certificate) > now + _SKEW_SECONDS:
        return -inf  # made by a clock that was wrong: nobody else believes it
    if authority in (held.authorities[0], _issuer(held)):
        return _ends(certificate)
    return min(_ends(certificate), now + OVERLAP_SECONDS - settled)


def _issuer(held: Held) -> str | None:
    """The authority of the bundle that signed what is shown."""
    if held.certificate:
        shown = _certificate(held.certificate)
        for authority in held.authorities:
            with suppress(*_UNREADABLE):
                shown.verify_directly_issued_by(_certificate(authority))
                return authority
    return None


def _differ(names: Collection[str], shown: x509.Certificate) -> tuple[bool, bool]:
    """Whether a certificate lacks some of these names, and whether it has others."""
    wanted, has = {_general_name(name) for name in names}, set[x509.GeneralName]()
    with suppress(*_UNREADABLE):
        extension = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        has = set(extension.value)
    return not wanted <= has, not has <= wanted


def _two_thirds(certificate: x509.Certificate) -> float:
    begins, ends = _begins(certificate), _ends(certificate)
    return begins + (ends - begins) * 2 / 3


def _begins(certificate: x509.Certificate) -> float:
    return certificate.not_valid_before_utc.timestamp()


def _ends(certificate: x509.Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp()


# -- making -------------------------------------------------------------------------------------


def _with_authority(held: Held, now: float) -> Held:
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # Each has a name of its own: by equal names, libraries try the wrong key first.
    name = _name(NameOID.COMMON_NAME, f"localmodel-agent hook {serial:040x}")
    usage = x509.KeyUsage(
        key_cert_sign=True, crl_sign=False, digital_signature=False, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        _builder(key.public_key(), serial, now, now + _AUTHORITY_SECONDS)
        .subject_name(name)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return replace(held, authorities=(_pem(made), *held.authorities), authority_key=_key_pem(key))


def _with_certificate(held: Held, names: Collection[str], now: float) -> Held:
    """Signed by the newest authority. Its names are where clients look: not in the subject."""
    if not names:
        raise AgentError(Reason.INVALID_SPEC, "a certificate must have a name")
    authority = _certificate(held.authorities[0])
    signer = load_pem_private_key(held.authority_key.encode(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)  # by `_is_pair`
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + _SERVING_SECONDS, _ends(authority))
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=False, crl_sign=False, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
        authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    )
    made = (
        _builder(key.public_key(), x509.random_serial_number(), now, until)
        .subject_name(_name(NameOID.ORGANIZATION_NAME, "localmodel-agent"))
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        )
        .add_extension(issuer, critical=False)
        .sign(signer, hashes.SHA256())
    )
    return replace(held, certificate=_pem(made), key=_key_pem(key))


def _builder(
    public: ec.EllipticCurvePublicKey, serial: int, now: float, until: float
) -> x509.CertificateBuilder:
    begins, ends = (
        datetime.fromtimestamp(int(moment), UTC) for moment in (now - _SKEW_SECONDS, until)
    )
    return (
        x509.CertificateBuilder()
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _name(oid: x509.ObjectIdentifier, value: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid, value)])


def _general_name(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    try:
        return x509.DNSName(name)
    except ValueError:
        message = f"{name!r} is no DNS name and no IP address: correct the name of the service"
        raise AgentError(Reason.INVALID_SPEC, message) from None


# -- text ---------------------------------------------------------------------------------------


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(encoded: str) -> str:
    """What cannot be decoded is of no use in its place only: a good block beside it stays."""
    with suppress(*_UNREADABLE):
        return base64.b64decode(encoded).decode(errors="replace")
    return ""


def _pem(certificate: x509.Certificate) -> str:
    """Always the same text for a certificate, and one that Go reads: it refuses loose ones."""
    return certificate.public_bytes(Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _certificate(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def _authority(pem: str) -> x509.Certificate | None:
    """An authority as we make them; None: anything else."""
    with suppress(*_UNREADABLE):
        found = _certificate(pem)
        found.verify_directly_issued_by(found)
        extensions = found.extensions
        extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        if usage.key_cert_sign and (
            extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        ):
            return found
    return None


def _is_pair(certificate: str, key: str) -> bool:
    with suppress(*_UNREADABLE):
        private = load_pem_private_key(key.encode(), password=None)
        if isinstance(private, ec.EllipticCurvePrivateKey):
            return private.public_key() == _certificate(certificate).public_key()
    return False
