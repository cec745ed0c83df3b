"""A small server like Hugging Face's hub, as far as huggingface_hub and regraft ask it: repositories, ranges, commits.

Weights are behind a redirect, as at the hub; a repository may be gated. Every request is kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from local_server import listening

TOKEN = "hf_good"


@dataclass
class Hub:
    """What it holds: repositories, each a list of commits, the last one current; and what it was asked."""

    repositories: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    refuses: int = 0
    """How many of the next answers are 503."""
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def sha(self, repository: str) -> str:
        count = len(self.repositories[repository])
        return hashlib.sha1(f"{repository} {count}".encode()).hexdigest()

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories[repository][-1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _begin(self) -> tuple[list[str], bytes] | None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.requests.append((self.command, unquote(parts.path)))
        if self.hub.refuses:
            self.hub.refuses -= 1
            self._answer(503)
            return None
        return [unquote(each) for each in parts.path.strip("/").split("/")], body

    def _who(self) -> str | None:
        told = self.headers.get("Authorization", "")
        return "somebody" if told == f"Bearer {TOKEN}" else None

    def _missing(self, repository: str) -> bool:
        if repository not in self.hub.repositories:
            self._answer(
                404 if self._who() else 401, {"error": "not found"}, X_Error_Code="RepoNotFound"
            )
            return True
        if repository in self.hub.gated and not self._who():
            self._answer(401, {"error": "gated"}, X_Error_Code="GatedRepo")
            return True
        return False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        begun = self._begin()
        if begun is None:
            return
        path, _ = begun
        if path == ["api", "whoami-v2"]:
            known = self._who()
            self._answer(200 if known else 401, {"name": known, "type": "user", "orgs": []})
        elif path[0] == "cdn":
            self._ranged("/".join(path[1:3]), "/".join(path[3:]))
        elif path[:2] == ["api", "models"]:
            repository = "/".join(path[2:4])
            if self._missing(repository):
                return
            files = self.hub.files(repository)
            if path[4:5] == ["tree"]:
                rows = [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for name, data in sorted(files.items())
                ]
                self._answer(200, rows)
            elif path[4:5] == ["revision"] and path[5] not in ("main", self.hub.sha(repository)):
                self._answer(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
            else:
                self._answer(
                    200, {"id": repository, "sha": self.hub.sha(repository), "siblings": []}
                )
        elif path[2:3] == ["resolve"]:
            repository, name = "/".join(path[:2]), "/".join(path[4:])
            if self._missing(repository):
                return
            if name not in self.hub.files(repository):
                self._answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound")
            elif name.endswith(".safetensors"):
                where = f"{self.hub.url}/cdn/{repository}/{name}"
                self._answer(302, Location=where, X_Repo_Commit=self.hub.sha(repository))
            else:
                self._ranged(repository, name)
        else:
            self._answer(404)

    def _ranged(self, repository: str, name: str) -> None:
        data = self.hub.files(repository)[name]
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not first:
            self._answer(200, data, ETag=tag)
            return
        if int(first) >= len(data):
            self._answer(416, Content_Range=f"bytes */{len(data)}")
            return
        part = data[int(first) : int(last) + 1 if last else None]
        end = int(first) + len(part) - 1
        self._answer(206, part, ETag=tag, Content_Range=f"bytes {first}-{end}/{len(data)}")

    def do_POST(self) -> None:
        begun = self._begin()
        if begun is None:
            return
        path, body = begun
        if not self._who():
            self._answer(401, {"error": "log in"})
        elif path == ["api", "validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        elif path == ["api", "repos", "create"]:
            asked = json.loads(body)
            repository = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            there = repository in self.hub.repositories
            self.hub.repositories.setdefault(repository, [{}])
            self._answer(409 if there else 200, {"url": f"{self.hub.url}/{repository}"})
        elif path[4:5] == ["preupload"]:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif path[-1] == "batch":
            rows = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": rows})
        elif path[4:5] == ["commit"]:
            repository = "/".join(path[2:4])
            files = dict(self.hub.files(repository))
            for line in body.splitlines():
                row = json.loads(line)
                value = row["value"]
                if row["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif row["key"] == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif row["key"] == "deletedFile":
                    del files[value["path"]]
            self.hub.repositories[repository].append(files)
            sha = self.hub.sha(repository)
            url = f"{self.hub.url}/{repository}/commit/{sha}"
            self._answer(
                200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}
            )
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        begun = self._begin()
        if begun is not None:
            path, body = begun
            self.hub.blobs[path[-1]] = body
            self._answer(200)


@contextmanager
def serving() -> Iterator[Hub]:
    """A server at work, until the block ends."""
    hub = Hub()
    with listening(type("Handler", (_Handler,), {"hub": hub})) as hub.port:
        yield hub
