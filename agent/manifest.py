"""The manifest: what a sealed model is, as a text that `sha256sum -c` understands.

    # localmodel manifest 1
    # uri hf://owner/name
    # revision 0a1b...
    # include *.safetensors            (one line a pattern; none: everything)
    # sealed 2026-11-21T07:35:20Z
    # warning pytorch_model.bin runs code ...      (what was said of its files; none: nothing)
    # archive 9000 sha256:77f1... model.tar.gz     (what the files were unpacked from, if anything)
    # file 1280 git-sha1:95d0... config.json      (size, what the source promised or -, path)
    <sha256>  config.json

Comment lines are skipped by coreutils. The digest lines are sorted by path, as bytes; the
*fingerprint* is the SHA-256 of them alone, so the same bytes have the same fingerprint wherever
they came from. The text round-trips: `parse(render(m)) == m`.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from agent.errors import AgentError, Reason
from agent.layout import check_paths, is_one_line
from agent.model import HEX_DIGITS, Algorithm, Digest, Entry, Listing, ModelRef, RemoteFile

_HEADER = "# localmodel manifest 1"
_DIGEST_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_FILE_LINE = re.compile(
    r"(?P<size>[0-9]{1,19}) "
    rf"(-|(?P<promised>{'|'.join(f'{name}:[0-9a-f]{{{n}}}' for name, n in HEX_DIGITS.items())})) "
    r"(?P<path>.+)"
)

_ARCHIVE_LINE = re.compile(r"(?P<size>[0-9]{1,19}) sha256:(?P<sha256>[0-9a-f]{64}) (?P<path>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedFile:
    """One proven file: the SHA-256 we computed, and what the source had promised, if anything."""

    path: str
    size: int
    sha256: str
    promised: Digest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedArchive:
    """What the files of a model were unpacked from: its name at the source, and our SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A sealed model. `sealed_at` is whole Unix seconds."""

    ref: ModelRef
    revision: str
    sealed_at: int
    files: tuple[SealedFile, ...]
    archive: SealedArchive | None = None
    warnings: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """`sha256:<hex>` of the digest lines."""
        return f"sha256:{hashlib.sha256(self._digest_lines().encode()).hexdigest()}"

    def _digest_lines(self) -> str:
        return "".join(f"{file.sha256}  {file.path}\n" for file in self.files)

    def entry(self, *, last_used: float) -> Entry:
        return Entry(
            ref=self.ref,
            revision=self.revision,
            fingerprint=self.fingerprint,
            bytes=self.bytes,
            files=len(self.files),
            sealed_at=float(self.sealed_at),
            last_used=last_used,
            warning="; ".join(self.warnings),
        )

    def listing(self) -> Listing:
        """The listing that would fetch these very bytes again: for a repair.

        The promise is our own SHA-256, which holds for every source; the source's own was checked
        against the same bytes when they were sealed.
        """
        return Listing(
            ref=self.ref,
            revision=self.revision,
            files=tuple(
                RemoteFile(
                    path=file.path,
                    size=file.size,
                    origin="",
                    digest=Digest("sha256", file.sha256),
                )
                for file in self.files
            ),
            archive=None
            if self.archive is None
            else RemoteFile(
                path=self.archive.path,
                size=self.archive.size,
                origin="",
                digest=Digest("sha256", self.archive.sha256),
            ),
        )


def seal(listing: Listing, sha256: dict[str, str], *, sealed_at: int) -> Manifest:
    """The manifest of a listing whose every file was proven; `sha256` is by path."""
    files = (
        SealedFile(path=file.path, size=file.size, sha256=sha256[file.path], promised=file.digest)
        for file in listing.files
    )
    return Manifest(
        ref=listing.ref,
        revision=listing.revision,
        sealed_at=sealed_at,
        files=tuple(sorted(files, key=lambda file: file.path.encode())),
        archive=_sealed_archive(listing.archive),
    )


def _sealed_archive(archive: RemoteFile | None) -> SealedArchive | None:
    if archive is None:
        return None
    # Whoever opened it has pinned its SHA-256, whatever the source had promised of it.
    assert archive.digest is not None
    assert archive.digest.algorithm == "sha256"
    return SealedArchive(path=archive.path, size=archive.size, sha256=archive.digest.hex)


def render(manifest: Manifest) -> str:
    """The text on disk."""
    comments = [
        _HEADER,
        f"# uri {_one_line(manifest.ref.uri)}",
        f"# revision {_one_line(manifest.revision)}",
        *(f"# include {_one_line(pattern)}" for pattern in manifest.ref.include),
        *(f"# exclude {_one_line(pattern)}" for pattern in manifest.ref.exclude),
        f"# sealed {datetime.fromtimestamp(manifest.sealed_at, UTC):%Y-%m-%dT%H:%M:%SZ}",
        *(f"# warning {_one_line(warning)}" for warning in manifest.warnings),
        *_archive_lines(manifest.archive),
        *(f"# file {file.size} {file.promised or '-'} {file.path}" for file in manifest.files),
    ]
    return "\n".join(comments) + "\n" + manifest._digest_lines()


def _archive_lines(archive: SealedArchive | None) -> list[str]:
    if archive is None:
        return []
    return [f"# archive {archive.size} sha256:{archive.sha256} {_one_line(archive.path)}"]


def parse(text: str) -> Manifest:
    """The reverse of `render`.

    Raises InvalidSpec, or UnsafePath for its paths, for anything that is not a whole manifest.
    """
    if not text.startswith(_HEADER + "\n") or not text.endswith("\n"):
        raise _invalid("it does not begin or end like one")
    fields: dict[str, list[str]] = {}
    digests: dict[str, str] = {}
    # Only \n ends a line: str.splitlines would also split at characters that a path may hold.
    for line in text[:-1].split("\n")[1:]:
        _one_line(line)
        if line.startswith("# "):
            name, _, value = line[2:].partition(" ")
            fields.setdefault(name, []).append(value)
        elif (match := _DIGEST_LINE.fullmatch(line)) and match[2] not in digests:
            digests[match[2]] = match[1]
        else:
            raise _invalid(f"line {line[:80]!r}")
    try:
        (uri,), (revision,), (sealed,) = fields["uri"], fields["revision"], fields["sealed"]
        sealed_at = datetime.strptime(sealed, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (KeyError, ValueError) as error:
        raise _invalid(f"uri, revision or sealed: {error}") from error
    files = tuple(_file(line, digests) for line in fields.get("file", []))
    # None at all is a text that was cut off behind the `sealed` line: there is no empty model.
    if not files or [file.path for file in files] != list(digests):
        raise _invalid("the files and the digest lines differ")
    check_paths(digests)
    if sorted(digests, key=str.encode) != list(digests):
        raise _invalid("the digest lines are not sorted")
    return Manifest(
        ref=ModelRef(
            uri=uri,
            include=tuple(fields.get("include", ())),
            exclude=tuple(fields.get("exclude", ())),
        ),
        revision=revision,
        sealed_at=int(sealed_at.timestamp()),
        files=files,
        archive=_archive(fields.get("archive", [])),
        warnings=tuple(fields.get("warning", [])),
    )


def _archive(lines: list[str]) -> SealedArchive | None:
    if not lines:
        return None
    match = _ARCHIVE_LINE.fullmatch(lines[0])
    if match is None or len(lines) > 1:
        raise _invalid(f"archive line {lines[0][:80]!r}")
    return SealedArchive(path=match["path"], size=int(match["size"]), sha256=match["sha256"])


def _file(line: str, digests: dict[str, str]) -> SealedFile:
    match = _FILE_LINE.fullmatch(line)
    if match is None or match["path"] not in digests:
        raise _invalid(f"file line {line[:80]!r}")
    promised = None
    if match["promised"] is not None:
        algorithm, _, digits = match["promised"].partition(":")
        promised = Digest(cast(Algorithm, algorithm), digits)
    return SealedFile(
        path=match["path"],
        size=int(match["size"]),
        sha256=digests[match["path"]],
        promised=promised,
    )


def _invalid(what: str) -> AgentError:
    return AgentError(Reason.INVALID_SPEC, f"not a manifest of ours: {what}")


def _one_line(value: str) -> str:
    if not is_one_line(value):
        raise AgentError(Reason.INVALID_SPEC, f"{value[:80]!a} holds control characters")
    return value
