"""From the teacher's logits to its target distributions, without collapse.

Axes: T teacher crops, B images, n = T * B rows, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dino_core.distributed import all_reduce_max_, all_reduce_sum_, world_size


@torch.no_grad()
def center_teacher(logits: Tensor, center: Tensor | float, temp: float) -> Tensor:
    """Centred and sharpened targets: softmax((logits - center) / temp) over K, in fp32.

    Args:
        logits: [T, B, K] (or any [..., K]).
        center: [K], or 0 for none.
        temp: > 0; small values sharpen.

    Source: DINO (arXiv 2104.14294), section 3.1, "Avoiding collapse".

    Raises:
        ValueError: a temperature that is not positive.
    """
    if temp <= 0:
        raise ValueError(f"temp = {temp}: must be > 0")
    return torch.softmax((logits.float() - center) / temp, dim=-1)


@torch.no_grad()
def update_center_(center: Tensor, logits: Tensor, momentum: float) -> None:
    """center = momentum * center + (1 - momentum) * mean of the rows of all ranks, in place.

    Args:
        center: [K].
        logits: [..., K], the teacher's raw logits; every rank must hold as many rows.

    Source: DINO (arXiv 2104.14294), equation 4.
    """
    rows = logits.float().flatten(0, -2)  # [n, K]
    total = all_reduce_sum_(rows.sum(dim=0))  # [K]
    center.lerp_(total / (rows.shape[0] * world_size()), 1 - momentum)


@torch.no_grad()
def update_center_by_sum_(center: Tensor, total: Tensor, count: Tensor, momentum: float) -> None:
    """As `update_center_` from the sum of this rank's rows and their number, which may differ between ranks.

    A step without any row leaves the centre as it is.

    Args:
        center: [K].
        total: [K], in fp32.
        count: [].
    """
    summed = all_reduce_sum_(torch.cat([total, count.to(total)[None]]))  # [K + 1]
    mean = summed[:-1] / summed[-1].clamp(min=1)
    center.lerp_(torch.where(summed[-1] > 0, mean, center), 1 - momentum)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, num_iters: int = 3, *, may_be_empty: bool = False) -> Tensor:
    """Targets under which the batch uses all prototypes equally.

    ::

        Q = exp(logits / temp)
        repeat num_iters times:
            each prototype: divide by its sum over the rows of all ranks
            each row:       divide by its sum over the prototypes

    Computed with logarithms, so no temperature over- or underflows. The authors' factors 1/K and 1/B cancel in the
    last line and are left out.

    Args:
        logits: [n, K], rows of this rank, of which the ranks may have different numbers; computed in fp32.
        temp: > 0.
        num_iters: >= 1.
        may_be_empty: whether a rank may have no row at all.

    Returns:
        [n, K], each row sums to 1.

    Source: SwAV (arXiv 2006.09882), section 3.1; DINOv2 (arXiv 2304.07193), section 4.

    Raises:
        ValueError: a temperature that is not positive, no iteration, or not a matrix.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or (logits.shape[0] == 0 and not may_be_empty):
        raise ValueError(f"logits {list(logits.shape)}: must be [n, K], neither of them 0")
    if temp <= 0:
        raise ValueError(f"temp = {temp}: must be > 0")
    if num_iters < 1:
        raise ValueError(f"num_iters = {num_iters}: must be >= 1")
    log_q = logits.float() / temp
    for _ in range(num_iters):
        found = log_q.amax(dim=0) if len(log_q) else log_q.new_full(log_q.shape[1:], -torch.inf)
        largest = all_reduce_max_(found)  # [K]
        total = all_reduce_sum_((log_q - largest).exp().sum(dim=0))  # [K]
        log_q = log_q - (largest + total.log())
        log_q = torch.log_softmax(log_q, dim=1)
    return log_q.exp()
