"""The pinned listing of an ingest, as a text on disk; and what of it another listing keeps."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agent.model import Digest, Listing, ModelRef, RemoteFile


def render(listing: Listing) -> bytes:
    """The text on disk. It round-trips: `parse(render(listing)) == listing`."""
    return json.dumps(asdict(listing), indent=1).encode()


def parse(data: bytes) -> Listing:
    """Raises ValueError, KeyError or TypeError for anything else."""
    raw = json.loads(data)
    ref = raw["ref"]
    return Listing(
        ref=ModelRef(uri=ref["uri"], include=tuple(ref["include"]), exclude=tuple(ref["exclude"])),
        revision=raw["revision"],
        files=tuple(map(_file, raw["files"])),
        # Listings of an older agent know of none.
        archive=None if raw.get("archive") is None else _file(raw["archive"]),
    )


def _file(raw: Mapping[str, Any]) -> RemoteFile:
    return RemoteFile(
        path=raw["path"],
        size=raw["size"],
        origin=raw["origin"],
        digest=None if raw["digest"] is None else Digest(**raw["digest"]),
        version=raw["version"],
    )


def worth_keeping(previous: Listing | None, listing: Listing) -> set[str]:
    """The paths whose bytes, found in an ingest, may be those that the listing promises.

    Of the same listing: all. Of another: those a hash can decide on, and that are not known to have
    changed. The origin may differ: a repair has none.
    """
    if previous == listing:
        return {file.path for file in listing.files}
    before = {file.path: file for file in previous.files} if previous is not None else {}
    return {
        file.path
        for file in listing.files
        if file.digest is not None and not _changed(before.get(file.path), file)
    }


def keeps_archive(previous: Listing | None, listing: Listing) -> bool:
    """The same of the archive that the files come in."""
    if listing.archive is None or previous == listing:
        return listing.archive is not None
    before = previous.archive if previous is not None else None
    return listing.archive.digest is not None and not _changed(before, listing.archive)


def _changed(before: RemoteFile | None, file: RemoteFile) -> bool:
    if before is None:
        return False
    if before.size != file.size:
        return True
    old, new = before.digest, file.digest
    return old is not None and new is not None and old.algorithm == new.algorithm and old != new
