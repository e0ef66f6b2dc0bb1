"""The random model of packing.py as one that goes step by step, in a catalog of the benchmark's own."""

import os
from pathlib import Path

from benchmarks import harness
from farm import pricing
from farm.catalog import BUILTIN, catalog
from farm.db import transaction
from farm.settings import settings

MODEL = "random-1m"
KNEE_ROWS = 6  # of a tick with an urgent frame in it
ENTRY = """
[models.random-1m]
title = "random weights, step by step"
family = "sd"
engine = "step"
packs_by = "shape"
source = "dir:{checkpoint}"
revision = "random"
licence = "none"
dtype = "float32"
side = {{ min = 64, max = 64, multiple = 8, default = 64 }}
steps = {{ min = 1, max = 100, default = 20 }}
guidance = {{ min = 0.0, max = 30.0, default = 4.0 }}
sampler = "dpm++2m"
pack = {{ frames = 16, pixels = 131072, rows = 32, knee = {knee} }}
pool = "random-1m"
price = {{ method = "image", rate = "0.001", currency = "USD" }}
"""


def add_stepwise(folder: Path, *, knee_rows: int = KNEE_ROWS) -> None:
    """Save the model's checkpoint, and add it to the catalog."""
    from tests.tiny import tiny_sd

    checkpoint = tiny_sd(folder / MODEL, block_out_channels=(32, 64))
    path = folder / "catalog.toml"
    entry = ENTRY.format(checkpoint=checkpoint, knee=knee_rows * 64 * 64)
    path.write_text((settings().catalog or BUILTIN).read_text() + entry)
    os.environ["FARM_CATALOG"] = str(path)
    harness.forget()
    with transaction() as db:
        pricing.sync(db, catalog())
