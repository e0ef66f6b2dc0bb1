"""Run a module for as long as whoever started it lives.

    python -m farm.lifeline PATIENCE_S MODULE ARGUMENTS…

Standard input is a pipe whose other end the parent holds and never writes to. The kernel closes it with the
parent, however that one died; then this process is asked to end, once and again, and at last is killed.
"""

import os
import runpy
import sys
import threading
import time
from signal import SIGKILL, SIGTERM


def _end_with_parent(patience_s: float) -> None:
    while os.read(0, 1):
        pass
    # a worker drains at the first, and gives everything back at the second
    for number in (SIGTERM, SIGTERM, SIGKILL):
        os.kill(os.getpid(), number)
        time.sleep(patience_s)


def main() -> None:
    patience_s, module = float(sys.argv[1]), sys.argv[2]
    threading.Thread(target=_end_with_parent, args=(patience_s,), name="lifeline", daemon=True).start()
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
