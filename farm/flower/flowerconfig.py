"""Flower's options, and what its task list shows. `farm flower` runs it; so does
`celery -A farm.tokens:app flower --conf=farm/flower/flowerconfig.py`, given FARM_FLOWER_PASSWORD.
"""

import ast
import re
from typing import Any

from flower.views import tasks as pages

from farm import tokens
from farm.intake import redact
from farm.settings import settings

_settings = settings()

address = _settings.flower_host
port = _settings.flower_port
basic_auth = [f"{_settings.flower_user}:{_settings.flower_password.get_secret_value()}"]
max_tasks = 10_000  # 52 MB; the default of 100,000 takes 465 MB
natural_time = True
purge_offline_workers = 3600  # seconds: a pool that was scaled down does not stay on the list
tasks_columns = "name,args,kwargs,result,state,received,runtime,worker,uuid"

LOST = ("FAILURE", "REVOKED")  # how Celery says that the process died under a task
MAX_CELL = 60  # characters; a task's own page shows everything

# Flower has no columns of our own; these three of its own carry ours. Only the labels lean on its insides.
LABELS = {"args": "For", "kwargs": "Images", "result": "Outcome"}
getattr(pages, "TASK_COLUMNS", {}).update(LABELS)


def format_task(task: Any) -> Any:
    """Shape one row. A key in any of these texts is taken out."""
    for name in ("args", "kwargs", "result", "exception", "traceback"):
        if (value := getattr(task, name, None)) is not None:
            setattr(task, name, redact(str(value)))
    if task.name == tokens.RENDER:
        _shape_render(task)
    elif task.name == tokens.SUBMIT:
        _shape_submit(task)
    return task


def _shape_render(task: Any) -> None:
    facts = _read(task.kwargs, dict)
    models = _read(task.args, (list, tuple)) or ("?",)
    task.args = f"pool {facts['pool']}" if "pool" in facts else f"model {models[0]}"
    if facts:
        task.kwargs = _done(facts)
        task.result = facts.get("outcome", "rendering")
        if task.result == "rendering" and task.state in LOST:
            task.kwargs = f"claimed {task.kwargs}"
            task.result = "lost: its frames are queued again"
    else:
        task.kwargs = task.result = ""


def _done(facts: dict[str, Any]) -> str:
    """`12 images in 2 packs, 3.1 s: job_…`."""
    images, packs = int(facts.get("images", 0)), int(facts.get("packs", 0))
    text = f"{_many(images, 'image')} in {_many(packs, 'pack')}" if images or packs else "none"
    if "seconds" in facts:
        text += f", {float(facts['seconds']):.1f} s"
    return text + (f": {facts['jobs']}" if facts.get("jobs") else "")


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _shape_submit(task: Any) -> None:
    """What was asked for, and the job it became or why it did not."""
    body = (_read(task.args, (list, tuple)) or [None])[0]
    task.args = "a new job"
    task.kwargs = _asked(body) if isinstance(body, dict) else ""
    if task.exception:
        fault = re.fullmatch(r"SubmissionRefused\(['\"](.*?)['\"],?\)", task.exception, re.DOTALL)
        task.result = _short(fault[1] if fault else task.exception)
    elif task.result is not None:
        task.result = task.result.strip("'")


def _asked(body: dict[str, Any]) -> str:
    """`3 of "a red circle"`."""
    specs = body.get("specs") or [body.get("spec")]
    first = specs[0] if isinstance(specs, list) and isinstance(specs[0], dict) else {}
    text = f'{first.get("count", 1)} of "{_short(str(first.get("prompt", "")))}"'
    return text + (f" and {_many(len(specs) - 1, 'spec')} more" if len(specs) > 1 else "")


def _short(text: str) -> str:
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def _read(text: Any, kind: Any) -> Any:
    """A repr() from an event, read back; nothing if it is another thing or was cut short."""
    try:
        value = ast.literal_eval(str(text))
    except (ValueError, SyntaxError):
        return {} if kind is dict else None
    return value if isinstance(value, kind) else ({} if kind is dict else None)
