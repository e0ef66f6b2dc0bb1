"""The client, against a real server on a loopback port."""

import hashlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image

from farm import accounts, catalog, events, pricing, queue
from farm.accounts import Role
from farm.api.app import create_app
from farm.client import Farm
from farm.db import transaction
from farm.errors import (
    Away,
    Conflict,
    FarmError,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    RateLimited,
    Unauthorized,
)
from farm.queue import StoredFrame
from farm.settings import settings
from farm.spec import Asked
from farm.storage import image_key, open_store
from tests.factories import must_claim

RED = {"prompt": "a red circle"}


@contextmanager
def serving() -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    with transaction() as db:
        pricing.sync(db, catalog.catalog())
        acme = accounts.create(db, "acme")
        return {role.value: accounts.issue_key(db, acme, role=role)[1] for role in Role}


@pytest.fixture
def url(keys: dict[str, str]) -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture
def farm(url: str, keys: dict[str, str]) -> Iterator[Farm]:
    with Farm(url, keys["admin"]) as farm:
        yield farm


def rendered() -> None:
    """Claim what is queued and settle it with blank images."""
    pack = must_claim(models=("starter",), frames=8)
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    data = file.getvalue()
    digest = hashlib.sha256(data).digest()
    stored = [
        StoredFrame(
            frame_id=f.id,
            job_id=f.job_id,
            pack_id=pack.id,
            key=image_key(f.account_id, digest, "png"),
            format="png",
            sha256=digest,
            pixel_sha256=digest,
            bytes=len(data),
            width=64,
            height=64,
        )
        for f in pack.frames
    ]
    store = open_store(settings().storage_url.get_secret_value())
    store.put(stored[0].key, data, content_type="image/png")
    with transaction() as db:
        queue.settle(db, stored)
    with transaction() as db:
        queue.finish(db, [f.job_id for f in pack.frames])
    with transaction() as db:
        events.relay(db)


def test_a_job_is_sent_watched_and_fetched(farm: Farm) -> None:
    job = farm.submit({**RED, "count": 3}, priority="urgent", name="three")
    assert (job.status, job.frames, job.priority, job.name, job.ended) == ("queued", 3, 9, "three", False)

    threading.Timer(0.3, rendered).start()
    seen = list(farm.watch(job.id))

    assert (seen[-1].status, seen[-1].counts.done, seen[-1].charged) == ("finished", 3, "0.00075")
    assert not any(j.ended for j in seen[:-1])
    frames = list(farm.frames(job.id))
    assert [(f.index, f.status, f.cost) for f in frames] == [(n, "done", "0.00025") for n in range(3)]
    assert farm.frame(frames[1].id) == farm.frame(job.id, 1) == frames[1]
    image = farm.image(job.id, 2)
    assert frames[2].image is not None
    assert hashlib.sha256(image).hexdigest() == frames[2].image.sha256
    assert Image.open(io.BytesIO(farm.sheet(job.id))).format == "PNG"
    usage = farm.usage(since=datetime(2020, 1, 1, tzinfo=UTC))
    assert usage.totals == {"USD": "0.00075"}
    kinds = [e.kind for e in farm.events(job.id)]
    assert kinds == ["job.accepted", "frame.done", "frame.done", "frame.done", "job.finished"]
    assert (farm.audit().violations, farm.audit().unseen) == ([], [])


def test_several_specs_make_one_job_and_asked_is_a_spec_too(farm: Farm) -> None:
    job = farm.submit([RED, Asked(prompt="a blue square", count=2, seed=5)], priority=3)

    assert (job.frames, job.priority) == (3, 3)
    assert [f.seed for f in farm.frames(job.id)][1:] == [5, 6]
    assert [f.index for f in farm.frames(job.id, first=1, limit=1)] == [1]
    assert [f.index for f in farm.frames(job.id, status="queued")] == [0, 1, 2]
    assert farm.jobs() == [job]
    assert farm.jobs(before=job.id) == []


def test_a_key_makes_it_the_same_job(farm: Farm) -> None:
    one, two = farm.submit(RED, idempotency_key="order 1"), farm.submit(RED, idempotency_key="order 1")

    assert one == two
    assert farm.submit(RED) != farm.submit(RED)
    assert farm.jobs(idempotency_key="order 1") == [one]


def test_verbs(farm: Farm) -> None:
    job = farm.submit(RED).id

    assert farm.pause(job).status == "paused"
    assert farm.resume(job).status == "queued"
    assert farm.reprioritise(job, "bulk").priority == 1
    assert farm.cancel(job).status == "cancelled"
    assert [j.status for j in farm.watch(job)] == ["cancelled"]


def test_accounts_keys_and_models(farm: Farm, url: str) -> None:
    assert farm.me().role == "admin"
    assert {m.name for m in farm.models()} == set(catalog.catalog())
    assert farm.add_account("hooli", weight=3).weight == 3
    assert [a.name for a in farm.accounts()] == ["acme", "hooli"]
    key = farm.add_key("hooli", role="read")
    with Farm(url, key.api_key) as hooli:
        assert hooli.me().name == "hooli"
        rotated = farm.rotate_key(key.id)
        with pytest.raises(Unauthorized):
            hooli.me()
    assert rotated.api_key != key.api_key
    assert farm.revoke_key(key.id).revoked_at is not None
    assert [k.id for k in farm.keys("hooli")] == [key.id]
    assert farm.workers() == []


def test_errors_are_those_of_the_farm(farm: Farm, url: str, keys: dict[str, str]) -> None:
    job = farm.submit(RED).id

    with pytest.raises(Invalid) as refused:
        farm.submit([RED, {**RED, "width": 65}])
    [fault] = refused.value.faults
    assert (fault.field, fault.value) == ("specs[1].width", 65)
    assert "multiples of 8" in fault.allowed
    with pytest.raises(NotFound):
        farm.job("job_" + "0" * 32)
    with pytest.raises(NotFound):
        farm.job("../accounts")
    with pytest.raises(Conflict, match="no image yet"):
        farm.image(job, 0)
    farm.cancel(job)
    with pytest.raises(Gone):
        farm.image(job, 0)
    with pytest.raises(Conflict):
        farm.add_account("acme")
    with Farm(url, keys["read"]) as reader, pytest.raises(Forbidden):
        reader.submit(RED)
    with Farm(url, "") as nobody, pytest.raises(Unauthorized):
        nobody.me()


def test_the_address_and_key_come_from_the_environment(
    url: str, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_URL", url)
    monkeypatch.setenv("FARM_API_KEY", keys["read"])
    settings.cache_clear()

    with Farm() as farm:
        assert farm.me().role == "read"


# ------------------------------------------------------------------------------------------------ again


def scripted(*answers: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A transport that answers in turn, and what it was asked."""
    left, asked = list(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        now = left.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    return httpx.MockTransport(answer), asked


JOB = {
    "id": "job_1", "name": None, "status": "queued", "priority": 5, "frames": 1,
    "counts": {"queued": 1, "running": 0, "done": 0, "failed": 0, "cancelled": 0}, "progress": 0,
    "currency": "USD", "quoted": "1", "held": "1", "charged": "0", "created_at": "2026-01-01T00:00:00Z",
    "ended_at": None, "urls": {"self": "x", "frames": "x", "sheet": "x", "cancel": "x"},
    "of the next release": 1,
}  # fmt: skip


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client slept; the clock went on by as much."""
    began, naps = time.monotonic(), list[float]()
    monkeypatch.setattr("farm.client.time.sleep", naps.append)
    monkeypatch.setattr("farm.client.time.monotonic", lambda: began + sum(naps))
    return naps


def test_a_job_is_sent_again_under_the_same_key_until_it_is_accepted(slept: list[float]) -> None:
    transport, asked = scripted(
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("no answer"),
        httpx.Response(503, headers={"Retry-After": "3"}),
        httpx.Response(429),
        httpx.Response(202, json=JOB),
    )

    job = Farm("http://farm", "k", transport=transport).submit(RED)

    assert job.id == "job_1"
    assert len({r.headers["Idempotency-Key"] for r in asked}) == 1
    assert len({r.content for r in asked}) == 1
    assert slept == [0.2, 0.4, 3.0, 1.6]


def test_it_gives_up_and_says_why(slept: list[float]) -> None:
    transport, _ = scripted(*[httpx.ConnectError("refused")] * 99)

    with pytest.raises(Away, match="http://farm does not answer: refused"):
        Farm("http://farm", "k", transport=transport, patience_s=10).me()

    assert sum(slept) <= 10


@pytest.mark.parametrize("error", [httpx.ReadTimeout(""), httpx.Response(503), httpx.Response(502)])
def test_what_may_have_been_done_is_not_done_again(
    slept: list[float], error: httpx.Response | Exception
) -> None:
    transport, asked = scripted(error)

    with pytest.raises(Away):
        Farm("http://farm", "k", transport=transport).withdraw_price(
            "starter", datetime(2027, 1, 1, tzinfo=UTC)
        )

    assert len(asked) == 1
    assert slept == []


IN_PROGRESS = {"type": "urn:farm:in-progress", "title": "x", "status": 409, "detail": "x", "request": "x"}
LIMITED = {"type": "urn:farm:rate-limited", "title": "x", "status": 429, "detail": "x", "retry_after_s": 2}


@pytest.mark.parametrize(
    "call",
    [lambda f: f.add_key("acme"), lambda f: f.rotate_key("key_1"), lambda f: f.add_account("acme"),
     lambda f: f.quote(RED), lambda f: f.set_price("starter", "1"), lambda f: f.reverse("frm_1", "x")],
)  # fmt: skip
def test_what_creates_something_is_sent_again_under_one_key(
    slept: list[float], call: Callable[[Farm], Any]
) -> None:
    transport, asked = scripted(
        httpx.ReadTimeout(""),
        httpx.Response(409, json=IN_PROGRESS),
        httpx.Response(429, json=LIMITED, headers={"Retry-After": "2"}),
        httpx.Response(404, json={}),
    )

    with pytest.raises(NotFound):
        call(Farm("http://farm", "k", transport=transport))

    assert len({r.headers["Idempotency-Key"] for r in asked}) == 1
    assert len(asked) == 4
    assert slept == [0.2, 0.4, 2.0]


def test_too_many_is_said_with_when_to_come_back(slept: list[float]) -> None:
    transport, asked = scripted(httpx.Response(429, json=LIMITED, headers={"Retry-After": "600"}))

    with pytest.raises(RateLimited) as refused:
        Farm("http://farm", "k", transport=transport).me()

    assert refused.value.retry_after_s == 2
    assert (len(asked), slept) == (1, [])


def test_another_program_at_that_address_is_said_so() -> None:
    for answer in (
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(500, text="!"),
    ):
        transport, _ = scripted(answer)
        with pytest.raises(FarmError):
            Farm("http://farm", "k", transport=transport).me()
