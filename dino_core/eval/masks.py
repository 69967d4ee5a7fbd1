"""How well masks agree: region similarity J, boundary measure F, and what a video's frames come to.

Source: DAVIS (Perazzi et al., CVPR 2016, section 4; DAVIS 2017, arXiv 1704.00675, section 3).

Axes: t frames, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Labels = NDArray[np.uint8]
"""[..., H, W]: 0 is the background, `VOID` is not judged, everything else is an object."""

BACKGROUND, VOID = 0, 255

TOLERANCE = 0.008
"""How far apart two boundaries may be, as a share of the image's diagonal."""

RECALL_ABOVE = 0.5
_NUM_PARTS = 4  # of a video, for the decay


def jaccard(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], valid: NDArray[np.bool_] | None = None) -> Any:
    """Intersection over union, float64 [...] (a scalar for two masks); 1 where both are empty.

    Args:
        predicted, truth: bool [..., H, W], of shapes that can be broadcast.
        valid: the pixels that count, bool [..., H, W]; None for all.

    Raises:
        ValueError: masks of different sizes.
    """
    _check_sizes(predicted, truth)
    both, either = predicted & truth, predicted | truth
    if valid is not None:
        both, either = both & valid, either & valid
    intersection, union = both.sum(axis=(-2, -1)), either.sum(axis=(-2, -1))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))[()]


def boundary_f(
    predicted: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    valid: NDArray[np.bool_] | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> float:
    """F-measure of the boundaries of two masks.

    Precision is the share of the predicted boundary that is at most `radius` pixels from a true one, recall the share
    of the true boundary near a predicted one. Without any boundary, as in an empty or a full mask, precision (recall)
    is 1, and 0 if only the other mask has one.

    ::

        radius = ceil(tolerance * diagonal)
        F = 2 * precision * recall / (precision + recall)

    Args:
        predicted, truth: bool [H, W].
        valid: the pixels that count; the others are background in both masks.
        tolerance: a share of the diagonal, > 0.

    Raises:
        ValueError: masks of different sizes.
    """
    _check_sizes(predicted, truth)
    if valid is not None:
        predicted, truth = predicted & valid, truth & valid
    found, expected = _boundary(predicted), _boundary(truth)
    num_found, num_expected = np.count_nonzero(found), np.count_nonzero(expected)
    if not num_found or not num_expected:
        return float(num_found == num_expected)
    disk = _disk(math.ceil(tolerance * math.hypot(*truth.shape)))
    precision = np.count_nonzero(found & _dilated(expected, disk)) / num_found
    recall = np.count_nonzero(expected & _dilated(found, disk)) / num_expected
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True)
class Statistics:
    """What a measure of an object comes to over its frames."""

    mean: float
    recall: float
    """Share of frames above 0.5."""
    decay: float
    """Mean of the first quarter of the frames minus mean of the last; negative if it gets better."""


@dataclass(frozen=True)
class ObjectScores:
    """One object of a video."""

    label: int
    region: Statistics
    """J"""
    boundary: Statistics
    """F"""


def statistics(values: Sequence[float] | NDArray[np.float64]) -> Statistics:
    """Mean, recall and decay of a measure of consecutive frames.

    The quarters share the frames at which they meet, as in the authors' code.

    Raises:
        ValueError: no value.
    """
    scores = np.asarray(values, dtype=np.float64)
    if not scores.size:
        raise ValueError("values: must hold one at least")
    ends = np.rint(np.linspace(1, len(scores), _NUM_PARTS + 1) + 1e-10).astype(np.int64) - 1
    first, last = scores[ends[0] : ends[1] + 1], scores[ends[-2] : ends[-1] + 1]
    return Statistics(
        mean=float(scores.mean()),
        recall=float((scores > RECALL_ABOVE).mean()),
        decay=float(first.mean() - last.mean()),
    )


def video_scores(
    predicted: Sequence[Labels], truth: Sequence[Labels], *, tolerance: float = TOLERANCE
) -> list[ObjectScores]:
    """J and F of each object of a video, by label.

    Objects are those of the first true mask. The first frame, which is given, and the last one do not count, as in the
    authors' code. `VOID` counts as background, and so does a predicted label that is no object.

    Args:
        predicted, truth: one [H, W] per frame, all of one size.

    Raises:
        ValueError: less than three frames, no object, different numbers or sizes.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predicted masks: must be {len(truth)}, one per true mask")
    if len(truth) < 3:
        raise ValueError(f"{len(truth)} frames: must be 3 at least, for the first and the last one do not count")
    labels = object_labels(truth[0])
    if not labels:
        raise ValueError("the first mask: must hold an object")
    scores = []
    for label in labels:
        pairs = [(ours == label, theirs == label) for ours, theirs in zip(predicted, truth, strict=True)][1:-1]
        scores.append(
            ObjectScores(
                label,
                statistics([jaccard(*pair) for pair in pairs]),
                statistics([boundary_f(*pair, tolerance=tolerance) for pair in pairs]),
            )
        )
    return scores


def object_labels(mask: Labels) -> list[int]:
    """The objects of a mask, ascending; neither background nor void."""
    return [label for label in np.unique(mask).tolist() if label not in (BACKGROUND, VOID)]


def resize_mask(mask: Labels, size: tuple[int, int]) -> Labels:
    """A mask [H, W] by its nearest pixels, uint8 [*size], as Pillow does, which the authors use: where two pixels are
    equally near, other libraries may take the other one."""
    return np.array(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def _boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels unlike the one to the right, below, or right below; beyond the edge all is as at the edge."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def _disk(radius: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x**2 + y**2 <= radius**2).astype(np.uint8)


def _dilated(mask: NDArray[np.bool_], kernel: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)


def _check_sizes(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> None:
    if predicted.shape[-2:] != truth.shape[-2:]:
        raise ValueError(f"predicted {list(predicted.shape[-2:])}: must be of the size {list(truth.shape[-2:])}")
