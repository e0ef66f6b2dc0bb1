"""The stock pipelines of a checkpoint by what a frame starts from: noise, an image, a mask, control images.

They share the checkpoint's modules; a control net is loaded when it is asked for first.
"""

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from farm.catalog import Model
from farm.errors import RenderFailed
from farm.features import Pass
from workers.engine import Ask, Pixels
from workers.engine.faults import brief
from workers.engine.weights import net_folder

NETS_KEPT = 4
TEXT, IMAGE, MASK = "text", "image", "mask"
OTHER: Mapping[str, Mapping[str, str]] = {
    "StableDiffusionPipeline": {
        IMAGE: "StableDiffusionImg2ImgPipeline",
        MASK: "StableDiffusionInpaintPipeline",
        "control": "StableDiffusionControlNetPipeline",
        "control image": "StableDiffusionControlNetImg2ImgPipeline",
        "control mask": "StableDiffusionControlNetInpaintPipeline",
    },
    "StableDiffusionXLPipeline": {
        IMAGE: "StableDiffusionXLImg2ImgPipeline",
        MASK: "StableDiffusionXLInpaintPipeline",
        "control": "StableDiffusionXLControlNetPipeline",
        "control image": "StableDiffusionXLControlNetImg2ImgPipeline",
        "control mask": "StableDiffusionXLControlNetInpaintPipeline",
    },
    "StableDiffusion3Pipeline": {
        IMAGE: "StableDiffusion3Img2ImgPipeline",
        MASK: "StableDiffusion3InpaintPipeline",
    },
    "FluxPipeline": {IMAGE: "FluxImg2ImgPipeline", MASK: "FluxInpaintPipeline"},
}
FLOW = {"StableDiffusion3Pipeline", "FluxPipeline"}
FROM_CONFIG = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")


def kind_of(ask: Ask) -> str:
    if ask.inputs.mask is not None:
        return MASK
    return IMAGE if ask.inputs.image is not None else TEXT


class Modes:
    """A loaded pipeline and its relatives."""

    def __init__(self, pipe: Any, model: Model, *, device: str) -> None:
        self.pipe = pipe
        self.model = model
        self.device = device
        self._made: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._nets: OrderedDict[str, Any] = OrderedDict()

    def pipeline(self, kind: str, nets: Sequence[str] = ()) -> Any:
        """The pipeline for frames that start from that, and follow these nets.

        Raises RenderFailed if the family has none.
        """
        if kind == TEXT and not nets:
            return self.pipe
        key = (kind, tuple(nets))
        if key not in self._made:
            self._made[key] = self._make(kind, nets)
        return self._made[key]

    def _make(self, kind: str, nets: Sequence[str]) -> Any:
        name = " ".join((["control"] if nets else []) + ([kind] if kind != TEXT else []))
        class_name = OTHER.get(self.model.pipeline, {}).get(name)
        if class_name is None:
            raise RenderFailed(f"{self.model.pipeline} has no way to start from: {name}")
        made = getattr(diffusers, class_name)
        known = inspect.signature(made.__init__).parameters
        unwanted = {"requires_safety_checker": False, "add_watermarker": False}
        facts = {n: self.pipe.config[n] for n in FROM_CONFIG if self.pipe.config.get(n) is not None}
        given = {**self.pipe.components, **unwanted, **facts}
        if nets:
            loaded = [self.net(n) for n in nets]
            given["controlnet"] = loaded[0] if len(loaded) == 1 else loaded
        pipe = made(**{n: v for n, v in given.items() if n in known})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def net(self, name: str) -> Any:
        """A control net, on the device.

        Raises RenderFailed naming the file that does not fit.
        """
        if name in self._nets:
            self._nets.move_to_end(name)
            return self._nets[name]
        folder = net_folder(self.model, name)
        try:
            net = diffusers.ControlNetModel.from_pretrained(
                folder, dtype=getattr(torch, self.model.dtype), use_safetensors=True, local_files_only=True
            )
        except Exception as e:
            raise RenderFailed(f"the control net in {folder} cannot be loaded: {brief(e)}") from None
        width, wanted = net.config.cross_attention_dim, self.pipe.unet.config.cross_attention_dim
        if width != wanted:
            raise RenderFailed(
                f"the control net in {folder} is of another family: its text is {width} wide, not {wanted}"
            )
        factor = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
        if factor != self.pipe.vae_scale_factor:
            raise RenderFailed(
                f"the control net in {folder} is of another family: its image is {factor} times as wide as the"
                f" latents, not {self.pipe.vae_scale_factor} times"
            )
        self._nets[name] = net.to(self.device).eval()
        while len(self._nets) > NETS_KEPT:
            gone, _ = self._nets.popitem(last=False)
            self._made = {key: pipe for key, pipe in self._made.items() if gone not in key[1]}
        return self._nets[name]


def image_arguments(asks: Sequence[Ask], run: Pass, *, pipeline: str) -> dict[str, Any]:
    """What a stock call takes for these frames' first pass, beside text, seeds and size."""
    first, arguments = asks[0], dict[str, Any]()
    if first.spec.control:
        nets = range(len(first.spec.control))
        columns = [_stacked([a.inputs.controls[n] for a in asks]) for n in nets]
        each = {
            "controlnet_conditioning_scale": [float(c.scale) for c in first.spec.control],
            "control_guidance_start": [float(c.start) for c in first.spec.control],
            "control_guidance_end": [float(c.end) for c in first.spec.control],
        }
        one = len(columns) == 1
        name = "image" if first.inputs.image is None else "control_image"
        arguments[name] = columns[0] if one else columns
        arguments |= {n: v[0] if one else v for n, v in each.items()}
    if first.inputs.image is not None:
        arguments["image"] = [Image.fromarray(a.inputs.image) for a in asks if a.inputs.image is not None]
        arguments["strength"] = strength_of(run, pipeline=pipeline)
    if first.inputs.mask is not None:
        arguments["mask_image"] = [Image.fromarray(a.inputs.mask) for a in asks if a.inputs.mask is not None]
    return arguments


def _stacked(images: Sequence[Pixels]) -> torch.Tensor:
    """(rows, 3, height, width) in 0 … 1: the form of several rows for several nets that every pipeline takes."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def strength_of(run: Pass, *, pipeline: str) -> float:
    """The strength by which a stock pipeline runs just these steps, whichever way it rounds."""
    if run.steps >= run.schedule:
        return 1.0
    return (run.steps + (-1e-3 if pipeline in FLOW else 1e-3)) / run.schedule
