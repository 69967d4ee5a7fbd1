"""Objectives: a pure `forward` from logits to the loss, and `update_teacher`, where all the teacher's state moves.

Axes: T teacher crops, S student crops, B images, K prototypes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dino_core.centering import center_teacher, update_center_
from dino_core.ema import update_ema_
from dino_core.losses import dino_loss


class DINOOutput(NamedTuple):
    """What `DINO.forward` computes."""

    loss: Tensor
    """[], nats, mean over the images of this process."""
    teacher_probs: Tensor
    """[T, B, K], the targets, without gradient."""


class DINO(nn.Module):
    """Self-distillation with no labels: cross-entropy of the student against a centred, sharpened teacher.

    Source: DINO (arXiv 2104.14294), algorithm 1.
    """

    center: Tensor
    """[K], moving average of the teacher's logits; 0 at the first step."""

    def __init__(
        self,
        num_prototypes: int,
        *,
        student_temp: float = 0.1,
        centering: Literal["center", "none"] = "center",
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.centering = centering
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> DINOOutput:
        """Loss of [S, B, K] student logits against [T, B, K] teacher logits; changes nothing."""
        probs = center_teacher(teacher_logits, self.center, teacher_temp)  # [T, B, K]
        return DINOOutput(dino_loss(student_logits, probs, self.student_temp), probs)

    def update_teacher(self, student: nn.Module, teacher: nn.Module, teacher_logits: Tensor, momentum: float) -> None:
        """After the optimiser's step: move the teacher's parameters (not its buffers), then the centre.

        `teacher_logits` are those of the same step's loss, [T, B, K]; the centre averages them over all ranks.
        """
        update_ema_(teacher.parameters(), student.parameters(), momentum)
        if self.centering == "center":
            update_center_(self.center, teacher_logits, self.center_momentum)
