"""Several statements in one round trip: libpq's pipeline mode, as one send and one wait.

For what is run for every pack and every submission. psycopg's own pipeline waits up to three times for each statement,
and each wait lets another thread have the interpreter: with 64 clients half a submission's CPU time went to that.
It stands on psycopg's layer over libpq (psycopg.pq) and its adaptation (psycopg.adapt).
"""

import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from psycopg import errors, pq
from psycopg.abc import Transformer as Adapting
from psycopg.adapt import PyFormat, Transformer

Statement = tuple[bytes, Sequence[Any]]  # with $1, $2 and so on, and their values
MakeRow = Callable[[Sequence[Any]], Any]
# what was prepared serves no longer: a migration changed its columns' types, or somebody dropped it
STALE = (b"0A000", b"26000")
MOST = 100  # statements prepared on a connection; one beyond that is sent whole each time

_Key = tuple[bytes, tuple[int, ...]]  # a statement, and the types of its values
_prepared: WeakKeyDictionary[psycopg.Connection[Any], set[_Key]] = WeakKeyDictionary()
_names: dict[_Key, bytes] = {}
_numbers = count()


class Rows:
    """What a statement returned."""

    def __init__(self, result: pq.abc.PGresult, adapting: Adapting) -> None:
        self._result, self._adapting = result, adapting

    @property
    def count(self) -> int:
        return self._result.ntuples

    def columns(self) -> list[str]:
        return [(self._result.fname(k) or b"").decode() for k in range(self._result.nfields)]

    def load(self, make: MakeRow) -> list[Any]:
        """Every row, made of its values."""
        self._adapting.set_pgresult(self._result)
        return self._adapting.load_rows(0, self.count, make)


def exchange(
    connection: psycopg.Connection[Any], statements: Sequence[Statement], *, commit: bool = False
) -> list[Rows]:
    """Run statements one after the other, in the connection's transaction; it begins here if none is open.

    commit: end it with them. Once a statement is refused, those after it are not run, and nothing is committed.
    Raises psycopg's errors: that of the statement which was refused. A connection whose prepared statements no longer
    serve is closed then: the next one prepares them anew.
    """
    if connection.closed:
        raise errors.OperationalError("the connection is closed")
    adapting: Adapting = Transformer(connection)
    ready = [_ready(adapting, *statement) for statement in statements]
    pg, known = connection.pgconn, _prepared.setdefault(connection, set())
    new: dict[_Key, int] = {}  # where among the answers that to its preparation is
    own: list[int] = []  # and those to the statements themselves
    with connection.lock, _pipeline(connection):
        sent = 0
        if pg.transaction_status == pq.TransactionStatus.IDLE and not connection.autocommit:
            pg.send_query_params(b"BEGIN", None)
            sent += 1
        for key, values, formats in ready:
            statement, types = key
            if key not in known and key not in new and len(known) + len(new) < MOST:
                pg.send_prepare(_name(key), statement, param_types=types)
                new[key] = sent
                sent += 1
            if key in known or key in new:
                pg.send_query_prepared(_name(key), values, param_formats=formats)
            else:
                pg.send_query_params(statement, values, param_types=types, param_formats=formats)
            own.append(sent)
            sent += 1
        if commit:
            pg.send_query_params(b"COMMIT", None)
            sent += 1
        pg.pipeline_sync()
        answers = _answers(pg)
    known.update(key for key, place in new.items() if answers[place].status == pq.ExecStatus.COMMAND_OK)
    for answer in answers:
        if answer.status == pq.ExecStatus.FATAL_ERROR:
            if answer.error_field(pq.DiagnosticField.SQLSTATE) in STALE:
                connection.close()
            raise errors.error_from_result(answer, encoding=connection.info.encoding)
    return [Rows(answers[place], adapting) for place in own]


def _ready(adapting: Adapting, statement: bytes, values: Sequence[Any]) -> tuple[_Key, Any, Any]:
    """The statement with its values as they are sent, and their formats."""
    dumped = adapting.dump_sequence(values, [PyFormat.AUTO] * len(values))
    return (statement, adapting.types or ()), dumped, adapting.formats


def _name(key: _Key) -> bytes:
    """What it is prepared as, on every connection."""
    return _names.get(key) or _names.setdefault(key, b"farm_%d" % next(_numbers))


@contextmanager
def _pipeline(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """In pipeline mode. A connection that is left in the middle, by Ctrl-C or a lost server, is closed."""
    try:
        connection.pgconn.enter_pipeline_mode()
        yield
        connection.pgconn.exit_pipeline_mode()
    except BaseException:
        connection.close()
        raise


def _answers(pg: pq.abc.PGconn) -> list[pq.abc.PGresult]:
    """The answers of a pipeline, up to its end. Raises OperationalError if the connection is lost."""
    poll = select.poll()
    poll.register(pg.socket, select.POLLIN | select.POLLOUT)
    while (
        pg.flush()
    ):  # more than the socket takes at once; the server may want to be read before it takes more
        if any(event & ~select.POLLOUT for _, event in poll.poll()):
            pg.consume_input()
    poll.modify(pg.socket, select.POLLIN)
    found: list[pq.abc.PGresult] = []
    before: pq.abc.PGresult | None = None
    while True:
        while pg.is_busy():
            poll.poll()
            pg.consume_input()
        answer = pg.get_result()
        if answer is None:  # the end of one statement's answers
            if before is None:
                raise errors.OperationalError("the server's answers ended too soon")
        elif answer.status == pq.ExecStatus.PIPELINE_SYNC:
            return found
        else:
            found.append(answer)
        before = answer
