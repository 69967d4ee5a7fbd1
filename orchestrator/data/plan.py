"""Which sample stands where: the whole order of a run, all epochs of it, as a function of a position.

Position p of the stream is place p mod n of epoch p // n, and every epoch has its own permutation of the n samples. The
stream runs on across epochs, so no remainder is dropped, and a step's rows follow from its number alone: resuming needs
one integer, and the number of workers only decides who makes which rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dino_core.counter_rng import absorb, root

_ORDER = 1  # keeps the order's random numbers apart from those of the crops


@lru_cache(maxsize=3)
def permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The sample ids [num_samples] in the order of one epoch: sorted by a random key of each. Read-only."""
    keys = absorb(absorb(absorb(root(seed), _ORDER), epoch), np.arange(num_samples))
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class IndexPlan:
    """The order of a run over `num_samples` samples in global batches of `batch_size`."""

    num_samples: int
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(f"num_samples = {self.num_samples}, batch_size = {self.batch_size}: both must be >= 1")

    def positions(self, step: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """The positions [batch_size / world_size] of the rows that a rank contributes to a step.

        Raises:
            ValueError: `world_size` does not divide the batch, or there is no such rank.
        """
        if self.batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} cannot take an equal share of {self.batch_size} images")
        rows = self.batch_size // world_size
        start = step * self.batch_size + rank * rows
        return np.arange(start, start + rows, dtype=np.int64)

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions [n] -> their epochs [n] and sample ids [n]."""
        epochs, places = np.divmod(positions, self.num_samples)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            ids[rows] = permutation(self.num_samples, self.seed, int(epoch))[places[rows]]
        return epochs, ids
