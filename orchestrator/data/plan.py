"""Which sample stands where: the whole order of a run, all epochs of it, as a function of a position.

Position p of the stream is place p mod n of epoch p // n, and every epoch has an order of its own of the n samples. The
stream runs on across epochs, so no remainder is dropped, and a step's rows follow from its number alone: resuming needs
one integer, and the number of workers only decides who makes which rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dino_core.config import ConfigError
from dino_core.counter_rng import absorb, root
from orchestrator.config import RunConfig
from orchestrator.data.split import Split

_ORDER, _UNITS, _WINDOWS = 1, 2, 3  # keep the random numbers of the orders apart from those of the crops
_MIN_LANE_WINDOW = 512
_MAX_LANES = 64


@lru_cache(maxsize=3)
def permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The sample ids [num_samples] in the order of one epoch: sorted by a random key of each. Read-only."""
    return _frozen(_sorted_by_chance(num_samples, seed, _ORDER, epoch))


@lru_cache(maxsize=3)
def windowed_permutation(
    num_samples: int, seed: int, epoch: int, batch_size: int, window: int, units: bytes
) -> NDArray[np.int64]:
    """The sample ids [num_samples] in the windowed order of one epoch. Read-only.

    The units of storage are put in random order and dealt to lanes, stretch by stretch. Lane i of l has the i-th of l
    equal shares of the rows of every global batch, and mixes its samples within windows of some steps. So a batch mixes
    l distant stretches of the order of units, while the rows of one rank, of l / w lanes, read each unit once.

    Args:
        num_samples, seed, epoch: Of the run.
        batch_size: Images of a global batch.
        window: Images that all lanes together mix at a time.
        units: int64 [num_units] as bytes: the first sample of each unit, ascending from 0.
    """
    starts = np.frombuffer(units, dtype=np.int64)
    order = _sorted_by_chance(len(starts), seed, _UNITS, epoch)
    lengths = np.diff(starts, append=num_samples)[order]
    begins = np.cumsum(lengths) - lengths
    sequence = np.arange(num_samples) + np.repeat(starts[order] - begins, lengths)

    steps, rows = np.divmod(epoch * num_samples + np.arange(num_samples), batch_size)
    lane_of_place = rows * num_lanes(batch_size, window) // batch_size
    places = np.argsort(lane_of_place, kind="stable")  # lane by lane, as `sequence` is dealt
    keys = _keys(num_samples, seed, _WINDOWS, epoch)[sequence]
    mixed = np.lexsort((keys, steps[places] // window_steps(batch_size, window), lane_of_place[places]))
    ids = np.empty(num_samples, dtype=np.int64)
    ids[places] = sequence[mixed]
    return _frozen(ids)


def window_steps(batch_size: int, window: int) -> int:
    """Steps of a window of about `window` images; windows begin at its multiples."""
    return max(1, round(window / batch_size))


def num_lanes(batch_size: int, window: int) -> int:
    """Lanes of the windowed order: the largest divisor of the batch up to 64 that leaves windows of 512 images."""
    most = max(1, min(_MAX_LANES, window // _MIN_LANE_WINDOW, batch_size))
    return next(lanes for lanes in range(most, 0, -1) if batch_size % lanes == 0)


def _keys(count: int, seed: int, stream: int, epoch: int) -> NDArray[np.uint64]:
    return absorb(absorb(absorb(root(seed), stream), epoch), np.arange(count))


def _sorted_by_chance(count: int, seed: int, stream: int, epoch: int) -> NDArray[np.int64]:
    return np.argsort(_keys(count, seed, stream, epoch), kind="stable").astype(np.int64)


def _frozen(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    ids.flags.writeable = False
    return ids


@dataclass(frozen=True)
class Windows:
    """The windowed order: `data.shuffle = windowed`."""

    size: int
    """Images that are mixed with each other."""
    units: bytes
    """int64 [num_units]: first sample of each stretch that storage reads as a whole."""


def index_plan(config: RunConfig, split: Split) -> IndexPlan:
    """The order that `config` asks for of the images to train on.

    Raises:
        ConfigError: `data.shuffle = windowed` for images that are read one by one anyway.
    """
    pretrain, data = config.pretrain, config.data
    windows = None
    if data.shuffle == "windowed":
        units = split.units()
        if units is None:
            raise ConfigError(
                "data.shuffle = windowed: this source is read image by image, which any order suits; must be full"
            )
        windows = Windows(data.shuffle_window, units.tobytes())
    return IndexPlan(len(split), pretrain.seed, pretrain.batch_size, windows)


@dataclass(frozen=True)
class IndexPlan:
    """The order of a run over `num_samples` samples in global batches of `batch_size`."""

    num_samples: int
    seed: int
    batch_size: int
    windows: Windows | None = None
    """None: any sample may follow any other."""

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
            ids[rows] = self._order(int(epoch))[places[rows]]
        return epochs, ids

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self.windows is None:
            return permutation(self.num_samples, self.seed, epoch)
        size, units = self.windows.size, self.windows.units
        return windowed_permutation(self.num_samples, self.seed, epoch, self.batch_size, size, units)

    @property
    def lanes(self) -> int:
        """Equal shares of the rows of a batch that read different units; 1 where the order has no windows."""
        return 1 if self.windows is None else num_lanes(self.batch_size, self.windows.size)

    @property
    def window_steps(self) -> int | None:
        """Windows begin at the multiples of this many steps; None where the order has none."""
        return None if self.windows is None else window_steps(self.batch_size, self.windows.size)
