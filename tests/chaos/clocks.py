"""A machine whose clock is wrong, as far as Python asks for it. What only goes forward (monotonic) stays as it is."""

import logging
import sys
import time
from datetime import UTC, date, datetime, timedelta, tzinfo


def shift(seconds: float) -> None:
    """Let this process's clocks be ahead: time.time(), and the datetime and date of every module of ours."""
    real, ahead = time.time, timedelta(seconds=seconds)

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + ahead

        @classmethod
        def utcnow(cls) -> datetime:
            return datetime.now(UTC).replace(tzinfo=None) + ahead

    class ShiftedDate(date):
        @classmethod
        def today(cls) -> date:
            return (datetime.now(UTC) + ahead).date()

    time.time = lambda: real() + seconds
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("farm", "workers"):
            for attribute, shifted in (("datetime", (datetime, Shifted)), ("date", (date, ShiftedDate))):
                if getattr(module, attribute, None) is shifted[0]:
                    setattr(module, attribute, shifted[1])
    logging.getLogger("chaos").info("the clock is off by %s s", seconds)
