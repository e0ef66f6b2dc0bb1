"""Events over HTTP: pages, and streams as a client of a running API sees them."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from farm import accounts, catalog, events, pricing
from farm.accounts import Role
from farm.api import events as streaming
from farm.api.app import create_app
from farm.client import Farm
from farm.db import transaction
from farm.errors import NotFound
from farm.streams import messages
from tests.factories import claim, one, settle

RED = {"prompt": "a red circle"}
STREAM = {"Accept": "text/event-stream"}


@contextmanager
def serving(port: int = 0) -> Iterator[tuple[str, FastAPI]]:
    listening = socket.create_server(("127.0.0.1", port))
    app = create_app()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app
    finally:
        app.state.feed.stop()
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    with transaction() as db:
        pricing.sync(db, catalog.catalog())
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        return {
            "acme": accounts.issue_key(db, acme)[1],
            "reader": accounts.issue_key(db, acme, role=Role.READ)[1],
            "umbrella": accounts.issue_key(db, umbrella)[1],
        }


@pytest.fixture
def served(keys: dict[str, str]) -> Iterator[tuple[str, FastAPI]]:
    with serving() as found:
        yield found


@pytest.fixture
def api(served: tuple[str, FastAPI], keys: dict[str, str]) -> Iterator[httpx.Client]:
    with client(served[0], keys["acme"]) as http:
        yield http


def client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=20)


def submitted(api: httpx.Client, count: int = 1) -> str:
    answer = api.post("/v1/jobs", json={"spec": {**RED, "count": count}})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def rendered(most: int = 1000, *, at_once: int = 8) -> None:
    while most and (pack := claim(models=("starter",), frames=min(at_once, most))):
        settle(pack)
        most -= len(pack.frames)
    relayed()


def relayed() -> None:
    with transaction() as db:
        events.relay(db)


def told(answer: httpx.Response, most: int = 10_000) -> Iterator[dict[str, Any]]:
    """The events of a stream, as a browser takes them apart."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line == "" and fields.keys() - {"retry"}:
            yield {**fields, "data": json.loads(fields["data"])}
            most -= 1
            if not most:
                return
        if line == "":
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


def ids_in(told: list[dict[str, Any]]) -> list[int]:
    return [int(e["id"]) for e in told if "id" in e]


# ------------------------------------------------------------------------------------------------ pages


def test_pages_and_kinds_and_another_accounts_events(
    api: httpx.Client, served: tuple[str, FastAPI], keys: dict[str, str]
) -> None:
    job = submitted(api, 3)
    rendered()

    every = api.get(f"/v1/jobs/{job}/events").json()["events"]
    assert [e["kind"] for e in every] == ["job.accepted", *["frame.done"] * 3, "job.finished"]
    page = api.get(f"/v1/jobs/{job}/events", params={"kinds": "job.*", "limit": 1}).json()
    assert ([e["kind"] for e in page["events"]], page["next"]) == (["job.accepted"], 1)
    rest = api.get("/v1/events", params={"kinds": "job.*", "after": page["next"]}).json()
    assert [e["kind"] for e in rest["events"]] == ["job.finished"]
    refused = api.get("/v1/events", params={"kinds": "job.*,No"})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "kinds")
    with client(served[0], keys["umbrella"]) as other:
        for accept in ({}, STREAM):
            assert other.get(f"/v1/jobs/{job}/events", headers=accept).status_code == 404
        assert other.get("/v1/events").json()["events"] == []


# ------------------------------------------------------------------------------------------------ streams


def test_a_stream_tells_a_job_from_its_start_to_its_end(api: httpx.Client) -> None:
    job = submitted(api, 2)
    relayed()

    with api.stream("GET", f"/v1/jobs/{job}/events", headers=STREAM) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        stream = told(answer)
        heard = [next(stream)]
        rendered()
        heard += stream

    assert [e["event"] for e in heard] == ["job.accepted", "frame.done", "frame.done", "job.finished", "end"]
    assert ids_in(heard) == [1, 2, 3, 4]
    assert heard[1]["data"]["job"] == job


def test_a_stream_goes_on_where_it_was_cut_across_a_restart_of_the_api(keys: dict[str, str]) -> None:
    with serving() as (url, _), client(url, keys["acme"]) as api:
        job = submitted(api, 6)
        relayed()
        with api.stream("GET", f"/v1/jobs/{job}/events", headers=STREAM) as answer:
            stream = told(answer)
            rendered(3, at_once=1)
            heard = [next(stream) for _ in range(3)]  # and the API stops while more is on its way
    rendered(1)
    with serving(int(url.rpartition(":")[2])) as (url, _), client(url, keys["acme"]) as api:
        resumed = {**STREAM, "Last-Event-ID": heard[-1]["id"]}
        with api.stream("GET", f"/v1/jobs/{job}/events", headers=resumed) as answer:
            stream = told(answer)
            rendered()
            heard += stream

        assert ids_in(heard) == [1, 2, 3, 4, 5, 6, 7, 8]
        again = api.get(f"/v1/jobs/{job}/events", headers={**STREAM, "Last-Event-ID": "8"})
        assert again.status_code == 204  # a browser does not come back after this
        bad = api.get(f"/v1/jobs/{job}/events", headers={**STREAM, "Last-Event-ID": "x"})
        assert (bad.status_code, bad.json()["errors"][0]["field"]) == (422, "Last-Event-ID")


def test_a_reader_that_stalls_is_cut_and_harms_nobody(
    api: httpx.Client, served: tuple[str, FastAPI], keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "STALLED_S", 0.5)
    url, app = served
    job = submitted(api)
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        stalled.connect((host, int(port)))
        stalled.sendall(
            f"GET /v1/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
            f"Authorization: Bearer {keys['acme']}\r\n\r\n".encode()
        )
        until(lambda: app.state.feed.listeners == 1)
        with api.stream("GET", "/v1/events", headers=STREAM) as answer:
            until(lambda: app.state.feed.listeners == 2)
            stream = told(answer)
            one(  # what does not fit between the two any more
                "WITH made AS (INSERT INTO outbox (account_id, kind, data)"
                " SELECT id, 'test.large', jsonb_build_object('text', repeat('x', 4000))"
                " FROM accounts, generate_series(1, 2500) WHERE name = 'acme' RETURNING 1)"
                " SELECT count(*) FROM made"
            )
            relayed()
            assert ids_in([next(stream) for _ in range(2500)]) == list(range(1, 2501))
        until(lambda: app.state.feed.listeners == 0)
        assert api.get(f"/v1/jobs/{job}").status_code == 200


def test_a_client_that_leaves_is_forgotten(api: httpx.Client, served: tuple[str, FastAPI]) -> None:
    feed = served[1].state.feed
    with api.stream("GET", "/v1/events", headers=STREAM):
        until(lambda: feed.listeners == 1)

    until(lambda: feed.listeners == 0)


def test_a_quiet_stream_says_that_it_is_still_there(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "HEARTBEAT_S", 0.05)

    with api.stream("GET", "/v1/events", headers=STREAM) as answer:
        lines = answer.iter_lines()
        assert any(line == ": still here" for line in lines)


def test_an_accounts_streams_are_counted(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MOST_OF_AN_ACCOUNT", 1)

    with api.stream("GET", "/v1/events", headers=STREAM) as first:
        assert first.status_code == 200
        lines = first.iter_lines()
        assert next(lines) == ": farm"
        assert api.get("/v1/events", headers=STREAM).status_code == 429


def until(reached: Any, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ waiting calls


def test_a_call_waits_for_the_end_of_a_job_or_until_its_time_is_up(
    api: httpx.Client, served: tuple[str, FastAPI]
) -> None:
    job = submitted(api)
    assert api.get(f"/v1/jobs/{job}", params={"wait": 0.1}).json()["status"] == "queued"

    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(api.get(f"/v1/jobs/{job}", headers={"Prefer": "wait=20"}))
    )
    thread.start()
    until(lambda: served[1].state.feed.waiters == 1)
    rendered()
    thread.join(10)

    assert answers[0].json()["status"] == "finished"
    assert api.get(f"/v1/jobs/{job}", params={"wait": 301}).status_code == 422
    assert api.get("/v1/jobs/job_" + "0" * 32, params={"wait": 20}).status_code == 404


def test_a_submission_may_wait_for_its_images(api: httpx.Client, served: tuple[str, FastAPI]) -> None:
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(api.post("/v1/jobs", params={"wait": 20}, json={"spec": RED}))
    )
    thread.start()
    until(lambda: served[1].state.feed.waiters == 1)
    rendered()
    thread.join(10)

    assert (answers[0].status_code, answers[0].json()["status"]) == (202, "finished")
    assert "location" in answers[0].headers


# ------------------------------------------------------------------------------------------------ the client


def test_the_client_follows_a_job_across_a_restart_and_misses_nothing(keys: dict[str, str]) -> None:
    heard: list[int] = []
    with serving() as (url, _), Farm(url, keys["acme"]) as farm:
        job = farm.submit({**RED, "count": 4}).id
        relayed()
        follower = threading.Thread(
            target=lambda: heard.extend(e.number for e in Farm(url, keys["acme"]).events(job))
        )
        follower.start()
        rendered(2, at_once=1)
        until(lambda: len(heard) == 3)
    rendered(1)
    with serving(int(url.rpartition(":")[2])), Farm(url, keys["acme"]) as farm:
        rendered()
        follower.join(20)

        assert heard == [1, 2, 3, 4, 5, 6]
        assert [e.number for e in farm.events(job, after=4)] == [5, 6]
        assert [e.kind for e in farm.past_events(job, kinds=["job.*"])] == ["job.accepted", "job.finished"]


def test_the_client_waits_for_a_job_and_no_longer_than_it_may(
    served: tuple[str, FastAPI], keys: dict[str, str]
) -> None:
    with Farm(served[0], keys["acme"]) as farm:
        job = farm.submit(RED).id
        assert farm.wait(job, timeout_s=0.1).status == "queued"
        timer = threading.Timer(0.3, rendered)
        timer.start()
        assert farm.wait(job).status == "finished"
        timer.join()
        with pytest.raises(NotFound):
            list(farm.events("job_" + "0" * 32))


def test_a_stream_is_read_as_the_standard_says() -> None:
    lines = [
        "retry: 9",
        ": hello",
        "",
        "id: 3",
        "event: a",
        "data: 1",
        "data:2",
        "",
        "data",
        "",
        "event: b",
        "",
    ]

    read = [(m.kind, m.data, m.id) for m in messages(lines)]

    assert read == [("a", "1\n2", "3"), ("message", "", "3")]
