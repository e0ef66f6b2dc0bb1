"""What a worker of the chaos test does to itself: it dies or freezes at named points, and its store fails.

Everything stands in one Plan, which travels to the processes as JSON.
"""

import itertools
import logging
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGSTOP

from farm import queue, retention
from farm.errors import StorageAway
from farm.storage import Store
from tests.chaos import clocks, engine
from tests.chaos.tally import Tally
from workers import books, run, shelf

# those of the product, and one more inside the transaction that makes money
POINTS = (
    "claimed",
    "rendered",
    "half stored",
    "stored",
    "before commit",
    "in the transaction",
    "after commit",
)
RESUMED = "went on from a checkpoint"
STORE_FAULTS = ("put refused", "put timed out", "put done but not answered")


@dataclass(frozen=True)
class Chance:
    """How likely something is: `first` until it happened `until` times, `then` from there on.

    Where it is done for the sake of something else that does not always follow, `aim` names what is counted instead.
    """

    first: float
    until: int
    then: float = 0.0
    aim: str | None = None


@dataclass(frozen=True)
class Plan:
    """What befalls the workers of one farm."""

    tally: str
    kills: dict[str, Chance] = field(default_factory=dict)
    freezes: dict[str, Chance] = field(default_factory=dict)
    store_faults: dict[str, Chance] = field(default_factory=dict)
    timeout_s: float = 0.5
    step_s: float = 0.005
    variant: str | None = None
    clock_s: float = 0.0  # how far the clocks of this process are ahead

    @classmethod
    def from_json(cls, data: dict) -> "Plan":
        chances = {
            name: {k: Chance(**c) for k, c in data[name].items()}
            for name in ("kills", "freezes", "store_faults")
        }
        return cls(**{**data, **chances})


class Fate:
    """Decides when something befalls this process, and counts it before it does."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tally = Tally(Path(plan.tally))
        self._lock = threading.Lock()  # two threads of one process must not count one death twice

    def strikes(self, what: str, chance: Chance | None) -> bool:
        if chance is None:
            return False
        likely = chance.first if self.tally.count(chance.aim or what) < chance.until else chance.then
        return random.random() < likely

    def reached(self, point: str) -> None:
        """Stands in for workers.run.reached."""
        with self._lock:
            if self.strikes(point, self.plan.kills.get(point)):
                self.tally.add(point)
                os.kill(os.getpid(), SIGKILL)
                time.sleep(60)
            if self.strikes(f"frozen, {point}", self.plan.freezes.get(point)):
                self.tally.add(f"frozen, {point}")
                os.kill(os.getpid(), SIGSTOP)  # House.thaw() wakes it, too late


class HostileStore:
    """A store that refuses, times out, or stores and then does not say so."""

    def __init__(self, store: Store, fate: Fate) -> None:
        self._store = store
        self._fate = fate

    def put(self, key: str, data: bytes, *, content_type: str) -> None:
        for fault in STORE_FAULTS:
            if not self._fate.strikes(fault, self._fate.plan.store_faults.get(fault)):
                continue
            self._fate.tally.add(fault)
            if fault == "put timed out":
                time.sleep(self._fate.plan.timeout_s)
            if fault == "put done but not answered":
                self._store.put(key, data, content_type=content_type)
            raise StorageAway(fault)
        self._store.put(key, data, content_type=content_type)


class _Refusals(logging.Handler):
    """Counts what the shelf reports: frames that the fence refused, settles that met a deleted image."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def emit(self, record: logging.LogRecord) -> None:
        if "had been lost to somebody else" in record.msg:
            self._tally.add("refused by the fence", record.args[0])
        if "settling again with images that were deleted" in record.msg:
            self._tally.add("met a tombstone")


def install(plan: Plan) -> None:
    """Make this process a worker of the plan; before it opens a Worker."""
    if plan.clock_s:
        clocks.shift(plan.clock_s)
    fate = Fate(plan)
    engine.install(plan.step_s, resumed=lambda: fate.tally.add(RESUMED))
    run.reached = fate.reached
    opened, settle = run.open_store, queue.settle
    run.open_store = lambda url: HostileStore(opened(url), fate)
    books.RETRY_S = shelf.RETRY_S = 0.1
    retention.MARGIN_S = 0.5  # nothing is under way for longer here
    logging.getLogger().addHandler(_Refusals(fate.tally))

    turns = itertools.count()

    def settle_and_die(db, stored, **rest):
        if next(turns) % 2:  # as it is: the commit goes along with the last statement
            return settle(db, stored, **rest)
        settled = settle(db, stored, **{**rest, "commit": False})
        fate.reached("in the transaction")
        return settled

    queue.settle = settle_and_die
    if plan.variant:
        from tests.chaos import variants

        variants.install(plan.variant, fate)
