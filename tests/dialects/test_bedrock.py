"""Bedrock's InvokeModel through boto3, unmodified: signed, or with a bearer token."""

import base64
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import httpx
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, ReadTimeoutError
from PIL import Image

from farm.api.dialects import keys
from farm.api.dialects.keys import Signed, WrongSignature
from tests.dialects.conftest import RED, RunningFarm, pixels

pytestmark = pytest.mark.xdist_group("dialects")

PROMPT = {"text_prompts": [{"text": RED, "weight": 1}]}
FAST = {"steps": 4, "cfg_scale": 4}
Client = Any


def parts_of(key: str) -> tuple[str, str]:
    """An API key as AWS's two: its id, and its secret."""
    _, key_id, rest = key.split("_", 2)
    return key_id, rest[:-6]


def bedrock(farm: RunningFarm, key: str, secret: str, **config: Any) -> Client:
    return boto3.client(
        "bedrock-runtime",
        endpoint_url=farm.url,
        region_name="eu-central-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=Config(retries={"max_attempts": 1}, **config),
    )


@pytest.fixture(scope="module")
def client(farm: RunningFarm) -> Client:
    return bedrock(farm, *parts_of(farm.api_key))


def invoke(client: Client, model: str = "starter", **body: Any) -> dict[str, Any]:
    answer = client.invoke_model(modelId=model, body=json.dumps({**PROMPT, **FAST, **body}))
    return dict(json.loads(answer["body"].read()))


def image_of(answer: dict[str, Any], place: int = 0) -> bytes:
    return base64.b64decode(answer["artifacts"][place]["base64"])


def png(*, colour: str = "white", half: str | None = None, alpha: bool = False) -> bytes:
    image = Image.new("RGBA" if alpha else "RGB", (64, 64), colour)
    if half:
        image.paste(half if not alpha else (0, 0, 0, 0), (0, 0, 32, 64))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ------------------------------------------------------------------------------------------------ images


def test_a_signed_call_gives_the_native_apis_image(farm: RunningFarm, client: Client) -> None:
    answer = invoke(client, seed=11)

    assert answer["result"] == "success"
    assert answer["artifacts"][0]["seed"] == 11
    assert answer["artifacts"][0]["finishReason"] == "SUCCESS"
    assert image_of(answer) == farm.native(RED, seed=11, steps=4, guidance=4.0)[0]


def test_what_is_left_open_is_what_their_api_takes(farm: RunningFarm, client: Client) -> None:
    answer = client.invoke_model(modelId="starter", body=json.dumps({**PROMPT, "seed": 5}))

    made = json.loads(answer["body"].read())
    assert image_of(made) == farm.native(RED, seed=5, steps=30, guidance=7.0)[0]


def test_a_seed_that_was_drawn_can_be_sent_again(client: Client) -> None:
    drawn = invoke(client, seed=0, samples=2)

    seeds = [a["seed"] for a in drawn["artifacts"]]
    assert 0 < seeds[0] < seeds[1] <= 4_294_967_295
    assert image_of(invoke(client, seed=seeds[0], samples=2)) == image_of(drawn)


def test_weights_become_prompt_and_negative_prompt(farm: RunningFarm, client: Client) -> None:
    prompts = [
        {"text": "a red circle", "weight": 1.5},
        {"text": "a blue background (dark)", "weight": 0.5},
        {"text": "blurry", "weight": -1},
    ]
    uneven = invoke(client, text_prompts=prompts, seed=3)
    even = invoke(
        client, text_prompts=[{"text": "a red circle"}, {"text": "stripes", "weight": -0.5}], seed=3
    )

    native = farm.native(
        r"(a red circle)1.5, (a blue background \(dark\))0.5",
        negative_prompt="blurry",
        prompt_weights=True,
        seed=3,
        steps=4,
        guidance=4.0,
    )
    assert image_of(uneven) == native[0]
    plain = farm.native("a red circle", negative_prompt="stripes", seed=3, steps=4, guidance=4.0)
    assert image_of(even) == plain[0]


def test_an_image_to_start_from_and_how_much_of_it_stays(farm: RunningFarm, client: Client) -> None:
    start = farm.native(RED, seed=1, steps=4)[0]
    answer = invoke(client, init_image=text(start), image_strength=0.25, seed=2)
    scheduled = invoke(
        client, init_image=text(start), init_image_mode="STEP_SCHEDULE", step_schedule_start=0.75, seed=2
    )

    url = f"data:image/png;base64,{text(start)}"
    native = farm.native(RED, image=url, strength=0.75, seed=2, steps=4, guidance=4.0)
    assert image_of(answer) == image_of(scheduled) == native[0]


@pytest.mark.parametrize(
    ("source", "mask"),
    [
        ("MASK_IMAGE_WHITE", png(colour="black", half="white")),
        ("MASK_IMAGE_BLACK", png(colour="white", half="black")),
        ("INIT_IMAGE_ALPHA", None),
    ],
)
def test_a_mask_says_what_is_painted_anew(
    farm: RunningFarm, client: Client, source: str, mask: bytes | None
) -> None:
    start = png(colour="red", half="red", alpha=mask is None)
    more = {} if mask is None else {"mask_image": text(mask)}
    answer = invoke(client, init_image=text(start), mask_source=source, seed=7, **more)

    native = farm.native(
        RED,
        image=f"data:image/png;base64,{text(start)}",
        mask=f"data:image/png;base64,{text(png(colour='black', half='white'))}",
        seed=7,
        steps=4,
        guidance=4.0,
    )
    assert pixels(image_of(answer)) == pixels(native[0])


def test_samples_style_sampler_and_the_raw_image(farm: RunningFarm, client: Client) -> None:
    answer = invoke(client, samples=2, style_preset="pixel-art", sampler="K_EULER", seed=9)
    raw = client.invoke_model(
        modelId="starter", accept="image/png", body=json.dumps({**PROMPT, **FAST, "seed": 11})
    )

    native = farm.native(RED, count=2, style="pixel-art", sampler="euler", seed=9, steps=4, guidance=4.0)
    assert [image_of(answer, k) for k in (0, 1)] == native
    assert raw["body"].read() == farm.native(RED, seed=11, steps=4, guidance=4.0)[0]


def test_a_repeat_of_an_invocation_finds_its_job(farm: RunningFarm) -> None:
    body = json.dumps({**PROMPT, **FAST}).encode()
    headers = {"Authorization": f"Bearer {farm.api_key}", "amz-sdk-invocation-id": "4711-0815"}
    before = len(farm.jobs())

    first, second = (
        httpx.post(f"{farm.url}/model/starter/invoke", content=body, headers=headers, timeout=60)
        for _ in range(2)
    )

    assert first.json() == second.json()
    assert len(farm.jobs()) == before + 1


# ------------------------------------------------------------------------------------------------ who it is


def test_the_whole_key_and_its_public_id_serve_as_well(farm: RunningFarm) -> None:
    key_id, _ = parts_of(farm.api_key)

    assert invoke(bedrock(farm, f"key_{key_id}", farm.api_key), seed=11)["result"] == "success"


def test_a_models_id_is_signed_as_it_is_encoded_twice(farm: RunningFarm, client: Client) -> None:
    with pytest.raises(client.exceptions.ResourceNotFoundException):
        invoke(client, model="arn:aws:bedrock:us-east-1::foundation-model/some/thing+else")


@pytest.mark.parametrize("wrong", ["secret", "id"])
def test_a_wrong_secret_or_id_is_refused(farm: RunningFarm, wrong: str) -> None:
    key_id, secret = parts_of(farm.api_key)
    key_id, secret = (key_id, secret[::-1]) if wrong == "secret" else ("0" * 32, secret)

    with pytest.raises(ClientError) as refused:
        invoke(bedrock(farm, key_id, secret))

    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert refused.value.response["Error"]["Code"] == "InvalidSignatureException"


def test_an_unsigned_call_is_refused_before_its_body_is_read(farm: RunningFarm) -> None:
    answer = httpx.post(f"{farm.url}/model/starter/invoke", content=b"{}")

    assert (answer.status_code, answer.headers["x-amzn-errortype"]) == (403, "UnrecognizedClientException")
    assert answer.json().keys() == {"message"}


Change = Callable[[AWSRequest], None]


def signed(change: Change = lambda request: None, *, service: str = "bedrock") -> tuple[str, Signed]:
    """A request as botocore signs it, changed before or after: its Authorization header, and what came."""
    request = AWSRequest("POST", "http://farm/model/a%3A0/invoke", data=b"{}", headers={"Host": "farm"})
    SigV4Auth(Credentials("0" * 32, "secret"), service, "eu-central-1").add_auth(request)
    change(request)
    headers = [(k, str(v)) for k, v in request.headers.items()]
    came = Signed("POST", b"/model/a%3A0/invoke", "", headers, bytes(request.data))
    return str(request.headers["Authorization"]), came


def check(header: str, came: Signed, *, text: str, later: timedelta = timedelta(0)) -> str:
    signature = keys.signature_in(header)
    return keys.check(signature, [text], came, service="bedrock", now=datetime.now(UTC) + later)


OWN = "farm_" + "0" * 32 + "_secret123456"  # whose secret part is `secret`


def test_a_signature_is_good_for_its_moment_and_its_request_alone() -> None:
    assert check(*signed(), text=OWN) == OWN

    def body(request: AWSRequest) -> None:
        request.data = b"[]"

    def hidden(request: AWSRequest) -> None:
        request.headers["X-Amz-Security-Token"] = "unsigned"

    for wrong in (body, hidden):
        with pytest.raises(WrongSignature):
            check(*signed(wrong), text=OWN)
    with pytest.raises(WrongSignature, match="within 5 minutes"):
        check(*signed(), text=OWN, later=timedelta(minutes=6))
    with pytest.raises(WrongSignature, match="service s3"):
        check(*signed(service="s3"), text=OWN)
    with pytest.raises(WrongSignature, match="does not match"):
        check(*signed(), text=OWN.replace("secret", "others"))


@pytest.mark.parametrize(
    "header",
    ["AWS4-HMAC-SHA256", "AWS4-HMAC-SHA256 Credential=a/b", "AWS4-ECDSA Credential=a/20260101/r/s/aws4_request",
     "AWS4-HMAC-SHA256 Credential=a/20260101/r/s/aws4_request, SignedHeaders=host, Signature=zz"],
)  # fmt: skip
def test_what_is_no_signature_is_refused(header: str) -> None:
    with pytest.raises(WrongSignature):
        keys.signature_in(header)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"width": 1024, "height": 1024}, "width: allowed are multiples of 8 from 64 to 128"),
        ({"cfg_scale": 35}, "cfg_scale: allowed are 0.0 to 30.0"),
        ({"sampler": "K_LMS"}, "sampler: starter has DDIM"),
        ({"seed": -1}, "seed: allowed are 0 to 4294967295"),
        ({"init_image": "no base64!"}, "init_image: it must be an image in base64"),
        ({"init_image": "aGVsbG8="}, "init_image: it is no image"),
        ({"mask_source": "MASK_IMAGE_WHITE"}, "mask_source: it needs init_image"),
        ({"text_prompts": [{"text": "x", "weight": -1}]}, "weight above 0"),
        ({"text_prompts": [{"text": "x" * 2001}]}, r"text: allowed are 1 to 2000 characters"),
        ({"prompt": "x"}, "prompt: there is no such field"),
        ({"image_strength": 0.5, "step_schedule_start": 0.5}, "say the same"),
    ],
)
def test_what_is_not_allowed_is_a_validation_exception(
    client: Client, body: dict[str, Any], said: str
) -> None:
    with pytest.raises(client.exceptions.ValidationException, match=said):
        invoke(client, **body)


def test_a_models_arn_names_it_too(client: Client) -> None:
    made = invoke(client, model="arn:aws:bedrock:us-east-1::foundation-model/starter", seed=11)

    assert image_of(made) == image_of(invoke(client, seed=11))


def test_streaming_is_refused_by_name(client: Client) -> None:
    with pytest.raises(client.exceptions.ValidationException, match="starter does not stream"):
        client.invoke_model_with_response_stream(modelId="starter", body="{}")


def test_an_unknown_model_is_a_resource_not_found(client: Client) -> None:
    with pytest.raises(client.exceptions.ResourceNotFoundException, match="no model 'titan'"):
        invoke(client, model="titan")


@pytest.fixture
def hasty(farm: RunningFarm) -> Client:
    """A client that gives up soon."""
    return bedrock(farm, *parts_of(farm.api_key), read_timeout=1)


def test_a_client_that_gives_up_leaves_one_job(farm: RunningFarm, hasty: Client) -> None:
    before = {j["id"] for j in farm.jobs()}

    with pytest.raises(ReadTimeoutError):  # nobody renders this model here
        hasty.invoke_model(modelId="stability.stable-diffusion-xl-v1", body=json.dumps(PROMPT))

    (made,) = [j for j in farm.jobs() if j["id"] not in before]
    assert made["status"] == "queued"
    farm.api.post(f"/v1/jobs/{made['id']}/cancel")
