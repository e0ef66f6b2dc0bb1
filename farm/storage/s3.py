"""Images in a bucket: AWS S3, Backblaze B2, Cloudflare R2 and whatever else speaks S3.

Answers, and what is done about them:
  503 SlowDown, other 5xx, 429, a cut connection, no answer    try again, later and later, then StorageAway
  bytes lost on the way (Content-MD5, Content-Length, hash)    the same
  404 NoSuchKey                                                NotFound
  403, NoSuchBucket, 501, bad credentials, anything else       Misconfigured, at once

Nothing rests on conditional writes: a key holds its bytes' hash, and whoever writes it writes the same.
"""

import base64
import hashlib
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from farm.errors import FarmError, Misconfigured, NotFound, StorageAway
from farm.storage import (
    ALLOWED,
    LEFTOVER_AGE,
    SETTING,
    Finding,
    Stored,
    check_hash,
    check_key,
    check_prefix,
    check_same,
    is_key,
    prove,
)

if TYPE_CHECKING:
    import httpx
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, ListObjectsV2OutputTypeDef

log = logging.getLogger(__name__)

T = TypeVar("T")

MULTIPART_OVER = 16 << 20  # bytes; one request that breaks off later than that costs too much
PART_BYTES = 8 << 20  # S3 takes parts of 5 MiB and more
AT_ONCE = 512 << 10  # bytes; needs 170 KB/s

OPTIONS = ("endpoint", "region", "sse", "kms_key", "storage_class")
ENCRYPTIONS = ("AES256", "aws:kms")
# those that are read at once: an image in an archive would have to be thawed first
STORAGE_CLASSES = (
    "STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR", "REDUCED_REDUNDANCY",
)  # fmt: skip
_KMS_KEY = re.compile(r"[A-Za-z0-9:/_.-]{1,2048}")
_B2 = re.compile(r"s3\.([a-z0-9-]+)\.backblazeb2\.com")

# 4xx that pass: the request was damaged or slow on its way, or met another one
_PASSING = {
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}


class S3Store:
    """A bucket, or a prefix of one. Makes its client at first use: importing boto3 takes 0.3 s."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        sse: str | None = None,
        kms_key: str | None = None,
        storage_class: str | None = None,
        connect_timeout_s: float = 3.0,
        read_timeout_s: float = 20.0,
        give_up_after_s: float = 25.0,
        first_pause_s: float = 0.1,
        longest_pause_s: float = 5.0,
    ) -> None:
        """No attempt starts later than give_up_after_s, so a call takes at most that plus one attempt."""
        self._bucket = bucket
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._endpoint = endpoint
        self._region = region
        self._written_as: dict[str, Any] = {  # what every upload asks for
            name: value
            for name, value in (
                ("ServerSideEncryption", sse),
                ("SSEKMSKeyId", kms_key),
                ("StorageClass", storage_class),
            )
            if value
        }
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._give_up_after_s = give_up_after_s
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._clients: dict[int, S3Client] = {}  # by process: a forked child must not share connections

    @classmethod
    def from_url(cls, parts: SplitResult) -> "S3Store":
        prefix = unquote(parts.path).strip("/")
        try:
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError:
            raise Misconfigured(f"{SETTING} has an unreadable query.", allowed=ALLOWED) from None
        options = dict(pairs)
        if len(options) < len(pairs) or not options.keys() <= set(OPTIONS) or parts.fragment:
            raise Misconfigured(f"{SETTING} takes {', '.join(OPTIONS)}, each once.", allowed=ALLOWED)
        if not re.fullmatch(r"[A-Za-z0-9._-]{3,255}", parts.netloc):
            raise Misconfigured(f"{SETTING} names no bucket.", allowed=ALLOWED)
        if prefix and not is_key(prefix):
            raise Misconfigured(f"{SETTING} has a prefix that is not the start of a key.", allowed=ALLOWED)
        if "endpoint" in options:
            _check_endpoint(options["endpoint"])
        b2 = _B2.fullmatch(urlsplit(options.get("endpoint", "")).hostname or "")
        _check_writing(options, is_b2=b2 is not None)
        return cls(
            parts.netloc,
            prefix,
            endpoint=options.get("endpoint"),
            region=options.get("region") or (b2[1] if b2 else None),  # B2 signs with the endpoint's
            sse=options.get("sse"),
            kms_key=options.get("kms_key"),
            storage_class=options.get("storage_class"),
        )

    def put(self, key: str, data: bytes, *, content_type: str) -> None:
        name = self._prefix + check_key(key)
        if len(data) > MULTIPART_OVER:
            self._put_parts(key, data, content_type=content_type)
            return
        md5 = _md5(data)

        def send(client: "S3Client") -> None:
            client.put_object(
                Bucket=self._bucket,
                Key=name,
                Body=_body(data),
                ContentMD5=md5,
                ContentType=content_type,
                **self._written_as,
            )

        self._retrying(send, key=key)

    def _put_parts(self, key: str, data: bytes, *, content_type: str) -> None:
        """Upload in parts, each sent again by itself. What cannot be completed is taken back."""
        name = self._prefix + key
        begun = self._retrying(
            lambda client: client.create_multipart_upload(
                Bucket=self._bucket, Key=name, ContentType=content_type, **self._written_as
            ),
            key=key,
        )
        upload = begun["UploadId"]
        try:
            parts: list[CompletedPartTypeDef] = [
                {
                    "PartNumber": number,
                    "ETag": self._put_part(key, upload, number, data[at : at + PART_BYTES]),
                }
                for number, at in enumerate(range(0, len(data), PART_BYTES), 1)
            ]
            try:
                self._retrying(
                    lambda client: client.complete_multipart_upload(
                        Bucket=self._bucket, Key=name, UploadId=upload, MultipartUpload={"Parts": parts}
                    ),
                    key=key,
                )
            except Misconfigured:  # no such upload: the answer to an earlier try was lost
                if not self._holds(key, len(data)):
                    raise
        except BaseException:
            with suppress(FarmError):  # the first error says more; clear_leftovers() comes by
                self._abort(name, upload)
            raise

    def _put_part(self, key: str, upload: str, number: int, part: bytes) -> str:
        md5 = _md5(part)
        sent = self._retrying(
            lambda client: client.upload_part(
                Bucket=self._bucket,
                Key=self._prefix + key,
                UploadId=upload,
                PartNumber=number,
                Body=_body(part),
                ContentMD5=md5,
            ),
            key=key,
        )
        return sent["ETag"]

    def _holds(self, key: str, size_bytes: int) -> bool:
        return any(stored.key == key and stored.size_bytes == size_bytes for stored in self.list(key))

    def _abort(self, name: str, upload: str) -> None:
        self._retrying(
            lambda client: client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload)
        )

    def get(self, key: str) -> bytes:
        name = self._prefix + check_key(key)

        def fetch(client: "S3Client") -> bytes:
            answer = client.get_object(Bucket=self._bucket, Key=name)
            with closing(answer["Body"]) as body:
                data = body.read()
            if len(data) != answer.get("ContentLength"):
                raise StorageAway("The store's answer broke off.", key=key)
            return check_hash(key, data)

        return self._retrying(fetch, key=key)

    def delete(self, key: str) -> None:
        name = self._prefix + check_key(key)
        versions = self._versions(name) or []
        if versions in ([], ["null"]):
            versions = self._delete_plainly(name)
        for version in versions:
            with suppress(NotFound):
                self._retrying(
                    lambda client, v=version: client.delete_object(  # type: ignore[misc]
                        Bucket=self._bucket, Key=name, VersionId=v
                    ),
                    key=key,
                )

    def _delete_plainly(self, name: str) -> list[str]:
        """Delete what is there. Returns the marker that was put in its place, if versions are kept."""
        try:
            answer = self._retrying(lambda client: client.delete_object(Bucket=self._bucket, Key=name))
        except NotFound:  # S3 answers 204 when there is nothing, some others 404
            return []
        marker = answer.get("VersionId") if answer.get("DeleteMarker") else None
        return [marker] if marker else []

    def _versions(self, name: str) -> list[str] | None:
        """Every version and marker of an object: B2 always keeps them, and hides on delete. None: it won't say."""
        more: dict[str, Any] = {}
        found: list[str] = []
        while True:
            try:
                page = self._retrying(
                    lambda client, m=more: client.list_object_versions(  # type: ignore[misc]
                        Bucket=self._bucket, Prefix=name, **m
                    )
                )
            except (Misconfigured, NotFound) as e:  # not offered, or not allowed
                log.debug("versions of %s are not listed: %s", name, e)
                return None
            entries = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
            found += [e["VersionId"] or "null" for e in entries if e["Key"] == name]
            if not page.get("IsTruncated") or any(e["Key"] > name for e in entries):
                return found
            more = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}

    def url(self, key: str, *, expires_s: int, content_type: str, filename: str) -> str | None:
        name = self._prefix + check_key(key)
        return self._retrying(
            lambda client: client.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": self._bucket,
                    "Key": name,
                    "ResponseContentType": content_type,
                    "ResponseContentDisposition": f'inline; filename="{filename}"',
                },
                ExpiresIn=expires_s,
            ),
            key=key,
        )

    def list(self, prefix: str = "") -> Iterator[Stored]:
        check_prefix(prefix)
        return self._pages(self._prefix + prefix)

    def clear_leftovers(self) -> int:
        before = datetime.now(UTC) - LEFTOVER_AGE
        more: dict[str, Any] = {}
        cleared = 0
        while True:
            try:
                page = self._retrying(
                    lambda client, m=more: client.list_multipart_uploads(  # type: ignore[misc]
                        Bucket=self._bucket, Prefix=self._prefix, **m
                    )
                )
            except Misconfigured as e:  # not offered, or not allowed: a lifecycle rule has to
                log.debug("uploads that broke off are not listed: %s", e)
                return cleared
            for upload in page.get("Uploads", []):
                ours = upload["Key"].removeprefix(self._prefix).startswith(("v1/", "check/"))
                if ours and upload["Initiated"] < before:
                    self._abort(upload["Key"], upload["UploadId"])
                    cleared += 1
            if not page.get("IsTruncated"):
                return cleared
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def check(self) -> None:
        prove(self)
        self.clear_leftovers()

    def extras(self, key: str, data: bytes) -> Iterator[Finding]:
        for what, attempt in (
            ("conditional write", self._try_conditional),
            ("multipart upload", self._try_parts),
            ("encryption", self._try_encryption),
            ("storage class", self._try_class),
            ("signed URLs", self._try_url),
            ("versions", self._try_versions),
        ):
            started = time.monotonic()
            try:
                state, detail = attempt(key, data)
            except FarmError as e:
                if "read_bytes" in e.facts:  # it changed bytes
                    raise
                state, detail = "unknown", str(e.facts.get("why") or e)
            yield Finding(what, state, detail, round((time.monotonic() - started) * 1000))

    def _try_conditional(self, key: str, data: bytes) -> tuple[str, str]:
        try:
            self._retrying(
                lambda client: client.put_object(
                    Bucket=self._bucket,
                    Key=self._prefix + key,
                    Body=data,
                    ContentMD5=_md5(data),
                    IfNoneMatch="*",
                    **self._written_as,
                )
            )
        except Misconfigured as e:
            why = str(e.facts.get("why", ""))
            if why.startswith(("412", "409")):
                return "ok", f"a second writer is refused ({why}); nothing rests on it"
            return "no", f"{why}; nothing rests on it"
        return "no", "If-None-Match is ignored; nothing rests on it"

    def _try_parts(self, key: str, data: bytes) -> tuple[str, str]:
        whole = f"{key}-parts"
        self._put_parts(whole, data, content_type="application/octet-stream")
        try:
            check_same(data, self.get(whole))
        finally:
            self.delete(whole)
        return "ok", f"above {MULTIPART_OVER >> 20} MiB"

    def _try_encryption(self, key: str, data: bytes) -> tuple[str, str]:
        found = str(self._head(key).get("ServerSideEncryption") or "")
        asked = self._written_as.get("ServerSideEncryption")
        if asked and found != asked:
            return "no", f"{asked} was asked for, and it says {found or 'nothing'}"
        return (
            ("ok", found)
            if found
            else ("unknown", "none was asked for; what it does by itself it does not say")
        )

    def _try_class(self, key: str, data: bytes) -> tuple[str, str]:
        found = str(self._head(key).get("StorageClass") or "STANDARD")
        asked = self._written_as.get("StorageClass")
        if asked and found != asked:
            return "no", f"{asked} was asked for, and it says {found}"
        return "ok", found

    def _head(self, key: str) -> "Mapping[str, Any]":
        return self._retrying(
            lambda client: client.head_object(Bucket=self._bucket, Key=self._prefix + key), key=key
        )

    def _try_url(self, key: str, data: bytes) -> tuple[str, str]:
        import httpx

        asked: dict[str, Any] = {"content_type": "application/octet-stream", "filename": "check"}
        url = self.url(key, expires_s=60, **asked) or ""
        try:
            with httpx.Client(timeout=self._read_timeout_s) as http:
                got, forged = self._fetch(http, url), self._fetch(http, _forged(url))
        except StorageAway as e:
            return "no", f"not fetched: {e.facts['why']}"
        if got.status_code != 200 or got.content != data:
            return "no", f"answered {got.status_code}"
        if forged.status_code == 200:
            return "no", "a forged signature is taken as well: anybody may read this bucket"
        return "ok", f"a forged one is refused with {forged.status_code}"

    def _fetch(self, http: "httpx.Client", url: str) -> "httpx.Response":
        """What a URL answers, asked again as long as that may pass."""
        from httpx import TransportError

        def fetch(_: object) -> "httpx.Response":
            try:
                answer = http.get(url)
            except TransportError as e:
                raise StorageAway(bucket=self._bucket, why=type(e).__name__) from e
            if _passes(answer.status_code):
                raise StorageAway(bucket=self._bucket, why=str(answer.status_code))
            return answer

        return self._retrying(fetch)

    def _try_versions(self, key: str, data: bytes) -> tuple[str, str]:
        self.put(key, data, content_type="application/octet-stream")
        versions = self._versions(self._prefix + key)
        if versions is None:
            return "unknown", "they cannot be listed; if the bucket keeps them, deleted images stay"
        if len(versions) > 1:
            return "ok", "they are kept, and each is deleted"
        return "ok", "none are kept"

    def _pages(self, prefix: str) -> Iterator[Stored]:
        more: dict[str, Any] = {}
        while True:
            page = self._page(prefix, more)
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(self._prefix)
                if is_key(key):  # a console's "folder" objects are not ours
                    yield Stored(key, item["Size"], item["LastModified"].astimezone(UTC))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, more: dict[str, Any]) -> "ListObjectsV2OutputTypeDef":
        return self._retrying(
            lambda client: client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, **more)
        )

    def _retrying(self, call: "Callable[[S3Client], T]", *, key: str | None = None) -> T:
        """Call until it works, with growing random pauses, as long as the answers may pass."""
        started = time.monotonic()
        longest_s = self._first_pause_s
        while True:
            try:
                return call(self._client())
            except Exception as error:  # boto's errors share no base; what is not one is raised again
                verdict = self._judge(error, key)
                if verdict is None:
                    raise
                pause_s = random.uniform(0, longest_s)
                late = time.monotonic() + pause_s > started + self._give_up_after_s
                if late or not isinstance(verdict, StorageAway):
                    raise verdict from error
            time.sleep(pause_s)
            longest_s = min(2 * longest_s, self._longest_pause_s)

    def _judge(self, error: Exception, key: str | None) -> FarmError | None:
        """What an error means: StorageAway may pass, others will not, None is no error of the store."""
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        why = type(error).__name__
        if isinstance(error, StorageAway):
            return error
        if isinstance(error, boto.ClientError):
            return self._judge_answer(error.response, key)
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
            return self._refused("No credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.", why)
        passing = (
            boto.HTTPClientError,
            boto.ConnectionError,
            boto.IncompleteReadError,
            boto.CredentialRetrievalError,
            boto.MetadataRetrievalError,
            ResponseParserError,
            HTTPError,
            OSError,
        )
        if isinstance(error, passing):
            return StorageAway(bucket=self._bucket, why=why)
        if isinstance(error, boto.BotoCoreError):
            return self._refused("The bucket cannot be used.", why)
        return None

    def _judge_answer(self, answer: Mapping[str, Any], key: str | None) -> FarmError:
        # the code alone: a message may repeat the access key
        code = answer.get("Error", {}).get("Code") or ""
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        why = f"{status} {code}".strip()
        if code == "NoSuchKey":
            return NotFound(key=key)
        if _passes(status) or code in _PASSING:
            return StorageAway(bucket=self._bucket, why=why)
        if code == "NoSuchBucket":
            return self._refused("There is no such bucket.", why)
        if status in {401, 403}:
            return self._refused("The store refuses these credentials, or what they may do.", why)
        return self._refused("The store refuses the request.", why)

    def _refused(self, detail: str, why: str) -> Misconfigured:
        return Misconfigured(detail, setting=SETTING, bucket=self._bucket, why=why)

    def _client(self) -> "S3Client":
        pid = os.getpid()
        if client := self._clients.get(pid):
            return client
        return self._clients.setdefault(pid, self._connect())  # no lock: a fork could copy it locked

    def _connect(self) -> "S3Client":
        import boto3
        from botocore.config import Config

        config = Config(
            request_checksum_calculation="when_required",  # B2 refuses the newer SDKs' trailers with 400
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1, "mode": "standard"},  # ours are bounded in time
            signature_version="s3v4",  # B2 takes no other, and no other lasts 7 days
            max_pool_connections=16,
            # both are worth what an MD5 costs: a tenth of the time of an upload of 200 KB
            parameter_validation=False,
            user_agent="image-farm",
            tcp_keepalive=True,
            s3={"addressing_style": "path" if self._endpoint else "auto"},  # bucket.minio has no DNS entry
            connect_timeout=self._connect_timeout_s,
            read_timeout=self._read_timeout_s,
        )
        try:
            # its own session: the default one is not safe to share between threads
            return boto3.session.Session().client(
                "s3", endpoint_url=self._endpoint, region_name=self._region, config=config
            )
        except ValueError:  # boto's own idea of an endpoint
            raise Misconfigured(f"{SETTING} has a bad endpoint or region.", allowed=ALLOWED) from None


def _body(data: bytes) -> bytes | io.BytesIO:
    """What to send. As bytes all of it has to leave within connect_timeout_s: 15 MB at 2 MB/s never did."""
    return data if len(data) <= AT_ONCE else io.BytesIO(data)  # read in pieces of 16 KiB: a fifth slower


def _md5(data: bytes) -> str:
    """What the store compares: a body cut on its way is refused, not stored."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _passes(status: int) -> bool:
    return status in {408, 429} or (status >= 500 and status != 501)


def _forged(url: str) -> str:
    """The same URL with another last digit of its signature."""
    head, mark, tail = url.partition("X-Amz-Signature=")
    signature = tail.partition("&")[0]
    return head + mark + signature[:-1] + ("0" if signature[-1:] != "0" else "1") + tail[len(signature) :]


def _check_writing(options: Mapping[str, str], *, is_b2: bool) -> None:
    """Raises Misconfigured if the encryption or the storage class is not one that the store takes."""
    sse, kms_key, kind = (options.get(name) for name in ("sse", "kms_key", "storage_class"))
    if sse is not None and sse not in (ENCRYPTIONS[:1] if is_b2 else ENCRYPTIONS):
        raise Misconfigured(
            f"{SETTING} has an unknown sse; allowed: {'AES256 for B2' if is_b2 else ', '.join(ENCRYPTIONS)}.",
            allowed=ALLOWED,
        )
    if kms_key is not None and (sse != "aws:kms" or not _KMS_KEY.fullmatch(kms_key)):
        raise Misconfigured(f"{SETTING} takes kms_key, a key's id or ARN, with sse=aws:kms.", allowed=ALLOWED)
    if kind is not None and kind not in (STORAGE_CLASSES[:1] if is_b2 else STORAGE_CLASSES):
        allowed = "STANDARD for B2" if is_b2 else f"{', '.join(STORAGE_CLASSES)}; not archives"
        raise Misconfigured(f"{SETTING} has an unknown storage_class; allowed: {allowed}.", allowed=ALLOWED)


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or "@" in endpoint or parts.query or parts.fragment:
        raise Misconfigured(
            f"{SETTING} has an endpoint that is not https://host[:port]; credentials belong in AWS_*.",
            allowed=ALLOWED,
        )
