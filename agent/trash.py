"""What was retired and waits to be unlinked: away by one rename now, its bytes back later."""

import secrets
import threading
from pathlib import Path

from agent import trees
from agent.errors import AgentError
from agent.files import Files, disk_errors
from agent.model import CacheKey


class Trash:
    """A directory of dead trees, on the file system of the living ones."""

    def __init__(self, directory: Path, files: Files) -> None:
        self.directory = directory
        self._files = files
        self._sweeping = threading.Lock()

    def take(self, tree: Path, key: CacheKey) -> None:
        """By rename, so that a crash leaves a whole tree in its place or none."""
        self._files.rename(tree, self.directory / f"{key}.{secrets.token_hex(4)}")

    def sweep(self) -> int:
        """Unlink one tree after the other; how many went.

        One worker does this: sequential unlinking beats parallel on ext4 and XFS, and must not
        compete with downloads. A tree that cannot be unlinked does not keep the others; the first
        failure is raised at the end.
        """
        count, failure = 0, None
        with self._sweeping:
            for name in trees.names(self.directory):
                try:
                    with disk_errors(f"unlink the retired {name}"):
                        self._files.remove_tree(self.directory / name)
                    count += 1
                except AgentError as error:
                    failure = failure or error
        if failure is not None:
            raise failure
        return count
