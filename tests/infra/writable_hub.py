"""The part of the hub's HTTP interface that an upload needs, on a local port; it keeps what it is told."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class WritableHub:
    """private: whether each repository that is there is. refuses: the status of every answer to a write, 200: none.

    files: of each repository, by name. created: what was asked when one was made. tokens: that were shown.
    """

    endpoint: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    refuses: int = 200
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON for a request."""
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.created.append(asked)
            if self.refuses != 200:
                return self.refuses, {"error": "no right to write"}
            self.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            return 200, {"url": f"{self.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        _, _, _, owner, name, *rest = path.split("/")
        repo = f"{owner}/{name}"
        if repo not in self.private:
            return 404, {"error": "Repository not found"}
        if not rest or rest[0] == "revision":
            info = {"id": repo, "sha": "0" * 40, "private": self.private[repo], "siblings": [], "tags": []}
            return 200, info
        if rest[0] == "preupload":
            files = [each["path"] for each in json.loads(body)["files"]]
            told = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in files]
            return 200, {"files": told}
        if rest[0] == "tree":
            return 200, []
        assert rest[0] == "commit", path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.files.setdefault(repo, {})[entry["value"]["path"]] = content
        return 200, {"commitUrl": f"{self.endpoint}/{repo}/commit/1", "commitOid": "1", "hookOutput": ""}


@contextmanager
def writable_hub() -> Iterator[WritableHub]:
    """One on a port of its own; its endpoint is for HF_ENDPOINT."""
    hub = WritableHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.tell(b"")

        def do_POST(self) -> None:
            self.tell(self.rfile.read(int(self.headers["Content-Length"])))

        def tell(self, body: bytes) -> None:
            hub.tokens.add(self.headers["Authorization"])
            status, content = hub.answer(self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
