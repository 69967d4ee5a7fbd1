"""Features of a frozen backbone, and the one view of an image that they are taken from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module is put back into the mode in which it was found."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def extract_features(backbone: nn.Module, images: Iterable[Tensor]) -> Tensor:
    """Features [n, D] in fp32, on the backbone's device, of batches of normalised images [B, 3, H, W].

    The backbone runs in evaluation mode; every module is put back into the mode in which it was found.

    Raises:
        ValueError: no batch.
    """
    parameter = next(backbone.parameters())
    with evaluating(backbone):
        features = [backbone(batch.to(parameter.device, non_blocking=True)).float() for batch in images]
    if not features:
        raise ValueError("images: must hold at least one batch")
    return torch.cat(features)


def eval_transform(
    image: NDArray[np.uint8], size: int, crop_fraction: float, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Resize an image's shorter side to `size` / `crop_fraction` (bicubic, antialiased), cut out the centre, normalise.

    Args:
        image: [H, W, 3].
        size: side of the result, pixels.
        crop_fraction: in (0, 1]; 0.875 with 224 resizes to 256.
        mean, std: of red, green, blue on the scale 0 to 1.

    Returns:
        [3, size, size], float32.

    Raises:
        ValueError: not an RGB image of bytes, or a fraction out of range.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"image {list(image.shape)} of {image.dtype}: must be [H, W, 3] of uint8")
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction = {crop_fraction}: must be > 0 and <= 1")
    height, width = image.shape[:2]
    short = round(size / crop_fraction)
    resized = (short, short * width // height) if height <= width else (short * height // width, short)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last
    if resized != (height, width):
        pixels = F.interpolate(pixels, size=resized, mode="bicubic", antialias=True)
    top, left = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    crop = pixels[0, :, top : top + size, left : left + size].float() / 255
    return (crop - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
