"""How often the denoiser ran: an image that took fewer forwards than its steps was not rendered."""

from typing import Any


class Forwards:
    """Counts the forwards of a denoiser."""

    def __init__(self, denoiser: Any) -> None:
        self._count = 0
        denoiser.register_forward_hook(self._add)

    def start(self) -> None:
        self._count = 0

    def too_few(self, steps: int) -> str:
        """Say what is wrong after a call of so many steps; "" if nothing is."""
        if self._count >= steps:
            return ""
        return f"the image came too fast: the denoiser ran {self._count} times, its steps are {steps}"

    def _add(self, *_: Any) -> None:
        self._count += 1
