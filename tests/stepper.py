"""`python -m tests.stepper NAME MODEL`: a worker of one model, read from a JSON file, without Celery."""

import logging
import sys
from pathlib import Path

from farm.catalog import Model
from workers.gpu import limit_threads
from workers.run import Worker

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    limit_threads()
    model = Model.model_validate_json(Path(sys.argv[2]).read_text())
    Worker(sys.argv[1], pool=model.pool, models=[model], device="cpu").burst(lambda _: None)
