"""Which patches of the student's global crops are masked.

A mask is a function of (seed, step, image's place in the global batch, crop), as stochastic depth is, so it does not
matter how many workers share the batch, or in how many parts a worker takes its share.

Axes: T global crops, b images of one rank, N = H * W patches, M masked patches of the rank's crops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_core.config_patches import MaskConfig
from dino_core.counter_rng import absorb, root
from dino_core.crops import NUM_GLOBAL_CROPS
from dino_core.distributed import all_reduce_sum_, rank, world_size

_STREAM = 2**63 + 1
"""Sets these numbers apart from those of stochastic depth and of the crops."""
_CHOICE, _RATIO, _ORDER, _PATCHES, _BLOCKS = range(5)
_TRIES = 10
_TRIES_AT_ONCE = 32
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))


class MaskedPatches(NamedTuple):
    """The masked patches of a batch of crops, as a network takes them."""

    mask: Tensor
    """bool [T * b, N], crop-major."""
    rows: Tensor
    """int64 [M], the masked ones among the T * b * N patches, ascending."""


def put_mask_token(patches: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """Embedded patches [n, N, D] or [n, H, W, D] with `token` [1, D] in the place of those that are masked.

    Args:
        mask: bool [n, N].
    """
    return torch.where(mask.view(*patches.shape[:-1], 1), token.to(patches.dtype), patches)


@dataclass(frozen=True)
class Masks:
    """The masks of one rank's share of the global batch."""

    values: NDArray[np.bool_]
    """[T, b, N]."""
    divisor: Literal["crops", "masked_crops", "masked_patches"]
    visible: bool = False
    """Whether the student sees them all the same."""

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Crop and image of each masked patch, [M] each."""
        crops, images, _ = self.values.nonzero()
        return crops, images

    def part(self, first_image: int, num_images: int, device: torch.device) -> MaskedPatches:
        """Those of some of the images."""
        values = self.values[:, first_image : first_image + num_images].reshape(-1, self.values.shape[2])
        rows = torch.from_numpy(np.flatnonzero(values))
        if self.visible:
            values = np.zeros_like(values)
        return MaskedPatches(torch.from_numpy(values).to(device, non_blocking=True), rows.to(device, non_blocking=True))

    def members(self, first_image: int, num_images: int, device: torch.device) -> Tensor:
        """int64 [m], which of the share's M masked patches belong to these images, in the order of `part`."""
        _, images = self._places
        found = np.flatnonzero((images >= first_image) & (images < first_image + num_images))
        return torch.from_numpy(found).to(device, non_blocking=True)

    def weights(self, device: torch.device) -> Tensor:
        """[M], what each masked patch counts in the loss; every rank must call it.

        The mean over the ranks of the weighted sums is the loss of the global batch, as `divisor` has it.
        """
        crops, images = self._places
        counts = self.values.sum(axis=2)  # [T, b]
        if self.divisor == "crops":
            return torch.from_numpy(1 / (counts[crops, images] * counts.size)).float().to(device, non_blocking=True)
        by_crop = self.divisor == "masked_crops"
        weights = 1 / counts[crops, images] if by_crop else np.ones(len(crops))
        total = torch.tensor(float((counts > 0).sum() if by_crop else counts.sum()), device=device)
        total = all_reduce_sum_(total) / world_size()
        return torch.from_numpy(weights).float().to(device, non_blocking=True) / total


def draw_masks(
    config: MaskConfig, grid: tuple[int, int], *, seed: int, step: int, batch_size: int, images: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Masks of the global crops of some images of the global batch.

    Ratios and blocks follow the authors' samplers (`MaskConfig.sampler`). A block has an area between the sampler's
    smallest and what is left to mask, and an aspect ratio between 0.3 and 1 / 0.3 on a logarithmic scale; it counts if
    it lies within the grid and masks more, but not too much. Ten that do not in a row end the mask, below its ratio.

    Args:
        grid: H, W, patches of a crop.
        batch_size: images of the global batch.
        images: [b], their places in it.

    Returns:
        [T, b, H * W].

    Source: BEiT (arXiv 2106.08254), algorithm 1; iBOT (arXiv 2111.07832), section 4; DINOv2 (arXiv 2304.07193),
    appendix B.
    """
    num_patches = grid[0] * grid[1]
    ratios = _ratios(config, seed, step, batch_size)[:, images]  # [T, b]
    masks = np.zeros((*ratios.shape, num_patches), dtype=np.bool_)
    keys = _keys(seed, step, images)  # [T, b]
    masked = ratios > 0
    rows, wanted = masks[masked], num_patches * ratios[masked]  # [m, N], [m]
    if config.shape == "random":
        order = absorb(absorb(keys[masked], _PATCHES)[:, None], np.arange(num_patches)).argsort(axis=1).argsort(axis=1)
        rows[:] = order < np.floor(wanted)[:, None]
    else:
        blocks = absorb(keys[masked], _BLOCKS)
        first = _uniform(absorb(blocks[:, None], np.arange(4 * _TRIES_AT_ONCE)))  # one call for all crops
        for row, number, key, draws in zip(rows, wanted.tolist(), blocks, first, strict=True):
            _add_blocks(row.reshape(grid), number, config.sampler, _tries(key[None], draws))
    masks[masked] = rows
    return masks


def rank_masks(
    config: MaskConfig,
    grid: tuple[int, int],
    *,
    seed: int,
    step: int,
    share: int,
    divisor: Literal["crops", "masked_crops", "masked_patches"],
    patches: Literal["masked", "all"] = "masked",
) -> Masks:
    """The masks of this rank's `share` images of the global batch; all patches, and none hidden, if so wished."""
    if patches == "all":
        return all_patches(grid, share, divisor)
    images = np.arange(rank() * share, (rank() + 1) * share)
    values = draw_masks(config, grid, seed=seed, step=step, batch_size=share * world_size(), images=images)
    return Masks(values, divisor)


def all_patches(
    grid: tuple[int, int], num_images: int, divisor: Literal["crops", "masked_crops", "masked_patches"]
) -> Masks:
    """As if all patches were masked, but for that the student sees them."""
    return Masks(np.ones((NUM_GLOBAL_CROPS, num_images, grid[0] * grid[1]), dtype=np.bool_), divisor, visible=True)


def _keys(seed: int, step: int, images: NDArray[np.int64]) -> NDArray[np.uint64]:
    """[T, b]."""
    key = absorb(absorb(root(seed), _STREAM), step)
    return absorb(absorb(key, np.arange(NUM_GLOBAL_CROPS))[:, None], images)


def _uniform(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2^-53."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _ratios(config: MaskConfig, seed: int, step: int, batch_size: int) -> NDArray[np.float64]:
    """The share of the patches to mask of each crop of the global batch, [T, B]; 0 for none."""
    keys = _keys(seed, step, np.arange(batch_size))
    low, high = config.ratio
    place = _uniform(absorb(keys, _RATIO))
    if config.sampler == "ibot":
        return np.where(_uniform(absorb(keys, _CHOICE)) < config.prob, low + (high - low) * place, 0.0)
    # the i-th of n masked crops, in random order, gets a ratio from the i-th of n equal parts of the range
    num_masked = int(keys.size * config.prob)
    position = absorb(keys, _ORDER).ravel().argsort().argsort().reshape(keys.shape)
    ratios = low + (high - low) * (position + place) / max(num_masked, 1)
    return np.where(position < num_masked, ratios, 0.0)


def _add_blocks(
    mask: NDArray[np.bool_], wanted: float, sampler: Literal["ibot", "dinov2"], tries: Iterator[list[float]]
) -> None:
    """Mask blocks of `mask` [H, W], in place, until at least `wanted` patches are masked, or no block fits."""
    height, width = mask.shape
    if sampler == "dinov2":
        wanted, smallest, largest = int(wanted), 4.0, 0.5 * height * width
    else:
        smallest, largest = float((min(height, width) // 3) ** 2), math.inf
    count = 0
    while count < wanted:
        left = min(wanted - count, largest)
        for _ in range(_TRIES):
            area, aspect, top, beside = next(tries)
            area = smallest + (left - smallest) * area
            aspect = math.exp(_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * aspect)
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows >= height or columns >= width:
                continue
            first_row, first_column = int(top * (height - rows + 1)), int(beside * (width - columns + 1))
            block = mask[first_row : first_row + rows, first_column : first_column + columns]
            new = rows * columns - int(np.count_nonzero(block))
            if 0 < new <= left:
                block[...] = True
                count += new
                break
        else:
            return


def _tries(key: NDArray[np.uint64], draws: NDArray[np.float64]) -> Iterator[list[float]]:
    """Area, aspect ratio, row and column of one try after the other, uniform in [0, 1); `draws` are the first."""
    start = 0
    while True:
        yield from draws.reshape(-1, 4).tolist()
        start += draws.size
        draws = _uniform(absorb(key, np.arange(start, start + 4 * _TRIES_AT_ONCE)))
