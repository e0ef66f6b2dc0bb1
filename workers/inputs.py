"""What frames start from, fetched and decoded off the device's thread: init images, masks, control images, LoRAs.

Frames of a job mostly share theirs, so that what was decoded last is kept, bounded by its bytes.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from farm import inputs
from farm.catalog import Model
from farm.errors import Away, NotFound, RenderFailed
from farm.picture import FORMATS, MAX_PIXELS
from farm.queue import ClaimedFrame
from farm.storage import Store
from workers.books import book
from workers.edges import canny
from workers.engine import Ask, Inputs
from workers.engine.weights import lora_file

log = logging.getLogger(__name__)

RETRY_S = 1.0
KEPT_BYTES = 256 << 20

Decoded = NDArray[np.uint8]
WHITE = (255, 255, 255)


class InputReader:
    """Turns claimed frames into what an engine is asked. Threads may share it."""

    def __init__(self, store: Store, models: Sequence[Model], *, give_up: threading.Event) -> None:
        self._store = store
        self._models = {m.name: m for m in models}
        self._give_up = give_up
        self._kept: OrderedDict[tuple[Any, ...], Decoded] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = 0

    def asks(self, frames: Sequence[ClaimedFrame]) -> list[Ask | RenderFailed]:
        """Each frame with its inputs, or why it cannot have them: the others are not harmed by that."""
        found: list[Ask | RenderFailed] = []
        for frame in frames:
            try:
                found.append(self.ask(frame))
            except RenderFailed as e:
                found.append(e)
        return found

    def ask(self, frame: ClaimedFrame) -> Ask:
        """One frame with its inputs. A store or a database that is away is waited for.

        Raises RenderFailed if an input is gone, damaged, or not what the catalog says.
        """
        spec = frame.spec
        if not (spec.image or spec.control or spec.loras):
            return Ask(spec, frame.seed)
        size = (spec.width, spec.height)

        def get(ref: str, how: str, prepare: Callable[[Image.Image], Decoded]) -> Decoded:
            key = (frame.account_id, ref, how, size)
            return self._cached(key, lambda: prepare(_opened(self._bytes_of(frame.account_id, ref), ref)))

        return Ask(
            spec,
            frame.seed,
            Inputs(
                image=get(spec.image, "image", lambda i: _fitted(_rgb(i), size)) if spec.image else None,
                mask=get(spec.mask, "mask", lambda i: _fitted(_grey(i), size)) if spec.mask else None,
                controls=tuple(
                    get(c.image, f"control {c.sketch}", lambda i, c=c: _control(i, c.sketch, size))  # type: ignore[misc]
                    for c in spec.control
                ),
                loras=tuple(lora_file(self._models[spec.model], use) for use in spec.loras),
            ),
        )

    def _cached(self, key: tuple[Any, ...], make: Callable[[], Decoded]) -> Decoded:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        made.flags.writeable = False
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._bytes += made.nbytes
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return made

    def _bytes_of(self, account_id: UUID, ref: str) -> bytes:
        places = book(lambda db: inputs.files(db, account_id, [ref]), give_up=self._give_up)
        if places is None:
            raise RenderFailed("the worker stops")
        if ref not in places:
            raise RenderFailed(f"the input {ref} was removed")
        for _ in range(2):  # what came damaged may only have been damaged on its way
            data = self._fetched(places[ref], ref)
            if hashlib.sha256(data).hexdigest() == ref.removeprefix("sha256:"):
                return data
        raise RenderFailed(f"the input {ref} is damaged in the store")

    def _fetched(self, key: str, ref: str) -> bytes:
        while True:
            try:
                return self._store.get(key)
            except NotFound:
                raise RenderFailed(f"the input {ref} is not in the store") from None
            except Away as e:
                log.warning("store is away, waiting for input %s: %s", ref, e)
                if self._give_up.wait(RETRY_S):
                    raise RenderFailed("the worker stops") from e


# ------------------------------------------------------------------------------------------------ to decode


def _opened(data: bytes, ref: str) -> Image.Image:
    """Decode what was looked at when it was sent; turned as its EXIF data says."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("too large")
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as e:
        raise RenderFailed(f"the input {ref} cannot be decoded: {e}") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Colours; what is transparent is white."""
    if image.has_transparency_data:
        shown = Image.new("RGBA", image.size, (*WHITE, 255))
        shown.alpha_composite(image.convert("RGBA"))
        image = shown
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Brightness; what is transparent is black: kept."""
    if image.has_transparency_data:
        shown = Image.new("RGBA", image.size, (0, 0, 0, 255))
        shown.alpha_composite(image.convert("RGBA"))
        image = shown
    return image.convert("L")


def _fitted(image: Image.Image, size: tuple[int, int]) -> Decoded:
    """Scaled to cover the size and cut evenly on both sides; one that has it stays as it is."""
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return np.array(image)


def _control(image: Image.Image, sketch: bool, size: tuple[int, int]) -> Decoded:
    pixels = _fitted(_rgb(image), size)
    return np.repeat(canny(pixels)[..., None], 3, axis=2) if sketch else pixels
