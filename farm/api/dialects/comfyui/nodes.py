"""The nodes that are accepted, as ComfyUI describes them to its clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from farm.api.dialects import samplers
from farm.catalog import Model, catalog
from farm.features import MAX_SCALE

MAX_SIDE = 8192
MAX_SEED = 2**64 - 1
MOST_IMAGES = 64  # of one latent
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Node:
    """One kind: what goes in, by name, and what comes out. saves: images leave here."""

    title: str
    category: str
    takes: Mapping[str, tuple[Any, ...]]
    gives: Sequence[str]
    saves: bool = False
    names: Sequence[str] = field(default=())


def _whole(default: int, least: int, most: int, **more: Any) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": least, "max": most, **more}


def _number(default: float, least: float, most: float) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": least, "max": most, "step": 0.01}


SIDES = {"width": _whole(512, 16, MAX_SIDE, step=8), "height": _whole(512, 16, MAX_SIDE, step=8)}
LATENT = {**SIDES, "batch_size": _whole(1, 1, MOST_IMAGES)}


def checkpoints() -> list[str]:
    return [f"{name}{SUFFIX}" for name in catalog()]


def loras() -> list[str]:
    return list(dict.fromkeys(f"{name}{SUFFIX}" for m in catalog().values() for name in m.loras))


def sampler_names() -> list[str]:
    return list(dict.fromkeys(k.comfy[0] for k in _served()))


def schedulers() -> list[str]:
    return list(dict.fromkeys(s for k in _served() for s in k.comfy[1]))


def _served() -> list[samplers.Known]:
    found = {s for m in catalog().values() for s in m.samplers}
    return [k for k in samplers.TABLE if k.sampler in found]


def every(uploads: Sequence[str] = ()) -> dict[str, Node]:
    """Each accepted node. uploads: the names of the account's images."""
    scale = _number(1.0, -MAX_SCALE, MAX_SCALE)
    return {
        "CheckpointLoaderSimple": Node(
            "Load Checkpoint", "loaders", {"ckpt_name": (checkpoints(),)}, ("MODEL", "CLIP", "VAE")
        ),
        "LoraLoader": Node(
            "Load LoRA",
            "loaders",
            {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "lora_name": (loras(),),
                "strength_model": scale,
                "strength_clip": scale,
            },
            ("MODEL", "CLIP"),
        ),
        "CLIPSetLastLayer": Node(
            "CLIP Set Last Layer",
            "conditioning",
            {"clip": ("CLIP",), "stop_at_clip_layer": _whole(-1, -24, -1)},
            ("CLIP",),
        ),
        "CLIPTextEncode": Node(
            "CLIP Text Encode (Prompt)",
            "conditioning",
            {"text": ("STRING", {"multiline": True}), "clip": ("CLIP",)},
            ("CONDITIONING",),
        ),
        "FluxGuidance": Node(
            "FluxGuidance",
            "advanced/conditioning/flux",
            {"conditioning": ("CONDITIONING",), "guidance": _number(3.5, 0.0, 100.0)},
            ("CONDITIONING",),
        ),
        "EmptyLatentImage": Node("Empty Latent Image", "latent", LATENT, ("LATENT",)),
        "EmptySD3LatentImage": Node("EmptySD3LatentImage", "latent/sd3", LATENT, ("LATENT",)),
        "LoadImage": Node(
            "Load Image", "image", {"image": (list(uploads), {"image_upload": True})}, ("IMAGE", "MASK")
        ),
        "VAEEncode": Node("VAE Encode", "latent", {"pixels": ("IMAGE",), "vae": ("VAE",)}, ("LATENT",)),
        "KSampler": Node(
            "KSampler",
            "sampling",
            {
                "model": ("MODEL",),
                "seed": _whole(0, 0, MAX_SEED, control_after_generate=True),
                "steps": _whole(20, 1, 1000),
                "cfg": _number(8.0, 0.0, 100.0),
                "sampler_name": (sampler_names(),),
                "scheduler": (schedulers(),),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",),
                "denoise": _number(1.0, 0.0, 1.0),
            },
            ("LATENT",),
        ),
        "VAEDecode": Node("VAE Decode", "latent", {"samples": ("LATENT",), "vae": ("VAE",)}, ("IMAGE",)),
        "SaveImage": Node(
            "Save Image",
            "image",
            {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})},
            (),
            saves=True,
        ),
        "PreviewImage": Node("Preview Image", "image", {"images": ("IMAGE",)}, (), saves=True),
        "SaveImageWebsocket": Node("SaveImageWebsocket", "api/image", {"images": ("IMAGE",)}, (), saves=True),
    }


def described(name: str, node: Node) -> dict[str, Any]:
    """A node as /object_info has it."""
    return {
        "input": {"required": {k: list(v) for k, v in node.takes.items()}},
        "input_order": {"required": list(node.takes)},
        "output": list(node.gives),
        "output_is_list": [False] * len(node.gives),
        "output_name": list(node.gives),
        "name": name,
        "display_name": node.title,
        "description": "",
        "python_module": "nodes",
        "category": node.category,
        "output_node": node.saves,
    }


def model_file(name: str) -> str:
    """A checkpoint's or LoRA's name without the end of its file's."""
    return name.removesuffix(SUFFIX).removesuffix(".ckpt")


def takes_guidance_inside(model: Model) -> bool:
    """Whether guidance is embedded, as in FLUX: ComfyUI says it by FluxGuidance, and cfg stays 1."""
    return model.guided_rows == 1
