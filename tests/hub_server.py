"""A small Hub on 127.0.0.1: the endpoints from which huggingface_hub and datasets download, over real HTTP.

It answers as the Hub answers somebody who is not logged in: a repository that is not there and a gated file are both
401, told apart by X-Error-Code, while a gated repository's info and listing stay open.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet")  # what the Hub keeps in LFS, and so names by SHA-256
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|paths-info)/(?P<rest>.+))?"
)
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rest>[^/]+/.+)")


@dataclass(frozen=True, slots=True)
class Repo:
    id: str
    files: dict[str, bytes]
    sha: str
    gated: bool

    def entries(self) -> dict[str, dict[str, Any]]:
        """Every file and folder by path, as the tree and paths-info endpoints write them."""
        folders = {str(parent) for path in self.files for parent in Path(path).parents} - {"."}
        found: dict[str, dict[str, Any]] = {
            path: {"type": "directory", "path": path, "oid": _sha1(path.encode()), "size": 0} for path in folders
        }
        for path, content in self.files.items():
            found[path] = {"type": "file", "path": path, "oid": _sha1(content), "size": len(content)}
            if path.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                found[path]["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return dict(sorted(found.items()))


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`; `hub.requests` lists what was asked, e.g. `GET /api/...`."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.hangs_up = False  # without an answer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, name: str, files: dict[str, bytes] | Path, kind: str = "models", gated: bool = False) -> str:
        """Put a repository on the Hub (`kind`: models or datasets) -> its commit."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        sha = _sha1(b"".join(path.encode() + content for path, content in files.items()))
        self.repos[kind, name] = Repo(name, files, sha, gated)
        return sha

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {self.path}")
        if hub.hangs_up:
            self.close_connection = True
            return None
        path = urlsplit(self.path).path
        match = API.fullmatch(path) or FILE.fullmatch(path)
        if match is None:
            return self._refuse(404, "NotFound")
        repo = hub.repos.get(((match["kind"] or "models").rstrip("/"), match["id"]))
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        revision, _, inside = (match["rest"] or "main").partition("/")
        if unquote(revision) not in ("main", repo.sha):
            return self._refuse(404, "RevisionNotFound")
        if match.re is FILE:
            self._file(repo, unquote(inside))
        elif match["verb"] == "tree":
            self._tree(repo, unquote(inside), "recursive=true" in self.path.lower())
        elif match["verb"] == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            self._json([entry for path, entry in repo.entries().items() if path in wanted])
        else:
            siblings = [{"rfilename": path} for path in repo.files]
            gated = "manual" if repo.gated else False
            self._json({"id": repo.id, "sha": repo.sha, "private": False, "gated": gated, "siblings": siblings})

    do_HEAD = do_POST = do_GET

    def _tree(self, repo: Repo, folder: str, recursive: bool) -> None:
        inside = {path: entry for path, entry in repo.entries().items() if path.startswith(f"{folder}/") or not folder}
        if not inside:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repo.sha})
        depth = folder.count("/") + 1 if folder else 0
        self._json([entry for path, entry in inside.items() if recursive or path.count("/") == depth])

    def _file(self, repo: Repo, path: str) -> None:
        commit = {"X-Repo-Commit": repo.sha}
        if repo.gated:
            return self._refuse(403 if "Authorization" in self.headers else 401, "GatedRepo", commit)
        if path not in repo.files:
            return self._refuse(404, "EntryNotFound", commit)
        content, entry = repo.files[path], repo.entries()[path]
        if "lfs" in entry:
            commit |= {"X-Linked-ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        self._send(200, content, {"ETag": f'"{entry["oid"]}"', **commit})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b'{"error":"refused"}', {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
