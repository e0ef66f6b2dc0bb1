"""Replicate: predictions, by version and by model, as `replicate.run()` and its webhooks expect them.

When `Prefer: wait` runs out the status is said to be `starting`, whatever it is: at `processing` the client takes the
output for there, and gives None. A prediction that was stopped is `canceled`, never `aborted`.
"""

from fastapi import APIRouter

from farm.api.dialects.replicate import about, predictions
from farm.api.dialects.replicate.asked import ModelPrediction, Prediction
from farm.api.dialects.replicate.errors import ReplicateRefusal

BODIES = (Prediction, ModelPrediction, ReplicateRefusal)

router = APIRouter()
router.include_router(predictions.router)
router.include_router(about.router)
