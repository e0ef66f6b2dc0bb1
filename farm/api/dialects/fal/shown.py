"""Requests as fal's clients read them."""

import base64
from datetime import UTC
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from farm import links as file_links
from farm import outcomes, tickets
from farm.api.dialects.served import LINK_S
from farm.api.progress import Progress
from farm.outcomes import Outcome
from farm.settings import settings
from farm.spec import CONTENT_TYPE, Format
from farm.storage import open_store
from farm.tables import Image, Job, Ticket

if TYPE_CHECKING:
    from farm.webhooks import Happening

MANY = 1000  # of a queue's position: it is not counted further


class FalQueued(BaseModel):
    """A request that was taken, or where it is."""

    status: str
    request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int | None = None
    logs: list[dict[str, str]] | None = None
    metrics: dict[str, float] | None = None
    error: str | None = None
    error_type: str | None = None


class FalImage(BaseModel):
    """An image."""

    url: str
    content_type: str
    width: int
    height: int
    file_name: str
    file_size: int


class FalOutput(BaseModel):
    """What was made."""

    images: list[FalImage]
    timings: dict[str, float]
    seed: int
    has_nsfw_concepts: list[bool]
    prompt: str


class FalCancelled(BaseModel):
    """What became of the wish to cancel."""

    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


def urls_of(farm_url: str, ticket: Ticket) -> dict[str, str]:
    """Where the client asks for it again: the app without what follows its second part, as fal has it."""
    owner, _, app = str(tickets.asked(ticket)["app"]).partition("/")
    url = f"{farm_url}/{owner}/{app.partition('/')[0]}/requests/{ticket.name}"
    return {
        "request_id": ticket.name,
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
    }


def trouble_of(outcome: Outcome, ticket: Ticket) -> tuple[int, str, str] | None:
    """The status code, type and words of why there are no images; None while that is open, or if there are."""
    if outcome.over and outcome.job.done and not outcome.cancelled:
        return None if outcome.images else (410, "gone", "The images were deleted")
    if ticket.timed_out or outcome.late:
        return 504, "request_timeout", "Request timed out"
    if outcome.cancelled:
        return 499, "client_cancelled", "Request was cancelled"
    if outcome.over:
        return 422, "generation_error", "; ".join(outcome.reasons) or "No image was made"
    return None


def status_of(
    db: Session, outcome: Outcome, ticket: Ticket, farm_url: str, *, progress: Progress, logs: bool
) -> dict[str, Any]:
    """Where a request is."""
    said: dict[str, Any] = urls_of(farm_url, ticket)
    if not outcome.over and outcome.started_at is None and not outcome.job.done:
        return {"status": "IN_QUEUE", **said, "queue_position": _position(db, outcome)}
    said["logs"] = _logs(outcome, progress) if logs else None
    if not outcome.over:
        return {"status": "IN_PROGRESS", **said}
    said["metrics"] = {"inference_time": _inference_s(outcome)}
    if (trouble := trouble_of(outcome, ticket)) is not None:
        said |= {"error": trouble[2], "error_type": trouble[1]}
    return {"status": "COMPLETED", **said}


def _position(db: Session, outcome: Outcome) -> int:
    """How many of the account's own open jobs come before it."""
    before = (
        select(Job.id)
        .where(Job.ended_at.is_(None), Job.id < outcome.job.id)
        .where(Job.account_id == outcome.parts[0].frame.account_id, Job.runnable)
        .limit(MANY)
    )
    return int(db.scalar(select(func.count()).select_from(before.subquery())) or 0)


def _inference_s(outcome: Outcome) -> float:
    ended, started = outcome.job.ended_at, outcome.started_at
    return 0.0 if ended is None or started is None else round(max(0.0, (ended - started).total_seconds()), 3)


def _logs(outcome: Outcome, progress: Progress) -> list[dict[str, str]]:
    lines = []
    at = (outcome.started_at or outcome.job.created_at).astimezone(UTC).isoformat()
    for part in outcome.parts:
        done = part.status == "done"
        share = 1.0 if done else progress.of(part.frame.job_id, part.frame.index, part.frame.pack_id)
        words = f"image {part.frame.index + 1} of {outcome.job.frames}: {round(share * 100)}%"
        if part.frame.reason:
            words = f"image {part.frame.index + 1} of {outcome.job.frames}: {part.frame.reason}"
        lines.append({"message": words, "level": "INFO", "source": "USER", "timestamp": at})
    return lines


def output_of(outcome: Outcome, ticket: Ticket, farm_url: str) -> dict[str, Any]:
    """What was made; images as data URLs where that was asked for."""
    whole = bool(tickets.asked(ticket)["sync_mode"])
    first = outcome.parts[0].frame
    images = [(p.frame, p.image) for p in outcome.parts if p.image is not None]
    return {
        "images": [
            {
                "url": _data_url(i) if whole else file_links.url(farm_url, i.key, within_s=LINK_S),
                "content_type": CONTENT_TYPE[Format(i.format)],
                "width": i.width,
                "height": i.height,
                "file_name": f"{ticket.name}-{f.index}.{i.format}",
                "file_size": i.bytes,
            }
            for f, i in images
        ],
        "timings": {"inference": _inference_s(outcome)},
        "seed": first.seed,
        "has_nsfw_concepts": [False] * len(images),
        "prompt": first.spec["prompt"],
    }


def _data_url(image: Image) -> str:
    data = open_store(settings().storage_url.get_secret_value()).get(image.key)
    return f"data:{CONTENT_TYPE[Format(image.format)]};base64,{base64.b64encode(data).decode()}"


def payload(db: Session, happening: "Happening") -> dict[str, Any] | None:
    """What fal_webhook is sent at the end of a request."""
    if happening.job_id is None:
        return None
    ticket = tickets.of_job(db, happening.account_id, happening.job_id)
    if ticket is None:
        return None
    outcome = outcomes.find(db, happening.account_id, happening.job_id)
    said = {"request_id": ticket.name, "gateway_request_id": ticket.name}
    trouble = trouble_of(outcome, ticket)
    if trouble is None:
        return {**said, "status": "OK", "payload": output_of(outcome, ticket, happening.base)}
    detail = [{"loc": ["body"], "msg": trouble[2], "type": trouble[1]}]
    return {**said, "status": "ERROR", "error": trouble[2], "payload": {"detail": detail}}
