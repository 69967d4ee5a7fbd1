"""Features of the last blocks of a frozen backbone: the class token and every patch, for images of any size.

Axes: B images, H x W pixels, h x w patches (or places of a convnet's last feature map), D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_core.eval.features import evaluating

_REFUSALS = (AssertionError, RuntimeError, ValueError)
"""What timm's models raise for images that they do not take."""


class LayerOutput(NamedTuple):
    """What one block gives."""

    class_token: Tensor | None
    """[B, D]; None for a backbone that has none."""
    patches: Tensor
    """[B, h, w, D]; registers are left out."""


@torch.no_grad()
def intermediate_layers(backbone: nn.Module, images: Tensor, n: int = 1, norm: bool = True) -> list[LayerOutput]:
    """Outputs of the last `n` blocks of a ViT, the last one at the end; of any other timm model its last feature map.

    In fp32 on the backbone's device, which runs in evaluation mode; every module is put back into the mode in which it
    was found.

    Args:
        images: [B, 3, H, W], normalised. H and W are multiples of the patch size; a ViT of `dynamic_img_size`, as all
            that this package builds, interpolates its position embeddings for them (bicubic, antialiased).
        n: 1 to the number of blocks; 1 for a backbone that is no ViT.
        norm: Apply the ViT's last norm to each output, as DINO and DINOv2 do. A ViT that pools its patches has that
            norm behind the pooling, and gives them without it.

    Source: `get_intermediate_layers` of DINO (arXiv 2104.14294, appendix) and DINOv2 (arXiv 2304.07193).

    Raises:
        ValueError: images of another shape or of a size that the backbone does not take, more blocks than there are,
            or a backbone that gives no patches.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images {list(images.shape)}: must be [B, 3, H, W] with B >= 1")
    depth = _num_blocks(backbone)
    name = type(backbone).__name__
    if not 1 <= n <= depth:
        raise ValueError(f"n = {n}: must be >= 1 and <= {depth}, the blocks of this {name} that give patches")
    parameter = next(backbone.parameters(), None)
    if parameter is not None:
        images = images.to(parameter.device)
    with evaluating(backbone):
        try:
            return _of_vit(backbone, images, n, norm) if _is_vit(backbone) else [_last_map(backbone, images)]
        except _REFUSALS as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} pixels: {name}: {reason}") from error


def patch_size(backbone: nn.Module) -> int:
    """Pixels per side of a ViT's patch; 1 for a backbone that is none."""
    return int(_attribute(backbone, "patch_embed").feat_ratio()) if _is_vit(backbone) else 1


def _is_vit(backbone: nn.Module) -> bool:
    """Whether timm gives the class token of its blocks beside their patches."""
    forward = getattr(backbone, "forward_intermediates", None)
    return (
        callable(forward)
        and "return_prefix_tokens" in inspect.signature(forward).parameters
        and isinstance(getattr(backbone, "blocks", None), nn.Sequential | nn.ModuleList)
        and hasattr(backbone, "num_prefix_tokens")
    )


def _num_blocks(backbone: nn.Module) -> int:
    return len(_attribute(backbone, "blocks")) if _is_vit(backbone) else 1


def _of_vit(backbone: nn.Module, images: Tensor, n: int, norm: bool) -> list[LayerOutput]:
    forward: Callable[..., list[Any]] = _attribute(backbone, "forward_intermediates")
    outputs = forward(
        images, indices=n, return_prefix_tokens=True, norm=norm, output_fmt="NCHW", intermediates_only=True
    )
    has_class_token = getattr(backbone, "cls_token", None) is not None
    found = []
    for output in outputs:
        patches, prefix = output if isinstance(output, tuple) else (output, None)
        class_token = prefix[:, 0].float() if prefix is not None and has_class_token else None
        found.append(LayerOutput(class_token, patches.permute(0, 2, 3, 1).float()))
    return found


def _last_map(backbone: nn.Module, images: Tensor) -> LayerOutput:
    forward = getattr(backbone, "forward_features", None)
    features = forward(images) if callable(forward) else None
    if not isinstance(features, Tensor) or features.dim() != 4:
        raise ValueError("gives no map of patches [B, D, h, w]")
    channels_last = features.shape[1] != _attribute(backbone, "num_features")  # Swin and its like
    return LayerOutput(None, (features if channels_last else features.permute(0, 2, 3, 1)).float())


def _attribute(backbone: nn.Module, name: str) -> Any:
    return getattr(backbone, name)
