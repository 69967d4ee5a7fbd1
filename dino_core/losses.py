"""Losses: pure functions of tensors.

Axes: T teacher crops, S student crops, B images, K prototypes, D embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy between teacher and student, mean over the pairs of different crops and over the images, in nats.

    The first T student crops are the teacher's own. With z = `student_logits` / `student_temp`, q = `teacher_probs`::

        loss = mean over t, over s != t, over b of  -sum_k q[t, b, k] * log_softmax(z)[s, b, k]

    Each student crop meets all its teachers at once: the sum over t of the pairs of s is ``w * logsumexp(z) - z @ Q``
    with Q the sum of those q and w their number, so there are S log-sum-exps instead of T(S - 1) log-softmaxes.

    Args:
        student_logits: [S, B, K], any float type; computed in fp32 or, for doubles, as they are.
        teacher_probs: [T, B, K], sums to 1 over K, T <= S; no gradient flows into it.
        student_temp: divides the logits, > 0.

    Source: DINO (arXiv 2104.14294), equation 3, with the mean of the authors' code in place of the sum.

    Raises:
        ValueError: shapes that do not match, no pair of different crops, a temperature that is not positive.
    """
    num_student, num_teacher = student_logits.shape[0], teacher_probs.shape[0]
    if student_logits.dim() != 3 or student_logits.shape[1:] != teacher_probs.shape[1:] or student_logits.numel() == 0:
        raise ValueError(
            f"student_logits {list(student_logits.shape)} and teacher_probs {list(teacher_probs.shape)}: "
            "must be [S, B, K] and [T, B, K] with the same B and K, none of them 0"
        )
    if num_teacher > num_student or num_student < 2:
        raise ValueError(f"{num_student} student and {num_teacher} teacher crops: needs S >= 2 and T <= S")
    if student_temp <= 0:
        raise ValueError(f"student_temp = {student_temp}: must be > 0")
    loss: Tensor = _PairedCrossEntropy.apply(student_logits, teacher_probs.detach(), student_temp)
    return loss


class _PairedCrossEntropy(torch.autograd.Function):
    """`dino_loss` with its gradient made in the forward pass, in the memory of the scaled logits.

    d loss / d z = (w * softmax(z) - Q) / number of terms. Left to autograd, the same takes several more tensors of the
    size of the logits, the largest there are.
    """

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
        num_student, num_images, _ = student_logits.shape
        num_teacher = teacher_probs.shape[0]
        z = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)) / student_temp  # [S, B, K]
        probs = teacher_probs.to(z.dtype)
        summed = probs.sum(dim=0)  # [B, K]
        others = summed - probs  # [T, B, K]
        weights = z.new_full((num_student, 1), num_teacher)
        weights[:num_teacher] -= 1
        normalisers = torch.logsumexp(z, dim=-1)  # [S, B]
        matches = torch.cat(
            [
                torch.einsum("sbk,sbk->sb", z[:num_teacher], others),
                torch.einsum("sbk,bk->sb", z[num_teacher:], summed),
            ]
        )  # [S, B]
        num_terms = num_teacher * (num_student - 1) * num_images
        if ctx.needs_input_grad[0]:
            z.sub_(normalisers[..., None]).exp_().mul_(weights[..., None])
            z[:num_teacher] -= others
            z[num_teacher:] -= summed
            ctx.save_for_backward(z.mul_(1 / (num_terms * student_temp)).to(student_logits.dtype))
        # subtracted row by row: both sides are large where the loss is small
        return (weights * normalisers - matches).sum() / num_terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None


def koleo_loss(features: Tensor) -> Tensor:
    """Spread features on the sphere: minus the mean log distance of each to its nearest neighbour, in nats.

    ::

        x = features / |features|
        loss = -mean over i of log(min over j != i of |x_i - x_j + eps| + eps),  eps = 1e-8

    Collapsed features show at once: identical rows give -log(eps * (1 + sqrt(D))), 17.08 for D = 8.

    Args:
        features: [B, D], B >= 2; computed in fp32 on the rows of this process.

    Source: Sablayrolles et al. (arXiv 1806.03198), section 3.3, as used by DINOv2 (arXiv 2304.07193), section 4.

    Raises:
        ValueError: fewer than two rows, or not a matrix.
    """
    if features.dim() != 2 or features.shape[0] < 2:
        raise ValueError(f"features {list(features.shape)}: must be [B, D] with B >= 2")
    eps = 1e-8
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)  # [B, D]
        with torch.no_grad():
            nearest = (unit @ unit.T).fill_diagonal_(-1.0).argmax(dim=1)  # [B]
        distance = F.pairwise_distance(unit, unit[nearest], eps=eps)  # [B]
        return -torch.log(distance + eps).mean()
