"""Requests that create something, sent again under their Idempotency-Key: done once, and answered the same."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from farm import accounts, catalog, pricing, sweep
from farm.accounts import Role
from farm.api.app import create_app
from farm.db import transaction
from tests.factories import ask, claim, one, settle

RED = {"prompt": "a red circle"}


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    with transaction() as db:
        pricing.sync(db, catalog.catalog())
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        return {
            "admin": accounts.issue_key(db, acme, role=Role.ADMIN)[1],
            "other": accounts.issue_key(db, umbrella, role=Role.ADMIN)[1],
        }


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['admin']}"
        yield client


def post(api: TestClient, path: str, body: Any, key: str = "k", **headers: str) -> httpx.Response:
    return api.post(path, json=body, headers={"Idempotency-Key": key, **headers})


def delivered(api: TestClient) -> str:
    """A frame that was charged."""
    job = api.post("/v1/jobs", json={"spec": RED}).json()
    pack = claim(models=("starter",), frames=1)
    assert pack is not None
    settle(pack)
    frame: str = api.get(f"{job['urls']['frames']}/0").json()["id"]
    return frame


CREATING = {
    "a quote": ("/v1/quotes", {"spec": RED}, {"spec": {**RED, "steps": 7}}, "quotes"),
    "an account": ("/v1/accounts", {"name": "hooli"}, {"name": "initech"}, "accounts"),
    "a key": ("/v1/accounts/umbrella/keys", {"role": "read"}, {"role": "submit"}, "api_keys"),
    "a price": (
        "/v1/prices",
        {"model": "starter", "rate": "0.5"},
        {"model": "starter", "rate": "0.6"},
        "prices",
    ),
}


@pytest.mark.parametrize("what", CREATING)
def test_fifty_at_once_make_one_and_get_equal_answers(api: TestClient, what: str) -> None:
    path, body, other, table = CREATING[what]
    before, together = one(f"SELECT count(*) FROM {table}"), threading.Barrier(50)

    def send(_: int) -> httpx.Response:
        together.wait()
        return post(api, path, body)

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(send, range(50)))

    assert {a.status_code for a in answers} == {201}
    assert len({a.text for a in answers}) == 1
    assert sum("Idempotent-Replayed" not in a.headers for a in answers) == 1
    assert one(f"SELECT count(*) FROM {table}") == before + 1
    refused = post(api, path, other)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert post(api, path, other, key="another").status_code == 201


def test_a_reversal_is_made_once(api: TestClient) -> None:
    body = {"frame": delivered(api), "reason": "blurred"}

    first, again = (post(api, "/v1/usage/reversals", body) for _ in range(2))
    without = api.post("/v1/usage/reversals", json=body)

    assert (first.status_code, first.text) == (201, again.text)
    assert without.status_code == 409


def test_a_keys_secret_is_not_kept_and_yet_repeated(api: TestClient) -> None:
    made = post(api, "/v1/accounts/umbrella/keys", {})
    rotated, again = (post(api, f"/v1/keys/{made.json()['id']}/rotate", {}) for _ in range(2))

    assert made.json() == post(api, "/v1/accounts/umbrella/keys", {}).json()
    assert (rotated.status_code, rotated.json()) == (200, again.json())
    assert rotated.json()["version"] == 2
    kept = str(ask("SELECT * FROM kept_answers"))
    for answer in (made, rotated):
        assert answer.json()["api_key"].split("_", 2)[2][:20] not in kept
    who = {"Authorization": f"Bearer {again.json()['api_key']}"}
    assert api.get("/v1/account", headers=who).json()["name"] == "umbrella"


def test_a_key_belongs_to_an_account_a_method_and_a_path(api: TestClient, keys: dict[str, str]) -> None:
    quote = post(api, "/v1/quotes", {"spec": RED})

    assert post(api, "/v1/jobs", {"spec": RED}).status_code == 202
    theirs = post(api, "/v1/quotes", {"spec": RED}, Authorization=f"Bearer {keys['other']}")
    assert theirs.status_code == 201
    assert theirs.json()["id"] != quote.json()["id"]


def test_what_was_refused_may_be_sent_again(api: TestClient) -> None:
    assert post(api, "/v1/accounts", {"name": "Hooli"}).status_code == 422
    assert post(api, "/v1/accounts", {"name": "acme"}).status_code == 409

    assert post(api, "/v1/accounts", {"name": "hooli"}).status_code == 201


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\tin it", "ümlaut"])
def test_a_key_that_is_not_allowed_is_refused(api: TestClient, key: str) -> None:
    answer = api.post(
        "/v1/accounts", json={"name": "hooli"}, headers={b"Idempotency-Key": key.encode("latin-1")}
    )

    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert one("SELECT count(*) FROM accounts") == 2


def test_what_is_being_worked_on_is_not_done_beside_it(api: TestClient) -> None:
    account = one("SELECT id FROM accounts WHERE name = 'acme'")
    name = f"{account}/POST /v1/accounts/k"
    with transaction() as db:  # somebody else at it
        db.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})

        answer = post(api, "/v1/accounts", {"name": "hooli"})

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:farm:in-progress")
    assert post(api, "/v1/accounts", {"name": "hooli"}).status_code == 201


def test_answers_are_kept_for_two_days(api: TestClient) -> None:
    post(api, "/v1/accounts", {"name": "hooli"})
    ask("UPDATE kept_answers SET created_at = now() - interval '47 hours'")
    sweep.tidy()
    assert post(api, "/v1/accounts", {"name": "hooli"}).status_code == 201

    ask("UPDATE kept_answers SET created_at = now() - interval '49 hours'")
    sweep.tidy()

    assert post(api, "/v1/accounts", {"name": "hooli"}).status_code == 409


# POSTs that create nothing, or that are carried out once by what they do: by id, by content, or by a key of their own
BY_NATURE = {
    "/v1/jobs/{job}/cancel", "/v1/jobs/{job}/approve", "/v1/jobs/{job}/pause", "/v1/jobs/{job}/resume",
    "/v1/bulk/{upload}/finish", "/v1/bulk/preview", "/v1/inputs", "/v1/statements/{month}/close",
    "/v1/keys/{key}/revoke", "/v1/batches/{batch}/cancel", "/v1/predictions/{prediction}/cancel",
    "/v1/images/variations", "/model/{model_id}/invoke", "/sdapi/v1/interrupt", "/sdapi/v1/options",
    "/prompt", "/queue", "/interrupt", "/history", "/upload/image", "/free",
    "/v1/workers/{worker}/drain", "/v1/workers/{worker}/undrain",
}  # fmt: skip


def test_every_post_that_creates_takes_an_idempotency_key(api: TestClient) -> None:
    without = {
        path
        for path, operations in api.get("/openapi.json").json()["paths"].items()
        if "post" in operations
        and "idempotency-key" not in {p["name"].lower() for p in operations["post"].get("parameters", [])}
    }

    assert without <= BY_NATURE
