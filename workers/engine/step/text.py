"""What prompts became in the text encoders: kept, since frames of a job share theirs and seeds differ."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

import torch

LIMIT_BYTES = 256 << 20

Encoded = Mapping[str, torch.Tensor]  # each (1, …): one row


class TextCache:
    """The encodings used last, bounded by their bytes."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[Hashable, Encoded] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, encode: Callable[[], Encoded]) -> Encoded:
        """The encoding of a key, made now if it is not here."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        encoded = encode()
        self._kept[key] = encoded
        self.bytes += _bytes(encoded)
        while self.bytes > self._limit_bytes and self._kept:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])
        return encoded

    def clear(self) -> None:
        """Forget all: their memory is needed."""
        self._kept.clear()
        self.bytes = 0


def _bytes(encoded: Encoded) -> int:
    return sum(t.numel() * t.element_size() for t in encoded.values())
