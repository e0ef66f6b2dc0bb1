"""`/v1/batches`, as OpenAI has them: a file of requests for images, made while nothing more urgent is to be done."""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farm import batches, files, ids, tokens
from farm.accounts import Caller
from farm.answers import Answer
from farm.api import enhancer
from farm.api.auth import Reader, Submitter, count_submission
from farm.api.bodies import Body, described, read
from farm.api.dialects import batch_output
from farm.api.dialects.images import Generation, error_body, wanted
from farm.api.dialects.openai import documented, errors
from farm.api.dialects.served import UnknownModel, as_called, translated
from farm.api.idempotency import Once
from farm.api.inputs import given
from farm.batches import MAX_LINES, BatchView, Line, Status
from farm.catalog import catalog
from farm.db import transaction
from farm.errors import Fault, Gone, Invalid, NotFound
from farm.faults import faults_in
from farm.features import STORED, Given
from farm.spec import resolve
from farm.submissions import Submission
from farm.tables import File

router = APIRouter(prefix="/v1/batches", tags=["dialects"], route_class=translated(errors))

ENDPOINT = "/v1/images/generations"
WINDOW = re.compile(r"([1-9]\d{0,2})h")
MAX_HOURS = 168
MAX_FAULTS = 100
MAX_SENT = 256  # images inside a file, or by URL; more are sent to /v1/inputs first
AT_ONCE = 4


class NewBatch(BaseModel):
    """A file of requests, and how long they may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_file_id: Annotated[str, Field(max_length=64)]
    endpoint: Annotated[str, Field(max_length=127)] = Field(description=f"allowed is {ENDPOINT}")
    completion_window: Annotated[str, Field(max_length=8)] = Field(
        description="1h to 168h: what is not done by then fails", examples=["24h"]
    )
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
                        Field(max_length=16)] | None = None  # fmt: skip


class Counts(Answer):
    total: int
    completed: int
    failed: int


class BatchShown(Answer):
    """A batch in OpenAI's shape."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: str = Field(
        description="failed, in_progress, completed, expired, cancelling or cancelled; OpenAI's others are passed"
        " through at once"
    )
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    metadata: dict[str, str] | None


class BatchesShown(Answer):
    object: Literal["list"] = "list"
    data: list[BatchShown]
    first_id: str | None
    last_id: str | None
    has_more: bool


BatchId = Annotated[str, Path(max_length=64, examples=["batch_0192f0c1a2b37c4d8e5f6a7b8c000000"])]


@router.post(
    "",
    response_model=BatchShown,
    responses=documented(404, 409, 413),
    openapi_extra=described(
        NewBatch,
        {
            "input_file_id": "file-0192f0c1a2b37c4d8e5f6a7b8c000000",
            "endpoint": ENDPOINT,
            "completion_window": "24h",
        },
    ),
)
async def create_batch(caller: Submitter, body: Body, request: Request, repeat: Once) -> BatchShown:
    """Make images of the requests in a file, in the class bulk. Lines that are not allowed end in its error file."""
    asked = await run_in_threadpool(read, NewBatch, body)
    hours = _hours(asked)
    count_submission(request)
    file, data = await run_in_threadpool(_file, caller, asked.input_file_id)
    found = await run_in_threadpool(_lines, data)
    if isinstance(found[0], Fault):
        faults = [_fault(f) for f in found if isinstance(f, Fault)]
        return await run_in_threadpool(_refuse, caller, file, asked, faults, repeat)
    requests = [f for f in found if isinstance(f, tuple)]
    lines = await _translated(caller, requests)
    return await run_in_threadpool(_start, caller, file, asked, lines, hours=hours, repeat=repeat)


def _hours(asked: NewBatch) -> int:
    faults = []
    if asked.endpoint != ENDPOINT:
        faults.append(Fault("endpoint", asked.endpoint, f"allowed is {ENDPOINT}"))
    match = WINDOW.fullmatch(asked.completion_window)
    if match is None or int(match[1]) > MAX_HOURS:
        faults.append(Fault("completion_window", asked.completion_window, f"allowed are 1h to {MAX_HOURS}h"))
    for name, value in (asked.metadata or {}).items():
        if "\0" in name + value:
            faults.append(Fault("metadata", name, "allowed is text without NUL characters"))
    if faults or match is None:
        raise Invalid(faults)
    return int(match[1])


def _file(caller: Caller, shown: str) -> tuple[File, bytes]:
    with transaction() as db:
        file = files.find(db, caller.account_id, files.parse(shown))
    if file.purpose != "batch":
        raise Invalid([Fault("input_file_id", shown, "its purpose must be batch")])
    return file, files.content(file)


def _start(
    caller: Caller, file: File, asked: NewBatch, lines: list[Line], *, hours: int, repeat: Once
) -> BatchShown:
    models: list[str] = []

    def work(db: Any) -> BatchShown:
        made, found = batches.start(
            db, caller, file, lines, endpoint=asked.endpoint, window=asked.completion_window, hours=hours,
            labels=asked.metadata,
        )  # fmt: skip
        models.extend(found)
        return _shown(batches.find(db, caller.account_id, made))

    answer = repeat(BatchShown, work)
    tokens.wake(models)
    return answer


def _refuse(
    caller: Caller, file: File, asked: NewBatch, faults: list[dict[str, Any]], repeat: Once
) -> BatchShown:
    def work(db: Any) -> BatchShown:
        made = batches.refuse(
            db, caller, file, faults, endpoint=asked.endpoint, window=asked.completion_window,
            labels=asked.metadata,
        )  # fmt: skip
        return _shown(batches.find(db, caller.account_id, made))

    return repeat(BatchShown, work)


# ------------------------------------------------------------------------------------------------ the file

Read = tuple[
    int, str, Generation | Line
]  # a line's number, its custom_id, and its body or what is wrong with that


def _lines(data: bytes) -> Sequence[Read | Fault]:
    """The requests of a file; or faults alone, if it is none of requests."""
    faults: list[Fault] = []
    found: list[Read] = []
    seen: set[str] = set()
    for no, text in enumerate(data.split(b"\n"), 1):
        if not text.strip():
            continue
        one = _line(no, text, seen)
        if isinstance(one, Fault):
            faults.append(one)
        else:
            found.append(one)
        if len(found) > MAX_LINES or len(faults) == MAX_FAULTS:
            break
    if len(found) > MAX_LINES:
        faults.append(Fault("line", MAX_LINES + 1, f"allowed are {MAX_LINES} lines"))
    if not found and not faults:
        faults.append(Fault("line", 1, "the file is empty"))
    return faults or found


def _line(no: int, text: bytes, seen: set[str]) -> Read | Fault:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if (fault := _fault_around(no, said, seen)) is not None:
        return fault
    name = said["custom_id"]
    seen.add(name)
    try:
        asked = Generation.model_validate(said.get("body"))
    except ValidationError as e:
        return no, name, _wrong(no, name, Invalid(faults_in(e, Generation)))
    if asked.stream:
        return no, name, _wrong(no, name, Invalid([Fault("stream", True, "a batch does not stream")]))
    return no, name, asked


def _fault_around(no: int, said: Any, seen: set[str]) -> Fault | None:
    """What is wrong with a line beside its body."""
    if not isinstance(said, dict):
        return Fault(f"line {no}", None, "it must be a JSON object")
    name = said.get("custom_id")
    if more := said.keys() - {"custom_id", "method", "url", "body"}:
        fault = Fault(f"line {no}: {min(more)[:60]}", None, "allowed are custom_id, method, url and body")
    elif not isinstance(name, str) or not 1 <= len(name) <= 512 or not name.isprintable():
        fault = Fault(f"line {no}: custom_id", None, "it must be text of 1 to 512 printable characters")
    elif name in seen:
        fault = Fault(f"line {no}: custom_id", name, "it came on an earlier line")
    elif said.get("method") != "POST":
        fault = Fault(f"line {no}: method", None, "allowed is POST")
    elif said.get("url") != ENDPOINT:
        fault = Fault(f"line {no}: url", None, f"allowed is {ENDPOINT}")
    else:
        return None
    return fault


def _fault(fault: Fault) -> dict[str, Any]:
    line = re.match(r"line (\d+)", fault.field)
    return {
        "code": "invalid_request",
        "line": int(line[1]) if line else None,
        "message": f"{fault.field}: {fault.allowed}".encode("utf-8", "replace").decode().replace("\0", ""),
        "param": None,
    }


def _wrong(no: int, name: str, error: Invalid | NotFound | Gone) -> Line:
    """A line that was refused, with what its own request would have been answered."""
    status, code, param = 400, None, None
    if isinstance(error, Invalid):
        faults = error.faults[:3]
        param = faults[0].field if faults else None
        message = "; ".join(f"{f.field}: {f.allowed}" for f in faults)
    else:
        status, message = 404, error.detail or error.title
        code = "model_not_found" if isinstance(error, UnknownModel) else None
    message = message.encode("utf-8", "replace").decode().replace("\0", "")
    body = error_body(status, message, param=param and param.encode("utf-8", "replace").decode(), code=code)
    return Line(no, name, None, error={"status_code": status, "body": body})


async def _translated(caller: Caller, requests: Sequence[Read]) -> list[Line]:
    """The lines as specs, with their images taken in and their prompts helped."""
    sent = [
        r
        for r in requests
        if isinstance(r[2], Generation) and r[2].image and not STORED.fullmatch(r[2].image)
    ]
    if len(sent) > MAX_SENT:
        allowed = (
            f"allowed are {MAX_SENT} images inside a file or by URL: send the others to /v1/inputs first"
        )
        raise Invalid([Fault("input_file_id", f"{len(sent)} images", allowed)])
    room = asyncio.Semaphore(AT_ONCE)
    known: dict[str, Given | Invalid | NotFound | Gone] = {}

    async def take(ref: str) -> None:
        async with room:
            try:
                known[ref] = await given(caller, ref, field="image")
            except (Invalid, NotFound, Gone) as e:
                known[ref] = e

    refs = {r[2].image for r in requests if isinstance(r[2], Generation) and r[2].image}
    await asyncio.gather(*(take(ref) for ref in refs))
    lines = await run_in_threadpool(_resolved, requests, known)
    return await _helped(lines)


def _resolved(requests: Sequence[Read], known: Mapping[str, Given | Invalid | NotFound | Gone]) -> list[Line]:
    return [
        asked if isinstance(asked, Line) else _spec(no, name, asked, known) for no, name, asked in requests
    ]


def _spec(
    no: int, name: str, asked: Generation, known: Mapping[str, Given | Invalid | NotFound | Gone]
) -> Line:
    image = known[asked.image] if asked.image else None
    if isinstance(image, Invalid | NotFound | Gone):
        return _wrong(no, name, image)
    try:
        spec = wanted(asked, image=image).submission.spec
        assert spec
        found = resolve(spec, catalog(), given={} if image is None else {f"sha256:{image.sha256}": image})
        if isinstance(found, list):
            raise Invalid(as_called(found, asked.names))
    except (Invalid, NotFound) as e:
        return _wrong(no, name, e)
    return Line(no, name, spec, format="b64_json" if asked.as_base64 else "url")


async def _helped(lines: list[Line]) -> list[Line]:
    """With prompts helped by the text model, where the farm has one."""
    specs = [line.asked for line in lines if line.asked is not None]
    if not any(spec.prompt_enhancement for spec in specs):
        return lines
    made = await enhancer.helped(Submission.model_construct(specs=specs))
    helped = iter(made.specs or ())
    return [line if line.asked is None else replace(line, asked=next(helped)) for line in lines]


# ------------------------------------------------------------------------------------------------ to look at


@router.get("", response_model=BatchesShown, responses=documented())
def list_batches(
    caller: Reader,
    *,
    after: Annotated[str | None, Query(max_length=64, description="a batch's id: those older")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchesShown:
    """The account's batches, newest first."""
    try:
        cursor = None if after is None else ids.parse("batch", after)
    except NotFound:
        raise Invalid([Fault("after", after, "it must be a batch's id, as in last_id")]) from None
    with transaction() as db:
        views = batches.every(db, caller.account_id, after=cursor, limit=limit + 1)
    data = [_shown(v) for v in views[:limit]]
    return BatchesShown(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(views) > limit,
    )


@router.get("/{batch}", response_model=BatchShown, responses=documented(404))
def show_batch(caller: Reader, batch: BatchId) -> BatchShown:
    """A batch, and how far it is."""
    with transaction() as db:
        return _shown(batches.find(db, caller.account_id, ids.parse("batch", batch)))


@router.post("/{batch}/cancel", response_model=BatchShown, responses=documented(404, 409))
def cancel_batch(caller: Submitter, batch: BatchId) -> BatchShown:
    """Stop what is not done by now; it is neither delivered nor billed."""
    found = ids.parse("batch", batch)
    with transaction() as db:
        batches.cancel(db, caller.account_id, found)
        return _shown(batches.find(db, caller.account_id, found))


def _shown(view: BatchView) -> BatchShown:
    row, created = view.batch, int(view.batch.created_at.timestamp())
    ended = None if view.ended_at is None else int(view.ended_at.timestamp())
    cancelled = None if row.cancelled_at is None else int(row.cancelled_at.timestamp())
    has_failed = view.status is Status.FAILED
    return BatchShown(
        id=batches.public(row.id),
        endpoint=row.endpoint,
        errors={"object": "list", "data": row.faults} if has_failed else None,
        input_file_id=files.public(row.input_file_id),
        completion_window=row.completion_window,
        status=view.status,
        output_file_id=batch_output.output_file(view),
        error_file_id=batch_output.error_file(view),
        created_at=created,
        in_progress_at=None if has_failed else created,
        expires_at=None if has_failed else int(row.expires_at.timestamp()),
        finalizing_at=ended if view.status is Status.COMPLETED else None,
        completed_at=ended if view.status is Status.COMPLETED else None,
        failed_at=created if has_failed else None,
        expired_at=ended if view.status is Status.EXPIRED else None,
        cancelling_at=cancelled,
        cancelled_at=ended if view.status is Status.CANCELLED else None,
        request_counts=Counts(total=row.lines, completed=view.completed, failed=view.failed),
        metadata=row.labels,
    )
