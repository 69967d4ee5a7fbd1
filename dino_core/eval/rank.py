"""Scores of frozen features that need no label: how many directions they fill, and how fast their spectrum falls.

Each takes the features of one backbone and gives a float. Spectra are computed in float64 on the features' device (an
`mps` device has no float64, there on the CPU), as eigenvalues of the smaller of the two Gram matrices; what is below
their rounding, 7e-7 of the largest singular value for 2,048 rows, counts as 0. None of the scores depends on the scale
of the features but `lidar`, by its `delta`.

What they can tell: within one method and one width of the features, more directions went with better features in their
papers. What they cannot: features of random weights or of pure noise fill many directions too.

Axes: n images, q views of an image, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALPHA_FIRST, ALPHA_LAST = 4, 100
"""The eigenvalues, counted from 1, through which `alpha_req` lays its line."""


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """Directions that features [n, D] fill: 1 to min(n, D).

    ::

        s = singular values of the features, which are not centred
        p = s / sum(s)
        rank = exp(-sum p log p)

    Features that are all the same, or all 0, have rank 1. At most n: use more images than D, or compare only runs of
    the same n and D. The paper uses 25,600 images, and adds 1e-7 to each p against log 0, which changes the rank by
    less than D / 500,000 of itself; here 0 log 0 is 0.

    Source: RankMe (arXiv 2210.02885), equation 1. Its authors mostly take the embeddings behind the projector.

    Raises:
        ValueError: not [n, D] with n >= 1, or not finite.
    """
    rows = _checked(features, 2)
    return _effective_rank(_eigenvalues(rows).sqrt())


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Directions in which features [n, D] differ from their mean: 1 to min(n - 1, D).

    As `rankme`, of centred features: a mean that is far from 0 is one direction more there, and hides the others.

    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007), of the centred matrix.

    Raises:
        ValueError: not [n, D] with n >= 1, or not finite.
    """
    return _effective_rank(_eigenvalues(_centred(_checked(features, 2), features)).sqrt())


@torch.no_grad()
def lidar(features: Tensor, delta: float = 1e-4) -> float:
    """Directions in which images differ, measured by how much the views of an image do; 1 to min(n - 1, D).

    ::

        mu_x, mu = mean over the views of image x, over all images
        S_b = mean over x of (mu_x - mu)(mu_x - mu)^T
        S_w = mean over x and views v of (v - mu_x)(v - mu_x)^T + delta I
        l = eigenvalues of S_w^-1/2 S_b S_w^-1/2
        p = l / sum(l)
        rank = exp(-sum p log p)

    Args:
        features: [n, q, D], q augmented views of each of n images.
        delta: > 0. Directions whose variance between views is below it are not told apart by that variance.

    Images that are all the same have rank 1. Views that say nothing of their image have a high rank, since then S_b is
    S_w / q in all directions: more views keep that lower. The paper uses 1,000 images with 50 views. With n <= D the
    rank is bounded by n - 1; with n (q - 1) < D some directions of S_w are `delta` alone.

    Source: LiDAR (arXiv 2312.04000), section 3.

    Raises:
        ValueError: not [n, q, D] with n >= 1 and q >= 2, not finite, or delta out of range.
    """
    rows = _checked(features, 3)
    n, q, _ = rows.shape
    if q < 2:
        raise ValueError(f"features {list(features.shape)}: must be [n, q, D] with q >= 2 views of each image")
    if not (delta > 0 and math.isfinite(delta)):
        raise ValueError(f"delta = {delta}: must be > 0")
    means = rows.mean(dim=1)  # [n, D]
    within = (rows - means[:, None]).flatten(0, 1)  # [n * q, D]
    variances, directions = torch.linalg.eigh(within.T @ within / (n * q))
    between = _centred(means, features) @ directions / (variances.clamp(min=0) + delta).sqrt()  # [n, D]
    return _effective_rank(_eigenvalues(between))


@torch.no_grad()
def alpha_req(features: Tensor, first: int = ALPHA_FIRST, last: int = ALPHA_LAST) -> float:
    """How fast the spectrum of features [n, D] falls: alpha of a power law, the i-th eigenvalue ~ i^-alpha.

    A line through (log i, log of the i-th eigenvalue of the covariance), i from `first` to `last` counted from 1, by
    least squares with weights 1 / i. Eigenvalues that are 0, and those beyond min(n - 1, D), are not there; with fewer
    than two left the result is NaN.

    Near 1 is best: below, many directions carry noise; far above, few directions carry all. So larger is not better,
    nor is smaller.

    Source: alpha-ReQ (arXiv 2202.05808); the fit is that of Stringer et al. (Nature 571, 2019), and the range that of
    the released code of alpha-ReQ, where it differs from place to place.

    Raises:
        ValueError: not [n, D] with n >= 1, not finite, or first and last out of order.
    """
    rows = _checked(features, 2)
    if not 1 <= first < last:
        raise ValueError(f"first = {first}, last = {last}: must be 1 <= first < last")
    eigenvalues = _eigenvalues(_centred(rows, features))[: min(last, len(rows) - 1)]
    eigenvalues = eigenvalues[eigenvalues > 0].cpu()[first - 1 :]
    if len(eigenvalues) < 2:
        return math.nan
    place = torch.arange(first, first + len(eigenvalues), dtype=torch.float64)
    x, y, weights = place.log(), eigenvalues.log(), 1 / place
    x, y = (values - (weights * values).sum() / weights.sum() for values in (x, y))
    return -float((weights * x * y).sum() / (weights * x * x).sum())


def _checked(features: Tensor, num_axes: int) -> Tensor:
    """The features in float64."""
    if features.dim() != num_axes or features.numel() == 0:
        axes = "[n, D]" if num_axes == 2 else "[n, q, D]"
        raise ValueError(f"features {list(features.shape)}: must be {axes} with n >= 1")
    rows = (features.cpu() if features.device.type == "mps" else features).double()
    if not torch.isfinite(rows).all():
        raise ValueError("features: hold infinite values or NaN; must be finite")
    return rows


def _centred(rows: Tensor, features: Tensor) -> Tensor:
    """`rows` [n, D] without their mean; what the precision of the features that they come from cannot tell from 0 is 0,
    or features that are all the same would have the spectrum of their rounding."""
    rounding = 8 * torch.finfo(features.dtype).eps * rows.abs().max()
    difference = rows - rows.mean(dim=0)
    return difference.where(difference.abs() > rounding, 0.0)


def _eigenvalues(rows: Tensor) -> Tensor:
    """Those of rows^T rows, float64 [min(n, D)], the largest first, up to a common factor; rounding is 0."""
    rows = rows / rows.abs().max().clamp(min=torch.finfo(rows.dtype).tiny)
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    found = torch.linalg.eigvalsh(gram).flip(0)
    rounding = max(rows.shape) * torch.finfo(rows.dtype).eps * found[0]
    return found.where(found > rounding, 0.0)


def _effective_rank(values: Tensor) -> float:
    """exp of the entropy of values [m] >= 0 as shares of their sum; 1 where all are 0."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 1.0
