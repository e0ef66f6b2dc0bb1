"""Jobs that come through Celery: a real consumer process, a real Redis, a real Postgres."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from celery import Celery
from sqlalchemy import func, select

from farm import accounts, jobs, pricing, tokens
from farm.catalog import catalog
from farm.db import transaction
from farm.embedded.postgres import Postgres
from farm.ids import public
from farm.tables import Job

PATIENCE_S = 30
BODY = {"spec": {"prompt": "a red circle", "count": 3}, "priority": "urgent"}


class Events:
    """What anybody sees who listens to Celery's events, as Flower does."""

    def __init__(self, app: Celery) -> None:
        self.seen: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._connection = app.connection_for_read()
        receiver = app.events.Receiver(self._connection, handlers={"*": self._take})
        self._receiver = receiver
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for _ in self._receiver.consume(limit=None, timeout=None, wakeup=False):
            if self._receiver.should_stop:
                return

    def _take(self, event: dict[str, Any]) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()

    def _find(self, kind: str, task: str | None) -> dict[str, Any] | None:
        return next((e for e in self.seen if e["type"] == kind and task in (None, e.get("uuid"))), None)

    def wait_for(self, kind: str, task: str | None = None) -> dict[str, Any]:
        with self._changed:
            found = self._changed.wait_for(lambda: self._find(kind, task), timeout=PATIENCE_S)
        assert found, f"no {kind}, but {[e['type'] for e in self.seen]}"
        return found

    def close(self) -> None:
        self._receiver.should_stop = True


@pytest.fixture
def key(database: str) -> str:
    with transaction() as db:
        pricing.sync(db, catalog())
        return accounts.issue_key(db, accounts.create(db, "acme"))[1]


@pytest.fixture
def app(key: str, broker: str) -> Celery:
    """Another service's app: all it knows of the farm is the broker, a queue and a task's name."""
    return Celery("shop", broker=broker)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "intake.log"


@pytest.fixture
def events(app: Celery, log: Path) -> Iterator[Events]:
    """A consumer that runs, and what it says."""
    listening = Events(app)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "farm.cli", "intake"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(os.environ),
        )
    listening.wait_for("worker-online")
    yield listening
    listening.close()
    process.terminate()
    process.wait(PATIENCE_S)


def send(app: Celery, body: Any, **headers: str) -> str:
    """What docs/celery.md tells callers to do. Returns the task's id."""
    sent = app.send_task("farm.submit", args=[body], queue="farm.submit", headers=headers)
    return str(sent.id)


def jobs_stored() -> int:
    with transaction() as db:
        return db.scalar(select(func.count()).select_from(Job)) or 0


def test_a_job_sent_through_celery_is_stored_as_one_sent_over_http(
    app: Celery, key: str, events: Events
) -> None:
    task = send(app, BODY, farm_api_key=key, farm_idempotency_key="order-1")

    answer = events.wait_for("task-succeeded", task)["result"]
    with transaction() as db:
        job = jobs.every(db, accounts.find(db, "acme").id, key="order-1")[0]
    assert answer == repr(public("job", job.id))
    assert (job.frames, job.priority) == (3, 9)


def test_a_job_sent_twice_under_one_key_is_accepted_once(app: Celery, key: str, events: Events) -> None:
    first = send(app, BODY, farm_api_key=key, farm_idempotency_key="order-1")
    again = send(app, BODY, farm_api_key=key, farm_idempotency_key="order-1")

    answers = [events.wait_for("task-succeeded", task)["result"] for task in (first, again)]
    assert answers[0] == answers[1]
    assert jobs_stored() == 1


def test_a_bad_submission_fails_with_the_field_and_stores_nothing(
    app: Celery, key: str, events: Events
) -> None:
    body = {"spec": {"prompt": "a red circle", "width": 63}}
    task = send(app, body, farm_api_key=key, farm_idempotency_key="order-1")

    failed = events.wait_for("task-failed", task)
    assert "spec.width: 63 is not allowed; allowed are multiples of 8 from 64 to 128" in failed["exception"]
    assert jobs_stored() == 0


@pytest.mark.parametrize("missing", ["farm_api_key", "farm_idempotency_key"])
def test_a_message_without_a_needed_header_is_refused_by_its_name(
    app: Celery, key: str, events: Events, missing: str
) -> None:
    headers = {"farm_api_key": key, "farm_idempotency_key": "order-1"}
    del headers[missing]

    failed = events.wait_for("task-failed", send(app, BODY, **headers))

    assert missing in failed["exception"]
    assert jobs_stored() == 0


@pytest.mark.parametrize(
    "given", [{"args": [BODY, "more"]}, {"args": []}, {"kwargs": {"spec": BODY["spec"]}}]
)
def test_a_call_with_other_arguments_says_what_is_allowed(
    app: Celery, key: str, events: Events, given: dict[str, Any]
) -> None:
    headers = {"farm_api_key": key, "farm_idempotency_key": "order-1"}
    task = app.send_task(tokens.SUBMIT, queue=tokens.SUBMIT_QUEUE, headers=headers, **given)

    failed = events.wait_for("task-failed", task.id)

    assert "allowed is one argument, the body of POST /v1/jobs" in failed["exception"]
    assert jobs_stored() == 0


def test_nobody_who_watches_sees_the_key(app: Celery, key: str, events: Events, log: Path) -> None:
    misplaced = {**BODY, "api_key": key}
    good = send(app, BODY, farm_api_key=key, farm_idempotency_key="order-1")
    events.wait_for("task-succeeded", good)
    wrong = send(app, BODY, farm_api_key=key[:-1] + "0", farm_idempotency_key="order-2")
    events.wait_for("task-failed", wrong)
    events.wait_for("task-failed", send(app, misplaced, farm_api_key=key, farm_idempotency_key="order-3"))

    told = [e for e in events.seen if not (e["type"] == "task-received" and "api_key" in e["args"])]
    assert key[:-6] not in repr(told)
    assert key[:-6] not in log.read_text()


def test_a_message_waits_with_its_headers_while_the_database_is_away(
    app: Celery, key: str, events: Events, database: str, postgres: Postgres
) -> None:
    name = urlsplit(database).path.removeprefix("/")
    with psycopg.connect(postgres.url, autocommit=True) as maintenance:
        maintenance.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        maintenance.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        task = send(app, BODY, farm_api_key=key, farm_idempotency_key="order-1")
        retried = events.wait_for("task-retried", task)
        maintenance.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    events.wait_for("task-succeeded", task)

    assert "DatabaseAway" in retried["exception"]
    assert jobs_stored() == 1


def test_a_waiting_submission_is_not_taken_for_a_render_token(app: Celery, key: str, events: Events) -> None:
    events.wait_for("task-succeeded", send(app, BODY, farm_api_key=key, farm_idempotency_key="order-1"))

    with app.connection_for_read() as connection:
        keys = {k.decode() for k in connection.default_channel.client.keys("*unacked*")}
    assert "unacked" not in keys
    assert tokens.SUBMIT_QUEUE == "farm.submit"
