"""Stochastic depth whose choices depend on the run's seed and the step, not on a global RNG or the number of workers.

Source: Huang et al. (arXiv 1603.09382).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from dino_core.counter_rng import absorb, root
from dino_core.distributed import rank

_STREAM = 2**63
"""Sets these numbers apart from those of the crops, whose second coordinate is an epoch."""


class DepthMasks:
    """What all `StochasticDepth` layers of a backbone share: which rows keep which layer in the current forward pass.

    A mask is a pure function of (seed, step, group, call, layer, crop, image of the global batch), so it does not
    matter how many ranks share the batch.
    """

    def __init__(self) -> None:
        self._drop_probs: list[float] = []
        self._key: tuple[int, int, int] | None = None
        self._shape = (0, 0)
        self._device = torch.device("cpu")
        self._tables: list[list[Tensor]] = []
        self._calls: list[int] = []

    def add_layer(self, drop_prob: float) -> int:
        self._drop_probs.append(drop_prob)
        return len(self._drop_probs) - 1

    def begin(
        self,
        seed: int,
        step: int,
        group: int,
        *,
        num_crops: int,
        num_images: int,
        device: torch.device,
        first_image: int = 0,
        share: int | None = None,
    ) -> None:
        """Before the forward pass of one group of crops: `num_crops` x `num_images` rows on this rank, crop-major."""
        self._key = (seed, step, group)
        self._shape = (num_crops, num_images)
        self._first = rank() * (share or num_images) + first_image
        self._device = device
        self._tables = []
        self._calls = [0] * len(self._drop_probs)

    def take(self, layer: int) -> Tensor:
        """Factors [rows] of the layer's next call in this pass: 0, or 1 / (share of rows kept)."""
        if self._key is None:
            raise RuntimeError("stochastic depth in training mode before DepthMasks.begin(): no seed and step are set")
        call = self._calls[layer]
        self._calls[layer] += 1
        if call == len(self._tables):  # a layer used more than once per pass: most backbones never come here again
            self._tables.append(self._draw(call))
        return self._tables[call][layer]

    def _draw(self, call: int) -> list[Tensor]:
        assert self._key is not None
        num_crops, num_images = self._shape
        key = root(self._key[0])
        for word in (_STREAM, *self._key[1:], call):
            key = absorb(key, word)
        layers = absorb(key, np.arange(len(self._drop_probs)))  # [L]
        crops = absorb(layers[:, None], np.arange(num_crops))  # [L, crops]
        images = self._first + np.arange(num_images)
        draws = (absorb(crops[:, :, None], images) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        keep = 1 - np.asarray(self._drop_probs, dtype=np.float32)[:, None, None]
        factors = (draws < keep) / keep  # [L, crops, images]
        table = torch.from_numpy(factors.astype(np.float32).reshape(len(keep), -1))
        return list(table.to(self._device, non_blocking=True))


class StochasticDepth(nn.Module):
    """Drops the branch it stands in for the rows that its `DepthMasks` name; the rest is scaled up to compensate."""

    def __init__(self, masks: DepthMasks, drop_prob: float) -> None:
        super().__init__()
        self.masks = masks
        self.drop_prob = drop_prob
        self.layer = masks.add_layer(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        factors = self.masks.take(self.layer)
        if factors.shape[0] != x.shape[0]:
            raise RuntimeError(f"stochastic depth: {x.shape[0]} rows, but masks were drawn for {factors.shape[0]}")
        return x * factors.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def _children(module: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                yield parent, name, child


def adopt_stochastic_depth(backbone: nn.Module) -> None:
    """Replace every timm `DropPath` of a backbone by a `StochasticDepth`, all of them sharing their masks."""
    masks = DepthMasks()
    replaced: dict[nn.Module, StochasticDepth] = {}
    for parent, name, child in _children(backbone, DropPath):
        assert isinstance(child, DropPath)
        if child not in replaced:
            replaced[child] = StochasticDepth(masks, float(child.drop_prob or 0.0))
        setattr(parent, name, replaced[child])


def depth_masks(backbone: nn.Module) -> DepthMasks | None:
    """The masks that the `StochasticDepth` layers of a backbone share; None if it has no such layer."""
    return next((module.masks for module in backbone.modules() if isinstance(module, StochasticDepth)), None)


def remove_stochastic_depth(backbone: nn.Module) -> None:
    """Replace every `StochasticDepth` by an identity, as a teacher has it."""
    for parent, name, _ in _children(backbone, StochasticDepth):
        setattr(parent, name, nn.Identity())
