"""Step 3: the denoiser's text encoder, which learns to tell what a caption says.

Trained with the denoiser alone it told backgrounds and colours apart, but after 4,100 steps no places: a place is
learned only where the words differ and the denoiser tells its left from its right, and neither pays without the
other. The CLIP's text tower had unlearned places as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPTextModel, CLIPTokenizer

from workers.starter.pictures import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene, caption, imagine
from workers.starter.train_clip import text_config
from workers.starter.training import Course, fit, ranks

STEPS = 600
BATCH = 96
TOKENS = (32, 32, 77)  # taken in turn; most captions are shorter than 26
FIELDS: tuple[tuple[str | None, ...], ...] = (
    tuple(COLOURS),
    (*COLOURS, None),
    (*SHAPES, None),
    (*SIZES, None),
    (*PLACES, None),
    (*RELATIONS, None),
    (*COLOURS, None),
    (*SHAPES, None),
)


def new_text(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(3)
    text = CLIPTextModel(text_config(tokenizer))
    with torch.no_grad():
        text.embeddings.position_embedding.weight.mul_(0.25)  # a word is the same word wherever it stands
    return text


def train_text(folder: Path, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Train the text encoder so that the tokens after a caption's end say what the scene is."""
    text = new_text(tokenizer)
    reader = nn.Linear(text.config.hidden_size, sum(len(field) for field in FIELDS))
    count = BATCH // ranks()

    def loss(turn: int) -> torch.Tensor:
        scenes = [imagine(seed) for seed in range(turn * count, (turn + 1) * count)]
        captions = [caption(scene, turn * count + row) for row, scene in enumerate(scenes)]
        length = TOKENS[turn % len(TOKENS)]
        ids = tokenizer(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        hidden = text(ids.input_ids).last_hidden_state
        ends = (ids.input_ids == tokenizer.eos_token_id).float()
        mean = (hidden * (ends / ends.sum(1, keepdim=True))[..., None]).sum(1)
        return _misread(reader(mean), torch.tensor([facts_of(scene) for scene in scenes]))

    fit(
        nn.ModuleDict({"text": text, "reader": reader}),
        loss,
        Course("text", STEPS, 1e-3, folder, memory=0.99),
    )
    return text


def _misread(scores: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    parts = scores.split([len(field) for field in FIELDS], 1)
    losses = [F.cross_entropy(part, facts[:, place]) for place, part in enumerate(parts)]
    return torch.stack(losses).mean()


def facts_of(scene: Scene) -> list[int]:
    """Return the index of each field's value."""
    none = (None, None, None, None)
    one, two = ([(t.colour, t.shape, t.size, t.place) for t in scene.things] + [none, none])[:2]
    values = (scene.background, *one, scene.relation, *two[:2])
    return [field.index(value) for field, value in zip(FIELDS, values, strict=True)]
