"""Kandinsky 3's text, whole."""

from collections.abc import Sequence
from typing import Any


def whole_text(pipe: Any, prompts: Sequence[str], negatives: Sequence[str], *, device: str) -> dict[str, Any]:
    """Encode always 128 tokens and their mask, and zeros where there is no negative prompt.

    Left to the pipeline, texts are cut to the longest prompt of the call, and negative ones with them: a frame
    would change with its neighbours.
    """
    text, negative, mask, negative_mask = pipe.encode_prompt(
        list(prompts), True, negative_prompt=list(negatives), device=device, _cut_context=False
    )
    missing = [row for row, prompt in enumerate(negatives) if not prompt]
    negative[missing] = 0
    negative_mask[missing] = 0
    return {
        "prompt_embeds": text,
        "negative_prompt_embeds": negative,
        "attention_mask": mask,
        "negative_attention_mask": negative_mask,
    }
