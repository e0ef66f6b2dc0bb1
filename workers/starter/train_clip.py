"""Step 2: a small CLIP that scores an image against its prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from workers.starter.pictures import caption, draw, imagine
from workers.starter.train_vae import to_tensor
from workers.starter.training import Course, fit, ranks

STEPS = 700
BATCH = 160


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    text = text_config(tokenizer)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )


def train_clip(folder: Path, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Train both towers to find, among the captions of a batch, the one that belongs to a picture."""
    torch.manual_seed(2)
    clip, count = new_clip(tokenizer), BATCH // ranks()

    def loss(turn: int) -> torch.Tensor:
        pixels, captions = captioned_batch(turn * count, count)
        words = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        return clip(pixel_values=pixels, **words, return_loss=True).loss

    return fit(clip, loss, Course("clip", STEPS, 1e-3, folder))


def captioned_batch(first_seed: int, count: int) -> tuple[torch.Tensor, list[str]]:
    """Draw pictures for the seeds from first_seed on, with their captions.

    Values -1 to 1, shape (count, 3, 64, 64).
    """
    scenes = [imagine(seed) for seed in range(first_seed, first_seed + count)]
    captions = [caption(scene, first_seed + row) for row, scene in enumerate(scenes)]
    return to_tensor(np.stack([draw(scene) for scene in scenes])), captions
