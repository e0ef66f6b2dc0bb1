"""A million lines over HTTP into frames, by one API process: how many a second, and what others feel meanwhile.

The file is NDJSON with a custom_id and a prompt a line, made beforehand and sent by this process in one request: read,
checked, priced, held, named and stored with every index, key and trigger in place, under a job that is accepted in
one step at the end. Beside it somebody else's requests: a job of one frame, and a list of jobs, ten times a second.

The plain alternatives, in the same run and on the same machine: the same frames by a bare COPY into the same table
(nothing is read, checked or named: the database's own limit for one connection), and lines read and inserted as a first
version would, through pydantic and the ORM.
"""

import io
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import Target, quantile, say
from farm import accounts, ids
from farm.accounts import Caller
from farm.bulk.lines import Line
from farm.catalog import catalog
from farm.db import transaction
from farm.spec import fingerprint, quantity, random_seed, resolve, work
from farm.tables import Frame

FULL, QUICK = 1_000_000, 40_000
ORM = 4000  # lines of the first version: it is slow
EVERY_S = 0.1
START_S = 60


def main() -> int:
    count = QUICK if harness.options(__doc__).quick else FULL
    with harness.services() as folder:
        key, other, caller = _accounts()
        with _api(folder) as (url, api):
            warm = folder / "warm.ndjson"
            _write(warm, 2000, "warm")
            _upload(url, key, warm)
            file = folder / "lines.ndjson"
            size = _write(file, count, "sku")
            say(f"{count} lines, {size >> 20} MiB")
            figures = _measured(url, key, other, file, api, count=count)
            seeded = folder / "seeded.ndjson"
            _write(seeded, count // 10, "seed", seed=True)
            figures |= _seeded(url, key, seeded, count // 10)
        figures |= _plain(caller, count // 5, figures["frames_per_s"])
        say("checking the books")
    return harness.report(
        "bulk",
        figures,
        [
            Target("frames_per_s", at_least=20_000),
            Target("api_rss_mb", at_most=300),
            Target("others_p95_ms", at_most=200),
        ],
    )


def _accounts() -> tuple[str, str, Caller]:
    with transaction() as db:
        bulk, other = accounts.create(db, "bulk"), accounts.create(db, "other")
        key = accounts.issue_key(db, bulk)[1]
        return key, accounts.issue_key(db, other)[1], accounts.authenticate(db, key)


def _write(path: Path, count: int, name: str, *, seed: bool = False) -> int:
    """Lines as a catalogue has them; returns their bytes."""
    with path.open("w") as file:
        for n in range(count):
            prompt = harness.PROMPTS[n % len(harness.PROMPTS)]
            line: dict[str, Any] = {
                "custom_id": f"{name}-{n:07}",
                "prompt": f"{prompt}, article {n}, studio light",
            }
            file.write(json.dumps(line | ({"seed": n} if seed else {})) + "\n")
    return path.stat().st_size


@contextmanager
def _api(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {"FARM_API_PORT": str(port)}
    with harness.process([sys.executable, "-m", "farm.cli", "api"], log=folder / "api.log", env=env) as child:
        url = f"http://127.0.0.1:{port}"
        harness.until(lambda: _lives(url), harness.alive(child, folder / "api.log"), limit_s=START_S)
        yield url, psutil.Process(child.pid)


def _lives(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live").is_success
    except httpx.TransportError:
        return False


def _upload(url: str, key: str, file: Path) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/x-ndjson"}
    with file.open("rb") as body:
        answer = httpx.post(f"{url}/v1/bulk", content=_parts(body), headers=headers, timeout=600)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def _parts(body: io.BufferedReader) -> Iterator[bytes]:
    while part := body.read(1 << 18):
        yield part


# ------------------------------------------------------------------------------------------------ the upload


def _measured(
    url: str, key: str, other: str, file: Path, api: psutil.Process, *, count: int
) -> dict[str, float]:
    others = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {other}"}, timeout=30)
    with _beside(lambda: _ask(others)) as quiet:
        time.sleep(3)
    postgres = _postgres()
    before, api_before, pg_before = time.monotonic(), _cpu_s([api]), _cpu_s(postgres())
    with _beside(lambda: _ask(others)) as times, _peak_rss(api) as rss:
        done = _upload(url, key, file)
    seconds = time.monotonic() - before
    assert done["good"] == count
    say(f"{count / seconds:.0f} frames/s")
    return {
        "frames_per_s": count / seconds,
        "api_cpu_us_a_line": 1e6 * (_cpu_s([api]) - api_before) / count,
        "postgres_cpu_us_a_line": 1e6 * (_cpu_s(postgres()) - pg_before) / count,
        "api_rss_mb": rss[0] / 2**20,
        "others_p50_ms": 1000 * quantile(times, 0.5),
        "others_p95_ms": 1000 * quantile(times, 0.95),
        "others_max_ms": 1000 * max(times),
        "others_p95_ms_before": 1000 * quantile(quiet, 0.95),
    }


def _seeded(url: str, key: str, file: Path, count: int) -> dict[str, float]:
    """Lines with seeds: each is looked for among the images and frames there are."""
    started = time.monotonic()
    _upload(url, key, file)
    return {"frames_per_s_seeded": count / (time.monotonic() - started)}


def _ask(client: httpx.Client) -> None:
    spec = {"prompt": "a red circle on a blue background"}
    answer = client.post("/v1/jobs", json={"spec": spec})
    assert answer.status_code == 202, answer.text
    assert client.get("/v1/jobs?limit=20").is_success


@contextmanager
def _beside(ask: Callable[[], None]) -> Iterator[list[float]]:
    """Do this again and again meanwhile; yields how long the two requests of each time took, together."""
    times: list[float] = []
    stop = threading.Event()

    def go() -> None:
        while not stop.is_set():
            started = time.monotonic()
            ask()
            times.append((time.monotonic() - started) / 2)  # of one
            stop.wait(EVERY_S)

    thread = threading.Thread(target=go)
    thread.start()
    yield times
    stop.set()
    thread.join()


@contextmanager
def _peak_rss(process: psutil.Process) -> Iterator[list[int]]:
    peak, stop = [0], threading.Event()

    def look() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            stop.wait(0.2)

    thread = threading.Thread(target=look)
    thread.start()
    yield peak
    stop.set()
    thread.join()


def _cpu_s(processes: list[psutil.Process]) -> float:
    total = 0.0
    for one in processes:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _postgres() -> Callable[[], list[psutil.Process]]:
    with transaction() as db:
        backend = int(db.scalar(text("SELECT pg_backend_pid()")) or 0)
    root = psutil.Process(backend).parent()
    assert root is not None
    return lambda: [root, *root.children(recursive=True)]


# ------------------------------------------------------------------------------------------------ plain


def _plain(caller: Caller, count: int, ours: float) -> dict[str, float]:
    copied = count / _bare_copy(caller, count)
    inserted = ORM / _orm(caller)
    return {
        "bare_copy_per_s": copied,
        "orm_per_s": inserted,
        "ratio_to_bare_copy": ours / copied,
        "ratio_to_orm": ours / inserted,
    }


def _bare_job(caller: Caller, count: int) -> tuple[Any, int]:
    """A staged job with one key, which nobody sees. Returns its id and the price's."""
    with transaction() as db:
        job = ids.new_id(ids.clock_ms(db))
        price = int(db.scalar(text("SELECT id FROM prices WHERE method = 'mpx_step' LIMIT 1")) or 0)
        facts = {"job": job, "account": caller.account_id, "frames": count, "currency": caller.currency}
        for statement in (
            "INSERT INTO jobs (id, account_id, status, priority, runnable, frames, currency, quoted, held)"
            " VALUES (:job, :account, 'staged', 1, false, :frames, :currency, 0, 0)",
            "INSERT INTO job_lanes (job_id, model, account_id, priority, runnable)"
            " VALUES (:job, 'starter', :account, 1, false)",
            "INSERT INTO job_keys (job_id, key_no, model, account_id, shape_key, call_key, pixels)"
            " VALUES (:job, 0, 'starter', :account, 'shape', 'call', 4096)",
        ):
            db.execute(text(statement), facts)
    return job, price


def _forget(job: Any) -> None:
    """Remove it again: its hold is not what its frames cost, and the audit would say so."""
    with transaction() as db:
        for statement in (
            "DELETE FROM frames WHERE job_id = :job AND id > :job AND id <= last_frame_id(:job)",
            "DELETE FROM jobs WHERE id = :job",
        ):
            db.execute(text(statement), {"job": job})


def _bare_copy(caller: Caller, count: int) -> float:
    """Seconds that COPY takes for so many rows that were made before, in transactions of 6,000."""
    job, price = _bare_job(caller, count)
    resolved = resolve(Line(custom_id="x", prompt=f"{harness.PROMPTS[0]}, article 1"), catalog())
    assert not isinstance(resolved, list)
    spec = json.dumps(resolved.to_json()).encode()
    head = "!hi16si16siiiii16si6siqiqiqiii32si?iB"

    def row(n: int) -> bytes:
        return struct.pack(
            head, 13, 16, ids.frame_id(job, n).bytes, 16, job.bytes, 4, n, 4, 0, 16, caller.account_id.bytes,
            6, b"queued", 8, n, 8, 81920, 8, 81920, 4, price, 32, n.to_bytes(32), 1, False, len(spec) + 1, 1,
        ) + spec  # fmt: skip

    parts = [b"".join(row(n) for n in range(k, min(k + 6000, count))) for k in range(0, count, 6000)]
    columns = "id, job_id, index, key_no, account_id, status, seed, work, quantity, price_id, fingerprint, seeded, spec"
    started = time.monotonic()
    for part in parts:
        with transaction() as db:
            raw = db.connection().connection.driver_connection
            assert isinstance(raw, psycopg.Connection)
            copy_in = f"COPY frames ({columns}) FROM STDIN (FORMAT binary)"
            with raw.cursor() as cursor, cursor.copy(copy_in) as copy:
                copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8) + part + b"\xff\xff")
    seconds = time.monotonic() - started
    _forget(job)
    return seconds


def _orm(caller: Caller) -> float:
    """Seconds for lines that are read one by one by pydantic and inserted by the ORM, a thousand a transaction."""
    job, price = _bare_job(caller, ORM)
    said = ({"custom_id": f"x-{n}", "prompt": f"{harness.PROMPTS[n % 24]}, article {n}"} for n in range(ORM))
    lines = [json.dumps(line) for line in said]
    started = time.monotonic()
    for first in range(0, ORM, 1000):
        with transaction() as db:
            for n, raw in enumerate(lines[first : first + 1000], first):
                spec = resolve(Line.model_validate_json(raw), catalog())
                assert not isinstance(spec, list)
                model, seed = catalog()[spec.model], random_seed()
                db.add(Frame(
                    id=ids.frame_id(job, n), job_id=job, index=n, key_no=0, account_id=caller.account_id,
                    status="queued", seed=seed, work=work(spec, model), quantity=quantity(spec, model.price.method),
                    price_id=price, fingerprint=fingerprint(spec, model, seed), spec=spec.to_json(),
                ))  # fmt: skip
    seconds = time.monotonic() - started
    _forget(job)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
