"""What accounts may do at most: open frames, input images, requests a second."""

import io
from collections.abc import Iterator

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from fastapi.testclient import TestClient
from httpx import Response
from PIL import Image

from farm import accounts, budgets, catalog, intake, ledger, limits, pricing
from farm.accounts import Caller, Role
from farm.api.app import create_app
from farm.api.limits import Failures
from farm.db import transaction
from farm.errors import Invalid, QueueFull
from farm.ids import public
from farm.settings import settings
from tests.factories import account, ask, must_claim, one, settle, submit

RED = {"prompt": "a red circle"}


def allow(caller: Caller, **changes: float | int | None) -> None:
    with transaction() as db:
        limits.put(db, accounts.find(db, caller.account), changes)


def used(caller: Caller) -> int:
    with transaction() as db:
        return limits.use(db, caller.account_id).open_frames


def fold() -> None:
    """What the sweep does with the counts of frames that ended."""
    with transaction() as db:
        ledger.fold_counts(db)
    with transaction() as db:
        budgets.fold(db)


# ------------------------------------------------------------------------------------------------ open frames


def test_an_account_has_no_more_open_frames_than_it_may(books: str) -> None:
    acme, umbrella = account(), account("umbrella")
    allow(acme, open_frames=5)
    submit(acme, 3)

    with pytest.raises(QueueFull) as refused:
        submit(acme, 3)

    facts = refused.value.facts
    assert (facts["used"], facts["allowed"], facts["needed"], facts["limit"]) == (3, 5, 3, "account")
    assert facts["retry_after_s"] == limits.PACE_UNKNOWN_S
    submit(acme, 2)
    submit(umbrella, 6)
    assert (used(acme), used(umbrella)) == (5, 6)
    assert one("SELECT count(*) FROM jobs") == 3


def test_what_has_ended_makes_room_once_it_is_folded(books: str) -> None:
    acme = account()
    allow(acme, open_frames=4)
    submit(acme, 4)
    settle(must_claim(frames=3))
    assert used(acme) == 4

    fold()

    assert used(acme) == 1
    submit(acme, 3)
    fold()
    assert used(acme) == 4


def test_who_is_refused_is_told_when_there_is_room_at_the_pace_of_late(books: str) -> None:
    acme = account()
    allow(acme, open_frames=10)
    submit(acme, 10)
    settle(must_claim(frames=4))
    ask(
        "UPDATE packs SET claimed_at = now() - interval '8 s', closed_at = now(), lease_until = now()"
        " WHERE outcome = 'settled'"
    )
    assert one("SELECT count(*) FROM packs WHERE outcome = 'settled'") == 1

    with pytest.raises(QueueFull) as refused:
        submit(acme, 6)

    assert refused.value.retry_after_s == 12  # four frames took eight seconds, and six are too many


def test_a_job_that_can_never_fit_is_refused_for_good(books: str) -> None:
    acme = account()
    allow(acme, open_frames=5)

    with pytest.raises(Invalid, match="may have 5 frames") as refused:
        submit(acme, 6)

    assert [f.value for f in refused.value.faults] == [6]


def test_the_farm_has_a_bound_of_its_own(books: str, monkeypatch: pytest.MonkeyPatch) -> None:
    acme, umbrella = account(), account("umbrella")
    monkeypatch.setenv("FARM_MAX_FARM_FRAMES", "5")
    settings.cache_clear()
    submit(acme, 3)

    with pytest.raises(QueueFull) as refused:
        submit(umbrella, 3)

    assert (refused.value.facts["limit"], refused.value.facts["allowed"]) == ("farm", 5)


def test_the_audit_sees_open_frames_that_are_counted_wrongly(database: str) -> None:
    with transaction() as db:
        pricing.sync(db, catalog.catalog())
    acme = account()
    submit(acme, 3, models=catalog.catalog(), model="starter")
    ask("UPDATE tallies SET open_frames = open_frames + 1")

    with transaction() as db:
        found = ledger.audit(db)

    assert [(v.violation, v.detail) for v in found] == [
        ("open frames counted otherwise than by jobs", "tallied 4, open 3")
    ]


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    with transaction() as db:
        pricing.sync(db, catalog.catalog())
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        return {
            "acme": accounts.issue_key(db, acme)[1],
            "second": accounts.issue_key(db, acme)[1],
            "admin": accounts.issue_key(db, acme, role=Role.ADMIN)[1],
            "umbrella": accounts.issue_key(db, umbrella)[1],
        }


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield client


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def limited(api: TestClient, keys: dict[str, str], name: str = "acme", **changes: object) -> None:
    answer = api.patch(f"/v1/accounts/{name}/limits", json=changes, headers=as_(keys["admin"]))
    assert answer.status_code == 200, answer.text


def id_of(key: str) -> str:
    return "key_" + key.split("_")[1]


def test_the_queue_is_full_answers_429_with_numbers_and_when_to_return(
    api: TestClient, keys: dict[str, str]
) -> None:
    limited(api, keys, open_frames=4)
    assert api.post("/v1/jobs", json={"spec": {**RED, "count": 3}}).status_code == 202

    answer = api.post("/v1/jobs", json={"spec": {**RED, "count": 2}}, headers={"Idempotency-Key": "k"})

    assert (answer.status_code, answer.json()["type"]) == (429, "urn:farm:queue-full")
    assert answer.headers["Retry-After"] == str(answer.json()["retry_after_s"])
    told = {n: answer.json()[n] for n in ("used", "allowed", "needed")}
    assert told == {"used": 3, "allowed": 4, "needed": 2}
    assert "3 frames that have not ended, of 4" in answer.json()["detail"]
    assert one("SELECT count(*) FROM jobs") == 1
    assert one("SELECT count(*) FROM idempotency_keys") == 0
    shown = api.get("/v1/limits").json()
    assert shown["open_frames"] == {"used": 3, "allowed": 4}


def test_jobs_through_celery_meet_the_same_limits(api: TestClient, keys: dict[str, str]) -> None:
    limited(api, keys, open_frames=1)

    def accept(name: str) -> None:
        intake.accept({"spec": RED}, {intake.API_KEY: keys["acme"], intake.IDEMPOTENCY_KEY: name})

    accept("1")
    with pytest.raises(QueueFull, match="1 frames that have not ended, of 1"):
        accept("2")
    accept("1")
    assert one("SELECT count(*) FROM jobs") == 1


def test_submissions_have_a_rate_of_their_own(api: TestClient, keys: dict[str, str]) -> None:
    limited(api, keys, submissions_per_s=0.2)  # two at once

    answers = [api.post("/v1/jobs", json={"spec": RED}) for _ in range(3)]

    assert [a.status_code for a in answers] == [202, 202, 429]
    refused = answers[-1]
    assert refused.json()["type"] == "urn:farm:rate-limited"
    assert 1 <= int(refused.headers["Retry-After"]) <= 5
    assert '"account-submissions";q=2;w=10' in refused.headers["RateLimit-Policy"]
    assert '"account-submissions";r=0;t=10' in refused.headers["RateLimit"]
    assert '"account-writes"' in refused.headers["RateLimit"]
    assert api.get("/v1/jobs").status_code == 200
    assert api.post("/v1/jobs", json={"spec": RED}, headers=as_(keys["second"])).status_code == 429
    assert api.post("/v1/jobs", json={"spec": RED}, headers=as_(keys["umbrella"])).status_code == 202
    assert one("SELECT count(*) FROM jobs") == 3


def test_reads_are_counted_apart_and_said_in_every_answer(api: TestClient, keys: dict[str, str]) -> None:
    limited(api, keys, reads_per_s=0.3)

    found = [api.get("/v1/jobs") for _ in range(4)]

    assert [a.status_code for a in found] == [200, 200, 200, 429]
    assert [a.headers["RateLimit"].split(";")[1] for a in found] == ["r=2", "r=1", "r=0", "r=0"]
    assert api.post("/v1/jobs", json={"spec": RED}).status_code == 202
    assert "RateLimit" not in api.get("/health/live").headers


def test_a_key_may_have_less_than_its_account(api: TestClient, keys: dict[str, str]) -> None:
    limited(api, keys, key=id_of(keys["second"]), writes_per_s=0.1)

    first = api.post("/v1/jobs", json={"spec": RED}, headers=as_(keys["second"]))
    refused = api.post("/v1/jobs", json={"spec": RED}, headers=as_(keys["second"]))

    assert (first.status_code, refused.status_code) == (202, 429)
    assert refused.json()["limit"] == "key-writes"
    assert api.post("/v1/jobs", json={"spec": RED}).status_code == 202
    shown = api.get("/v1/limits", headers=as_(keys["umbrella"])).json()
    assert shown["key_rates"]["writes_per_s"] == settings().writes_per_s


def test_limits_are_the_settings_again_when_they_are_taken_away(
    api: TestClient, keys: dict[str, str]
) -> None:
    limited(api, keys, reads_per_s=0, open_frames=3, inputs=2, input_bytes=10)
    assert api.get("/v1/jobs").status_code == 429

    limited(api, keys, reads_per_s=None, open_frames=None)

    shown = api.get("/v1/limits").json()
    assert shown["account_rates"]["reads_per_s"] == settings().reads_per_s
    assert shown["open_frames"]["allowed"] == settings().max_open_frames
    assert (shown["inputs"]["allowed"], shown["input_bytes"]["allowed"]) == (2, 10)


def test_processes_share_the_rates_between_them(
    api: TestClient, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_API_PROCESSES", "4")
    settings.cache_clear()
    limited(api, keys, submissions_per_s=0.8)

    answers = [api.post("/v1/jobs", json={"spec": RED}).status_code for _ in range(3)]

    assert answers == [202, 202, 429]


# ------------------------------------------------------------------------------------------------ wrong keys


def wrong_keys(monkeypatch: pytest.MonkeyPatch, per_min: str) -> None:
    monkeypatch.setenv("FARM_WRONG_KEYS_PER_MIN", per_min)
    settings.cache_clear()


def test_wrong_keys_from_an_address_are_counted_and_right_ones_keep_working(
    api: TestClient, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given an address that may send three a minute
    wrong_keys(monkeypatch, "3")
    with transaction() as db:
        gone, revoked = accounts.issue_key(db, accounts.find(db, "acme"))
        accounts.revoke_key(db, gone.id)
    assert api.get("/v1/jobs").status_code == 200

    # when
    sent = [api.get("/v1/jobs", headers=as_(key)) for key in ("farm_x", revoked, keys["acme"] + "x", revoked)]

    # then
    assert [a.status_code for a in sent] == [401, 401, 401, 429]
    assert sent[-1].json()["type"] == "urn:farm:rate-limited"
    assert (sent[-1].json()["limit"], sent[-1].json()["allowed_per_min"]) == ("address-wrong-keys", 3)
    assert 1 <= int(sent[-1].headers["Retry-After"]) <= 20
    assert api.post("/sdapi/v1/txt2img", json=RED, headers=as_(revoked)).status_code == 429
    assert api.get("/v1/jobs").status_code == 200
    assert api.get("/v1/jobs", headers=as_(keys["second"])).status_code == 200  # never seen before
    assert api.get("/v1/jobs", headers={"Authorization": ""}).status_code == 401  # it guesses nothing
    assert api.get("/v1/jobs", headers=as_(revoked)).status_code == 429


def test_wrong_signatures_count_as_wrong_keys(
    api: TestClient, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_keys(monkeypatch, "2")
    key_id = keys["acme"].split("_")[1]

    def sent(secret: str) -> Response:
        url, body = "http://testserver/model/starter/invoke", b'{"text_prompts": []}'
        request = AWSRequest(method="POST", url=url, data=body)
        SigV4Auth(Credentials(key_id, secret), "bedrock", "eu-central-1").add_auth(request)
        return api.post(url, content=body, headers=dict(request.headers))

    assert [sent("guessed").status_code for _ in range(4)] == [403, 403, 429, 429]
    assert sent("guessed").headers["x-amzn-ErrorType"] == "ThrottlingException"
    assert sent(keys["acme"]).status_code == 400  # it opens, and the body says nothing


def test_wrong_keys_of_one_address_are_not_anothers(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_keys(monkeypatch, "2")
    app = create_app()

    def get(host: str) -> int:
        client = TestClient(app, client=(host, 1))
        return client.get("/v1/jobs", headers=as_("farm_x")).status_code

    assert [get("192.0.2.1") for _ in range(3)] == [401, 401, 429]
    assert get("192.0.2.2") == 401
    assert [get(f"2001:db8::{n}") for n in (1, 2, 3)] == [401, 401, 429]  # one network's
    assert get("2001:db8:0:1::1") == 401


def test_an_address_may_send_wrong_keys_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_keys(monkeypatch, "2")
    now = 1000.0
    monkeypatch.setattr("farm.api.limits.time.monotonic", lambda: now)
    failures = Failures()
    refused = [failures.count("192.0.2.1") for _ in range(3)][-1]
    assert refused is not None
    assert (refused.retry_after_s, failures.too_many("192.0.2.1")) == (30, True)

    now += 30

    assert not failures.too_many("192.0.2.1")
    assert failures.count("192.0.2.1") is None
    assert failures.count("192.0.2.1") is not None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"open_frames": -1}, "open_frames"),
        ({"open_frames": "3"}, "open_frames"),
        ({"reads_per_s": 1e7}, "reads_per_s"),
        ({"inputs": 2**31}, "inputs"),
        ({"frames": 3}, "frames"),
    ],
)
def test_limits_that_are_not_allowed_are_refused_by_field(
    api: TestClient, keys: dict[str, str], changes: dict[str, object], field: str
) -> None:
    answer = api.patch("/v1/accounts/acme/limits", json=changes, headers=as_(keys["admin"]))

    assert answer.status_code == 422
    assert [e["field"] for e in answer.json()["errors"]] == [field]
    assert one("SELECT count(*) FROM limits") == 0


def test_limits_are_the_admins_to_set_and_a_key_is_its_accounts(
    api: TestClient, keys: dict[str, str]
) -> None:
    path, admin = "/v1/accounts/acme/limits", as_(keys["admin"])

    assert api.patch(path, json={"inputs": 1}).status_code == 403
    assert api.get(path).status_code == 403
    theirs = {"key": id_of(keys["umbrella"]), "reads_per_s": 1}
    assert api.patch(path, json=theirs, headers=admin).status_code == 404
    own = {"key": id_of(keys["acme"]), "open_frames": 1}
    refused = api.patch(path, json=own, headers=admin)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "open_frames")
    assert api.patch("/v1/accounts/nobody/limits", json={"inputs": 1}, headers=admin).status_code == 404


# ------------------------------------------------------------------------------------------------ inputs


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def send(api: TestClient, data: bytes):
    return api.post("/v1/inputs", content=data, headers={"Content-Type": "image/png"})


def test_input_images_are_counted_and_there_is_an_end_to_them(api: TestClient, keys: dict[str, str]) -> None:
    red, blue = picture("red"), picture("blue")
    limited(api, keys, inputs=1)
    first = send(api, red)
    assert first.status_code == 201

    refused = send(api, blue)

    assert (refused.status_code, refused.json()["used"], refused.json()["allowed"]) == (413, 1, 1)
    assert send(api, red).status_code == 200  # it is there already
    assert api.get("/v1/limits").json()["input_bytes"]["used"] == len(red)
    assert api.delete(f"/v1/inputs/{first.json()['id']}").status_code == 204
    assert send(api, blue).status_code == 201


def test_the_bytes_of_input_images_have_an_end_too(api: TestClient, keys: dict[str, str]) -> None:
    red, blue = picture("red"), picture("blue")
    limited(api, keys, input_bytes=len(red))

    assert send(api, red).status_code == 201
    refused = send(api, blue)

    facts = {n: refused.json()[n] for n in ("used_bytes", "allowed_bytes", "needed_bytes")}
    assert (refused.status_code, facts) == (
        413,
        {"used_bytes": len(red), "allowed_bytes": len(red), "needed_bytes": len(blue)},
    )
    assert one("SELECT count(*) FROM inputs") == 1


def test_a_key_is_said_with_its_limits(api: TestClient, keys: dict[str, str]) -> None:
    with transaction() as db:
        caller = accounts.authenticate(db, keys["acme"])

    shown = api.get("/v1/limits").json()

    assert (shown["account"], shown["key"]) == ("acme", public("key", caller.key_id))
