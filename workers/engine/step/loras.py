"""LoRAs mixed in one forward: each row has its own set and scales, rows without any are as without.

PEFT's layers stay switched off, so that they compute the checkpoint's own output; a hook adds to each row what its
LoRAs bring. PEFT's own adapter_names takes one LoRA a row, and one scale for all rows.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from farm.catalog import Model
from workers.engine import Ask
from workers.engine.adapters import Adapters

CONDITION = "loras"  # (rows, LoRAs of the catalog): the scale of each, 0 where it does not act


class Mixed:
    """The LoRAs of a model's list on its denoiser; each is loaded when it is asked for first, and stays."""

    def __init__(self, pipe: Any, denoiser: Any, model: Model, *, device: str) -> None:
        self._pipe = pipe
        self._denoiser = denoiser
        self._device = device
        self._places = {name: k for k, name in enumerate(sorted(model.loras))}
        self._adapters = Adapters(pipe, most=max(1, len(model.loras)))
        self._names: dict[int, str] = {}  # place → adapter
        self._hooked: set[int] = set()
        self._scales: torch.Tensor | None = None  # of the forward that runs
        self._acting: dict[int, str] = {}  # those of them that act on any of its rows

    @property
    def any(self) -> bool:
        """Whether the model has LoRAs at all."""
        return bool(self._places)

    def load(self, ask: Ask) -> None:
        """Have a frame's LoRAs at hand. Raises RenderFailed naming the file of one that does not fit."""
        for use, file in zip(ask.spec.loras, ask.inputs.loras, strict=True):
            place = self._places[use.name]
            if place in self._names:
                continue
            self._names[place] = self._adapters.load(use, file)
            self._pipe.disable_lora()
            self._hook()

    def keep(self, asks: Collection[Ask]) -> None:
        """Let go of those that none of these frames has: their memory is needed."""
        needed = {self._places[use.name] for ask in asks for use in ask.spec.loras}
        for place in self._names.keys() - needed:
            name = self._names.pop(place)
            if name not in self._names.values():  # two may be of one file
                self._adapters.drop(name)

    def condition(self, ask: Ask, rows: int) -> torch.Tensor:
        scales = torch.zeros(rows, len(self._places), dtype=torch.float32)
        for use in ask.spec.loras:
            scales[:, self._places[use.name]] = use.scale
        return scales.to(self._device)

    @contextmanager
    def in_text(self, ask: Ask) -> Iterator[None]:
        """Let a frame's LoRAs act on the text encoders, as far as they reach there."""
        wanted = [(self._names[self._places[u.name]], u.scale) for u in ask.spec.loras]
        reached = {
            n for part, names in self._pipe.get_list_adapters().items() if "text" in part for n in names
        }
        if not reached & {name for name, _ in wanted}:
            yield
            return
        self._pipe.set_adapters([name for name, _ in wanted], [scale for _, scale in wanted])
        self._pipe.enable_lora()
        try:
            yield
        finally:
            self._pipe.disable_lora()

    @contextmanager
    def in_forward(self, scales: torch.Tensor | None) -> Iterator[None]:
        """Let them act on the rows of one forward."""
        acting = scales.any(dim=0).tolist() if scales is not None and self._names else []
        self._acting = {place: name for place, name in self._names.items() if acting and acting[place]}
        self._scales = scales if self._acting else None
        try:
            yield
        finally:
            self._scales = None

    def _hook(self) -> None:
        from peft.tuners.lora import LoraLayer  # needed by models with LoRAs alone

        for module in self._denoiser.modules():
            if (
                isinstance(module, LoraLayer)
                and isinstance(module, torch.nn.Module)
                and id(module) not in self._hooked
            ):
                self._hooked.add(id(module))
                module.register_forward_hook(self._added)

    def _added(self, layer: Any, args: Sequence[Any], output: torch.Tensor) -> torch.Tensor:
        if self._scales is None:
            return output
        for place, name in self._acting.items():
            if name not in layer.lora_A:
                continue
            down, up = layer.lora_A[name], layer.lora_B[name]
            delta = up(down(args[0].to(down.weight.dtype))) * (layer.lora_alpha[name] / layer.r[name])
            scale = self._scales[:, place].view(-1, *(1,) * (delta.ndim - 1)).to(delta.dtype)
            acting = torch.where(scale == 0, 0, delta * scale)  # what overflows is no other row's business
            output = output + acting.to(output.dtype)
        return output
