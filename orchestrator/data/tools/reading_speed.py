"""How fast one core makes crops of some images, and how fast it would if the images were stored smaller."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dino_core.config import CropsConfig
from orchestrator.data.images import decode
from orchestrator.data.tools.encode import shrink

Stored = bytes | NDArray[np.uint8]

_ENOUGH_S, _TOO_LONG_S = 0.3, 5.0  # CPU time of one measurement
_BATCH_BYTES = 64_000_000  # pixels that are cropped together
_SMALLEST_RATIO = 0.75  # height to width of a crop's box, or the reverse


@dataclass(frozen=True)
class Speed:
    """Images a second of one core, measured by CPU time; images are in memory."""

    images: int
    """Of the sample."""
    decode: float | None
    """Decoding alone; None where nothing is encoded."""
    decode_and_crop: float
    """With all crops of the configuration."""
    shorter_side: int
    """No crop of an image shrunk to this many pixels is enlarged that would not be anyway."""
    shrink_speedup: float | None
    """How many times as fast it is from images stored with this shorter side; None if most are not larger."""

    def cores_for(self, images_per_s: float) -> int:
        """Cores that make the crops of so many images."""
        return math.ceil(images_per_s / self.decode_and_crop)


def shorter_side_for(crops: CropsConfig) -> int:
    """The shorter side, a multiple of 64 pixels, at which the smallest box of each crop has at least the crop's side.

    A box with the share s of an area of at least n x n pixels, at the ratio 3/4, has a shorter side of sqrt(3/4 s) n.
    """
    needed = [crops.global_size / math.sqrt(_SMALLEST_RATIO * crops.global_scale[0])]
    if crops.num_local_crops:
        needed.append(crops.local_size / math.sqrt(_SMALLEST_RATIO * crops.local_scale[0]))
    return 64 * math.ceil(max(needed) / 64)


def measure_speed(sample: Sequence[Stored], crops: CropsConfig, max_pixels: int) -> Speed:
    """Measure on usable images, as they are stored. At least one image; takes seconds, most of them to load torch."""
    import torch

    from dino_core.crops import MultiCrop

    multi_crop = MultiCrop(crops, seed=0)

    def load(data: Stored) -> NDArray[np.uint8]:
        return decode(data, max_pixels) if isinstance(data, bytes) else data

    def crop(some: Sequence[Stored]) -> None:
        images = [load(data) for data in some]
        multi_crop.make(images, np.zeros(len(images), dtype=np.int64), np.arange(len(images), dtype=np.int64))

    def decode_only(some: Sequence[Stored]) -> None:
        for data in some:
            load(data)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        crop(sample[:1])  # loads what is loaded when it is first used
        sides = [load(data).shape[:2] for data in sample[:: max(1, len(sample) // 16)]]
        batch = max(1, _BATCH_BYTES // max(3 * height * width for height, width in sides))
        side = shorter_side_for(crops)
        speedup = None
        if np.median([min(shape) for shape in sides]) > side:
            some = sample[:: max(1, len(sample) // 16)]
            speedup = _rate(crop, [_shrunk(load(data), side) for data in some], batch) / _rate(crop, some, batch)
        return Speed(
            images=len(sample),
            decode=_rate(decode_only, sample, batch) if isinstance(sample[0], bytes) else None,
            decode_and_crop=_rate(crop, sample, batch),
            shorter_side=side,
            shrink_speedup=speedup,
        )
    finally:
        torch.set_num_threads(threads)


def _shrunk(pixels: NDArray[np.uint8], side: int) -> Stored:
    return shrink(pixels, side, "JPEG") if min(pixels.shape[:2]) > side else pixels


def _rate(work: Callable[[Sequence[Stored]], None], sample: Sequence[Stored], batch: int) -> float:
    """Images a second of CPU time: whole passes over the sample until it is enough, less than one if that is long."""
    begin, done = time.process_time(), 0
    while True:
        for start in range(0, len(sample), batch):
            some = sample[start : start + batch]
            work(some)
            done += len(some)
            seconds = time.process_time() - begin
            if seconds > _TOO_LONG_S:
                return done / seconds
        if seconds > _ENOUGH_S:
            return done / seconds
