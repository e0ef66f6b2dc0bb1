"""The Idempotency-Key of requests that create something: carried out once, and answered the same again.

    def set_price(caller: Admin, body: Body, once: Once) -> answers.DatedPrice:
        return once(answers.DatedPrice, lambda db: …)

The work and what it answered are one transaction. A key belongs to an account, a method and a path; with another body
it is refused. Refusals are not kept: what was not done may be sent again. A secret is never kept: `whole` puts it
back into an answer that is repeated.
"""

import hashlib
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Response
from sqlalchemy.orm import Session

from farm import once as kept
from farm.accounts import Caller
from farm.answers import Answer
from farm.api.auth import anybody
from farm.api.bodies import raw
from farm.api.params import AnyIdempotencyHeader, checked_key
from farm.db import transaction

A = TypeVar("A", bound=Answer)
REPLAYED = "Idempotent-Replayed"


class Repeatable:
    """One request, and the key it came with, if it did."""

    def __init__(
        self, request: Request, response: Response, caller: Caller, body: bytes, key: str | None
    ) -> None:
        self._response = response
        self._account_id = caller.account_id
        # as it was sent: a path may hold what Postgres does not take
        path = (request.scope.get("raw_path") or request.url.path.encode()).decode("latin-1")
        self._operation = f"{request.method} {path}"
        self._digest = hashlib.sha256(body + b"\0" + request.scope["query_string"]).digest()
        self._status = getattr(request.scope.get("route"), "status_code", None) or 200
        self.key = key

    def __call__(
        self,
        kind: type[A],
        work: Callable[[Session], A],
        *,
        without: str | None = None,
        whole: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> A:
        """Do the work in a transaction of its own, or answer as it was answered before.

        without: a field that is not kept; whole: puts it into an answer that was.
        Raises what work raises; InProgress and Invalid as once.earlier() does.
        """
        with transaction() as db:
            if self.key is None:
                return work(db)
            before = kept.earlier(db, self._account_id, self._operation, self.key, self._digest)
            if before is not None:
                self._repeat(before)
                return kind.model_validate(whole(before.answer))
            answer = work(db)
            db.flush()
            kept.keep(
                db, self._account_id, self._operation, self.key,
                body_sha256=self._digest,
                status=self._response.status_code or self._status,
                headers={k: v for k, v in self._response.headers.items() if k == "location"},
                answer=answer.model_dump(mode="json", exclude={without} if without else None),
            )  # fmt: skip
            return answer

    def _repeat(self, before: Any) -> None:
        self._response.status_code = before.status
        for name, value in before.headers.items():
            self._response.headers[name] = value
        self._response.headers[REPLAYED] = "true"


async def _repeatable(
    request: Request,
    response: Response,
    caller: Annotated[Caller, Depends(anybody)],
    body: Annotated[bytes, Depends(raw)],
    idempotency_key: AnyIdempotencyHeader = None,
) -> Repeatable:
    key = checked_key(idempotency_key, field="Idempotency-Key")
    return Repeatable(request, response, caller, body, key)


Once = Annotated[Repeatable, Depends(_repeatable)]
