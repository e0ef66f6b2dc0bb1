"""Transactions of a worker, which wait for a database that is away."""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from farm.db import direct, transaction
from farm.errors import DatabaseAway

log = logging.getLogger(__name__)

T = TypeVar("T")
D = TypeVar("D")

RETRY_S = 1.0
TO_REPEAT = ("40001", "40P01")  # serialization failure, deadlock: nothing happened, it may be done again


def book(work: Callable[[Session], T], *, give_up: threading.Event) -> T | None:
    """Do work in a transaction; while the database is away try again, until give_up is set.

    Safe to repeat: the fence lets nothing happen twice, also when only the answer to a commit was lost.
    """
    return _done(transaction, work, give_up)


def book_directly(work: Callable[[psycopg.Connection[Any]], T], *, give_up: threading.Event) -> T | None:
    """book() for what is done for every pack, claims and settles: without a Session."""
    return _done(direct, work, give_up)


def _done(
    begin: Callable[[], AbstractContextManager[D]], work: Callable[[D], T], give_up: threading.Event
) -> T | None:
    while True:
        try:
            with begin() as db:
                return work(db)
        except DatabaseAway as e:
            log.warning("%s", e)
        except DBAPIError as e:
            if getattr(e.orig, "sqlstate", None) not in TO_REPEAT:
                raise
            log.warning("repeating a transaction: %s", e.orig)
        if give_up.wait(RETRY_S):
            return None
