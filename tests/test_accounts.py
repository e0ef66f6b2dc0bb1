"""Accounts and their API keys."""

import asyncio
import string
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from farm import accounts, ids
from farm.accounts import KEY, Caller, Role
from farm.api import door
from farm.api.app import create_app
from farm.db import transaction
from farm.errors import Conflict, Forbidden, Invalid, Misconfigured, NotFound, Unauthorized
from farm.settings import settings
from tests.factories import ask, one, until_blocked


@pytest.fixture
def key(database: str) -> str:
    """The text of a key that may submit, of account acme."""
    with transaction() as db:
        return accounts.issue_key(db, accounts.create(db, "acme", weight=3))[1]


def who(text: str) -> Caller:
    with transaction() as db:
        return accounts.authenticate(db, text)


def key_id() -> Any:
    return ask("SELECT id FROM api_keys")[0].id


def test_a_key_opens_its_own_account(key: str) -> None:
    caller = who(key)

    assert KEY.fullmatch(key)
    assert (caller.account, caller.currency, caller.role, caller.key_id) == (
        "acme",
        "USD",
        Role.SUBMIT,
        key_id(),
    )


def test_a_key_changed_in_any_one_character_opens_nothing(key: str) -> None:
    for k, char in enumerate(key):
        other = next(c for c in string.ascii_lowercase if c != char)
        with pytest.raises(Unauthorized):
            who(key[:k] + other + key[k + 1 :])


@pytest.mark.parametrize(
    "text", ["", "farm_", "farm_x_y", "Bearer x", "farm_" + "0" * 32 + "_" + "A" * 43 + "000000", "é"]
)
def test_what_is_no_key_opens_nothing(key: str, text: str) -> None:
    with pytest.raises(Unauthorized):
        who(text)
    with pytest.raises(Unauthorized):
        who(key + "\n")


def test_a_well_formed_key_of_an_id_nobody_has_opens_nothing(key: str) -> None:
    with pytest.raises(Unauthorized, match="not valid"):
        who(accounts.text_of(ids.new_id(1), 1))
    with pytest.raises(Unauthorized, match="not valid"):
        who(accounts.text_of(ids.new_id(1), 0))


def test_a_rotated_key_works_and_the_one_before_stops(key: str) -> None:
    with transaction() as db:
        new = accounts.rotate_key(db, key_id())

    assert who(new).account == "acme"
    with pytest.raises(Unauthorized):
        who(key)


def test_a_revoked_key_stops_and_stays_revoked_since_then(key: str) -> None:
    with transaction() as db:
        accounts.revoke_key(db, key_id())
    since = ask("SELECT revoked_at FROM api_keys")
    with transaction() as db:
        accounts.revoke_key(db, key_id())

    assert ask("SELECT revoked_at FROM api_keys") == since
    with pytest.raises(Unauthorized):
        who(key)


def test_a_key_that_is_not_there_is_not_rotated_or_revoked(key: str) -> None:
    for verb in (accounts.rotate_key, accounts.revoke_key):
        with pytest.raises(NotFound), transaction() as db:
            verb(db, ids.new_id(0))


def test_nothing_in_the_database_opens_anything(key: str) -> None:
    secret = KEY.fullmatch(key)[2]  # type: ignore[index]

    for table in ("accounts", "api_keys"):
        assert secret not in str(ask(f"SELECT * FROM {table}"))


def test_another_farms_secret_makes_other_keys(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_SECRET", "another secret of 32 characters or more")
    settings.cache_clear()

    with pytest.raises(Unauthorized):
        who(key)


def test_a_short_secret_is_refused_by_name(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_SECRET", "short")
    settings.cache_clear()

    with pytest.raises(Misconfigured, match="FARM_SECRET"):
        who(key)


@pytest.mark.parametrize(("role", "may"), [("read", 1), ("submit", 2), ("admin", 3)])
def test_a_role_may_what_the_one_before_may(database: str, role: str, may: int) -> None:
    with transaction() as db:
        caller = accounts.authenticate(
            db, accounts.issue_key(db, accounts.create(db, "acme"), role=Role(role))[1]
        )

    for n, needed in enumerate(Role):
        if n < may:
            caller.require(needed)
        else:
            with pytest.raises(Forbidden):
                caller.require(needed)


@pytest.mark.parametrize(
    ("name", "more", "field"),
    [
        ("", {}, "name"),
        ("Acme", {}, "name"),
        ("-acme", {}, "name"),
        ("a" * 64, {}, "name"),
        ("acme\n", {}, "name"),
        ("acme", {"currency": "usd"}, "currency"),
        ("acme", {"weight": 0}, "weight"),
        ("acme", {"weight": 1001}, "weight"),
    ],
)
def test_an_account_that_is_not_allowed_is_refused_by_field(
    database: str, name: str, more: dict[str, Any], field: str
) -> None:
    with pytest.raises(Invalid) as refusal, transaction() as db:
        accounts.create(db, name, **more)

    assert [f.field for f in refusal.value.faults] == [field]
    assert ask("SELECT * FROM accounts") == []


def test_a_name_is_taken_once(key: str) -> None:
    with pytest.raises(Conflict), transaction() as db:
        accounts.create(db, "acme")


def test_accounts_and_keys_are_listed_and_found(key: str) -> None:
    with transaction() as db:
        accounts.create(db, "zebra")
        accounts.issue_key(db, accounts.find(db, "acme"), role=Role.READ)

        assert [a.name for a in accounts.every(db)] == ["acme", "zebra"]
        assert [k.role for k in accounts.keys_of(db, accounts.find(db, "acme"))] == ["submit", "read"]
        with pytest.raises(NotFound):
            accounts.find(db, "nobody")


def test_of_two_that_add_the_same_account_at_once_the_later_is_told(database: str) -> None:
    with ThreadPoolExecutor(1) as thread:
        with transaction() as db:
            accounts.create(db, "acme")
            later = thread.submit(_add, "acme")
            until_blocked()

        with pytest.raises(Conflict, match="of this name exists"):
            later.result()
    assert one("SELECT count(*) FROM accounts") == 1


def _add(name: str) -> None:
    with transaction() as db:
        accounts.create(db, name)


# ------------------------------------------------------------------------------------------------ keys, further


def test_scopes_say_what_a_key_may_and_no_more(database: str) -> None:
    with transaction() as db:
        acme = accounts.create(db, "acme")
        caller = accounts.authenticate(db, accounts.issue_key(db, acme, scopes=[Role.SUBMIT])[1])
        implied = accounts.authenticate(db, accounts.issue_key(db, acme, scopes=[Role.SUBMIT, Role.READ])[1])

    caller.require(Role.SUBMIT)
    for other in (Role.READ, Role.ADMIN):
        with pytest.raises(Forbidden, match="scope"):
            caller.require(other)
    assert (implied.role, implied.scopes) == (Role.SUBMIT, None)
    with pytest.raises(Invalid), transaction() as db:
        accounts.issue_key(db, acme, scopes=[])


def test_a_key_opens_nothing_once_it_has_expired(key: str) -> None:
    with transaction() as db:
        accounts.change_key(db, key_id(), {"expires_at": datetime.now(UTC) + timedelta(hours=1)})
    assert who(key).account == "acme"

    ask("UPDATE api_keys SET expires_at = clock_timestamp()")

    with pytest.raises(Unauthorized):
        who(key)
    with transaction() as db:
        accounts.change_key(db, key_id(), {"expires_at": None})
    assert who(key).account == "acme"


def test_a_name_or_time_that_is_not_allowed_is_refused_by_field(key: str) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    for name, value in (("name", ""), ("name", "x" * 101), ("name", "a\0b"), ("expires_at", past)):
        with pytest.raises(Invalid) as refusal, transaction() as db:
            accounts.change_key(db, key_id(), {name: value})
        assert [f.field for f in refusal.value.faults] == [name]
    assert ask("SELECT name, expires_at FROM api_keys") == [(None, None)]


def test_a_rotated_secret_works_for_as_long_as_was_said(key: str) -> None:
    with transaction() as db:
        second = accounts.rotate_key(db, key_id(), overlap_s=60)
    assert who(key) == who(second)

    with transaction() as db:
        third = accounts.rotate_key(db, key_id(), overlap_s=60)
    assert who(second) == who(third)
    with pytest.raises(Unauthorized):  # two before
        who(key)

    ask("UPDATE api_keys SET previous_until = clock_timestamp()")
    with pytest.raises(Unauthorized):
        who(second)
    assert who(third).account == "acme"


def test_a_revoked_key_is_not_rotated_and_an_overlap_has_an_end(key: str) -> None:
    with pytest.raises(Invalid), transaction() as db:
        accounts.rotate_key(db, key_id(), overlap_s=accounts.MAX_OVERLAP_S + 1)
    with transaction() as db:
        accounts.revoke_key(db, key_id())
    with pytest.raises(Conflict), transaction() as db:
        accounts.rotate_key(db, key_id())


def test_when_a_key_was_used_is_written_once_a_minute_and_not_by_the_request(key: str) -> None:
    app = create_app()
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as api:
        assert api.get("/v1/account").status_code == 200
        assert one("SELECT last_used_at FROM api_keys") is None

        app.state.door.note()

        used = one("SELECT last_used_at FROM api_keys")
        assert one("SELECT clock_timestamp()") - used < timedelta(seconds=10)
        app.state.door.note()
        assert one("SELECT last_used_at FROM api_keys") == used
        assert api.get("/v1/account").status_code == 200
    assert one("SELECT last_used_at FROM api_keys") > used  # on the way out


def test_a_known_key_is_looked_up_again_after_a_while(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app()
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as api:
        assert api.get("/v1/account").status_code == 200
        with transaction() as db:  # by another process
            accounts.revoke_key(db, key_id())
        assert api.get("/v1/account").status_code == 200

        now = time.monotonic()
        monkeypatch.setattr("farm.api.door.time.monotonic", lambda: now + door.KNOWN_S + 1)

        assert api.get("/v1/account").status_code == 401
    assert door.KNOWN_S <= 5


def test_a_key_is_looked_up_once_for_all_who_ask_at_once(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # given
    looked_up: list[str] = []
    look_up = door._look_up
    monkeypatch.setattr(door, "_look_up", lambda text: (looked_up.append(text), look_up(text))[1])

    async def ask_twenty() -> set[Any]:
        entrance = door.Door()
        return {known.caller for known in await asyncio.gather(*(entrance.find(key) for _ in range(20)))}

    # when
    callers = asyncio.run(ask_twenty())

    # then
    assert callers == {who(key)}
    assert looked_up == [key]


def test_a_key_that_is_revoked_while_it_is_looked_up_is_not_kept(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    found, go_on = threading.Event(), threading.Event()
    look_up = door._look_up

    def slow(text: str) -> door.Known:
        known = look_up(text)
        found.set()
        assert go_on.wait(20)
        return known

    async def ask_twice() -> None:
        entrance = door.Door()
        monkeypatch.setattr(door, "_look_up", slow)
        first = asyncio.create_task(entrance.find(key))
        assert await asyncio.to_thread(found.wait, 20)
        with transaction() as db:
            accounts.revoke_key(db, key_id())
        entrance.forget()
        monkeypatch.setattr(door, "_look_up", look_up)

        # when
        with pytest.raises(Unauthorized):
            await entrance.find(key)
        go_on.set()

        # then
        assert (await first).caller.account_id
        with pytest.raises(Unauthorized):
            await entrance.find(key)

    asyncio.run(ask_twice())
