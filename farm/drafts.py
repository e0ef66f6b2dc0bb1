"""Drafts: what is asked for, as the frames and the keys it would become."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from farm import pricing, quotes
from farm.catalog import Catalog, Model
from farm.errors import Fault, Invalid
from farm.features import Given
from farm.settings import settings
from farm.spec import (
    NOTHING_GIVEN,
    Asked,
    Spec,
    call_key,
    fingerprint,
    quantity,
    random_seed,
    resolve,
    seeds,
    shape_key,
    work,
)


class Drafted(NamedTuple):
    """A frame to be: its spec, that as JSON, its seed and whether that was asked for, and its key's number."""

    spec: Spec
    as_json: str
    seed: int
    seeded: bool
    key_no: int
    model: Model

    def fingerprint(self) -> bytes:
        return fingerprint(self.spec, self.model, self.seed)


@dataclass(slots=True)
class Draft:
    """What a submission becomes: frames, and the distinct keys they carry by number.

    A key is a call key, and whether its frames stand behind the proof: those have keys of their own.
    """

    frames: list[Drafted] = field(default_factory=list)
    keys: dict[tuple[str, bool], tuple[int, Spec, Model]] = field(default_factory=dict)
    proof: int | None = None

    def add(self, spec: Spec, model: Model, first_seed: int | None, count: int) -> None:
        as_json, key = json.dumps(spec.to_json()), call_key(spec, model)
        first = random_seed() if first_seed is None else first_seed
        all_seeds = seeds(first, count)
        ahead = count if self.proof is None else min(count, max(0, self.proof - len(self.frames)))
        for rest, part in ((False, all_seeds[:ahead]), (True, all_seeds[ahead:])):
            if part:
                key_no = self.keys.setdefault((key, rest), (len(self.keys), spec, model))[0]
                self.frames.extend(
                    Drafted(spec, as_json, seed, first_seed is not None, key_no, model) for seed in part
                )

    def rest(self) -> set[int]:
        """The numbers of keys whose frames stand behind the proof."""
        return {no for (_, rest), (no, _, _) in self.keys.items() if rest}

    def quote(self, rates: Mapping[str, pricing.Rate]) -> Decimal:
        """What all of it costs at most."""
        per_key = Counter(f.key_no for f in self.frames)
        return pricing.total(
            rates[model.name].amount(per_key[no] * quantity(spec, rates[model.name].method))
            for no, spec, model in self.keys.values()
        )

    def parts(self, rates: Mapping[str, pricing.Rate]) -> list[quotes.Part]:
        """What is asked of each model."""
        asked: dict[str, list[int]] = {}
        for spec, _, _, _, _, model in self.frames:
            sums = asked.setdefault(model.name, [0, 0, 0])
            for k, more in enumerate((1, quantity(spec, rates[model.name].method), work(spec, model))):
                sums[k] += more
        return [quotes.Part(rates[name], *sums) for name, sums in asked.items()]

    def inputs(self) -> set[str]:
        """The input images all of it needs, as sha256:…"""
        return {ref for f in self.frames if f.spec.image or f.spec.control for ref in f.spec.inputs}

    def digest(self) -> bytes:
        return quotes.digest(f.as_json for f in self.frames)

    def key_columns(self) -> dict[str, list[Any]]:
        """The distinct keys in the order of their numbers, one list a column."""
        return {
            "models": [model.name for _, _, model in self.keys.values()],
            "shape_keys": [shape_key(spec, model) for _, spec, model in self.keys.values()],
            "call_keys": [key for key, _ in self.keys],
            "rests": [rest for _, rest in self.keys],
            "pixels": [spec.largest_pixels for _, spec, _ in self.keys.values()],
        }


def draft(
    asked: Iterable[tuple[str, Asked]],
    models: Catalog,
    given: Mapping[str, Given] = NOTHING_GIVEN,
    *,
    proof: int | None = None,
) -> Draft:
    """Resolve specs, each with its path in the body. given: the input images they name. proof: frames that come first.

    Raises Invalid with the faults of every spec.
    """
    made, faults, total = Draft(proof=proof), [], 0
    for path, one in asked:
        spec = resolve(one, models, path=path, given=given)
        total += one.count
        if isinstance(spec, list):
            faults.extend(spec)
        elif total <= settings().max_count:
            made.add(spec, models[spec.model], one.seed, one.count)
        else:
            faults.append(
                Fault(f"{path}.count", one.count, f"allowed are {settings().max_count} images in all")
            )
            break
    if faults:
        raise Invalid(faults)
    return made
