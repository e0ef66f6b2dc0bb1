"""`python -m tests.chaos.node STEP_S …`: `python -m workers …` with the fake engine."""

import sys

from tests.chaos import engine
from workers.__main__ import main

if __name__ == "__main__":
    engine.install(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
