"""`hf://owner/name[:revision][/path/below]`: a model of a Hugging Face hub.

The listing comes from `huggingface_hub`; the bytes are plain HTTPS from `resolve/<commit>/<path>`,
which answers with the file or with a signed link to a CDN (Xet files too). LFS files are promised
by SHA-256, all others by their git blob name. A revision with a slash is written `refs%2Fpr%2F1`.
A path below the repository names a directory, or one file, which is then published under its own
name. Read from the environment: HF_ENDPOINT, HF_TOKEN (or the token file under HF_HOME).
"""

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote, unquote

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from agent.backoff import retry_after_seconds
from agent.errors import AgentError, Reason
from agent.model import Digest, HttpLocator, Listing, Locator, ModelRef, RemoteFile
from agent.sources.base import pin

_URI = re.compile(r"hf://(?P<repo>[^/:]+/[^/:]+)(?::(?P<revision>[^/]*))?(?:/(?P<below>.*))?")
_LISTING_SECONDS = 30.0
_DEFAULT_ENDPOINT = "https://huggingface.co"


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

    def __init__(self, endpoint: str, token: Callable[[], str | None]) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = token

    @classmethod
    def from_environment(cls) -> "HuggingFace":
        return cls(os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT, get_token)

    def check(self, ref: ModelRef) -> None:
        _parse(ref.uri)

    async def list(self, ref: ModelRef) -> Listing:
        # The client is synchronous; one listing is one thread for a second or two.
        return await asyncio.to_thread(self._list, ref)

    async def locate(self, listing: Listing, file: RemoteFile) -> Locator:
        address = _parse(listing.ref.uri)
        path = quote(address.origin(file))
        token = await asyncio.to_thread(self._token)
        return HttpLocator(
            url=f"{self._endpoint}/{address.repo}/resolve/{quote(listing.revision)}/{path}",
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )

    def _list(self, ref: ModelRef) -> Listing:
        address = _parse(ref.uri)
        with _hub_errors(ref.uri, self._endpoint):
            api = HfApi(endpoint=self._endpoint, token=self._token() or False)
            info = api.model_info(address.repo, revision=address.revision, timeout=_LISTING_SECONDS)
            if info.sha is None:
                raise AgentError(Reason.BAD_RESPONSE, f"{self._endpoint} names no commit")
            tree = api.list_repo_tree(address.repo, recursive=True, revision=info.sha)
            files = [item for item in tree if isinstance(item, RepoFile)]
        found = [_remote(file, path) for file in files if (path := address.published(file.path))]
        if files and not found:
            raise AgentError(
                Reason.FILE_NOT_FOUND, f"{address.repo} at {info.sha} has no {address.below}"
            )
        return pin(ref, info.sha, found)


def _parse(uri: str) -> _Address:
    match = _URI.fullmatch(uri)
    if match is None or (match["below"] is not None and not match["below"].strip("/")):
        raise AgentError(
            Reason.INVALID_SPEC, f"{uri[:200]!r} must be hf://owner/name[:revision][/path]"
        )
    revision = unquote(match["revision"]) if match["revision"] else None
    return _Address(match["repo"], revision, (match["below"] or "").strip("/"))


def _remote(file: RepoFile, path: str) -> RemoteFile:
    if file.lfs is not None:
        size, digest = file.lfs.size, Digest("sha256", file.lfs.sha256)
    else:
        size, digest = file.size, Digest("git-sha1", file.blob_id)
    return RemoteFile(path=path, size=size, origin=file.path, digest=digest)


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
    except HFValidationError as error:
        raise AgentError(Reason.INVALID_SPEC, f"{uri}: {str(error)[:200]}") from error
    except HfHubHTTPError as error:
        raise _of_status(error, uri, endpoint) from error
    except httpx2.TimeoutException as error:
        raise AgentError(Reason.STALLED, f"{endpoint} did not answer in time") from error
    except (httpx2.HTTPError, OSError) as error:
        raise AgentError(Reason.NETWORK, f"cannot reach {endpoint}: {str(error)[:200]}") from error
    except (KeyError, TypeError, ValueError) as error:
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
