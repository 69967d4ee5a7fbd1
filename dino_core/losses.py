"""Losses: pure functions of tensors.

Axes: T teacher crops, S student crops, B images, K prototypes, D embedding, M masked patches.
"""

from __future__ import annotations

from contextlib import nullcontext
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
    _check_pairs(student_logits, teacher_probs)
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
            # in fp16 most entries would be 0 before the loss scale reaches them
            keep = torch.float32 if student_logits.dtype == torch.float16 else student_logits.dtype
            ctx.save_for_backward(z.mul_(1 / (num_terms * student_temp)).to(keep))
            ctx.dtype = student_logits.dtype
        # subtracted row by row: both sides are large where the loss is small
        return (weights * normalisers - matches).sum() / num_terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output.to(gradient.dtype)).to(ctx.dtype), None, None


def ibot_patch_loss(student_logits: Tensor, teacher_probs: Tensor, weights: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy between teacher and student over masked patches, a weighted sum, in nats.

    With z = `student_logits` / `student_temp`, q = `teacher_probs`::

        loss = sum over m of  weights[m] * -sum_k q[m, k] * log_softmax(z)[m, k]

    With weights 1 / (masked patches of the crop x number of crops) it is the loss of iBOT's and DINOv2's code; outputs
    that tell nothing apart then give (share of masked crops) x ln K.

    Args:
        student_logits: [M, K] of the student, which does not see these patches; M may be 0. Computed as in `dino_loss`.
        teacher_probs: [M, K], sums to 1 over K; no gradient flows into it.
        weights: [M].
        student_temp: divides the logits, > 0.

    Source: iBOT (arXiv 2111.07832), equation 2.

    Raises:
        ValueError: shapes that do not match, or a temperature that is not positive.
    """
    if (
        student_logits.dim() != 2
        or student_logits.shape != teacher_probs.shape
        or weights.shape != student_logits.shape[:1]
    ):
        raise ValueError(
            f"student logits {list(student_logits.shape)}, teacher probabilities {list(teacher_probs.shape)} and "
            f"weights {list(weights.shape)}: must be [M, K], [M, K] and [M]"
        )
    if student_temp <= 0:
        raise ValueError(f"student_temp = {student_temp}: must be > 0")
    loss: Tensor = _WeightedCrossEntropy.apply(student_logits, teacher_probs.detach(), weights, student_temp)
    return loss


class _WeightedCrossEntropy(torch.autograd.Function):
    """`ibot_patch_loss` with its gradient made in the forward pass, as `_PairedCrossEntropy` does."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_probs: Tensor, weights: Tensor, student_temp: float
    ) -> Tensor:
        z = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)) / student_temp  # [M, K]
        probs, weights = teacher_probs.to(z.dtype), weights.to(z.dtype)
        normalisers = torch.logsumexp(z, dim=-1)  # [M]
        matches = torch.einsum("mk,mk->m", z, probs)  # [M]
        if ctx.needs_input_grad[0]:
            z.sub_(normalisers[:, None]).exp_().sub_(probs).mul_(weights[:, None] / student_temp)
            keep = torch.float32 if student_logits.dtype == torch.float16 else student_logits.dtype
            ctx.save_for_backward(z.to(keep))
            ctx.dtype = student_logits.dtype
        return torch.dot(weights, normalisers - matches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output.to(gradient.dtype)).to(ctx.dtype), None, None, None


def mse_loss(student_outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of L2-normalised outputs, mean over the pairs of different crops and over the images, 0 to 4.

    The first T student crops are the teacher's own. With z = `student_outputs` / length::

        loss = mean over t, over s != t, over b of  |z[s, b] - targets[t, b]|^2  =  2 - 2 * mean cosine

    Args:
        student_outputs: [S, B, D], any float type; computed in fp32.
        targets: [T, B, D] of unit length, T <= S; no gradient flows into them.

    Source: BYOL (arXiv 2006.07733), equation 2; over the crops of DINO (arXiv 2104.14294), appendix B.

    Raises:
        ValueError: shapes that do not match, or no pair of different crops.
    """
    num_pairs = _check_pairs(student_outputs, targets)
    z = F.normalize(student_outputs.float(), dim=-1)  # [S, B, D]
    cosines = torch.einsum("sbd,tbd->stb", z, targets.detach().float())  # [S, T, B]
    own = torch.diagonal(cosines).sum()  # the pairs of a crop with itself
    return 2 - 2 * (cosines.sum() - own) / num_pairs


def info_nce_loss(
    student_outputs: Tensor,
    keys: Tensor,
    temp: float,
    *,
    first_image: int = 0,
    queue: Tensor | None = None,
) -> Tensor:
    """Tell the same image in another crop from other images, mean over the pairs of crops and over the images, in nats.

    With q = `student_outputs` / length, and N(b) the keys of all crops of all other images or else the queue::

        loss = mean over t, over s != t, over b of
               -log( exp(q[s, b] . keys[t, b] / temp) / (the same + sum over n in N(b) of exp(q[s, b] . n / temp)) )

    With two crops per image and both sides the same network this is NT-Xent; with a queue it is MoCo's loss.

    Args:
        student_outputs: [S, b, D], of the images `first_image` to `first_image` + b; any float type, computed in fp32.
        keys: [T, B, D] of unit length, of all images of the global batch, T <= S. The first T student crops are theirs.
        temp: > 0.
        queue: [Q, D] of unit length; None takes the other images of `keys` as negatives.

    Source: MoCo (arXiv 1911.05722), equation 1; SimCLR (arXiv 2002.05709), equation 1.

    Raises:
        ValueError: shapes that do not match, no pair of crops, no negatives, a temperature that is not positive.
    """
    if temp <= 0:
        raise ValueError(f"temp = {temp}: must be > 0")
    num_images = student_outputs.shape[1]
    own_keys = keys[:, first_image : first_image + num_images].float()  # [T, b, D]
    num_pairs = _check_pairs(student_outputs, own_keys)
    if queue is None and keys.shape[1] < 2:
        raise ValueError(f"keys {list(keys.shape)}: must be of at least 2 images, the others are the negatives")
    q = F.normalize(student_outputs.float(), dim=-1)
    positives = torch.einsum("sbd,tbd->stb", q, own_keys) / temp  # [S, T, b]
    if queue is None:
        scores = torch.einsum("sbd,tnd->sbtn", q, keys.float()) / temp  # [S, b, T, B]
        images = torch.arange(num_images, device=q.device)
        scores[:, images, :, images + first_image] = -torch.inf
        negatives = torch.logsumexp(scores.flatten(2), dim=-1)  # [S, b]
    else:
        negatives = torch.logsumexp(torch.einsum("sbd,qd->sbq", q, queue.float()) / temp, dim=-1)
    losses = torch.logaddexp(positives, negatives[:, None]) - positives  # [S, T, b]
    return (losses.sum() - torch.diagonal(losses).sum()) / num_pairs


def _check_pairs(student_outputs: Tensor, targets: Tensor) -> int:
    """The number of pairs of different crops over all images, for [S, B, D] and [T, B, D]."""
    num_student, num_teacher = student_outputs.shape[0], targets.shape[0]
    if student_outputs.dim() != 3 or student_outputs.shape[1:] != targets.shape[1:] or student_outputs.numel() == 0:
        raise ValueError(
            f"student outputs {list(student_outputs.shape)} and targets {list(targets.shape)}: "
            "must be [S, B, D] and [T, B, D] with the same B and D, none of them 0"
        )
    if num_teacher > num_student or num_student < 2:
        raise ValueError(f"{num_student} student and {num_teacher} teacher crops: needs S >= 2 and T <= S")
    return num_teacher * (num_student - 1) * student_outputs.shape[1]


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
    return koleo_loss_in_groups(features[None], features.shape[0])


def koleo_loss_in_groups(features: Tensor, group_size: int) -> Tensor:
    """Sum over the crops of `koleo_loss`, each image among the `group_size` of its group; the mean over the groups.

    Args:
        features: [T, B, D]; the groups are images that follow each other. Computed in fp32.
        group_size: divides B, >= 2.

    Source: DINOv2's code, where the groups are the images of each GPU and T the two global crops.

    Raises:
        ValueError: no neighbours, images that are left over, or another shape.
    """
    if features.dim() != 3 or group_size < 2 or features.shape[1] == 0 or features.shape[1] % group_size:
        raise ValueError(
            f"features {list(features.shape)}: must be [T, B, D], B a multiple of {group_size} and that >= 2"
        )
    eps = 1e-8
    # what is only counted, on torch's meta device, knows no autocast
    plain = nullcontext() if features.is_meta else torch.autocast(features.device.type, enabled=False)
    with plain:
        unit = F.normalize(features.float(), dim=-1).unflatten(1, (-1, group_size))  # [T, G, B / G, D]
        with torch.no_grad():
            similarities = unit @ unit.transpose(-1, -2)
            similarities.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
            nearest = similarities.argmax(dim=-1, keepdim=True).expand_as(unit)
        distance = F.pairwise_distance(unit, unit.gather(2, nearest), eps=eps)  # [T, G, B / G]
        return -torch.log(distance + eps).mean() * features.shape[0]
