"""How moments are written on the command line."""

import re
from datetime import UTC, datetime, timedelta

import typer

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
TIME = "a time, as 2026-12-01T06:00 (UTC), or +90m, +2h, +1d from now"


def moment(text: str, option: str) -> datetime:
    """A moment as it is written on the command line."""
    if match := re.fullmatch(r"\+(\d{1,6})([smhd])", text):
        return datetime.now(UTC) + timedelta(**{UNITS[match[2]]: int(match[1])})
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"allowed is {TIME}", param_hint=option) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found
