"""The consumer of `farm.submit`: jobs from services that are on the broker.

A message carries a submission as its one argument, and in its headers the API key and the idempotency key:
headers are shown neither by events nor by Flower nor in a log. It counts as accepted only when the job's row
exists; until then whoever sent it may send it again under the same idempotency key. docs/celery.md has the
caller's side.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn
from uuid import UUID

from celery import Celery, Task
from celery.exceptions import Reject

from farm import accounts, jobs, submissions, tokens
from farm.accounts import Caller, Role
from farm.api.bodies import read
from farm.api.enhancer import helped
from farm.api.inputs import taken
from farm.api.params import checked_key
from farm.db import transaction
from farm.errors import Away, Conflict, Fault, Invalid, Refused
from farm.ids import public
from farm.submissions import Submission

API_KEY = "farm_api_key"
IDEMPOTENCY_KEY = "farm_idempotency_key"
NODE = "intake@%h"
THREADS = 4
FIRST_RETRY_S, LONGEST_RETRY_S = 2, 30
REDELIVERY_S = (
    60  # a message held by a consumer that was killed comes back after this: longer than retries wait
)

SECRETS = re.compile(r"farm_[0-9a-f]{32}_[\w-]+")
MAX_TEXT = 2000  # characters of an error: a value in it may be a whole prompt


class SubmissionRefused(Refused):
    """The farm does not take this submission."""


def redact(text: str) -> str:
    """Take out what looks like an API key: somebody may have put one where it does not belong."""
    return SECRETS.sub("farm_…", text)


def accept(body: Any, headers: Mapping[str, Any]) -> tuple[UUID, list[str]]:
    """Store the job of one message. Returns its id, and the models to wake.

    Raises what farm.submissions.submit raises, Unauthorized and Forbidden.
    """
    key = _header(headers, API_KEY, "the account's API key")
    idempotency_key = checked_key(
        _header(headers, IDEMPOTENCY_KEY, "the job is accepted once under it"), field=IDEMPOTENCY_KEY
    )
    with transaction() as db:
        caller = accounts.authenticate(db, key)
        caller.require(Role.SUBMIT)
    as_json = json.dumps(body, sort_keys=True).encode()
    submission = read(Submission, as_json)  # as HTTP reads it: the same faults in the same words
    submission = asyncio.run(_whole(caller, submission, idempotency_key))
    with transaction() as db:
        job_id, _ = submissions.submit(
            db,
            caller,
            submission,
            idempotency_key=idempotency_key,
            body_sha256=hashlib.sha256(as_json).digest(),
        )
        return job_id, jobs.models_of(db, job_id)


async def _whole(caller: Caller, submission: Submission, idempotency_key: str | None) -> Submission:
    """With what is fetched for it before it is submitted, as over HTTP."""
    return await helped(await taken(caller, submission, idempotency_key=idempotency_key))


def _header(headers: Mapping[str, Any], name: str, what_for: str) -> str:
    value = headers.get(name)
    if not isinstance(value, str):
        raise Invalid([Fault(name, None, f"this message header is required: {what_for}")])
    return value


def submit(task: Task, *args: Any, **named: Any) -> str:
    """What the Celery task does with its one argument, the body. Returns the job's public id.

    Raises SubmissionRefused with what is wrong, and no secret in it.
    """
    given = [*args, *named.values()]
    if len(given) != 1 or not named.keys() <= {"body"}:
        raise SubmissionRefused(f"allowed is one argument, the body of POST /v1/jobs; {len(given)} came")
    try:
        job_id, models = accept(given[0], task.request.headers or {})
    except (Away, Conflict) as e:  # Conflict: the same idempotency key is being worked on
        _again(task, e)
    except Refused as e:
        raise SubmissionRefused(redact(str(e))[:MAX_TEXT]) from None
    else:
        tokens.wake(models)
        return public("job", job_id)


def _again(task: Task, error: Exception) -> NoReturn:
    """Send the message once more, headers and all, to be tried later."""
    wait_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2 ** min(task.request.retries, 10))
    try:
        raise task.retry(exc=error, countdown=wait_s)
    except Reject as e:  # it could not be sent: by itself Celery would drop it now
        raise Reject(e.reason, requeue=True) from e


def consumer() -> Celery:
    """A Celery app that takes `farm.submit`.

    Messages in hand are kept apart from render tokens: those must not come back while a long burst runs, but
    a submission soon after its consumer was killed.
    """
    app = tokens.app.__wrapped__()
    app.conf.broker_transport_options = {
        **app.conf.broker_transport_options,
        "visibility_timeout": REDELIVERY_S,
        "unacked_restore_interval": 5,
        "unacked_key": "farm.submit.unacked",
        "unacked_index_key": "farm.submit.unacked_index",
        "unacked_mutex_key": "farm.submit.unacked_mutex",
        "unacked_mutex_expire": REDELIVERY_S,
    }
    app.conf.task_time_limit = None  # threads know none
    app.task(submit, name=tokens.SUBMIT, bind=True, max_retries=None, throws=(Refused,), shared=False)
    return app


def run() -> None:
    """Consume until SIGTERM."""
    consumer().worker_main(
        ["worker", "-n", NODE, "-Q", tokens.SUBMIT_QUEUE, "-P", "threads", "-c", str(THREADS),
         "-l", "INFO", "--without-gossip", "--without-mingle"]
    )  # fmt: skip
