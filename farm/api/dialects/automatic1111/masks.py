"""Masks as the web UI uses them: soft edges, the part around them at full size, what surrounds them under them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.concurrency import run_in_threadpool

from farm import inpaint, inputs
from farm.accounts import Caller
from farm.api.dialects.automatic1111.asked import Img2Img
from farm.api.inputs import given, kept
from farm.catalog import Model
from farm.db import transaction
from farm.errors import Fault, Invalid
from farm.features import Given
from farm.inpaint import Touch
from farm.settings import settings
from farm.storage import open_store


@dataclass(frozen=True, slots=True)
class Masked:
    """An image and its mask, as files, and how the mask is used."""

    image: bytes
    mask: bytes
    touch: Touch

    def laid_over(self, pictures: list[bytes]) -> list[bytes]:
        """What was painted, over the image it started from."""
        return inpaint.paste(self.image, self.mask, self.touch, pictures)


async def masked(caller: Caller, asked: Img2Img, spec: dict[str, Any], model: Model) -> Masked | None:
    """What a mask makes of an image: what is painted, and where, stand in the spec then.

    None where the farm does itself what is asked for: no mask, or one with hard edges of the whole picture, from the
    picture. Raises Invalid for a mask of another size, or one that leaves nothing to be painted.
    """
    touch = _touch(asked, spec, model)
    if touch is None:
        return None
    image = await given(caller, spec["image"], field="init_images")
    mask = await given(caller, spec["mask"], field="mask")
    one = Masked(*await run_in_threadpool(_files, caller, image, mask), touch)
    try:
        start, where = await run_in_threadpool(inpaint.cut, one.image, one.mask, touch)
    except ValueError as e:
        raise Invalid([Fault("mask", None, str(e))]) from None
    for name, file in (("image", start), ("mask", where)):
        spec[name] = f"sha256:{(await kept(caller, file, 'image/png', field=name)).sha256}"
    return one


def _touch(asked: Img2Img, spec: Mapping[str, Any], model: Model) -> Touch | None:
    if asked.mask is None:
        return None
    both = 4 if asked.mask_blur is None else asked.mask_blur  # what is left out is as there
    x = both if asked.mask_blur_x is None or asked.mask_blur is not None else asked.mask_blur_x
    y = both if asked.mask_blur_y is None or asked.mask_blur is not None else asked.mask_blur_y
    zoom, fill = asked.inpaint_full_res not in (False, 0), not asked.inpainting_fill
    inverted = bool(asked.inpainting_mask_invert)
    if not (x or y or zoom or fill or inverted):
        return None
    return Touch(
        width=spec["width"] or model.side.default,
        height=spec["height"] or model.side.default,
        blur_x=x,
        blur_y=y,
        inverted=inverted,
        zoom=zoom,
        padding=asked.inpaint_full_res_padding or 0,
        fill=fill,
        fit=asked.resize_mode == 1,
    )


def _files(caller: Caller, image: Given, mask: Given) -> tuple[bytes, bytes]:
    names = [f"sha256:{one.sha256}" for one in (image, mask)]
    with transaction() as db:
        places = inputs.files(db, caller.account_id, names)
    store = open_store(settings().storage_url.get_secret_value())
    return store.get(places[names[0]]), store.get(places[names[1]])
