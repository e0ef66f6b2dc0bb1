"""The catalog's samplers as diffusers has them (diffusers says scheduler).

A sampler holds one pack's history: make a fresh one for every call, and in the step loop for every frame. None
of these uses torchsde, whose noise depends on what a frame was packed with; theirs comes from each frame's
own generator.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers

# All that a checkpoint's own config may say differently is written out: a name means one thing.
_DPM = {"solver_order": 2, "use_karras_sigmas": False, "algorithm_type": "dpmsolver++"}
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++2m": ("DPMSolverMultistepScheduler", _DPM),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {**_DPM, "use_karras_sigmas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {**_DPM, "algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"use_karras_sigmas": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # its default clips, which is for pixels, not latents
    "unipc": ("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {}),  # clips and thresholds as its checkpoint says: pixels or latents
    # SD3 and FLUX give their sampler no generator: its noise could not be reproduced
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
_LCM_STEPS = 50  # LCM draws its steps from a schedule of this many, and refuses to take more


def fresh_sampler(name: str, config: Mapping[str, Any], *, steps: int) -> Any:
    """Make a sampler by its catalog name, on the noise schedule of a checkpoint's own config."""
    class_name, settings = _SAMPLERS[name]
    if name == "lcm":
        settings = {**settings, "original_inference_steps": max(_LCM_STEPS, steps)}
    return getattr(diffusers, class_name).from_config(config, **settings)


def copied(sampler: Any) -> Any:
    """Copy a sampler with its history, so that a step of the copy leaves the original as it was.

    Samplers replace their tensors and change their lists: the lists are copied, the tensors are shared.
    """
    twin = object.__new__(type(sampler))
    twin.__dict__.update({k: list(v) if type(v) is list else v for k, v in sampler.__dict__.items()})
    return twin


@cache
def takes_generator(kind: Any) -> bool:
    """Whether steps of this class of samplers draw noise from a generator."""
    return "generator" in inspect.signature(kind.step).parameters
