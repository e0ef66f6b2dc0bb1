"""What stands around the farm in these tests: a TLS front, a receiver of webhooks, and work that is in the way."""

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trustme

from tests.dialects.conftest import RunningFarm


@dataclass
class Front:
    """A TLS front on the loopback: it passes on what comes, and says that it came by https."""

    host: str
    ca_file: Path

    @property
    def url(self) -> str:
        return f"https://{self.host}"


@contextmanager
def tls_front(farm_url: str, folder: Path) -> Iterator[Front]:
    """A front before the farm, with a certificate made for it."""
    ca = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    ca_file = folder / "ca.pem"
    ca.cert_pem.write_to_path(str(ca_file))
    target = urlsplit(farm_url)
    loop, ready = asyncio.new_event_loop(), threading.Event()
    port = 0

    async def serve() -> None:
        nonlocal port
        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        ready.set()
        async with server:
            with suppress(asyncio.CancelledError):
                await server.serve_forever()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            there = await asyncio.open_connection(target.hostname, target.port)
            lines = [n for n in head[:-4].split(b"\r\n") if not n.lower().startswith(b"connection:")]
            lines += [b"Connection: close", b"X-Forwarded-Proto: https", b"", b""]
            there[1].write(b"\r\n".join(lines))
            await asyncio.gather(_pipe(reader, there[1]), _pipe(there[0], writer))

    task = loop.create_task(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield Front(f"127.0.0.1:{port}", ca_file)
    finally:
        task.add_done_callback(lambda _: loop.stop())
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, ssl.SSLError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with suppress(OSError, ssl.SSLError, RuntimeError):
        writer.close()


@dataclass
class Receiver:
    """Who webhooks are sent to: what came, in order."""

    url: str
    came: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def take(self, headers: dict[str, str], body: bytes) -> None:
        with self._news:
            self.came.append((headers, body))
            self._news.notify_all()

    def wait(self, count: int, within_s: float = 60) -> list[dict[str, Any]]:
        """What came, once there is so much of it."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.came) >= count, within_s), (
                f"only {len(self.came)} came"
            )
            return [json.loads(body) for _, body in self.came]


@contextmanager
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.take({k.lower(): v for k, v in self.headers.items()}, body)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Receiver(f"http://127.0.0.1:{server.server_port}/hook")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def busy(farm: RunningFarm) -> Iterator[None]:
    """The worker has more urgent work, until the block ends."""
    spec = {"prompt": "a yellow triangle", "steps": 100, "width": 128, "height": 128, "count": 400}
    sent = farm.api.post("/v1/jobs", json={"spec": spec, "priority": "urgent"})
    assert sent.status_code == 202, sent.text
    url = f"/v1/jobs/{sent.json()['id']}"
    try:
        yield
    finally:
        cancelled = farm.api.post(f"{url}/cancel")
        assert cancelled.status_code in (200, 409), cancelled.text
