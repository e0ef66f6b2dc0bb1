"""What is known of the device, and what was learned about how much fits."""

from tests.tiny import tiny_ask, tiny_engine
from workers import gpu


def test_capacity_halves_where_memory_ran_out_and_grows_back_slowly() -> None:
    model = tiny_engine("sd").model
    small, large = tiny_ask(model).spec, tiny_ask(model, width=128, height=64).spec
    capacity = gpu.Capacity()
    assert (capacity.frames(small, model), capacity.frames(large, model)) == (8, 4)

    capacity.ran_out(small, model, frames=8)

    assert (capacity.frames(small, model), capacity.frames(large, model)) == (4, 4)
    for _ in range(gpu.GROW_AFTER):
        capacity.fitted(small, model, frames=3)  # not full: proves nothing
    assert capacity.frames(small, model) == 4
    for _ in range(gpu.GROW_AFTER):
        capacity.fitted(small, model, frames=4)
    assert capacity.frames(small, model) == 5
    for _ in range(10 * gpu.GROW_AFTER):
        capacity.fitted(small, model, frames=capacity.frames(small, model))
    assert capacity.frames(small, model) == 8
    capacity.ran_out(small, model, frames=1)
    assert capacity.frames(small, model) == 1


def test_a_device_has_a_name_and_memory() -> None:
    device = gpu.describe()

    assert device.kind == gpu.device()
    assert device.name
    assert device.memory_bytes > 1 << 28
