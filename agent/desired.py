"""Desired state from a directory of YAML: the embedded default, without a cluster.

`DIR/*.yaml` holds the same `LocalModelCache` objects that a cluster would. A file that cannot be
read now keeps the caches it had when it last could: a typo in an editor is not a wish to drop a
model, and absence is not a command.
"""

import asyncio
import errno
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from agent.errors import AgentError
from agent.kube import parse
from agent.kube.parse import Cache
from agent.threads import looking
from agent.wishes import Desired, SpecError, join

_FILE_BYTES = 1024 * 1024
"""A thousand caches; parsing takes seconds and a hundred times the memory of the text."""

_POLL_SECONDS = 1.0  # a stat of a few files; inotify is blind on the network mounts of some users


@dataclass(frozen=True, slots=True)
class _File:
    """The last reading of one file: `caches` are those of the last reading that worked."""

    stamp: tuple[int, int, int]
    caches: tuple[Cache, ...]
    errors: tuple[SpecError, ...]


class DesiredDirectory:
    """Watches one directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, _File] = {}

    async def watch(self) -> AsyncIterator[Desired]:
        """The desired state now, and again after every change. Never ends."""
        last: Desired | None = None
        while True:
            now = await looking(self.read)
            if now != last:
                last = now
                yield now
            await asyncio.sleep(_POLL_SECONDS)

    def read(self) -> Desired:
        """Read what changed since the last time."""
        try:
            paths = sorted(
                path
                for path in self._path.iterdir()
                if path.suffix in (".yaml", ".yml") and not path.name.startswith(".")
            )
        except OSError as error:
            message = f"{self._path}: {error.strerror or error}; the last known state is kept"
            return self._merge((SpecError(name=self._path.name or "desired", message=message),))
        self._files = {path.name: self._read(path) for path in paths}
        return self._merge(())

    def _read(self, path: Path) -> _File:
        before = self._files.get(path.name)
        kept = before.caches if before else ()
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if before is not None and before.stamp == stamp:
                return before
            if not stat.S_ISREG(found.st_mode):  # a fifo would be read for ever
                raise OSError(errno.EINVAL, "not a file")
            if found.st_size > _FILE_BYTES:
                raise OSError(errno.EFBIG, f"larger than {_FILE_BYTES} bytes")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            message = f"{path.name}: cannot be read: {why}"
            return _File((0, 0, 0), kept, (SpecError(name=path.stem, message=message),))
        caches, errors = _parse(path, text)
        names, refused = {cache.name for cache in caches}, {error.name for error in errors}
        # An error under the file's own name may hide any of the caches that the file had.
        hidden = [
            cache
            for cache in kept
            if cache.name not in names and not refused.isdisjoint({cache.name, path.stem})
        ]
        return _File(stamp, (*caches, *hidden), errors)

    def _merge(self, errors: tuple[SpecError, ...]) -> Desired:
        """All files together, in the order of their names: the later one is the newer one."""
        found = (error for file in self._files.values() for error in file.errors)
        caches = ((name, cache) for name, file in self._files.items() for cache in file.caches)
        desired = join(caches, (*errors, *found))
        # What cannot be read may ask for any model, also for one that an earlier life knew of.
        blind = bool(errors) or any(file.errors for file in self._files.values())
        return replace(desired, complete=not blind)


def _parse(path: Path, text: str) -> tuple[tuple[Cache, ...], tuple[SpecError, ...]]:
    """The caches of one file, and what is wrong with it, with lines."""
    caches: list[Cache] = []
    errors: list[SpecError] = []
    line = 1
    try:
        for node in yaml.compose_all(text, Loader=_Loader):
            line = node.start_mark.line + 1
            raw = _constructed(node)
            if raw is None:
                continue
            try:
                caches.append(parse.cache(raw))
            except AgentError as error:
                name = _name_in(raw) or path.stem
                where = f"{path.name} line {line}"
                errors.append(SpecError(name=name, message=f"{where}: {error.message}"))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name} line {mark.line + 1 if mark else line}"
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        errors.append(SpecError(name=path.stem, message=f"{where}: not YAML: {problem}"))
    return tuple(caches), tuple(errors)


class _Loader(yaml.SafeLoader):
    """Without aliases: a kilobyte of them can stand for more than the memory of the node."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)


def _constructed(node: yaml.Node) -> object:
    """The values of one document. Raises YAMLError also where PyYAML forgets to.

    Its constructors believe what a tag or the look of a value says: `2026-99-99` is a ValueError,
    `!!bool x` a KeyError, `!!int ""` an IndexError, `!!timestamp x` an AttributeError.
    """
    constructor = yaml.constructor.SafeConstructor()
    try:
        found: object = constructor.construct_document(node)
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(f"a value does not fit its type: {error}") from error
    return found


def _name_in(raw: object) -> str | None:
    """The object's own name, for its status, if it has one that is fit for a file."""
    metadata = raw.get("metadata") if isinstance(raw, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    try:
        probe = {
            "apiVersion": f"{parse.GROUP}/{parse.VERSION}",
            "kind": "LocalModelCache",
            "metadata": {"name": name},
            "spec": {"sourceModelUri": "file:///"},
        }
        return parse.cache(probe).name
    except AgentError:
        return None
