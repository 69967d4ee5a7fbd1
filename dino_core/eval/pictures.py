"""Pictures of what a backbone sees and makes of it, as arrays of bytes: crops, attention, features.

Rows of a picture are images; columns are told by each function. Nothing random: the same weights and images give the
same picture.

Axes: n images, H x W pixels, h x w patches (or places of a feature map), D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_core.crops import CropBatch
from dino_core.eval.features import evaluating

Picture = NDArray[np.uint8]
"""[height, width, 3]"""

TILE = 96
"""Side of an image in a picture, pixels."""
_LARGE_TILE = 192
_GAP = 2
_WHITE = 255
_HEAT_SHARE = 0.6
_LABEL_SHARE = 0.5
_DARKER = 4

_HEAT = torch.tensor(
    [
        *([68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142]),
        *([31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37]),
    ]
)
"""Viridis, from low to high: it keeps its order in grey and for the colour-blind."""


# --- from a backbone --------------------------------------------------------------------------------------------------


@torch.no_grad()
def patch_features(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """Features of the patches of a ViT, or of the places of a convnet's last feature map: float32 [n, h, w, D] on the
    CPU. None for a backbone that does not give them.

    Args:
        images: [n, 3, H, H], normalised.
    """
    if not hasattr(backbone, "forward_features"):
        return None
    features = _forward_features(backbone, images)
    if not isinstance(features, Tensor):
        return None
    if features.dim() == 3:  # [n, t, D]
        patches = features[:, _num_prefix_tokens(backbone) :].transpose(1, 2)  # [n, D, h * w]
        side = math.isqrt(patches.shape[-1])
        return (
            _as_grid(patches, -1).permute(0, 2, 3, 1).float().cpu() if side and side**2 == patches.shape[-1] else None
        )
    if features.dim() != 4:
        return None
    channels_last = features.shape[1] != backbone.num_features  # Swin and its like
    return (features if channels_last else features.permute(0, 2, 3, 1)).float().cpu()


def _forward_features(backbone: nn.Module, images: Tensor) -> Any:
    """Not by calling the backbone: compiled code would pass by the hooks."""
    forward: Any = backbone.forward_features
    device = next(backbone.parameters()).device
    with evaluating(backbone):
        return forward(images.to(device))


def _num_prefix_tokens(backbone: nn.Module) -> int:
    return int(getattr(backbone, "num_prefix_tokens", 0))


def _as_grid(values: Tensor, axis: int) -> Tensor:
    """The patches of a square image, along the last axis, as rows and columns."""
    side = math.isqrt(values.shape[axis])
    return values.unflatten(axis, (side, -1))


# --- pictures ---------------------------------------------------------------------------------------------------------


def crops_picture(
    originals: Sequence[Picture], crops: CropBatch, mean: Sequence[float], std: Sequence[float]
) -> Picture:
    """Each image beside its crops as the student sees them: the image, global crops, local crops.

    Local crops are as much smaller than global ones as they are for the student.

    Args:
        originals: uint8 [height, width, 3] of any sizes.
        crops: of these images, normalised by `mean` and `std`.
    """
    num, side = crops.num_images, crops.global_crops.shape[-1]
    groups = [crops.global_crops] if crops.local_crops is None else [crops.global_crops, crops.local_crops]
    rows: list[list[Picture]] = [[_tile(_square(original), TILE)] for original in originals]
    for group in groups:
        tile = max(1, round(TILE * group.shape[-1] / side))
        for index, pixels in enumerate(as_pixels(group, mean, std)):  # crop by crop, of all images
            rows[index % num].append(_tile(pixels, tile))
    return _grid(rows)


def attention_picture(images: Sequence[Picture], maps: Tensor) -> Picture:
    """Each image beside its attention over it: the image, the mean over the heads, each head.

    Each map goes from 0 to its own largest value.

    Args:
        images: uint8 [H, W, 3], what the maps [n, heads, h, w] were made from.
    """
    rows = []
    for image, heads in zip(images, maps, strict=True):
        tile = _tile(image, TILE)
        rows.append([tile, *(_overlay(tile, heat) for heat in (heads.mean(dim=0), *heads))])
    return _grid(rows)


def masks_picture(image: Picture, truth: NDArray[np.uint8], maps: Tensor, masks: Sequence[Tensor]) -> Picture:
    """An image's attention by heads, and below it the masks made of it.

    The first row is the image, the mean over the heads, each head, as in `attention_picture`; each other row the true
    mask and one set of masks, as what is left bright of the image.

    Args:
        image: uint8 [H, W, 3], what the maps [heads, h, w] were made from.
        truth: [H, W], 0 where there is no object.
        masks: bool [1 + heads, h, w] each: of the mean, of each head.
    """
    tile = _tile(image, _LARGE_TILE)
    rows = [[tile, *(_overlay(tile, heat) for heat in (maps.mean(dim=0), *maps))]]
    for heads in masks:
        shown = [_dimmed(tile, mask.numpy()) for mask in heads]
        rows.append([_dimmed(tile, truth != 0), *shown])
    return _grid(rows)


def labels_picture(
    images: Sequence[Picture], masks: Sequence[NDArray[np.uint8]], palette: Sequence[int] | None = None
) -> Picture:
    """Images in a row, each with its labels over it by colour.

    Args:
        images: uint8 [H, W, 3].
        masks: uint8 [H, W]; 0 shows the image alone.
        palette: red, green, blue of each label in turn; None: one of Viridis for each, over and over.
    """
    colours = _HEAT.numpy()[::-1] if palette is None else np.array(palette).reshape(-1, 3)
    row = []
    for image, mask in zip(images, masks, strict=True):
        tile = _tile(image, _LARGE_TILE)
        labels = _resized(np.repeat(mask[..., None], 3, axis=2), tile.shape[:2], smooth=False)
        mixed = _LABEL_SHARE * colours[labels[..., 0].astype(np.int64) % len(colours)] + (1 - _LABEL_SHARE) * tile
        row.append(np.where(labels == 0, tile, mixed.round()).astype(np.uint8))
    return _grid([row])


def features_picture(images: Sequence[Picture], features: Tensor) -> Picture:
    """Each image beside the first three principal components of its patches' features as red, green and blue.

    The components are those of all images together, so that a colour means the same in each; each goes from its 2nd to
    its 98th percentile. Between two backbones colours do not correspond.

    Args:
        images: uint8 [H, W, 3], what the features [n, h, w, D] were made from.
    """
    rows = []
    for image, colours in zip(images, principal_colours(features), strict=True):
        tile = _tile(image, TILE)
        rows.append([tile, _resized(colours, tile.shape[:2])])
    return _grid(rows)


def principal_colours(features: Tensor) -> NDArray[np.uint8]:
    """uint8 [n, h, w, 3]: the first three principal components of features [n, h, w, D]; grey where there are fewer."""
    rows = features.flatten(0, 2).double()
    rows = rows - rows.mean(dim=0)
    _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
    colours = torch.full((len(rows), 3), 0.5, dtype=torch.float64)
    for index in range(min(3, len(singular))):
        if singular[index] <= 1e-6 * rows.abs().max().clamp(min=1e-12) * math.sqrt(len(rows)):
            break
        direction = directions[index]
        projected = rows @ (
            direction * direction[direction.abs().argmax()].sign()
        )  # a sign that does not depend on luck
        low, high = torch.quantile(projected, torch.tensor([0.02, 0.98], dtype=torch.float64))
        colours[:, index] = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return _to_bytes(colours * 255).reshape(*features.shape[:3], 3)


def as_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Picture]:
    """Normalised images [n, 3, H, W] as they look, uint8 [H, W, 3] each."""
    scale, shift = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (std, mean))
    return list(_to_bytes(((images.float() * scale + shift) * 255).permute(0, 2, 3, 1)))


def _to_bytes(values: Tensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = values.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return pixels


def _square(image: Picture) -> Picture:
    """The whole image on white, in the middle of a square."""
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), _WHITE, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _tile(image: Picture, side: int) -> Picture:
    """[H, W, 3] at another size, its longer side `side`."""
    height, width = image.shape[:2]
    longer = max(height, width)
    return _resized(image, (max(1, round(side * height / longer)), max(1, round(side * width / longer))))


def _resized(image: Picture, size: Sequence[int], *, smooth: bool = True) -> Picture:
    """[H, W, 3] as [*size, 3]: smoothed when made smaller, its pixels shown as they are when made larger."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    size = list(size)
    if smooth and image.shape[0] > size[0]:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    elif list(image.shape[:2]) != size:
        pixels = F.interpolate(pixels, size=size, mode="nearest-exact")
    resized: Picture = pixels[0].permute(1, 2, 0).contiguous().numpy()
    return resized


def _overlay(tile: Picture, heat: Tensor) -> Picture:
    """A map [h, w] of values >= 0 over an image, by colour."""
    level = heat / heat.max().clamp(min=1e-12) * (len(_HEAT) - 1)
    below = level.floor().long().clamp(max=len(_HEAT) - 2)
    share = (level - below)[..., None]
    colours = _to_bytes(_HEAT[below] * (1 - share) + _HEAT[below + 1] * share)
    grey = tile.mean(axis=2, keepdims=True)
    mixed = _HEAT_SHARE * _resized(colours, tile.shape[:2]) + (1 - _HEAT_SHARE) * grey
    return mixed.round().astype(np.uint8)


def _dimmed(tile: Picture, mask: NDArray[np.bool_]) -> Picture:
    """The image, dark where the mask [h, w] is not."""
    wide = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * _WHITE
    inside = _resized(wide, tile.shape[:2]) > _WHITE // 2
    return np.where(inside, tile, tile // _DARKER).astype(np.uint8)


def _grid(rows: Sequence[Sequence[Picture]]) -> Picture:
    """Tiles in rows and columns on white, each in the middle of its cell."""
    height = max(tile.shape[0] for row in rows for tile in row)
    widths = [max(row[column].shape[1] for row in rows) for column in range(len(rows[0]))]
    size = (len(rows) * (height + _GAP) - _GAP, sum(widths) + _GAP * (len(widths) - 1), 3)
    picture = np.full(size, _WHITE, dtype=np.uint8)
    for y, row in enumerate(rows):
        left = 0
        for tile, width in zip(row, widths, strict=True):
            top = y * (height + _GAP) + (height - tile.shape[0]) // 2
            start = left + (width - tile.shape[1]) // 2
            picture[top : top + tile.shape[0], start : start + tile.shape[1]] = tile
            left += width + _GAP
    return picture
