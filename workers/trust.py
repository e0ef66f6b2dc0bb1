"""Whose fault it is: a frame's, a model's or the device's, by what went well beside it.

A frame is to blame while its model renders others here, or a plain one. A model is to blame when it renders nothing
any more, nothing plain either, and the device still computes right: then it is set aside. The device is to blame
when it does not, when its driver fails again and again, or when nothing of several models comes out well: then this
worker claims nothing. Both are forgiven after a pause that doubles each time, the device only if it computes right by
then.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

log = logging.getLogger(__name__)

IN_A_ROW = 3  # failures of as many frames, and nothing good between them; after a pause one is enough
MODEL_S = 60.0  # the first pause of a model
DEVICE_S = 120.0  # and of a device
PAUSE_MAX_S = 3600.0
TOO_FAST = 0.1  # of the time measured for one frame: nothing renders in that
DEVICE = ""  # where a model's name would stand


class Blame(StrEnum):
    """Who took a pack down; only a frame's attempts are counted."""

    FRAME = "frame"
    MODEL = "model"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Ailment:
    """What is not claimed for a while."""

    model: str  # DEVICE: everything
    reason: str
    times: int  # in a row; 0: all is well again
    pause_s: float  # 0: it is only remembered, for the next time


@dataclass(slots=True)
class _Patient:
    """A model, or the device."""

    failed: set[Hashable] = field(default_factory=set)  # frames, since something was good
    incidents: int = 0
    times: int = 0
    until: float = 0.0
    reason: str = ""


class Trust:
    """What one worker has seen go well and go wrong. Any thread may call it."""

    def __init__(
        self,
        *,
        probe: Callable[[], str],
        try_model: Callable[[str], str] = lambda model: "it renders nothing",
        tell: Callable[[Ailment], None] = lambda ailment: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """probe: says what is wrong with the device, "" if it computes right. tell: hears what is set aside.

        try_model: says what is wrong with a plain image of a model, "" if it comes out well. One account's broken
        frames in a row must not take a model away from the others.
        """
        self._probe = probe
        self._try_model = try_model
        self._tell = tell
        self._clock = clock
        self._lock = threading.RLock()
        self._models: dict[str, _Patient] = {}
        self._device = _Patient()
        self._failing: set[str] = set()  # models set aside for their images, since anything was good

    # ------------------------------------------------------------------------------------------ may it

    def may(self, model: str) -> bool:
        """Whether to claim work of a model now. A device whose pause is over is probed first."""
        with self._lock:
            return self._is_well() and self._models.get(model, _Patient()).until <= self._clock()

    @property
    def sick(self) -> str:
        """Why nothing is claimed; "" if something is."""
        with self._lock:
            return "" if self._is_well() else self._device.reason

    def _is_well(self) -> bool:
        device = self._device
        if not device.until:
            return True
        if device.until > self._clock():
            return False
        if wrong := self._probe():
            self._set_aside(DEVICE, device, wrong, DEVICE_S)
            return False
        device.until = 0.0
        log.info("the device computes right again: claiming")
        return True

    # ------------------------------------------------------------------------------------------ evidence

    def good(self, model: str) -> None:
        """Images of a model came out well: it and the device are fine."""
        with self._lock:
            for name, patient in ((model, self._models.pop(model, None)), (DEVICE, self._device)):
                if patient is not None and patient.times:
                    self._tell(Ailment(name, "", 0, 0.0))
            self._device = _Patient()
            self._failing.clear()

    def bad(self, model: str, frames: Collection[Hashable], reason: str) -> Blame:
        """Frames went down together, or one alone. Returns who is to blame."""
        with self._lock:
            patient = self._models.setdefault(model, _Patient())
            for known, blame in ((self._device, Blame.DEVICE), (patient, Blame.MODEL)):
                if known.until > self._clock():  # what was in flight when it was set aside
                    return blame
            patient.failed.update(frames)
            patient.incidents += 1
            patient.reason = reason
            if min(patient.incidents, len(patient.failed)) < (1 if patient.times else IN_A_ROW):
                return Blame.FRAME
            if wrong := self._probe():
                return self._device_is_sick(wrong)
            if not self._try_model(model):
                self.good(model)
                return Blame.FRAME
            self._failing.add(model)
            if len(self._failing) > 1:
                return self._device_is_sick(
                    f"nothing of {len(self._failing)} models comes out well: {reason}"
                )
            self._set_aside(model, patient, reason, MODEL_S)
            return Blame.MODEL

    def engine_failed(self, model: str, frames: Collection[Hashable], error: Exception) -> Blame:
        """The engine failed with these frames on it. Returns who is to blame."""
        reason = f"{type(error).__name__}: {error}"
        return self.device_failed(reason) if is_device_error(error) else self.bad(model, frames, reason)

    def cannot_load(self, model: str, reason: str) -> None:
        """A checkpoint would not load: the model is set aside."""
        with self._lock:
            self._set_aside(model, self._models.setdefault(model, _Patient()), reason, MODEL_S)

    def device_failed(self, reason: str) -> Blame:
        """The driver reported an error, and this process has to end.

        Once it may be what a frame made the device do; in a row it is the device.
        """
        with self._lock:
            device = self._device
            if device.times:
                return self._device_is_sick(reason)
            device.times, device.reason = 1, reason
            self._tell(Ailment(DEVICE, reason, 1, 0.0))
            return Blame.FRAME

    def remember(self, ailments: Mapping[str, tuple[str, int, float]]) -> None:
        """Take over what an earlier process of this worker told: by model reason, times, seconds still to go."""
        with self._lock:
            for model, (reason, times, left_s) in ailments.items():
                patient = self._device if model == DEVICE else self._models.setdefault(model, _Patient())
                patient.reason, patient.times = reason, times
                patient.until = self._clock() + left_s if left_s > 0 else 0.0

    def _device_is_sick(self, reason: str) -> Blame:
        self._models.clear()
        self._failing.clear()
        self._set_aside(DEVICE, self._device, reason, DEVICE_S)
        return Blame.DEVICE

    def _set_aside(self, model: str, patient: _Patient, reason: str, first_s: float) -> None:
        patient.times += 1
        pause_s = min(PAUSE_MAX_S, first_s * 2 ** (patient.times - 1))
        patient.until, patient.reason = self._clock() + pause_s, reason
        patient.failed.clear()
        patient.incidents = 0
        name = f"model {model}" if model else "the device"
        log.error("%s is set aside for %.0f s: %s", name, pause_s, reason)
        self._tell(Ailment(model, reason, patient.times, pause_s))


def is_device_error(error: Exception) -> bool:
    """Whether the CUDA context is lost with this: every later call would fail, on whatever frame."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def too_fast(seconds: float, *, measured_s: float) -> str:
    """Say what is wrong with a frame that came sooner than it can; "" if nothing is.

    measured_s: of one frame of this size and these steps, as verify measured it; 0 if it never did.
    """
    if seconds >= TOO_FAST * measured_s:
        return ""
    return f"the image came after {seconds:.3f} s; one takes {measured_s:.3f} s on this device"
