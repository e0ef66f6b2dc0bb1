"""Matrices: every combination of prompts, models, sizes, seeds and whatever else a spec has, as frames.

    {"prompt": ["a (red, blue) circle", "a square"], "size": ["64x64", "128x64"], "seed": [1, 2, 3]}

Prompts turn slowest, seeds fastest, the others in the order they are written in. In a prompt

    (red, blue)           one of each: a group is what stands in parentheses with a comma
    (red, blue)*3         each three times
    (red, blue)*circle    "red circle", "blue circle": a * between a group and what follows joins them by a space
    \\( \\) \\*           the characters themselves

Several groups multiply, the last one turning fastest. What has no comma, as (red), and what carries a weight, as
(red, round)1.4 or (red, round)++, stays as it is.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from math import prod
from typing import Any

from pydantic import ValidationError

from farm import weights
from farm.bulk.lines import Reader, Row, Template
from farm.catalog import Catalog
from farm.errors import Fault, Invalid
from farm.faults import faults_in
from farm.features import refs_of
from farm.spec import MAX_PROMPT, MAX_SEED, Asked, Spec

MAX_PROMPTS = 100_000  # that the groups of a matrix come to
MAX_TEXT = 16 << 20  # characters of them all: a short line could come to what memory does not hold
MAX_COMBINATIONS = 10_000  # of everything but prompts and seeds
MAX_REPEATS = 1000
SHOWN = 100  # faults of a kind that are told; a body holds millions
LISTS = frozenset(
    ("control", "loras")
)  # fields that are lists themselves: several of them are a list of lists
GROUP = re.compile(
    r"(?<!\\)\(((?:[^()\\]|\\.)*,(?:[^()\\]|\\.)*)\)(?![\d+-])(?:\*(\d{1,4})(?!\w)|(\*)(?=[\w(\\]))?"
)
SIZE = re.compile(r"(\d{1,5})[x×](\d{1,5})", re.ASCII)


class Matrix:
    """What a matrix comes to. Frames are made when they are asked for, from any place on."""

    def __init__(
        self, axes: Mapping[str, Any], defaults: Mapping[str, Any], models: Catalog, *, most: int
    ) -> None:
        """Raises Invalid naming each axis that is not allowed, or too many frames; nothing is made yet."""
        axes = {**defaults, **axes}
        faults: list[Fault] = []
        self.prompts = _prompts(axes, faults)
        self.seeds = _seeds(axes, faults)
        others = _others(axes, faults)
        combinations = prod(len(values) for _, values in others)
        if combinations > MAX_COMBINATIONS:
            allowed = f"allowed are {MAX_COMBINATIONS} combinations of all but prompts and seeds"
            faults.append(Fault("matrix", combinations, allowed))
        if faults:
            raise Invalid(faults)
        self._reader = Reader(models, {})
        self.templates = _templates(others, self._reader, models)
        if any(template.spec.prompt_weights for template in self.templates) and (
            wrong := list(
                islice(
                    (Fault("matrix.prompt", *f) for p in self.prompts if (f := weights.fault_of(p))), SHOWN
                )
            )
        ):
            raise Invalid(wrong)
        self.count = len(self.prompts) * len(self.templates) * len(self.seeds)
        if self.count > most:
            raise Invalid([Fault("matrix", self.count, f"allowed are {most} images")])

    def rows(self, first: int, count: int) -> list[Row]:
        """The frames from this place on, so many of them or those that are left."""
        made = []
        for place in range(first, min(first + count, self.count)):
            rest, seed = divmod(place, len(self.seeds))
            prompt, which = divmod(rest, len(self.templates))
            row = self._reader.row(
                place + 1, None, self.prompts[prompt], self.seeds[seed], self.templates[which]
            )
            assert row is not None  # prompts and seeds were looked at
            made.append(row)
        return made

    def per_template(self) -> int:
        """How many frames each template is for."""
        return len(self.prompts) * len(self.seeds)

    def shown(self, first: int, count: int) -> Iterator[tuple[Spec, int | None]]:
        """Specs and seeds from this place on; None where the seed is drawn at random."""
        for place in range(first, min(first + count, self.count)):
            rest, seed = divmod(place, len(self.seeds))
            prompt, which = divmod(rest, len(self.templates))
            yield _with_prompt(self.templates[which].spec, self.prompts[prompt]), self.seeds[seed]


def _with_prompt(spec: Spec, prompt: str) -> Spec:
    from dataclasses import replace

    return replace(spec, prompt=prompt)


def expanded(prompt: str) -> list[str]:
    """What the groups of a prompt come to, in order.

    Raises ValueError if that is more than is allowed.
    """
    fixed: list[str] = []
    choices: list[list[str]] = []
    at = 0
    for group in GROUP.finditer(prompt):
        fixed.append(prompt[at : group.start()])
        at = group.end()
        values = [value.strip() for value in re.split(r"(?<!\\),", group[1])]
        repeats = int(group[2] or 1)
        if not 1 <= repeats <= MAX_REPEATS:
            raise ValueError(f"allowed are 1 to {MAX_REPEATS} repeats")
        joined = " " if group[3] else ""
        choices.append([value + joined for value in values for _ in range(repeats)])
    count = prod(map(len, choices))
    if count > MAX_PROMPTS:
        raise ValueError(f"its groups come to {count} prompts; allowed are {MAX_PROMPTS}")
    fixed.append(prompt[at:])
    length = count * sum(map(len, fixed)) + sum(count // len(c) * sum(map(len, c)) for c in choices)
    if length > MAX_TEXT:
        raise ValueError(f"its groups come to {length} characters; allowed are {MAX_TEXT}")
    return [
        _plain("".join(text for pair in zip(fixed, (*chosen, ""), strict=True) for text in pair))
        for chosen in product(*choices)
    ]


def _plain(text: str) -> str:
    return re.sub(r"\\([()*,])", r"\1", text)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _prompts(axes: Mapping[str, Any], faults: list[Fault]) -> list[str]:
    made: list[str] = []
    length = 0
    given = _listed(axes.get("prompt", []))
    if not given:
        faults.append(Fault("matrix.prompt", None, "it is required: one prompt, or a list of them"))
    if len(given) > MAX_PROMPTS:
        faults.append(Fault("matrix.prompt", len(given), f"allowed are {MAX_PROMPTS} prompts"))
        return made
    for n, prompt in enumerate(given):
        at = f"matrix.prompt[{n}]" if isinstance(axes["prompt"], list) else "matrix.prompt"
        if not isinstance(prompt, str) or not 0 < len(prompt) <= MAX_PROMPT or "\0" in prompt:
            faults.append(Fault(at, prompt, f"allowed are 1 to {MAX_PROMPT} characters, none of them NUL"))
            continue
        try:
            texts = expanded(prompt)
        except ValueError as e:
            faults.append(Fault(at, prompt, str(e)))
            continue
        if any(not text or len(text) > MAX_PROMPT for text in texts):
            faults.append(Fault(at, prompt, f"each prompt it comes to has 1 to {MAX_PROMPT} characters"))
        elif len(made) + len(texts) > MAX_PROMPTS:
            faults.append(
                Fault("matrix.prompt", len(made) + len(texts), f"allowed are {MAX_PROMPTS} prompts")
            )
            return made
        elif (length := length + sum(map(len, texts))) > MAX_TEXT:
            faults.append(Fault("matrix.prompt", length, f"allowed are {MAX_TEXT} characters of all prompts"))
            return made
        made += texts
    return made


def _seeds(axes: Mapping[str, Any], faults: list[Fault]) -> list[int | None]:
    """The seeds of each combination; with count so many from each seed on, or so many at random."""
    count = axes.get("count", 1)
    if type(count) is not int or not 1 <= count <= MAX_COMBINATIONS:
        faults.append(Fault("matrix.count", count, f"allowed are 1 to {MAX_COMBINATIONS}"))
        count = 1
    given = _listed(axes.get("seed"))
    if not given:
        faults.append(Fault("matrix.seed", [], "allowed are 1 items and more"))
    if len(given) * count > MAX_PROMPTS:
        faults.append(Fault("matrix.seed", len(given) * count, f"allowed are {MAX_PROMPTS} seeds"))
        return [None]
    for n, seed in enumerate(given):
        if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
            faults.append(Fault(f"matrix.seed[{n}]", seed, f"allowed are 0 to {MAX_SEED}"))
    if faults:
        return [None]
    return [None if seed is None else (seed + k) & MAX_SEED for seed in given for k in range(count)]


def _others(axes: Mapping[str, Any], faults: list[Fault]) -> list[tuple[str, Sequence[Any]]]:
    """All other axes and their values, in order."""
    found: list[tuple[str, Sequence[Any]]] = []
    for name, value in axes.items():
        if name in ("prompt", "seed", "count"):
            continue
        if len(faults) >= SHOWN:
            break
        if name != "size" and name not in Asked.model_fields:
            names = ", ".join(("size", *Asked.model_fields))
            faults.append(Fault(f"matrix.{name}", value, f"there is no such field; allowed are {names}"))
            continue
        values = _listed(value)
        if name in LISTS and not (values and all(isinstance(v, list) for v in values)):
            values = [value]
        if not values:
            faults.append(Fault(f"matrix.{name}", [], "allowed are 1 items and more"))
        if len(values) > MAX_COMBINATIONS:
            faults.append(Fault(f"matrix.{name}", len(values), f"allowed are {MAX_COMBINATIONS} items"))
        elif name == "size":
            for n, size in enumerate(values):
                if not (isinstance(size, str) and SIZE.fullmatch(size)):
                    faults.append(Fault(f"matrix.size[{n}]", size, "allowed is WIDTHxHEIGHT, as 512x768"))
        found.append((name, values))
    if "size" in axes and ("width" in axes or "height" in axes):
        faults.append(Fault("matrix.size", None, "it stands for width and height: say one or the other"))
    return found


def _templates(
    others: Sequence[tuple[str, Sequence[Any]]], reader: Reader, models: Catalog
) -> list[Template]:
    """One for each combination. Raises Invalid with what is wrong with any of them, said once."""
    made: list[Template] = []
    faults: dict[str, Fault] = {}
    for values in product(*(values for _, values in others)):
        said = dict(zip((name for name, _ in others), values, strict=True))
        if (size := SIZE.fullmatch(said.pop("size", ""))) is not None:
            said |= {"width": int(size[1]), "height": int(size[2])}
        for fault in _made(said, reader, made):
            known = Fault(f"matrix.{fault.field}", fault.value, fault.allowed)
            faults.setdefault(repr(known), known)
    if faults:
        raise Invalid(list(faults.values()))
    return made


def _made(said: Mapping[str, Any], reader: Reader, made: list[Template]) -> list[Fault]:
    """Add this combination's template, or say what is wrong with it."""
    try:
        asked = Asked.model_validate({**said, "prompt": "x"})
    except ValidationError as e:
        return faults_in(e, Asked)
    if any(True for _ in refs_of(asked)):
        return [Fault("image", None, "a matrix starts from no input images; send lines, or a job")]
    if asked.style is not None or asked.prompt_enhancement:
        return [Fault("style", asked.style, "a matrix takes prompts as they are; write the style into them")]
    found = reader.resolved(0, asked, None)
    if not isinstance(found, Row):
        return found
    template = reader.template(asked)
    assert template is not None
    made.append(template)
    return []
