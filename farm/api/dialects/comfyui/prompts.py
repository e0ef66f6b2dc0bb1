"""Prompts: queue a graph, see one's own queue and history, stop one's own."""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from farm import inputs, jobs, outcomes, tickets
from farm.accounts import Caller
from farm.api.auth import Reader, Submitter
from farm.api.bodies import Body, described, read
from farm.api.dialects import asking
from farm.api.dialects.answers import Responses, answered
from farm.api.dialects.browsers import OwnPages
from farm.api.dialects.comfyui import history
from farm.api.dialects.comfyui.errors import ERRORS, BadGraph, NodeErrors, errors, said
from farm.api.dialects.comfyui.graph import Plan, Walk
from farm.api.dialects.comfyui.nodes import every
from farm.api.dialects.served import submitted, translated
from farm.catalog import catalog
from farm.db import transaction
from farm.errors import Conflict, Fault, Gone, Invalid, NotFound, TooLarge
from farm.features import Given, refs_of
from farm.spec import resolve
from farm.submissions import Submission
from farm.tables import Ticket
from farm.tickets import Dialect

MOST_HISTORY = 1000
MAX_GRAPH = 1 << 20  # bytes: it is kept with the job
PREFIX = re.compile(r"[^/\\\0:*?\"<>|\x00-\x1f]{1,100}")
ID = re.compile(r"[\x21-\x7e]{1,200}")
Object = Annotated[dict[str, Any], Field()]

router = APIRouter(tags=["dialects"], route_class=translated(errors), dependencies=[OwnPages])


class ComfyPrompt(BaseModel):
    """A graph in the API's format, to be queued."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Any = Field(None, description="nodes by their id: {class_type, inputs}")
    client_id: Annotated[str, Field(strict=True, max_length=200)] | None = None
    prompt_id: Annotated[str, Field(strict=True, max_length=200)] | None = None
    extra_data: Object | None = None
    front: Annotated[bool, Field(strict=True)] | None = Field(None, description="only false is taken")
    number: None = None
    partial_execution_targets: None = None


class ComfyQueued(BaseModel):
    """A prompt that was queued."""

    prompt_id: str
    number: int
    node_errors: dict[str, Any]


class ComfyQueue(BaseModel):
    """The account's own prompts that have not ended."""

    queue_running: list[list[Any]]
    queue_pending: list[list[Any]]


class ComfyDrop(BaseModel):
    """Which prompts to drop."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clear: bool = False
    delete: Annotated[list[str], Field(max_length=MOST_HISTORY)] = []


class ComfyInterrupt(BaseModel):
    """Which prompt to stop; without an id all that run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_id: str | None = None


OBJECT: Responses = {200: {"content": {"application/json": {"schema": {"type": "object"}}}}}
EMPTY: Responses = {200: {"description": "Done", "content": {}}}


# ------------------------------------------------------------------------------------------------ to queue


@router.post(
    "/prompt",
    response_class=Response,
    responses={
        200: {"model": ComfyQueued},
        **ERRORS(402, 403, 404, 409, 410, 413, 422, 429),
        400: {"description": "The graph cannot be rendered"} | ERRORS(422)[422],
    },
    openapi_extra=described(ComfyPrompt),
)
async def queue_comfy_prompt(caller: Submitter, body: Body, request: Request) -> Response:
    """Queue a graph."""
    if len(body) > MAX_GRAPH:
        raise TooLarge(f"allowed are {MAX_GRAPH} bytes", allowed_bytes=MAX_GRAPH)
    asked = await run_in_threadpool(read, ComfyPrompt, body)
    if asked.front:
        raise BadGraph(said("invalid_prompt", "front is not served: others wait too"))
    if asked.prompt_id is not None and not ID.fullmatch(asked.prompt_id):
        raise BadGraph(said("invalid_prompt", "prompt_id: allowed are 1 to 200 printable ASCII characters"))
    plan, submission = await run_in_threadpool(_planned, caller, asked)
    kept: dict[str, Any] = {
        "prompt": asked.prompt,
        "extra_data": {**(asked.extra_data or {}), "client_id": asked.client_id},
        "saves": _saves(asked.prompt, plan),
        "samplers": {w.sampler: {"steps": w.fields["steps"], "frames": w.count} for w in plan.wanted},
        "number": 0,
    }

    client = asked.client_id or ""
    if not tickets.is_text(client):
        raise BadGraph(said("invalid_prompt", "client_id: allowed are texts without NUL"))

    def keep(db: Session, job_id: UUID) -> None:
        kept["number"] = _number(job_id)
        name = asked.prompt_id or str(job_id)
        tickets.write(
            db, caller.account_id, job_id, dialect=Dialect.COMFYUI, name=name, asked=kept, client=client
        )

    key = None if asked.prompt_id is None else f"comfyui/{asked.prompt_id}"
    job_id = await submitted(request, caller, submission, body=body, key=key, also=keep)
    answer = {"prompt_id": asked.prompt_id or str(job_id), "number": _number(job_id), "node_errors": {}}
    return answered(answer)


def _number(job_id: UUID) -> int:
    """Counts up with time."""
    return job_id.int >> 80


def _planned(caller: Caller, asked: ComfyPrompt) -> tuple[Plan, Submission]:
    """What the graph asks of the farm. Raises BadGraph with an error for each node's input that is refused."""
    found: dict[str, tuple[str, Given]] = {}

    def upload(name: str) -> tuple[str, Given]:
        if name not in found:
            plain = name.removesuffix("[input]").rstrip()
            with transaction() as db:
                row = tickets.input_named(db, caller.account_id, plain)
                digest = row.sha256.hex()
                found[name] = f"sha256:{digest}", Given(digest, row.width, row.height)
        return found[name]

    walk = Walk(asked.prompt, every(), upload)
    plan = walk.plan()
    _check_prefixes(asked.prompt, plan, walk.wrong)
    walk.give_up()
    try:
        made = asking.submission(*(w.fields for w in plan.wanted), names={})
    except Invalid as e:
        _blame(walk.wrong, plan, e.faults)
        walk.give_up()
        raise
    with transaction() as db:
        refs = {ref for _, one in made.asked() for _, ref in refs_of(one)}
        try:
            given = inputs.known(db, caller.account_id, refs)
        except Gone as e:
            raise BadGraph(said("prompt_outputs_failed_validation", e.detail)) from None
    for path, one in made.asked():
        resolved = resolve(one, catalog(), path=path, given=given)
        if isinstance(resolved, list):
            _blame(walk.wrong, plan, resolved)
    walk.give_up()
    return plan, made


def _blame(wrong: NodeErrors, plan: Plan, faults: Sequence[Fault]) -> None:
    """The farm's faults, at the nodes whose inputs they come from."""
    for fault in faults:
        place = re.match(r"specs\[(\d+)\]\.?(\w*)", fault.field)
        number, name = (int(place[1]), place[2]) if place else (0, fault.field.removeprefix("spec."))
        wanted = plan.wanted[min(number, len(plan.wanted) - 1)]
        node, its_input = wanted.places.get(name.partition("[")[0], (wanted.sampler, name))
        wrong.add(
            node,
            "custom_validation_failed",
            "Custom validation failed for node",
            f"{its_input}: {fault.allowed}",
            input_name=its_input,
        )


def _check_prefixes(graph: Any, plan: Plan, wrong: NodeErrors) -> None:
    for node in plan.saves:
        prefix = _prefix(graph, node)
        parts = prefix.split("/")
        if not all(PREFIX.fullmatch(p) and p.strip(". ") for p in parts) or len(parts) > 5:
            words = "filename_prefix: allowed are letters, digits and up to 4 folders, as cats/ComfyUI"
            wrong.add(
                node, "custom_validation_failed", "Custom validation failed for node", words,
                input_name="filename_prefix",
            )  # fmt: skip


def _prefix(graph: Any, node: str) -> str:
    return str(graph[node]["inputs"].get("filename_prefix", "ComfyUI"))


def _saves(graph: Any, plan: Plan) -> dict[str, Any]:
    """For each node that saves: the first of its frames, and how many."""
    first = [sum(w.count for w in plan.wanted[:k]) for k in range(len(plan.wanted))]
    return {
        node: {
            "kind": graph[node]["class_type"],
            "prefix": _prefix(graph, node),
            "first": first[number],
            "count": plan.wanted[number].count,
        }
        for node, number in plan.saves.items()
    }


# ------------------------------------------------------------------------------------------------ the queue


@router.get("/queue", response_class=Response, responses={200: {"model": ComfyQueue}, **ERRORS()})
def show_comfy_queue(caller: Reader) -> Response:
    """The account's own prompts that run, and that wait."""
    with transaction() as db:
        running, pending = history.waiting(db, caller.account_id)
        shown = [[history.item(t, tickets.asked(t)) for t in some] for some in (running, pending)]
    return answered({"queue_running": shown[0], "queue_pending": shown[1]})


@router.post(
    "/queue",
    response_class=Response,
    responses={**EMPTY, **ERRORS(403, 413, 422)},
    openapi_extra=described(ComfyDrop),
)
def drop_comfy_prompts(caller: Submitter, body: Body) -> Response:
    """Cancel prompts of the account's own that wait: all, or by their ids. Ids of others do nothing."""
    asked = read(ComfyDrop, body)
    with transaction() as db:
        _, pending = history.waiting(db, caller.account_id)
        for ticket in pending:
            if asked.clear or ticket.name in asked.delete:
                _cancel(db, caller, ticket)
    return Response()


def _cancel(db: Session, caller: Caller, ticket: Ticket) -> None:
    with suppress(Conflict):  # it ended meanwhile
        jobs.cancel(db, caller.account_id, ticket.job_id)


@router.post(
    "/interrupt",
    response_class=Response,
    responses={**EMPTY, **ERRORS(403, 413, 422)},
    openapi_extra={
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ComfyInterrupt"}}},
        }
    },
)
def interrupt_comfy(caller: Submitter, body: Body) -> Response:
    """Stop the account's own prompts that run, or the one with the id. Nobody else's stop."""
    asked = read(ComfyInterrupt, body) if body.strip() else ComfyInterrupt()
    with transaction() as db:
        running, _ = history.waiting(db, caller.account_id)
        for ticket in running:
            if asked.prompt_id in (None, ticket.name):
                _cancel(db, caller, ticket)
    return Response()


# ------------------------------------------------------------------------------------------------ the history


@router.get("/history", response_class=Response, responses={**OBJECT, **ERRORS(422)})
def list_comfy_history(
    caller: Reader,
    max_items: Annotated[int, Query(ge=1, le=MOST_HISTORY, description="the newest")] = 100,
) -> Response:
    """The account's prompts that have ended, oldest first."""
    with transaction() as db:
        mine = tickets.ended(db, caller.account_id, Dialect.COMFYUI, limit=max_items)
        found = outcomes.of(db, caller.account_id, [t.job_id for t in mine])
        shown = {t.name: history.entry(t, found[t.job_id]) for t in reversed(mine)}
    return answered(shown)


@router.get("/history/{prompt_id}", response_class=Response, responses={**OBJECT, **ERRORS()})
def show_comfy_history(caller: Reader, prompt_id: str) -> Response:
    """A prompt that has ended; nothing for one that goes on, or that the account has not."""
    shown: dict[str, Any] = {}
    with transaction() as db, suppress(NotFound):
        ticket, outcome = history.find(db, caller.account_id, prompt_id)
        if outcome.over:
            shown[ticket.name] = history.entry(ticket, outcome)
    return answered(shown)


@router.post(
    "/history",
    response_class=Response,
    responses={**EMPTY, **ERRORS(403, 413, 422)},
    openapi_extra=described(ComfyDrop),
)
def forget_comfy_history(caller: Submitter, body: Body) -> Response:
    """Forget prompts of the account's own that have ended. Their images stay."""
    asked = read(ComfyDrop, body)
    with transaction() as db:
        if asked.clear:
            tickets.forget(db, caller.account_id, Dialect.COMFYUI)
        elif asked.delete:
            tickets.forget(db, caller.account_id, Dialect.COMFYUI, asked.delete)
    return Response()
