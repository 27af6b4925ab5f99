"""A fake Hugging Face Hub: the two endpoints of a download, and their failures."""

import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

INFO = re.compile(r"/api/models/([^/]+/[^/?]+)(?:/revision/([^?]+))?(?:\?.*)?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Repository:
    """The files of one repository. Those in `lfs` have SHA-256 hashes."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    revisions: tuple[str, ...] = ("main",)
    lfs: str = ".safetensors"


@dataclass
class Asked:
    """One received request."""

    path: str
    range: str | None
    token: str | None
    served: int = 0


@dataclass
class Hub:
    """The server's state, which tests read and change."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes after which each next answer breaks off
    status: dict[str, tuple[int, str]] = field(default_factory=dict)  # id -> status and error code
    replaced: dict[str, bytes] = field(default_factory=dict)  # file -> what is sent in its place
    elsewhere: str = ""  # where files are served: another server, which answers are redirected to
    ranges: bool = True
    pause: float = 0.0  # seconds before each file
    info: bytes | None = None  # sent in place of a repository's description

    def add(self, name: str, folder: Path, **more: Any) -> Repository:
        files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
        self.repositories[name] = Repository(files, **more)
        return self.repositories[name]

    def names(self) -> list[str]:
        """The requested files, in order."""
        return [m[3] for a in self.asked if (m := FILE.fullmatch(a.path))]


def described(name: str, repository: Repository) -> dict[str, Any]:
    return {"id": name, "sha": repository.commit, "siblings": [_sibling(repository, n) for n in repository.files]}


def _sibling(repository: Repository, name: str) -> dict[str, Any]:
    data = repository.files[name]
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return {
        "rfilename": name,
        "size": len(data),
        "blobId": git,
        **({"lfs": lfs} if name.endswith(repository.lfs) else {}),
    }


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; `hub` is set on a subclass."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = Asked(self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        self.hub.asked.append(asked)
        if match := INFO.fullmatch(self.path):
            self.describe(match[1], match[2] or "main")
        elif match := FILE.fullmatch(self.path):
            self.send_file(match[1], match[3], asked)
        else:
            self.answer(404, b"")

    def describe(self, name: str, revision: str) -> None:
        repository = self.hub.repositories.get(name)
        if name in self.hub.status:
            status, code = self.hub.status[name]
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif repository is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (*repository.revisions, repository.commit):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer(200, self.hub.info or json.dumps(described(name, repository)).encode())

    def send_file(self, name: str, file: str, asked: Asked) -> None:
        time.sleep(self.hub.pause)
        if self.hub.elsewhere:
            self.answer(302, b"", {"Location": self.hub.elsewhere + self.path})
            return
        data = self.hub.replaced.get(file, self.hub.repositories[name].files[file])
        given = RANGE.fullmatch(asked.range) if asked.range and self.hub.ranges else None
        start, end = (int(given[1]), int(given[2] or len(data) - 1) + 1) if given else (0, len(data))
        if start > len(data):
            self.answer(416, b"")
            return
        end = min(end, len(data))
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"} if given else {}
        cut = self.hub.cut.get(file)
        stop = min(start + cut.pop(0), end) if cut else end
        asked.served = len(data[start:stop])
        self.answer(206 if given else 200, data[start:stop], headers, length=end - start)
        self.close_connection = stop < end

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """No logs on stderr."""


@contextlib.contextmanager
def serving() -> Any:
    """A Hub on a free local port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
