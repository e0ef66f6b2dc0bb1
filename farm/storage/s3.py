"""Images in a bucket: AWS S3, Backblaze B2, Cloudflare R2 and whatever else speaks S3.

Answers, and what is done about them:
  503 SlowDown, other 5xx, 429, a cut connection, no answer    try again, later and later, then StorageAway
  bytes lost on the way (Content-MD5, Content-Length, hash)    the same
  404 NoSuchKey                                                NotFound
  403, NoSuchBucket, 501, bad credentials, anything else       Misconfigured, at once
"""

import base64
import hashlib
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from datetime import UTC
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from farm.errors import FarmError, Misconfigured, NotFound, StorageAway
from farm.storage import ALLOWED, SETTING, Stored, check_hash, check_key, check_prefix, is_key, prove

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef

T = TypeVar("T")

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
        if len(options) < len(pairs) or not options.keys() <= {"endpoint", "region"} or parts.fragment:
            raise Misconfigured(f"{SETTING} takes endpoint and region, each once.", allowed=ALLOWED)
        if not re.fullmatch(r"[A-Za-z0-9._-]{3,255}", parts.netloc):
            raise Misconfigured(f"{SETTING} names no bucket.", allowed=ALLOWED)
        if prefix and not is_key(prefix):
            raise Misconfigured(f"{SETTING} has a prefix that is not the start of a key.", allowed=ALLOWED)
        if "endpoint" in options:
            _check_endpoint(options["endpoint"])
        return cls(
            parts.netloc, prefix, endpoint=options.get("endpoint"), region=options.get("region") or None
        )

    def put(self, key: str, data: bytes, *, content_type: str) -> None:
        name = self._prefix + check_key(key)
        # the store compares it: a body cut on its way is refused, not stored
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()

        def send(client: "S3Client") -> None:
            client.put_object(
                Bucket=self._bucket,
                Key=name,
                # as bytes, all of it would have to leave within connect_timeout_s: 15 MB at 2 MB/s never did
                Body=io.BytesIO(data),
                ContentMD5=md5,
                ContentType=content_type,
            )

        self._retrying(send, key=key)

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
        with suppress(NotFound):  # S3 answers 204 when there is nothing, some others 404
            self._retrying(lambda client: client.delete_object(Bucket=self._bucket, Key=name), key=key)

    def list(self, prefix: str = "") -> Iterator[Stored]:
        check_prefix(prefix)
        return self._pages(self._prefix + prefix)

    def check(self) -> None:
        prove(self)

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
        if status in {408, 429} or (status >= 500 and status != 501) or code in _PASSING:
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
            max_pool_connections=16,
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
