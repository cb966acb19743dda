"""A Hugging Face hub on this machine: as much of it as an upload of a folder needs, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "z" * 34
USER = "ann"


@dataclass
class FakeHub:
    """What it holds, and how it behaves.

    Attributes:
        files: repository → path → content.
        private: repository → whether it was made so.
        messages: of the commits.
        broken: the part of a path that is answered by 500.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    broken: str | None = None

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{body['organization'] or USER}/{body['name']}"
        answer = {"url": f"{self.url}/{repo}"}
        if repo in self.files:
            return 409, {**answer, "error": "You already created this model repo"}
        self.files[repo], self.private[repo] = {}, body.get("visibility") == "private"
        return 200, answer

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[repo][value["path"]]
        oid = hashlib.sha1(str(len(self.messages)).encode()).hexdigest()
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}

    def answer(self, method: str, path: str, data: bytes) -> tuple[int, Any]:
        if self.broken is not None and self.broken in path:
            return 500, {"error": "out of order"}
        if method == "PUT":
            self.blobs[path.rpartition("/")[2]] = data
            return 200, {}
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(data)["content"].split("---")[1])
            return (200, {}) if head["library_name"] else (400, {"errors": [{"message": "no"}]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/blob/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            return 200, {"objects": objects}
        repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if "/tree/" in path:
            found = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in self.files[repo].items()
            ]
            return 200, found
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular"}
                for f in json.loads(data)["files"]
            ]  # fmt: skip
            return 200, {"files": files}
        if "/commit/" in path:
            return self.commit(repo, [json.loads(line) for line in data.splitlines()])
        return 404, {"error": f"no {method} {path}"}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a hub on 127.0.0.1 for the time of a block."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            path = self.path.partition("?")[0]
            if self.command != "PUT" and not allowed:
                status, body = 401, {"error": "Invalid username or password."}
            else:
                status, body = hub.answer(self.command, path, data)
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
