"""Attention of the class token: maps, masks of what holds most of it, and how well these fit objects.

Axes: n images, H x W pixels, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers.attention import Attention
from torch import Tensor, nn

from dino_core.eval.features import evaluating
from dino_core.eval.layers import patch_size
from dino_core.eval.masks import VOID, Labels, jaccard, object_labels, resize_mask


@torch.no_grad()
def attention_maps(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """Attention of the class token to the patches in the last block, float32 [n, heads, h, w] on the CPU.

    Computed again from queries and keys, since fused kernels do not give it. Over all tokens it sums to 1; the class
    token itself and registers are left out. None for a backbone that is no ViT of timm's plain attention with a class
    token (convnets, Swin, CaiT, those with rotary or relative positions, ...).

    Args:
        images: [n, 3, H, W], normalised, of a size that the backbone takes.

    Source: DINO (arXiv 2104.14294), figures 1 and 3.
    """
    attention = _last_attention(backbone)
    if attention is None:
        return None
    forward: Any = backbone.forward_features  # not by calling the backbone: compiled code would pass by the hook
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with evaluating(backbone):
            forward(images.to(next(backbone.parameters()).device))
    finally:
        handle.remove()
    tokens = seen[0]  # [n, t, D]
    with evaluating(attention):
        qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1))  # [n, t, 3, heads, d]
        query, key = attention.q_norm(qkv[:, :1, 0]), attention.k_norm(qkv[:, :, 1])
    scores = torch.einsum("nqhd,nthd->nhqt", query.float(), key.float()) * attention.scale
    prefix: Any = backbone.num_prefix_tokens
    weights = scores.softmax(dim=-1)[:, :, 0, prefix:]  # [n, heads, h * w]
    return weights.unflatten(-1, (images.shape[2] // patch_size(backbone), -1)).cpu()


def has_attention_maps(backbone: nn.Module) -> bool:
    """Whether `attention_maps` gives any."""
    return _last_attention(backbone) is not None


class Sizes(NamedTuple):
    """What becomes of an image and its mask: resized, then cut at the right and at the bottom."""

    resized: tuple[int, int]
    """Height and width."""
    seen: tuple[int, int]
    """Height and width that are left, multiples of the patch."""


def image_sizes(height: int, width: int, size: int | None, patch: int, *, square: bool = False) -> Sizes:
    """Sizes by the authors' rule: the shorter side becomes `size`, then what fills no patch is cut off.

    Args:
        size: pixels; None leaves the image as large as it is.
        square: resize to `size` x `size`, whatever the image's shape; the default of the authors' script.

    Raises:
        ValueError: nothing would be left.
    """
    if size is None:
        resized = height, width
    elif square:
        resized = size, size
    else:
        resized = (size, size * width // height) if height <= width else (size * height // width, size)
    seen = resized[0] - resized[0] % patch, resized[1] - resized[1] % patch
    if 0 in seen:
        raise ValueError(f"{resized[1]} x {resized[0]} pixels: must be {patch} x {patch} at least, a patch")
    return Sizes(resized, seen)


def prepare_image(image: NDArray[np.uint8], sizes: Sizes, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An image [H, W, 3] resized (bilinear, antialiased), cut and normalised: float32 [3, *sizes.seen].

    Args:
        mean, std: of red, green, blue on the scale 0 to 1.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    if sizes.resized != image.shape[:2]:
        pixels = F.interpolate(pixels, size=sizes.resized, mode="bilinear", antialias=True)
    cut = pixels[0, :, : sizes.seen[0], : sizes.seen[1]].float() / 255
    return (cut - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def prepare_mask(mask: Labels, sizes: Sizes) -> Labels:
    """A mask [H, W] resized (nearest) and cut likewise."""
    return resize_mask(mask, sizes.resized)[: sizes.seen[0], : sizes.seen[1]]


def mass_masks(maps: Tensor, mass: float) -> Tensor:
    """The patches that hold most of the attention, bool [..., h, w].

    Patches are left out from the smallest on while those left out hold at most 1 - `mass` of the map's sum; of equal
    ones the first is left out first. A map of zeros keeps none.

    Args:
        maps: [..., h, w], >= 0.
        mass: > 0 and <= 1; figure 4 of the paper says 0.6, its appendix 0.8.

    Source: DINO (arXiv 2104.14294), figure 4; `visualize_attention.py` of its code.

    Raises:
        ValueError: a mass out of range, or maps that are not finite.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass = {mass}: must be > 0 and <= 1")
    if not maps.isfinite().all():
        raise ValueError("maps: must be finite")
    ordered, order = maps.flatten(-2).sort(dim=-1, stable=True)
    total = ordered.sum(dim=-1, keepdim=True)
    share = (ordered / torch.where(total > 0, total, 1)).cumsum(dim=-1)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, share > 1 - mass)
    return kept.view_as(maps)


def enlarge(masks: Tensor, patch: int) -> Tensor:
    """[..., h, w] -> [..., h * patch, w * patch]: each pixel is as its patch."""
    return masks.repeat_interleave(patch, dim=-2).repeat_interleave(patch, dim=-1)


def object_jaccards(masks: Tensor, truth: Labels, *, ignore_void: bool = True) -> NDArray[np.float64]:
    """Intersection over union of each object (ascending by label) with each head's mask: [objects, heads].

    Args:
        masks: bool [heads, H, W].
        truth: [H, W]; 0 is the background and 255 void. May hold no object.
        ignore_void: leave out void pixels; else they count as background, as in the authors' code.

    Raises:
        ValueError: masks of different sizes.
    """
    heads = masks.cpu().numpy()
    valid = truth != VOID if ignore_void else None
    labels = object_labels(truth)
    rows = [jaccard(heads, (truth == label)[None], valid) for label in labels]
    return np.stack(rows) if rows else np.zeros((0, len(heads)))


def mean_best_jaccard(images: Sequence[NDArray[np.float64]]) -> float:
    """For each object the head that fits it best, their mean over the objects of an image, the mean over images.

    The truth chooses the head, for each object anew: the score grows with the number of heads, whatever these do.

    Args:
        images: [objects, heads] of each, as `object_jaccards` gives it; images without objects do not count.

    Source: DINO (arXiv 2104.14294), figure 4; the rule by its first author, github.com/facebookresearch/dino/issues/54.

    Raises:
        ValueError: no object in any image.
    """
    scores = [float(image.max(axis=1).mean()) for image in images if len(image)]
    if not scores:
        raise ValueError("images: must hold an object at least")
    return float(np.mean(scores))


def _last_attention(backbone: nn.Module) -> Attention | None:
    blocks: Any = getattr(backbone, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
    has_class_token = getattr(backbone, "cls_token", None) is not None
    return attention if isinstance(attention, Attention) and has_class_token else None
