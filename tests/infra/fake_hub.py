"""A small Hugging Face hub on a local port: enough of its HTTP interface for one model or data set at one commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def fake_hub(
    repo_type: str, repo_id: str, files: Mapping[str, bytes], *, telling: Collection[str] = ()
) -> Iterator[str]:
    """Serve `files` as that repository; yields the endpoint for HF_ENDPOINT.

    telling: files whose download is refused with an error message that repeats the token they were asked with.
    """
    prefix = "/datasets" if repo_type == "dataset" else ""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_POST(self) -> None:  # paths-info
            length = int(self.headers["Content-Length"])
            asked = self.rfile.read(length).decode()
            entries = [_entry(name, content) for name, content in files.items() if name in asked.replace("%2F", "/")]
            self.send(200, json.dumps(entries).encode(), body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"{prefix}/{repo_id}/resolve/{COMMIT}/")
            tree = f"/api/{repo_type}s/{repo_id}/tree/{COMMIT}"
            if path.startswith(tree):
                entries = _tree(files, path.removeprefix(tree).strip("/"), "recursive=true" in self.path.lower())
                self.send(200, json.dumps(entries).encode(), body)
            elif path in (f"/api/{repo_type}s/{repo_id}", f"/api/{repo_type}s/{repo_id}/revision/{COMMIT}"):
                self.send(200, json.dumps(_info(repo_id, files)).encode(), body)
            elif name in telling and body:
                self.send(403, b"{}", body, message=f"no {name} for {self.headers['Authorization']}")
            elif name in files:
                self.send(200, files[name], body)
            else:
                code = "EntryNotFound" if name != path else "RepoNotFound"
                self.send(404, b"{}", body, code)

        def send(
            self, status: int, content: bytes, body: bool, code: str | None = None, message: str | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if message is not None:
                self.send_header("X-Error-Message", message)
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _info(repo_id: str, files: Mapping[str, bytes]) -> dict[str, object]:
    siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
    return {"id": repo_id, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _tree(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    inside = {name: content for name, content in files.items() if not folder or name.startswith(folder + "/")}
    depth = folder.count("/") + 1 if folder else 0
    folders = {"/".join(name.split("/")[: depth + 1]) for name in inside if name.count("/") > depth}
    entries = [_entry(name, content) for name, content in inside.items() if recursive or name.count("/") == depth]
    oid = hashlib.sha1(b"").hexdigest()
    return entries + [{"type": "directory", "path": name, "size": 0, "oid": oid} for name in sorted(folders)]
