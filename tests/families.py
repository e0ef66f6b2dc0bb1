"""Tiny random pipelines of families that only run to completion, saved as real checkpoints; see tests/tiny.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    IFPipeline,
    IFSuperResolutionPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    UNet2DConditionModel,
    VQModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from farm.catalog import BUILTIN, Model, read
from tests.tiny import WIDTH, _save, _t5, _t5_tokenizer

CHAT = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}"
)
LLM = {
    "vocab_size": 270,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}


def family_model(path: Path, entry: str, **changes: Any) -> Model:
    """Save a tiny checkpoint like a built-in entry's and return that entry, changed to name it."""
    SAVE[entry](path)
    facts = read(BUILTIN)[entry].model_dump()
    stages = [{**s, "source": f"dir:{path / 'stage-2'}", "steps": 3} for s in facts["stages"]]
    side = {"min": 32, "max": 256, "multiple": 32, "default": 64}
    tiny = {"name": f"tiny-{entry}", "source": f"dir:{path}", "revision": "tiny", "dtype": "float32", "side": side,
            "sizes": (), "stages": stages, "pack": {"frames": 8, "pixels": 8 * 64 * 64}}  # fmt: skip
    return Model.model_validate({**facts, **tiny, **changes})


def kandinsky3(path: Path) -> None:
    torch.manual_seed(0)
    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=WIDTH,
    )
    movq = VQModel(
        block_out_channels=(32, 32, 32, 32),  # its spatial norm has 32 groups
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=12,
        norm_num_groups=8,
        norm_type="spatial",
    )
    sampler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        steps_offset=1,
    )
    _save(
        Kandinsky3Pipeline(
            tokenizer=_t5_tokenizer(),
            text_encoder=_t5(WIDTH),
            unet=unet.eval(),
            scheduler=sampler,
            movq=movq.eval(),
        ),
        path,
    )


def deepfloyd(path: Path) -> None:
    torch.manual_seed(0)
    parts = {"tokenizer": _t5_tokenizer(), "safety_checker": None, "feature_extractor": None, "watermarker": None,
             "requires_safety_checker": False}  # fmt: skip
    _save(IFPipeline(text_encoder=_t5(WIDTH), unet=_pixels(), scheduler=_learned(), **parts), path)
    larger = _pixels(in_channels=6, class_embed_type="timestep", time_embedding_act_fn="gelu")
    _save(
        IFSuperResolutionPipeline(
            text_encoder=_t5(WIDTH),
            unet=larger,
            scheduler=_learned(),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            **parts,
        ),
        path / "stage-2",
    )


def _learned() -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.0,
        variance_type="learned_range",
    )


def _pixels(**changes: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 32,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "in_channels": 3,
        "out_channels": 6,  # the other half is a variance
        "cross_attention_dim": 32,
        "encoder_hid_dim": WIDTH,
        "attention_head_dim": 8,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def flux2_klein(path: Path) -> None:
    torch.manual_seed(0)
    text = Qwen3ForCausalLM(Qwen3Config(**LLM, num_hidden_layers=28))  # it is read at layers 9, 18 and 27
    _save(
        Flux2KleinPipeline(
            text_encoder=text.eval(),
            tokenizer=_bytes(),
            transformer=_flux2(guidance_embeds=False),
            vae=_flux2_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            is_distilled=True,
        ),
        path,
    )


def flux2_dev(path: Path) -> None:
    torch.manual_seed(0)
    config = Mistral3Config(
        text_config={"model_type": "mistral", **LLM, "num_hidden_layers": 30},  # it is read at 10, 20 and 30
        vision_config={"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    _save(
        Flux2Pipeline(
            text_encoder=Mistral3ForConditionalGeneration(config).eval(),
            tokenizer=_bytes(),  # the real one's image half wants torchvision
            transformer=_flux2(),
            vae=_flux2_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        ),
        path,
    )


def _flux2(**changes: Any) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,  # 4 latent channels, packed two by two
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **changes,
    ).eval()


def _flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def _bytes() -> PreTrainedTokenizerFast:
    """Every byte a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        padding_side="right",
        chat_template=CHAT,
    )


SAVE: dict[str, Callable[[Path], None]] = {
    "kandinsky3": kandinsky3,
    "deepfloyd-if": deepfloyd,
    "flux2-klein": flux2_klein,
    "flux2-dev": flux2_dev,
}
