"""What pydantic found wrong, in the farm's words: field, value, what is allowed."""

import math
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from farm.errors import Fault
from farm.settings import settings
from farm.spec import MAX_PROMPT, MAX_SEED

LONGEST = 200  # characters of a value that is repeated
LISTED = 100  # faults of one body
COUNTED = 10_000  # more of them are not even looked at: that would take far more memory than the body
PLACES = ("body", "query", "path", "header", "cookie")  # FastAPI puts one before the field's path


def faults_in(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """The first faults of what was read as this model."""
    if (count := error.error_count()) > COUNTED:
        return [
            Fault(
                "body",
                f"{count} faults",
                f"there is no such body; allowed are {', '.join(model.model_fields)}",
            )
        ]
    return faults_of(error.errors(include_url=False)[:LISTED], model)


def faults_of(errors: Sequence[Any], model: type[BaseModel] | None = None) -> list[Fault]:
    """One fault for each of pydantic's errors. model: what the body was read as, to name its fields."""
    some = [e for e in errors if e["type"] != "none_required"]  # what may be null may be something else too
    return [_fault(e, model) for e in some or errors]


def _fault(error: Mapping[str, Any], model: type[BaseModel] | None) -> Fault:
    loc = tuple(error["loc"])
    if model is None and loc[:1] and loc[0] in PLACES:
        loc = loc[1:]
    # without a field of its own pydantic shows all there is around it
    value = None if error["type"] in ("missing", "json_invalid") or not loc else error.get("input")
    return Fault(path_of(loc), value, _allowed(error, loc, model))


def path_of(loc: Sequence[int | str]) -> str:
    """`specs[0].width`; `body` for the whole of it."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or "body"


def _allowed(error: Mapping[str, Any], loc: Sequence[int | str], model: type[BaseModel] | None) -> str:
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "missing":
            return "it is required"
        case "extra_forbidden":
            names = _fields_at(model, loc[:-1])
            return "there is no such field" + (f"; allowed are {', '.join(names)}" if names else "")
        case "json_invalid":
            return f"the body must be JSON: {context.get('error', error['msg'])}"
        case "value_error":
            return str(context.get("error", error["msg"]))
        case "literal_error" | "enum":
            return BY_TYPE[kind].format_map(context)
    return _by_field(loc) or _by_type(kind, context) or str(error["msg"])


def _by_field(loc: Sequence[int | str]) -> str | None:
    """Fields whose limits are said as a whole, whichever of them was passed."""
    return {
        "priority": "allowed are 0 to 9, or urgent, standard, bulk",
        "seed": f"allowed are 0 to {MAX_SEED}",
        "count": f"allowed are 1 to {settings().max_count}",
        "prompt": f"allowed are 1 to {MAX_PROMPT} characters, none of them NUL",
        "negative_prompt": f"allowed are up to {MAX_PROMPT} characters, none of them NUL",
        "name": "allowed are 1 to 200 characters, none of them NUL",
        "strength": "allowed are more than 0, up to 1",
        "quality": "allowed are 1 to 100",
        "factor": "allowed are more than 1, up to 4",
    }.get(str(loc[-1]) if loc else "")


BY_TYPE = {
    "string_type": "it must be text",
    "bool_type": "it must be true or false",
    "model_type": "it must be an object",
    "model_attributes_type": "it must be an object",
    "dict_type": "it must be an object",
    "list_type": "it must be a list",
    "tuple_type": "it must be a list",
    "enum": "allowed are {expected}",
    "literal_error": "allowed are {expected}",
    "greater_than_equal": "allowed are {ge} and more",
    "less_than_equal": "allowed are up to {le}",
    "string_too_short": "allowed are {min_length} characters and more",
    "string_too_long": "allowed are up to {max_length} characters",
    "too_short": "allowed are {min_length} items and more",
    "too_long": "allowed are up to {max_length} items",
    "finite_number": "it must be a finite number",
    "int": "it must be an integer",
    "float": "it must be a number",
    "datetime": "it must be a time, as 2026-01-31T00:00:00Z",
}


def _by_type(kind: str, context: Mapping[str, Any]) -> str | None:
    words = BY_TYPE.get(kind) or BY_TYPE.get(kind.partition("_")[0])
    return words.format_map(context) if words else None


def _fields_at(model: Any, loc: Sequence[int | str]) -> list[str]:
    """Names of the fields the body may have at that path."""
    for part in loc:
        if model is None:
            return []
        if isinstance(part, str):
            found = model.model_fields.get(part)
            model = _model_in(found.annotation) if found else None
    return list(model.model_fields) if model is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list, Annotated):
        return next((m for a in get_args(annotation) if (m := _model_in(a))), None)
    return None


def shortened(value: Any) -> Any:
    """The value as JSON can carry it, cut when long."""
    match value:
        case None | bool():
            shown: Any = value
        case int():
            shown = value if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"
        case float():
            shown = value if math.isfinite(value) else str(value)
        case list() | tuple():
            shown = f"a list of {len(value)}"
        case dict():
            shown = f"an object with {len(value)} fields"
        case _:
            text = str(value)
            shown = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return shown
