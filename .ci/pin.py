"""Print every package that the project and its extras need, at the version installed here."""

import re
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement

PROJECT = "image-farm"
EXTRAS = ("", "worker", "embedded", "dev")
# What CUDA builds of torch need besides is pinned by torch itself, each to one version.


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def closure() -> dict[str, str]:
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo: list[tuple[str, str]] = [(PROJECT, extra) for extra in EXTRAS]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            about = distribution(name)
        except PackageNotFoundError:
            continue  # for another platform
        found[name] = about.version.partition("+")[0]
        for line in about.requires or []:
            wanted = Requirement(line)
            environment: dict[str, Any] = {"extra": extra}
            if wanted.marker is None or wanted.marker.evaluate(environment):
                todo.append((name_of(wanted.name), ""))
                todo.extend((name_of(wanted.name), e) for e in wanted.extras)
    del found[PROJECT]
    return found


print("# The versions this was tested with; `make constraints` writes them.")
for name, version in sorted(closure().items()):
    print(f"{name}=={version}")
