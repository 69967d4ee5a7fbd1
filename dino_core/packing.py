"""Token packing: crops of several sizes in one pass of a timm ViT.

Norms, linear layers and everything else that treats tokens one by one see the tokens of all crops in one matrix; only
attention looks at the crops of one size at a time. This is exact, needs no mask, and any kernel of
`scaled_dot_product_attention` will do. DINOv2 packs with a block-diagonal mask in the attention instead (arXiv
2304.07193, section 5).

Axes: n crops of a group, N tokens of a crop, D features; a packed pass has the n_1 N_1 + n_2 N_2 + ... tokens of all
crops one after the other, [tokens, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models import checkpoint
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.masking import put_mask_token


class Layout(NamedTuple):
    """How the tokens of a packed pass divide into crops. It goes where an attention mask would."""

    crops: tuple[int, ...]
    """n of each group."""
    tokens: tuple[int, ...]
    """N of each group: tokens of a crop, class and register tokens included."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each group."""
        return [crops * tokens for crops, tokens in zip(self.crops, self.tokens, strict=True)]


class PackedAttention(Attention):
    """timm's attention, which also takes tokens [tokens, D] with a `Layout`."""

    def forward(  # type: ignore[override]  # what else it is told differs between versions of timm
        self, x: Tensor, attn_mask: Tensor | Layout | None = None, **others: Any
    ) -> Tensor:
        if not isinstance(attn_mask, Layout):
            return super().forward(x, attn_mask=attn_mask, **others)
        parts = self.qkv(x).split(attn_mask.lengths)
        x = torch.cat(
            [self._attend(part.unflatten(0, (n, -1))) for part, n in zip(parts, attn_mask.crops, strict=True)]
        )
        return self.proj_drop(self.proj(self.norm(x)))

    def _attend(self, qkv: Tensor) -> Tensor:
        """[n, N, 3 * heads * d] -> [n * N, heads * d]."""
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        query, key = self.q_norm(query), self.k_norm(key)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(query, key, value)
        else:
            x = (query * self.scale @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        return x.transpose(1, 2).flatten(2).flatten(0, 1)


class PackedVisionTransformer(VisionTransformer):
    """A timm ViT that also takes several groups of crops at once; `pack` makes one."""

    def forward(  # type: ignore[override]  # groups come with masks of patches, images with those of attention
        self, x: Tensor | Sequence[Tensor], masks: Sequence[Tensor | None] = (), **others: Any
    ) -> Any:
        """Images as any ViT does, or groups [n_1, 3, H_1, W_1], [n_2, 3, H_2, W_2], ...

        Args:
            masks: bool [n, N - prefix] for each group, or None; the patches in whose place there is a `mask_token`.

        Returns:
            Of groups: features [n, D] and normalised tokens [n, N, D] of each.
        """
        if isinstance(x, Tensor):
            return super().forward(x, **others)
        embedded = [self._embed(crops, mask) for crops, mask in zip(x, masks, strict=True)]
        layout = Layout(tuple(e.shape[0] for e in embedded), tuple(e.shape[1] for e in embedded))
        packed = self.norm_pre(torch.cat([e.flatten(0, 1) for e in embedded]))
        for block in self.blocks:
            if self.grad_checkpointing:
                packed = checkpoint(block, packed, attn_mask=layout)
            else:
                packed = block(packed, attn_mask=layout)
        parts = self.norm(packed).split(layout.lengths)
        tokens = [part.unflatten(0, (n, -1)) for part, n in zip(parts, layout.crops, strict=True)]
        return [self.forward_head(each) for each in tokens], tokens

    def _embed(self, crops: Tensor, mask: Tensor | None) -> Tensor:
        patches = self.patch_embed(crops)
        if mask is not None:
            patches = put_mask_token(patches, mask, self.get_parameter("mask_token"))
        return self._pos_embed(patches)


def pack(backbone: nn.Module) -> None:
    """Make a ViT take several groups of crops in one call, as `PackedVisionTransformer`. Its weights, their names and
    what it does with one batch of images stay as they are; so do hooks, and copies can do it too.

    Raises:
        NotImplementedError: it is not put together of what can be packed without changing a result.
    """
    if problem := _problem(backbone):
        raise NotImplementedError(problem)
    for module in backbone.modules():
        if type(module) is Attention:
            module.__class__ = PackedAttention
    # what the model's own class adds, such as DeiT's second token, stays
    kind = type(backbone)
    backbone.__class__ = type(f"Packed{kind.__name__}", (PackedVisionTransformer, kind), {})


def tokens_of(backbone: nn.Module, crops: Tensor) -> int:
    """N, the tokens of a ViT for a crop of this size."""
    patch_embed: Any = backbone.get_submodule("patch_embed")
    prefix: Any = backbone.num_prefix_tokens
    height, width = crops.shape[-2:]
    return int(prefix) + int(height // patch_embed.feat_ratio()) * int(width // patch_embed.feat_ratio())


def _problem(backbone: nn.Module) -> str:
    """What stands in the way; empty if nothing does."""
    name = type(backbone).__name__
    if not isinstance(backbone, VisionTransformer):
        return f"{name} is no timm VisionTransformer"
    kind = type(backbone)
    if any(getattr(kind, part) is not getattr(VisionTransformer, part) for part in ("forward", "forward_features")):
        return f"{name} has a forward pass of its own"
    if not isinstance(backbone.patch_drop, nn.Identity) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in backbone.modules()
    ):
        return f"{name} drops tokens or values at random"
    for block in backbone.blocks:
        if type(block) not in _BLOCKS:
            return f"{name} has blocks of another kind ({type(block).__name__})"
        for path, module in block.named_modules():
            if isinstance(module, _BatchNorm):
                return f"{name} has batch norms in its blocks, which see crops of one size at a time"
            if path.split(".")[-1] == "attn" and (type(module) is not Attention or _is_gated(module)):
                return f"{name} has attention of another kind ({type(module).__name__})"
    return ""


_BLOCKS = (Block, ResPostBlock, ParallelThingsBlock)
"""Those that hand an attention mask on to `Attention` and treat tokens one by one otherwise."""


def _is_gated(attention: nn.Module) -> bool:
    return "gate" in dict(attention.named_children())
