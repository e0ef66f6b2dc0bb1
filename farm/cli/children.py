"""The farm's processes as children of `farm up`: started, started again when they die, stopped in order.

So are the servers of its data folder, before them.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals

from farm.embedded import Services
from farm.errors import Away

BACKOFF_S = (0.5, 1, 2, 5, 10, 30)  # the pause after the first, second, … death in a row
STEADY_S = 60  # a child that ran this long starts again from the first pause
SERVERS_S = 2.0  # from one start of a server that died to the next
LOG_BYTES = 20 << 20  # a longer log is put aside at the next start

log = logging.getLogger(__name__)


@dataclass
class Child:
    """One process, its log and its own secrets. stage: those of a lower one are stopped first."""

    name: str
    module: str
    arguments: Sequence[str]
    env: Mapping[str, str]
    stage: int = 1
    patience_s: float = 15.0
    deaths: int = 0
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = field(default=0.0)

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Children:
    """All of them. hold: a file they keep open, so that its lock lasts as long as any of them lives."""

    def __init__(self, children: Sequence[Child], services: Services, *, logs: Path, hold: int) -> None:
        self._children = children
        self._services = services
        self._servers_due = 0.0
        self._logs = logs
        self._hold = hold

    def log_of(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def deaths(self, name: str) -> int:
        return next(c.deaths for c in self._children if c.name == name)

    def mend(self) -> None:
        """Start what does not run, unless it died just now."""
        self._mend_servers()
        now = time.monotonic()
        for child in self._children:
            if child.runs:
                continue
            if child.process is not None:
                self._note_death(child, now)
            if now >= child.due:
                self._start(child)

    def _mend_servers(self) -> None:
        if time.monotonic() < self._servers_due:
            return
        try:
            for name in self._services.mend():
                log.warning("%s had died and was started again", name)
                self._servers_due = time.monotonic() + SERVERS_S
        except Away as e:
            log.warning("%s", e)
            self._servers_due = time.monotonic() + SERVERS_S

    def stop(self) -> None:
        """Ask each stage to end, wait, and kill what does not."""
        for stage in sorted({c.stage for c in self._children}):
            running = [c for c in self._children if c.stage == stage and c.runs]
            for child in running:
                _signal(child, SIGTERM)
            for child in running:
                _await_end(child)

    def hurry(self) -> None:
        """Ask those that are stopped first once more: a worker then gives everything back at once."""
        for child in self._children:
            if child.stage == 0:
                _signal(child, SIGTERM)

    def _start(self, child: Child) -> None:
        path = self.log_of(child.name)
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".old.log"))
        command = [
            sys.executable,
            "-m",
            "farm.lifeline",
            str(child.patience_s),
            child.module,
            *child.arguments,
        ]
        with open(path, "ab", opener=lambda file, flags: os.open(file, flags, 0o600)) as output:
            child.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # the lifeline: closes when we are gone
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **child.env},
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop them in order
                pass_fds=(self._hold,),
            )
        child.started = time.monotonic()

    def _note_death(self, child: Child, now: float) -> None:
        assert child.process is not None
        code, child.process = child.process.returncode, None
        child.deaths = 1 if now - child.started > STEADY_S else child.deaths + 1
        pause_s = BACKOFF_S[min(child.deaths, len(BACKOFF_S)) - 1]
        child.due = now + pause_s
        log.warning(
            "%s ended with %d; it starts again in %g s (%s)",
            child.name, code, pause_s, self.log_of(child.name),
        )  # fmt: skip


def _signal(child: Child, number: Signals) -> None:
    if child.runs and child.process is not None:
        child.process.send_signal(number)


def _await_end(child: Child) -> None:
    if child.process is None:
        return
    try:
        child.process.wait(child.patience_s)
    except subprocess.TimeoutExpired:
        log.warning("%s does not end: killed", child.name)
        child.process.send_signal(SIGKILL)
        child.process.wait()
