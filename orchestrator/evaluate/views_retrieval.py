"""What `retrieval` and `copy_detection` take features of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dino_core.config import ConfigError
from dino_core.eval.copy_detection import copy_descriptor
from dino_core.eval.features import eval_transform, evaluating
from dino_core.eval.layers import intermediate_layers, patch_size
from dino_core.eval.retrieval import SCALES, multi_scale_features
from orchestrator.data.images import BadImage
from orchestrator.evaluate.revisited_layout import Box
from orchestrator.evaluate.targets import Target

_REFUSALS = (AssertionError, RuntimeError, ValueError)


@dataclass(frozen=True)
class RetrievalView:
    """Pooled features [D] of length 1, of an image at one size or as the mean of three."""

    size: int
    """Pixels of the longer side of a whole image, which is not made larger, or of both of a centre crop."""
    crop_fraction: float | None
    """Of a centre crop; None: the whole image."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scales: tuple[float, ...]
    multiple: int
    """Rows and columns beyond a multiple of this are left out: the patch size."""
    boxes: tuple[Box, ...] | None = None
    """What is cut out of each image first."""

    def make(self, image: NDArray[np.uint8], sample: int) -> Tensor:
        if self.boxes is not None:
            image = _cut(image, self.boxes[sample])
        if self.crop_fraction is not None:
            return eval_transform(image, self.size, self.crop_fraction, self.mean, self.std)
        picture = Image.fromarray(image)
        picture.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        if min(picture.size) * min(self.scales) < self.multiple:
            raise BadImage(
                f"of {picture.width} x {picture.height} pixels, which at scale {min(self.scales):.2g} leaves no patch"
            )
        return _normalised(np.asarray(picture), self.mean, self.std)

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        return multi_scale_features(backbone, batch, self.scales, self.multiple)


@dataclass(frozen=True)
class CopyView:
    """Descriptors for copy detection: class token and GeM-pooled patches [2 D], or pooled features [D]."""

    size: int
    """Pixels per side."""
    crop_fraction: float | None
    """Of a centre crop; None: the whole image, squeezed into a square."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    gem_power: float | None
    """None: pooled features."""

    def make(self, image: NDArray[np.uint8], sample: int) -> Tensor:
        if self.crop_fraction is not None:
            return eval_transform(image, self.size, self.crop_fraction, self.mean, self.std)
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        resized = F.interpolate(pixels, size=(self.size, self.size), mode="bicubic", antialias=True)
        return _normalised(resized[0].permute(1, 2, 0).numpy(), self.mean, self.std)

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        if self.gem_power is None:
            pooled: Tensor = backbone(batch)
            return pooled
        (last,) = intermediate_layers(backbone, batch)
        return copy_descriptor(last.class_token, last.patches, self.gem_power)


def retrieval_view(
    target: Target, size: int | None, *, whole: bool, multi_scale: bool, boxes: tuple[Box, ...] | None = None
) -> RetrievalView:
    """The view of a target; `size` None is that which it takes for other evaluations."""
    image = target.image
    fraction = None if whole else image.crop_fraction
    scales = SCALES if multi_scale else (1.0,)
    return RetrievalView(
        size or image.size, fraction, image.mean, image.std, scales, patch_size(target.backbone), boxes
    )


def check_view(target: Target, view: RetrievalView | CopyView, key: str, advice: str = "") -> int:
    """The width of the features, made of one grey image of 4 to 3.

    Raises:
        ConfigError: The backbone does not take it; names `key`.
    """
    parameter = next(target.backbone.parameters(), None)
    try:
        with torch.no_grad(), evaluating(target.backbone):
            batch = view.make(np.full((max(1, view.size * 3 // 4), view.size, 3), 128, np.uint8), 0)[None]
            features = view.features(target.backbone, batch if parameter is None else batch.to(parameter.device))
            return features.shape[1]
    except _REFUSALS as error:  # BadImage is one
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{key}: {target.architecture} does not take it: {reason}{advice}") from error


def _cut(image: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """What lies in the box, of which at least a pixel."""
    height, width = image.shape[:2]
    left, top = (int(min(max(round(side), 0), limit - 1)) for side, limit in zip(box[:2], (width, height), strict=True))
    right, bottom = (
        int(min(max(round(side), first + 1), limit))
        for side, first, limit in zip(box[2:], (left, top), (width, height), strict=True)
    )
    return np.ascontiguousarray(image[top:bottom, left:right])


def _normalised(image: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[H, W, 3] as [3, H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
