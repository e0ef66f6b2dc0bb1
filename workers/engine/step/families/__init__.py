"""The pipelines whose frames may share forwards: each passed the parity gate of tests/test_step_parity.py."""

from typing import Any

from farm.catalog import Model
from farm.errors import Misconfigured
from workers.engine.step.families.family import Family
from workers.engine.step.families.flux import Flux
from workers.engine.step.families.pixart import PixArt, PixArtSigma
from workers.engine.step.families.sd import StableDiffusion
from workers.engine.step.families.sd3 import StableDiffusion3
from workers.engine.step.families.sdxl import StableDiffusionXL

ADMITTED: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArtSigma,
}


def check(model: Model) -> None:
    """Raises Misconfigured, naming the pipelines that are, if this model's is not admitted."""
    if model.pipeline not in ADMITTED:
        raise Misconfigured(
            f"{model.pipeline} is not admitted to step-by-step batching; {', '.join(ADMITTED)} are",
            model=model.name,
            setting="engine",
        )


def family(pipe: Any, model: Model, *, device: str) -> Family:
    """The family of a loaded pipeline."""
    check(model)
    return ADMITTED[model.pipeline](pipe, model, device=device)
