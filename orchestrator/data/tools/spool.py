"""Images that come in one order and are wanted in another, without holding them in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BUFFER_BYTES = 64 << 20


class Spool:
    """Files in a folder, one for each range of places; images are added in any order and come out by place.

    Args:
        folder: Is made, and has to be removed by the caller.
        bounds: [num_ranges + 1] first place of each range, and the number of places.
    """

    def __init__(self, folder: Path, bounds: NDArray[np.int64]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._bounds = folder, bounds
        self._starts = np.full(int(bounds[-1]), -1, dtype=np.int64)  # within the file of its range; -1: no such image
        self._lengths = np.zeros(int(bounds[-1]), dtype=np.int64)
        self._ends = [0] * (len(bounds) - 1)
        self._buffers: dict[int, list[bytes]] = {}
        self._buffered = 0

    def add(self, place: int, data: bytes) -> None:
        """Keep an image. Raises OSError."""
        number = int(np.searchsorted(self._bounds, place, side="right")) - 1
        self._starts[place], self._lengths[place] = self._ends[number], len(data)
        self._ends[number] += len(data)
        self._buffers.setdefault(number, []).append(data)
        self._buffered += len(data)
        if self._buffered > _BUFFER_BYTES:
            self._flush()

    def in_order(self) -> Iterator[bytes | None]:
        """The images by place, None where there is none. Each file is removed when it has been read."""
        self._flush()
        for number, (low, high) in enumerate(zip(self._bounds[:-1], self._bounds[1:], strict=True)):
            path = self._path(number)
            if not path.exists():
                yield from (None for _ in range(low, high))
                continue
            with open(path, "rb") as file:
                for place in range(low, high):
                    if self._starts[place] < 0:
                        yield None
                        continue
                    file.seek(int(self._starts[place]))
                    yield file.read(int(self._lengths[place]))
            path.unlink()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05}"

    def _flush(self) -> None:
        for number, parts in self._buffers.items():
            with open(self._path(number), "ab") as file:  # opened each time: there may be more than a process may hold
                file.writelines(parts)
        self._buffers.clear()
        self._buffered = 0
