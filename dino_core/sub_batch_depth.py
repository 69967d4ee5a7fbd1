"""Stochastic depth by sub-batches: a residual branch is computed only for the rows that keep it.

Where `StochasticDepth` computes a branch for all rows and throws away a share of the result, here as many fewer rows go
into it: x[rows] + (n / k) * branch(x[rows]). Time and memory of a branch fall by the drop rate.

Source: DINOv2 (arXiv 2304.07193), section 5, "efficient stochastic depth".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dino_core.packing import Layout
from dino_core.stochastic_depth import Kept, StochasticDepth

LEAST_RATE = 0.1
"""Up to it a branch is computed for all rows, since choosing rows costs more than it saves (DINOv2's code)."""

Branch = Callable[[Tensor, Any], Tensor]
"""From rows, and what attention is told of them, to what is added to them."""


class SubBatchDepth(StochasticDepth):
    """Names the rows for which the branch before it is computed; `SubBatchBlock` adds the result to them."""

    def choose(self) -> Kept:
        return self.masks.choose(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("stochastic depth by sub-batches in training mode outside of a SubBatchBlock")
        return x


class SubBatchBlock(Block):
    """timm's block, whose branches may have `SubBatchDepth` in the place of stochastic depth."""

    def forward(  # type: ignore[override]  # what else attention is told differs between versions of timm
        self, x: Tensor, attn_mask: Tensor | Layout | None = None, **others: Any
    ) -> Tensor:
        def attend(rows: Tensor, mask: Any) -> Tensor:
            return self.ls1(self.attn(self.norm1(rows), attn_mask=mask, **others))

        def feed_forward(rows: Tensor, mask: Any) -> Tensor:
            return self.ls2(self.mlp(self.norm2(rows)))

        return _add(_add(x, attend, self.drop_path1, attn_mask), feed_forward, self.drop_path2, attn_mask)


def _add(x: Tensor, branch: Branch, depth: nn.Module, mask: Tensor | Layout | None) -> Tensor:
    if not (isinstance(depth, SubBatchDepth) and depth.training):
        return x + depth(branch(x, mask))
    kept = depth.choose()
    residual = branch(x.index_select(0, kept.rows), mask if kept.layout is None else kept.layout)
    scale = kept.scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return x.index_add(0, kept.rows, residual.to(x.dtype) * scale)


def drop_sub_batches(backbone: nn.Module, group_size: int | None) -> None:
    """Make a backbone's stochastic depth of more than `LEAST_RATE` one of sub-batches (`DepthMasks.keep_sub_batches`).

    Raises:
        NotImplementedError: it has none, or some of it in other blocks than timm's `Block`.
    """
    places = [(block, name) for block in backbone.modules() if type(block) is Block for name in _LAYERS]
    layers = [layer for block, name in places if isinstance(layer := getattr(block, name), StochasticDepth)]
    everywhere = {module for module in backbone.modules() if isinstance(module, StochasticDepth)}
    if others := {module for module in everywhere if module.drop_prob > LEAST_RATE} - set(layers):
        raise NotImplementedError(f"{len(others)} of its branches with stochastic depth are not those of timm's Block")
    chosen = [layer for layer in layers if layer.drop_prob > LEAST_RATE]
    if not chosen:
        raise NotImplementedError(f"none of its branches has stochastic depth of more than {LEAST_RATE:g}")
    for block in {block for block, _ in places}:
        block.__class__ = SubBatchBlock
    for layer in chosen:
        layer.__class__ = SubBatchDepth
        layer.masks.keep_sub_batches(layer.layer, group_size)


_LAYERS = ("drop_path1", "drop_path2")
