"""The teacher's weights: an exponential moving average of the student's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dino_core.sharding import local_part


@torch.no_grad()
def update_ema_(teacher_params: Iterable[Tensor], student_params: Iterable[Tensor], momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place, for all tensors at once.

    Tensors that are sharded must be so on both sides: each rank averages its parts.

    Source: DINO (arXiv 2104.14294), section 3.1.

    Raises:
        ValueError: `momentum` lies outside [0, 1], or the two sides differ in number.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum = {momentum}: must be >= 0 and <= 1")
    teacher, student = [local_part(t) for t in teacher_params], [local_part(t) for t in student_params]
    if len(teacher) != len(student):
        raise ValueError(f"{len(teacher)} teacher tensors but {len(student)} student tensors: must be as many")
    torch._foreach_lerp_(teacher, student, 1 - momentum)
