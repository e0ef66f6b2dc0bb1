"""`farm usage`, `farm statement`, `farm margin` and `farm audit --images` against a real API on a real port."""

import io
import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from farm import events
from farm.db import transaction
from tests.factories import back_date
from tests.test_cli import Command, command, farm, render, submitted, url  # noqa: F401 - fixtures

NOW = datetime.now(UTC)
LAST = (date(NOW.year, NOW.month, 1) - timedelta(days=1)).replace(day=1)
MONTH = f"{LAST:%Y-%m}"


@pytest.fixture
def last_month(farm: Command) -> str:  # noqa: F811
    """A job of three images of last month; its id."""
    job = submitted(farm, "a red circle", "--count", "3", "--seed", "1")
    render()
    back_date(datetime(LAST.year, LAST.month, 20, tzinfo=UTC))
    with transaction() as db:
        events.relay(db)
    return job


def test_usage_is_exported_and_gone_on_with(farm: Command, last_month: str, tmp_path: Path) -> None:  # noqa: F811
    # given a file with all rows, the last of them cut off
    file = tmp_path / "usage.ndjson"
    assert farm("usage", "export", "-o", str(file)).code == 0
    whole = file.read_text()
    file.write_text(whole[:-30])

    # when
    ran = farm("usage", "export", "-o", str(file))

    # then
    assert file.read_text() == whole
    assert "1 rows" in ran.err
    rows = [json.loads(line) for line in farm("usage", "export").out.splitlines()]
    assert len(rows) == 3
    assert {r["job"] for r in rows} == {last_month}
    assert farm("usage", "export", "--cursor", rows[1]["cursor"]).out.count("\n") == 1
    assert "cursor: 'x' is not allowed" in farm("usage", "export", "--cursor", "x").err


def test_usage_is_shown_by_the_hour(farm: Command, last_month: str) -> None:  # noqa: F811
    since = f"{LAST:%Y-%m}-20"

    (row,) = json.loads(
        farm("usage", "hourly", "--since", since, "--until", f"{LAST:%Y-%m}-21", "--json").out
    )

    assert (row["frames"], row["amount"], row["final"]) == (3, "0.00075", True)
    within = row["hour"].replace(":00:00", ":59:59")
    assert json.loads(farm("usage", "hourly", "--since", within, "--json").out) == [row]
    assert "since:" in farm("usage", "hourly", "--since", "2020-01-01").err


def test_a_charge_is_reversed_with_a_reason(farm: Command, last_month: str) -> None:  # noqa: F811
    frame = json.loads(farm("frames", last_month, "--json").out)[0]["id"]

    assert farm("usage", "reverse", frame).code == 2
    assert "0.00025 USD" in farm("usage", "reverse", frame, "--reason", "blurred").out
    again = farm("usage", "reverse", frame, "--reason", "blurred")

    assert (again.code, again.err.strip()) == (1, "error: this charge was reversed before")
    assert json.loads(farm("job", last_month, "--json").out)["charged"] == "0.0005"
    assert farm("audit").code == 0


def test_a_statement_is_shown_closed_and_written(farm: Command, last_month: str, tmp_path: Path) -> None:  # noqa: F811
    # given
    assert "so far; a draft" in farm("statement", "acme", "--month", MONTH).out
    assert farm("statement", "close", "acme", "--month", MONTH).code == 0

    # then
    shown = json.loads(farm("statement", "--month", MONTH, "--json").out)
    assert (shown["status"], shown["total"], shown["exact"]) == ("closed", "0.00", "0.00075")
    assert "0.00 USD, closed" in farm("statement", "show", "acme", "--month", MONTH).out
    assert farm("statement", "acme", "--month", MONTH, "--csv").out.startswith(
        "account,month,status,currency,model"
    )
    page = tmp_path / "bill.html"
    assert farm("statement", "acme", "--month", MONTH, "--html", "-o", str(page)).code == 0
    assert page.read_text().startswith("<!doctype html>")
    for whose in ((), ("acme",), ("--account", "acme"), ("acme", "--account", "acme")):
        assert [s["month"] for s in json.loads(farm("statement", "list", *whose, "--json").out)] == [MONTH]
    assert farm("statement", "list", "--account", "nobody").code == 1
    assert farm("statement", "list", "acme", "--account", "nobody").code == 2
    assert farm("audit").code == 0


def test_all_accounts_are_closed_and_those_that_cannot_be_are_named(farm: Command, last_month: str) -> None:  # noqa: F811
    # given an account whose earlier month is not closed
    farm("accounts", "add", "umbrella")
    back_date(datetime(LAST.year, LAST.month, 20, tzinfo=UTC) - timedelta(days=31))

    # when
    ran = farm("statement", "close", "--all", "--month", MONTH)

    # then
    assert ran.code == 1
    assert "umbrella" in ran.out
    assert "acme: close" in ran.err
    assert farm("statement", "close", "--month", MONTH).code == 2
    assert farm("statement", "close", "acme", "--month", f"{NOW:%Y-%m}").code == 1
    assert farm("statement", "acme").code == 2


def test_the_margin_is_a_table_a_chart_and_json(farm: Command, last_month: str, tmp_path: Path) -> None:  # noqa: F811
    submitted(farm, "a star", "--count", "2")
    render()
    chart = tmp_path / "margin.png"

    since = f"{NOW - timedelta(days=1):%Y-%m-%d}"
    ran = farm("margin", "--since", since, "--chart", str(chart))
    shown = json.loads(farm("margin", "--since", since, "--json").out)

    assert ran.code == 0
    assert "starter" in ran.out
    assert Image.open(io.BytesIO(chart.read_bytes())).width == 2000
    assert [m["name"] for m in shown["models"]] == ["starter"]
    assert [(a["name"], a["frames"]) for a in shown["accounts"]] == [("acme", 2)]


@pytest.mark.parametrize("where", [(), ("--offline",)])
def test_an_audit_of_so_many_images_reads_none_of_them_twice(
    farm: Command,  # noqa: F811
    last_month: str,
    store_url: str,
    where: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given pages of one image, and three images that are wrong
    monkeypatch.setattr("farm.client.IMAGES", 1)
    monkeypatch.setattr("farm.cli.offline.IMAGES", 1)
    for file in Path(urlsplit(store_url).path).glob("v1/*/*.png"):
        file.write_bytes(b"something else")

    # then
    for asked, read in ((2, 2), (3, 3), (50, 3)):
        ran = farm("audit", "--images", str(asked), "--json", *where)
        assert f"{read} images read" in ran.err
        assert len({v["subject"] for v in json.loads(ran.out)}) == len(json.loads(ran.out)) == read


@pytest.mark.parametrize("where", [(), ("--offline",)])
def test_an_audit_reads_images_and_fails_if_one_is_not_as_booked(
    farm: Command,  # noqa: F811
    last_month: str,
    store_url: str,
    where: tuple[str, ...],
) -> None:
    # given
    ran = farm("audit", "--images", "all", *where)
    assert (ran.code, "3 images read" in ran.err) == (0, True)
    file = sorted(Path(urlsplit(store_url).path).glob("v1/*/*.png"))[0]
    file.write_bytes(b"something else")

    # then
    ran = farm("audit", "--images", "all", "--json", *where)
    assert ran.code == 1
    assert [v["violation"] for v in json.loads(ran.out)] == ["image differs from its hash"]
    assert "1 images read" in farm("audit", "--images", "1", *where).err
    assert farm("audit", *where).code == 0
    assert farm("audit", "--images", "some").code == 2
