"""Stochastic depth whose choices depend on the run's seed and the step, not on a global RNG or the number of workers.

Source: Huang et al. (arXiv 1603.09382).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from dino_core.counter_rng import absorb, root
from dino_core.distributed import rank

_STREAM = 2**63
"""Sets these numbers apart from those of the crops, whose second coordinate is an epoch."""


@dataclass
class _Pass:
    """One forward pass: its coordinates, the masks drawn for it, and how often each layer has taken one."""

    key: tuple[int, int, int]
    """(seed, step, group)."""
    num_crops: int
    images: np.ndarray
    """Places of its images in the global batch."""
    device: torch.device
    calls: list[int]
    tables: list[list[Tensor]] = field(default_factory=list)
    """For each call the factors [rows] of each layer."""


Bookmark: TypeAlias = tuple[_Pass, tuple[int, ...]]
"""A place in a forward pass: the pass, and the calls of each layer until then."""


class DepthMasks:
    """What all `StochasticDepth` layers of a backbone share: which rows keep which layer in the current forward pass.

    A mask is a pure function of (seed, step, group, call, layer, crop, image of the global batch), so it does not
    matter how many ranks share the batch, or in how many parts a rank takes its share.
    """

    def __init__(self) -> None:
        self._drop_probs: list[float] = []
        self._pass: _Pass | None = None
        self._num_calls = 1

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
        """Before the forward pass of one group of crops: `num_crops` x `num_images` rows on this rank, crop-major.

        Args:
            first_image: where these images begin within the rank's share of the global batch.
            share: images of the rank's whole share; None: these are all.
        """
        first = rank() * (num_images if share is None else share) + first_image
        images = np.arange(first, first + num_images)
        current = _Pass((seed, step, group), num_crops, images, device, [0] * len(self._drop_probs))
        self._pass = current
        # drawn here rather than in the pass, where torch.compile would have to look inside
        current.tables = [self._draw(current, call) for call in range(self._num_calls)]

    def take(self, layer: int) -> Tensor:
        """Factors [rows] of the layer's next call in this pass: 0, or 1 / (share of rows kept)."""
        current = self._pass
        if current is None:
            raise RuntimeError("stochastic depth in training mode before DepthMasks.begin(): no seed and step are set")
        call = current.calls[layer]
        current.calls[layer] += 1
        if call == len(current.tables):  # a layer used more than once per pass: most backbones never come here
            current.tables.append(self._draw(current, call))
            self._num_calls = max(self._num_calls, len(current.tables))
        return current.tables[call][layer]

    def bookmark(self) -> Bookmark | None:
        """The place in the current pass, to `resume` from when a part of it is computed again."""
        return None if self._pass is None else (self._pass, tuple(self._pass.calls))

    def resume(self, bookmark: Bookmark | None) -> None:
        """Go back to a place in the current or an earlier pass."""
        if bookmark is not None:
            self._pass, calls = bookmark
            self._pass.calls[:] = calls

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _draw(self, current: _Pass, call: int) -> list[Tensor]:
        seed, *words = current.key
        key = root(seed)
        for word in (_STREAM, *words, call):
            key = absorb(key, word)
        layers = absorb(key, np.arange(len(self._drop_probs)))  # [L]
        crops = absorb(layers[:, None], np.arange(current.num_crops))  # [L, crops]
        draws = (absorb(crops[:, :, None], current.images) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        keep = 1 - np.asarray(self._drop_probs, dtype=np.float32)[:, None, None]
        factors = (draws < keep) / keep  # [L, crops, images]
        table = torch.from_numpy(factors.astype(np.float32).reshape(len(keep), -1))
        return list(table.to(current.device, non_blocking=True))


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
