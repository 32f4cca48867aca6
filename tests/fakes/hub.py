"""A Hugging Face hub in one process, over real loopback sockets.

    with Hub(tmp_path / "hub") as hub:
        commit = hub.add("acme/tiny", {"config.json": b"{}", "model.safetensors": weights})
        hub.fault("*.safetensors", Truncate(after=1000), times=1)
        snapshot_download("acme/tiny", endpoint=hub.endpoint, cache_dir=cache)
        assert len([r for r in hub.requests if r.origin == "cdn"]) == 2

or, as a process of its own for demos and benches:

    python -m tests.fakes.hub --root DIR --port 8080 --add acme/tiny=some/folder

It answers as the real hub does, down to the parts clients trip over: large files live on a second
origin (the "CDN") behind signed links that expire; the CDN has never heard of tokens and has an
ETag of its own, which is *not* the hub's sha256; metadata of a gated repository is public while its
files are not. `tests/contracts/test_hub.py` holds it to the real client.

It runs in a thread with its own event loop, so synchronous tests, asynchronous tests and child
processes can all talk to it. Each request is first *decided* (`_HubPages`, `_Cdn`: what would a
healthy server answer?), then given its fault, if any, and only then sent (`Delivery`).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import secrets
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from aiohttp import web

from tests import leaks
from tests.fakes.delivery import Answer, Delivery, Listener, Origin, Request, fault_for
from tests.fakes.faults import (
    Bytes,
    Corrupt,
    Dribble,
    Fault,
    Faults,
    File,
    IgnoreRange,
    Long,
    PartialAs200,
    Reset,
    Short,
    Slow,
    Stall,
    Status,
    Truncate,
    WrongListing,
    matches,
)

__all__ = [
    "Corrupt",
    "Dribble",
    "Fault",
    "Hub",
    "IgnoreRange",
    "Long",
    "PartialAs200",
    "Request",
    "Reset",
    "Short",
    "Slow",
    "Stall",
    "Status",
    "Truncate",
    "WrongListing",
    "lfs_by_default",
]

_LOOPBACK = "127.0.0.1"
_LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".model"})
_LFS_SIZE = 1 << 20

# Dates appear in answers only to fill the client's model; a fixed one keeps answers reproducible.
_DATE = "2024-01-01T00:00:00.000Z"


def lfs_by_default(path: str, size: int) -> bool:
    """What the real hub's `.gitattributes` template amounts to."""
    return Path(path).suffix in _LFS_SUFFIXES or size > _LFS_SIZE


# --- what the hub holds -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Blob:
    body: File
    oid: str
    """The git blob id; of the pointer, for an LFS file."""
    sha256: str | None = None
    """Set exactly for LFS files."""
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        return f'"{self.sha256 or self.oid}"'


@dataclass(frozen=True, slots=True)
class _Commit:
    id: str
    files: Mapping[str, _Blob]


@dataclass(slots=True)
class _Repo:
    id: str
    commits: dict[str, _Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: frozenset[str] | None = None
    """Tokens that may fetch files; None for everybody."""
    private: frozenset[str] | None = None
    """Tokens that may know of it; None for everybody."""
    raw: Sequence[Mapping[str, Any]] | None = None
    """What to list whatever the commit holds; None to list the commit."""

    def commit(self, revision: str) -> _Commit | None:
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(name)


@dataclass(frozen=True, slots=True)
class _Link:
    """Leave to fetch one file from the CDN; the signature is its key in `_State.links`."""

    file: str
    blob: _Blob
    expires: int


class _State:
    """Everything both origins and the test share. Values are published whole, under one lock."""

    def __init__(self, root: Path) -> None:
        self.lock = threading.RLock()
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, _Repo] = {}
        self.tokens: set[str] = {leaks.TOKEN}
        self.links: dict[str, _Link] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.cdn_saw_authorization = False

    def repo(self, repo_id: str) -> _Repo:
        with self.lock:
            return self.repos.setdefault(repo_id, _Repo(repo_id))

    def store(self, source: bytes | Path, *, lfs: bool) -> _Blob:
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        if lfs:
            sha256 = _digest("sha256", source)
            pointer = _pointer(sha256, size)
            oid = _git_oid(pointer)
            return _Blob(self._keep(source, sha256, size), oid, sha256, len(pointer))
        oid = _git_oid(source.read_bytes() if isinstance(source, Path) else source)
        return _Blob(self._keep(source, oid, size), oid)

    def _keep(self, source: bytes | Path, name: str, size: int) -> File:
        path = self.blobs / name
        if path.exists():
            return File(path, size)
        if isinstance(source, bytes):
            path.write_bytes(source)
            return File(path, size)
        try:
            os.link(source.resolve(), path)
        except OSError:  # Another file system, or not ours to link: serve it where it lies.
            return File(source.resolve(), size)
        return File(path, size)


def _digest(algorithm: str, source: bytes | Path) -> str:
    if isinstance(source, bytes):
        return hashlib.new(algorithm, source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _git_oid(data: bytes, kind: str = "blob") -> str:
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    version = "https://git-lfs.github.com/spec/v1"  # The format's name, fetched by nobody.
    return f"version {version}\noid sha256:{sha256}\nsize {size}\n".encode()


# --- deciding -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, reduced to what answers depend on."""

    path: str
    query: Mapping[str, list[str]]
    token: str | None

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("true", "1")


class _Refused(Exception):
    """An error the way the hub words it: a status, a code for machines, a message for people."""

    def __init__(self, status: int, message: str, *, code: str | None = None, commit: str = ""):
        super().__init__(message)
        headers = {"X-Error-Message": message, "Content-Type": "application/json; charset=utf-8"}
        if code is not None:
            headers["X-Error-Code"] = code
        if commit:
            headers["X-Repo-Commit"] = commit
        body = json.dumps({"error": message}).encode()
        self.answer = Answer(status, headers, Bytes(body))


class _HubPages:
    """The hub's own origin: the API, small files, and redirects to the CDN for large ones."""

    def __init__(self, state: _State, *, page_size: int, link_seconds: int) -> None:
        self._state = state
        self._page_size = page_size
        self._link_seconds = link_seconds
        self.endpoint = ""
        self.cdn_endpoint = ""

    def answer(self, asked: _Asked) -> Answer:
        # Split before decoding: `refs%2Fpr%2F1` is one segment.
        segments = [unquote(segment) for segment in asked.path.split("/")[1:]]
        if segments[:2] == ["api", "models"]:
            repo_id, verb, rest = _split(segments[2:], ("revision", "tree"))
            if verb == "tree" and rest:
                return self._tree(asked, repo_id, rest[0], "/".join(rest[1:]))
            if verb == "" or len(rest) == 1:
                return self._info(asked, repo_id, rest[0] if rest else "main")
        else:
            repo_id, verb, rest = _split(segments, ("resolve",))
            if verb and len(rest) > 1:
                return self._resolve(asked, repo_id, rest[0], "/".join(rest[1:]))
        raise _Refused(404, "Sorry, we can't find the page you are looking for.")

    def _repo(self, asked: _Asked, repo_id: str) -> _Repo:
        """The repository, if this caller may know that it exists."""
        if asked.token is not None and asked.token not in self._state.tokens:
            raise _Refused(401, "Invalid credentials in Authorization header")
        repo = self._state.repos.get(repo_id)
        if repo is not None and (repo.private is None or asked.token in repo.private):
            return repo
        # To a stranger the hub does not tell a missing repository from a private one.
        if asked.token is None:
            raise _Refused(401, "Invalid username or password.", code="RepoNotFound")
        raise _Refused(404, "Repository not found", code="RepoNotFound")

    def _commit(self, repo: _Repo, revision: str) -> _Commit:
        commit = repo.commit(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {_ascii(revision)}", code="RevisionNotFound")
        return commit

    def _info(self, asked: _Asked, repo_id: str, revision: str) -> Answer:
        repo = self._repo(asked, repo_id)
        commit = self._commit(repo, revision)
        blobs = asked.flag("blobs")
        entries = [e for e in self._entries(repo, commit, "", recursive=True) if _is_file(e)]
        entries = self._as_listed(repo, entries) if blobs else entries
        return _json(
            {
                "_id": _git_oid(repo_id.encode())[:24],
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit.id,
                "lastModified": _DATE,
                "createdAt": _DATE,
                "private": repo.private is not None,
                "gated": "manual" if repo.gated is not None else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [_sibling(entry, blobs=blobs) for entry in entries],
                "spaces": [],
                "usedStorage": sum(blob.body.size for blob in commit.files.values()),
            }
        )

    def _tree(self, asked: _Asked, repo_id: str, revision: str, folder: str) -> Answer:
        repo = self._repo(asked, repo_id)
        commit = self._commit(repo, revision)
        recursive = asked.flag("recursive")
        entries = self._entries(repo, commit, folder.rstrip("/"), recursive=recursive)
        if folder and not entries:
            raise _Refused(
                404,
                f'{_ascii(folder)} does not exist on "{_ascii(revision)}"',
                code="EntryNotFound",
                commit=commit.id,
            )
        start = int(asked.query.get("cursor", ["0"])[0])
        stop = start + min(self._page_size, int(asked.query.get("limit", [self._page_size])[0]))
        page = self._as_listed(repo, entries[start:stop])
        if asked.flag("expand"):
            page = [{**entry, **_expansion(entry, commit)} for entry in page]
        headers = {}
        if stop < len(entries):
            kept = {name: values[0] for name, values in asked.query.items()}
            following = urlencode({**kept, "cursor": str(stop)})
            headers["Link"] = f'<{self.endpoint}{asked.path}?{following}>; rel="next"'
        return _json(page, headers)

    def _entries(
        self, repo: _Repo, commit: _Commit, folder: str, *, recursive: bool
    ) -> list[dict[str, Any]]:
        if repo.raw is not None:
            return [dict(entry) for entry in repo.raw]
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            *parents, _name = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parents) + 1 if recursive else min(2, len(parents) + 1)):
                directory = prefix + "/".join(parents[:depth])
                if directory not in entries:
                    entries[directory] = _directory(directory, commit)
            if recursive or not parents:
                entries[path] = _file_entry(path, blob)
        return list(entries.values())

    def _as_listed(self, repo: _Repo, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """`entries` with the lies of `WrongListing`; only those really shown use the fault up."""
        return [self._misstated(repo, entry) if _is_file(entry) else entry for entry in entries]

    def _misstated(self, repo: _Repo, entry: dict[str, Any]) -> dict[str, Any]:
        fault = self._state.faults.take(
            url_path="",
            file=f"{repo.id}/{entry.get('path', '')}",
            fits=lambda fault: isinstance(fault, WrongListing),
        )
        if not isinstance(fault, WrongListing):
            return entry
        size = entry.get("size", 0) + fault.size_delta
        lfs = {"lfs": {**entry["lfs"], "size": size}} if "lfs" in entry else {}
        return {**entry, "size": size, **lfs}

    def _resolve(self, asked: _Asked, repo_id: str, revision: str, path: str) -> Answer:
        repo = self._repo(asked, repo_id)
        commit = self._commit(repo, revision)
        if repo.gated is not None and asked.token not in repo.gated:
            raise _gated(repo_id, anonymous=asked.token is None)
        blob = commit.files.get(path)
        if blob is None:
            raise _Refused(404, "Entry not found", code="EntryNotFound", commit=commit.id)
        file = f"{repo_id}/{path}"
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if blob.sha256 is None:
            headers["ETag"] = blob.etag
            return Answer(200, headers, blob.body, file, serves_file=True)
        # The ETag of a redirect would be that of the redirect, hence the two headers of their own.
        headers["X-Linked-ETag"] = blob.etag
        headers["X-Linked-Size"] = str(blob.body.size)
        headers["Location"] = self._link(file, blob)
        return Answer(302, headers, file=file)

    def _link(self, file: str, blob: _Blob) -> str:
        expires = int(time.time()) + self._link_seconds
        signature = secrets.token_hex(16)
        with self._state.lock:
            self._state.links[signature] = _Link(file, blob, expires)
        return f"{self.cdn_endpoint}/cdn/{blob.sha256}?expires={expires}&sig={signature}"


class _Cdn:
    """The other origin: bytes for whoever holds a signed link, and no idea who that is."""

    def __init__(self, state: _State) -> None:
        self._state = state

    def answer(self, asked: _Asked) -> Answer:
        signature = asked.query.get("sig", [""])[0]
        expires = asked.query.get("expires", [""])[0]
        with self._state.lock:
            link = self._state.links.get(signature)
        if (
            link is None
            or asked.path != f"/cdn/{link.blob.sha256}"
            or expires != str(link.expires)
            or link.expires < time.time()
        ):
            body = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
            return Answer(403, {"Content-Type": "application/xml"}, Bytes(body))
        headers = {"Accept-Ranges": "bytes", "ETag": _cdn_etag(link.blob)}
        return Answer(200, headers, link.blob.body, link.file, serves_file=True)


def _cdn_etag(blob: _Blob) -> str:
    """An object store's ETag: an md5 and a count of parts in looks, and never the sha256."""
    return f'"{hashlib.md5((blob.sha256 or "").encode()).hexdigest()}-1"'


def _split(segments: list[str], verbs: tuple[str, ...]) -> tuple[str, str, list[str]]:
    """Repository, verb and the rest; old repositories (`gpt2`) have no owner."""
    for at in (1, 2):
        if len(segments) > at and segments[at] in verbs:
            return "/".join(segments[:at]), segments[at], segments[at + 1 :]
    return "/".join(segments), "", []


def _gated(repo_id: str, *, anonymous: bool) -> _Refused:
    if anonymous:
        message = (
            f"Access to model {_ascii(repo_id)} is restricted. You must have access to it and be"
            " authenticated to access it. Please log in."
        )
        return _Refused(401, message, code="GatedRepo")
    message = (
        f"Access to model {_ascii(repo_id)} is restricted and you are not in the authorized list."
        " Visit the model page to ask for access."
    )
    return _Refused(403, message, code="GatedRepo")


def _ascii(text: str) -> str:
    """`text` fit for a header, whatever a client asked for."""
    return quote(text, safe="/ ")


def _json(value: object, headers: Mapping[str, str] | None = None) -> Answer:
    content_type = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(200, {**content_type, **(headers or {})}, Bytes(json.dumps(value).encode()))


def _is_file(entry: Mapping[str, Any]) -> bool:
    kind: object = entry.get("type", "file")
    return kind == "file"


def _directory(path: str, commit: _Commit) -> dict[str, Any]:
    # Any stable id will do: no client computes the ids of trees.
    oid = _git_oid(f"{commit.id}{path}".encode(), "tree")
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def _file_entry(path: str, blob: _Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.body.size, "path": path}
    if blob.sha256 is not None:
        entry["lfs"] = {
            "oid": blob.sha256,
            "size": blob.body.size,
            "pointerSize": blob.pointer_size,
        }
    return entry


def _sibling(entry: Mapping[str, Any], *, blobs: bool) -> dict[str, Any]:
    """A tree entry the way `siblings` spells it (there, `lfs.oid` is called `lfs.sha256`)."""
    sibling: dict[str, Any] = {"rfilename": entry.get("path")}
    if not blobs:
        return sibling
    sibling |= {"blobId": entry.get("oid"), "size": entry.get("size")}
    if lfs := entry.get("lfs"):
        sibling["lfs"] = {
            "sha256": lfs.get("oid"),
            "size": lfs.get("size"),
            "pointerSize": lfs.get("pointerSize"),
        }
    return sibling


def _expansion(entry: Mapping[str, Any], commit: _Commit) -> dict[str, Any]:
    last_commit = {"id": commit.id, "title": "Upload", "date": _DATE}
    if not _is_file(entry):
        return {"lastCommit": last_commit}
    scan = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return {"lastCommit": last_commit, "securityFileStatus": scan}


# --- the hub ------------------------------------------------------------------------------------


class Hub:
    """See the module. All methods may be called from any thread, whether it is started or not.

    `page_size` bounds a page of a tree listing, `link_seconds` is how long CDN links are good for;
    port 0 means any, chosen at the first start and kept for the later ones. With `tls` both origins
    speak it, as `localhost`.
    """

    def __init__(
        self,
        root: Path,
        *,
        page_size: int = 1000,
        link_seconds: int = 3600,
        port: int = 0,
        cdn_port: int = 0,
        host: str = _LOOPBACK,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = tls
        self._host = host
        self._state = _State(root)
        self._pages = _HubPages(self._state, page_size=page_size, link_seconds=link_seconds)
        self._cdn = _Cdn(self._state)
        self._ports = (port, cdn_port)
        self._running: tuple[threading.Thread, asyncio.AbstractEventLoop, asyncio.Event] | None
        self._running = None

    def __repr__(self) -> str:
        return f"<Hub {self.endpoint or 'not started'} repos={sorted(self._state.repos)}>"

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """Where the hub is, or was before it was stopped."""
        return self._pages.endpoint

    @property
    def cdn_endpoint(self) -> str:
        return self._pages.cdn_endpoint

    # Contents

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        branch: str = "main",
        lfs: Callable[[str, int], bool] = lfs_by_default,
    ) -> str:
        """Commit exactly `files` (what is not named is deleted) to `branch`; return the commit.

        The id follows from the content and the history: the same steps give the same ids, and
        content that is already at the head makes no new commit. A `Path` is hard-linked where
        possible, so it may be removed afterwards but must not be written to.
        """
        blobs = {
            path: self._state.store(source, lfs=lfs(path, _size(source)))
            for path, source in files.items()
        }
        repo = self._state.repo(repo_id)
        with self._state.lock:
            head = repo.commits.get(repo.branches.get(branch, ""))
            if head is not None and head.files == blobs:
                return head.id
            lines = [f"parent {head.id}" if head else "root"]
            lines += [f"{blob.oid} {path}" for path, blob in sorted(blobs.items())]
            commit = _Commit(_git_oid("\n".join(lines).encode(), "commit"), blobs)
            repo.commits[commit.id] = commit
            repo.branches[branch] = commit.id
            return commit.id

    def tag(self, repo_id: str, name: str, commit: str) -> None:
        repo = self._state.repo(repo_id)
        if commit not in repo.commits:
            raise ValueError(f"{repo_id} has no commit {commit}")
        repo.tags[name] = commit

    def raw_tree(self, repo_id: str, entries: Iterable[Mapping[str, Any]] | None) -> None:
        """List these entries as they are, at every revision, whatever there is; None undoes it.

        Their files can not be downloaded unless they were also added.
        """
        repo = self._state.repo(repo_id)
        if not repo.branches:
            self.add(repo_id, {})
        repo.raw = None if entries is None else tuple(entries)

    # Access

    def accept(self, *tokens: str) -> None:
        """Make these tokens those of some account. Tokens of no account get 401 everywhere."""
        self._state.tokens.update(tokens)

    def gate(self, repo_id: str, *, tokens: Iterable[str] = ()) -> None:
        """Anybody may list the repository, but only these tokens fetch its files."""
        repo = self._state.repo(repo_id)
        repo.gated = frozenset(tokens)
        self.accept(*repo.gated)

    def private(self, repo_id: str, *, tokens: Iterable[str] = ()) -> None:
        """To all but these tokens, the repository does not exist."""
        repo = self._state.repo(repo_id)
        repo.private = frozenset(tokens)
        self.accept(*repo.private)

    def expire_links(self) -> None:
        """Make the CDN answer 403 to every link given out so far."""
        with self._state.lock:
            self._state.links.clear()

    # Faults

    def fault(self, glob: str, fault: Fault, *, times: int | None = None) -> None:
        """Misbehave on what matches `glob`, the next `times` times or (None) for ever.

        `*.safetensors`, `owner/name/config.json` and so on match the GET that carries the bytes of
        that file, wherever it is served from; for `WrongListing`, each time it is listed with a
        size. With a leading slash the glob matches URL paths, for the rest: `/api/*`, or
        `/*/resolve/*` for redirects and HEADs. Of several faults that fit, the oldest is used.
        """
        self._state.faults.add(glob, fault, times=times)

    def clear_faults(self) -> None:
        self._state.faults.clear()

    # Evidence

    @property
    def requests(self) -> list[Request]:
        """Requests so far, in the order they came in, those still being answered included."""
        with self._state.lock:
            return [replace(request) for request in self._state.requests]

    @property
    def cdn_saw_authorization(self) -> bool:
        """Whether a client ever gave its token away; not forgotten by `clear`."""
        return self._state.cdn_saw_authorization

    def clear(self) -> None:
        """Forget the requests, not the faults."""
        with self._state.lock:
            self._state.requests.clear()

    def bytes_sent(self, glob: str = "*") -> int:
        """Bytes of bodies sent for files (with a leading slash: URL paths) that match `glob`.

        Error pages do not count.
        """
        return sum(
            request.bytes_sent
            for request in self.requests
            if request.status < 400 and matches(glob, url_path=request.path, file=request.file)
        )

    # Life

    def start(self) -> None:
        """Listen, on the ports of last time if there was one; returns when both ports answer."""
        if self._running is not None:
            return
        ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(ready)), name="fake-hub", daemon=True
        )
        thread.start()
        try:
            loop, stop = ready.result()
        except BaseException:
            thread.join()
            raise
        self._running = (thread, loop, stop)

    def stop(self) -> None:
        """Drop all connections, answered or not, and refuse new ones. Does nothing twice."""
        if self._running is None:
            return
        thread, loop, stop = self._running
        self._running = None
        loop.call_soon_threadsafe(stop.set)
        thread.join()

    async def _serve(self, ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        async def on_hub(request: web.BaseRequest) -> web.StreamResponse:
            return await self._handle(request, "hub", self._pages.answer)

        async def on_cdn(request: web.BaseRequest) -> web.StreamResponse:
            return await self._handle(request, "cdn", self._cdn.answer)

        listeners = [Listener(on_hub, self._tls), Listener(on_cdn, self._tls)]
        stop = asyncio.Event()
        try:
            try:
                ports = [
                    await listener.listen(self._host, port)
                    for listener, port in zip(listeners, self._ports, strict=True)
                ]
            except OSError as error:
                ready.set_exception(error)
                return
            self._ports = (ports[0], ports[1])
            site = f"http://{self._host}" if self._tls is None else "https://localhost"
            self._pages.endpoint = f"{site}:{ports[0]}"
            self._pages.cdn_endpoint = f"{site}:{ports[1]}"
            ready.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()
        finally:
            for listener in listeners:
                await listener.close()

    async def _handle(
        self, request: web.BaseRequest, origin: Origin, decide: Callable[[_Asked], Answer]
    ) -> web.StreamResponse:
        path, _, query = request.raw_path.partition("?")
        authorization = request.headers.get("Authorization")
        record = Request(request.method, origin, path, request.headers.get("Range"), authorization)
        with self._state.lock:
            self._state.requests.append(record)
            self._state.cdn_saw_authorization |= origin == "cdn" and authorization is not None
        try:
            if request.method not in ("GET", "HEAD"):
                raise _Refused(405, f"{request.method} is not for reading")
            answer = decide(_Asked(path, parse_qs(query), _token(authorization)))
        except _Refused as refused:
            answer = refused.answer
        record.file = answer.file
        fault = fault_for(self._state.faults, request, answer, path)
        return await Delivery(request, record).send(answer, fault)


def _size(source: bytes | Path) -> int:
    return source.stat().st_size if isinstance(source, Path) else len(source)


def _token(authorization: str | None) -> str | None:
    return None if authorization is None else authorization.removeprefix("Bearer ").strip()


# --- as a process -------------------------------------------------------------------------------


def _folder(argument: str) -> tuple[str, dict[str, bytes | Path]]:
    """`owner/name=DIR` as a repository and its files."""
    repo_id, equals, folder = argument.partition("=")
    root = Path(folder)
    if not equals or not root.is_dir():
        raise argparse.ArgumentTypeError(f"{argument!r} is not owner/name=DIR")
    files = (path for path in root.rglob("*") if path.is_file())
    return repo_id, {path.relative_to(root).as_posix(): path for path in files}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve folders until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.hub", description=main.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="where blobs are kept")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cdn-port", type=int, default=0, help="any free one unless given")
    parser.add_argument(
        "--add", type=_folder, action="append", default=[], metavar="OWNER/NAME=DIR"
    )
    options = parser.parse_args(arguments)
    ends = {signal.SIGTERM, signal.SIGINT}
    # Blocked before the server's thread starts, which inherits the mask: only `sigwait` sees them.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    hub = Hub(options.root, port=options.port, cdn_port=options.cdn_port)
    for repo_id, files in options.add:
        hub.add(repo_id, files)
    with hub:
        print(f"hub ready at {hub.endpoint}", flush=True)
        signal.sigwait(ends)


if __name__ == "__main__":
    main()
