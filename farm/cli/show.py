"""How answers are shown: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPED = 240  # columns where no terminal says how many

out = Console(width=None if sys.stdout.isatty() else PIPED)
err = Console(stderr=True, width=None if sys.stderr.isatty() else PIPED)

COLOURS = {"finished": "green", "done": "green", "running": "cyan", "claimed": "cyan", "up": "green",
           "failed": "red", "cancelled": "yellow", "paused": "yellow", "gone": "red", "draining": "yellow"}  # fmt: skip


def as_json(answer: BaseModel | Sequence[BaseModel]) -> None:
    """Print an answer, or several as a list."""
    plain: Any = (
        answer.model_dump(mode="json")
        if isinstance(answer, BaseModel)
        else [a.model_dump(mode="json") for a in answer]
    )
    print(json.dumps(plain, indent=2, ensure_ascii=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """Print rows, or the sentence that there are none. A column that starts with > stands to the right."""
    listed = [list(row) for row in rows]
    if not listed:
        err.print(empty, highlight=False)
        return
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=any(columns))
    for column in columns:
        right = column.startswith(">")
        shown.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in listed:
        shown.add_row(*(cell(value) for value in row))
    out.print(shown, highlight=False, soft_wrap=False)


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    text = escape(str(value))
    return f"[{COLOURS[text]}]{text}[/]" if text in COLOURS else text


def say(text: str) -> None:
    """Print a plain line, without markup."""
    out.print(text, markup=False, highlight=False)


def complain(text: str) -> None:
    err.print(text, markup=False, highlight=False)
