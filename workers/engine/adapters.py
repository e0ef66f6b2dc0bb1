"""LoRAs on a loaded pipeline, unmerged: switched from call to call, and the last few are kept."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch

from farm.errors import RenderFailed
from farm.features import LoraUse
from workers.engine.faults import brief
from workers.engine.weights import check_safetensors

log = logging.getLogger(__name__)

KEPT = 8


class Adapters:
    """The LoRAs of one pipeline."""

    def __init__(self, pipe: Any, *, most: int = KEPT) -> None:
        self._pipe = pipe
        self._most = most
        self._kept: OrderedDict[str, None] = OrderedDict()
        self._active: tuple[tuple[str, float], ...] = ()

    def use(self, loras: Sequence[LoraUse], files: Sequence[Path]) -> None:
        """Let these act from now on, and no other.

        Raises RenderFailed naming the file of one that does not fit.
        """
        wanted = tuple((self.load(use, file), use.scale) for use, file in zip(loras, files, strict=True))
        if wanted == self._active:
            return
        if wanted:
            self._pipe.set_adapters([name for name, _ in wanted], [scale for _, scale in wanted])
            self._pipe.enable_lora()
        else:
            self._pipe.disable_lora()
        self._active = wanted
        self._forget({name for name, _ in wanted})

    def load(self, use: LoraUse, file: Path) -> str:
        """The name of a LoRA among the pipeline's adapters; read from its file if it is not there."""
        name = f"lora_{(use.sha256 or '')[:16]}"
        if name in self._kept:
            self._kept.move_to_end(name)
            return name
        check_safetensors(file)
        try:
            state = safetensors.torch.load_file(file)
            self._refuse_dora(state, file)
            self._pipe.load_lora_weights(state, adapter_name=name)
        except RenderFailed:
            raise
        except Exception as e:
            self.drop(name)
            raise RenderFailed(
                f"the LoRA {file} does not fit {type(self._pipe).__name__}: {brief(e)}"
            ) from None
        if not any(name in names for names in self._pipe.get_list_adapters().values()):
            raise RenderFailed(
                f"the LoRA {file} does not fit {type(self._pipe).__name__}: no tensor of it has a place there"
            )
        self._kept[name] = None
        self._active = (("?", 0.0),)  # loading made it active
        return name

    @staticmethod
    def _refuse_dora(state: dict[str, Any], file: Path) -> None:
        if any("dora_scale" in key or "lora_magnitude_vector" in key for key in state):
            raise RenderFailed(f"the LoRA {file} is a DoRA, which does not share passes with others")

    def _forget(self, needed: set[str]) -> None:
        for name in [n for n in self._kept if n not in needed][: max(0, len(self._kept) - self._most)]:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Forget a LoRA; it is read again when it is wanted."""
        self._kept.pop(name, None)
        with suppress(Exception):  # of one that was never whole
            self._pipe.delete_adapters([name])
