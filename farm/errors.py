"""Everything that can go wrong, as one tree.

FarmError                      500
├── Refused                    400  the caller can change something
│   ├── Unauthorized           401
│   ├── BudgetExceeded         402  names what is needed and what is left
│   ├── Forbidden              403
│   ├── NotFound               404
│   ├── Conflict               409
│   │   └── InProgress              the same request; it may be sent again soon
│   ├── Gone                   410
│   ├── TooLarge               413
│   ├── Invalid                422  one Fault for each field
│   │   └── LinesRefused            of a bulk upload, which it names
│   └── TooMany                429  names what is allowed; Retry-After
│       ├── RateLimited             requests of a key or an account
│       └── QueueFull               frames that have not ended, of an account or of the farm
├── Away                       503  a service we stand on does not answer; Retry-After
│   ├── DatabaseAway
│   ├── BrokerAway
│   └── StorageAway
│       └── Damaged             what is stored is not what was booked
├── Misconfigured              500  names the setting
└── RenderFailed               500  the engine could not make these frames
    └── OutOfMemory                 a smaller pack may fit

The class is the code, its docstring the message, its attributes the facts.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


class FarmError(Exception):
    """Something went wrong in the farm."""

    http_status: ClassVar[int] = 500

    def __init__(self, detail: str = "", **facts: Any) -> None:
        self.detail = detail
        self.facts = facts
        super().__init__(detail)

    @property
    def title(self) -> str:
        return (type(self).__doc__ or "").strip().splitlines()[0]

    def __str__(self) -> str:
        facts = ", ".join(f"{k}={v!r}" for k, v in self.facts.items())
        return " ".join(part for part in (self.detail or self.title, f"({facts})" if facts else "") if part)


class Refused(FarmError):
    """The request cannot be carried out as it stands."""

    http_status = 400


class Unauthorized(Refused):
    """No valid API key came with the request."""

    http_status = 401


class BudgetExceeded(Refused):
    """The budget does not cover this job."""

    http_status = 402


class Forbidden(Refused):
    """This API key may not do that."""

    http_status = 403


class NotFound(Refused):
    """There is nothing here by that id."""

    http_status = 404


class Conflict(Refused):
    """The request does not fit the state things are in."""

    http_status = 409


class InProgress(Conflict):
    """The same request is being worked on; send it again in a moment."""


class Gone(Refused):
    """It was here once, and has been removed."""

    http_status = 410


class TooLarge(Refused):
    """The request's body is larger than the farm takes."""

    http_status = 413


@dataclass(frozen=True)
class Fault:
    """One field that was refused: its path in the body, the value that came, what is allowed."""

    field: str
    value: Any
    allowed: str


class Invalid(Refused):
    """The request has fields the farm cannot take."""

    http_status = 422

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__(
            "; ".join(f"{f.field}: {f.value!r} is not allowed; {f.allowed}" for f in faults),
            errors=[asdict(f) for f in faults],
        )

    def __str__(self) -> str:
        return self.detail


class LinesRefused(Invalid):
    """Lines of the upload are not allowed; nothing of it stays."""

    def __init__(self, faults: list[Fault], *, upload: str) -> None:
        self.upload = upload
        super().__init__(faults)


class TooMany(Refused):
    """More than is allowed just now; the same may be taken later."""

    http_status = 429

    def __init__(self, detail: str = "", *, retry_after_s: int = 1, **facts: Any) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(detail, retry_after_s=retry_after_s, **facts)


class RateLimited(TooMany):
    """Requests come faster than is allowed."""


class QueueFull(TooMany):
    """As many frames wait as are allowed to."""


class Away(FarmError):
    """A service the farm stands on does not answer."""

    http_status = 503
    retry_after_s: ClassVar[int] = 5


class DatabaseAway(Away):
    """The job database does not answer; nothing was stored."""


class BrokerAway(Away):
    """The broker does not answer."""


class StorageAway(Away):
    """The image store does not answer."""


class Damaged(StorageAway):
    """The store gave back other bytes than the image's hash says."""


class Misconfigured(FarmError):
    """A setting is missing or wrong."""


class RenderFailed(FarmError):
    """The engine could not render these frames."""


class OutOfMemory(RenderFailed):
    """The device has no memory left for a pack of this size."""
