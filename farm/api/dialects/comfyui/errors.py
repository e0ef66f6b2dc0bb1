"""How ComfyUI says what went wrong: one error, and for each node what is wrong with its inputs."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from farm.api.dialects.answers import answered, documented
from farm.api.dialects.served import told
from farm.errors import Refused

LONGEST = 500  # characters of what is repeated


class ComfyRefusal(BaseModel):
    """What went wrong."""

    error: dict[str, Any]
    node_errors: dict[str, Any]


def said(kind: str, message: str, details: str = "", **extra: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details[:LONGEST], "extra_info": extra}


@dataclass
class NodeErrors:
    """What is wrong with a graph's nodes, by their ids."""

    graph: Mapping[str, Any]
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, node: str, kind: str, message: str, details: str = "", **extra: Any) -> None:
        problem = said(kind, message, details, **extra)
        if problem not in self.found.setdefault(node, []):
            self.found[node].append(problem)

    def shown(self, dependants: Mapping[str, Iterable[str]]) -> dict[str, Any]:
        return {
            node: {
                "errors": problems,
                "dependent_outputs": sorted(dependants.get(node, ())),
                "class_type": str(self.graph[node].get("class_type", ""))[:LONGEST],
            }
            for node, problems in self.found.items()
        }


class BadGraph(Refused):
    """The graph cannot be rendered here."""

    def __init__(self, error: Mapping[str, Any], node_errors: Mapping[str, Any] | None = None) -> None:
        self.error, self.node_errors = error, node_errors or {}
        super().__init__(str(error["message"]))


def errors(request: Request, error: Exception) -> Response:
    if isinstance(error, BadGraph):
        return answered({"error": error.error, "node_errors": error.node_errors}, 400)
    facts = told(request, error)
    kind = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", facts.kind.__name__).lower()
    headers = dict(facts.headers)
    if facts.status == 401:
        headers["www-authenticate"] = 'Basic realm="farm: the API key is the password"'
    return answered({"error": said(kind, facts.detail), "node_errors": {}}, facts.status, headers=headers)


ERRORS = documented(ComfyRefusal)
