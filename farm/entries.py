"""New entries of an operator's catalog file: made from a checkpoint's index, checked before they are written."""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from farm.catalog import BUILTIN, Model, families, read
from farm.errors import Away, Conflict, Misconfigured, NotFound
from farm.folders import INDEX, components, needed, refuse_pickles

HUB = "https://huggingface.co"
PATIENCE_S = 20.0
SAMPLERS = {  # diffusers' classes as the catalog calls them
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "HeunDiscreteScheduler": "heun",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
    "FlowMatchHeunDiscreteScheduler": "flow-heun",
}
LIKE = ("side", "steps", "guidance", "sampler", "pack", "dtype", "price", "sizes")  # what an entry takes over
CONFIG = "config.json"  # of a component
OTHER: Mapping[str, Any] = {  # for pipelines that no built-in model has
    "dtype": "bfloat16",
    "side": {"min": 256, "max": 2048, "multiple": 32, "default": 1024},
    "steps": {"min": 1, "max": 100, "default": 28},
    "guidance": {"min": 0.0, "max": 30.0, "default": 4.0},
    "pack": {"frames": 4, "pixels": 4 << 20},
    "price": {"method": "mpx_step", "rate": "0.0004", "currency": "USD"},
}


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline's checkpoint, seen by its index and the names of its files."""

    source: str  # dir:PATH or hub:OWNER/NAME
    revision: str
    index: Mapping[str, Any]
    files: Sequence[str]

    @property
    def pipeline(self) -> str:
        return str(self.index["_class_name"])


def look(source: str) -> Checkpoint:
    """Look at a checkpoint: a folder, or hub:OWNER/NAME@REVISION, whose revision becomes a commit.

    Raises NotFound if there is none, Misconfigured if it is no pipeline, or its weights are pickled; Away if the hub
    does not answer.
    """
    found = _on_hub(source.removeprefix("hub:")) if source.startswith("hub:") else _in_folder(source)
    if not components(found.index) or "_class_name" not in found.index:
        raise Misconfigured(f"the {INDEX} of {source} names no pipeline", source=source)
    needed(found.index, found.files, model=source)
    return found


def _in_folder(source: str) -> Checkpoint:
    folder = Path(source.removeprefix("dir:")).expanduser().resolve()
    if not (folder / INDEX).is_file():
        raise NotFound(f"no {INDEX} in {folder}")
    files = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    return Checkpoint(f"dir:{folder}", "local", json.loads((folder / INDEX).read_text()), files)


def look_at_part(source: str) -> str:
    """Look at a component that replaces a checkpoint's own; returns its source as a catalog names it.

    Raises NotFound if there is none, Misconfigured if its weights are pickled; Away if the hub does not answer.
    """
    if source.startswith("hub:"):
        found = _on_hub(source.removeprefix("hub:"), index=CONFIG)
        refuse_pickles([f for f in found.files if "/" not in f], model=source)
        return f"{found.source}@{found.revision}"
    folder = Path(source.removeprefix("dir:")).expanduser().resolve()
    if not (folder / CONFIG).is_file():
        raise NotFound(f"no {CONFIG} in {folder}")
    refuse_pickles([p.name for p in folder.iterdir()], model=source)
    return f"dir:{folder}"


def _on_hub(name: str, index: str = INDEX) -> Checkpoint:
    repo, _, revision = name.partition("@")
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"} if os.environ.get("HF_TOKEN") else {}
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    try:
        with httpx.Client(
            base_url=endpoint, headers=headers, timeout=PATIENCE_S, follow_redirects=True
        ) as hub:
            facts = _asked(hub, f"/api/models/{repo}/revision/{revision or 'main'}", name, index).json()
            commit = facts["sha"]
            told = _asked(hub, f"/{repo}/resolve/{commit}/{index}", name, index).json()
    except httpx.HTTPError as e:
        raise Away(f"{endpoint} does not answer: {e}") from e
    except (ValueError, KeyError) as e:
        raise Misconfigured(f"{name}: what {endpoint} answers is no checkpoint: {e}") from e
    return Checkpoint(f"hub:{repo}", commit, told, [f["rfilename"] for f in facts.get("siblings", [])])


def _asked(hub: httpx.Client, path: str, name: str, index: str) -> httpx.Response:
    answer = hub.get(path)
    if answer.status_code in (401, 403):
        raise Misconfigured(f"{name} wants its licence accepted: do so on the hub and set HF_TOKEN")
    if answer.status_code == 404:
        raise NotFound(f"the hub has no {name}, or it has no {index}")
    answer.raise_for_status()
    return answer


def entry(
    checkpoint: Checkpoint,
    *,
    like: str | None = None,
    family: str | None = None,
    parts: Mapping[str, str] | None = None,
    **said: Any,
) -> dict[str, Any]:
    """Make a catalog entry of a checkpoint. What is not said is as its family says, or like another model of it.

    parts: components from elsewhere, by the names of those that they replace.

    Raises NotFound if there is no model to be like, no such family, or no component of such a name.
    """
    models = read(BUILTIN)
    if like is not None and like not in models:
        raise NotFound(f"no model {like!r} to be like; there are {', '.join(models)}")
    alike = (
        models[like]
        if like
        else next((m for m in models.values() if m.pipeline == checkpoint.pipeline), None)
    )
    made: dict[str, Any] = {"source": checkpoint.source, "revision": checkpoint.revision}
    of_family = _family(family or (alike.family if alike else None))
    if alike is not None:
        facts = alike.model_dump(mode="json")
        made |= {"family": family or alike.family}
        made |= {name: facts[name] for name in LIKE if family is None or name not in of_family}
        if of_family.get("pipeline") != checkpoint.pipeline:
            made["pipeline"] = checkpoint.pipeline
    else:
        own = checkpoint.index.get("scheduler", ["", ""])[1]
        sampler = SAMPLERS.get(own, "dpm++2m")
        made |= {
            "family": family or "other",
            "pipeline": checkpoint.pipeline,
            **OTHER,
            "samplers": [sampler],
            "sampler": sampler,
        }
    if parts:
        if unknown := sorted(set(parts) - set(components(checkpoint.index))):
            raise NotFound(
                f"part: {checkpoint.source} has no component {unknown[0]!r}; it has "
                + ", ".join(components(checkpoint.index))
            )
        made["parts"] = {name: {"source": look_at_part(source)} for name, source in parts.items()}
    return made | {name: value for name, value in said.items() if value is not None}


def _family(name: str | None) -> Mapping[str, Any]:
    if name is None:
        return {}
    if name not in families():
        raise NotFound(f"family: no {name!r} is built in; there are {', '.join(families())}")
    return families()[name]


def add(catalog: Path, name: str, made: Mapping[str, Any]) -> Model:
    """Write an entry at the end of a catalog file, which is made if there is none.

    Raises Conflict if the name is taken, Misconfigured saying what is wrong with the entry; the file is
    as it was then.
    """
    try:
        text = (
            catalog.read_text()
            if catalog.exists()
            else "# The models this farm serves; see docs/models.md.\n"
        )
        taken = tomllib.loads(text).get("models", {})
    except (OSError, ValueError) as e:
        raise Misconfigured(f"catalog {catalog}: {type(e).__name__}: {e}", setting="FARM_CATALOG") from e
    if name in taken:
        raise Conflict(f"{catalog} has a model {name!r} already")
    lines = [f"{key} = {_toml(value)}" for key, value in made.items() if value not in (None, [], {})]
    longer = "\n".join([text.rstrip(), "", f"[models.{_toml(name)}]", *lines, ""])
    added = read(catalog, longer)[name]
    _replace(catalog, longer)
    return added


def _replace(catalog: Path, text: str) -> None:
    """Write it beside and move it into place: a farm that starts meanwhile reads the one or the other."""
    draft = catalog.with_name(f".{catalog.name}.new")
    try:
        draft.write_text(text)
        os.replace(draft, catalog)
    except OSError as e:
        raise Misconfigured(f"catalog {catalog}: {type(e).__name__}: {e}", setting="FARM_CATALOG") from e
    finally:
        draft.unlink(missing_ok=True)


def _toml(value: Any) -> str:
    """A value as TOML; JSON's strings, numbers and booleans are also TOML's."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
