"""Whether a loaded model still renders: one plain frame of few steps, by the stock pipeline, beside all else."""

from typing import Any

import torch

from farm.catalog import Model
from workers.engine.pipe import PipeEngine
from workers.engine.samplers import fresh_sampler

PROMPT = "a red circle"
STEPS = 2


def what_is_wrong(engine: Any, model: Model) -> str:
    """Say what is wrong with the images of an engine's model; "" if a plain one comes out well.

    Frames in flight are not touched: the call has a sampler of its own.
    """
    pipe = engine.pipe if hasattr(engine, "pipe") else engine.family.pipe
    if isinstance(engine, PipeEngine):  # the last pack's LoRAs act until the next one's do
        engine.featured.adapters.use((), ())
    own = pipe.scheduler
    steps = max(model.steps.min, min(STEPS, model.steps.max))
    side = model.side.default // model.stage_factor
    try:
        pipe.scheduler = fresh_sampler(model.sampler, own.config, steps=steps)
        with torch.inference_mode():
            image = pipe(
                prompt=PROMPT,
                height=side,
                width=side,
                num_inference_steps=steps,
                guidance_scale=model.guidance.default,
                generator=torch.Generator("cpu").manual_seed(0),
                output_type="pt",
            ).images[0]
        if not bool(image.isfinite().all()):
            return "a plain image is not a number"
        return "" if bool(image.any()) else "a plain image is all black"
    except Exception as e:  # whatever it is, the model does not render
        return f"a plain image cannot be rendered: {type(e).__name__}: {e}"
    finally:
        pipe.scheduler = own
