"""A pool that serves several models keeps within memory: what was not used for longest makes room."""

from pathlib import Path
from typing import Any

import pytest

from farm.catalog import Model
from farm.errors import Misconfigured, OutOfMemory
from tests.factories import model
from tests.tiny import tiny_model
from workers.engine.pipe import PipeEngine
from workers.engines import Engines

GB = 1 << 30


class Memory:
    """A device of so many bytes, as an allocator would see it."""

    def __init__(self, size: int, weights: dict[str, int]) -> None:
        self.size = size
        self.weights = weights
        self.opened: list[str] = []
        self.engines: Engines | None = None

    def open(self, model: Model, *, device: str) -> Any:
        assert self.engines is not None
        held = sum(size for name, size in self.weights.items() if name in self.engines)
        if held + self.weights[model.name] > self.size:
            raise OutOfMemory("CUDA out of memory.")
        self.opened.append(model.name)
        return object()


def engines(memory: Memory, needs: dict[str, int] | None = None) -> Engines:
    memory.engines = Engines("cuda", memory_bytes=memory.size, needs=needs, opened_by=memory.open)
    return memory.engines


def test_engines_that_fit_stay_loaded() -> None:
    memory = Memory(10 * GB, {"alpha": 4 * GB, "beta": 4 * GB})
    loaded = engines(memory)

    for name in ("alpha", "beta", "alpha", "beta"):
        loaded.get(model(name))

    assert memory.opened == ["alpha", "beta"]


def test_the_one_not_used_for_longest_makes_room() -> None:
    memory = Memory(10 * GB, {"alpha": 4 * GB, "beta": 4 * GB, "flat": 4 * GB})
    loaded = engines(memory, needs=dict(memory.weights))
    for name in ("alpha", "beta", "alpha"):
        loaded.get(model(name))

    loaded.get(model("flat"))

    assert "alpha" in loaded
    assert "beta" not in loaded


def test_without_a_measurement_memory_that_runs_out_releases_one_and_it_is_tried_again() -> None:
    memory = Memory(10 * GB, {"alpha": 6 * GB, "beta": 6 * GB})
    loaded = engines(memory)
    loaded.get(model("alpha"))

    loaded.get(model("beta"))

    assert "alpha" not in loaded
    assert memory.opened == ["alpha", "beta"]


def test_an_engine_in_use_is_not_released_and_what_does_not_fit_beside_it_says_so() -> None:
    memory = Memory(10 * GB, {"alpha": 6 * GB, "beta": 6 * GB})
    loaded = engines(memory)

    with loaded.using(model("alpha")):
        with pytest.raises(Misconfigured, match="beta does not fit on this device beside alpha"):
            loaded.get(model("beta"))
        assert "alpha" in loaded

    loaded.get(model("beta"))
    assert "alpha" not in loaded


def test_a_model_too_big_for_the_device_alone_says_so() -> None:
    loaded = engines(Memory(10 * GB, {"alpha": 60 * GB}), needs={"alpha": 60 * GB})

    with pytest.raises(Misconfigured, match="alpha does not fit on this device"):
        loaded.get(model("alpha"))


def test_an_engine_that_was_dropped_is_loaded_anew() -> None:
    memory = Memory(10 * GB, {"alpha": 6 * GB})
    loaded = engines(memory)
    loaded.get(model("alpha"))

    loaded.drop("alpha")
    loaded.get(model("alpha"))

    assert memory.opened == ["alpha", "alpha"]


def test_real_engines_come_by_what_the_catalog_says(tmp_path: Path) -> None:
    loaded = Engines("cpu", memory_bytes=64 * GB)

    engine = loaded.get(tiny_model(tmp_path))

    assert isinstance(engine, PipeEngine)
    assert loaded.get(engine.model) is engine
