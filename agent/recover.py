"""What to do at start with what an earlier life left behind (design D3, "At start").

Pure: the store looks (`Found`), this decides (`Fix`), the store acts. The decisions are a function
of a few facts about a key, so the tests enumerate all of them. Two rules are behind every row:
what is on offer must be whole, and what an earlier life wrote is re-hashed before it is.
"""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The facts about one key. Directories and files, nothing remembered."""

    manifest: bool = False  # manifests/<key>, readable
    sealing: bool = False  # manifests/.<key>.sealing, readable
    retiring: bool = False  # manifests/.<key>.retiring, readable
    unreadable: bool = False  # either of these two, but damaged: ours, of unknown content
    directory: bool = False  # models/<key>, with something in it
    listing: bool = False  # ingest/<key>/listing.json, readable
    tree: bool = False  # ingest/<key>/tree
    ingest: bool = False  # ingest/<key>/ at all, but for a salvage that waits to be asked for
    replaced: bool = False  # ingest/<key>/replaced: what had the place before us, and was not ours


class Fix(Enum):
    """One step of repair. The store carries them out in the order in which `recover` gives them."""

    RESTORE_MANIFEST = "put the retiring manifest back"
    DROP_RETIRING = "remove the retiring manifest"
    WITHDRAW_MANIFEST = "remove the manifest: its directory is gone, or it cannot be read"
    DROP_SEALING = "remove the sealing manifest"
    REOPEN = "move the directory back to the ingest, where it is re-hashed"
    SALVAGE = "move the directory to a new ingest without a listing"
    PUT_BACK = "move what we were about to replace back into its place"
    DROP_INGEST = "discard what is left of the ingest"
    REPORT_FOREIGN = "report a directory that is not ours"


def recover(found: Found) -> tuple[Fix, ...]:
    """The fixes for one key, in the order in which they are to be made.

    Killed after any of them, the next start comes to the same end. Once all are made there is
    nothing left to do, but to report what is foreign.
    """
    if found.unreadable and found.directory and not found.manifest:
        return _salvaged(found)
    if found.retiring and found.directory and not found.manifest:
        # Killed while retiring: nothing was deleted yet. Put back, planned again.
        return (Fix.RESTORE_MANIFEST, *_beside_a_sealed_model(found))
    # With a good manifest, the damaged one is a retiring one of an earlier life of the model.
    fixes = (Fix.DROP_RETIRING,) if found.retiring or found.unreadable else ()
    if found.manifest and found.directory:
        return (*fixes, *_beside_a_sealed_model(found))
    if found.manifest or found.unreadable:
        fixes = (*fixes, Fix.WITHDRAW_MANIFEST)
    return (*fixes, *_unsealed(found))


def _salvaged(found: Found) -> tuple[Fix, ...]:
    """A manifest was damaged. The directory is ours all the same: its files are worth a re-hash.

    The listing is asked for again when somebody wants the model. The manifests are removed last:
    they are all that says whose directory this is.
    """
    ingest = (Fix.DROP_INGEST,) if found.ingest else ()
    sealing = (Fix.DROP_SEALING,) if found.sealing else ()
    return (*ingest, Fix.SALVAGE, Fix.DROP_RETIRING, Fix.WITHDRAW_MANIFEST, *sealing)


def _beside_a_sealed_model(found: Found) -> tuple[Fix, ...]:
    """Killed at the very end of a seal, or at the very beginning of a repair."""
    sealing = (Fix.DROP_SEALING,) if found.sealing else ()
    return (*sealing, Fix.DROP_INGEST) if found.ingest else sealing


def _unsealed(found: Found) -> tuple[Fix, ...]:
    """Nothing of ours is on offer: so what somebody else had left in its place is not lost, either.

    It is put back before anything else is dropped, and stays where something new is in its way.
    """
    sealing = (Fix.DROP_SEALING,) if found.sealing else ()
    report = (Fix.REPORT_FOREIGN,) if found.directory or found.replaced else ()
    if found.directory and not found.tree and (found.listing or found.sealing):
        # Killed between the rename into place and the manifest, or while a repair took it back.
        # The sealing manifest is removed last: it may be all that says whose directory this is.
        if found.replaced:
            return (Fix.REOPEN, Fix.PUT_BACK, *sealing, *report)
        return (Fix.REOPEN, *sealing)
    put_back = (Fix.PUT_BACK,) if found.replaced and not found.directory else ()
    stuck = found.replaced and found.directory
    ingest = (Fix.DROP_INGEST,) if found.ingest and not found.listing and not stuck else ()
    return (*put_back, *sealing, *ingest, *report)
