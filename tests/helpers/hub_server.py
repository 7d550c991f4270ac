"""A hub on loopback for tests: models in folders, asked for as Hugging Face's are, with faults."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

_INFO = re.compile(r"/api/models/(?P<repo>.+?)(?:/revision/(?P<revision>.+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+|[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_REPO = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
_PREUPLOAD, _COMMIT = re.compile(f"{_REPO}/preupload/main"), re.compile(f"{_REPO}/commit/main")
_BATCH = re.compile(r"(?:/datasets)?/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_LARGE = (".bin", ".safetensors", ".pt")  # what a hub keeps with Git LFS


@dataclass
class Hub:
    """The models that are served, what is to go wrong, and what was asked."""

    url: str = ""
    models: dict[str, Path] = field(default_factory=dict)  # by id
    gated: set[str] = field(default_factory=set)
    cut_after: int | None = None  # bytes of a response after which the connection ends, once
    corrupt: bool = False  # large files come with one other byte
    busy: bool = False  # every answer is 503
    ranges: bool = True
    cdn: bool = False  # large files are at another address, to which the hub redirects
    etags: dict[str, str] = field(default_factory=dict)  # what the listing says instead, by file
    tokens: list[tuple[str, str]] = field(default_factory=list)  # (path, Authorization) of what had one
    uploads: Path | None = None  # where models and data sets that are uploaded go; nobody may if unset
    datasets: dict[str, Path] = field(default_factory=dict)  # by id
    private: set[str] = field(default_factory=set)  # what was made so
    write_token: str = ""  # that uploads have to come with
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range

    def commit(self, repo: str) -> str:
        """Return a hash that changes with the files, as a commit's does."""
        digest = hashlib.sha1()
        for path in self.files(repo):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def files(self, repo: str) -> list[Path]:
        return sorted(path for path in self.models[repo].rglob("*") if path.is_file())

    def asked(self, method: str, ending: str) -> list[str]:
        """Return the ranges of the requests for files with an ending."""
        return [span for verb, path, span in self.requests if verb == method and path.endswith(ending)]


def etag(path: Path) -> str:
    """Return sha256 of a large file's bytes, git's sha1 of another's."""
    data = path.read_bytes()
    if path.suffix in _LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        path, body = self._received()
        if not self._may_write():
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif _PREUPLOAD.fullmatch(path):
            files = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith((*_LARGE, ".tar")) else "regular",
                    "shouldIgnore": False,
                }
                for item in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif _BATCH.fullmatch(path):
            found = json.loads(body)["objects"]
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
                for item in found
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif (commit := _COMMIT.fullmatch(path)) is not None:
            self._commit(commit["kind"], commit["repo"], body)
        else:
            self._send(404, b"", {})

    def do_PUT(self) -> None:
        path, body = self._received()
        assert self.hub.uploads is not None
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(422, b"", {})
            return
        (self.hub.uploads / oid).write_bytes(body)
        self._send(200, b"", {})

    def _received(self) -> tuple[str, bytes]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, ""))
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return path, b"".join(parts)
        return path, self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def _may_write(self) -> bool:
        token = self.headers.get("Authorization", "")
        if self.hub.uploads is None or token != f"Bearer {self.hub.write_token}":
            self._send(401, b'{"error": "Invalid username or password."}', {})
            return False
        return True

    def _repos(self, kind: str) -> dict[str, Path]:
        return self.hub.datasets if kind.startswith("dataset") else self.hub.models

    def _create(self, asked: dict[str, Any]) -> None:
        kind, repo = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        assert self.hub.uploads is not None
        folder = self.hub.uploads / kind / repo
        folder.mkdir(parents=True, exist_ok=True)
        self._repos(kind)[repo] = folder
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        prefix = "datasets/" if kind == "dataset" else ""
        self._json({"url": f"{self.hub.url}/{prefix}{repo}", "name": repo, "id": "1"})

    def _commit(self, kind: str, repo: str, body: bytes) -> None:
        assert self.hub.uploads is not None
        folder = self._repos(kind)[repo]
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] not in ("file", "lfsFile"):
                continue
            value = item["value"]
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if item["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            else:
                path.write_bytes((self.hub.uploads / value["oid"]).read_bytes())
        oid = "1" * 40
        prefix = "datasets/" if kind == "datasets" else ""
        url = f"{self.hub.url}/{prefix}{repo}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if token := self.headers.get("Authorization"):
            self.hub.tokens.append((path, token))
        if self.hub.busy:
            self._send(503, b"", {})
        elif (info := _INFO.fullmatch(path)) is not None:
            self._info(info["repo"], info["revision"] or "main")
        elif (file := _FILE.fullmatch(path)) is not None:
            self._file(file["repo"], file["revision"], file["name"], with_body=with_body)
        elif path.startswith("/cdn/"):
            repo, _, name = path.removeprefix("/cdn/").partition("/-/")
            self._body((self.hub.models[repo] / name), {}, with_body=with_body)
        else:
            self._send(404, b"", {})

    def _known(self, repo: str, revision: str) -> bool:
        if repo not in self.hub.models:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
            return False
        if revision not in ("main", self.hub.commit(repo)):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"})
            return False
        return True

    def _info(self, repo: str, revision: str) -> None:
        if not self._known(repo, revision):
            return
        siblings = []
        for path in self.hub.files(repo):
            item: dict[str, Any] = {
                "rfilename": str(path.relative_to(self.hub.models[repo])),
                "size": path.stat().st_size,
                "blobId": etag(path) if path.suffix not in _LARGE else "0" * 40,
            }
            if path.suffix in _LARGE:
                sha256 = self.hub.etags.get(path.name, etag(path))
                item["lfs"] = {"sha256": sha256, "size": path.stat().st_size, "pointerSize": 134}
            siblings.append(item)
        body = {"id": repo, "modelId": repo, "sha": self.hub.commit(repo), "siblings": siblings, "tags": []}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str, *, with_body: bool) -> None:
        if not self._known(repo, revision):
            return
        if repo in self.hub.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            return
        path = self.hub.models[repo] / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no entry"})
            return
        data = path.read_bytes()
        headers = {
            "ETag": f'"{etag(path)}"',
            "X-Repo-Commit": self.hub.commit(repo),
            "X-Linked-Etag": f'"{etag(path)}"',
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        if self.hub.cdn and path.suffix in _LARGE:
            port = urlsplit(self.hub.url).port
            self._send(302, b"", headers | {"Location": f"http://localhost:{port}/cdn/{repo}/-/{name}"})
            return
        self._body(path, headers, with_body=with_body)

    def _body(self, path: Path, headers: dict[str, str], *, with_body: bool) -> None:
        data = path.read_bytes()
        if self.hub.corrupt and path.suffix in _LARGE:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, span = 200, self.headers.get("Range", "")
        if span and self.hub.ranges:
            start = int(span.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        self._send(status, data, headers, with_body=with_body, is_large=path.suffix in _LARGE)

    def _send(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str],
        *,
        with_body: bool = True,
        is_large: bool = False,
    ) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if not with_body:
            return
        cut = self.hub.cut_after
        if is_large and cut is not None and cut < len(data):
            self.hub.cut_after = None
            self.wfile.write(data[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(data)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Yield a hub; `hub.url` is what HF_ENDPOINT takes."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask_here(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process ask the hub, and keep what it gives in a cache of its own."""
    from huggingface_hub import constants

    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
