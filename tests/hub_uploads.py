"""The part of the small Hub that takes uploads: login, a new repository, LFS, the commit; and connections that break.

`with UploadServer() as hub:`; whoever sends `hub.token` is `hub.user`. `hub.drops` names requests during which the
connection is lost, half of the body read: `hub.drops["PUT"] = 1` loses the first upload of a large file.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from tests.hub_server import API, LARGE, HubServer, Repo, _Handler

USER, TOKEN = "ada", "hf_PlantedTokenThatMayAppearNowhere0"
UPLOAD = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<verb>preupload|commit)/main")
BATCH = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


class UploadServer(HubServer):
    def __init__(self) -> None:
        super().__init__()
        self._server.RequestHandlerClass = _Uploads
        self.blobs: dict[str, bytes] = {}  # LFS content by SHA-256
        self.private: set[str] = set()
        self.drops: Counter[str] = Counter()
        self.bodies: list[bytes] = []

    def files(self, name: str) -> dict[str, bytes]:
        return self.repos["models", name].files


class _Uploads(_Handler):
    @property
    def hub(self) -> UploadServer:
        return self.server.hub  # type: ignore[attr-defined]

    def _body(self, lost: str) -> bytes | None:
        """The request's body, or None where the connection is to be lost."""
        length = int(self.headers.get("Content-Length", 0))
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.drops[lost] > 0:
            self.hub.drops[lost] -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return None
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return b"".join(iter(self._chunk, b""))
        return self.rfile.read(length)

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        content = self.rfile.read(size)
        self.rfile.readline()
        return content

    def _logged_in(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._refuse(401, "Unauthorized")
        return False

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/whoami-v2":
            if self._logged_in():
                self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
            return
        match = API.fullmatch(path)
        repo = self.hub.repos.get(("models", match["id"])) if match and match["verb"] is None else None
        if repo is None:
            return super().do_GET()
        self._json(self._info(repo))

    def _info(self, repo: Repo) -> dict[str, Any]:
        card = repo.files.get("README.md", b"").decode()
        data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        siblings = [{"rfilename": path} for path in repo.files]
        return {
            "id": repo.id, "sha": repo.sha, "private": repo.id in self.hub.private, "siblings": siblings,
            "tags": data.get("tags", []), "cardData": data,
        }  # fmt: skip

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        if "/paths-info/" in path:
            return super().do_GET()
        upload, batch = UPLOAD.fullmatch(path), BATCH.fullmatch(path)
        body = self._body(upload["verb"] if upload else path)
        if body is None:
            return
        self.hub.bodies.append(body)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not self._logged_in():
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif batch:
            self._json({"transfer": "basic", "objects": [self._action(one) for one in json.loads(body)["objects"]]})
        elif upload and upload["id"].split("/")[0] != USER:
            self._refuse(403, "Forbidden")
        elif upload and upload["verb"] == "preupload":
            self._json({"files": [self._mode(one) for one in json.loads(body)["files"]]})
        elif upload:
            self._commit(upload["id"], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, "NotFound")

    def do_PUT(self) -> None:
        body = self._body("PUT")
        if body is None:
            return
        assert "Authorization" not in self.headers, "the token is not for the storage"
        name = unquote(self.path).rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != name:
            return self._refuse(400, "WrongContent")
        self.hub.blobs[name] = body
        self._send(200, b"", {})

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked["organization"] or USER
        name = f"{owner}/{asked['name']}"
        if owner != USER:
            return self._refuse(403, "Forbidden")
        if ("models", name) in self.hub.repos:
            return self._refuse(409, "Conflict")
        self.hub.add(name, {".gitattributes": b""})
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((*LARGE, ".gguf", ".png"))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _action(self, file: dict[str, Any]) -> dict[str, Any]:
        if file["oid"] in self.hub.blobs:
            return file
        return file | {"actions": {"upload": {"href": f"{self.hub.url}/storage/{file['oid']}"}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.files(name))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.add(name, files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})
