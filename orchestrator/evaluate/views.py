"""What is made of an image before features are taken, and which are taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_core.config import CropsConfig
from dino_core.crops import NUM_GLOBAL_CROPS, MultiCrop
from dino_core.eval.features import eval_transform


class View(Protocol):
    """How features of images are made: a frozen dataclass of plain values, which tell it from others.

    Views are sent to other processes, and features are kept on disk under what a view says of itself.
    """

    def make(self, image: NDArray[np.uint8], sample: int) -> Tensor:
        """What is passed on of one image [H, W, 3], on the CPU; `sample` is its number in its split. Images of one
        shape make a batch; a leading axis of several views of each image, [q, 3, h, w], counts them in the batch."""

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        """Features [B, ...], the same for each image whatever else is in the batch, which is on the backbone's device.
        Called without gradients, with the backbone in evaluation mode."""


@dataclass(frozen=True)
class CentreCrop:
    """Pooled features [D] of the centre: what k-NN is taken from while a run trains."""

    size: int
    crop_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is made."""
        return (3, self.size, self.size)

    def make(self, image: NDArray[np.uint8], sample: int) -> Tensor:
        return eval_transform(image, self.size, self.crop_fraction, self.mean, self.std)

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        pooled: Tensor = backbone(batch)
        return pooled


@dataclass(frozen=True)
class AugmentedViews:
    """Pooled features [q, D] of q global crops of each image, an even number, the same for every run and seed.

    Args:
        crops: The augmentation; its colours are made on the CPU, or they would have to be made anew each time.
    """

    crops: CropsConfig
    num: int

    dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is made."""
        return (self.num, 3, self.crops.global_size, self.crops.global_size)

    @cached_property
    def _multi_crop(self) -> MultiCrop:
        return MultiCrop(replace(self.crops, num_local_crops=0, device="cpu"), seed=0)

    def make(self, image: NDArray[np.uint8], sample: int) -> Tensor:
        pairs = np.arange(self.num // NUM_GLOBAL_CROPS)
        made = self._multi_crop.make([image] * len(pairs), pairs, np.full(len(pairs), sample))["global_crops"]
        return torch.from_numpy(made).flatten(0, 1)

    def finish(self, batch: Tensor, device: torch.device) -> Tensor:
        """uint8 [B, q, 3, side, side] -> normalised [B * q, 3, side, side]."""
        pairs = batch.view(-1, NUM_GLOBAL_CROPS, *self.shape[1:])
        finished = self._multi_crop.finish({"global_crops": pairs}, device).global_crops
        return finished.unflatten(0, (NUM_GLOBAL_CROPS, -1)).transpose(0, 1).flatten(0, 1)

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        pooled: Tensor = backbone(self.finish(batch, batch.device))
        return pooled.unflatten(0, (len(batch), self.num))
