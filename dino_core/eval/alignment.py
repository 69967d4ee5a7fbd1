"""Where features lie on the unit sphere: how evenly they fill it, and how near the views of an image are.

Axes: n images, q views of an image, D features.

Source: Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
hypersphere" (arXiv 2005.10242), section 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_PAIRS_PER_CHUNK = 2**24


@torch.no_grad()
def uniformity(features: Tensor, t: float = 2.0) -> float:
    """How evenly features [n, D] fill the sphere: 0 where all are the same, towards -2 t and below where they spread.

    ::

        x = features, each of length 1
        log of the mean over all pairs i < j of exp(-t |x_i - x_j|^2)

    Computed in chunks, in fp32 and summed in fp64; features of length 0 stay where they are.

    Raises:
        ValueError: not [n, D] with n >= 2, not finite, or t <= 0.
    """
    rows = _normalised(features, 2, "[n, D] with n >= 2")
    if not (t > 0 and math.isfinite(t)):
        raise ValueError(f"t = {t}: must be > 0")
    n = len(rows)
    lengths = rows.square().sum(dim=1)
    total = 0.0
    for start in range(0, n, max(1, _PAIRS_PER_CHUNK // n)):
        some = rows[start : start + max(1, _PAIRS_PER_CHUNK // n)]
        later = rows[start:]  # of the pairs, each once: the chunk with itself and with what comes behind it
        squares = lengths[start : start + len(some), None] + lengths[None, start:] - 2 * some @ later.T
        similar = squares.clamp_(min=0).mul_(-t).exp_()
        total += float(similar.triu_(diagonal=1).sum(dtype=torch.float64))
    return math.log(total / (n * (n - 1) / 2)) if total > 0 else -math.inf


@torch.no_grad()
def alignment(views: Tensor, alpha: float = 2.0) -> float:
    """How far the views of an image lie apart, 0 to 2^alpha; features [n, q, D] of q views of each of n images.

    ::

        x = features, each of length 1
        mean over all images and pairs of their views of |x - y|^alpha

    Raises:
        ValueError: not [n, q, D] with n >= 1 and q >= 2, not finite, or alpha <= 0.
    """
    rows = _normalised(views, 3, "[n, q, D] with n >= 1 and q >= 2")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha = {alpha}: must be > 0")
    q = rows.shape[1]
    first, second = torch.triu_indices(q, q, offset=1)
    total = sum(
        float((rows[:, i] - rows[:, j]).norm(dim=1).pow(alpha).mean()) for i, j in zip(first, second, strict=True)
    )
    return total / len(first)


def _normalised(features: Tensor, num_axes: int, allowed: str) -> Tensor:
    if features.dim() != num_axes or features.numel() == 0 or features.shape[num_axes - 2] < 2:
        raise ValueError(f"features {list(features.shape)}: must be {allowed}")
    if not torch.isfinite(features).all():
        raise ValueError("features: hold infinite values or NaN; must be finite")
    return F.normalize(features.float(), dim=-1)
