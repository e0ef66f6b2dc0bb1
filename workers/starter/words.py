"""The starter model's tokenizer: CLIP's rules, with a vocabulary just large enough for the captions.

A word of the captions is one token. Any other text falls back to pieces and, at worst, to its bytes.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from workers.starter.pictures import caption, imagine

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
# What people write around what they want to see.
# fmt: off
EXTRA = [
    "a", "an", "the", "of", "and", "or", "with", "without", "no", "not", "in", "on", "at", "to", "from",
    "by", "for",
    "is", "it",
    "this", "that", "picture", "photo", "image", "drawing", "painting", "sketch", "render", "style",
    "simple", "flat", "clean", "sharp", "blurry", "bad", "low", "high", "quality", "detailed", "shape",
    "shapes", "colour", "color", "colours", "colors", "one", "two", "three", "very", "bright", "dark",
    "light", "big", "tiny", "cat", "dog", "house", "tree", "sky", "sun", "moon", "person",
    "gray", "grey", "pink",
    "brown", "cyan", "gold", "silver", "hexagon", "rectangle", "oval", "line", "dot", "s",
]
# fmt: on


def new_tokenizer() -> CLIPTokenizer:
    """Learn the vocabulary from the captions; always the same."""
    merges = _merges(_known_words())
    letters = sorted(_byte_letters())
    entries = letters + [letter + END_OF_WORD for letter in letters]
    entries += [one + two for one, two in merges] + [START, END]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _known_words() -> list[str]:
    said = Counter(word for seed in range(20_000) for word in caption(imagine(seed), seed).split())
    # Made-up words come once or twice; their like must stay unknown.
    words = {word.strip(",.") for word, times in said.items() if times > 20}
    return sorted(words | set(EXTRA))


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Join the commonest neighbours again and again, until each word is one token."""
    parts = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges = []
    while pairs := Counter(pair for part in parts for pair in pairwise(part)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        parts = [_join(part, best) for part in parts]
    return merges


def _join(part: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in part:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _byte_letters() -> list[str]:
    """The printable letter that byte-level tokenizers write for each of the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
