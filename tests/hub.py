"""The part of a model hub's API that huggingface_hub needs, on loopback, serving a folder as one repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Its address, and the files that were asked for."""

    url: str
    got: list[str] = field(default_factory=list)


@contextmanager
def hub(folder: Path, *, repo: str) -> Iterator[Hub]:
    """Serve a folder as this repository at COMMIT, also under the branch main."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            if path in (f"/api/models/{repo}/revision/{r}" for r in ("main", COMMIT)):
                names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
                facts = {
                    "id": repo,
                    "modelId": repo,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": f} for f in names],
                }
                return self._send(json.dumps(facts).encode(), "application/json")
            if path == f"/api/models/{repo}/tree/{COMMIT}":
                files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
                tree = [
                    {
                        "type": "file",
                        "path": str(p.relative_to(folder)),
                        "size": p.stat().st_size,
                        "oid": "0" * 40,
                    }
                    for p in files
                ]
                return self._send(json.dumps(tree).encode(), "application/json")
            for revision in ("main", COMMIT):
                if path.startswith(start := f"/{repo}/resolve/{revision}/"):
                    name = path.removeprefix(start)
                    if (folder / name).is_file():
                        if self.command == "GET":
                            found.got.append(name)
                        return self._send((folder / name).read_bytes(), "application/octet-stream")
            self.send_response(404)
            self.send_header(
                "X-Error-Code", "RepoNotFound" if f"/{repo}/" not in path + "/" else "EntryNotFound"
            )
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    found = Hub(f"http://127.0.0.1:{server.server_port}")
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
