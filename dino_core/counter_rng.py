"""Random numbers that are a function of their coordinates: no state, no order, the same on every machine.

Each coordinate (seed, epoch, sample id, crop, draw) is absorbed into a 64-bit key by one step of SplitMix64 (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): add a multiple of the golden-ratio
constant, then mix. The last absorption, over the draws, is exactly the output sequence of a SplitMix64 generator.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def absorb(key: NDArray[np.uint64], words: ArrayLike) -> NDArray[np.uint64]:
    """Keys [...] and non-negative whole numbers [...] (broadcast together) -> new keys. Wraps modulo 2^64."""
    words = np.atleast_1d(np.asarray(words)).astype(np.uint64)
    state = key + (words + np.uint64(1)) * _GOLDEN
    state ^= state >> np.uint64(30)
    state *= _MIX_1
    state ^= state >> np.uint64(27)
    state *= _MIX_2
    state ^= state >> np.uint64(31)
    return state


def root(seed: int) -> NDArray[np.uint64]:
    """The key [1] that a seed (non-negative whole number below 2^64) stands for."""
    return absorb(np.zeros(1, dtype=np.uint64), np.array([seed], dtype=np.uint64))


def uniforms(
    seed: int, epochs: ArrayLike, sample_ids: ArrayLike, num_crops: int, num_draws: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), [B, S, D], of `epochs` [B] and `sample_ids` [B]; multiples of 2^-53."""
    samples = absorb(absorb(root(seed), epochs), sample_ids)  # [B]
    crops = absorb(samples[:, None], np.arange(num_crops))  # [B, S]
    draws = absorb(crops[:, :, None], np.arange(num_draws))  # [B, S, D]
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
