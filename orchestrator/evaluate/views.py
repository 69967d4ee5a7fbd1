"""What is made of an image before features are taken, and which are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

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

    def make(self, image: NDArray[np.uint8], sample: int) -> Tensor:
        return eval_transform(image, self.size, self.crop_fraction, self.mean, self.std)

    def features(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        pooled: Tensor = backbone(batch)
        return pooled
