"""A server's side of TLS whose certificate can be replaced while it serves.

Not by `load_cert_chain` on the live context: OpenSSL keeps a pair of each kind of key, so after an
RSA pair followed an EC pair it would go on to show the old one, and a pair that does not match is
half loaded before that is noticed. Each pair gets a context of its own, and each handshake is given
the newest; a connection that is open never notices.
"""

import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.errors import AgentError, Reason
from agent.files import version_of

_log = logging.getLogger(__name__)

_CERTIFICATE = "tls.crt"
_KEY = "tls.key"


class ServerTLS:
    """What to serve with: `context`, whose handshakes fail until a pair is shown."""

    def __init__(self) -> None:
        self.context = _context()
        self.context.sni_callback = self._give  # for clients that name nobody, too
        self._shown: ssl.SSLContext | None = None
        self.certificate = ""
        """What is shown, PEM."""

    def show(self, certificate: str, key: str) -> None:
        """Show this from the next handshake on: PEM, the leaf first.

        Raises InvalidSpec where the two cannot be used; what was shown before is shown on.
        """
        context = _context()
        with _in_memory(certificate) as certificate_file, _in_memory(key) as key_file:
            try:
                # An encrypted key must not make OpenSSL ask for a password on the terminal.
                context.load_cert_chain(certificate_file, key_file, password=lambda: b"")
            except (ssl.SSLError, OSError, ValueError) as error:
                why = getattr(error, "reason", None) or "no PEM that can be read"
                raise AgentError(
                    Reason.INVALID_SPEC,
                    f"certificate and key cannot be used together ({why}):"
                    " give a PEM certificate with its own key, which is not encrypted",
                ) from None  # what is behind it may quote the key
        self._shown, self.certificate = context, certificate

    def _give(
        self, connection: ssl.SSLObject, name: str | None, asked: ssl.SSLContext
    ) -> int | None:
        if self._shown is None:
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        connection.context = self._shown
        return None


class CertificateDirectory:
    """`tls.crt` and `tls.key` that somebody else keeps and replaces: cert-manager, an operator."""

    def __init__(self, directory: Path, tls: ServerTLS) -> None:
        """Show what is there. Raises InvalidSpec where that cannot be used."""
        self._directory = directory
        self._tls = tls
        self._shown = self._warned = ""
        self._shown = self._show()

    def look(self) -> bool:
        """Whether there was something new to show. Waits for a disk.

        Two files cannot be replaced at once. A pair that cannot be used may be half of the next
        one: the old one is shown on, the log says so once, and the next look tries again.
        """
        try:
            version = self._version()
            if version == self._shown:
                return False
            self._shown = self._show()
        except AgentError as error:
            if error.message != self._warned:
                _log.warning("the hook shows its old certificate on: %s", error)
                self._warned = error.message
            return False
        self._warned = ""
        return True

    def _show(self) -> str:
        version = self._version()  # first: what is replaced from here on is seen by the next look
        try:
            self._tls.show(*(path.read_text("ascii") for path in self._paths()))
        except AgentError as error:
            raise AgentError(error.reason, f"{self._directory}: {error}") from None
        except (OSError, UnicodeError) as error:
            raise self._unreadable(error) from None
        return version

    def _version(self) -> str:
        try:
            return " ".join(version_of(path.stat()) for path in self._paths())
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError | UnicodeError) -> AgentError:
        what, why = f"what is in {self._directory}", "it is no PEM"
        if isinstance(error, OSError):
            what, why = error.filename, error.strerror or str(error)
        return AgentError(
            Reason.INVALID_SPEC,
            f"cannot read {what}: {why};"
            f" put {_CERTIFICATE} and {_KEY} (PEM) there, or mount the Secret that has them",
        )

    def _paths(self) -> tuple[Path, Path]:
        return self._directory / _CERTIFICATE, self._directory / _KEY


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # API servers speak 1.3
    return context


@contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """The path of a file that is on no disk: the ssl module takes nothing else."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text.encode())
        file.flush()
        yield f"/proc/self/fd/{descriptor}"
