"""What is sent to the callbacks of jobs that came through another API: the payload its clients understand.

A dialect binds its job's callback as webhooks.ShapedCallback with one of these names, and `farm deliver` calls the
function in the transaction that reads the event; None: that API tells nobody of this.
"""

from collections.abc import Mapping

from farm.api.dialects.fal import shown as fal
from farm.api.dialects.replicate import shown as replicate
from farm.webhooks import Shape

SHAPES: Mapping[str, Shape] = {"replicate": replicate.payload, "fal": fal.payload}
