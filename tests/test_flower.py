"""What admins read in Flower's task list."""

from types import SimpleNamespace
from typing import Any

import pytest

from farm.errors import Misconfigured
from farm.settings import settings

KEY = "farm_" + "0123456789abcdef" * 2 + "_" + "x" * 43 + "abcdef"


def shaped(name: str, **fields: Any) -> Any:
    from farm.flower.flowerconfig import format_task

    empty = {"args": None, "kwargs": None, "result": None, "exception": None, "traceback": None}
    return format_task(SimpleNamespace(name=name, **{**empty, **fields}))


def test_a_render_task_says_pool_images_time_and_outcome() -> None:
    facts = {
        "pool": "starter",
        "images": 12,
        "packs": 2,
        "seconds": 3.14,
        "outcome": "drained",
        "jobs": "job_1,job_2",
    }

    task = shaped("farm.render", args="('starter',)", kwargs=repr(facts), result="None")

    assert task.args == "pool starter"
    assert task.kwargs == "12 images in 2 packs, 3.1 s: job_1,job_2"
    assert task.result == "drained"


def test_a_render_task_that_has_not_claimed_yet_names_its_model() -> None:
    task = shaped("farm.render", args="('sdxl',)", kwargs="{}")

    assert (task.args, task.kwargs, task.result) == ("model sdxl", "", "")


def test_a_submission_says_what_it_asked_for_and_what_it_became() -> None:
    body = {"specs": [{"prompt": "a red circle", "count": 3}, {"prompt": "a star"}]}

    task = shaped("farm.submit", args=repr([body]), kwargs="{}", result="'job_1'")

    assert task.kwargs == '3 of "a red circle" and 1 spec more'
    assert task.result == "job_1"


def test_a_refused_submission_says_why() -> None:
    task = shaped(
        "farm.submit",
        args="[{'spec': {'prom...",
        exception="SubmissionRefused('spec.width: 3 is not allowed')",
    )

    assert task.result == "spec.width: 3 is not allowed"


@pytest.mark.parametrize("field", ["args", "kwargs", "result", "exception", "traceback"])
def test_a_key_in_any_field_of_any_task_is_taken_out(field: str) -> None:
    task = shaped("somebody.elses", **{field: f"[{{'key': '{KEY}'}}]"})

    assert KEY not in getattr(task, field)
    assert "farm_…" in getattr(task, field)


def test_flower_does_not_start_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from farm.flower import run

    monkeypatch.setenv("FARM_FLOWER_PASSWORD", "")
    settings.cache_clear()
    with pytest.raises(Misconfigured, match="FARM_FLOWER_PASSWORD is not set"):
        run()
    settings.cache_clear()
