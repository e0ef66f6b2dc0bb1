"""`farm images` and `farm accounts set` against a real API; what `farm storage check` says stands in test_storage."""

import json

import httpx

from tests.factories import ask, one
from tests.test_cli import Command, command, farm, render, url  # noqa: F401 - fixtures


def submitted(farm: Command) -> str:  # noqa: F811
    ran = farm("submit", "a red circle", "--json")
    assert ran.code == 0, ran.err
    return str(json.loads(ran.out)["id"])


def test_images_are_linked_to_and_deleted(farm: Command) -> None:  # noqa: F811
    # given
    job = submitted(farm)
    assert farm("images", "delete", job, "--yes").code == 1  # it has not ended
    render()
    ask("UPDATE jobs SET status = 'finished', runnable = false, ended_at = now() WHERE ended_at IS NULL")

    # when
    link = farm("images", "url", job).out.strip()
    assert httpx.get(link).headers["content-type"] == "image/png"
    deleted = farm("images", "delete", job, "--yes", "--json")

    # then
    assert deleted.code == 0, deleted.err
    assert json.loads(deleted.out)["job"] == job
    assert farm("images", "url", job).code == 1
    assert "was deleted" in farm("images", "url", job).err


def test_how_long_images_are_kept_is_set_by_admins_over_http_or_offline(farm: Command) -> None:  # noqa: F811
    for offline in ([], ["--offline"]):
        ran = farm("accounts", "set", "acme", "--retention-days", "30", *offline)
        assert ran.code == 0, ran.err
        assert ran.out.startswith("images of acme are kept 30 days after their job's end")
        assert one("SELECT retention_days FROM accounts") == 30
        ran = farm("accounts", "set", "acme", "--retention-days", "forever", "--json", *offline)
        assert json.loads(ran.out)["retention_days"] is None
        wrong = farm("accounts", "set", "acme", "--retention-days", "0", *offline)
        assert (wrong.code, wrong.err) == (
            1,
            "retention_days: 0 is not allowed; allowed are 1 to 36500, or null to keep images\n",
        )
    assert farm("accounts", "set", "acme", "--retention-days", "soon").code == 2
