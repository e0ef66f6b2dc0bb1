"""`python -m workers.pull MODEL …`: download pinned checkpoints of the catalog, safetensors only.

Into FARM_MODELS_DIR if it is set, else into the hub's cache. Workers themselves never download.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from farm.catalog import Model, catalog
from farm.errors import Away, FarmError, Misconfigured
from farm.folders import INDEX, needed
from farm.settings import settings


@dataclass(frozen=True)
class Source:
    """One repository of a model: the checkpoint, a later stage, or a component from elsewhere."""

    name: str  # of its folder in FARM_MODELS_DIR
    repo: str
    revision: str
    whole: bool = True  # a pipeline with an index, not one component


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.pull", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    options = parser.parse_args(arguments)
    try:
        for name in options.models:
            model = _model(name)
            for place in pull(model):
                sys.stdout.write(f"{name}: {place}\n")
            if not sources(model):
                sys.stdout.write(f"{name}: nothing to download, it lies in {model.source}\n")
    except FarmError as e:
        sys.stderr.write(f"workers.pull: {e}\n")
        return 1
    return 0


def _model(name: str) -> Model:
    if name not in catalog():
        raise Misconfigured(f"no model {name!r} in the catalog; there are {', '.join(catalog())}", model=name)
    return catalog()[name]


def pull(model: Model) -> list[Path]:
    """Download all that a model is made of; what is there already is not fetched again. Returns the folders.

    Raises Misconfigured if there is nothing by that name and revision, or its weights are pickled; Away if the
    hub does not answer.
    """
    return [_pull(model, source) for source in sources(model)]


def sources(model: Model) -> list[Source]:
    """The repositories of a model; none for one that lies in a folder."""
    found = [(model.name, model.source, model.revision, True)]
    found += [(f"{model.name}-stage-{n}", s.source, s.revision, True) for n, s in enumerate(model.stages, 2)]
    found += [(f"{model.name}-{part}", *weights.pinned, False) for part, weights in model.parts.items()]
    return [
        Source(name, source.removeprefix("hub:"), revision, whole)
        for name, source, revision, whole in found
        if source.startswith("hub:")
    ]


def _pull(model: Model, source: Source) -> Path:
    into = settings().models_dir
    target = into / source.name if into else None
    repo, revision = source.repo, source.revision
    try:
        files = HfApi().list_repo_files(repo, revision=revision)
        if source.whole:
            index = json.loads(Path(hf_hub_download(repo, INDEX, revision=revision)).read_text())
            files = needed(index, files, model=model.name)
        else:
            files = [f for f in files if f.endswith((".safetensors", "config.json")) and "/" not in f]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, local_dir=target))
    except GatedRepoError as e:
        raise Misconfigured(
            f"{source.repo} wants its licence accepted: do so on the hub and set HF_TOKEN", model=model.name
        ) from e
    except (RepositoryNotFoundError, RevisionNotFoundError) as e:
        raise Misconfigured(
            f"the hub has no {source.repo} at revision {source.revision}", model=model.name
        ) from e
    except (HfHubHTTPError, OSError) as e:
        raise Away(f"{source.repo} could not be downloaded: {e}") from e


if __name__ == "__main__":
    sys.exit(main())
