"""When a worker stops: first it drains, and once its grace is over it gives everything back."""

import threading

from farm.settings import settings


class Stop:
    """Whether a worker drains, and whether it quits."""

    def __init__(self) -> None:
        self.drain = threading.Event()
        self.quit = threading.Event()

    @property
    def draining(self) -> bool:
        return self.drain.is_set()

    @property
    def quitting(self) -> bool:
        return self.quit.is_set()

    def tell(self) -> None:
        """Drain: claim no more, and finish within the grace what cannot go on elsewhere. The second time: quit now."""
        if self.drain.is_set():
            self.quit.set()
            return
        self.drain.set()
        grace = threading.Timer(settings().grace_s, self.quit.set)
        grace.daemon = True
        grace.start()
