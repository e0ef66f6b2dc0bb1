"""The built-in model: a Stable Diffusion in small, trained here on pictures that `pictures` draws."""

from pathlib import Path

HERE = Path(__file__).parent


def path() -> Path:
    """Return the folder of the text-to-image model, in diffusers' layout."""
    return HERE / "weights"


def clip_path() -> Path:
    """Return the folder of the small CLIP, in transformers' layout."""
    return HERE / "clip"
