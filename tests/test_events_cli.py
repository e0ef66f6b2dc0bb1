"""`farm events` and `farm webhooks`, against a real API."""

import json

import pytest

from farm.settings import settings
from tests.test_cli import Command, command, farm, url
from tests.test_webhooks import delivering, relayed, running, until

__all__ = ["command", "farm", "url"]  # fixtures


def test_events_are_listed_and_followed_to_the_end(farm: Command) -> None:
    job = json.loads(farm("submit", "a circle", "--json").out)["id"]
    assert farm("cancel", job).code == 0
    relayed()

    listed = json.loads(farm("events", job, "--json").out)
    followed = [json.loads(line) for line in farm("events", "last", "--follow", "--json").out.splitlines()]

    assert [e["kind"] for e in listed] == ["job.accepted", "job.cancelled"]
    assert followed == listed
    assert "job.cancelled" in farm("events", "--kinds", "job.cancelled").out
    assert "kinds" in farm("events", "--kinds", "No!").err


def test_a_page_that_is_full_says_where_to_go_on(farm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    job = json.loads(farm("submit", "a circle", "--json").out)["id"]
    assert farm("cancel", job).code == 0
    relayed()
    numbers = [e["number"] for e in json.loads(farm("events", job, "--json").out)]
    monkeypatch.setattr("farm.cli.events.PAGE", len(numbers))

    full = farm("events", job)

    assert f"--after {numbers[-1]}" in full.err
    assert "--after" not in farm("events", job, "--after", str(numbers[0])).err


def test_a_webhooks_life_on_the_command_line(farm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_ALLOWED_PRIVATE_HOSTS", "127.0.0.1")
    settings.cache_clear()
    with running() as receiver:
        made = json.loads(farm("webhooks", "add", receiver.url, "--kinds", "job.*", "--json").out)
        assert made["secret"].startswith("whsec_")
        assert made["id"] in farm("webhooks", "list").out
        assert made["secret"] not in farm("webhooks", "show", made["id"]).out
        with delivering():
            assert farm("webhooks", "test", made["id"]).code == 0
            until(lambda: len(receiver.got) == 1)
            until(lambda: "delivered" in farm("webhooks", "deliveries", made["id"]).out)
            (delivery,) = json.loads(farm("webhooks", "deliveries", made["id"], "--json").out)
            assert farm("webhooks", "redeliver", made["id"], str(delivery["id"])).code == 0
            until(lambda: len(receiver.got) == 2)
        assert json.loads(farm("webhooks", "rotate", made["id"], "--json").out)["version"] == 2
        assert json.loads(farm("webhooks", "rotate", "callbacks", "--json").out)["version"] == 2
        assert "disabled" in farm("webhooks", "change", made["id"], "--disable").out
        assert farm("webhooks", "remove", made["id"]).code == 0
        assert json.loads(farm("webhooks", "list", "--json").out) == []


def test_an_address_inside_is_refused_by_name(farm: Command) -> None:
    refused = farm("webhooks", "add", "https://169.254.169.254/")

    assert (refused.code, "url:" in refused.err) == (1, True)
