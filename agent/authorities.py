"""The authorities that TLS trusts for one model: the machine's own and those of its credentials.

Libraries want them as the path of a file, so they are put together in one, named by its content:
two caches with the same bundle share it, a bundle that changes has another name, and what is cached
by the name (contexts, clients, connections) is never of another content.
"""

import hashlib
import os
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from agent.errors import AgentError, Reason
from agent.files import Files, disk_errors

_CERTIFICATE = re.compile(
    r"-----BEGIN (?P<kind>(?:TRUSTED )?CERTIFICATE)-----[A-Za-z0-9+/=\s]+-----END (?P=kind)-----"
)
_HASHED = re.compile(r"[0-9a-f]{8}\.[0-9]+")  # how OpenSSL finds one in a directory
_KEPT = 16
_PRIVATE = 0o600


class Authorities:
    """Bundles in a directory of ours; the least recently used go."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = Files()
        self._lock = threading.Lock()

    def file(self, bundle: str) -> str:
        """The path of a file with these (PEM) and the machine's. Waits for a disk.

        Only certificates are taken: what else somebody put into a ConfigMap is not written down.
        Raises Unauthorized where there is none that can be read, or what the disk says.
        """
        given = [match[0] for match in _CERTIFICATE.finditer(bundle)]
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata="\n".join(given))
        except (ssl.SSLError, ValueError):
            message = "the CA bundle holds no certificate that can be read"
            raise AgentError(Reason.UNAUTHORIZED, message) from None
        whole = "\n".join(dict.fromkeys([*_of_machine(), *given])) + "\n"
        data = whole.encode()
        path = self._directory / f"{hashlib.sha256(data).hexdigest()}.pem"
        with self._lock, disk_errors("write a CA bundle"):
            self._put(path, data)
        return str(path)

    def _put(self, path: Path, data: bytes) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            if path.read_bytes() == data:
                os.utime(path)
                return
        self._files.replace_file(path, data, _PRIVATE)
        newest_first = sorted(self._directory.iterdir(), key=_age, reverse=True)
        for old in newest_first[_KEPT:]:
            old.unlink(missing_ok=True)


def _age(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _of_machine() -> Iterator[str]:
    """The certificates that OpenSSL trusts here, SSL_CERT_FILE and SSL_CERT_DIR included."""
    where = ssl.get_default_verify_paths()
    files = [Path(where.cafile)] if where.cafile else []
    if where.capath:
        with suppress(OSError):
            found = Path(where.capath).iterdir()
            files += sorted(path for path in found if _HASHED.fullmatch(path.name))
    for file in files:
        with suppress(OSError):  # as OpenSSL: what cannot be read is not there
            for match in _CERTIFICATE.finditer(file.read_text(errors="replace")):
                yield match[0]
