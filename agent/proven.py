"""What the files of ingests were when this life proved them.

With it, a seal can tell that somebody wrote into a file meanwhile. Without it, one file that stays
wrong would have its whole model hashed again at every try.
"""

from pathlib import Path

from agent.catalog import Versions
from agent.manifest import Manifest


class Proven:
    """The version and the SHA-256 of files, by where they are. For use in any thread."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[str | None, str]] = {}

    def note(self, place: Path, digest: str, *, version: str | None) -> None:
        """The file that has its place now, or is to have it next, was proven in this version."""
        self._known[place] = version, digest

    def digest(self, place: Path, version: str | None) -> str | None:
        """The SHA-256 of a file, if it is still what was proven."""
        proven_version, digest = self._known.get(place, (None, None))
        return digest if version is not None and version == proven_version else None

    def versions(self, tree: Path, sealed: Manifest) -> Versions:
        """What all files of a model were when they were proven."""
        known = {file.path: self._known.get(tree / file.path) for file in sealed.files}
        return {path: found[0] for path, found in known.items() if found and found[0]}

    def forget(self, *places: Path) -> None:
        for place in places:
            self._known.pop(place, None)
