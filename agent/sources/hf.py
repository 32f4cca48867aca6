"""`hf://owner/name[:revision][/path/below]`: a model of a Hugging Face hub.

The listing comes from `huggingface_hub`; the bytes are plain HTTPS from `resolve/<commit>/<path>`,
which answers with the file or with a signed link to a CDN (Xet files too). LFS files are promised
by SHA-256, all others by their git blob name. A revision with a slash is written `refs%2Fpr%2F1`.
A path below the repository names a directory, or one file, which is then published under its own
name. Read from the environment: HF_ENDPOINT, HF_TOKEN (or the token file under HF_HOME),
HF_HUB_OFFLINE.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote, unquote

import httpx2
from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # lazily

from agent.backoff import retry_after_seconds
from agent.errors import AgentError, Reason
from agent.layout import is_one_line
from agent.model import Algorithm, Digest, HttpLocator, Listing, Locator, ModelRef, RemoteFile
from agent.sources.base import pin
from agent.sources.session import bounded
from agent.threads import looking

_URI = re.compile(r"hf://(?P<repo>[^/:]+/[^/:]+)(?::(?P<revision>[^/]*))?(?:/(?P<below>.*))?")
_ENDPOINT = re.compile(r"https?://[^/@?#\s]+(?:/[^@?#\s]*)?", re.IGNORECASE)
_DEFAULT_ENDPOINT = "https://huggingface.co"

_TRUE = ("1", "ON", "YES", "TRUE")  # as the hub's own client reads its switches

_ANSWER_SECONDS = 30.0
_LISTING_SECONDS = 300.0
"""A tree of 100,000 files is a hundred pages of a second or two."""

# What is believed of a hub's answers goes into URLs, manifests, messages and a Kubernetes status.
_SIZES = 2**63  # an API server refuses a status with more, and with it what is said of all models
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HEX: dict[Algorithm, re.Pattern[str]] = {
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "git-sha1": re.compile(r"[0-9a-f]{40}"),
}


@dataclass(frozen=True, slots=True)
class _Address:
    """A parsed URI; `revision` None is the repository's default branch."""

    repo: str
    revision: str | None
    below: str

    def published(self, path: str) -> str | None:
        """The name that a file of the repository gets in the model; None if it is not below."""
        if not self.below:
            return path
        if path == self.below:
            return path.rpartition("/")[2]
        prefix = f"{self.below}/"
        return path.removeprefix(prefix) if path.startswith(prefix) else None

    def origin(self, file: RemoteFile) -> str:
        """The path in the repository. A listing that was made from a manifest does not know it."""
        if file.origin:
            return file.origin
        if not self.below or self.below.rpartition("/")[2] == file.path:
            return self.below or file.path
        return f"{self.below}/{file.path}"


class HuggingFace:
    """One hub. `token` is asked for at every use, so a rotated one is seen."""

    def __init__(
        self,
        endpoint: str,
        token: Callable[[], str | None],
        *,
        offline: bool = False,
        authorities: str = "",
        answer_seconds: float = _ANSWER_SECONDS,
        listing_seconds: float = _LISTING_SECONDS,
    ) -> None:
        if not _ENDPOINT.fullmatch(endpoint):
            # A name and a password in it would be shown in every message that names the endpoint.
            raise AgentError(
                Reason.INVALID_SPEC,
                "the hub's endpoint (HF_ENDPOINT) must be http[s]://host[:port][/path], no more",
            )
        self._endpoint = endpoint.rstrip("/")
        self._ask_token = token
        self._offline = offline
        self._authorities = authorities
        self._answer_seconds = answer_seconds
        self._listing_seconds = listing_seconds

    def __repr__(self) -> str:
        return f"HuggingFace({self._endpoint!r})"

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, authorities: str = ""
    ) -> "HuggingFace":
        """With the token of one cache, or (None) with this process's own. The hub is the
        operator's choice, unless the cache's own container says another."""
        own = os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT
        if environment is None:
            return cls(own, get_token, authorities=authorities)
        token = environment.get("HF_TOKEN", "").strip() or None
        endpoint = environment.get("HF_ENDPOINT") or own
        offline = environment.get("HF_HUB_OFFLINE", "").upper() in _TRUE
        return cls(endpoint, lambda: token, offline=offline, authorities=authorities)

    def check(self, ref: ModelRef) -> None:
        _parse(ref.uri)

    def host(self, ref: ModelRef) -> str:
        return self._endpoint

    async def list(self, ref: ModelRef) -> Listing:
        # The client is synchronous; one listing is one thread for a second or two.
        return await looking(lambda: self._list(ref))

    async def locate(self, listing: Listing, file: RemoteFile) -> Locator:
        self._refuse_offline(listing.ref)
        address = _parse(listing.ref.uri)
        path = quote(address.origin(file))
        token = await looking(self._token)
        return HttpLocator(
            url=f"{self._endpoint}/{address.repo}/resolve/{quote(listing.revision)}/{path}",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            verify=self._authorities or True,
        )

    def _refuse_offline(self, ref: ModelRef) -> None:
        """Our session has not the hook by which the client itself refuses."""
        if self._offline or is_offline_mode():
            raise AgentError(
                Reason.UNSUPPORTED,
                f"{ref.uri}: HF_HUB_OFFLINE is set, and so no hub is asked; unset it",
            )

    def _token(self) -> str | None:
        """The token of this moment; None for anonymous. Raises Unauthorized, NetworkError."""
        with _hub_errors("the token", self._endpoint):
            token = self._ask_token()
        if token and not (token.isascii() and token.isprintable()):
            # Said here, without it: HTTP's own complaint would quote it.
            raise AgentError(Reason.UNAUTHORIZED, "the token holds characters no header can carry")
        return token or None

    def _list(self, ref: ModelRef) -> Listing:
        self._refuse_offline(ref)
        address = _parse(ref.uri)
        token = self._token()
        with (
            _hub_errors(ref.uri, self._endpoint),
            bounded(
                self._endpoint,
                authorities=self._authorities,
                answer_seconds=self._answer_seconds,
                seconds=self._listing_seconds,
            ),
        ):
            api = HfApi(endpoint=self._endpoint, token=token or False)
            commit = api.model_info(address.repo, revision=address.revision).sha
            if commit is None or not _COMMIT.fullmatch(commit):
                raise ValueError("it names no commit")
            tree = api.list_repo_tree(address.repo, recursive=True, revision=commit)
            files = [_checked(item) for item in tree if isinstance(item, RepoFile)]
            if sum(map(_size, files)) >= _SIZES:
                raise ValueError("it lists more bytes than there can be")
        published = ((file, address.published(file.path)) for file in files)
        found = [_remote(file, path) for file, path in published if path is not None]
        if files and not found:
            raise AgentError(
                Reason.FILE_NOT_FOUND, f"{address.repo} at {commit} has no {address.below}"
            )
        return pin(ref, commit, found)


def _parse(uri: str) -> _Address:
    match = _URI.fullmatch(uri)
    below = match["below"] if match else None
    revision = unquote(match["revision"] or "") if match else ""
    odd = below is not None and not {"", ".", ".."}.isdisjoint(_names(below))
    odd = odd or revision == "." or ".." in revision or not is_one_line(uri + revision)
    if match is None or odd:
        raise AgentError(
            Reason.INVALID_SPEC, f"{uri[:200]!r} must be hf://owner/name[:revision][/path]"
        )
    try:
        validate_repo_id(match["repo"])
    except HFValidationError as error:
        raise AgentError(Reason.INVALID_SPEC, f"{uri[:200]!r}: {str(error)[:200]}") from error
    return _Address(match["repo"], revision or None, (below or "").rstrip("/"))


def _names(below: str) -> list[str]:
    """The names of a path; one slash at its end is how a directory is written."""
    return below.removesuffix("/").split("/")


def _checked(file: RepoFile) -> RepoFile:
    size, digest = _size(file), _digest(file)
    if not isinstance(file.path, str):
        raise ValueError("it lists a file without a name")
    if type(size) is not int or not 0 <= size < _SIZES:
        raise ValueError(f"it lists the size {size!r:.40} for {file.path!r:.80}")
    if not isinstance(digest.hex, str) or not _HEX[digest.algorithm].fullmatch(digest.hex):
        raise ValueError(
            f"it lists the {digest.algorithm} {digest.hex!r:.80} for {file.path!r:.80}"
        )
    return file


def _size(file: RepoFile) -> int:
    return file.size if file.lfs is None else file.lfs.size


def _digest(file: RepoFile) -> Digest:
    if file.lfs is None:
        return Digest("git-sha1", file.blob_id)
    return Digest("sha256", file.lfs.sha256)


def _remote(file: RepoFile, path: str) -> RemoteFile:
    return RemoteFile(path=path, size=_size(file), origin=file.path, digest=_digest(file))


@contextmanager
def _hub_errors(uri: str, endpoint: str) -> Iterator[None]:
    """Map what the hub's client raises to reasons. Its own messages may quote a whole page."""
    try:
        yield
    except GatedRepoError as error:
        raise AgentError(Reason.GATED, f"{uri}: access to it must be granted first") from error
    except RepositoryNotFoundError as error:
        raise AgentError(
            Reason.REPOSITORY_NOT_FOUND, f"{uri}: {endpoint} has no such repository for us"
        ) from error
    except RevisionNotFoundError as error:
        raise AgentError(Reason.REVISION_NOT_FOUND, f"{uri}: no such revision") from error
    except EntryNotFoundError as error:
        raise AgentError(Reason.FILE_NOT_FOUND, f"{uri}: no such path") from error
    except DisabledRepoError as error:
        raise AgentError(
            Reason.REPOSITORY_NOT_FOUND, f"{uri}: {endpoint} has disabled this repository"
        ) from error
    except HfHubHTTPError as error:
        raise _of_status(error, uri, endpoint) from error
    except ImportError as error:  # of the client's HTTP library, for a SOCKS proxy
        raise AgentError(Reason.UNSUPPORTED, f"{str(error)[:200]}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise AgentError(Reason.NETWORK, f"cannot reach {endpoint}: {str(error)[:200]}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise AgentError(
            Reason.BAD_RESPONSE, f"{endpoint} does not answer like a hub: {error!r:.200}"
        ) from error


def _of_status(error: HfHubHTTPError, uri: str, endpoint: str) -> AgentError:
    status = error.response.status_code if error.response is not None else 0
    said = f"{uri}: {endpoint} answers {status}"
    if status in (401, 403):
        return AgentError(Reason.UNAUTHORIZED, said)
    if status == 404:
        return AgentError(Reason.REPOSITORY_NOT_FOUND, said)
    if status in (408, 429) or status >= 500:
        reason = Reason.RATE_LIMITED if status == 429 else Reason.SERVER_ERROR
        seconds = retry_after_seconds(error.response.headers.get("Retry-After"), now=time.time())
        return AgentError(reason, said, retry_after_seconds=seconds)
    return AgentError(Reason.BAD_RESPONSE, said)
