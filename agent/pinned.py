"""The pinned listing of an ingest, as a text on disk; and what of it another listing keeps."""

import json
from dataclasses import asdict

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
        files=tuple(
            RemoteFile(
                path=file["path"],
                size=file["size"],
                origin=file["origin"],
                digest=None if file["digest"] is None else Digest(**file["digest"]),
                version=file["version"],
            )
            for file in raw["files"]
        ),
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


def _changed(before: RemoteFile | None, file: RemoteFile) -> bool:
    if before is None:
        return False
    if before.size != file.size:
        return True
    old, new = before.digest, file.digest
    return old is not None and new is not None and old.algorithm == new.algorithm and old != new
