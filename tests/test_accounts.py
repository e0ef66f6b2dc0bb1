"""Accounts and their API keys."""

import string
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from farm import accounts, ids
from farm.accounts import KEY, Caller, Role
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
