"""Tiny random pipelines of real diffusers classes, saved as real checkpoints: a render takes milliseconds."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from farm.catalog import BUILTIN, Model, read
from farm.errors import RenderFailed
from farm.spec import Format, Spec
from workers.engine import Ask, Pixels, open_engine, open_step_engine
from workers.engine.pipe import PipeEngine
from workers.engine.step.loop import StepLoop

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
WIDTH = 32  # of every text encoder
PROMPTS = ["x", "a red circle left", "abcd " * 20]  # 1, 14 and 80 (cut to 75) of the tiny tokenizer's tokens


def tiny_model(path: Path, family: str = "sd", **changes: Any) -> Model:
    """Save a tiny checkpoint of a family (the keys of _SAVE) and return its catalog entry."""
    _SAVE[family](path)
    like = "sd" if family.startswith("pixart") else family.partition("-")[0]
    entry = next(m for m in read(BUILTIN).values() if m.family == like).model_dump()
    if family.startswith("pixart"):
        pipeline = "PixArtSigmaPipeline" if family == "pixart-sigma" else "PixArtAlphaPipeline"
        changes = {"family": "pixart", "pipeline": pipeline, "free": (), "takes": (), **changes}
    tiny = {
        "name": f"tiny-{family}",
        "source": f"dir:{path}",
        "revision": "tiny",
        "dtype": "float32",
        "side": {"min": 16, "max": 256, "multiple": 16, "default": 32},
        "sizes": (),
        "engine": "pipe",
        "packs_by": "call",
        "free": () if like == "flux1" else ("guidance",),
        "guidance": {"min": 0.0, "max": 30.0, "default": 4.0},
        "pack": {"frames": 8, "pixels": 8 * 64 * 64},
    }
    return Model(**{**entry, **tiny, **changes})


@cache
def tiny_engine(family: str) -> PipeEngine:
    """Load a tiny checkpoint of a family, once a process."""
    with tempfile.TemporaryDirectory() as folder:
        return open_tiny(tiny_model(Path(folder), family))


def open_tiny(model: Model) -> PipeEngine:
    engine = open_engine(model, device="cpu")
    assert isinstance(engine, PipeEngine)
    return engine


def tiny_steps(path: Path, family: str, **changes: Any) -> StepLoop:
    """Save a tiny checkpoint and open it to go step by step."""
    step = {"engine": "step", "packs_by": "shape", "free": ()}
    engine = open_step_engine(tiny_model(path, family, **{**step, **changes}), device="cpu")
    assert isinstance(engine, StepLoop)
    return engine


def tiny_ask(model: Model, prompt: str = "a red circle", *, seed: int = 1, **changes: Any) -> Ask:
    spec = Spec(model.name, prompt, "", 32, 32, 4, 4.0, model.sampler, Format.PNG)
    return Ask(replace(spec, **changes), seed)


def mixed_asks(model: Model, **changes: Any) -> list[Ask]:
    """Frames that share a call key, and differ in all that the family leaves free."""
    guidance = (1.5, 4.0, 12.0) if "guidance" in model.free else (4.0, 4.0, 4.0)
    negative = ("", "ugly", "blurred, low quality") if model.negative_prompt else ("", "", "")
    seeds = (0, 7, 2**63 - 1)
    return [
        tiny_ask(model, p, seed=s, **{"guidance": g, "negative_prompt": n, **changes})
        for p, s, g, n in zip(PROMPTS, seeds, guidance, negative, strict=True)
    ]


def render(engine: PipeEngine, asks: Sequence[Ask]) -> list[Pixels | RenderFailed]:
    return engine.render(asks, on_step=lambda done, total: None)


@contextmanager
def seen_latents(engine: PipeEngine) -> Iterator[list[torch.Tensor]]:
    """What the decoder gets, one frame at a time."""
    seen: list[torch.Tensor] = []
    hook = engine.pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    yield seen
    hook.remove()


def good(result: Pixels | RenderFailed) -> Pixels:
    assert not isinstance(result, RenderFailed)
    return result


def levels_apart(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def tiny_sd(path: Path, *, prediction: str = "epsilon", **unet: Any) -> Path:
    torch.manual_seed(0)
    return _save(
        StableDiffusionPipeline(
            unet=_unet(**unet),
            vae=_vae(4),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=_clip_tokenizer(),
            scheduler=DPMSolverMultistepScheduler(**NOISE, prediction_type=prediction),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ),
        path,
    )


def tiny_sdxl(path: Path, **unet: Any) -> Path:
    torch.manual_seed(0)
    xl = {
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    return _save(
        StableDiffusionXLPipeline(
            unet=_unet(**{**xl, **unet}),
            vae=_vae(4, force_upcast=True),
            text_encoder=_clip(CLIPTextModel),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            tokenizer=_clip_tokenizer(),
            tokenizer_2=_clip_tokenizer(),
            scheduler=DPMSolverMultistepScheduler(**NOISE),
            force_zeros_for_empty_prompt=True,
        ),
        path,
    )


def tiny_sd3(path: Path, *, channels: int = 4, shifted: bool = False, **changes: Any) -> Path:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,  # both CLIPs side by side, and as wide as T5
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        **changes,
    )
    return _save(
        StableDiffusion3Pipeline(
            transformer=transformer,
            vae=_vae(channels, shift_factor=0.06),
            text_encoder=_clip(CLIPTextModelWithProjection),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            text_encoder_3=_t5(2 * WIDTH),
            tokenizer=_clip_tokenizer(),
            tokenizer_2=_clip_tokenizer(),
            tokenizer_3=_t5_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=shifted),
        ),
        path,
    )


def tiny_flux(path: Path, *, guidance_embeds: bool = True) -> Path:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,  # 4 latent channels, packed two by two
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return _save(
        FluxPipeline(
            transformer=transformer,
            vae=_vae(4, shift_factor=0.06),
            text_encoder=_clip(CLIPTextModel),
            text_encoder_2=_t5(WIDTH),
            tokenizer=_clip_tokenizer(),
            tokenizer_2=_t5_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        ),
        path,
    )


def tiny_pixart(path: Path, *, sigma: bool = False, sample_size: int = 8) -> Path:
    """sample_size 32, 64 and 128 map what is asked for to trained sizes, and 128 tells Alpha its size."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,  # the other half is a variance
        cross_attention_dim=32,
        caption_channels=WIDTH,
        norm_num_groups=8,
    )
    pipeline = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    return _save(
        pipeline(
            transformer=transformer.eval(),
            vae=_vae(4),
            text_encoder=_t5(WIDTH),
            tokenizer=_t5_tokenizer(),
            scheduler=DPMSolverMultistepScheduler(**NOISE),
        ),
        path,
    )


_SAVE: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_sd,
    "sd-v": partial(tiny_sd, prediction="v_prediction"),
    "sd-lcm": partial(tiny_sd, time_cond_proj_dim=16),
    "sdxl": tiny_sdxl,
    "sdxl-lcm": partial(tiny_sdxl, time_cond_proj_dim=16),
    "sd3": tiny_sd3,
    "sd3-35": partial(tiny_sd3, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "sd3-shifted": partial(tiny_sd3, shifted=True),
    "flux1": tiny_flux,
    "flux1-schnell": partial(tiny_flux, guidance_embeds=False),
    "pixart": tiny_pixart,
    "pixart-binned": partial(tiny_pixart, sample_size=32),
    "pixart-sigma": partial(tiny_pixart, sigma=True),
}


def _save(pipe: Any, path: Path) -> Path:
    pipe.save_pretrained(path, safe_serialization=True)
    return path


def _unet(**changes: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def _vae(channels: int, **changes: Any) -> AutoencoderKL:
    """The real class with the real factor of 8 between pixels and latents."""
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **changes,
    ).eval()


def _clip(kind: Any) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=3,
            max_position_embeddings=77,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
            hidden_act="gelu",
        )
    ).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """Every byte a token, inside a word and at its end; no merges."""
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + k) for k in range(256 - len(letters))]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=128, d_model=width, d_ff=37, d_kv=8, num_heads=4, num_layers=2, dropout_rate=0.0)
    ).eval()


def _t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    return T5Tokenizer(
        vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0, model_max_length=512
    )
