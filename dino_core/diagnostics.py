"""Is this run collapsing, and how? Cheap quantities of one step, as tensors on the model's device.

H(teacher, student) = h(teacher) + KL(teacher || student). Without centring h and KL fall to 0 (every image one
prototype); without sharpening h rises to ln K and KL falls to 0 (every image all prototypes). Source: DINO
(arXiv 2104.14294), section 5.3. `diagnosis.py` turns their curves into a verdict.

Where there is a process group, `feature_std`, `feature_rank`, `target_std` and `prototype_usage` describe the global
batch, and every rank must call them with as many rows. All are computed in fp32.

Axes: T teacher crops, B images, K prototypes (or outputs of a head without), D features, n rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_core.distributed import all_reduce_mean_

_EPS = torch.finfo(torch.float32).eps


@torch.no_grad()
def teacher_entropy(probs: Tensor) -> Tensor:
    """h: the entropy of the targets [T, B, K], mean over T and B, in nats: 0 to ln K."""
    return torch.special.entr(probs).sum(dim=-1).mean()


@torch.no_grad()
def kl_to_student(loss: Tensor, entropy: Tensor) -> Tensor:
    """KL(teacher || student), mean over the same pairs of crops as the loss, in nats.

    Each teacher crop is in equally many pairs, so the mean entropy over pairs is the mean over teacher crops.
    """
    return loss - entropy


@torch.no_grad()
def distance_to_uniform(loss: Tensor, num_choices: int) -> Tensor:
    """ln(num_choices) - loss, in nats: stays at 0 while student or teacher treat all choices alike.

    The choices are the K prototypes of a cross-entropy, or the positive and the negatives of an InfoNCE loss.
    """
    return math.log(num_choices) - loss


@torch.no_grad()
def prototype_usage(probs: Tensor) -> Tensor:
    """Prototypes in use by the targets [T, B, K]: exp of the entropy of their mean over T, B and ranks, 1 to K.

    1 when every image has the same prototype, K when all are used equally, whether by each image or between them.
    """
    mean = all_reduce_mean_(probs.float().flatten(0, -2).mean(dim=0))  # [K]
    return torch.special.entr(mean).sum().exp()


@torch.no_grad()
def center_norm(center: Tensor) -> Tensor:
    """Length (L2) of the centre [K], in units of the logits; every rank has the same centre."""
    return torch.linalg.vector_norm(center.float())


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Spread of L2-normalised features [n, D] of all ranks: sqrt(D) times the mean standard deviation over D.

    1 for directions spread evenly, 0 when all features are the same. Source: SimSiam (arXiv 2011.10566), section 4.1.
    """
    unit = F.normalize(features.float(), dim=-1)
    moments = all_reduce_mean_(torch.stack([unit.mean(dim=0), unit.square().mean(dim=0)]))  # [2, D]
    variance = (moments[1] - moments[0].square()).clamp_(min=0)
    return variance.sqrt().mean() * math.sqrt(features.shape[-1])


@torch.no_grad()
def target_std(targets: Tensor) -> Tensor:
    """`feature_std` of what the teacher's head gives, [T, B, K]: 0 when all images are alike, 1 when they are spread.

    For cross-entropy the targets' probabilities; n one-hot rows over K > n prototypes reach sqrt(n / K), not 1.
    """
    return feature_std(targets.flatten(0, -2))


@torch.no_grad()
def feature_rank(features: Tensor) -> Tensor:
    """Directions that the features [n, D] of all ranks fill: 1 to min(D, n of all ranks - 1).

    ::

        s = singular values of (features - their mean)
        p = s / sum(s)
        rank = exp(-sum p log p)

    Made from the [D, D] covariance, so it costs n D^2 + D^3 operations whatever the number of ranks. Features that are
    all the same, or 0, have rank 1; those that are not finite have rank NaN.

    On one CPU core 0.02 s for n = 2048 and D = 384, 0.6 s for D = 1536. On CUDA the eigenvalues make the host wait for
    the device. For logged steps only.

    Source: RankMe (arXiv 2210.02885), section 3, which does not centre; here the mean, a direction that says nothing
    about the differences between images, does not count.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = features.float()  # [n, D]
        moments = torch.cat([rows.mean(dim=0), rows.square().sum(dim=1).mean()[None]])
        mean, length = all_reduce_mean_(moments).split([rows.shape[1], 1])  # [D], [1]
        centred = rows - mean
        covariance = all_reduce_mean_(centred.T @ centred / rows.shape[0])  # [D, D]
        variance = covariance.trace()
        # eigvalsh raises an error for what is not finite, and may for what is far below the largest entries
        shape = covariance / variance
        shape = torch.where(torch.isfinite(shape) & (shape.abs() > _EPS**2), shape, 0.0)
        eigenvalues = torch.linalg.eigvalsh(shape)  # [D], ascending, their sum is 1
        rounding = _EPS * eigenvalues[-1] + (8 * _EPS) ** 2 * length / variance
        singular = eigenvalues.where(eigenvalues > rounding, 0.0).sqrt()
        shares = singular / singular.sum().clamp(min=_EPS)
        rank = torch.special.entr(shares).sum().exp()
        return torch.where(torch.isfinite(variance + length), rank, torch.nan)[0]
