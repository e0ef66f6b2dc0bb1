"""Prompts as AUTOMATIC1111 and ComfyUI write them: (this:1.2), ((that)), [less], <lora:name:0.8>.

The farm reads weights as compel does: (this)1.2. A prompt without them stays as it is, letter for letter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from farm.catalog import Model
from farm.errors import Fault, Invalid
from farm.spec import MAX_PROMPT

MORE, LESS = 1.1, 1 / 1.1
MAX_WEIGHT = 10.0
MAX_LENGTH = 2 * MAX_PROMPT  # what is written for others may be longer
MAX_NESTED = 100
PART = re.compile(r"\\[()\[\]\\]|\(|\[|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|\)|\]|[^\\()\[\]:]+|[\\:]")
LORA = re.compile(r"<lora:([^:<>]+)(?::([+-]?[0-9.]+))?>")
EDITED = re.compile(r"\[[^\[\]]*:\s*[0-9.]+\s*\]|\[[^\[\]|]*\|[^\[\]]*\]|\b(?:AND|BREAK)\b")
WEIGHTED = re.compile(r":\s*[+-]?[\d.]+\s*\)")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in the farm's words; weighted: it holds weights, and is to be read so."""

    text: str
    weighted: bool
    loras: tuple[tuple[str, float], ...] = ()


def read(text: str, model: Model, *, field: str, webui: bool) -> Prompt:
    """The prompt for this model. webui: as AUTOMATIC1111 reads it, where <lora:…> means one.

    Raises Invalid for weights where the model takes none, for a LoRA's weight that is no number, and for what
    changes while an image is made.
    """
    found: list[tuple[str, float]] = []
    if len(text) > MAX_LENGTH:
        raise Invalid([Fault(field, text, f"allowed are up to {MAX_PROMPT} characters")])
    if webui:
        if edited := EDITED.search(text):
            raise Invalid([Fault(field, edited[0], "prompts that change between steps are not served")])
        found = [(m[1], _number(m[2], field)) for m in LORA.finditer(text)]
        text = LORA.sub("", text).strip() if found else text
    try:
        parts = weights(text)
    except RecursionError as e:
        raise Invalid([Fault(field, text, str(e))]) from None
    if all(weight == 1 for _, weight in parts):
        return Prompt(_plain(text), weighted=False, loras=tuple(found))
    if "prompt_weights" not in model.takes:
        if not WEIGHTED.search(text):
            return Prompt(text, weighted=False, loras=tuple(found))  # just brackets, of a sentence
        raise Invalid([Fault(field, text, f"{model.name} takes no weights as (word:1.2)")])
    written = "".join(_written(part, weight) for part, weight in parts)
    return Prompt(written, weighted=True, loras=tuple(found))


def _number(text: str | None, field: str) -> float:
    try:
        return float(text or 1)
    except ValueError:
        raise Invalid([Fault(field, text, "a LoRA's weight is a number, as in <lora:ink:0.8>")]) from None


def weights(text: str) -> list[tuple[str, float]]:
    """The prompt's parts, each with its weight: of nested brackets the product.

    Raises RecursionError for brackets in too many others.
    """
    parts: list[tuple[str, float]] = []
    round_at: list[int] = []
    square_at: list[int] = []

    def multiply(start: int, by: float) -> None:
        for k in range(start, len(parts)):
            parts[k] = (parts[k][0], max(-MAX_WEIGHT, min(MAX_WEIGHT, parts[k][1] * by)))

    for match in PART.finditer(text):
        part = match[0]
        if len(round_at) + len(square_at) > MAX_NESTED:
            raise RecursionError(f"brackets may be {MAX_NESTED} deep")
        if part == "(":
            round_at.append(len(parts))
        elif part == "[":
            square_at.append(len(parts))
        elif match[1] is not None and round_at:
            multiply(round_at.pop(), float(match[1]))
        elif part == ")" and round_at:
            multiply(round_at.pop(), MORE)
        elif part == "]" and square_at:
            multiply(square_at.pop(), LESS)
        else:
            parts.append((part[1] if part[0] == "\\" and len(part) == 2 else part, 1.0))
    for start in round_at:  # brackets that are never closed count, as they do there
        multiply(start, MORE)
    for start in square_at:
        multiply(start, LESS)
    return _joined(parts)


def _joined(parts: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def _plain(text: str) -> str:
    """Without the backslashes that only say that a bracket is one."""
    return re.sub(r"\\([()\[\]\\])", r"\1", text)


def _written(text: str, weight: float) -> str:
    words = re.sub(r"([()])", r"\\\1", text.strip())
    if not words:
        return text
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{before}{words if weight == 1 else f'({words}){round(weight, 4):g}'}{after}"
