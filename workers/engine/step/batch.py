"""The rows of one forward: frames side by side, guided ones twice, and padding where a row count must be fixed."""

from collections.abc import Sequence

import torch

from workers.engine.step.families.family import Rows
from workers.engine.step.record import Record


class Batch:
    """Frames that share forwards. What does not change from step to step is laid out once."""

    def __init__(self, records: Sequence[Record], *, padded: int, device: str) -> None:
        """Lay out the rows of these frames; padded: how many rows the forward is to have, or fewer to take none."""
        self.records = list(records)
        self.rows = sum(r.rows for r in records)
        self._padding = max(0, padded - self.rows)
        self._any_guided = any(r.rows > 1 for r in records)
        owners = [k for k, r in enumerate(records) for _ in range(r.rows)]
        last = [row for row, k in enumerate(owners) if row + 1 == self.rows or owners[row + 1] != k]
        first = [row - r.rows + 1 for row, r in zip(last, records, strict=True)]
        self._plain = owners == list(range(len(records))) and not self._padding
        self._owners = torch.tensor(owners + [0] * self._padding, device=device)
        self._first = torch.tensor(first, device=device)
        self._last = torch.tensor(last, device=device)
        dims = (1,) * (records[0].latents.ndim - 1)
        scales = [r.guidance for r in records]
        self._scales = torch.tensor(scales, dtype=torch.float32, device=device).view(-1, *dims)
        names = records[0].conditions
        self._conditions = {name: self._laid([r.conditions[name] for r in records]) for name in names}

    def _laid(self, parts: list[torch.Tensor]) -> torch.Tensor:
        padding = [parts[0][:1].expand(self._padding, *parts[0].shape[1:])] if self._padding else []
        return torch.cat([*parts, *padding])

    def is_of(self, records: Sequence[Record]) -> bool:
        """Whether it was laid out for exactly these frames."""
        return len(records) == len(self.records) and all(
            a is b for a, b in zip(records, self.records, strict=True)
        )

    def inputs(self) -> Rows:
        """What the denoiser takes for the frames' next steps."""
        records = self.records
        sample = torch.cat([r.scaled() for r in records])
        if not self._plain:
            sample = sample.index_select(0, self._owners)
        times = [r.times[r.index] for r in records for _ in range(r.rows)]
        times += times[:1] * self._padding
        vector = torch.tensor(times, dtype=torch.float32, device=sample.device)
        return Rows(sample, vector, self._conditions, records[0].shape)

    def guided(self, predicted: torch.Tensor) -> Sequence[torch.Tensor]:
        """What each frame's sampler takes, (1, …), from what the denoiser predicted for all rows.

        As in the stock pipelines: computed in float32 and rounded once. A frame of one row comes out as it is.
        """
        if not self._any_guided:
            return _split(predicted[: self.rows])
        unconditional = predicted.index_select(0, self._first)
        difference = predicted.index_select(0, self._last) - unconditional
        return _split(unconditional + (self._scales * difference).to(predicted.dtype))


def _split(predicted: torch.Tensor) -> Sequence[torch.Tensor]:
    rows: Sequence[torch.Tensor] = torch.split(predicted, 1)
    return rows
