"""Views that the suite `linear` takes features from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_core.config import CropsConfig
from dino_core.crops import MultiCrop
from dino_core.eval.linear import pooled_tokens, probe_tokens
from orchestrator.evaluate.views import CentreCrop


@dataclass(frozen=True)
class Tokens(CentreCrop):
    """Tokens [num_blocks + 1, D] of the centre crop: `probe_tokens`."""

    num_blocks: int

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        return probe_tokens(backbone, batch, self.num_blocks)


@dataclass(frozen=True)
class AugmentedTokens:
    """The same of a random resized crop, half of them flipped, which is a function of seed, epoch and image.

    Args:
        scale: Smallest and largest share of the image's area.
        num_blocks: 0: pooled features [D], for backbones without a class token.
    """

    crops: CropsConfig
    epoch: int
    seed: int
    num_blocks: int

    @cached_property
    def _multi_crop(self) -> MultiCrop:
        return MultiCrop(self.crops, self.seed)

    def make(self, image: NDArray[np.uint8], sample: int) -> Tensor:
        crops = self._multi_crop.make([image], np.array([self.epoch]), np.array([sample]))["global_crops"]
        return torch.from_numpy(crops[0, 0].copy())

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, device=batch.device).view(3, 1, 1) for values in (self.crops.mean, self.crops.std)
        )
        images = (batch.float() / 255 - mean) / std
        if self.num_blocks:
            return probe_tokens(backbone, images, self.num_blocks)
        pooled: Tensor = backbone(images)
        return pooled


def crop_and_flip(crops: CropsConfig, scale: tuple[float, float]) -> CropsConfig:
    """The augmentation of linear probes, of the size and normalisation of `crops`: no colour."""
    return replace(
        crops,
        num_local_crops=0,
        global_scale=scale,
        flip_prob=0.5,
        jitter_prob=0.0,
        grayscale_prob=0.0,
        blur_prob=(0.0, 0.0, 0.0),
        invert_blur_prob=False,
        solarize_prob=0.0,
        device="cpu",
    )


def as_tokens(rows: Tensor) -> Tensor:
    """Tokens [n, S, D] of what a view gave: those, or pooled features [n, D]."""
    return rows if rows.dim() == 3 else pooled_tokens(rows)
