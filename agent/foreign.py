"""What another agent left in the place of a model, compared with today's listing. Pure.

KServe's agent leaves what its storage initializer brought: the files of the source, beside them
`.cache/huggingface` from `hf://`, without the empty objects of `s3://`, single archives unpacked
(kserve.md 5.3, 5.4). Sizes are all that a look can compare; the bytes are hashed after that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agent.model import Foreign, Listing

ADVICE = "`localmodel prepare --adopt`, as root, gives it to the agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One thing in the directory; the directory itself has the path "".

    `size` is None for what is no regular file; `mounted` is on another file system than the models;
    `replaced` had turned out wrong, and another file was begun in its place.
    """

    path: str
    size: int | None = None
    owner: int = 0
    inode: int = 0
    names: int = 1
    mounted: bool = False
    replaced: bool = False


def judge(place: str, seen: Sequence[Seen], listing: Listing | None, *, user: int) -> Foreign:
    """`user` is who this agent runs as: it can take over only what is its own; root, anything."""
    if listing is not None and listing.archive is not None and not listing.files:
        listing = None  # what is in it is not known before it was looked into
    return Foreign(
        bytes=sum(one.size or 0 for one in seen),
        shared=frozenset((one.inode, one.size) for one in seen if one.size and one.names > 1),
        lacking=None if listing is None else _lacking(seen, listing),
        obstacle=_not_ours(place, seen, user),
    )


def unreadable(why: str) -> str:
    """The obstacle of a directory that this agent's user cannot look through."""
    return f"another agent left it, and this one {why}; {ADVICE}"


def _lacking(seen: Sequence[Seen], listing: Listing) -> frozenset[str]:
    """Not what is there and not listed: it does no harm until the exchange, and is gone after it.
    Nor empty files that are missing: KServe brings none from an object store."""
    sizes = {one.path: -1 if one.size is None or one.replaced else one.size for one in seen}
    return frozenset(file.path for file in listing.files if sizes.get(file.path, 0) != file.size)


def _not_ours(place: str, seen: Sequence[Seen], user: int) -> str:
    if mounted := [one.path for one in seen if one.mounted]:
        return f"{place}/{mounted[0]} is on another file system; unmount it"
    others = sorted({one.owner for one in seen} - {user})
    if user == 0 or not others:
        return ""
    return f"{place} holds files of user {others[0]}, not of {user}; {ADVICE}"
