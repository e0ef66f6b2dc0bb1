"""ComfyUI, as a server: graphs of its simple text-to-image and image-to-image surface, their queue, history and files.

graph.py walks a graph from what it saves to what the farm renders; nodes.py has the nodes it accepts, and any other is
refused by name. A key comes as Basic's password, or in the path: http://farm/k/farm_…/prompt.
"""

from fastapi import APIRouter

from farm.api.dialects.comfyui import files, lists, prompts, socket
from farm.api.dialects.comfyui.errors import ComfyRefusal

BODIES = (prompts.ComfyPrompt, prompts.ComfyDrop, prompts.ComfyInterrupt, ComfyRefusal)

_surface = APIRouter()
for _part in (prompts, files, lists, socket):
    _surface.include_router(_part.router)

router = APIRouter()
router.include_router(_surface)
router.include_router(_surface, prefix="/api", include_in_schema=False)  # as its own pages ask
