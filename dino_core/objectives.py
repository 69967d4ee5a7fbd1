"""The objective of a run, composed of its loss, centring, sharpening and teacher: a point of the component space.

`targets` and `loss` are pure; `update_teacher` is the one place where the teacher's state moves. Axes: T teacher crops,
S student crops, B images of this rank, N images of the global batch, K outputs (prototypes or embedding), M masked
patches of this rank, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_core.centering import center_teacher, sinkhorn_knopp, update_center_, update_center_by_sum_
from dino_core.config import PretrainConfig
from dino_core.distributed import all_gather_rows, all_gather_rows_with_gradient, rank
from dino_core.ema import update_ema_
from dino_core.losses import dino_loss, ibot_patch_loss, info_nce_loss, koleo_loss_in_groups, mse_loss


class Targets(NamedTuple):
    """What the student is compared with."""

    values: Tensor
    """[T, B, K] of this rank: probabilities, or outputs of unit length."""
    keys: Tensor | None = None
    """[T, N, K] of all ranks, where other images are the negatives."""
    first_image: int = 0
    """Where the B images of this rank stand among the N."""


class PatchTargets(NamedTuple):
    """What the student's masked patches are compared with."""

    probs: Tensor
    """[M, K]"""
    weights: Tensor
    """[M], what each of them counts (`Masks.weights`)."""

    def of(self, members: Tensor) -> PatchTargets:
        """Those of some patches [m]."""
        return PatchTargets(self.probs[members], self.weights[members])


class PatchSum(NamedTuple):
    """What the patches' centre is made from, of this rank."""

    total: Tensor
    """[K], the sum of the teacher's outputs."""
    num: Tensor
    """[], of how many patches."""


class Output(NamedTuple):
    """What `Objective.forward` computes."""

    loss: Tensor
    """[], mean over the images of this process; nats, or squared distance for mse."""
    targets: Targets


class Objective(nn.Module):
    """Self-distillation: a student learns to give the same for all crops of an image as its teacher does for two.

    Args:
        out_dim: K, width of the head's output.
        config: its `loss`, `teacher`, `student.temp`, `ibot` and, for the first negatives of a queue, torch's global
            RNG are used.

    Source: DINO (arXiv 2104.14294), algorithm 1; the other points as named in `dino_core.methods`.
    """

    center: Tensor
    """[K], moving average of the teacher's outputs; 0 at the first step. Only where `centering` is "center"."""
    patch_center: Tensor
    """The same of the patches' outputs. Only where patches are masked and their centring is "center"."""
    queue: Tensor
    """[Q, K], teacher outputs of unit length of earlier steps, at first random directions. Only where there is one."""
    queue_next: Tensor
    """[], the row of `queue` that is replaced next."""

    def __init__(self, out_dim: int, config: PretrainConfig) -> None:
        super().__init__()
        self.loss_name = config.loss.name
        self.teacher = config.teacher
        self.student_temp = config.student.temp
        self.ibot = config.ibot
        self.loss_config = config.loss
        self.patch_centering = config.ibot.centering or config.teacher.centering
        if self.teacher.centering == "center":
            self.register_buffer("center", torch.zeros(out_dim))
        if self.patch_centering == "center" and config.ibot.weight:
            own = config.ibot.num_prototypes if config.ibot.head != "shared" else None
            self.register_buffer("patch_center", torch.zeros(own or out_dim))
        self.has_queue = config.loss.queue_size is not None
        if config.loss.queue_size is not None:
            self.register_buffer("queue", F.normalize(torch.randn(config.loss.queue_size, out_dim), dim=-1))
            self.register_buffer("queue_next", torch.tensor(0))

    @property
    def num_negatives(self) -> int | None:
        """Negatives of each pair that come from the queue; None without one."""
        return self.queue.shape[0] if self.has_queue else None

    def targets(self, teacher_outputs: Tensor, teacher_temp: float) -> Targets:
        """Targets from the teacher's outputs [T, B, K] for all images of this rank; every rank must call it.

        They have a gradient only where `teacher.stop_gradient` is false.
        """
        if self.loss_name == "cross_entropy":
            rows = teacher_outputs.flatten(0, 1)
            center = self.center if self.teacher.centering == "center" else None
            probs = self._probabilities(rows, self.teacher.centering, center, teacher_temp, self.student_temp)
            return Targets(probs.view(teacher_outputs.shape))
        outputs = teacher_outputs.float()
        if self.teacher.centering == "center":
            outputs = outputs - self.center
        values = F.normalize(outputs, dim=-1)  # [T, B, K]
        if self.teacher.stop_gradient:
            values = values.detach()
        if self.loss_name == "mse" or self.has_queue:
            return Targets(values)
        gather = all_gather_rows if self.teacher.stop_gradient else all_gather_rows_with_gradient
        keys = gather(values.transpose(0, 1).contiguous()).transpose(0, 1)  # [T, N, K]
        return Targets(values, keys, rank() * values.shape[1])

    @torch.no_grad()
    def _probabilities(
        self, teacher_logits: Tensor, centering: str, center: Tensor | None, teacher_temp: float, student_temp: float
    ) -> Tensor:
        """[n, K], each row sums to 1. Batch-wise centring takes all teacher crops, or patches, as one batch."""
        sharpening = self.teacher.sharpening
        temp = student_temp if sharpening == "none" else teacher_temp
        if centering in ("softmax", "sinkhorn_knopp"):
            num_iters = 1 if centering == "softmax" else self.teacher.sinkhorn_iters
            probs = sinkhorn_knopp(teacher_logits, temp, num_iters, may_be_empty=True)
        else:
            probs = center_teacher(teacher_logits, 0.0 if center is None else center, temp)
        if sharpening == "argmax":
            probs = torch.zeros_like(probs).scatter_(-1, probs.argmax(dim=-1, keepdim=True), 1.0)
        return probs

    def patch_targets(self, teacher_patches: Tensor, weights: Tensor, teacher_temp: float) -> PatchTargets:
        """Targets from the teacher's outputs [M, K] for the masked patches of this rank; every rank must call it.

        Args:
            weights: [M], what each patch counts.
        """
        center = self.patch_center if self.patch_centering == "center" else None
        probs = self._probabilities(
            teacher_patches, self.patch_centering, center, teacher_temp, self.patch_student_temp
        )
        return PatchTargets(probs, weights)

    @property
    def patch_student_temp(self) -> float:
        return self.student_temp if self.ibot.student_temp is None else self.ibot.student_temp

    def patch_loss(self, student_patches: Tensor, targets: PatchTargets) -> Tensor:
        """[], the weighted sum over masked patches, for [M, K] student outputs; nats."""
        return ibot_patch_loss(student_patches, targets.probs, targets.weights, self.patch_student_temp)

    def koleo(self, features: Tensor, num_images: int) -> Tensor:
        """[], KoLeo of the student's features of the global crops, [T * b, D]; every rank must call it.

        Groups that do not lie within the b images take the features of all ranks, with their gradient.
        """
        features = features.unflatten(0, (-1, num_images))  # [T, b, D]
        if self.loss_config.koleo_crops == "first":
            features = features[:1]
        size = self.loss_config.koleo_group_size
        if size is None or num_images % size:
            features = all_gather_rows_with_gradient(features.transpose(0, 1).contiguous()).transpose(0, 1)
        return koleo_loss_in_groups(features, size or features.shape[1])

    def loss(self, student_outputs: Tensor, targets: Targets, first_image: int = 0) -> Tensor:
        """[], mean over the images `first_image` to `first_image` + b of this rank, for [S, b, K] student outputs."""
        values = targets.values[:, first_image : first_image + student_outputs.shape[1]]
        if self.loss_name == "cross_entropy":
            return dino_loss(student_outputs, values, self.student_temp)
        if self.loss_name == "mse":
            return mse_loss(student_outputs, values)
        if targets.keys is None:
            return info_nce_loss(student_outputs, values, self.student_temp, queue=self.queue)
        return info_nce_loss(
            student_outputs, targets.keys, self.student_temp, first_image=targets.first_image + first_image
        )

    def weighted(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The sum of the losses (class, patch, koleo) by their weights, []."""
        settings = self.loss_config
        weights = {"class": settings.weight, "patch": self.ibot.weight, "koleo": settings.koleo_weight}
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def forward(self, student_outputs: Tensor, teacher_outputs: Tensor, teacher_temp: float) -> Output:
        """Loss of [S, B, K] student outputs against [T, B, K] teacher outputs; changes nothing."""
        targets = self.targets(teacher_outputs, teacher_temp)
        return Output(self.loss(student_outputs, targets), targets)

    @property
    def updates_before_step(self) -> bool:
        """Whether `update_teacher` belongs before the optimiser's step: the teacher gets the weights of before it."""
        return self.teacher.update == "previous_step"

    @torch.no_grad()
    def update_teacher(
        self,
        student: nn.Module,
        teacher: nn.Module,
        teacher_outputs: Tensor | None,
        *,
        momentum: float,
        epoch_ended: bool = False,
        patches: PatchSum | None = None,
    ) -> None:
        """Once per step: move the teacher's parameters (by name; the student may have more), its buffers if so
        configured, then centre and queue.

        Args:
            teacher_outputs: those of the same step's loss, [T, B, K]; centre and queue take them from all ranks. None
                where nothing compares them.
            momentum: of the moving average, where that is how the teacher moves.
            epoch_ended: whether the step was the last of an epoch.
            patches: what moves the patches' centre, where there is one.
        """
        how = self.teacher.update
        if how != "previous_epoch" or epoch_ended:
            weight = momentum if how == "ema" else 0.0
            sources = dict(student.named_parameters())
            pairs = [(parameter, sources[name]) for name, parameter in teacher.named_parameters()]
            update_ema_([pair[0] for pair in pairs], [pair[1] for pair in pairs], weight)
            # a teacher that is the student itself sees no forward pass of its own to move its statistics
            if self.teacher.ema_buffers or not self.teacher.stop_gradient:
                _update_buffers(teacher, student, weight)
        if self.teacher.centering == "center" and teacher_outputs is not None:
            update_center_(self.center, teacher_outputs, self.teacher.center_momentum)
        if patches is not None:
            update_center_by_sum_(self.patch_center, patches.total, patches.num, self.ibot.center_momentum)
        if self.has_queue:
            assert teacher_outputs is not None
            self._enqueue(teacher_outputs)

    def _enqueue(self, teacher_outputs: Tensor) -> None:
        size = self.queue.shape[0]
        values = F.normalize(teacher_outputs.float(), dim=-1).transpose(0, 1)  # [B, T, K]
        newest = all_gather_rows(values.contiguous()).flatten(0, 1)[-size:]  # [n, K]
        rows = (self.queue_next + torch.arange(len(newest), device=newest.device)) % size
        self.queue[rows] = newest
        self.queue_next.copy_((self.queue_next + len(newest)) % size)


def _update_buffers(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    sources = dict(student.named_buffers())
    for name, buffer in teacher.named_buffers():
        if buffer.is_floating_point():
            buffer.lerp_(sources[name], 1 - momentum)
        else:
            buffer.copy_(sources[name])
