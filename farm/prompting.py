"""Prompt help without a text model: what a prompt lacks is added, by a template of its model's family.

The same prompt always becomes the same. Nothing that was written is taken away or moved.
"""

import re
from dataclasses import dataclass

from farm.catalog import Model
from farm.styles import STYLES

TEMPLATE = "template"  # who helped, as specs say it


@dataclass(frozen=True, slots=True)
class Lack:
    """Words that say something about an aspect of a picture, and what is added where none of them stands."""

    said_by: str  # a pattern of words
    add: str


SENTENCES = (
    Lack(
        r"light|lit|shadow|sun|dawn|dusk|night|neon|glow|dark|bright|backlit|lamp",
        "lit by soft, natural light",
    ),
    Lack(
        r"detail|sharp|intricate|texture|crisp|blur|soft focus|minimal|flat|simple", "with fine, crisp detail"
    ),
    Lack(
        r"close.?up|portrait|wide|view|shot|angle|aerial|macro|composition|cent(er|re)|foreground|background",
        "in a balanced composition",
    ),
)
TAGS = (
    Lack(r"detail|sharp|intricate|texture|crisp|blur|minimal|flat|simple", "highly detailed"),
    Lack(r"light|lit|shadow|sun|dawn|dusk|night|neon|glow|dark|bright|backlit|lamp", "soft natural light"),
    Lack(r"focus|bokeh|blur|depth of field", "sharp focus"),
    Lack(r"composition|close.?up|portrait|wide|view|shot|angle|aerial|macro", "balanced composition"),
)
# the starter draws shapes on a ground of one colour, and knows few other words
SHAPES = (Lack(r"background|on (an? )?\w+$|stripe|gradient", "on a white background"),)

# models whose text encoder reads sentences; the others were trained on lists of words
READS_SENTENCES = ("flux1", "flux2", "flux2-klein", "sd3", "pixart", "kandinsky3", "if")


def templates(model: Model) -> tuple[tuple[Lack, ...], str]:
    """What a model's prompts may lack, and what stands between the additions."""
    if model.source.startswith("builtin:"):
        return SHAPES, " "
    return (SENTENCES, ", ") if model.family in READS_SENTENCES else (TAGS, ", ")


def enhanced(prompt: str, model: Model, *, longest: int) -> str:
    """The prompt with what it lacks, as far as that fits into so many characters."""
    lacks, between = templates(model)
    text = prompt.rstrip()
    plain = text.rstrip(" ,.;")
    for lack in lacks:
        more = f"{plain}{between}{lack.add}"
        if not re.search(rf"\b(?:{lack.said_by})", prompt, re.IGNORECASE) and len(more) <= longest:
            text = plain = more
    return text


def styled(prompt: str, negative: str, style: str, model: Model) -> tuple[str, str]:
    """The prompts with a style's words; a model that takes no negative prompt gets none of those."""
    words = STYLES[style]
    negatives = [negative, words.negative] if model.negative_prompt else [negative]
    return f"{prompt.rstrip(' ,.;')}, {words.prompt}", ", ".join(filter(None, negatives))
