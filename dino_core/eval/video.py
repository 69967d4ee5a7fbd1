"""Video object segmentation without training: the first frame's labels are carried on by the likeness of features.

::

    sources            the first frame and the last n that were labelled, with their soft labels
    similarity         cosine between a patch and the sources' patches that are at most `radius` rows and columns away
    weight             exp(similarity / temperature) of the k most similar of all sources, 0 for the others, normalised
    label of a patch   weighted mean of the sources' labels

Source: DINO (arXiv 2104.14294), section 4.2.2, after Jabri et al. (arXiv 2006.14613), appendix F.

Axes: C classes (the background first), H x W pixels, h x w patches, D features.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino_core.eval.masks import BACKGROUND, Labels, resize_mask

NUM_PREVIOUS = 7
RADIUS = 12
TOPK = 5
TEMPERATURE = 0.1

_TILE = 8
"""Patches are labelled in squares of this side, against the part of the sources that any of them may look at: the
similarities that exist at once are those of one square."""


def propagate_labels(
    features: Iterable[Tensor],
    first: Tensor,
    *,
    num_previous: int = NUM_PREVIOUS,
    radius: int | None = RADIUS,
    topk: int = TOPK,
    temperature: float = TEMPERATURE,
) -> Iterator[Tensor]:
    """Soft labels [C, h, w] of each frame after the first, float32 on the features' device.

    One frame's features are taken at a time and those of `num_previous` + 1 are kept. Sources that are as similar as
    the k-th one count too, so that ties do not depend on an order.

    Args:
        features: [h, w, D] of each frame, the first one included.
        first: labels of the first frame, [C, h, w]; each place's sum to 1.
        num_previous: sources besides the first frame, >= 0.
        radius: patches, >= 0; None for no limit.
        topk: >= 1.
        temperature: > 0.

    Raises:
        ValueError: options out of range; features that are not finite, or of another size than `first`.
    """
    if num_previous < 0 or topk < 1 or not temperature > 0 or (radius is not None and radius < 0):
        raise ValueError(
            f"num_previous = {num_previous}, radius = {radius}, topk = {topk}, temperature = {temperature}: must be "
            ">= 0, >= 0 or None, >= 1, > 0"
        )
    return _propagate(features, first, num_previous, radius, topk, temperature)


@torch.no_grad()
def _propagate(
    features: Iterable[Tensor], first: Tensor, num_previous: int, radius: int | None, topk: int, temperature: float
) -> Iterator[Tensor]:
    sources: list[tuple[Tensor, Tensor]] = []
    previous: deque[tuple[Tensor, Tensor]] = deque(maxlen=num_previous)
    for number, frame in enumerate(features):
        if frame.dim() != 3 or frame.shape[:2] != first.shape[1:]:
            raise ValueError(
                f"features of frame {number} {list(frame.shape)}: must be [{first.shape[1]}, {first.shape[2]}, D]"
            )
        if not frame.isfinite().all():
            raise ValueError(f"features of frame {number}: must be finite")
        keys = F.normalize(frame.float(), dim=2)
        if not sources:
            sources.append((keys, first.to(keys)))
            continue
        labels = _labels_of(keys, [*sources, *previous], radius, topk, temperature)
        previous.append((keys, labels))
        yield labels


def _labels_of(
    queries: Tensor, sources: Sequence[tuple[Tensor, Tensor]], radius: int | None, topk: int, temperature: float
) -> Tensor:
    height, width = queries.shape[:2]
    reach = max(height, width) if radius is None else radius
    result = torch.empty_like(sources[0][1])
    rows, columns = (torch.arange(side, device=queries.device) for side in (height, width))
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            tile = slice(top, min(top + _TILE, height)), slice(left, min(left + _TILE, width))
            window = tuple(slice(max(0, part.start - reach), part.stop + reach) for part in tile)
            keys = torch.cat([features[window].flatten(0, 1) for features, _ in sources])  # [s, D]
            labels = torch.cat([shares[:, window[0], window[1]].flatten(1) for _, shares in sources], dim=1)  # [C, s]
            similarity = queries[tile].flatten(0, 1) @ keys.T  # [q, s]
            if radius is not None:
                near = (_near(rows, tile[0], window[0], radius), _near(columns, tile[1], window[1], radius))
                outside = ~(near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(2).flatten(0, 1)
                similarity.masked_fill_(outside.repeat(1, len(sources)), -math.inf)
            best = similarity.topk(min(topk, similarity.shape[1]), dim=1).values
            # The common factor leaves the mean as it is, and keeps small temperatures from overflowing.
            weights = ((similarity - best[:, :1]) / temperature).exp_().masked_fill_(similarity < best[:, -1:], 0)
            result[:, tile[0], tile[1]] = ((labels @ weights.T) / weights.sum(dim=1)).unflatten(
                1, (tile[0].stop - top, tile[1].stop - left)
            )
    return result


def _near(places: Tensor, tile: slice, window: slice, radius: int) -> Tensor:
    """bool [places of the tile, places of the window]"""
    return (places[tile, None] - places[None, window]).abs() <= radius


# --- frames and masks -------------------------------------------------------------------------------------------------


def frame_size(height: int, width: int, short_side: int, multiple: int) -> tuple[int, int]:
    """Height and width that a frame is resized to, pixels: its shorter side to `short_side`, the longer one in
    proportion and then down to a `multiple`, so that frames get a little narrower (854 x 480 becomes 832 x 480).

    The authors of DINO take 480 and 64, and make square frames 480 x 448; here these stay square.

    Args:
        short_side, multiple: both multiples of the patch, for features of whole patches only.
    """
    if height > width:
        return frame_size(width, height, short_side, multiple)[::-1]
    return short_side, max(short_side, short_side * width // height // multiple * multiple)


def prepare_frame(
    image: NDArray[np.uint8], size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """A frame [H, W, 3] resized (bilinear, without antialiasing, as the authors do) and normalised: float32 [3, *size].

    Args:
        size: height and width.
        mean, std: of red, green, blue on the scale 0 to 1.
    """
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    pixels = torch.from_numpy(resized).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def patch_labels(
    mask: Labels, labels: Sequence[int], size: tuple[int, int], how: Literal["nearest", "area"] = "nearest"
) -> Tensor:
    """What `propagate_labels` begins with: the first frame's mask [H, W] by patches, float32 [1 + len(labels), *size].

    Args:
        labels: of the objects; what is none of them is background.
        size: h and w.
        how: "nearest" takes the pixel in the middle of each patch, as the authors do, so that a thin object may be
            lost; "area" the share of the patch that each object covers.
    """
    classes = np.where(np.isin(mask, labels), mask, BACKGROUND).astype(np.uint8)
    if how == "nearest":
        classes = resize_mask(classes, size)
    wanted = torch.tensor([BACKGROUND, *labels], dtype=torch.uint8)
    shares = (torch.from_numpy(classes) == wanted[:, None, None]).float()  # [C, H, W] or [C, h, w]
    return F.interpolate(shares[None], size=size, mode="area")[0]


def frame_labels(shares: Tensor, labels: Sequence[int], resized: tuple[int, int], size: tuple[int, int]) -> Labels:
    """The mask of a frame, uint8 [*size], from soft labels [C, h, w] of its patches.

    They are enlarged (bilinear), stretched so that each class goes from 0 to 1 over the frame, as the authors do, and
    each pixel gets the largest, of equal ones the first; then the mask is resized (nearest) to the frame's own size.

    Args:
        labels: of the C - 1 objects.
        resized: height and width that the backbone saw.
        size: height and width of the frame.
    """
    pixels = F.interpolate(shares[None].float(), size=resized, mode="bilinear", align_corners=False)[0]  # [C, H, W]
    low, high = pixels.amin(dim=(1, 2), keepdim=True), pixels.amax(dim=(1, 2), keepdim=True)
    pixels = torch.where(high > low, (pixels - low) / (high - low), pixels)  # a constant one stays as it is
    classes = pixels.argmax(dim=0).cpu().numpy()
    return resize_mask(np.array([BACKGROUND, *labels], dtype=np.uint8)[classes], size)


def pixel_features(images: Tensor, patch: int) -> Tensor:
    """The pixels of each patch, to compare a backbone's features with: [n, h, w, 3 * patch * patch].

    Args:
        images: [n, 3, H, W], normalised; H and W multiples of `patch`.
    """
    return F.pixel_unshuffle(images, patch).permute(0, 2, 3, 1)
