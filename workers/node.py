"""One Celery node: a parent that stays in touch, and a child that holds the device.

The child alone imports torch. The parent answers the broker, sees to the row in `workers`, and hands signals
on: the first SIGTERM drains, the second gives everything back now. A child that hangs or dies is replaced.
"""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

from celery import Celery, Task
from celery.signals import worker_process_init, worker_ready, worker_shutting_down
from sqlalchemy import text

from farm import queue, tokens
from farm.catalog import Model, catalog
from farm.db import transaction
from farm.errors import FarmError

log = logging.getLogger(__name__)

BEAT_S = 10.0
# Celery leaves both alone; they differ because two signals of one kind that come at once are one
DRAIN = signal.SIGUSR2
GIVE_BACK = signal.SIGVTALRM

# a node that starts anew is up; a child that replaces another does not undo an admin's draining
REGISTER = """
INSERT INTO workers AS w (id, pool, models, device, state) VALUES (:id, :pool, :models, :device, 'up')
ON CONFLICT (id) DO UPDATE
SET pool = excluded.pool, models = excluded.models, device = excluded.device,
    state = CASE WHEN :replaces AND w.state = 'draining' THEN w.state ELSE 'up' END,
    started_at = now(), seen_at = clock_timestamp()
"""
# what an admin set to draining stays so; the row is made here if the child could not
SEEN = """
INSERT INTO workers AS w (id, pool, models, device, state) VALUES (:id, :pool, :models, 'unknown', :state)
ON CONFLICT (id) DO UPDATE
SET seen_at = clock_timestamp(),
    state = CASE WHEN w.state = 'draining' AND excluded.state = 'up' THEN w.state ELSE excluded.state END
"""


class Node:
    """A worker of one pool on one device, as Celery runs it."""

    def __init__(self, *, pool: str, name: str) -> None:
        self.pool = pool
        self.name = name
        self._models: list[Model] = catalog().pool(pool)
        self._row = {"id": name, "pool": pool, "models": [m.name for m in self._models]}
        self._app: Celery = tokens.app()
        self._celery: Any = None
        self._stopping = threading.Event()
        self._terms = 0
        self._replaces = False  # whether a child that is forked now replaces another

    def run(self) -> int:
        """Work until told to stop; returns Celery's exit code."""
        self._define_task()
        worker_process_init.connect(self._start_child)
        worker_ready.connect(self._keep_beating)
        worker_shutting_down.connect(self._stop_beating)
        self._app.conf.update(worker_proc_alive_timeout=300)  # the child loads torch and the first model
        self._celery = self._app.Worker(
            hostname=self.name,
            pool="prefork",
            concurrency=1,
            queues=[tokens.queue_of(m.name) for m in self._models],
            without_gossip=True,
            without_mingle=True,
            loglevel=logging.getLogger().level,
        )
        self._celery.start()
        return int(self._celery.exitcode or 0)

    # ------------------------------------------------------------------------------------------ the child

    def _define_task(self) -> None:
        node = self

        @self._app.task(name=tokens.RENDER, bind=True)  # type: ignore[untyped-decorator]
        def render(task: Task, model: str) -> None:
            """Claim pack after pack until there is no work. The model is a hint."""
            node._burst(task)

    def _start_child(self, **_: object) -> None:
        from workers import gpu
        from workers.run import Worker

        # before there are threads: _hear() waits for them
        signal.pthread_sigmask(signal.SIG_BLOCK, {DRAIN, GIVE_BACK})
        gpu.limit_threads()
        if gpu.device() == "cpu":
            gpu.keep_memory()
        self._worker = Worker(self.name, pool=self.pool, models=self._models, device=gpu.device())
        threading.Thread(target=self._hear, name="signals", daemon=True).start()
        self._register(gpu.describe().name)
        self._worker.warm_up()

    def _hear(self) -> None:
        """Wait for signals in a thread: a handler would wait for the device, and could find its locks taken."""
        while True:
            if signal.sigwait({DRAIN, GIVE_BACK}) == GIVE_BACK:
                self._worker.drain()  # the first time, if DRAIN is still to come
            self._worker.drain()

    def _burst(self, task: Task) -> None:
        from workers.run import Report

        def tell(report: Report) -> None:
            # replaces the arguments Flower shows
            task.send_event("task-claimed", kwargs=repr(report.to_json()))

        report = self._worker.burst(tell)
        log.info("burst over: %s", report.to_json())
        if self._worker.device_lost:
            log.error("the device is lost: this process ends, and Celery starts another")
            os._exit(70)
        if self._worker.outlived:
            log.info("no longer drained: this process ends, and Celery starts another")
            os._exit(70)

    def _register(self, device: str) -> None:
        try:
            with transaction() as db:
                if self._replaces:  # nobody else works under this name: what it had in hand is lost
                    queue.lapse(db, self.name)
                db.execute(text(REGISTER), {**self._row, "device": device, "replaces": self._replaces})
        except FarmError as e:
            log.warning("not registered yet: %s", e)

    # ------------------------------------------------------------------------------------------ the parent

    def _keep_beating(self, **_: object) -> None:
        self._replaces = True
        signal.signal(signal.SIGTERM, self._on_term(signal.getsignal(signal.SIGTERM)))
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _on_term(self, celerys: Any) -> Any:
        def handle(number: int, frame: FrameType | None) -> None:
            self._terms += 1
            if self._terms == 1:
                celerys(number, frame)  # warm shutdown: waits for the task, which drains
            else:
                self._signal_child(GIVE_BACK)

        return handle

    def _stop_beating(self, **_: object) -> None:
        """In the parent, at the start of every shutdown."""
        self._stopping.set()
        self._signal_child(DRAIN)

    def _signal_child(self, number: int) -> None:
        for process in getattr(getattr(self._celery.pool, "_pool", None), "_pool", None) or []:
            try:
                os.kill(process.pid, number)
            except ProcessLookupError:
                log.debug("child %d has gone", process.pid)

    def _beat(self) -> None:
        while not self._stopping.wait(BEAT_S):
            self._seen("up")
        self._seen("gone")

    def _seen(self, state: str) -> None:
        """Say that this worker is there, or that it has gone."""
        try:
            with transaction() as db:
                db.execute(text(SEEN), {**self._row, "state": state})
        except Exception as e:
            log.warning("the database did not hear that this worker is %s: %s", state, e)
