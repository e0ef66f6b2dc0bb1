"""Webhooks: who may be told of what, what is sent, and what becomes of receivers that do not take it."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from standardwebhooks import Webhook as Standard
from standardwebhooks.webhooks import WebhookVerificationError

from farm import accounts, catalog, deliver, events, ids, pricing, webhooks
from farm.accounts import Caller
from farm.api.app import create_app
from farm.db import sql, transaction
from farm.errors import Invalid
from farm.settings import settings
from farm.submissions import Submission, submit
from farm.tables import Webhook
from farm.webhooks import Callback, ShapedCallback
from tests.factories import CATALOG, account, ask, claim, one, settle

INSIDE = (
    "https://127.0.0.1/", "https://localhost/", "https://10.0.0.1/", "https://192.168.1.1/", "https://172.16.0.1/",
    "https://169.254.169.254/latest/meta-data/", "https://[::1]/", "https://[::]/", "https://0.0.0.0/",
    "https://0/", "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/", "https://127.1/",
    "https://[::ffff:127.0.0.1]/", "https://[::ffff:a9fe:a9fe]/", "https://[64:ff9b::a00:1]/",
    "https://[2002:7f00:1::]/", "https://[fe80::1]/", "https://[fd00:ec2::254]/", "https://100.100.100.200/",
    "https://168.63.129.16/", "https://224.0.0.1/", "https://255.255.255.255/", "https://198.18.0.1/",
    "http://example.com/", "ftp://example.com/", "https://a:b@example.com/", "https:///x", "https://exa mple.com/",
    "https://example.com/\ud800", "nothing",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the receiver


class Receiver:
    """A receiver that keeps what it was sent, and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] | int = 204
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                if callable(receiver.answer):
                    receiver.answer(self)
                else:
                    self.send_response(receiver.answer)
                    self.send_header("content-length", "0")
                    self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]

    @property
    def numbers(self) -> list[int]:
        return [b["data"]["number"] for b in self.bodies]


@pytest.fixture
def receiver(books: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("FARM_ALLOWED_PRIVATE_HOSTS", "127.0.0.1")
    settings.cache_clear()
    with running() as made:
        yield made


@contextmanager
def running() -> Iterator[Receiver]:
    made = Receiver()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        thread.join()
        made.server.server_close()


def added(caller: Caller, url: str, *kinds: str) -> UUID:
    with transaction() as db:
        return webhooks.add(db, caller.account_id, url, kinds=kinds or ("job.*",)).id


def finished(caller: Caller, count: int = 1, **more: Any) -> UUID:
    spec = {"prompt": "a red circle", "model": "alpha", "seed": 0, "count": count}
    with transaction() as db:
        job, _ = submit(db, caller, Submission(spec=spec, reuse=False, **more), models=CATALOG)
    while pack := claim():
        settle(pack)
    relayed()
    return job


def relayed() -> None:
    with transaction() as db:
        events.relay(db)


def spread(**limits: int) -> None:
    with transaction() as db:
        while webhooks.spread(db, **limits):
            pass


def turn(webhook: UUID, shapes: Any = None) -> None:
    """Send what is due of one webhook, as `farm deliver` does."""
    deliverer = deliver.Deliverer(shapes or {})
    asyncio.run(deliverer._turn(webhook, (webhook, "here")))
    deliverer._threads.shutdown()


@contextmanager
def delivering(**shapes: Any) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=deliver.run, args=(stop, shapes))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)


def until(reached: Callable[[], Any], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def statuses(webhook: UUID) -> list[str]:
    rows = ask("SELECT status FROM deliveries WHERE webhook_id = :w ORDER BY id", w=webhook)
    return [r.status for r in rows]


def last_try(webhook: UUID) -> dict[str, Any]:
    return dict(one("SELECT log -> -1 FROM deliveries WHERE webhook_id = :w ORDER BY id LIMIT 1", w=webhook))


def row(webhook: UUID) -> Webhook:
    with transaction() as db:
        return db.get_one(Webhook, webhook)


def pass_time(webhook: UUID, by: timedelta) -> None:
    """Let what waits, and what went wrong, be that much older."""
    ask(
        "UPDATE webhooks SET next_at = next_at - :by, paused_until = paused_until - :by,"
        " failing_since = failing_since - :by, rotated_at = rotated_at - :by WHERE id = :w",
        w=webhook, by=by,
    )  # fmt: skip
    ask("UPDATE deliveries SET next_at = next_at - :by WHERE webhook_id = :w", w=webhook, by=by)


# ------------------------------------------------------------------------------------------------ what is sent


def test_a_webhook_is_told_in_order_and_its_signature_holds(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url, "job.*", "frame.done")
    job = finished(caller, 3)
    finished(account("umbrella"))

    with delivering():
        until(lambda: statuses(hook) == ["delivered"] * 5)

    assert [b["type"] for b in receiver.bodies] == ["job.accepted", *["frame.done"] * 3, "job.finished"]
    assert receiver.numbers == [1, 2, 3, 4, 5]
    assert {b["data"]["job"] for b in receiver.bodies} == {ids.public("job", job)}
    with transaction() as db:
        secret = webhooks.secret_of(db.get_one(Webhook, hook))
    for headers, body in receiver.got:
        Standard(secret).verify(body, headers)
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 5
    headers, body = receiver.got[0]
    with pytest.raises(WebhookVerificationError):
        Standard(secret).verify(body.replace(b"accepted", b"finished"), headers)


def test_both_secrets_sign_for_a_day_after_a_rotation(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url)
    with transaction() as db:
        found = webhooks.find(db, caller.account_id, hook, lock=True)
        old = webhooks.secret_of(found)
        new = webhooks.rotate(db, found)
    assert old != new

    def told() -> tuple[dict[str, str], bytes]:
        with transaction() as db:
            webhooks.try_out(db, webhooks.find(db, caller.account_id, hook, lock=True))
        turn(hook)
        return receiver.got[-1]

    headers, body = told()
    for secret in (old, new):
        Standard(secret).verify(body, headers)
    pass_time(hook, timedelta(days=1, seconds=1))
    headers, body = told()
    Standard(new).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Standard(old).verify(body, headers)


def test_no_secret_is_stored(receiver: Receiver) -> None:
    hook = added(account(), receiver.url)

    stored = one("SELECT to_jsonb(w)::text FROM webhooks AS w WHERE id = :w", w=hook)

    with transaction() as db:
        assert webhooks.secret_of(db.get_one(Webhook, hook)).removeprefix("whsec_") not in stored


def test_a_jobs_callback_is_told_of_that_job_alone_in_the_shape_it_asks_for(receiver: Receiver) -> None:
    caller = account()
    other = finished(caller)
    plain = finished(caller, webhook=Callback(url=receiver.url, kinds=["job.finished"]))
    shaped = finished(
        caller, webhook=ShapedCallback(url=receiver.url + "2", shape="other", base="https://farm.example")
    )

    def shape(db: Any, happening: webhooks.Happening) -> dict[str, Any]:
        return {"id": happening.job_id.hex if happening.job_id else "", "base": happening.base}

    with delivering(other=shape):
        until(lambda: len(receiver.got) == 2)

    bodies = {json.dumps(b): h for b, (h, _) in zip(receiver.bodies, receiver.got, strict=True)}
    assert {"id": shaped.hex, "base": "https://farm.example"} in receiver.bodies
    assert {ids.public("job", plain)} == {b["data"]["job"] for b in receiver.bodies if "data" in b}
    assert ids.public("job", other) not in "".join(bodies)
    with transaction() as db:
        secret = webhooks.callback_secret(db, caller.account_id)
    for headers, body in receiver.got:
        Standard(secret).verify(body, headers)


# ------------------------------------------------------------------------------------------------ what goes wrong


def redirect(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("location", "/elsewhere")
    handler.send_header("content-length", "0")
    handler.end_headers()


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(1 << 40))
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x" * 65536)
    except OSError:
        handler.close_connection = True


def slow(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [(redirect, 302, "redirect"), (500, 500, None), (404, 404, None), (slow, None, "within")],
)
def test_what_is_no_success_is_tried_again_after_5_s(
    receiver: Receiver, answer: Any, status: int | None, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver, "WITHIN_S", 0.5)
    caller = account()
    hook = added(caller, receiver.url, "job.finished")
    finished(caller)
    spread()
    receiver.answer = answer

    turn(hook)

    assert statuses(hook) == ["pending"]
    tried = last_try(hook)
    assert (tried["status"], error is None or error in tried["error"]) == (status, True)
    wait_s = float(one("SELECT extract(epoch FROM next_at - clock_timestamp()) FROM deliveries"))
    assert 3 < wait_s <= 5 * (1 + deliver.JITTER)
    first = receiver.got[-1][0]["webhook-id"]
    pass_time(hook, timedelta(seconds=10))
    receiver.answer = 200
    turn(hook)
    assert statuses(hook) == ["delivered"]
    assert receiver.got[-1][0]["webhook-id"] == first
    assert len(receiver.got) == 2
    assert row(hook).failures == 0


def test_an_answer_without_end_is_a_success_that_is_cut(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url, "job.finished")
    finished(caller)
    spread()
    receiver.answer = endless

    turn(hook)

    assert statuses(hook) == ["delivered"]
    assert len(last_try(hook)["answer"]) == deliver.TOLD


def test_nothing_is_sent_any_more_once_it_answered_410_and_an_event_says_so(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url)
    finished(caller)
    spread()
    receiver.answer = 410

    turn(hook)
    relayed()
    spread()
    turn(hook)

    assert (len(receiver.got), row(hook).disabled_why) == (1, "gone")
    told = one("SELECT data FROM events WHERE kind = 'webhook.disabled'")
    assert told == {"webhook": ids.public("whk", hook), "why": "gone"}


def test_five_days_of_failures_disable_a_webhook(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url)
    finished(caller)
    spread()
    receiver.answer = 500
    turn(hook)
    assert row(hook).disabled_why is None

    pass_time(hook, timedelta(days=5, seconds=1))
    turn(hook)

    assert row(hook).disabled_why == "failing"


def test_a_delivery_is_given_up_after_its_schedule(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url, "job.finished")
    finished(caller)
    spread()
    receiver.answer = 500

    for wait_s in (*deliver.SCHEDULE_S[1:], 0):
        turn(hook)
        if wait_s:
            left = float(one("SELECT extract(epoch FROM next_at - clock_timestamp()) FROM deliveries"))
            assert 0.9 * wait_s - 2 < left <= wait_s * (1 + deliver.JITTER)
        pass_time(hook, timedelta(days=2))
        ask("UPDATE webhooks SET failing_since = clock_timestamp() WHERE failing_since IS NOT NULL")

    assert (statuses(hook), len(receiver.got)) == (["failed"], len(deliver.SCHEDULE_S))
    with transaction() as db:
        found = webhooks.find(db, caller.account_id, hook, lock=True)
        (delivery,) = webhooks.deliveries(db, found)
        webhooks.redeliver(db, found, delivery)
    receiver.answer = 200
    turn(hook)
    assert statuses(hook) == ["delivered"]
    assert len({h["webhook-id"] for h, _ in receiver.got}) == 1


def test_who_dies_after_sending_sends_it_again_under_the_same_id(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url, "job.finished")
    finished(caller)
    spread()
    (leased,) = deliver.lease(9, [], [])
    letter = deliver.first(leased[0], {})
    assert letter is not None
    assert asyncio.run(deliver.send(letter)).is_good  # and is killed before it is booked

    assert deliver.lease(9, [], []) == []  # while its lease lasts nobody else sends it
    ask("UPDATE webhooks SET leased_until = clock_timestamp()")
    with delivering():
        until(lambda: statuses(hook) == ["delivered"])

    assert len(receiver.got) == 2
    assert len({(h["webhook-id"], body) for h, body in receiver.got}) == 1


def test_each_event_has_one_delivery_whoever_looks_and_however_often(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url, "*")
    finished(caller, 5)

    with transaction() as db:
        assert webhooks.spread(db)
        db.rollback()  # a crash
    spread(limit=2)
    ask("UPDATE deliveries_upto SET number = 0")  # an old backup of just this
    spread()

    assert [r.event for r in ask("SELECT event FROM deliveries ORDER BY id")] == list(range(1, 8))
    assert statuses(hook) == ["pending"] * 7


def test_a_receiver_that_takes_nothing_has_few_rows_and_is_told_all_of_it_later(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url, "frame.*")
    finished(caller, 30)

    spread(waiting=10, limit=7)
    assert (len(statuses(hook)), row(hook).behind_from is not None) == (10, True)
    finished(caller, 2)
    spread(waiting=10, limit=7)
    assert len(statuses(hook)) == 10

    for _ in range(8):
        turn(hook)
        spread(waiting=10, limit=7)

    assert receiver.numbers == [n for n in range(1, 37) if n not in (1, 32, 33, 36)]
    assert row(hook).behind_from is None


def test_a_dead_receiver_delays_nobody(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliver, "WITHIN_S", 1.0)
    monkeypatch.setattr(deliver, "SLOTS", 6)
    with running() as dead:
        hang = threading.Event()
        dead.answer = lambda _: (hang.wait(30), None)[1]
        bad, good = account(), account("umbrella")
        for _ in range(20):
            finished(bad, webhook=Callback(url=dead.url))
        hook = added(good, receiver.url, "job.finished")
        with delivering():
            until(lambda: len(dead.got) >= 3)
            began = time.monotonic()
            finished(good)
            until(lambda: statuses(hook) == ["delivered"])
            assert time.monotonic() - began < 3
        hang.set()


def test_a_slow_spread_of_several_processes_sends_each_once(receiver: Receiver) -> None:
    caller = account()
    hooks = [added(caller, f"{receiver.url}/{k}", "*") for k in range(3)]

    with delivering(), delivering():
        finished(caller, 6)
        until(lambda: all(statuses(h) == ["delivered"] * 8 for h in hooks))

    assert len(receiver.got) == 24


def test_old_deliveries_and_callbacks_are_forgotten(receiver: Receiver) -> None:
    caller = account()
    hook = added(caller, receiver.url, "job.finished")
    finished(caller, webhook=Callback(url=receiver.url))
    spread()
    ask("UPDATE deliveries SET status = 'failed', next_at = NULL, ended_at = now() - interval '31 days';")
    ask("UPDATE jobs SET ended_at = now() - interval '31 days'")

    for _ in range(2):
        with transaction() as db:
            webhooks.forget(db)

    assert (one("SELECT count(*) FROM deliveries"), [r.id for r in ask("SELECT id FROM webhooks")]) == (
        0,
        [hook],
    )


# ------------------------------------------------------------------------------------------------ who may be told


def test_no_url_inside_is_taken_and_none_is_told(books: str) -> None:
    caller = account()
    for url in INSIDE:
        if "localhost" not in url:  # a name: the API looks it up, and so does who sends
            with pytest.raises(Invalid, match="url"), transaction() as db:
                webhooks.add(db, caller.account_id, url)
        letter = deliver.Letter(caller.account_id, 1, url, b"{}", {})
        _not_told(asyncio.run(deliver.send(letter)), url)


def _not_told(outcome: deliver.Outcome, url: str) -> None:
    assert outcome.status is None, url
    assert (
        "https" in outcome.error
        or "Internet" in outcome.error
        or "URL" in outcome.error
        or "host" in outcome.error
    )


def test_a_name_that_moved_inside_since_it_was_looked_at_is_told_nothing(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_ALLOWED_PRIVATE_HOSTS", "")
    settings.cache_clear()
    caller = account()
    port = receiver.server.server_port
    hook = added(caller, f"https://hooks.example:{port}/", "job.finished")
    finished(caller)
    spread()

    def moved(host: Any, port: Any, *_: Any, **__: Any) -> Any:
        assert host == "hooks.example"
        return [(2, 1, 6, "", ("93.184.216.34", port)), (2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", moved)
    turn(hook)

    assert receiver.got == []
    assert "public Internet" in last_try(hook)["error"]


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture
def keys(receiver: Receiver) -> dict[str, str]:
    with transaction() as db:
        pricing.sync(db, catalog.catalog())
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        return {"acme": accounts.issue_key(db, acme)[1], "umbrella": accounts.issue_key(db, umbrella)[1]}


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield client


def test_a_webhooks_life_over_http(api: TestClient, receiver: Receiver, keys: dict[str, str]) -> None:
    made = api.post("/v1/webhooks", json={"url": receiver.url}).json()
    assert made["kinds"] == ["job.*"]
    hook = f"/v1/webhooks/{made['id']}"
    shown = api.get(hook).json()
    assert shown == {k: v for k, v in made.items() if k != "secret"}
    assert api.get("/v1/webhooks").json()["webhooks"] == [shown]

    tested = api.post(f"{hook}/test")
    assert (tested.status_code, tested.json()["kind"]) == (202, "webhook.test")
    one_delivery = f"{hook}/deliveries/{tested.json()['id']}"
    with delivering():
        until(lambda: api.get(one_delivery).json()["status"] == "delivered")
        assert api.post(f"{one_delivery}/redeliver").status_code == 202
        until(lambda: api.get(one_delivery).json()["tries"] == 2)
    Standard(made["secret"]).verify(receiver.got[-1][1], receiver.got[-1][0])
    log = api.get(f"{hook}/deliveries").json()["deliveries"]
    assert [(d["status"], [t["status"] for t in d["log"]]) for d in log] == [("delivered", [204, 204])]

    rotated = api.post(f"{hook}/rotate").json()
    assert (rotated["version"], rotated["secret"] != made["secret"]) == (2, True)
    assert api.patch(hook, json={"disabled": True, "kinds": ["*"]}).json()["disabled"] == "asked"
    assert api.post(f"{hook}/test").status_code == 409
    assert api.patch(hook, json={"disabled": False}).json()["disabled"] is None

    api.headers["Authorization"] = f"Bearer {keys['umbrella']}"
    tries = [
        api.get(hook), api.patch(hook, json={"disabled": True}), api.delete(hook), api.post(f"{hook}/rotate"),
        api.post(f"{hook}/test"), api.get(f"{hook}/deliveries"), api.get(one_delivery),
        api.post(f"{one_delivery}/redeliver"),
    ]  # fmt: skip
    assert {t.status_code for t in tries} == {404}
    assert api.get("/v1/webhooks").json()["webhooks"] == []
    api.headers["Authorization"] = f"Bearer {keys['acme']}"
    assert api.delete(hook).status_code == 204
    assert api.get(hook).status_code == 404


def test_what_is_refused_names_its_field_and_stores_nothing(api: TestClient) -> None:
    for body, field in (
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": "https://localhost/"}, "url"),
        ({"url": "https://no-such-host.invalid/"}, "url"),
        ({"url": "http://127.0.0.1:1/", "kinds": ["Job"]}, "kinds"),
        ({"url": "http://127.0.0.1:1/", "kinds": []}, "kinds"),
        ({"url": "http://127.0.0.1:1/", "description": "\x00"}, "description"),
        ({"url": 7}, "url"),
        ({}, "url"),
        ({"url": "http://127.0.0.1:1/", "secret": "x"}, "secret"),
    ):
        answer = api.post("/v1/webhooks", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field), body
    for url in ("https://10.0.0.1/", "https://localhost/", "ftp://x/"):
        answer = api.post("/v1/jobs", json={"spec": {"prompt": "x"}, "webhook": {"url": url}})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "webhook.url")
    assert one("SELECT count(*) FROM webhooks") == one("SELECT count(*) FROM jobs") == 0


def test_a_submission_brings_its_callback_and_the_job_shows_it(api: TestClient, receiver: Receiver) -> None:
    body = {"spec": {"prompt": "a red circle"}, "webhook": {"url": receiver.url}}
    job = api.post("/v1/jobs", json=body).json()["id"]

    (found,) = api.get("/v1/webhooks", params={"job": job}).json()["webhooks"]

    assert (found["job"], found["url"], found["kinds"]) == (
        job,
        receiver.url,
        ["job.finished", "job.cancelled"],
    )
    assert api.get("/v1/webhooks").json()["webhooks"] == []
    assert api.post(f"/v1/webhooks/{found['id']}/rotate").status_code == 409
    rotated = api.post("/v1/webhooks/callbacks/rotate").json()
    api.post(f"/v1/jobs/{job}/cancel")
    relayed()
    with delivering():
        until(lambda: len(receiver.got) == 1)
    Standard(rotated["secret"]).verify(receiver.got[0][1], receiver.got[0][0])


def test_the_same_creation_under_one_key_is_one_webhook_with_one_secret(
    api: TestClient, receiver: Receiver
) -> None:
    headers = {"Idempotency-Key": "once"}
    made = [api.post("/v1/webhooks", json={"url": receiver.url}, headers=headers).json() for _ in range(2)]

    assert made[0] == made[1]
    assert made[0]["secret"].startswith("whsec_")
    kept = one("SELECT answer::text FROM kept_answers")
    assert made[0]["secret"] not in kept


def test_an_account_has_so_many_webhooks_and_no_more(
    api: TestClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "MOST", 2)

    made = [api.post("/v1/webhooks", json={"url": receiver.url}).status_code for _ in range(3)]

    assert made == [201, 201, 409]


def test_spreading_a_large_jobs_events_reads_no_table_from_end_to_end(books: str) -> None:
    caller = account()
    added(caller, "https://example.com/")
    with transaction() as db:
        plan = "\n".join(
            r[0] for r in db.execute(text("EXPLAIN " + sql("spread").text), {"n": 2000, "waiting": 1000})
        )
    whole = [line for line in plan.splitlines() if "Seq Scan" in line and "deliveries_upto" not in line]
    assert not whole, plan
    updated = plan[plan.index("Update on webhooks") :]
    assert "Index Cond: (id = ANY" in updated, plan
