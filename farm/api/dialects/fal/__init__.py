"""fal: its queue, and the host that runs at once.

An app is a model by the name fal has for it, `fal-ai/flux/schnell`, or by the farm's own, `farm/starter`. A host whose
name begins with `queue.` queues, one that begins with `run.` or `fal.` answers with the images; where there is but one
host, `/fal/queue/` and `/fal/run/` before the app say which, and without them it is queued.
"""

from farm.api.dialects.fal.asked import FalInput
from farm.api.dialects.fal.errors import FalRefusal
from farm.api.dialects.fal.requests import router

__all__ = ["BODIES", "router"]

BODIES = (FalInput, FalRefusal)
