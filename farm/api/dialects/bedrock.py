"""`POST /model/{modelId}/invoke`, as Amazon Bedrock serves Stability's models: for boto3 and the AWS command line.

Requests are signed by Signature Version 4 or carry a bearer token: keys.py. boto3 keeps its invocation's id when it
tries again, so that makes a repeat find its job.
"""

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from farm.accounts import Role
from farm.answers import Answer
from farm.api.bodies import MAX_BODY_BYTES, described, limited, read
from farm.api.dialects import artifacts, served
from farm.api.dialects.answers import Responses, answered
from farm.api.dialects.artifacts import Artifact, Asked, files_of, from_base64
from farm.api.dialects.keys import WrongSignature, caller_of
from farm.api.dialects.served import NotRendered, UnknownModel, told, translated
from farm.api.problems import MEDIA_TYPE
from farm.errors import BudgetExceeded, Refused, Unauthorized
from farm.settings import settings

SERVICE = "bedrock"
INVOCATION = "amz-sdk-invocation-id"
INVOCATION_ID = re.compile(r"[ -~]{1,200}")
ARN = re.compile(r"^arn:aws[a-z-]*:bedrock:[a-z0-9-]*::foundation-model/")  # a model's id may follow it
# by status: what AWS answers, and how it calls that
KINDS = {
    400: (400, "ValidationException"),
    403: (403, "AccessDeniedException"),
    404: (404, "ResourceNotFoundException"),
    408: (408, "ModelTimeoutException"),
    409: (400, "ValidationException"),
    410: (400, "ValidationException"),
    413: (400, "ValidationException"),
    422: (400, "ValidationException"),
    429: (429, "ThrottlingException"),
    503: (503, "ServiceUnavailableException"),
}


def errors(request: Request, error: Exception) -> Response:
    """Any error in AWS's words."""
    facts = told(request, error)
    status, kind = KINDS.get(facts.status, (500, "InternalServerException"))
    match error:
        case WrongSignature():
            status, kind = 403, "InvalidSignatureException"
        case Unauthorized():
            status, kind = 403, "UnrecognizedClientException"
        case BudgetExceeded():
            status, kind = 400, "ServiceQuotaExceededException"
        case NotRendered():
            status, kind = 424, "ModelErrorException"
        case UnknownModel():
            status, kind = 404, "ResourceNotFoundException"
    kept = {k: v for k, v in facts.headers.items() if k != "www-authenticate"}
    headers = {**kept, "x-amzn-ErrorType": kind, "x-amzn-RequestId": facts.request}
    return answered({"message": facts.detail}, status, headers=headers)


class AwsError(Answer):
    """The error; its kind is the header x-amzn-ErrorType."""

    message: str


class Invocation(Asked):
    """The body of an invocation."""

    init_image: Annotated[str, Field(max_length=MAX_BODY_BYTES)] | None = Field(None, description="base64")
    mask_image: Annotated[str, Field(max_length=MAX_BODY_BYTES)] | None = Field(None, description="base64")


class Invoked(Answer):
    result: Literal["success"] = "success"
    artifacts: list[Artifact]


HEADER = {"x-amzn-ErrorType": {"description": "the kind of error", "schema": {"type": "string"}}}
SAID: dict[int, str] = {
    400: "a field is not allowed, or a budget does not cover it", 403: "no valid key or signature",
    404: "there is no such model", 408: "the images are not there yet; the job goes on", 424: "no image came of it",
    429: "too many requests, or a full queue", 500: "the farm is at fault",
    503: "a service the farm stands on is away",
}  # fmt: skip
ERRORS: Responses = {s: {"model": AwsError, "description": d, "headers": HEADER} for s, d in SAID.items()}
# an id with a line's end in it is no path at all, and answered as such
ERRORS[404]["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
router = APIRouter(prefix="/model", tags=["dialects"], route_class=translated(errors))


@router.post(
    "/{model_id:path}/invoke",
    response_class=Response,
    responses={200: {"model": Invoked, "content": {"image/png": BINARY}}, **ERRORS},
    openapi_extra=described(Invocation, {"text_prompts": [{"text": "a red circle"}], "seed": 7, "steps": 20})
    | {"security": [{"bearer": []}, {"sigv4": []}]},
)
async def invoke_model(request: Request, model_id: str) -> Response:
    """Make images and wait for them, as Bedrock's InvokeModel does: see docs/dialects.md."""
    if not request.headers.get("authorization"):
        raise Unauthorized("sign the request, or send an API key as 'Authorization: Bearer farm_…'")
    body = await limited(request, MAX_BODY_BYTES)
    caller = await caller_of(request, body, service=SERVICE, role=Role.SUBMIT)
    model = served.model_named(ARN.sub("", model_id))
    asked = await run_in_threadpool(read, Invocation, body)
    image = None if asked.init_image is None else from_base64(asked.init_image, field="init_image")
    mask = None if asked.mask_image is None else from_base64(asked.mask_image, field="mask_image")
    files = await files_of(caller, image, mask, asked.mask_source)
    wanted = artifacts.wanted(asked, model, files)
    is_file = artifacts.as_file(request.headers.get("accept", ""), wanted)
    said = request.headers.get(INVOCATION, "")
    key = f"aws:{said}" if INVOCATION_ID.fullmatch(said) else None
    job = await served.submitted(request, caller, wanted, body=body, key=key, names=asked.NAMES)
    made = await served.images_of_job(request, caller, job, timeout_s=settings().sync_wait_s)
    headers = {"x-amzn-RequestId": request.state.id}
    if is_file:
        first = made.done[0]
        return Response(await served.content(first), media_type=first.content_type, headers=headers)
    shown = Invoked(artifacts=await artifacts.of_job(made))
    return answered(shown.model_dump(mode="json"), headers=headers)


@router.post("/{model_id:path}/invoke-with-response-stream", include_in_schema=False)
async def stream_model(model_id: str) -> Response:
    """Not served: images come whole."""
    raise Refused(f"{model_id[:100]} does not stream: call InvokeModel")
