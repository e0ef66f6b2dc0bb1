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
    """How many of a job's frames are where; the first five together are all of them."""

    queued: int
    running: int
    done: int
    failed: int
    cancelled: int
    waiting: int = Field(0, description="of those queued: they wait for an equal frame's image")
    staged: int = Field(0, description="of those queued: they wait for the job to be approved")
    reused: int = Field(0, description="of those done: their image was made for an equal frame")


class JobUrls(Answer):
    self: str
    frames: str
    sheet: str
    cancel: str
    manifest: str = ""
    archive: str = ""


class Job(Answer):
    """One submission: frames, priority, and what it costs."""

    id: str = Field(examples=["job_0192f0c1a2b37c4d8e5f6a7b8c000000"])
    name: str | None
    status: str = Field(
        description="queued, running, staged once its proof is made and until it is approved, paused, waiting for its"
        " start or for other jobs, late while what is not done by its deadline fails, finished or cancelled"
    )
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
    start_after: datetime | None = None
    deadline: datetime | None = None
    on_late: str | None = Field(None, description="fail or demote")
    late_at: datetime | None = Field(None, description="when its deadline was seen to have passed")
    max_parallel: int | None = None
    after: list[str] = Field([], description="jobs that have to end first")
    after_ok: list[str] = Field([], description="jobs that have to be all done first")
    rate: float | None = Field(None, description="images a second of late; null: none, or not running")
    eta: datetime | None = Field(None, description="when it is done at this rate")
    on_time: bool | None = Field(
        None, description="whether eta lies before deadline; null where one of them is missing"
    )
    proof: int | None = Field(None, description="images that are rendered before the rest is approved")
    approved_at: datetime | None = None
    urls: JobUrls

    @property
    def ended(self) -> bool:
        """Nothing more will come of it."""
        return self.status in ("finished", "cancelled")


class Jobs(Answer):
    jobs: list[Job]
    next: str | None = Field(description="send it as ?before= for the older ones; null: there are none")


class BulkUrls(Answer):
    self: str
    errors: str
    job: str | None


class Bulk(Answer):
    """A bulk upload: a file of lines that becomes a job."""

    id: str = Field(examples=["blk_0192f0c1a2b37c4d8e5f6a7b8c000000"])
    status: str = Field(description="open, accepted, refused or discarded")
    mode: str = Field(description="all_or_nothing or accept_good")
    format: str = Field(description="ndjson, csv or matrix")
    name: str | None
    received: int = Field(description="bytes that are in: go on from there; of a matrix images")
    lines: int
    good: int = Field(description="lines that are images")
    bad: int = Field(description="lines that are not; the errors say why")
    job: str | None = Field(description="the job it became")
    created_at: datetime
    ended_at: datetime | None
    urls: BulkUrls


class Bulks(Answer):
    uploads: list[Bulk]
    next: str | None = Field(description="send it as ?before= for the older ones; null: there are none")


class BulkError(Answer):
    """What is wrong with a field of a line."""

    line: int = Field(description="of the file, from 1; of CSV the first one names the columns")
    custom_id: str | None
    field: str = Field(examples=["width"])
    value: Any = Field(None, description="what came; long values are cut")
    allowed: str = Field(examples=["allowed are multiples of 8 from 64 to 128"])


class PreviewedSpec(Answer):
    index: int
    seed: int | None = Field(description="null: drawn at random")
    spec: dict[str, Any]


class BulkPreview(Answer):
    """What a matrix comes to."""

    count: int = Field(description="images")
    prompts: int
    combinations: int = Field(description="of all but prompts and seeds")
    seeds: int
    quoted: str = Field(description="what they cost at most")
    currency: str
    specs: list[PreviewedSpec] = Field(description="the first ones")


class ImageFile(Answer):
    """The stored file of a frame."""

    url: str
    sha256: str
    bytes: int
    width: int
    height: int
    content_type: str


class ImageUrl(Answer):
    """A link to an image that works without a key."""

    url: str
    expires_at: datetime


class Input(Answer):
    """An image that was sent to start frames from."""

    id: str = Field(examples=["inp_0192f0c1a2b37c4d8e5f6a7b8c000000"])
    sha256: str
    bytes: int
    width: int = Field(description="as it is shown: turned as its EXIF data says")
    height: int
    content_type: str
    jobs: int = Field(description="open jobs that need it")
    created_at: datetime
    used_at: datetime = Field(description="last sent or asked for, within an hour")


class Inputs(Answer):
    inputs: list[Input]
    next: str | None = Field(description="send it as ?before= for the older ones; null: there are none")


class DeletedImages(Answer):
    """A job whose images are shown no more."""

    job: str
    images_deleted_at: datetime
    looked_at: int = Field(description="frames whose files were seen to since then; all of them in the end")
    frames: int


class Frame(Answer):
    """One image of a job, one seed."""

    id: str = Field(examples=["frm_0192f0c1a2b37c4d8e5f6a7b8c000001"])
    job: str
    index: int
    custom_id: str | None = Field(None, description="what the line of a bulk upload called it")
    status: str = Field(description="queued, claimed, done, failed, cancelled, waiting, staged or rejected")
    progress: float = Field(description="0 to 1; the steps that were made while it is claimed")
    attempts: int = Field(description="packs it took down alone")
    seed: int
    spec: dict[str, Any]
    revised_prompt: str | None = Field(
        None, description="what was rendered, where style or prompt help made it another than was sent"
    )
    cost: str | None = Field(description="what it was charged; null while it is not done")
    reused: bool = Field(False, description="its image was made for an equal frame; charged as such")
    image: ImageFile | None
    reason: str | None = Field(description="why it failed")
    ended_at: datetime | None


class ManifestLine(Answer):
    """A frame, as a line of its job's manifest."""

    index: int
    custom_id: str | None = Field(description="as it was sent with the frame")
    frame: str
    status: str
    file: str | None = Field(description="what its image is called in archives; null: there is none")
    url: str | None
    sha256: str | None
    bytes: int | None
    width: int | None
    height: int | None
    content_type: str | None
    seed: int
    model: str
    cost: str | None = Field(description="what it was charged; null while it is not done")
    currency: str
    reason: str | None = Field(description="why it failed")


class VersionChange(Answer):
    """What rendered it differs from what did before."""

    name: str = Field(description="farm, diffusers, torch, revision or dtype")
    before: str | None
    now: str | None


class Rerender(Answer):
    """A frame that was rendered again, against the one it repeats."""

    of: str = Field(description="the frame it repeats")
    same_pixels: bool
    same_file: bool = Field(description="byte for byte; other versions alone make another file")
    largest_difference: int | None = Field(
        None,
        description="levels of 255, of any channel; 1 is within rounding; null: a file is gone",
    )
    pixels_differing: int | None = Field(None, description="how many differ at all")
    versions: list[VersionChange] = Field(description="what rendered it, where it differs")


class Provenance(Answer):
    """What made a frame's image: with the same farm, it makes it again."""

    frame: str
    job: str
    index: int
    status: str
    model: str
    revision: str | None = Field(description="of the model; null while there is no image")
    dtype: str | None
    loras: list[str] = Field(description="hashes of what was loaded beside the model")
    inputs: list[str] = Field([], description="hashes of the images it was started from")
    spec: dict[str, Any]
    seed: int
    seed_given: bool = Field(description="false: drawn at random; no other frame reuses this image")
    fingerprint: str = Field(description="SHA-256 of everything that decides the pixels")
    reused: bool = Field(description="the image was made for an equal frame before")
    versions: dict[str, str] = Field(examples=[{"farm": "0.1.0", "diffusers": "0.42.1", "torch": "2.13.0"}])
    sha256: str | None = Field(description="of the file")
    pixel_sha256: str | None = Field(description="of its pixels, whatever the file")
    rerender: Rerender | None = Field(description="of a rerender that is done: whether it is the same")


class Frames(Answer):
    frames: list[Frame]
    next: int | None = Field(description="send it as ?first= for those after; null: there are none")


class Event(Answer):
    """What happened, numbered in the order it became known, without a gap."""

    number: int
    kind: str = Field(examples=["frame.done"])
    job: str | None = Field(description="null: it is not a job's, as a budget's")
    frame: str | None
    data: dict[str, Any]
    at: datetime


class FrameStep(Answer):
    index: int
    progress: float = Field(description="0 to 1")


class Steps(Answer):
    """How far frames on a device are: of a stream, kept nowhere."""

    job: str
    frames: list[FrameStep]


class Preview(Answer):
    """What a frame on a device looks like: of a stream, kept nowhere."""

    job: str
    index: int
    content_type: str
    image: str = Field(description="base64")


class Events(Answer):
    events: list[Event]
    next: int = Field(description="send it as ?after= for what happens next")


class Webhook(Answer):
    """Who is told of the account's events, or of one job's."""

    id: str = Field(examples=["whk_0192f0c1a2b37c4d8e5f6a7b8c000000"])
    url: str
    kinds: list[str] = Field(examples=[["job.*", "frame.failed"]])
    description: str | None
    job: str | None = Field(description="the one job it is told of; null: all of them")
    created_at: datetime
    disabled: str | None = Field(
        description="asked, gone (it answered 410) or failing (for 5 days); null: it is not"
    )
    disabled_at: datetime | None
    failing_since: datetime | None = Field(description="nothing it was sent since was taken")
    behind: bool = Field(description="so many deliveries wait that the rest of the events do so undelivered")
    version: int = Field(description="of its secret")
    rotated_at: datetime | None = Field(description="the secret before signs too for a day")


class NewWebhook(Webhook):
    """A webhook with its secret: keep it, it is not shown again."""

    secret: str = Field(examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])


class Webhooks(Answer):
    webhooks: list[Webhook]


class NewSecret(Answer):
    """What signs the callbacks of the account's jobs: keep it, it is not shown again."""

    version: int
    secret: str


class Try(Answer):
    """One time something was sent."""

    at: datetime
    ms: int = Field(description="until it was answered, or given up")
    status: int | None = Field(description="of HTTP; null: nothing was answered")
    answer: str = Field(description="how its body begins")
    error: str | None


class Delivery(Answer):
    """An event on its way to a webhook."""

    id: int
    kind: str = Field(examples=["job.finished"])
    event: int | None = Field(description="its number; null: a test")
    status: str = Field(description="pending, delivered or failed")
    tries: int
    next_at: datetime | None = Field(description="when it is tried again, or later; null: it has ended")
    created_at: datetime
    ended_at: datetime | None
    log: list[Try] = Field(description="the last 20 tries")


class Deliveries(Answer):
    deliveries: list[Delivery]
    next: int | None = Field(description="send it as ?before= for the older ones; null: there are none")


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


class Measured(Answer):
    """What one frame of a size took of a device, when `farm models verify` ran there."""

    device: str
    width: int
    height: int
    steps: int
    seconds: float
    peak_bytes: int
    measured_at: datetime


class ModelSize(Answer):
    width: int
    height: int


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
    family: str = ""
    revision: str = Field("", description="what is rendered with: a commit of its repository")
    pools: list[str] = Field([], description="whose workers have it")
    sizes: list[ModelSize] = Field([], description="that it was trained on; empty: any of its side's")
    loras: list[str] = Field([], description="that a spec may name")
    controls: list[str] = Field([], description="control nets that a spec may name")
    takes: list[str] = Field([], description="what a spec may ask for beside text: see docs/inputs.md")
    measured: list[Measured] = Field([], description="on devices of this farm, newest only")


class ModelListed(Answer):
    """A model, as OpenAI's API lists them."""

    id: str
    object: str = "model"
    created: int = Field(0, description="always 0: models are part of the farm's catalog")
    owned_by: str = "farm"


class Models(Answer):
    models: list[Model]
    object: str = "list"
    data: list[ModelListed] = Field([], description="the same, as OpenAI's API lists them")


class Caller(Answer):
    """The account and the API key a request came with."""

    id: str
    name: str
    currency: str
    key: str
    role: str = Field(description="read, submit or admin; each may what the one before may")
    scopes: list[str] = Field([], description="what the key may do")
    # clients of Replicate ask here too
    type: str = Field("organization", description="for clients of Replicate")
    username: str = Field("", description="the name, for clients of Replicate")
    github_url: None = None


class Account(Answer):
    """Who pays."""

    id: str
    name: str
    currency: str
    weight: int
    created_at: datetime
    retention_days: int | None = Field(None, description="images go so long after a job's end; null: never")
    prompt_in_images: bool = Field(False, description="whether image files carry their prompt")


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
    name: str | None = None
    scopes: list[str] = Field([], description="what it may do")
    expires_at: datetime | None = Field(None, description="it opens nothing from then on")
    previous_until: datetime | None = Field(None, description="the secret before this one opens until then")
    last_used_at: datetime | None = Field(None, description="within a minute or two; null: never")


class Keys(Answer):
    keys: list[Key]


class NewKey(Key):
    api_key: str = Field(description="the key's text, shown this once")


class Rates(Answer):
    """Requests a second, in the long run."""

    reads_per_s: float = Field(description="GET and HEAD")
    writes_per_s: float = Field(description="everything else")
    submissions_per_s: float = Field(description="of those, what makes jobs")
    burst_s: float = Field(description="what was not used for so many seconds may be used at once")


class Filled(Answer):
    """What there is of something that is limited."""

    used: int
    allowed: int


class Limits(Answer):
    """What an account may do at most, and what of it is used."""

    account: str
    key: str | None = Field(description="the API key these rates are for; null: none but the account's")
    account_rates: Rates
    key_rates: Rates | None
    open_frames: Filled = Field(description="frames that have not ended")
    inputs: Filled = Field(description="input images")
    input_bytes: Filled


class PackInHand(Answer):
    """Frames a worker renders together just now."""

    id: str = Field(description="a number, but beyond what JavaScript can hold")
    model: str
    priority: int
    frames: int
    claimed_at: datetime
    lease_until: datetime


class Ailment(Answer):
    """What a worker does not claim for a while: it was seen to fail there."""

    model: str | None = Field(description="null: its device, and so every model")
    reason: str
    since: datetime
    until: datetime = Field(description="it tries again then; a device has to compute right first")


class Worker(Answer):
    """One process on one GPU."""

    id: str
    pool: str
    models: list[str]
    device: str
    state: str = Field(description="up, sick, draining or gone")
    started_at: datetime
    seen_at: datetime
    packs: list[PackInHand]
    ailments: list[Ailment] = []


class Workers(Answer):
    workers: list[Worker]


class Violation(Answer):
    """A fact of the books that is not as it must be."""

    violation: str
    subject: str
    detail: str


class Unseen(Answer):
    """What an audit cannot look at, because it is not there any more."""

    what: str = Field(examples=["usage of 2026-03"])
    detail: str


class Audit(Answer):
    violations: list[Violation]
    unseen: list[Unseen] = Field([], description="months that were detached, and events before the oldest")


class ImagesAudit(Answer):
    """What was found of stored images; a page of them, or a sample."""

    checked: int
    violations: list[Violation]
    next: int | None = Field(description="send it as ?after= for the next page; null: there is none")


class Reversal(Answer):
    """A charge that was taken back."""

    frame: str
    amount: str = Field(description="what it had been")
    currency: str
    reason: str
    at: datetime


class UsageEntry(Answer):
    """A row of usage, as it is exported: a charge, or the reversal of one. It never changes."""

    cursor: str = Field(description="send it as ?cursor= for what came after this row")
    frame: str
    kind: str = Field(description="charge or reversal; a reversal's amount is negative")
    job: str
    model: str
    method: str
    currency: str
    rate: str
    quantity: int = Field(description="less than 0 in a reversal")
    amount: str
    at: datetime


class HourlyLine(Answer):
    """What was used in one hour of one model at one rate."""

    id: str = Field(
        description="the same for the same hour, model, method, currency and rate: an idempotency key"
    )
    hour: datetime
    model: str
    method: str
    currency: str
    rate: str
    frames: int
    reversed: int = Field(description="charges taken back in that hour")
    quantity: int = Field(description="less what was reversed; may be below 0")
    amount: str
    final: bool = Field(description="whether nothing can be added to it any more")


class Hourly(Answer):
    since: datetime = Field(description="the start of an hour")
    until: datetime = Field(description="the start of an hour, which is not part of it")
    lines: list[HourlyLine]


class StatementLine(Answer):
    """What was used of one model by one method at one rate."""

    model: str
    method: str = Field(description="mpx_step: quantity is pixels times steps, rate per 2**20; else images")
    rate: str
    frames: int = Field(description="images charged")
    reversed: int = Field(description="charges taken back")
    late: int = Field(description="of both, those from months that had been closed")
    quantity: int = Field(description="less what was reversed")
    exact: str = Field(description="quantity at this rate, to the last digit")
    amount: str = Field(description="rounded to the currency's minor unit, so that lines add up to the total")


class Statement(Answer):
    """What an account owes for a month."""

    account: str
    month: str = Field(examples=["2026-11"])
    status: str = Field(description="open: a draft; closing: as good as; closed: for good")
    currency: str
    lines: list[StatementLine]
    exact: str = Field(description="the sum before it was rounded")
    total: str
    closed_at: datetime | None


class StatementSummary(Answer):
    account: str
    month: str
    currency: str
    total: str
    closed_at: datetime | None


class Statements(Answer):
    statements: list[StatementSummary]


class DatedPrice(Answer):
    """What one unit costs from a moment on, until the next price starts."""

    model: str
    method: str = Field(
        description="mpx_step: a megapixel (2**20 pixels) for one step; image; reuse: of a known image"
    )
    currency: str
    rate: str
    account: str | None = Field(description="whose price it is; null: everybody's without one of their own")
    version: int = Field(description="counts up from the first price of this model")
    starts_at: datetime
    ends_at: datetime | None = Field(description="null: no other is planned")
    source: str = Field(description="catalog, or admin")
    set_at: datetime


class Prices(Answer):
    prices: list[DatedPrice]


class QuoteLine(Answer):
    """What a job asks of one model, and what that costs at most."""

    model: str
    method: str
    rate: str
    frames: int
    quantity: int = Field(description="pixels times steps, or images")
    amount: str


class Room(Answer):
    """What a budget has left for a job, in the words of the 402 that refuses one."""

    budget: str = Field(description="account, or key: the API key's own")
    period: str = Field(description="month: a calendar month, UTC; total: all time")
    currency: str
    limit: str
    left: str = Field(description="what may still be submitted")
    needed: str = Field(description="what the job costs at most")
    refused: str | None = Field(description="why it would be refused now; null: it would not")


class Quote(Answer):
    """What a job costs at most: to be submitted against, once, until it expires."""

    id: str = Field(examples=["quo_0192f0c1a2b37c4d8e5f6a7b8c000000"])
    frames: int
    currency: str
    amount: str
    lines: list[QuoteLine]
    expires_at: datetime
    expected_start: datetime | None = Field(
        description="if nothing more urgent comes; null: nothing was measured"
    )
    expected_end: datetime | None
    fits: bool = Field(True, description="whether every budget has room for it now; submitting asks again")
    budgets: list[Room] = Field([], description="the account's and the API key's; none: no limit")


class Threshold(Answer):
    """What happens once that much of a budget was charged."""

    percent: int
    action: str = Field(
        description="notify; stop: admit nothing more; drain: and pause; cancel: and end the queued"
    )
    reached_at: datetime | None


class Budget(Answer):
    """What may be spent, and what of it is gone: spent and held together stay within the limit."""

    key: str | None = Field(description="the API key it is of; null: of the whole account")
    period: str = Field(description="month: a calendar month, UTC; total: all time")
    month: str | None = Field(description="the present one", examples=["2026-11"])
    currency: str
    limit: str
    spent: str
    held: str = Field(description="what open frames may still cost")
    left: str = Field(description="what may still be submitted")
    stopped: bool = Field(description="a threshold was reached that lets nothing more in")
    thresholds: list[Threshold]


class Budgets(Answer):
    account: str
    budgets: list[Budget]


class MarginShare(Answer):
    """What one model, pool or account brought in, and the GPU time it took."""

    name: str
    frames: int
    reversed: int
    revenue: dict[str, str] = Field(description="amount by currency")
    gpu_s: str = Field(description="seconds of GPU time of delivered frames, to the microsecond")
    gpu_s_by_currency: dict[str, str] = Field(description="the same by the currency of who got the frames")
    undelivered_s: str = Field(description="seconds of the same packs for other frames; the farm's own")
    per_gpu_hour: dict[str, str] = Field(
        description="revenue for an hour of delivered GPU time, both of one currency's accounts, rounded"
    )


class PoolTime(Answer):
    """How long a pool's workers were there, and what for: the three parts are all of it."""

    name: str
    up_s: str
    delivered_s: str
    undelivered_s: str
    other_s: str = Field(description="cold starts, waiting for work, packs that failed or were lost")


class Margin(Answer):
    since: datetime
    until: datetime
    models: list[MarginShare]
    pools: list[MarginShare]
    accounts: list[MarginShare]
    time: list[PoolTime]
