"""Keys as the clients of other APIs send them: here AWS Signature Version 4.

The access key id is the API key's id, `key_…` or its 32 hex digits, and the secret access key its secret: the 43
characters after the id in `farm_{id}_{secret}…`. The whole key serves as the secret too.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated
from urllib.parse import parse_qsl, quote
from uuid import UUID

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from farm import accounts
from farm.accounts import Caller, Role
from farm.api.auth import address_of, admitted, key_in
from farm.db import transaction
from farm.errors import Unauthorized

ALGORITHM = "AWS4-HMAC-SHA256"
SKEW = timedelta(minutes=5)
ID = re.compile(r"(?:key_)?([0-9a-f]{32})")
UNSIGNED = "UNSIGNED-PAYLOAD"
MUST_SIGN = {"host"}


class WrongSignature(Unauthorized):
    """The request's signature is not the one its key makes."""


class Signature(BaseModel):
    """What an AWS4-HMAC-SHA256 Authorization header says."""

    access_key: Annotated[str, Field(max_length=64)]
    date: Annotated[str, Field(pattern=r"^\d{8}$")]
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    service: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    headers: tuple[str, ...]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class Signed:
    """A request as it was signed: in the words of the canonical request."""

    method: str
    path: bytes  # as it stands in the request line, encoded once
    query: str
    headers: Iterable[tuple[str, str]]
    body: bytes


def signature_in(header: str) -> Signature:
    """Raises WrongSignature for a header that cannot be read."""
    scheme, _, rest = header.strip().partition(" ")
    parts = dict(part.strip().partition("=")[::2] for part in rest.split(","))
    scope = parts.get("Credential", "").rsplit("/", 4)
    if scheme != ALGORITHM or len(scope) != 5 or scope[4] != "aws4_request":
        raise WrongSignature("the Authorization header holds no AWS4-HMAC-SHA256 signature")
    try:
        return Signature(
            access_key=scope[0],
            date=scope[1],
            region=scope[2],
            service=scope[3],
            headers=tuple(parts.get("SignedHeaders", "").split(";")),
            digest=parts.get("Signature", ""),
        )
    except ValueError:
        raise WrongSignature("the Authorization header is not as AWS Signature Version 4 has it") from None


def check(signature: Signature, texts: Iterable[str], signed: Signed, *, service: str, now: datetime) -> str:
    """Which of these API keys made the signature.

    Raises WrongSignature unless one did, for this service and just now.
    """
    found = _lines(signed.headers)
    named = [name for name in signature.headers if name in found]
    missing = (MUST_SIGN | {n for n in found if n.startswith("x-amz-")}) - set(signature.headers)
    if missing or len(named) < len(signature.headers) or list(signature.headers) != sorted(named):
        raise WrongSignature("host and every x-amz- header have to be signed, and sorted by name")
    if signature.service != service:
        raise WrongSignature(f"the signature is for service {signature.service}, not {service}")
    moment = _moment(found)
    if moment.strftime("%Y%m%d") != signature.date or abs(now - moment) > SKEW:
        raise WrongSignature(f"the signature's time is not within {SKEW.seconds // 60} minutes of now")
    claimed = found.get("x-amz-content-sha256", "")
    digest = hashlib.sha256(signed.body).hexdigest()
    if claimed not in ("", UNSIGNED, digest):
        raise WrongSignature("x-amz-content-sha256 is not the body's")
    request = "\n".join(
        (
            signed.method,
            quote(signed.path.decode("latin-1"), safe="/-_.~"),  # encoded twice, as all but S3 have it
            _query(signed.query),
            *(f"{name}:{found[name]}" for name in signature.headers),
            "",
            ";".join(signature.headers),
            claimed or digest,
        )
    )
    to_sign = "\n".join(
        (
            ALGORITHM,
            found["x-amz-date"],
            f"{signature.date}/{signature.region}/{service}/aws4_request",
            hashlib.sha256(request.encode()).hexdigest(),
        )
    )
    for text in texts:
        made = [_digest(secret, signature, to_sign) for secret in secrets_of(text)]
        if any(hmac.compare_digest(digest, signature.digest) for digest in made):
            return text
    raise WrongSignature("the signature does not match")


def _lines(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in headers:
        plain = " ".join(value.split())
        found[name.lower()] = f"{found[name.lower()]},{plain}" if name.lower() in found else plain
    return found


def _moment(headers: dict[str, str]) -> datetime:
    try:
        return datetime.strptime(headers.get("x-amz-date", ""), "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise WrongSignature("x-amz-date is missing or not a time as 20260131T120000Z") from None


def _query(query: str) -> str:
    pairs = [(quote(k, safe="-_.~"), quote(v, safe="-_.~")) for k, v in parse_qsl(query, True)]
    return "&".join(f"{k}={v}" for k, v in sorted(pairs))


def _digest(secret: str, signature: Signature, to_sign: str) -> str:
    key = f"AWS4{secret}".encode()
    for part in (signature.date, signature.region, signature.service, "aws4_request"):
        key = hmac.digest(key, part.encode(), hashlib.sha256)
    return hmac.digest(key, to_sign.encode(), hashlib.sha256).hex()


def texts_of(access_key: str) -> list[str]:
    """The texts of the API key with this id that open just now; of an unknown one a text that opens nothing.

    Who sent the id alone learns nothing: they only check a signature.
    """
    match = ID.fullmatch(access_key)
    key_id = UUID(hex=match[1]) if match else UUID(int=0)
    with transaction() as db:
        found = accounts.valid(db, key_id)
    return [accounts.text_of(key_id, version) for version in (found[1] if found else (0,))]


def secrets_of(text: str) -> tuple[str, str]:
    """What may be the secret access key of an API key: its secret part, and the whole of it."""
    return text.split("_", 2)[2][:-6], text


async def caller_of(request: Request, body: bytes, *, service: str, role: Role) -> Caller:
    """Who a request comes from that was signed, or carries a key as Bearer, Key or Basic.

    Raises Unauthorized, WrongSignature among it, RateLimited and Forbidden.
    """
    header = request.headers.get("authorization", "")
    if not header.startswith("AWS4-"):
        return await admitted(request, key_in(header), role=role)
    async with request.app.state.door.counting(address_of(request)):
        right = await _signer(request, header, body, service)
    return await admitted(request, right, role=role)


async def _signer(request: Request, header: str, body: bytes, service: str) -> str:
    signature = signature_in(header)
    texts = await run_in_threadpool(texts_of, signature.access_key)
    signed = Signed(
        method=request.method,
        path=request.scope.get("raw_path") or request.url.path.encode(),
        query=request.url.query,
        headers=[(k.decode("latin-1"), v.decode("latin-1")) for k, v in request.scope["headers"]],
        body=body,
    )
    return check(signature, texts, signed, service=service, now=datetime.now(UTC))
