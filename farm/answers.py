"""What the HTTP API answers, as types: the API writes them, the client reads them.

Amounts are text with all their digits, in a currency that stands beside them. Times are UTC.
"""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Frozen; a client ignores fields that a newer farm adds."""

    model_config = ConfigDict(frozen=True)


class Counts(Answer):
    """How many of a job's frames are where; together they are all of them."""

    queued: int
    running: int
    done: int
    failed: int
    cancelled: int


class JobUrls(Answer):
    self: str
    frames: str
    sheet: str
    cancel: str


class Job(Answer):
    """One submission: frames, priority, and what it costs."""

    id: str = Field(examples=["job_0192f0c1a2b37c4d8e5f6a7b8c000000"])
    name: str | None
    status: str = Field(description="staged, queued, running, paused, finished or cancelled")
    priority: int = Field(description="0 to 9, 9 most urgent")
    frames: int
    counts: Counts
    progress: float = Field(description="0 to 1, with the steps of frames that are being rendered")
    currency: str = Field(examples=["USD"])
    quoted: str = Field(description="what it costs at most", examples=["0.00025"])
    held: str = Field(description="what its open frames may still cost")
    charged: str = Field(description="what its finished frames cost")
    created_at: datetime
    ended_at: datetime | None
    urls: JobUrls

    @property
    def ended(self) -> bool:
        """Nothing more will come of it."""
        return self.status in ("finished", "cancelled")


class Jobs(Answer):
    jobs: list[Job]
    next: str | None = Field(description="send it as ?before= for the older ones; null: there are none")


class ImageFile(Answer):
    """The stored file of a frame."""

    url: str
    sha256: str
    bytes: int
    width: int
    height: int
    content_type: str


class Frame(Answer):
    """One image of a job, one seed."""

    id: str = Field(examples=["frm_0192f0c1a2b37c4d8e5f6a7b8c000001"])
    job: str
    index: int
    status: str = Field(description="queued, claimed, done, failed, cancelled, waiting, staged or rejected")
    progress: float = Field(description="0 to 1; the steps that were made while it is claimed")
    attempts: int = Field(description="packs it took down alone")
    seed: int
    spec: dict[str, Any]
    cost: str | None = Field(description="what it was charged; null while it is not done")
    image: ImageFile | None
    reason: str | None = Field(description="why it failed")
    ended_at: datetime | None


class Frames(Answer):
    frames: list[Frame]
    next: int | None = Field(description="send it as ?first= for those after; null: there are none")


class Event(Answer):
    """What happened, numbered in the order it became known, without a gap."""

    number: int
    kind: str = Field(examples=["frame.done"])
    job: str
    frame: str | None
    data: dict[str, Any]
    at: datetime


class Events(Answer):
    events: list[Event]
    next: int = Field(description="send it as ?after= for what happens next")


class UsageLine(Answer):
    """What was used of one model at one rate."""

    model: str
    method: str = Field(description="mpx_step: quantity is pixels times steps, rate per 2**20; image: images")
    currency: str
    rate: str
    frames: int
    quantity: int
    amount: str


class Usage(Answer):
    since: datetime | None
    until: datetime | None
    lines: list[UsageLine]
    totals: dict[str, str] = Field(description="amount by currency", examples=[{"USD": "0.0625"}])


class SideLimit(Answer):
    min: int
    max: int
    multiple: int
    default: int


class StepsLimit(Answer):
    min: int
    max: int
    default: int


class GuidanceLimit(Answer):
    min: float
    max: float
    default: float


class Price(Answer):
    """What one unit costs: an image, or a megapixel (2**20 pixels) for one step."""

    method: str
    rate: str
    currency: str


class Model(Answer):
    """One checkpoint, what may be asked of it, and what that costs this account."""

    name: str
    title: str
    licence: str
    pool: str
    side: SideLimit = Field(description="of width and height, in pixels")
    steps: StepsLimit
    guidance: GuidanceLimit
    negative_prompt: bool
    samplers: list[str]
    sampler: str = Field(description="the one it uses if none is asked for")
    price: Price | None = Field(description="null: not for sale in this account's currency")


class Models(Answer):
    models: list[Model]


class Caller(Answer):
    """The account and the API key a request came with."""

    id: str
    name: str
    currency: str
    key: str
    role: str = Field(description="read, submit or admin; each may what the one before may")


class Account(Answer):
    """Who pays."""

    id: str
    name: str
    currency: str
    weight: int
    created_at: datetime


class Accounts(Answer):
    accounts: list[Account]


class Key(Answer):
    """An API key, without its secret."""

    id: str
    account: str
    role: str
    version: int
    created_at: datetime
    revoked_at: datetime | None


class Keys(Answer):
    keys: list[Key]


class NewKey(Key):
    api_key: str = Field(description="the key's text, shown this once")


class PackInHand(Answer):
    """Frames a worker renders together just now."""

    id: str = Field(description="a number, but beyond what JavaScript can hold")
    model: str
    priority: int
    frames: int
    claimed_at: datetime
    lease_until: datetime


class Worker(Answer):
    """One process on one GPU."""

    id: str
    pool: str
    models: list[str]
    device: str
    state: str = Field(description="up, draining or gone")
    started_at: datetime
    seen_at: datetime
    packs: list[PackInHand]


class Workers(Answer):
    workers: list[Worker]


class Violation(Answer):
    """A fact of the books that is not as it must be."""

    violation: str
    subject: str
    detail: str


class Audit(Answer):
    violations: list[Violation]
