"""Is this run collapsing, and how? Cheap quantities of each step, as tensors on the model's device.

H(teacher, student) = h(teacher) + KL(teacher || student). Without centring h and KL fall to 0 (every image one
prototype); without sharpening h rises to ln K and KL falls to 0 (every image all prototypes). Source: DINO
(arXiv 2104.14294), section 5.3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_core.distributed import all_reduce_mean_


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
def distance_to_uniform(loss: Tensor, num_prototypes: int) -> Tensor:
    """ln K - loss, in nats: stays at 0 while student or teacher are uniform over the prototypes."""
    return math.log(num_prototypes) - loss


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
def feature_rank(features: Tensor) -> Tensor:
    """Effective rank of features [n, D] of all ranks, 1 to D: exp of the entropy of their singular values' shares.

    Source: RankMe (arXiv 2210.02885), equation 1, of centred features.
    """
    x = features.float()
    mean = all_reduce_mean_(x.mean(dim=0))
    covariance = all_reduce_mean_((x - mean).T @ (x - mean) / len(x))
    singular = torch.linalg.eigvalsh(covariance).clamp_(min=0).sqrt()
    shares = singular / singular.sum().clamp_(min=1e-12)
    return torch.special.entr(shares).sum().exp()


@torch.no_grad()
def prototype_usage(probs: Tensor) -> Tensor:
    """Effective number of prototypes in use, 1 to K: exp of the entropy of the mean of the targets [T, B, K]."""
    return torch.special.entr(all_reduce_mean_(probs.flatten(0, 1).mean(dim=0))).sum().exp()


@torch.no_grad()
def center_norm(center: Tensor) -> Tensor:
    """L2 norm of the centre [K]."""
    return torch.linalg.vector_norm(center)
