"""Where models come from: one file per URI scheme.

A source *describes*: it pins a revision, lists files with sizes and digests, and says where each
is. It never moves a byte (design D4). A new scheme is one file here and one line in `SCHEMES`.
"""

from collections.abc import Callable, Collection, Mapping

from agent.errors import AgentError, Reason
from agent.sources.base import OWN, Given, Source
from agent.sources.gs import GoogleStorage
from agent.sources.hf import HuggingFace
from agent.sources.http import Web
from agent.sources.local import LocalPath
from agent.sources.s3 import S3

Made = Callable[[Given], Source]
"""Makes a source with what was given for one cache."""

SCHEMES: Mapping[str, Made] = {
    "hf": lambda given: HuggingFace.from_environment(given.environment, given.authorities),
    "file": lambda given: LocalPath(),
    "http": lambda given: Web(given.environment, given.authorities),
    "https": lambda given: Web(given.environment, given.authorities),
    "s3": lambda given: S3.from_environment(given.environment, given.authorities),
    "gs": lambda given: GoogleStorage.from_environment(given.environment, given.authorities),
}

_COPY = "copy the model to a hub, an object store (s3://, gs://) or a web server"
_BLOB = "name one file, or one archive of them, as https://ACCOUNT.blob.core.windows.net/...?SAS"
_IMAGE = "let kubelet mount it as an image volume (KServe: oci+native://)"
_GIT = "use hf:// for a hub's repository, or an archive of it by https://"

INSTEAD: Mapping[str, str] = {
    "pvc": "a volume is not downloaded: name it in the InferenceService itself, without a cache",
    **dict.fromkeys(("oci", "oci+fetch", "oci+native"), _IMAGE),
    **dict.fromkeys(("hdfs", "webhdfs"), _COPY),
    **dict.fromkeys(("git", "git+https", "git+ssh", "ssh"), _GIT),
    **dict.fromkeys(("abfs", "abfss", "wasb", "wasbs", "azure"), _BLOB),
    "modelscope": "most of its models are on hf:// as well; or set HF_ENDPOINT to a mirror",
}
"""What to do where there is no source."""


class Sources:
    """The source of a URI, made when it is first needed and kept."""

    def __init__(self, schemes: Mapping[str, Made] = SCHEMES) -> None:
        self._schemes = schemes
        self._made: dict[str, Source] = {}

    def of(self, uri: str, given: Given = OWN) -> Source:
        """Raises Unsupported for a scheme without a source, with what to do instead."""
        scheme = scheme_of(uri, self._schemes)
        if given != OWN:
            return self._schemes[scheme](given)
        if scheme not in self._made:
            self._made[scheme] = self._schemes[scheme](OWN)
        return self._made[scheme]


def scheme_of(uri: str, schemes: Collection[str] = SCHEMES) -> str:
    """Raises Unsupported for a scheme without a source, with what to do instead."""
    scheme, separator, _ = uri.partition("://")
    if not separator:
        if not uri.startswith("/"):
            raise AgentError(
                Reason.INVALID_SPEC,
                f"{uri[:200]!r} is neither scheme://... nor an absolute path; did you mean"
                f" hf://{uri[:200]}?",
            )
        scheme = "file"
    if scheme not in schemes:
        known = ", ".join(f"{name}://" for name in sorted(schemes))
        instead = INSTEAD.get(scheme, f"these are supported: {known}, and plain paths")
        raise AgentError(Reason.UNSUPPORTED, f"there is no source for {scheme[:40]}://; {instead}")
    return scheme


__all__ = ["INSTEAD", "OWN", "SCHEMES", "Given", "Source", "Sources", "scheme_of"]
