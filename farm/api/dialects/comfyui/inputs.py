"""What stands in a node's inputs: read, and checked as ComfyUI checks it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from farm.api.dialects.comfyui.errors import BadGraph, NodeErrors, said
from farm.api.dialects.comfyui.nodes import Node

MAX_NODES = 500
MAX_DEEP = 60


class Inputs:
    """The inputs of one graph's nodes. value: what comes out of a node's slot, so many links before what is saved."""

    def __init__(
        self, graph: Mapping[str, Any], nodes: Mapping[str, Node], value: Callable[[str, int, int], Any]
    ) -> None:
        self._graph = graph
        self._nodes = nodes
        self._value = value
        self.wrong = NodeErrors(graph)
        self._seen: dict[tuple[str, int], Any] = {}
        self._needs: dict[str, set[str]] = {}
        self._output = ""

    def begin(self, output: str) -> None:
        """Read what this node saves from now on: what is wrong then is in its way."""
        self._output, self._seen = output, {}

    def give_up(self) -> None:
        """Raises BadGraph if anything is wrong."""
        if self.wrong.found:
            words = "; ".join(
                f"{problem['message']}: {problem['details']}" if problem["details"] else problem["message"]
                for problems in self.wrong.found.values()
                for problem in problems
            )
            error = said("prompt_outputs_failed_validation", "Prompt outputs failed validation", words)
            raise BadGraph(error, self.wrong.shown(self._needs))

    def refuse(self, node: str, name: str, words: str) -> None:
        self.wrong.add(
            node,
            "custom_validation_failed",
            "Custom validation failed for node",
            f"{name}: {words}",
            input_name=name,
        )

    def read(self, node: str, name: str, deep: int) -> Any:
        """The value of a node's input, whatever it is linked to; None if that is wrong, and said so."""
        self._needs.setdefault(node, set()).add(self._output)
        kind, *rest = self._nodes[self._graph[node]["class_type"]].takes[name]
        limits: Mapping[str, Any] = rest[0] if rest else {}
        inputs = self._graph[node].get("inputs")
        if not isinstance(inputs, dict) or name not in inputs:
            self.wrong.add(node, "required_input_missing", "Required input is missing", name, input_name=name)
            return None
        value = inputs[name]
        if isinstance(value, list):
            return self._linked(node, name, kind, value, deep)
        if isinstance(kind, str) and kind not in ("INT", "FLOAT", "STRING"):
            self.wrong.add(
                node,
                "bad_linked_input",
                "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                name,
            )
            return None
        return self._plain(node, name, kind, value, limits)

    def _plain(self, node: str, name: str, kind: Any, value: Any, limits: Mapping[str, Any]) -> Any:
        if (
            isinstance(kind, list) or kind == "STRING"
        ):  # what may be chosen is looked at where the model is known
            if isinstance(value, str):
                return value
            return self._typed(node, name, kind if kind == "STRING" else "COMBO", value)
        number = _number(value, whole=kind == "INT")
        if number is None:
            return self._typed(node, name, kind, value)
        for end, kind_of, words, too in (
            ("min", "value_smaller_than_min", "smaller than min", number < limits["min"]),
            ("max", "value_bigger_than_max", "bigger than max", number > limits["max"]),
        ):
            if too:
                problem = f"Value {short(value)} {words} of {limits[end]}"
                self.wrong.add(node, kind_of, problem, name, input_name=name)
                return None
        return number

    def _typed(self, node: str, name: str, kind: str, value: Any) -> None:
        self.wrong.add(
            node,
            "invalid_input_type",
            f"Failed to convert an input value to a {kind} value",
            f"{name}, {short(value)}",
            input_name=name,
        )

    def _linked(self, node: str, name: str, kind: Any, link: list[Any], deep: int) -> Any:
        source, slot = (link[0], link[1]) if len(link) == 2 else (None, None)
        source = str(source) if isinstance(source, str | int) and not isinstance(source, bool) else None
        if source not in self._graph or not isinstance(slot, int) or isinstance(slot, bool):
            self.wrong.add(
                node,
                "bad_linked_input",
                "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                name,
            )
            return None
        assert source is not None
        gives = self._nodes[self._graph[source]["class_type"]].gives
        if not 0 <= slot < len(gives) or gives[slot] != kind:
            got = gives[slot] if 0 <= slot < len(gives) else "nothing"
            wanted = kind if isinstance(kind, str) else "COMBO"
            self.wrong.add(
                node,
                "return_type_mismatch",
                "Return type mismatch between linked nodes",
                f"{name}, received_type({got}) mismatch input_type({wanted})",
                input_name=name,
            )
            return None
        if deep > MAX_DEEP:
            self.refuse(node, name, "the graph runs in a circle, or is too deep")
            return None
        if (source, slot) not in self._seen:
            self._seen[source, slot] = self._value(source, slot, deep + 1)
        return self._seen[source, slot]


def checked(graph: Any, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """The graph, each of whose nodes is one of ours. Raises BadGraph."""
    if not isinstance(graph, dict) or not graph:
        raise BadGraph(said("no_prompt", "No prompt provided", "No prompt provided"))
    if len(graph) > MAX_NODES:
        raise BadGraph(said("invalid_prompt", f"A graph may have {MAX_NODES} nodes"))
    wrong: dict[str, Any] = {}
    first: dict[str, Any] | None = None
    for name, node in graph.items():
        kind = node.get("class_type") if isinstance(node, dict) else None
        if isinstance(kind, str) and kind in nodes:
            continue
        message = "Cannot execute because a node is missing the class_type property."
        problem = "invalid_prompt"
        if kind is not None:
            message = f"Cannot execute because node {short(kind)} does not exist."
            problem = "missing_node_type"
        details = f"Node ID '#{short(name)}'; this server has {', '.join(nodes)}"
        first = first or said(problem, message, details)
        wrong[str(name)] = {
            "errors": [said(problem, message, details)],
            "dependent_outputs": [],
            "class_type": short(kind or ""),
        }
    if first is not None:
        raise BadGraph(first, wrong)
    return graph


def _number(value: Any, *, whole: bool) -> int | float | None:
    """A number, or text that is one: ComfyUI takes both."""
    try:
        number = value if not isinstance(value, str) else (int(value) if whole else float(value))
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            return None
        return int(number) if whole else float(number)
    except (ValueError, OverflowError):
        return None


def short(value: Any) -> str:
    text = str(value) if not isinstance(value, int) or value.bit_length() < 200 else "a huge number"
    return text if len(text) <= 100 else text[:99] + "…"
