"""AUTOMATIC1111's web UI: /sdapi/v1/txt2img and img2img, what they may name, how far they are, and interrupt.

A key comes as Basic's password, or in the path: /k/farm_…/sdapi/v1/. The checkpoint is chosen a request, by
override_settings: there is no setting that one user could change under another. What a field asks for that the farm
has not is refused by its name; the same field at the value that means nothing of the kind is taken.
"""

from fastapi import APIRouter

from farm.api.dialects.automatic1111 import images, lists, standing
from farm.api.dialects.automatic1111.asked import Img2Img, Txt2Img
from farm.api.dialects.automatic1111.errors import WebuiRefusal

BODIES = (Txt2Img, Img2Img, lists.WebuiSettings, WebuiRefusal)

router = APIRouter()
for _part in (images, standing, lists):
    router.include_router(_part.router)
