"""A certificate authority for one test cluster, made by openssl."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_DAYS = "2"


class Certificate(NamedTuple):
    """A certificate and its key, as files."""

    crt: Path
    key: Path


class Authority:
    """An EC authority in a directory. Every leaf names the issuer's key: Python 3.13 insists."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.crt = directory / "ca.crt"
        self.key = self._new_key("ca")
        self._run("req", "-x509", "-new", "-key", self.key, "-subj", "/CN=localmodel-tests",
                  "-days", _DAYS, "-out", self.crt, "-addext", "basicConstraints=critical,CA:TRUE",
                  "-addext", "keyUsage=critical,keyCertSign,digitalSignature")  # fmt: skip

    def issue(self, name: str, subject: str, *, serves: Sequence[str] = ()) -> Certificate:
        """A client certificate, or a server's for these names (`DNS:x`, `IP:1.2.3.4`).

        The subject is openssl's: `/O=system:nodes/CN=system:node:a` is a user with its group.
        """
        key = self._new_key(name)
        crt, request, extensions = (
            self._directory / f"{name}.{suffix}" for suffix in ("crt", "csr", "ext")
        )
        usage = "serverAuth" if serves else "clientAuth"
        extensions.write_text(
            "keyUsage=critical,digitalSignature\n"
            f"extendedKeyUsage={usage}\n"
            "subjectKeyIdentifier=hash\n"
            "authorityKeyIdentifier=keyid\n"
            + (f"subjectAltName={','.join(serves)}\n" if serves else "")
        )
        self._run("req", "-new", "-key", key, "-subj", subject, "-out", request)
        self._run("x509", "-req", "-in", request, "-CA", self.crt, "-CAkey", self.key,
                  "-CAcreateserial", "-days", _DAYS, "-out", crt,
                  "-extfile", extensions)  # fmt: skip
        return Certificate(crt, key)

    def key_pair(self, name: str) -> tuple[Path, Path]:
        """A private key and its public half: what signs ServiceAccount tokens."""
        private, public = self._new_key(name), self._directory / f"{name}.pub"
        self._run("ec", "-in", private, "-pubout", "-out", public)
        return private, public

    def _new_key(self, name: str) -> Path:
        key = self._directory / f"{name}.key"
        self._run("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
        return key

    @staticmethod
    def _run(*arguments: str | Path) -> None:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"openssl {arguments[0]}: {done.stderr}")
