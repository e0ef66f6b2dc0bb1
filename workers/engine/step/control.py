"""Control nets as rows, each with its own image, scale and share of the steps."""

from collections.abc import Mapping
from typing import Any

import torch

from workers.engine import Ask
from workers.engine.modes import Modes

IMAGE, WINDOW = "control:", "window:"  # and the net's name: (rows, 3, height, width), and (rows, 3)


def conditions(
    ask: Ask, modes: Modes, times: list[float], rows: int, *, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a frame's rows carry for its nets; times: of the steps that run.

    The window is scale, and the first and last time at which it counts: as in the stock pipelines.
    """
    found = {}
    for control, pixels in zip(ask.spec.control, ask.inputs.controls, strict=True):
        modes.net(control.net)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        counted = [
            t
            for k, t in enumerate(times)
            if not (k / len(times) < control.start or (k + 1) / len(times) > control.end)
        ]
        window = [control.scale, counted[0], counted[-1]] if counted else [0.0, -1.0, -1.0]
        found[IMAGE + control.net] = image.repeat(rows, 1, 1, 1).to(modes.device, dtype)
        found[WINDOW + control.net] = torch.tensor([window] * rows, dtype=torch.float32, device=modes.device)
    return found


def residuals(
    modes: Modes,
    sample: torch.Tensor,
    times: torch.Tensor,
    given: Mapping[str, torch.Tensor],
    added: Mapping[str, torch.Tensor] | None,
) -> dict[str, Any]:
    """What the nets add to the denoiser's blocks; empty without nets."""
    down: list[torch.Tensor] = []
    middle: torch.Tensor | None = None
    for name in given:
        if not name.startswith(IMAGE):
            continue
        net = name.removeprefix(IMAGE)
        scale, first, last = given[WINDOW + net].unbind(1)
        scale = torch.where((times <= first) & (times >= last), scale, 0.0).view(-1, 1, 1, 1).to(sample.dtype)
        more, mid = modes.net(net)(
            sample,
            times,
            encoder_hidden_states=given["text"],
            controlnet_cond=given[name],
            conditioning_scale=1.0,
            added_cond_kwargs=added,
            return_dict=False,
        )
        scaled = [part * scale for part in more]
        down = scaled if middle is None else [a + b for a, b in zip(down, scaled, strict=True)]
        middle = mid * scale if middle is None else middle + mid * scale
    if middle is None:
        return {}
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
