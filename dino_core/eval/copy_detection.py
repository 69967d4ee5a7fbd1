"""Copy detection: is an image a changed copy of one in a database?

Descriptors are the class token of the last block beside its patches pooled by GeM, whitened by a set of other images
and ranked by cosine.

Axes: B images, h x w patches, D features, n images of the whitening set, m queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dino_core.eval.retrieval import RankingRules, RetrievalScores, micro_average_precision, retrieval_scores

GEM_POWER = 4.0
GEM_FLOOR = 1e-6

Covariance = Literal["centred", "uncentred"]
"""See `learn_whitening`."""


@torch.no_grad()
def gem(patches: Tensor, power: float = GEM_POWER, floor: float = GEM_FLOOR) -> Tensor:
    """Generalised mean [B, D] of patches [B, h, w, D]: (mean of max(x, floor)^power)^(1 / power).

    Source: Radenovic et al. (arXiv 1711.02512), equation 3; power and floor are those of DINO's copy detection.

    Raises:
        ValueError: not [B, h, w, D] with a patch, or power or floor out of range.
    """
    if patches.dim() != 4 or patches.numel() == 0:
        raise ValueError(f"patches {list(patches.shape)}: must be [B, h, w, D] with h, w >= 1")
    if not (power > 0 and floor > 0):
        raise ValueError(f"power = {power}, floor = {floor}: must be > 0")
    return patches.float().clamp(min=floor).pow(power).mean(dim=(1, 2)).pow(1 / power)


def copy_descriptor(
    class_token: Tensor | None, patches: Tensor, power: float = GEM_POWER, floor: float = GEM_FLOOR
) -> Tensor:
    """Class token and GeM-pooled patches of the last block, beside each other: [B, 2 D], fp32.

    Args:
        class_token: [B, D], behind the last norm; None for a network without one, whose descriptor is [B, D].
        patches: [B, h, w, D], behind the last norm.

    Source: DINO (arXiv 2104.14294), section 4.2.1.

    Raises:
        ValueError: as `gem`, or another number of images in the two.
    """
    pooled = gem(patches, power, floor)
    if class_token is None:
        return pooled
    if class_token.dim() != 2 or len(class_token) != len(pooled):
        raise ValueError(f"class_token {list(class_token.shape)}: must be [{len(pooled)}, D]")
    return torch.cat([class_token.float(), pooled], dim=1)


@dataclass(frozen=True)
class Whitening:
    """A linear map that makes the directions of some images' features equally strong."""

    mean: Tensor
    """[D], float64."""
    projection: Tensor
    """[D, d], float64."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features [m, D] less the mean, whitened: [m, d], fp32."""
        device = features.device
        if device.type == "mps":  # has no float64
            features = features.cpu()
        rows = features.double() - self.mean.to(features.device)
        return (rows @ self.projection.to(features.device)).float().to(device)


@torch.no_grad()
def learn_whitening(
    features: Tensor, covariance: Covariance = "centred", dim: int | None = None, floor: float = 1e-5
) -> Whitening:
    """PCA whitening of features [n, D], in float64.

    ::

        mean = mean of the features
        centred:    C = mean of (x - mean) (x - mean)^T
        uncentred:  C = mean of x x^T
        l, v = eigenvalues of C, those below floor * max(l) raised to it, and eigenvectors
        projection = v / sqrt(l), the `dim` largest

    Either way the mean is taken off what is whitened. DINO's script does so with the uncentred C, which keeps the
    mean's direction small and is none of the features' own covariance; "centred" is what the word means.

    With n <= D some directions have no variance in these images; `floor` bounds by how much they are enlarged. A `dim`
    below n leaves them out.

    Args:
        features: [n, D], n >= 2.
        covariance: see above.
        dim: 1 to D; None for D.
        floor: in (0, 1).

    Raises:
        ValueError: not [n, D] with n >= 2, not finite, all the same, or an argument out of range.
    """
    if features.dim() != 2 or len(features) < 2 or not features.shape[1]:
        raise ValueError(f"features {list(features.shape)}: must be [n, D] with n >= 2")
    if covariance not in ("centred", "uncentred"):
        raise ValueError(f"covariance = {covariance}: must be one of centred, uncentred")
    width = features.shape[1]
    if dim is not None and not 1 <= dim <= width:
        raise ValueError(f"dim = {dim}: must be >= 1 and <= {width}, the number of features")
    if not 0 < floor < 1:
        raise ValueError(f"floor = {floor}: must be > 0 and < 1")
    rows = (features.cpu() if features.device.type == "mps" else features).double()
    if not torch.isfinite(rows).all():
        raise ValueError("features: hold infinite values or NaN; must be finite")
    if (rows == rows[0]).all():
        raise ValueError("features: are all the same; whitening needs some that differ")
    mean = rows.mean(dim=0)
    deviations = rows - mean if covariance == "centred" else rows
    eigenvalues, directions = torch.linalg.eigh(deviations.T @ deviations / len(rows))  # the smallest first
    eigenvalues = eigenvalues.clamp(min=floor * float(eigenvalues[-1]))
    projection = (directions / eigenvalues.sqrt()).flip(1)[:, :dim]
    return Whitening(mean, projection)


@dataclass(frozen=True, kw_only=True)
class CopyScores:
    """All in per cent."""

    overall: RetrievalScores
    """Of all queries together: each counts the same, whatever its attack."""
    by_attack: dict[str, RetrievalScores]
    """In the order in which the attacks first occur; those of whose queries none has a positive are left out."""
    micro_average_precision: float
    """Of all pairs of a query and a database image in one ranking."""
    micro_by_attack: dict[str, float]


def copy_detection_scores(
    queries: Tensor,
    database: Tensor,
    positives: Sequence[Sequence[int]],
    attacks: Sequence[str],
    rules: RankingRules | None = None,
) -> CopyScores:
    """How well the originals of changed images are found among all of a database.

    Args:
        queries: [m, D].
        database: [n, D]; images that are nobody's original are distractors.
        positives: of each query, numbers of database images from 0; none for an image that is no copy, which counts
            for the micro average precision only.
        attacks: [m] names of what was done to each query; "strong" is that of Copydays.
        rules: of the mean average precisions. The micro average precision is plain and of all ranks.

    Raises:
        ValueError: as `retrieval_scores`, or attacks that are not one per query.
    """
    if len(attacks) != len(queries):
        raise ValueError(f"attacks of {len(attacks)} queries: must be {len(queries)}, the number of queries")
    by_attack, micro = {}, {}
    for attack in dict.fromkeys(attacks):
        chosen = [number for number, name in enumerate(attacks) if name == attack]
        wanted = [positives[number] for number in chosen]
        if any(map(len, wanted)):
            by_attack[attack] = retrieval_scores(queries[chosen], database, wanted, None, rules)
            micro[attack] = micro_average_precision(queries[chosen], database, wanted)
    return CopyScores(
        overall=retrieval_scores(queries, database, positives, None, rules),
        by_attack=by_attack,
        micro_average_precision=micro_average_precision(queries, database, positives),
        micro_by_attack=micro,
    )
