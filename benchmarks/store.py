"""PUT of 200 KB images through the S3 store, against bare boto3 in the same run.

Both upload to a sink on loopback, a process that reads a request and answers 200: what is measured is what the client
does for an upload, not a store. Ours counts an MD5 that the store compares, retries, and what the URL asks for; bare
boto3 is put_object with nothing set, which counts a CRC32. Short rounds of both take turns, which begins is drawn anew,
so that what else the machine does hits both; with as many threads as a worker encodes and uploads with, and with one.

    python -m benchmarks.store [--quick]
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from statistics import median
from uuid import UUID

import boto3

from benchmarks.harness import Target, options, quantile, ratio, report, say
from farm.storage import image_key
from farm.storage.s3 import S3Store
from workers.shelf import ENCODERS

SIZE = 200_000
SHARE = 0.9
ACCOUNT = UUID("01920000-0000-7000-8000-000000000001")

# reads requests whole, with Expect: 100-continue, and answers each with 200
SINK = """
import asyncio

async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
            if b"expect: 100-continue" in head:
                writer.write(b"HTTP/1.1 100 Continue\\r\\n\\r\\n")
            size = int(head.partition(b"content-length: ")[2].partition(b"\\r")[0])
            await reader.readexactly(size)
            writer.write(b'HTTP/1.1 200 OK\\r\\nETag: "0"\\r\\nContent-Length: 0\\r\\n\\r\\n')
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

Put = Callable[[str, bytes], object]


def timed(pool: ThreadPoolExecutor, put: Put, images: list[tuple[str, bytes]], took: list[float]) -> float:
    """Upload them all; images a second. Adds what each took, in seconds."""

    def one(image: tuple[str, bytes]) -> None:
        started = time.perf_counter()
        put(*image)
        took.append(time.perf_counter() - started)

    started = time.perf_counter()
    for done in [pool.submit(one, image) for image in images]:
        done.result()
    return len(images) / (time.perf_counter() - started)


def measure(port: int, *, rounds: int, images: int) -> dict[str, float]:
    endpoint = f"http://127.0.0.1:{port}"
    store = S3Store("images", endpoint=endpoint, region="us-east-1")
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")

    def ours(key: str, data: bytes) -> None:
        store.put(key, data, content_type="image/png")

    def bare(key: str, data: bytes) -> None:
        client.put_object(Bucket="images", Key=key, Body=data, ContentType="image/png")

    files = []
    for _ in range(images):
        data = os.urandom(SIZE)
        files.append((image_key(ACCOUNT, sha256(data).digest(), "png"), data))
    figures: dict[str, float] = {}
    for threads in (1, ENCODERS):
        speeds: dict[Put, list[float]] = {ours: [], bare: []}
        took: dict[Put, list[float]] = {ours: [], bare: []}
        cpu: dict[Put, list[float]] = {ours: [], bare: []}
        with ThreadPoolExecutor(threads) as pool:
            for put in (ours, bare):
                timed(pool, put, files, [])
            for _ in range(rounds):
                for put in random.sample((ours, bare), 2):
                    before = time.process_time()
                    speeds[put].append(timed(pool, put, files, took[put]))
                    cpu[put].append(time.process_time() - before)
        name = f"{threads} thread{'s' if threads > 1 else ''}"
        figures[f"through the store, PUT/s, {name}"] = median(speeds[ours])
        figures[f"bare boto3, PUT/s, {name}"] = median(speeds[bare])
        figures[f"of bare boto3, {name}"] = ratio(speeds[ours], speeds[bare])
        figures[f"CPU of bare boto3's, {name}"] = median(cpu[ours]) / median(cpu[bare])
        figures[f"through the store, ms, p99, {name}"] = quantile(took[ours], 0.99) * 1000
        figures[f"bare boto3, ms, p99, {name}"] = quantile(took[bare], 0.99) * 1000
        say(f"{name}: {figures[f'of bare boto3, {name}']:.3f} × bare boto3")
    return figures


def main() -> int:
    quick = options(__doc__).quick
    os.environ |= {"AWS_ACCESS_KEY_ID": "sink", "AWS_SECRET_ACCESS_KEY": "sink", "NO_PROXY": "127.0.0.1"}
    with subprocess.Popen([sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True) as sink:
        assert sink.stdout
        try:
            figures = measure(int(sink.stdout.readline()), rounds=150 if quick else 750, images=8)
        finally:
            sink.kill()
    names = [name for name in figures if name.startswith("of bare boto3")]
    return report("store", figures, [Target(name, at_least=SHARE) for name in names])


if __name__ == "__main__":
    sys.exit(main())
