"""Predictions as Replicate's clients read them."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from farm import links as file_links
from farm import outcomes, tickets
from farm.api.dialects.served import LINK_S
from farm.api.progress import Progress
from farm.outcomes import Outcome
from farm.tables import Ticket

if TYPE_CHECKING:
    from farm.webhooks import Happening


def shown(outcome: Outcome, ticket: Ticket, farm_url: str, progress: Progress | None) -> dict[str, Any]:
    """A prediction as it is."""
    asked = tickets.asked(ticket)
    status = status_of(outcome)
    ended = outcome.job.ended_at
    url = f"{farm_url}/v1/predictions/{ticket.name}"
    output = [file_links.url(farm_url, i.key, within_s=LINK_S) for i in outcome.images]
    metrics: dict[str, Any] = {}
    if ended is not None:
        metrics["total_time"] = round((ended - outcome.job.created_at).total_seconds(), 3)
        metrics["image_count"] = len(output)
        if outcome.started_at is not None:
            metrics["predict_time"] = round(max(0.0, (ended - outcome.started_at).total_seconds()), 3)
    return {
        "id": ticket.name,
        "model": asked["model"],
        "version": asked["version"],
        "input": asked["input"],
        "output": output or None,
        "logs": logs_of(outcome, progress),
        "error": "; ".join(outcome.reasons) or "no image was made" if status == "failed" else None,
        "status": status,
        "source": "api",
        "data_removed": bool(outcome.over and outcome.job.done and not output),
        "metrics": metrics,
        "created_at": _moment(outcome.job.created_at),
        "started_at": _moment(outcome.started_at),
        "completed_at": _moment(ended),
        "urls": {"get": url, "cancel": f"{url}/cancel"},
    }


def status_of(outcome: Outcome) -> str:
    """A job of which an image is there has succeeded: what was made was paid for."""
    if outcome.cancelled or outcome.late:
        return "canceled"
    if outcome.over:
        return "succeeded" if outcome.job.done else "failed"
    return "starting" if outcome.started_at is None else "processing"


def logs_of(outcome: Outcome, progress: Progress | None) -> str:
    """The seed, and a line of progress as the client reads it."""
    if not outcome.parts or (outcome.started_at is None and not outcome.over):
        return ""
    steps = sum(int(p.frame.spec["steps"]) for p in outcome.parts)
    done = 0.0
    for part in outcome.parts:
        share = float(part.status == "done")
        if not share and progress is not None:
            share = progress.of(part.frame.job_id, part.frame.index, part.frame.pack_id)
        done += share * int(part.frame.spec["steps"])
    made = int(done)
    percent = 100 * made // steps
    bar = "█" * (percent // 10)
    failed = "".join(f"{reason}\n" for reason in outcome.reasons)
    return f"Using seed: {outcome.parts[0].frame.seed}\n{percent:3d}%|{bar:<10}| {made}/{steps}\n{failed}"


def _moment(at: datetime | None) -> str | None:
    return (
        None if at is None else at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    )


class PredictionShown(BaseModel):
    """A prediction as it is."""

    model_config = ConfigDict(extra="forbid")

    id: str
    model: str
    version: str
    input: dict[str, Any]
    output: list[str] | None
    logs: str
    error: str | None
    status: Literal["starting", "processing", "succeeded", "failed", "canceled"]
    source: str
    data_removed: bool
    metrics: dict[str, float]
    created_at: str
    started_at: str | None
    completed_at: str | None
    urls: dict[str, str]


class PredictionPage(BaseModel):
    """Predictions, newest first."""

    previous: str | None
    next: str | None
    results: list[PredictionShown]


def payload(db: Session, happening: "Happening") -> dict[str, Any] | None:
    """What a prediction's webhook is sent: the prediction as it is, and at its start as it was."""
    if happening.job_id is None:
        return None
    ticket = tickets.of_job(db, happening.account_id, happening.job_id)
    if ticket is None:
        return None
    outcome = outcomes.find(db, happening.account_id, happening.job_id)
    found = shown(outcome, ticket, happening.base, None)
    if happening.kind == "job.accepted":
        nothing = dict.fromkeys(("output", "error", "started_at", "completed_at"))
        found |= {"status": "starting", "logs": "", "metrics": {}, **nothing}
    return found
