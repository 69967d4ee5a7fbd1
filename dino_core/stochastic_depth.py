"""Stochastic depth whose choices depend on the run's seed and the step, not on a global RNG or the number of workers.

Source: Huang et al. (arXiv 1603.09382); of sub-batches, DINOv2 (arXiv 2304.07193, section 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from dino_core.counter_rng import absorb, root
from dino_core.distributed import rank
from dino_core.packing import Layout

_STREAM = 2**63
"""Sets these numbers apart from those of the crops, whose second coordinate is an epoch."""


class CropGroup(NamedTuple):
    """Crops of one size in a forward pass."""

    number: int
    """Sets its draws apart from those of the step's other groups."""
    num_crops: int
    """Of each image."""
    num_tokens: int | None = None
    """Of a crop, in a packed pass (see `packing`), whose rows are tokens; None: its rows are crops."""


class Kept(NamedTuple):
    """The rows for which a branch is computed at all."""

    rows: Tensor
    """int64 [k], ascending."""
    scale: Tensor
    """float32 [k], rows over rows kept."""
    layout: Layout | None
    """Of these rows, in a packed pass."""


@dataclass
class _Pass:
    """One forward pass: its coordinates, what was drawn for it, and how often each layer has taken from it."""

    seed: int
    step: int
    groups: Sequence[CropGroup]
    images: np.ndarray
    """Places of its images in the global batch."""
    device: torch.device
    calls: list[int]
    tables: list[list[Tensor | Kept]] = field(default_factory=list)
    """For each call what each layer is given."""


Bookmark: TypeAlias = tuple[_Pass, tuple[int, ...]]
"""A place in a forward pass: the pass, and the calls of each layer until then."""


class DepthMasks:
    """What all `StochasticDepth` layers of a backbone share: which rows keep which layer in the current forward pass.

    A mask is a pure function of (seed, step, group, call, layer, crop, image of the global batch), so it does not
    matter how many ranks share the batch, or in how many parts a rank takes its share. Which rows are kept of a
    sub-batch follows from the same numbers of its images (`keep_sub_batches`).
    """

    def __init__(self) -> None:
        self._drop_probs: list[float] = []
        self._sub_batched: set[int] = set()
        self._group_size: int | None = None
        self._pass: _Pass | None = None
        self._num_calls = 1

    def add_layer(self, drop_prob: float) -> int:
        self._drop_probs.append(drop_prob)
        return len(self._drop_probs) - 1

    def keep_sub_batches(self, layer: int, group_size: int | None) -> None:
        """From now on the layer is told which rows to compute, instead of factors.

        Of the n crops in a group of `group_size` images that follow each other in the global batch, exactly
        max(floor(n * (1 - rate)), 1) are kept, those with the smallest numbers; None: in all images of a pass. A pass
        must hold whole groups.
        """
        self._sub_batched.add(layer)
        self._group_size = group_size

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
        groups = [CropGroup(group, num_crops)]
        self.begin_pass(seed, step, groups, num_images=num_images, device=device, first_image=first_image, share=share)

    def begin_pass(
        self,
        seed: int,
        step: int,
        groups: Sequence[CropGroup],
        *,
        num_images: int,
        device: torch.device,
        first_image: int = 0,
        share: int | None = None,
    ) -> None:
        """As `begin` for one group or, packed, for several one after the other, each with what it would draw alone."""
        first = rank() * (num_images if share is None else share) + first_image
        images = np.arange(first, first + num_images)
        if self._sub_batched and self._group_size is not None and num_images % self._group_size:
            raise ValueError(f"{num_images} images in a pass: must be a multiple of the {self._group_size} of a group")
        current = _Pass(seed, step, groups, images, device, [0] * len(self._drop_probs))
        self._pass = current
        # drawn here rather than in the pass, where torch.compile would have to look inside
        current.tables = [self._draw(current, call) for call in range(self._num_calls)]

    def take(self, layer: int) -> Tensor:
        """Factors [rows] of the layer's next call in this pass: 0, or 1 / (share of rows kept)."""
        factors = self._next(layer)
        assert isinstance(factors, Tensor)
        return factors

    def choose(self, layer: int) -> Kept:
        """The rows that a layer of `keep_sub_batches` computes in its next call in this pass."""
        kept = self._next(layer)
        assert isinstance(kept, Kept)
        return kept

    def _next(self, layer: int) -> Tensor | Kept:
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
    def _draw(self, current: _Pass, call: int) -> list[Tensor | Kept]:
        draws = [self._numbers(current, group, call) for group in current.groups]
        masked = [layer for layer in range(len(self._drop_probs)) if layer not in self._sub_batched]
        found: dict[int, Tensor | Kept] = dict(zip(masked, self._factors(current, masked, draws), strict=True))
        for rate in {self._drop_probs[layer] for layer in self._sub_batched}:
            layers = [layer for layer in sorted(self._sub_batched) if self._drop_probs[layer] == rate]
            found |= zip(layers, self._kept(current, layers, rate, draws), strict=True)
        return [found[layer] for layer in range(len(self._drop_probs))]

    def _numbers(self, current: _Pass, group: CropGroup, call: int) -> np.ndarray:
        """uint64 [L, crops, images]."""
        key = root(current.seed)
        for word in (_STREAM, current.step, group.number, call):
            key = absorb(key, word)
        layers = absorb(key, np.arange(len(self._drop_probs)))  # [L]
        crops = absorb(layers[:, None], np.arange(group.num_crops))  # [L, crops]
        return absorb(crops[:, :, None], current.images)

    def _factors(self, current: _Pass, layers: list[int], draws: list[np.ndarray]) -> list[Tensor]:
        keep = 1 - np.asarray(self._drop_probs, dtype=np.float32)[layers, None]
        tables = []
        for group, numbers in zip(current.groups, draws, strict=True):
            rows = numbers[layers].reshape(len(layers), numbers[0].size)  # [layers, crops * images]
            factors = ((rows >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24) < keep) / keep
            table = torch.from_numpy(factors.astype(np.float32)).to(current.device, non_blocking=True)
            if group.num_tokens is not None:
                table = table[:, :, None].expand(-1, -1, group.num_tokens).flatten(1)
            tables.append(table)
        return list(tables[0] if len(tables) == 1 else torch.cat(tables, dim=1))

    def _kept(self, current: _Pass, layers: list[int], rate: float, draws: list[np.ndarray]) -> list[Kept]:
        """Of layers of one rate."""
        rows, scales, counts, tokens, first = [], [], [], [], 0
        for group, numbers in zip(current.groups, draws, strict=True):
            chosen = smallest(numbers[layers], rate, self._group_size or len(current.images))  # [layers, k]
            num_rows, num_tokens = numbers[0].size, group.num_tokens or 1
            index = torch.from_numpy(chosen).to(current.device, non_blocking=True)
            if group.num_tokens is not None:
                of_crop = torch.arange(num_tokens, device=current.device)
                index = (index[:, :, None] * num_tokens + of_crop).flatten(1)
                tokens.append(num_tokens)
            rows.append(index + first)
            scales.append(torch.full((index.shape[1],), num_rows / chosen.shape[1], device=current.device))
            counts.append(chosen.shape[1])
            first += num_rows * num_tokens
        scale, layout = torch.cat(scales), Layout(tuple(counts), tuple(tokens)) if tokens else None
        return [Kept(of_layer, scale, layout) for of_layer in torch.cat(rows, dim=1)]


def smallest(numbers: np.ndarray, rate: float, group_size: int) -> np.ndarray:
    """The rows that are kept, given their numbers [L, crops, images]: int64 [L, k], ascending."""
    num_layers, num_crops, num_images = numbers.shape
    groups = numbers.reshape(num_layers, num_crops, -1, group_size).transpose(0, 2, 1, 3)  # [L, groups, crops, size]
    per_group = num_crops * group_size
    count = max(int(per_group * (1 - rate) + 1e-6), 1)  # 10 * (1 - 0.9) is less than 1
    order = groups.reshape(num_layers, -1, per_group).argpartition(count - 1, axis=2)[:, :, :count]
    crop, image = np.divmod(order, group_size)
    first = np.arange(order.shape[1])[None, :, None] * group_size
    rows = crop * num_images + first + image
    return np.sort(rows.reshape(num_layers, -1), axis=1)


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
