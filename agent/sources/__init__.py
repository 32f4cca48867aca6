"""Where models come from: one file per URI scheme.

A source *describes*: it pins a revision, lists files with sizes and digests, and says where each
is. It never moves a byte (design D4). A new scheme is one file here and one line in `SCHEMES`.
"""

from collections.abc import Callable, Collection, Mapping

from agent.errors import AgentError, Reason
from agent.sources.base import Source
from agent.sources.hf import HuggingFace
from agent.sources.local import LocalPath

SCHEMES: Mapping[str, Callable[[], Source]] = {
    "hf": HuggingFace.from_environment,
    "file": LocalPath,
}

_INSTEAD = {
    "pvc": "a volume is not downloaded; mount it, or name the directory with file://",
    "oci": "let kubelet mount it as an image volume",
    "hdfs": "copy the model to a hub, an object store or a directory",
    "git": "use hf:// for a hub's repository, or a directory with file://",
}


class Sources:
    """The source of a URI, made when it is first needed and kept."""

    def __init__(self, schemes: Mapping[str, Callable[[], Source]] = SCHEMES) -> None:
        self._schemes = schemes
        self._made: dict[str, Source] = {}

    def of(self, uri: str) -> Source:
        """Raises Unsupported for a scheme without a source, with what to do instead."""
        scheme = scheme_of(uri, self._schemes)
        if scheme not in self._made:
            self._made[scheme] = self._schemes[scheme]()
        return self._made[scheme]


def scheme_of(uri: str, schemes: Collection[str] = SCHEMES) -> str:
    """Raises Unsupported for a scheme without a source, with what to do instead."""
    scheme, separator, _ = uri.partition("://")
    if not separator:
        if not uri.startswith("/"):
            raise AgentError(
                Reason.INVALID_SPEC,
                f"{uri[:200]!r} is neither scheme://... nor an absolute path",
            )
        scheme = "file"
    if scheme not in schemes:
        known = ", ".join(f"{name}://" for name in sorted(schemes))
        instead = _INSTEAD.get(scheme, f"these are supported: {known}, and plain paths")
        raise AgentError(Reason.UNSUPPORTED, f"there is no source for {scheme[:40]}://; {instead}")
    return scheme


__all__ = ["SCHEMES", "Source", "Sources", "scheme_of"]
