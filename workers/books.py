"""Transactions of a worker, which wait for a database that is away."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from farm.db import transaction
from farm.errors import DatabaseAway

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 1.0
TO_REPEAT = ("40001", "40P01")  # serialization failure, deadlock: nothing happened, it may be done again


def book(work: Callable[[Session], T], *, give_up: threading.Event) -> T | None:
    """Do work in a transaction; while the database is away try again, until give_up is set.

    Safe to repeat: the fence lets nothing happen twice, also when only the answer to a commit was lost.
    """
    while True:
        try:
            with transaction() as db:
                return work(db)
        except DatabaseAway as e:
            log.warning("%s", e)
        except DBAPIError as e:
            if getattr(e.orig, "sqlstate", None) not in TO_REPEAT:
                raise
            log.warning("repeating a transaction: %s", e.orig)
        if give_up.wait(RETRY_S):
            return None
