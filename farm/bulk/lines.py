"""Lines of a bulk upload, NDJSON or CSV: read, checked in the words of POST /v1/jobs, and resolved.

Nearly all lines of a file differ in prompt and seed alone. What the rest comes to is decided once and kept: a template
with the spec's JSON and the fingerprint's text cut where prompt and seed belong. Any other line takes the long way,
the one that POST /v1/jobs takes; both say the same.
"""

import csv
import hashlib
import json
import re
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError
from pydantic_core import from_json

from farm.catalog import Catalog, Model
from farm.errors import Fault, Invalid
from farm.faults import faults_of
from farm.features import Given, refs_of
from farm.spec import (
    MAX_PROMPT,
    MAX_SEED,
    NOTHING_GIVEN,
    RANDOM_BITS,
    Asked,
    Spec,
    Text,
    call_key,
    fingerprint,
    fingerprinted,
    resolve,
)

MAX_LINE = 1 << 20  # bytes
MAX_NAME = 255  # characters of a custom_id
KEPT = 4096  # templates
FAULTS = 20  # of a line that are told: one of 1 MiB may hold a hundred thousand
BOM = b"\xef\xbb\xbf"

# NUL is in no text that is let in: these stand nowhere else
PROMPT, SEED = "\0prompt", "\0seed"
OWN = ("custom_id", "prompt", "seed")  # what lines as a rule differ in
# fields whose part in spec and fingerprint has nothing to do with the prompt
PLAIN = frozenset(
    ("custom_id", "prompt", "seed", "negative_prompt", "model", "width", "height", "steps", "guidance", "sampler",
     "format", "quality", "clip_skip", "reproducible")
)  # fmt: skip

_encoded = json.encoder.encode_basestring_ascii
csv.field_size_limit(MAX_LINE)  # a cell may be a data URL; Python's own limit is an eighth of that


class Line(Asked):
    """A line as it is sent: the spec of one image, and what the account calls it."""

    custom_id: Annotated[Text, Field(min_length=1, max_length=MAX_NAME, description="unique in the upload")]


FIELDS = tuple(dict.fromkeys(name for name in ("custom_id", *Line.model_fields) if name != "count"))


@dataclass(slots=True)
class Template:
    """What lines come to that differ in prompt and seed alone.

    json and print: the parts of the spec's JSON and of what is hashed, around prompt and seed; empty where the line
    takes the long way.
    """

    spec: Spec
    model: Model
    call_key: str
    json: tuple[bytes, ...] = ()
    print: tuple[bytes, ...] = ()


class Row(NamedTuple):
    """A line that is a frame to be. name: None of a matrix."""

    line: int
    name: str | None
    seed: int
    seeded: bool
    template: Template
    spec_json: bytes
    print: bytes


class Unresolved(NamedTuple):
    """A line that names input images: whether they are there, or can be fetched, is not known yet."""

    line: int
    asked: Asked
    name: str


class Error(NamedTuple):
    """What is wrong with a line. name: its custom_id, as far as it has one."""

    line: int
    name: str | None
    fault: Fault


@dataclass(slots=True)
class Read:
    """What a part of a file says. used: its bytes, to the end of a line; lines: ends of line in them."""

    used: int = 0
    lines: int = 0
    rows: list[Row] = field(default_factory=list)
    unresolved: list[Unresolved] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)


class Reader:
    """Reads the lines of one upload, part by part. defaults: the spec's fields where a line leaves them out."""

    def __init__(
        self, models: Catalog, defaults: Mapping[str, Any], *, columns: Sequence[str] | None = None
    ) -> None:
        self.columns = columns
        self._models = models
        self._defaults = dict(defaults)
        self._prompt, self._seed = defaults.get("prompt"), defaults.get("seed")
        self._templates: dict[Any, Template] = {}
        self._drawn: Iterator[int] = iter(())

    # -------------------------------------------------------------------------------------------- files

    def ndjson(self, data: bytes, *, line: int, final: bool) -> Read:
        """Read whole lines of JSON. line: how many came before. final: the last one may lack its end."""
        end = len(data) if final else data.rfind(b"\n") + 1
        read = Read(used=end)
        raw = data[:end].split(b"\n")
        if raw and not raw[-1]:
            raw.pop()
        read.lines = len(raw)
        if line == 0 and raw and raw[0].startswith(BOM):
            raw[0] = raw[0][len(BOM) :]
        for no, one in enumerate(raw, line + 1):
            if len(one) < 3 and not one.strip():
                continue
            try:
                said = from_json(one, allow_inf_nan=False)
            except ValueError as e:
                read.errors.append(Error(no, None, Fault("line", None, f"it must be JSON: {e}")))
                continue
            if type(said) is not dict:
                read.errors.append(Error(no, None, Fault("line", said, "it must be an object")))
                continue
            self._add(read, no, _rest(said), said)
        return read

    def csv(self, data: bytes, *, line: int, final: bool) -> Read:
        """Read whole records of CSV; the first line names the columns. line: how many came before.

        Raises Invalid if the columns are not what they may be.
        """
        end = len(data) if final else data.rfind(b"\n") + 1
        raw = data[:end].split(b"\n")
        if raw and not raw[-1]:
            raw.pop()
        if line == 0 and raw and raw[0].startswith(BOM):
            raw[0] = raw[0][len(BOM) :]
            end_of_mark = len(BOM)
        else:
            end_of_mark = 0
        read, taken = Read(), 0

        def texts() -> Iterator[str]:
            nonlocal taken
            for one in raw:
                taken += 1
                yield one.decode("utf-8", "surrogateescape") + "\n"

        records = csv.reader(texts(), strict=True)
        done = 0
        while True:
            try:
                cells = next(records)
            except StopIteration:
                done = taken
                break
            except csv.Error as e:
                if taken == len(raw) and str(e) == "unexpected end of data" and not final:
                    break  # the rest of this record is still to come
                upto = (
                    f"; read up to line {line + taken}" if taken > done + 1 else ""
                )  # a quote without its end
                fault = Fault("line", None, f"it must be CSV: {e}{upto}")
                read.errors.append(Error(line + done + 1, None, fault))
                done = taken
                continue
            if cells:
                if self.columns is None:
                    self.columns = _columns(cells)
                else:
                    self._csv_line(read, line + done + 1, cells)
            done = taken
        read.lines = done
        read.used = end if done == len(raw) else end_of_mark + sum(map(len, raw[:done])) + done
        return read

    def _csv_line(self, read: Read, no: int, cells: list[str]) -> None:
        columns = self.columns or ()
        if len(cells) != len(columns):
            fault = Fault(
                "line", f"{len(cells)} columns", f"allowed are {len(columns)}, as in the first line"
            )
            read.errors.append(Error(no, None, fault))
            return
        rest = [cell for column, cell in zip(columns, cells, strict=True) if column not in OWN]
        said = {c: _value(c, cell) for c, cell in zip(columns, cells, strict=True) if cell}
        for column, cell in zip(columns, cells, strict=True):
            if not cell.isascii() and any("\ud800" <= c <= "\udfff" for c in cell):
                fault = Fault(column, cell.encode("utf-8", "replace").decode(), "it must be UTF-8")
                read.errors.append(Error(no, None, fault))
                return
        self._add(read, no, tuple(rest), said)

    # -------------------------------------------------------------------------------------------- lines

    def _add(self, read: Read, no: int, known: Any, said: Mapping[str, Any]) -> None:
        """known: what the line says beside name, prompt and seed, as a key; None if it has none."""
        template = self._templates.get(known) if known is not None else None
        name = said.get("custom_id")
        if (
            template is not None
            and type(name) is str
            and 0 < len(name) <= MAX_NAME
            and "\0" not in name
            and (
                row := self.row(
                    no, name, said.get("prompt", self._prompt), said.get("seed", self._seed), template
                )
            )
            is not None
        ):
            read.rows.append(row)
            return
        self._the_long_way(read, no, known, said)

    def row(self, no: int, name: str | None, prompt: Any, seed: Any, template: Template) -> Row | None:
        """The frame of a template with this prompt and seed; None if these need to be looked at."""
        if not (
            template.json and type(prompt) is str and 0 < len(prompt) <= MAX_PROMPT and "\0" not in prompt
        ):
            return None
        seeded = seed is not None
        if not seeded:
            seed = self._draw()
        elif type(seed) is not int or not 0 <= seed <= MAX_SEED:
            return None
        text = _encoded(prompt).encode()
        (a, b), (x, y, z) = template.json, template.print
        digest = hashlib.sha256(b"%b%b%b%d%b" % (x, text, y, seed, z)).digest()
        return Row(no, name, seed, seeded, template, b"%b%b%b" % (a, text, b), digest)

    def _the_long_way(self, read: Read, no: int, known: Any, said: Mapping[str, Any]) -> None:
        given_name = said.get("custom_id")
        name = given_name if isinstance(given_name, str) else None
        if "count" in said and (said["count"] != 1 or isinstance(said["count"], bool)):
            fault = Fault("count", said["count"], "a line is one image: allowed is 1")
            read.errors.append(Error(no, name, fault))
            return
        merged = {**self._defaults, **{k: v for k, v in said.items() if k != "count"}}
        try:
            asked = Line.model_validate(merged)
        except ValidationError as e:
            faults = faults_of(e.errors(include_url=False)[:FAULTS], Line)
            read.errors.extend(Error(no, name, _of_a_line(f)) for f in faults)
            return
        if any(refs_of(asked)):
            read.unresolved.append(Unresolved(no, asked, asked.custom_id))
            return
        found = self.resolved(no, asked, asked.custom_id)
        if isinstance(found, Row):
            read.rows.append(found)
            if known is not None and asked.model_fields_set <= PLAIN:
                if len(self._templates) >= KEPT:
                    self._templates.clear()
                template = self.template(asked)
                if template is not None:
                    self._templates[known] = template
        else:
            read.errors.extend(Error(no, name, f) for f in found)

    def resolved(
        self, no: int, asked: Asked, name: str | None, given: Mapping[str, Given] = NOTHING_GIVEN
    ) -> Row | list[Fault]:
        """A line that was read as the frame it asks for, or what is wrong with it."""
        spec = resolve(asked, self._models, given=given)
        if isinstance(spec, list):
            return spec
        model = self._models[spec.model]
        seeded = asked.seed is not None
        seed = asked.seed if asked.seed is not None else self._draw()
        made = Template(spec, model, call_key(spec, model))
        return Row(
            no, name, seed, seeded, made, json.dumps(spec.to_json()).encode(), fingerprint(spec, model, seed)
        )

    def template(self, asked: Asked) -> Template | None:
        """What is common to this and all that differ from it in prompt and seed alone; None if something else does."""
        spec = resolve(asked.model_copy(update={"prompt": PROMPT}), self._models)
        if isinstance(spec, list):
            return None
        model, mark = self._models[spec.model], _encoded(PROMPT)
        parts = json.dumps(spec.to_json()).split(mark)
        text = fingerprinted(spec, model, SEED)
        before, _, rest = text.partition(mark)
        between, _, after = rest.partition(_encoded(SEED))
        if len(parts) != 2 or text.count(mark) != 1 or text.count(_encoded(SEED)) != 1 or not after:
            return None
        return Template(
            spec, model, call_key(spec, model),
            (parts[0].encode(), parts[1].encode()), (before.encode(), between.encode(), after.encode()),
        )  # fmt: skip

    def _draw(self) -> int:
        """A seed at random; the system is asked for a thousand at a time."""
        for seed in self._drawn:
            return seed >> (64 - RANDOM_BITS)
        self._drawn = iter(struct.unpack("1024Q", secrets.token_bytes(8192)))
        return next(self._drawn) >> (64 - RANDOM_BITS)


def _rest(said: dict[str, Any]) -> str | None:
    """What a line says beside its own; not the values themselves: 1, 1.0 and True are equal."""
    if len(said) == 2 and "prompt" in said and "custom_id" in said:
        return ""
    try:
        return repr([item for item in said.items() if item[0] not in OWN])
    except ValueError:  # an endless integer
        return None


def _of_a_line(fault: Fault) -> Fault:
    """The whole of a line is called so, not a body."""
    if fault.field == "custom_id" and fault.value is not None:
        return Fault("custom_id", fault.value, f"allowed are 1 to {MAX_NAME} characters, none of them NUL")
    return Fault("line", fault.value, fault.allowed) if fault.field == "body" else fault


# ------------------------------------------------------------------------------------------------ values of text

WHOLE = frozenset(("width", "height", "steps", "seed", "quality", "clip_skip", "count"))
NUMBER = frozenset(("guidance", "strength"))
FLAG = frozenset(("prompt_weights", "long_prompt", "prompt_enhancement"))
JSON = frozenset(("control", "loras", "hires", "upscale"))
FLAGS = {"true": True, "false": False, "1": True, "0": False}


def _columns(cells: Sequence[str]) -> tuple[str, ...]:
    """The names in a file's first line. Raises Invalid if one is unknown, there twice, or custom_id is missing."""
    names = tuple(cell.strip() for cell in cells)
    faults = []
    for n, name in enumerate(names):
        if name not in FIELDS:
            faults.append(Fault(f"columns[{n}]", name, f"allowed are {', '.join(FIELDS)}"))
        elif name in names[:n]:
            faults.append(Fault(f"columns[{n}]", name, "it is there twice"))
    if "custom_id" not in names:
        faults.append(Fault("columns", ", ".join(names), "custom_id is required"))
    if faults:
        raise Invalid(faults)
    return names


def _value(field_name: str, text: str) -> Any:
    """What a cell says; text that is no such value stays text, for the check to name."""
    if field_name in WHOLE:
        return int(text) if re.fullmatch(r"\s*[+-]?\d{1,20}\s*", text, re.ASCII) else text
    if field_name in NUMBER:
        return float(text) if re.fullmatch(r"\s*[+-]?\d{1,20}(\.\d{0,20})?\s*", text, re.ASCII) else text
    if field_name in FLAG:
        return FLAGS.get(text.strip().lower(), text)
    if field_name in JSON:
        try:
            return from_json(text, allow_inf_nan=False)
        except ValueError:
            return text
    return text


def value_of(field_name: str, text: str) -> Any:
    """What text from a query says for a field of a spec."""
    return _value(field_name, text)
