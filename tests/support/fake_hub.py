"""A hub on 127.0.0.1 that serves directories as repositories (of datasets, where their id begins so) and counts the
bytes of their files that it gave away."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repository:
    """A directory at one commit; `lfs`: whether its safetensors are stored as the hub stores large files; `hashes`: of
    files too large to read."""

    directory: Path
    lfs: bool = True
    gated: bool = False
    hashes: Mapping[str, str] = field(default_factory=dict)
    commit: str = COMMIT

    def files(self) -> list[str]:
        return sorted(
            path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*") if path.is_file()
        )

    def size(self, name: str) -> int:
        return (self.directory / name).stat().st_size

    def sha256(self, name: str) -> str | None:
        """None for files that are kept in git."""
        if not self.lfs or not name.endswith(".safetensors"):
            return None
        return self.hashes.get(name) or _digest(self.directory / name)

    def etag(self, name: str) -> str:
        return self.sha256(name) or hashlib.sha1((self.directory / name).read_bytes()).hexdigest()


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Hub:
    """The server's address, its repositories by id, and by file name the bytes and requests it answered.

    Large files lie on another host, to which it redirects; `ranges`: whether that host serves parts of files.
    """

    endpoint: str
    ranges: bool = True
    repositories: dict[str, Repository] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)

    def served_weights(self) -> int:
        """Bytes of safetensors files, their headers included."""
        return sum(count for name, count in self.served.items() if name.endswith(".safetensors"))


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        is_elsewhere = parts[0] == "elsewhere"
        parts = parts[is_api + is_elsewhere :]
        kind = parts[0] if parts[0] in ("models", "datasets") else ""
        owner, name, *rest = [*parts[bool(kind) :], "", "", ""]
        repository = self.server.hub.repositories.get(f"{'datasets/' * (kind == 'datasets')}{owner}/{name}")
        what, revision, file = rest[0], rest[1], "/".join(rest[2:]).strip("/")
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif what in ("revision", "tree", "resolve") and revision not in ("main", repository.commit):
            self._refuse(404, "RevisionNotFound")
        elif is_api:
            self._send(
                200,
                json.dumps(_tree(repository) if what == "tree" else _info(f"{owner}/{name}", repository)).encode(),
                {},
                body,
            )
        elif repository.gated:
            self._refuse(403, "GatedRepo")
        elif file not in repository.files():
            self._refuse(404, "EntryNotFound")
        elif repository.sha256(file) and not is_elsewhere:
            place = self.server.hub.endpoint.replace("127.0.0.1", "localhost")
            self._send(302, b"", _facts(repository, file) | {"Location": f"{place}/elsewhere{self.path}"}, False)
        elif is_elsewhere and "Authorization" in self.headers:
            self._refuse(400, "a token left the hub")
        else:
            self._file(repository, file, body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code}, True)

    def _file(self, repository: Repository, name: str, body: bool) -> None:
        size, facts = repository.size(name), _facts(repository, name)
        if not body:
            return self._send(200, b"", facts, False, size)
        is_part = "Range" in self.headers and self.server.hub.ranges
        first, _, last = (self.headers["Range"] if is_part else "bytes=0-").removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last) + 1 if last else size, size)
        with (repository.directory / name).open("rb") as stream:
            stream.seek(begin)
            content = stream.read(end - begin)
        self.server.hub.served[name] += len(content)
        self.server.hub.requests[name] += 1
        self._send(
            206 if is_part else 200,
            content,
            facts | ({"Content-Range": f"bytes {begin}-{end - 1}/{size}"} if is_part else {}),
            True,
        )

    def _send(
        self, status: int, content: bytes, headers: Mapping[str, str], body: bool, length: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _facts(repository: Repository, name: str) -> dict[str, str]:
    etag, is_large = f'"{repository.etag(name)}"', repository.sha256(name) is not None
    return {"ETag": etag, "X-Repo-Commit": repository.commit} | (
        {"X-Linked-Etag": etag, "X-Linked-Size": str(repository.size(name))} if is_large else {}
    )


def _info(name: str, repository: Repository) -> dict:
    siblings = [
        {"rfilename": file, "size": repository.size(file), "blobId": "0" * 40} | _lfs(repository, file, "sha256")
        for file in repository.files()
    ]
    return {
        "_id": "0",
        "id": name,
        "modelId": name,
        "sha": repository.commit,
        "private": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }


def _tree(repository: Repository) -> list[dict]:
    return [
        {"type": "file", "path": file, "size": repository.size(file), "oid": "0" * 40} | _lfs(repository, file, "oid")
        for file in repository.files()
    ]


def _lfs(repository: Repository, file: str, key: str) -> dict:
    sha256 = repository.sha256(file)
    return {"lfs": {key: sha256, "size": repository.size(file), "pointerSize": 134}} if sha256 else {}


def reached(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on huggingface_hub asks this hub, and keeps what it gets in `cache`."""
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
