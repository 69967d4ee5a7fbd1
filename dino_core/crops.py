"""Multi-crop augmentation: two global crops and some local ones of every image (Caron et al. 2021, section 3.1).

The crops of an image are a function of (seed, epoch, sample id, crop index) alone, so it does not matter which process
makes them, in which batch, or in which order. `MultiCrop.make` crops on the CPU; `MultiCrop.finish` brings a batch to
the model's device and normalises it there. The colour tail between the two runs in either place, with the same result
but for ties of the blur (`colour_cpu`), which differ by one of 255 levels.

Axes: B images, n local crops, S = 2 + n crops, crop-major batches [crops x B, 3, H, W].
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dino_core import colour, colour_cpu
from dino_core.config import CropsConfig
from dino_core.counter_rng import uniforms

NUM_GLOBAL_CROPS = 2
_SMALL_SIDE = 32  # pixels; crops below it are so cheap that calls cost more than arithmetic
_CACHED_VALUES = 1 << 17
_TRIES = 10
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))

# Which draw of a crop's random numbers decides what.
_AREA, _RATIO, _TOP, _LEFT, _FLIP, _JITTER, _GRAY, _BLUR, _SIGMA, _SOLARIZE, _ORDER = (0, 10, *range(20, 29))
_FACTORS = 29  # brightness, contrast, saturation, hue
_NUM_DRAWS = 33


class CropBatch(NamedTuple):
    """What a training step takes: normalised crops on the model's device, crop-major."""

    global_crops: Tensor
    """float32 [2 * B, 3, H, W]"""
    local_crops: Tensor | None
    """float32 [n * B, 3, h, w], None when there are no local crops"""
    num_images: int
    """B"""


class CropPlan(NamedTuple):
    """Everything random about the crops of a batch."""

    boxes: NDArray[np.int64]
    """[B, S, 4]: top, left, height, width, pixels of the source image"""
    flips: NDArray[np.bool_]
    """[B, S]"""
    params: NDArray[np.float32]
    """[B, S, colour.NUM_PARAMS]"""


def crop_boxes(sizes: NDArray[np.int64], scales: NDArray[np.float64], draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """The boxes of random resized crops, by the rules of torchvision's `RandomResizedCrop.get_params`.

    Ten tries of an area (uniform in the scale) and an aspect ratio (log-uniform from 3/4 to 4/3) that must fit the
    image; if none does, the largest centred box whose ratio is within those limits.

    Args:
        sizes: [B, 2] height and width of each image, pixels.
        scales: [S, 2] smallest and largest share of the area of each crop.
        draws: [B, S, 22] uniform numbers: ten areas, ten ratios, top, left.

    Returns:
        [B, S, 4] top, left, height, width.
    """
    height, width = (sizes[:, None, axis, None].astype(np.float64) for axis in (0, 1))  # [B, 1, 1]
    low, high = scales[None, :, 0, None], scales[None, :, 1, None]
    area = height * width * (low + (high - low) * draws[..., :_TRIES])  # [B, S, tries]
    ratio = np.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * draws[..., _TRIES : 2 * _TRIES])
    heights, widths = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = fits.argmax(axis=2)[..., None]
    found, heights, widths = (np.take_along_axis(tries, first, axis=2)[..., 0] for tries in (fits, heights, widths))
    height, width = height[..., 0], width[..., 0]  # [B, 1]
    box_height = np.where(found, heights, np.minimum(height, np.rint(width / 0.75)))
    box_width = np.where(found, widths, np.minimum(width, np.rint(height * (4 / 3))))
    free_rows, free_columns = height - box_height, width - box_width
    top = np.where(found, np.floor(draws[..., _TOP] * (free_rows + 1)), free_rows // 2)
    left = np.where(found, np.floor(draws[..., _LEFT] * (free_columns + 1)), free_columns // 2)
    return np.stack([top, left, box_height, box_width], axis=-1).astype(np.int64)


class MultiCrop:
    """Makes the crops of a run. Cheap to build and to pickle."""

    def __init__(self, config: CropsConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.num_crops = NUM_GLOBAL_CROPS + config.num_local_crops

    def draw(self, sizes: NDArray[np.int64], epochs: NDArray[np.int64], sample_ids: NDArray[np.int64]) -> CropPlan:
        """What happens to each crop of images of `sizes` [B, 2] (height, width)."""
        config, crops = self.config, self.num_crops
        draws = uniforms(self.seed, epochs, sample_ids, crops, _NUM_DRAWS)
        is_global = np.arange(crops) < NUM_GLOBAL_CROPS
        scales = np.where(is_global[:, None], config.global_scale, config.local_scale)

        jitter = draws[..., _JITTER] < config.jitter_prob
        factors = draws[..., _FACTORS : _FACTORS + 4]
        params = np.empty((*draws.shape[:2], colour.NUM_PARAMS), dtype=np.float32)
        strengths = (config.brightness, config.contrast, config.saturation)
        for index, column in enumerate((colour.BRIGHTNESS, colour.CONTRAST, colour.SATURATION)):
            low, high = max(0.0, 1 - strengths[index]), 1 + strengths[index]
            params[..., column] = np.where(jitter, low + (high - low) * factors[..., index], 1)
        params[..., colour.HUE] = np.where(jitter, config.hue * (2 * factors[..., 3] - 1), 0)
        params[..., colour.ORDER] = np.floor(draws[..., _ORDER] * colour.NUM_ORDERS)
        params[..., colour.GRAYSCALE] = draws[..., _GRAY] < config.grayscale_prob
        blur_prob = np.array([config.blur_prob[min(crop, 2)] for crop in range(crops)])
        if config.invert_blur_prob:
            blur_prob = 1 - blur_prob
        low, high = config.blur_sigma
        sigma = low + (high - low) * draws[..., _SIGMA]
        params[..., colour.SIGMA] = np.where(draws[..., _BLUR] < blur_prob, sigma, 0)
        params[..., colour.SOLARIZE] = (draws[..., _SOLARIZE] < config.solarize_prob) & (np.arange(crops) == 1)
        boxes = crop_boxes(sizes, scales, draws[..., : _LEFT + 1])
        return CropPlan(boxes, draws[..., _FLIP] < config.flip_prob, params)

    def make(
        self, images: Sequence[NDArray[np.uint8]], epochs: NDArray[np.int64], sample_ids: NDArray[np.int64]
    ) -> dict[str, np.ndarray]:
        """The crops of a batch of decoded images, on the CPU.

        Args:
            images: B arrays uint8 [height, width, 3] of any sizes.
            epochs, sample_ids: int64 [B], not negative.

        Returns:
            `global_crops` uint8 [B, 2, 3, H, W]; `local_crops` uint8 [B, n, 3, h, w] unless n is 0; and `params`
            float32 [B, S, colour.NUM_PARAMS] when the colour tail is left to `finish` (`config.device`).

        Raises:
            ValueError: an image that is not uint8 [height, width, 3] with at least one pixel.
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
                raise ValueError(f"an image must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
        sizes = np.array([image.shape[:2] for image in images], dtype=np.int64).reshape(-1, 2)
        plan = self.draw(sizes, epochs, sample_ids)
        groups = {"global_crops": (slice(0, NUM_GLOBAL_CROPS), self.config.global_size)}
        if self.config.num_local_crops:
            groups["local_crops"] = (slice(NUM_GLOBAL_CROPS, None), self.config.local_size)
        arrays: dict[str, np.ndarray] = {}
        for name, (crops, side) in groups.items():
            boxes, flips = plan.boxes[:, crops], plan.flips[:, crops]
            out = np.empty((*flips.shape, 3, side, side), dtype=np.uint8)
            rows = out.reshape(-1, 3, side, side)
            _crop(rows, images, boxes, flips.ravel().tolist())
            if self.config.device == "cpu":
                _colour(rows, plan.params[:, crops].reshape(-1, colour.NUM_PARAMS))
            arrays[name] = out
        if self.config.device == "accelerator":
            arrays["params"] = plan.params
        return arrays

    def finish(self, arrays: Mapping[str, Tensor | np.ndarray], device: torch.device | str) -> CropBatch:
        """Bring what `make` returned to `device`, do what is left of the colour tail there, normalise."""
        device = torch.device(device)
        params = torch.as_tensor(arrays["params"]) if self.config.device == "accelerator" else None
        global_crops = torch.as_tensor(arrays["global_crops"])
        num_images = len(global_crops)
        local_crops = None
        if self.config.num_local_crops:
            tail = None if params is None else params[:, NUM_GLOBAL_CROPS:]
            local_crops = self._finish_group(torch.as_tensor(arrays["local_crops"]), tail, device)
        tail = None if params is None else params[:, :NUM_GLOBAL_CROPS]
        return CropBatch(self._finish_group(global_crops, tail, device), local_crops, num_images)

    def _finish_group(self, crops: Tensor, params: Tensor | None, device: torch.device) -> Tensor:
        """uint8 [B, crops, 3, H, W] -> float32 [crops * B, 3, H, W]"""
        if device.type == "cuda":
            crops = crops.pin_memory()  # a copy from pageable memory would wait for the device
        images = crops.to(device, non_blocking=True).transpose(0, 1)
        if params is not None:
            flat = colour.apply_colour(images.flatten(0, 1), params.transpose(0, 1).flatten(0, 1))
            images = flat.view(images.shape)
        scale, shift = _normalisation(self.config.mean, self.config.std, device)
        if device.type == "cpu":
            return _normalised_on_cpu(images, scale, shift).flatten(0, 1)
        return images.flatten(0, 1).float().mul_(scale).sub_(shift)


def _normalised_on_cpu(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 [crops, B, 3, H, W] -> float32 of the same shape: levels x `scale` - `shift`.

    The memory is numpy's, which asks for huge pages: getting ordinary ones costs several times as much as the
    arithmetic. That is done on as many images at a time as stay in a core's cache.
    """
    out = torch.from_numpy(np.empty(images.shape, dtype=np.float32))
    size = max(1, _CACHED_VALUES // images.shape[2:].numel())
    for crop, normalised in zip(images, out, strict=True):
        for levels, part in zip(crop.split(size), normalised.split(size), strict=True):
            part.copy_(levels).mul_(scale).sub_(shift)
    return out


@lru_cache(maxsize=4)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """[3, 1, 1] each: levels x scale - shift is (levels / 255 - mean) / std."""
    means, stds = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    return 1 / (255 * stds), means / stds


def _crop(
    out: NDArray[np.uint8], images: Sequence[NDArray[np.uint8]], boxes: NDArray[np.int64], flips: Sequence[bool]
) -> None:
    """Cut `boxes` [B, crops, 4], resize each to its row of `out` uint8 [B * crops, 3, side, side], flip some.

    Cutting comes first: the filter must not see pixels outside the box. On a channels-last view torch's antialiased
    bicubic resize of uint8 is Pillow's, to rounding. Boxes of one size share a call, which matters for tiny images.
    """
    side, num = out.shape[2], boxes.shape[1]
    places: defaultdict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for row, (top, left, height, width) in enumerate(boxes.reshape(-1, 4).tolist()):
        places[height, width].append((row, top, left))
    sizes = [3 * height * width * len(some) for (height, width), some in places.items()]
    scratch = np.empty(max(sizes, default=0), dtype=np.uint8)
    for ((height, width), some), size in zip(places.items(), sizes, strict=True):
        cut = scratch[:size].reshape(-1, height, width, 3)
        for pixels, (row, top, left) in zip(cut, some, strict=True):
            pixels[...] = images[row // num][top : top + height, left : left + width]
        channels_last = torch.from_numpy(cut).permute(0, 3, 1, 2)
        resized = F.interpolate(channels_last, size=(side, side), mode="bicubic", antialias=True)
        for pixels, (row, _, _) in zip(resized.permute(0, 2, 3, 1).numpy(), some, strict=True):
            # OpenCV turns pixels into planes several times faster than torch or numpy.
            cv2.split(cv2.flip(pixels, 1) if flips[row] else pixels, tuple(out[row]))


def _colour(crops: NDArray[np.uint8], params: NDArray[np.float32]) -> None:
    """The colour tail of crops uint8 [n, 3, side, side] in place, by whichever way is faster at that size."""
    if crops.shape[-1] < _SMALL_SIDE:
        crops[:] = colour.apply_colour(torch.from_numpy(crops), torch.from_numpy(params)).numpy()
    else:
        colour_cpu.apply_colour(crops, params)
