"""A Hugging Face hub on this machine, with what huggingface_hub asks of it to upload and download models.

Endpoints: creating a repository, the check of a card, how files are uploaded, a commit, the list of files,
and the files themselves; https://huggingface.co/docs/hub/api. Large files are sent within the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Repositories = dict[str, dict[str, bytes]]


class _Hub(BaseHTTPRequestHandler):
    repositories: Repositories

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.repositories:
                return self._answer({"error": "exists", "url": f"{self._address}/{name}"}, 409)
            self.repositories[name] = {}
            return self._answer({"url": f"{self._address}/{name}"})
        if self.path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            assert content.startswith("---\nlibrary_name: giantdet\n"), content
            return self._answer({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main(\?.*)?", self.path)
        if found is None or found[1] not in self.repositories:
            return self._answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if found[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
        answer = {
            "commitUrl": f"{self._address}/{found[1]}/commit/{_SHA}",
            "commitOid": _SHA,
            "pullRequestUrl": "",
        }
        return self._answer(answer)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if found[1] not in self.repositories:
                return self._answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            files = [{"rfilename": name} for name in self.repositories[found[1]]]
            return self._answer({"id": found[1], "sha": _SHA, "siblings": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.repositories[found[1]].items()
            ]
            return self._answer(entries)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        content = None if found is None else self.repositories.get(found[1], {}).get(found[2])
        if content is None:
            return self._answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self._answer(content, 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    do_HEAD = do_GET

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "X-Repo-Commit": _SHA,
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_SHA = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def local_hub() -> Iterator[tuple[str, Repositories]]:
    """Serve a hub, and yield its address and the files of its repositories."""
    repositories: Repositories = {}
    handler = type("Hub", (_Hub,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        server.server_close()
