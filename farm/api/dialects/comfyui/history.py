"""What became of prompts: as /history, /queue and the messages of /ws have it."""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from farm import outcomes, tickets
from farm.outcomes import Outcome
from farm.tables import Ticket
from farm.tickets import Dialect

FILE = re.compile(r".*_([0-9a-f]{32})_\.png", re.DOTALL)
MOST = 200  # prompts of a queue that are shown
KINDS = {"SaveImage": "output", "PreviewImage": "temp"}


def item(ticket: Ticket, asked: Mapping[str, Any]) -> list[Any]:
    """A prompt as the queue and the history have it: number, id, graph, extra data, what it saves."""
    return [asked["number"], ticket.name, asked["prompt"], asked["extra_data"], list(asked["saves"])]


def file_of(prefix: str, frame: UUID) -> tuple[str, str]:
    """The subfolder and name of a frame's image: the name says which frame it is."""
    folder, _, base = prefix.rpartition("/")
    return folder, f"{base or 'ComfyUI'}_{frame.hex}_.png"


def outputs_of(asked: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """What each node that saves has saved."""
    found: dict[str, Any] = {}
    for node, save in asked["saves"].items():
        images = []
        for part in outcome.parts[save["first"] : save["first"] + save["count"]]:
            if part.image is not None and save["kind"] in KINDS:
                folder, name = file_of(save["prefix"], part.frame.id)
                images.append({"filename": name, "subfolder": folder, "type": KINDS[save["kind"]]})
        if save["kind"] in KINDS:
            found[node] = {"images": images}
    return found


def ending(ticket: Ticket, asked: Mapping[str, Any], outcome: Outcome) -> tuple[str, dict[str, Any]]:
    """The message that ends a prompt."""
    at = ms(outcome.job.ended_at) if outcome.job.ended_at else ms(outcome.job.created_at)
    first = next(iter(asked["samplers"]), "")
    where: dict[str, Any] = {
        "prompt_id": ticket.name,
        "node_id": first,
        "node_type": "KSampler",
        "executed": [],
    }
    if outcome.cancelled:
        return "execution_interrupted", {**where, "timestamp": at}
    if outcome.job.done:
        return "execution_success", {"prompt_id": ticket.name, "timestamp": at}
    words = "; ".join(outcome.reasons) or "no image was made"
    return "execution_error", {
        **where,
        "exception_message": words,
        "exception_type": "RenderFailed",
        "traceback": [],
        "current_inputs": {},
        "current_outputs": [],
        "timestamp": at,
    }


def entry(ticket: Ticket, outcome: Outcome) -> dict[str, Any]:
    """A prompt that has ended."""
    asked = tickets.asked(ticket)
    kind, words = ending(ticket, asked, outcome)
    began = ms(outcome.started_at or outcome.job.created_at)
    start = {"prompt_id": ticket.name, "timestamp": began}
    outputs = outputs_of(asked, outcome)
    return {
        "prompt": item(ticket, asked),
        "outputs": outputs,
        "status": {
            "status_str": "success" if kind == "execution_success" else "error",
            "completed": kind == "execution_success",
            "messages": [
                ["execution_start", start],
                ["execution_cached", {**start, "nodes": []}],
                [kind, words],
            ],
        },
        "meta": {
            node: {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node}
            for node in outputs
        },
    }


def ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def find(db: Session, account_id: UUID, name: str) -> tuple[Ticket, Outcome]:
    """Raises NotFound."""
    ticket = tickets.find(db, account_id, Dialect.COMFYUI, name)
    return ticket, outcomes.find(db, account_id, ticket.job_id)


def waiting(db: Session, account_id: UUID) -> tuple[list[Ticket], list[Ticket]]:
    """The account's prompts that run, and that wait: the oldest."""
    mine = tickets.still_open(db, account_id, Dialect.COMFYUI, limit=MOST)
    found = outcomes.of(db, account_id, [t.job_id for t in mine])
    running: list[Ticket] = []
    pending: list[Ticket] = []
    for ticket in mine:
        outcome = found[ticket.job_id]
        has_begun = outcome.started_at is not None or outcome.job.done
        (running if has_begun else pending).append(ticket)
    return running, pending
