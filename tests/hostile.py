"""An S3 server on loopback, and a proxy before it that does what stores and networks do.

Two ways to be hostile: told faults, one a request in order (will), for tests of one thing; and weather, each
request struck at random, for the chaos test.
"""

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

BUCKET = "images"
SECRET = "wJalrXUtnFEMI"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET, "NO_PROXY": "127.0.0.1"}
OTHERS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """ministack as a process of its own, on loopback, with one bucket; AWS_* names its keys. Yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    env = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "BIND_HOST": "127.0.0.1",  # it listens everywhere otherwise
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3",
        "SFTP_ENABLED": "0",
        "IOT_MTLS_ENABLED": "0",
        "AWS_SECRET_ACCESS_KEY": SECRET,  # what it checks the signatures of URLs with
    }
    command = [sys.executable, "-m", "ministack"]
    with (
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            assert server.stdout
            assert any(b"Running on" in line for line in server.stdout), "ministack did not start"
            threading.Thread(target=server.stdout.read, daemon=True).start()  # or its log fills the pipe
            for name in OTHERS:
                patch.delenv(name, raising=False)
            for name, value in KEYS.items():
                patch.setenv(name, value)
            client_of(port).create_bucket(Bucket=BUCKET)
            yield port
        finally:
            server.terminate()
            try:
                server.wait(5)
            except subprocess.TimeoutExpired:
                server.kill()


def client_of(port: int):
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=SECRET,
    )


class Proxy(ThreadingHTTPServer):
    """Passes requests on to S3, but for the faults it was told, or that the weather brings."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream_port: int) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.upstream_port = upstream_port
        self.forget()

    def forget(self) -> None:
        self.faults: deque[Fault] = deque()
        self.weather: dict[str, float] = {}  # name of WEATHER → how likely for a request
        self.happened: Counter[str] = Counter()
        self.seen: list[tuple[str, int, int]] = []  # method, what S3 answered or 0, the client's port
        self.over = threading.Event()

    def will(self, *faults: "Fault") -> None:
        self.faults.extend(faults)

    def strikes(self) -> "Fault | None":
        """What befalls the next request."""
        if self.faults:
            return self.faults.popleft()
        chance = random.random()
        for name, likely in self.weather.items():
            chance -= likely
            if chance < 0:
                self.happened[name] += 1
                return WEATHER[name]
        return None

    @property
    def methods(self) -> list[str]:
        return [method for method, _, _ in self.seen]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        with self:
            thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield self
            finally:
                self.over.set()
                self.shutdown()
                thread.join()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients are killed in the middle of requests."""


class Passing(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.strikes()
        if fault:
            fault(self, body)
        elif self.server.weather:
            like_b2(self, body)
        else:
            nothing(self, body)

    do_GET = do_PUT = do_DELETE = do_POST = do_HEAD = handle_any  # noqa: N815

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What S3 answers to this request with that body."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=10)
        headers = {k: v for k, v in self.headers.items() if k not in {"Expect", "Content-Length"}}
        headers["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        found = answer.status, answer.getheaders(), answer.read()
        upstream.close()
        self.server.seen.append((self.command, found[0], self.client_address[1]))
        return found

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: int = 0) -> None:
        """Send it, but the last `cut` bytes, and close."""
        if status == 204:
            headers = [*headers, ("Content-Length", "0")]
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"connection", "transfer-encoding"}:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        self.close_connection = self.close_connection or cut > 0

    def refuse(self, status: int, code: str) -> None:
        self.server.seen.append((self.command, 0, self.client_address[1]))
        body = f"<Error><Code>{code}</Code><Message>no, {SECRET}</Message></Error>".encode()
        if self.command == "HEAD":
            body = b""
        self.answer(status, [("Content-Length", str(len(body))), ("Content-Type", "application/xml")], body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name upstairs
        """Say nothing."""


Fault = Callable[[Passing, bytes], None]


def refusal(status: int, code: str) -> Fault:
    return lambda request, _: request.refuse(status, code)


SLOW_DOWN = refusal(503, "SlowDown")
INTERNAL = refusal(500, "InternalError")


def nothing(request: Passing, body: bytes) -> None:
    """Pass it on: for faults that come later."""
    request.answer(*request.ask(body))


def silent(request: Passing, _: bytes) -> None:
    request.server.seen.append((request.command, 0, request.client_address[1]))
    request.server.over.wait(30)
    request.close_connection = True


def slow(request: Passing, body: bytes) -> None:
    """Answer late, but in time."""
    time.sleep(random.uniform(0.2, 1.0))
    nothing(request, body)


def cut_after_store(request: Passing, body: bytes) -> None:
    request.ask(body)
    request.close_connection = True


def half_an_upload(request: Passing, body: bytes) -> None:
    request.answer(*request.ask(body[: len(body) // 2]))


def half_an_answer(request: Passing, body: bytes) -> None:
    status, headers, found = request.ask(body)
    request.answer(status, headers, found, cut=len(found) // 2)


def half_an_answer_that_claims_to_be_whole(request: Passing, body: bytes) -> None:
    status, headers, found = request.ask(body)
    found = found[: len(found) // 2]
    headers = [(k, v) for k, v in headers if k.lower() != "content-length"]
    request.answer(status, [*headers, ("Content-Length", str(len(found)))], found)


def other_bytes(request: Passing, body: bytes) -> None:
    status, headers, found = request.ask(body)
    request.answer(status, headers, bytes(255 - byte for byte in found))


def other_bytes_kept(request: Passing, body: bytes) -> None:
    """Damage what is uploaded; the store compares it with its MD5 and refuses."""
    request.answer(*request.ask(bytes(255 - byte for byte in body)))


def trailer_kept(request: Passing, body: bytes) -> None:
    """Store the checksum's trailer with the object, as some stores did, and believe any MD5."""
    del request.headers["Content-MD5"]
    request.answer(*request.ask(body + b"\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"))


def like_b2(request: Passing, body: bytes) -> None:
    """Refuse what B2 refuses: conditional writes with 501, the checksums of newer SDKs with 400."""
    names = {name.lower() for name in request.headers}
    if "if-none-match" in names and request.command == "PUT":
        request.server.happened["501 on If-None-Match"] += 1
        request.refuse(501, "NotImplemented")
    elif any(name.startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer")) for name in names):
        request.server.happened["400 on a checksum"] += 1
        request.refuse(400, "InvalidArgument")
    else:
        nothing(request, body)


WEATHER: dict[str, Fault] = {
    "503 SlowDown": SLOW_DOWN,
    "500": INTERNAL,
    "429": refusal(429, "TooManyRequests"),
    "stored, then cut": cut_after_store,
    "slow": slow,
    "half an upload": half_an_upload,
    "truncated": half_an_answer,
    "wrong bytes": other_bytes_kept,
    "like B2": like_b2,
}
STORM = dict.fromkeys((name for name in WEATHER if name != "like B2"), 0.03)
