"""Views for features of patches and for attention: whole images of any shape, at sizes that a protocol says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_core.eval.attention import Sizes, attention_maps, prepare_image
from dino_core.eval.layers import intermediate_layers
from dino_core.eval.video import pixel_features, prepare_frame

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class FramePatches:
    """Features [h, w, D] of the patches of a video's frame."""

    size: tuple[int, int]
    """Height and width."""
    mean: Colour
    std: Colour
    pixels: int | None = None
    """The pixels of patches of this side instead of what a backbone makes of them."""

    def make(self, image: NDArray[np.uint8], sample: int) -> Tensor:
        return prepare_frame(image, self.size, self.mean, self.std)

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        return _patches(backbone, batch) if self.pixels is None else pixel_features(batch, self.pixels)


@dataclass(frozen=True)
class ImagePatches:
    """Features [h, w, D] of the patches of an image that is cut to whole patches."""

    resized: tuple[int, int]
    seen: tuple[int, int]
    mean: Colour
    std: Colour

    def make(self, image: NDArray[np.uint8], sample: int) -> Tensor:
        return prepare_image(image, Sizes(self.resized, self.seen), self.mean, self.std)

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        return _patches(backbone, batch)


@dataclass(frozen=True)
class ImageAttention(ImagePatches):
    """Attention of the class token [heads, h, w]."""

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        maps = attention_maps(backbone, batch)
        assert maps is not None
        return maps


def _patches(backbone: nn.Module, batch: Tensor) -> Tensor:
    return intermediate_layers(backbone, batch)[-1].patches
