"""The Celery app, and the tokens that wake workers.

A token says "this model may have work" and carries none: a lost one costs delay, a spare one an empty claim.
Sending is coalesced in the background: no request waits for the broker, and a million frames cost a handful of
messages.
"""

import logging
import os
import threading
from collections.abc import Iterable
from functools import cache
from uuid import UUID

import kombu
from celery import Celery
from sqlalchemy.orm import Session

from farm.db import hot, transaction
from farm.errors import BrokerAway, FarmError, Misconfigured
from farm.settings import settings

log = logging.getLogger(__name__)

RENDER = "farm.render"
SUBMIT = "farm.submit"
SUBMIT_QUEUE = "farm.submit"
PROGRESS = "farm.progress"  # Redis channel: steps and previews, which may be lost
PAUSE_S = 0.05  # between two rounds of waking
BURST_MARGIN_S = 120  # a render task is killed after burst + the longest pack + this


def watched_key(job: UUID) -> str:
    """The Redis key that is there while somebody watches a job."""
    return f"farm.watched.{job.hex}"


def queue_of(model: str) -> str:
    return f"model.{model}"


def broker_priority(priority: int) -> int:
    """Our 0 to 9, 9 most urgent, as the broker counts: on Redis 0 is most urgent, elsewhere the highest."""
    return priority if settings().broker_url.get_secret_value().startswith("amqp") else 9 - priority


@cache
def app() -> Celery:
    """The Celery app of this process.

    Raises Misconfigured if no broker is set.
    """
    url = settings().broker_url.get_secret_value()
    if not url:
        raise Misconfigured("FARM_BROKER_URL is not set", setting="FARM_BROKER_URL")
    made = Celery("farm", broker=url)
    task_limit_s = settings().burst_s + settings().frame_limit_s + BURST_MARGIN_S
    made.conf.update(
        task_ignore_result=True,  # Postgres is the truth
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        task_reject_on_worker_lost=False,  # lease and attempts handle poison
        task_time_limit=task_limit_s,  # a hung device: the child is replaced
        task_default_priority=broker_priority(5),  # unset would be the top
        task_publish_retry=False,
        task_serializer="json",
        accept_content=["json"],
        worker_send_task_events=True,
        task_send_sent_event=False,  # would make sends 60 % dearer
        worker_cancel_long_running_tasks_on_connection_loss=False,  # finish the render
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_pool_acquire_timeout=5,
        broker_transport_options={
            "visibility_timeout": max(
                3600, 2 * task_limit_s
            ),  # longer than any task: leases decide, not this
            "unacked_restore_interval": 30,
            "unacked_restore_throttle": 1,
            "priority_steps": list(range(10)),
            "queue_order_strategy": "priority",
            "socket_timeout": 10,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    )
    return made


@cache
def _sender() -> kombu.Connection:
    """A connection for sending, which gives up after 2 s: a frozen Redis would block it for ever."""
    options = {"socket_timeout": 2, "socket_connect_timeout": 2, "priority_steps": list(range(10))}
    return kombu.Connection(
        settings().broker_url.get_secret_value(), transport_options=options, connect_timeout=2
    )


def waiting(models: Iterable[str]) -> dict[str, int]:
    """Tokens that lie in the broker, by model.

    Raises BrokerAway if it does not answer.
    """
    try:
        channel = _sender().default_channel
        return {m: channel._size(queue_of(m)) for m in models}
    except Exception as e:
        _forget()
        raise BrokerAway(str(e)) from e


def send(model: str, *, priority: int, count: int = 1) -> None:
    """Send tokens.

    Raises BrokerAway if the broker does not answer.
    """
    try:
        for _ in range(count):
            app().send_task(
                RENDER,
                args=[model],
                queue=queue_of(model),
                priority=broker_priority(priority),
                connection=_sender(),
                retry=False,
            )
    except Exception as e:
        _forget()
        raise BrokerAway(str(e)) from e


def _forget() -> None:
    """Leave a connection that failed: the next call opens another."""
    try:
        _sender().close()
    except Exception:
        log.debug("closing a broken connection", exc_info=True)
    _sender.cache_clear()


def top_up(db: Session, models: Iterable[str] | None = None) -> int:
    """Keep as many tokens in the broker as there are idle workers for models with work. Returns how many were sent.

    A worker is busy while it holds an open pack that it claimed since it was started: read off the packs, so it cannot
    go stale.
    """
    wanted = None if models is None else sorted(set(models))
    rows = hot(db, "idle_workers", {"models": wanted, "lost_s": settings().worker_lost_s})
    lying = waiting(r.model for r in rows)
    sent = 0
    for row in rows:
        # one more for the most urgent class: its token overtakes those that lie there
        room = row.idle - lying[row.model] + (1 if row.priority == 9 and lying[row.model] else 0)
        if room > 0:
            send(row.model, priority=row.priority, count=room)
            sent += room
    return sent


class _Waker:
    """Collects models to wake, and tops up their tokens in the background."""

    def __init__(self) -> None:
        self._models: set[str] = set()
        self._lock = threading.Lock()
        self._due = threading.Event()
        self._pause = threading.Event()  # that is never set
        threading.Thread(target=self._run, name="waker", daemon=True).start()

    def wake(self, models: Iterable[str]) -> None:
        with self._lock:
            self._models.update(models)
        self._due.set()

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            with self._lock:
                models, self._models = self._models, set()
            try:
                with transaction() as db:
                    top_up(db, models)
            except (FarmError, OSError) as e:
                log.warning("could not wake %s, the sweep will: %s", ", ".join(sorted(models)), e)
            except Exception:
                log.exception("could not wake %s, the sweep will", ", ".join(sorted(models)))
            # hundreds of jobs a second would keep this busy for the same few tokens
            self._pause.wait(PAUSE_S)


@cache
def _waker(pid: int) -> _Waker:
    del pid  # a forked child has no threads of its parent
    return _Waker()


def wake(models: Iterable[str]) -> None:
    """Wake workers of these models, soon: call it after the commit. It never waits and never fails."""
    _waker(os.getpid()).wake(models)
