"""How flow-matching models shift their noise schedule with the size of the image."""

from collections.abc import Mapping
from typing import Any


def dynamic_shift(config: Mapping[str, Any], tokens: int, *, max_shift: float) -> float:
    """The mu of set_timesteps: calculate_shift() of diffusers' flux and sd3 pipelines.

    max_shift: where the sampler's config says none; the two pipelines differ in it.
    """
    base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (max_tokens - base_tokens)
    shift: float = tokens * slope + base - slope * base_tokens
    return shift
