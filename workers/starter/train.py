"""Train the starter model from nothing: `python -m workers.starter.train`.

Stop it at any time; the same command goes on from the last checkpoint in --runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from workers.starter import clip_path, path
from workers.starter.train_clip import train_clip
from workers.starter.train_text import train_text
from workers.starter.train_unet import new_sampler, train_unet
from workers.starter.train_vae import train_vae
from workers.starter.words import new_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/starter"), help="checkpoints")
    parser.add_argument(
        "--ranks", type=int, default=2, help="processes, one core each, that share every step"
    )
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    meeting = options.runs.resolve() / "meeting"
    meeting.unlink(missing_ok=True)
    # Two processes of one thread: one process of two threads waits at hundreds of barriers a step, and took
    # 1.23 s a step instead of 0.82 on 2 cores at a load of 12.
    torch.multiprocessing.spawn(_work, (options.ranks, options.runs, meeting), nprocs=options.ranks)


def _work(rank: int, ranks: int, runs: Path, meeting: Path) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # beside other work both had landed on one
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    tokenizer = new_tokenizer()
    vae = train_vae(runs)
    clip = train_clip(runs, tokenizer)
    text = train_text(runs, tokenizer)
    unet = train_unet(runs, tokenizer, vae, text)
    if rank == 0:
        write_clip(clip, tokenizer, clip_path())
        write_model(unet, text, vae, tokenizer, path())
    dist.destroy_process_group()


def write_model(
    unet: nn.Module, text: nn.Module, vae: nn.Module, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """Write the pipeline's folder: halves for the denoiser, which is most of it, and floats for the rest."""
    parts = {"unet": unet.half(), "text_encoder": text.half(), "vae": vae}
    pipe = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=new_sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    part = folder.with_name(folder.name + ".part")
    pipe.save_pretrained(part, safe_serialization=True)
    _load_as_floats(part / "text_encoder" / "config.json")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def write_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the CLIP's folder, with all that `CLIPProcessor.from_pretrained` needs."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    size = {"height": 64, "width": 64}
    CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half
    ).save_pretrained(folder)


def _load_as_floats(config: Path) -> None:
    # transformers gives a model the type its config names, whatever the file holds.
    facts = json.loads(config.read_text())
    facts["dtype"] = "float32"
    config.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
