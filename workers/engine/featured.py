"""Frames that ask for more than text, run to completion: init images, masks, control images, LoRAs, second passes.

What they share in one call is in the call key. Images and masks differ from row to row; prompts that are longer than
one chunk go with those of as many chunks; strict frames go one by one.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from farm.errors import RenderFailed
from farm.features import Pass
from farm.spec import Spec
from workers.engine import Ask, Inputs, Pixels
from workers.engine.adapters import Adapters
from workers.engine.faults import judge
from workers.engine.modes import IMAGE, Modes, image_arguments, kind_of, strength_of
from workers.engine.samplers import fresh_sampler

Result = Pixels | RenderFailed


class Hook(Protocol):
    def hook(self, pipe: Any) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class _Row:
    """A frame of the pack: where its result belongs, and its text if that is not the pipeline's own business."""

    index: int
    ask: Ask
    text: dict[str, torch.Tensor] | None = None


def is_featured(spec: Spec) -> bool:
    """Whether the plain call of a stock text-to-image pipeline would not do."""
    return bool(
        spec.image or spec.control or spec.hires or spec.upscale or spec.clip_skip or spec.prompt_weights
        or spec.long_prompt or spec.reproducible
    )  # fmt: skip


def second_start(pixels: Pixels, run: Pass) -> Pixels:
    """What a second pass starts from: the first one's image at its size."""
    image = Image.fromarray(pixels).resize((run.width, run.height), Image.Resampling.LANCZOS)
    return np.array(image)


def second_ask(ask: Ask, pixels: Pixels) -> Ask:
    """The second pass of a frame as a frame: from the first one's image, with the same text, LoRAs and seed."""
    run = ask.spec.passes[1]
    asked = ask.spec.hires or ask.spec.upscale
    assert asked is not None
    spec = replace(
        ask.spec, width=run.width, height=run.height, steps=run.schedule, strength=asked.strength, image="second",
        mask=None, control=(), hires=None, upscale=None,
    )  # fmt: skip
    return Ask(spec, ask.seed, Inputs(image=second_start(pixels, run), loras=ask.inputs.loras))


class Featured:
    """A loaded pipeline, for such frames."""

    def __init__(
        self,
        modes: Modes,
        *,
        guidance: Callable[[Sequence[Ask]], float],
        text: Callable[[Sequence[Ask]], dict[str, Any]],
    ) -> None:
        self._modes = modes
        self._guidance = guidance
        self._text = text
        self._config = modes.pipe.scheduler.config
        self._words: Any = None
        self.adapters = Adapters(modes.pipe)

    def parts(self, asks: Sequence[Ask]) -> tuple[list[list[_Row]], list[tuple[int, RenderFailed]]]:
        """What goes into one call each, and the frames whose prompts cannot be read."""
        spec = asks[0].spec
        rows = [_Row(k, ask) for k, ask in enumerate(asks)]
        bad: list[tuple[int, RenderFailed]] = []
        if spec.prompt_weights or spec.long_prompt or spec.clip_skip:
            rows, bad = self._worded(rows)
        if spec.reproducible:
            return [[row] for row in rows], bad
        by_length: dict[int, list[_Row]] = defaultdict(list)
        for row in rows:
            by_length[row.text["prompt_embeds"].shape[1] if row.text else 0].append(row)
        return list(by_length.values()), bad

    def steps(self, asks: Sequence[Ask], parts: Sequence[Sequence[_Row]]) -> list[int]:
        return [run.steps for _ in parts for run in asks[0].spec.passes]

    def render(self, asks: Sequence[Ask], parts: Sequence[Sequence[_Row]], tick: Hook) -> list[Result]:
        """One result an ask, in order; those in no part are left out."""
        results: dict[int, Result] = {}
        for part in parts:
            done = self._call(part, tick)
            if len(asks[0].spec.passes) > 1:
                done = self._second(part, done, tick)
            results |= {row.index: result for row, result in zip(part, done, strict=True)}
        return [results[k] for k in sorted(results)]

    def _second(self, part: Sequence[_Row], first: Sequence[Result], tick: Hook) -> list[Result]:
        good = [
            replace(row, ask=second_ask(row.ask, pixels))
            for row, pixels in zip(part, first, strict=True)
            if not isinstance(pixels, RenderFailed)
        ]
        done = iter(self._call(good, tick) if good else [])
        return [r if isinstance(r, RenderFailed) else next(done) for r in first]

    def _call(self, part: Sequence[_Row], tick: Hook) -> list[Result]:
        asks = [row.ask for row in part]
        spec, kind = asks[0].spec, kind_of(asks[0])
        pipe = self._modes.pipeline(kind, [c.net for c in spec.control])
        pipe.scheduler = fresh_sampler(spec.sampler, self._config, steps=spec.steps)
        arguments = {
            "height": spec.height,
            "width": spec.width,
            "num_inference_steps": spec.steps,
            "guidance_scale": self._guidance(asks),
            "generator": [torch.Generator("cpu").manual_seed(ask.seed) for ask in asks],
            "output_type": "pt",
            "callback_on_step_end_tensor_inputs": [],
            **self._texts(part),
            **self._images(asks, kind),
        }
        takes = inspect.signature(pipe.__call__).parameters
        known = {name: value for name, value in arguments.items() if name in takes}
        images = pipe(**known, **tick.hook(pipe)).images
        return [judge(image, frames=[row.index]) for row, image in zip(part, images, strict=True)]

    def _images(self, asks: Sequence[Ask], kind: str) -> dict[str, Any]:
        run, pipeline = asks[0].spec.passes[0], self._modes.model.pipeline
        arguments = image_arguments(asks, run, pipeline=pipeline)
        if kind == IMAGE:
            arguments["strength"] = strength_of(run, pipeline=pipeline)
        return arguments

    # ------------------------------------------------------------------------------------------ text

    def _texts(self, part: Sequence[_Row]) -> dict[str, Any]:
        texts = [row.text for row in part if row.text is not None]
        if not texts:
            return self._text([row.ask for row in part])
        return {name: torch.cat([t[name] for t in texts]) for name in texts[0]}

    def _worded(self, rows: Sequence[_Row]) -> tuple[list[_Row], list[tuple[int, RenderFailed]]]:
        good, bad = [], []
        for row in rows:
            try:
                good.append(replace(row, text=self._one_text(row.ask.spec)))
            except RenderFailed as e:
                bad.append((row.index, RenderFailed(e.detail, frames=[row.index])))
        return good, bad

    def _one_text(self, spec: Spec) -> dict[str, torch.Tensor]:
        if self._words is None:
            from workers.engine.words import Words

            self._words = Words(self._modes.pipe)
        positive, negative = self._words.pair(spec)
        texts = {"prompt_embeds": positive["text"]}
        if "pooled" in positive:
            texts["pooled_prompt_embeds"] = positive["pooled"]
        if spec.guided:
            texts |= {
                f"negative_{name}": negative["pooled" if "pooled" in name else "text"] for name in texts
            }
        return texts
