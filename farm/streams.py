"""Reading the farm's streams: what happens, each once and in order, across connections that break."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from farm.answers import Event, Preview, Steps
from farm.errors import Away, FarmError

Happening = Event | Steps | Preview

SILENT_S = 45.0  # a stream says that it is still there every 15 s
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
AGAIN = (429, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Message:
    """One event of a stream, as it was sent."""

    kind: str
    data: str
    id: str


def messages(lines: Iterable[str]) -> Iterator[Message]:
    """The events among a stream's lines, read as the HTML standard says."""
    kind, id_ = "", ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield Message(kind or "message", "\n".join(data), id_)
            kind, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            kind = value
        elif field == "data":
            data.append(value)
        elif field == "id" and "\0" not in value:
            id_ = value


def follow(
    http: httpx.Client,
    path: str,
    *,
    after: int | None,
    params: Mapping[str, Any],
    patience_s: float,
    refused: Callable[[httpx.Response], FarmError],
) -> Iterator[Happening]:
    """Read a stream to its end, and go on after the last event where its connection broke.

    patience_s: how long the farm may not answer at all. Raises what refused makes of an answer that is none, Away.
    """
    last = after
    give_up, wait_s = time.monotonic() + patience_s, FIRST_WAIT_S
    while True:
        headers = {"Accept": "text/event-stream", **({} if last is None else {"Last-Event-ID": str(last)})}
        error: FarmError | None = None
        try:
            with http.stream(
                "GET", path, params=dict(params), headers=headers, timeout=httpx.Timeout(SILENT_S, connect=5)
            ) as answer:
                if answer.status_code == 204:
                    return
                if answer.status_code != 200:
                    answer.read()
                    error = refused(answer)
                    if answer.status_code not in AGAIN:
                        raise error
                else:
                    for message in messages(answer.iter_lines()):
                        give_up, wait_s = time.monotonic() + patience_s, FIRST_WAIT_S
                        if message.kind == "end":
                            return
                        told = _told(message)
                        if isinstance(told, Event):
                            last = told.number
                        yield told
        except httpx.TransportError as e:
            error = Away(f"the farm does not answer: {e or type(e).__name__}")
        if time.monotonic() + wait_s > give_up:
            raise error or Away("the farm's stream ended early, again and again")
        time.sleep(wait_s)
        wait_s = min(LONGEST_WAIT_S, wait_s * 2)


def _told(message: Message) -> Happening:
    data = json.loads(message.data)
    match message.kind:
        case "progress":
            return Steps.model_validate(data)
        case "preview":
            return Preview.model_validate(data)
    return Event.model_validate(data)
