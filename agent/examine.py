"""What the files of a model are, beside being what the source promised: read before the seal."""

import os
from collections.abc import Iterable
from pathlib import Path

from agent import formats
from agent.errors import AgentError, Reason
from agent.files import disk_errors
from agent.metrics import FileKind
from agent.model import FilePolicy

_PICKLES = "run code when they are loaded (pickle); prefer safetensors, or exclude them"
_PICKLE = "runs code when it is loaded (pickle); prefer safetensors, or exclude it"

Findings = dict[FileKind, str]
"""What was found of each kind, in one line."""


def by_name(policy: FilePolicy, paths: Iterable[str]) -> Findings:
    """What the names alone say, where that is enough: before the first byte is asked for."""
    if policy is not FilePolicy.REFUSE:
        return {}
    return _pickles([path for path in paths if formats.is_pickle_name(path)])


def refuse(policy: FilePolicy, found: Findings) -> None:
    """Raise UnsafeFiles for what was found, where the policy is to."""
    if policy is FilePolicy.REFUSE and found:
        what = "; ".join(found.values())
        raise AgentError(Reason.UNSAFE_FILES, f"the file policy refuses it: {what}")


def examine(policy: FilePolicy, tree: Path, paths: Iterable[str]) -> Findings:
    """Look at proven files: a few bytes of each, and the headers of safetensors."""
    pickles, broken = [], []
    for path in paths if policy is not FilePolicy.OFF else ():
        with disk_errors(f"read {path}"), (tree / path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if formats.is_safetensors(path):
                try:
                    length = formats.header_length(file.read(formats.LENGTH_BYTES), size)
                    if length <= formats.MOST_HEADER_BYTES:
                        formats.check_header(file.read(length), size)
                except ValueError as error:
                    broken.append(f"{path[:200]}: {error}")
                continue
            head = file.read(formats.HEAD_BYTES)
            file.seek(max(0, size - 1))
            if formats.is_pickle(path, head, file.read(1)):
                pickles.append(path)
    found = _pickles(pickles)
    if broken:
        found["safetensors"] = formats.sentence(
            broken, "(a safetensors file that cannot be loaded)"
        )
    return found


def _pickles(paths: list[str]) -> Findings:
    if not paths:
        return {}
    return {"pickle": formats.sentence(paths, _PICKLE if len(paths) == 1 else _PICKLES)}
