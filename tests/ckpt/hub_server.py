"""A real HTTP server with the few routes of the Hugging Face hub that huggingface_hub calls, over files in memory."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any, ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories in memory, and what was asked for."""

    def __init__(self, repositories: Mapping[str, dict[str, bytes]]) -> None:
        self.repositories = {name: dict(files) for name, files in repositories.items()}
        self.ranges: list[tuple[str, str | None]] = []
        """Name and Range header of every file that was sent."""
        self.cut_after: int | None = None
        """Bytes of a file after which the connection breaks; None: never."""
        self.hang_after: int | None = None
        """Bytes of a file after which nothing more comes, until `hanging` is set; None: never."""
        self.hanging = Event()
        self.refuses_commits = False
        self.uploads: dict[str, bytes] = {}
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/revision/([\w-]+)|/tree/[\w-]+)?", path):
            self._about(match[1], match[2], tree="/tree/" in path)
        else:
            self._file(body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("authorization") != "Bearer right":
            return self._json({"error": "no"}, 401 if not self.headers.get("authorization") else 403)
        self._write(self.path.split("?")[0], body)

    def do_PUT(self) -> None:
        self.hub.uploads[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._json({})

    def _about(self, name: str, revision: str | None, *, tree: bool) -> None:
        if name == "org/gated":
            return self._json({}, 403, {"X-Error-Code": "GatedRepo"})
        if name == "org/strange":
            return self._json({}, 418)
        if name not in self.hub.repositories:
            return self._json({}, 404, {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", COMMIT):
            return self._json({}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.repositories[name]
        if tree:
            oids = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
            return self._json([{"type": "file", "path": p, "size": len(d), "oid": oids[p]} for p, d in files.items()])
        return self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})

    def _file(self, *, body: bool) -> None:
        match = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/[\w-]+/(.+)", self.path.split("?")[0])
        data = self.hub.repositories.get(match[1], {}).get(match[2]) if match else None
        if data is None:
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
        assert match
        wanted = self.headers.get("Range") if body else None
        start = int(re.findall(r"\d+", wanted)[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self._send(match[2], data[start:], wanted)

    def _send(self, name: str, data: bytes, wanted: str | None) -> None:
        self.hub.ranges.append((name, wanted))
        if self.hub.hang_after is not None and len(data) > self.hub.hang_after:
            self.wfile.write(data[: self.hub.hang_after])
            self.wfile.flush()
            self.hub.hanging.wait(60)
            self.close_connection = True
            return
        limit = self.hub.cut_after
        if limit is not None and len(data) > limit:
            self.wfile.write(data[:limit])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(data)

    def _write(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            return self._json({"url": f"{self.hub.url}/{name}"})
        if path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in asked]
            return self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._json({"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]})
        if path.endswith("/commit/main") and self.hub.refuses_commits:
            return self._json({}, 418)
        if path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                self._commit(self.hub.repositories[name], line["key"], line["value"])
            url = f"{self.hub.url}/{name}/commit/{COMMIT}"
            return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self._json({}, 404)

    def _lfs(self, asked: dict[str, Any]) -> dict[str, Any]:
        """An object that is here already needs no upload."""
        if asked["oid"] in self.hub.uploads:
            return asked
        return asked | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{asked['oid']}", "header": {}}}}

    def _commit(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.hub.uploads[value["oid"]]

    def _json(self, values: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(repositories: Mapping[str, dict[str, bytes]]) -> Iterator[Hub]:
    """A hub on a free port of this machine; its address is `hub.url`."""
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
