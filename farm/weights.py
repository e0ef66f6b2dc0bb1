"""Weights in prompts, as compel reads them on the workers: what could not be rendered is found here, without it.

compel takes for words whatever it cannot read, as a bracket that is never closed; that is no fault. What it fails on,
or what makes numbers no embedding can hold, is. tests/test_weights.py compares both.
"""

import re
from math import isfinite

MAX_NESTED = 20  # brackets; compel recurses, and Python ends that at about 30
MAX_WEIGHT = 100.0  # with those of the brackets around it; 16-bit embeddings overflow at some thousands

NUMBER = r"(?:\d+\.?\d*|\.\d+)"
WEIGHT = rf"{NUMBER}|\++|-+"
PART = re.compile(
    rf"""\\[()"]|(?P<open>\()|(?P<close>\))(?P<after>{WEIGHT})?|"(?P<quoted>{WEIGHT})"""
    rf"""|\.attend\s*\(\s*(?P<said>{WEIGHT})\s*(?=\))|(?<=[^\s+])(?P<plus>\++)"""
)
OPERATED = re.compile(r"\)\s*\.(?:blend|and|add)\s*\(")
ITEM = r'(?:"(?:\\"|[^"\\]|\\(?!"))*"|[^\s()",.+=\\-]+)'
WHOLE = re.compile(
    rf"\s*\(\s*(?P<items>{ITEM}(?:\s*,\s*{ITEM})*)\s*\)\s*\.(?P<verb>blend|and|add)\s*\((?P<weights>[^()]*)\)\s*"
)
SIGNED = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+)|-?\d+")
EMPTY = re.compile(rf"""(?:\(\s*\)|"\s*")(?:\s*\.attend\s*\([^()]*\)|{WEIGHT})?""")
NO_WORDS = "allowed are brackets and quotes with words in them"
UNSERVED = {
    re.compile(r"\.swap\s*\("): ".swap() is not served",
    re.compile(r"(?:with|use)Lora\s*\("): "LoRAs are named in loras",
}
TOGETHER = 'allowed is ("one", "two").blend(0.7, 0.3) or .and(), with nothing beside it, and no weights or one a part'


def fault_of(text: str) -> tuple[str, str] | None:
    """What of a prompt could not be rendered, and what is allowed; None if all could."""
    for pattern, allowed in UNSERVED.items():
        if found := pattern.search(text):
            return found[0], allowed
    if text.strip() and not _words_of(text).strip():
        return text, NO_WORDS
    return _fault_of_brackets(text) or _fault_of_parts(text)


def _words_of(text: str) -> str:
    """Without the brackets and quotes that hold nothing."""
    for _ in range(MAX_NESTED):
        text, removed = EMPTY.subn("", text)
        if not removed:
            break
    return text


def _fault_of_brackets(text: str) -> tuple[str, str] | None:
    around = [1.0]  # the largest weight seen in each bracket that is open
    for part in PART.finditer(text):
        if part["open"]:
            around.append(1.0)
            if len(around) > MAX_NESTED + 1:
                return text, f"brackets may be {MAX_NESTED} deep"
            continue
        inner = around.pop() if part["close"] and len(around) > 1 else 1.0
        if part["quoted"] or part["said"]:
            inner = around[-1]  # what the quotes hold came before
        said = part["after"] or part["quoted"] or part["said"] or part["plus"]
        weight = inner * max(1.0, _weight(said))
        if not weight <= MAX_WEIGHT:
            return part[0], f"allowed are weights of 0 to {MAX_WEIGHT:g}, multiplied with those around them"
        around[-1] = max(around[-1], weight)
    return None


def _weight(said: str | None) -> float:
    if not said or said[0] == "-":
        return 1.0
    return 1.1 ** len(said) if said[0] == "+" else float(said)


def _fault_of_parts(text: str) -> tuple[str, str] | None:
    """Of a blend, or of parts joined by .and()."""
    if not (found := OPERATED.search(text)):
        return None
    whole = WHOLE.fullmatch(text)
    if whole is None:
        return found[0], TOGETHER
    items = re.findall(ITEM, whole["items"])
    said = [w.strip() for w in whole["weights"].split(",")] if whole["weights"].strip() else []
    normalized = not (whole["verb"] == "blend" and said and said[-1] == "no_normalize" and said.pop())
    if said and (len(said) != len(items) or not all(map(SIGNED.fullmatch, said))):
        return whole["weights"], TOGETHER
    for item in items:
        if item.strip('"').strip() and not _words_of(item.strip('"')).strip():
            return item, NO_WORDS
    weights = [float(w) for w in said] or [1.0]
    total = sum(weights) if whole["verb"] == "blend" and normalized else 1.0
    if not total or not all(isfinite(w) and abs(w / total) <= MAX_WEIGHT for w in weights):
        return whole["weights"], f"allowed are weights up to {MAX_WEIGHT:g} of their sum, which is not 0"
    return None
