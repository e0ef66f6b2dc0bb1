"""The engines of a worker that are loaded, within the device's memory: what was not used for longest makes room."""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import assert_never

from farm.catalog import Model
from farm.errors import Misconfigured, OutOfMemory
from workers.engine import Engine, StepEngine, open_engine, open_step_engine
from workers.gpu import release

log = logging.getLogger(__name__)

USABLE = 0.92  # of a device's memory: the rest is the driver's and what lies between tensors

AnyEngine = Engine | StepEngine


def load(model: Model, *, device: str) -> AnyEngine:
    """Open a model's engine, of the kind its catalog entry names."""
    match model.engine:
        case "pipe":
            return open_engine(model, device=device)
        case "step":
            return open_step_engine(model, device=device)
        case _:
            assert_never(model.engine)


class Engines:
    """Engines by model. One thread loads and uses them."""

    def __init__(
        self,
        device: str,
        *,
        memory_bytes: int,
        needs: Mapping[str, int] | None = None,
        opened_by: Callable[..., AnyEngine] = load,
    ) -> None:
        """needs: bytes a model takes at its peak, as verify measured them; a model without is tried."""
        self._device = device
        self._usable = int(USABLE * memory_bytes)
        self._needs = dict(needs or {})
        self._load = opened_by
        self._loaded: OrderedDict[str, AnyEngine] = OrderedDict()  # the one used last at the end
        self._busy: Counter[str] = Counter()

    def __contains__(self, model: str) -> bool:
        return model in self._loaded

    def get(self, model: Model) -> AnyEngine:
        """The engine of a model, loaded if it is not; others make room for it.

        Raises Misconfigured if its checkpoint is not there, or if it does not fit beside what is in use.
        """
        if model.name not in self._loaded:
            self._make_room(model)
            started = time.monotonic()
            self._loaded[model.name] = self._open(model)
            log.info("loaded %s in %.1f s", model.name, time.monotonic() - started)
        self._loaded.move_to_end(model.name)
        return self._loaded[model.name]

    @contextmanager
    def using(self, model: Model) -> Iterator[AnyEngine]:
        """The engine of a model, which is not released meanwhile."""
        engine = self.get(model)
        self._busy[model.name] += 1
        try:
            yield engine
        finally:
            self._busy[model.name] -= 1

    def drop(self, model: str) -> None:
        """Let go of an engine that failed; the next use loads it anew."""
        self._loaded.pop(model, None)
        release()

    def _make_room(self, model: Model) -> None:
        """Release engines as long as this one is known not to fit beside them."""
        wanted = self._needs.get(model.name)
        while wanted is not None and sum(map(self._need, self._loaded)) + wanted > self._usable:
            if not self._release_one():
                return  # alone it is tried: what was measured may be old

    def _need(self, model: str) -> int:
        return self._needs.get(model, 0)

    def _open(self, model: Model) -> AnyEngine:
        while True:
            try:
                return self._load(model, device=self._device)
            except OutOfMemory as e:
                full = str(e)
            release()
            if not self._release_one():
                beside = ", ".join(self._loaded)
                raise Misconfigured(
                    f"{model.name} does not fit on this device"
                    + (f" beside {beside}, which is in use" if beside else ""),
                    model=model.name,
                    reason=full,
                )

    def _release_one(self) -> bool:
        idle = next((name for name in self._loaded if not self._busy[name]), None)
        if idle is None:
            return False
        log.info("releasing %s, which was not used for longest", idle)
        self.drop(idle)
        return True
