"""Whether a sealed model is, byte for byte, what its manifest says."""

import asyncio
import os
from pathlib import Path

from agent.layout import is_one_line
from agent.manifest import Manifest, SealedFile
from agent.threads import looking
from agent.transfer import Engine


async def damaged(engine: Engine, root: Path, found: Manifest) -> list[str]:
    """The paths below `root` that are not what the manifest says, byte for byte, in its order.

    Behind them what the manifest does not name: who loads by pattern would load that too.
    """

    async def whole(file: SealedFile) -> bool:
        found = await engine.hash(root / file.path, size=file.size, promised=None)
        return found == file.sha256

    results = await asyncio.gather(*(whole(file) for file in found.files))
    bad = [file.path for file, good in zip(found.files, results, strict=True) if not good]
    return bad + await looking(lambda: _strays(root, {file.path for file in found.files}))


def _strays(root: Path, named: set[str]) -> list[str]:
    """Files and symlinks below `root` without a name in the manifest, fit to be printed."""
    found = set()
    for directory, directories, names in os.walk(root):
        links = (name for name in directories if Path(directory, name).is_symlink())
        found |= {str(Path(directory, name).relative_to(root)) for name in (*names, *links)}
    return [path if is_one_line(path) else ascii(path) for path in sorted(found - named)]
