"""What a source is, and what all of them share: patterns, and the order of a listing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

from agent.errors import AgentError, Reason
from agent.layout import archive_kind, check_paths
from agent.model import Listing, Locator, ModelRef, RemoteFile


@dataclass(frozen=True, slots=True)
class Given:
    """What a source is to work with for one model.

    `environment` are the variables that it reads; None: those of this process. `authorities` is the
    path of a file with all whom TLS trusts; "" for whom the machine trusts.
    """

    environment: Mapping[str, str] | None = field(default=None, repr=False)
    authorities: str = ""


OWN = Given()


class Source(Protocol):
    """The seam to one kind of origin. Contract: tests/contracts/source_contract.py."""

    def check(self, ref: ModelRef) -> None:
        """Raise InvalidSpec if the URI cannot be one of this scheme. Looks at nothing outside."""
        ...

    def host(self, ref: ModelRef) -> str:
        """Who answers its requests, and may limit them; "" where nobody does."""
        ...

    async def list(self, ref: ModelRef) -> Listing:
        """Pin the revision of today, with every selected file. Raises AgentError."""
        ...

    async def locate(self, listing: Listing, file: RemoteFile) -> Locator:
        """Where one file of a pinned listing can be had now; fresh credentials, fresh signature."""
        ...


def pin(
    ref: ModelRef, revision: str, files: Iterable[RemoteFile], *, chosen: bool = False
) -> Listing:
    """The listing of what the patterns leave, sorted. Raises EmptyListing or UnsafePath.

    Only what is selected must be safe: a hostile or odd name can be excluded. `chosen`: the URI
    names one file, and patterns choose among several.
    """
    found = sorted(files, key=lambda file: file.path.encode(errors="surrogatepass"))
    left = tuple(file for file in found if chosen or selected(file.path, ref))
    if not left:
        patterns = f"include {list(ref.include)}, exclude {list(ref.exclude)}"
        why = f"no file is left by {patterns}" if ref.include or ref.exclude else "it has no files"
        raise AgentError(Reason.EMPTY_LISTING, f"{ref.uri} at {revision}: {why}")
    check_paths(file.path for file in left)
    return Listing(ref=ref, revision=revision, files=left)


def is_archive(paths: Sequence[str]) -> bool:
    """Whether this is all there is, and it is to be unpacked, as KServe's initializer would: by its
    name, and never one among others (kserve.md 5.3)."""
    return len(paths) == 1 and archive_kind(paths[0]) is not None


def pack(ref: ModelRef, revision: str, archive: RemoteFile) -> Listing:
    """The listing of what is in one archive: the patterns select among its files, which nobody
    knows yet. Raises Unsupported, UnsafePath.
    """
    check_paths([archive.path])
    if archive_kind(archive.path) == "unsupported":
        raise AgentError(
            Reason.UNSUPPORTED,
            f"{archive.path} is compressed in a way that is not unpacked; pack it as .tar, .tar.gz"
            " or .zip",
        )
    return Listing(ref=ref, revision=revision, files=(), archive=archive)


def selected(path: str, ref: ModelRef) -> bool:
    """As the hub's client does: include first, then exclude; `*` crosses `/`; `dir/` is `dir/*`;
    a backslash is a slash.
    """

    def matches(patterns: tuple[str, ...]) -> bool:
        slashed = (pattern.replace("\\", "/") for pattern in patterns)
        return any(
            fnmatchcase(
                path.replace("\\", "/"), f"{pattern}*" if pattern.endswith("/") else pattern
            )
            for pattern in slashed
        )

    return (not ref.include or matches(ref.include)) and not matches(ref.exclude)
