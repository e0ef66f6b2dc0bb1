"""What an image was made of, and making it once more."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from uuid import UUID

from PIL import Image as Picture
from PIL import ImageChops
from sqlalchemy.orm import Session

from farm import ids, jobs, submissions
from farm.accounts import Caller
from farm.catalog import Catalog, catalog
from farm.errors import Conflict, NotFound
from farm.queue import FrameStatus
from farm.spec import UNSEEN, Asked, Spec, fingerprint
from farm.storage import Store
from farm.tables import Frame, Image, Job, Pack


@dataclass(frozen=True, slots=True)
class Origin:
    """A frame and what its image was made with.

    engine: versions of farm, diffusers and torch, the model's revision and its dtype, as the worker said when it
    claimed the pack; None while there is no image, or where no worker said so.
    """

    frame: Frame
    image: Image | None
    engine: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A frame that was rendered again, against the one it was meant to repeat.

    versions: what rendered it, where it differs: before and now. keys: of the two files.
    """

    of: Origin
    same_pixels: bool
    same_file: bool
    versions: Mapping[str, tuple[Any, Any]]
    keys: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two images are apart: in levels of 255 of any channel, and in how many pixels."""

    largest: int
    pixels: int


def find(db: Session, account_id: UUID, frame_id: UUID) -> Origin:
    """What made the image of one of the account's frames; also of one whose file was deleted since.

    Raises NotFound for another account's as for one that does not exist.
    """
    return _origin(db, jobs.find_frame(db, account_id, frame_id))


def _origin(db: Session, frame: Frame) -> Origin:
    image = None if frame.image_id is None else db.get_one(Image, frame.image_id)
    pack = None if image is None or image.pack_id is None else db.get(Pack, image.pack_id)
    return Origin(frame, image, None if pack is None else pack.engine)


def compare(db: Session, again: Origin) -> Comparison | None:
    """The rendering again against the first; None if it is none, or if one of them has no image."""
    first_id = db.get_one(Job, again.frame.job_id).rerender_of
    if first_id is None or again.image is None:
        return None
    try:
        first = find(db, again.frame.account_id, first_id)
    except NotFound:  # its month has left
        return None
    if first.image is None:
        return None
    before, now = first.engine or {}, again.engine or {}
    names = sorted(before.keys() | now.keys())
    return Comparison(
        of=first,
        same_pixels=first.image.pixel_sha256 == again.image.pixel_sha256,
        same_file=first.image.sha256 == again.image.sha256,
        versions={n: (before.get(n), now.get(n)) for n in names if before.get(n) != now.get(n)},
        keys=(first.image.key, again.image.key),
    )


def measure(store: Store, compared: Comparison) -> Difference | None:
    """How far the two images are apart, as their files show them; None if a file is gone, or they differ in size.

    Reads both files unless their pixels are known to be the same: hold no transaction. Raises what the store raises.
    """
    if compared.same_pixels:
        return Difference(0, 0)
    try:
        first, again = (Picture.open(BytesIO(store.get(key))).convert("RGB") for key in compared.keys)
    except NotFound:
        return None
    if first.size != again.size:
        return None
    red, green, blue = ImageChops.difference(first, again).split()
    levels = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()
    return Difference(max(level for level, count in enumerate(levels) if count), sum(levels[1:]))


def rerender(
    db: Session,
    caller: Caller,
    frame_id: UUID,
    *,
    idempotency_key: str | None = None,
    body_sha256: bytes = b"",
    models: Catalog | None = None,
) -> tuple[UUID, bool]:
    """Render a done frame's spec and seed once more, as a job of one frame that reuses nothing.

    Returns as submissions.submit. Raises NotFound, or Conflict if there is no image to compare with, or if the farm
    serves the model no more as it was.
    """
    frame = jobs.find_frame(db, caller.account_id, frame_id)
    name = ids.public("frm", frame_id)
    if frame.status != FrameStatus.DONE:
        raise Conflict(f"this frame has no image to compare with: it is {frame.status}", frame=name)
    spec, served = Spec.from_json(frame.spec), models or catalog()
    model = served.get(spec.model)
    if model is None or fingerprint(spec, model, frame.seed) != frame.fingerprint:
        raise Conflict(
            f"the farm does not serve {spec.model} any more as it was when this frame was made", frame=name
        )
    said = {name: value for name, value in spec.to_json().items() if name not in UNSEEN}  # words are final
    asked = Asked.model_validate({**said, "seed": frame.seed})
    return submissions.submit(
        db,
        caller,
        submissions.Submission(spec=asked, name=f"rerender of {name}", reuse=False),
        idempotency_key=idempotency_key,
        body_sha256=body_sha256,
        models=models,
        rerender_of=frame_id,
    )
