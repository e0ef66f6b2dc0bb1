"""Counts of what happened, kept by processes that are killed right after they counted."""

import os
from pathlib import Path


class Tally:
    """One file a name, one byte a count: appended by many processes, and there whatever becomes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def add(self, name: str, times: int = 1) -> None:
        handle = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(handle, b"|" * times)
        os.close(handle)

    def count(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return 0

    def all(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}
