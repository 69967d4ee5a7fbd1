"""The forward and backward passes of one step, which move no state but gradients.

Axes: T teacher crops, S student crops, B images of this rank, K outputs of a head, D features, N patches of a crop, M
masked patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dino_core.masking import Masks, rank_masks
from dino_core.networks import Outputs
from dino_core.objectives import PatchSum, PatchTargets, Targets
from dino_core.sharding import set_gradient_sync

if TYPE_CHECKING:
    from dino_core.train import TrainState


class Aims(NamedTuple):
    """What the student is to give in one step."""

    targets: Targets | None
    """For class tokens; None where nothing compares them."""
    patches: PatchTargets | None = None
    masks: Masks | None = None


class Losses(NamedTuple):
    """The losses of this rank's share in one step, each []."""

    total: Tensor
    """What is minimised: the weighted sum of the parts."""
    parts: Mapping[str, Tensor]
    """By name (class, patch, koleo), without their weights."""


class Taught(NamedTuple):
    """What the teacher says about this rank's share of the global crops."""

    features: Tensor
    """[T * B, D]"""
    outputs: Tensor | None
    """[T, B, K]; None where nothing compares class tokens."""
    aims: Aims
    patch_sum: PatchSum | None = None
    """Where patches are masked and have a centre."""


@torch.no_grad()
def teach(state: TrainState, crops: Tensor, num_images: int) -> Taught:
    """The targets of a step from its global crops [T * B, 3, H, W]."""
    teacher, objective, schedules = state.target_network, state.objective, state.schedules
    masks, patches, patch_sum = _masks(state, num_images), None, None
    patch_logits: Tensor | None = None
    with state.autocast():
        if masks is None:
            features = teacher.features([crops])  # [T * B, D]
            rows: Tensor | None = teacher.head(features)
        else:
            masked = masks.part(0, num_images, state.device)
            (rows, features, patch_logits), tokens = teacher.look_at_patches(crops, masked)
            assert patch_logits is not None
            if objective.patch_centering == "center":
                patch_sum = _patch_sum(state, patch_logits, tokens)
    outputs = None if rows is None else rows.unflatten(0, (-1, num_images))  # [T, B, K]
    targets = None if outputs is None else objective.targets(outputs, schedules.teacher_temp(state.step))
    if masks is not None and patch_logits is not None:
        patches = objective.patch_targets(patch_logits, masks.weights(state.device), schedules.patch_temp(state.step))
    return Taught(features, outputs, Aims(targets, patches, masks), patch_sum)


def _masks(state: TrainState, num_images: int) -> Masks | None:
    config, grid = state.config, state.student.grid
    if grid is None:
        return None
    return rank_masks(
        *(config.mask, grid),
        seed=config.seed,
        step=state.step,
        share=num_images,
        divisor=config.ibot.divisor,
        patches=config.ibot.patches,
    )


def _patch_sum(state: TrainState, masked_logits: Tensor, tokens: Tensor) -> PatchSum:
    """What the patches' centre moves by: of the masked patches [M, K], or of all [T * B, N, D]."""
    if state.config.ibot.center_over == "masked":
        count = torch.tensor(float(len(masked_logits)), device=state.device)
        return PatchSum(masked_logits.float().sum(dim=0), count)
    # prototypes are linear, so the mean of all outputs is the output of the mean: no [T * B, N, K]
    network = state.target_network
    head = network.head_of_patches
    rows = network.embed_patches(tokens.flatten(0, 1))
    with torch.autocast(state.device.type, enabled=False):
        mean = rows.float().mean(dim=0, keepdim=True)
        assert head.last_layer is not None
        total = head.last_layer(mean)[0] * len(rows)  # [K]
    return PatchSum(total, torch.tensor(float(len(rows)), device=state.device))


def backward_in_parts(state: TrainState, groups: Sequence[Tensor], aims: Aims, share: int) -> Losses:
    """Gradients of the losses over this rank's share, by `accumulate_steps` passes of the student."""
    config, objective = state.config, state.objective
    num_parts = config.accumulate_steps
    size = share // num_parts
    total, sums = torch.zeros((), device=state.device), dict[str, Tensor]()
    for part in range(num_parts):
        first = part * size
        rows = [
            group.unflatten(0, (-1, share))[:, first : first + size].flatten(0, 1) if num_parts > 1 else group
            for group in groups
        ]
        masked = None if aims.masks is None else aims.masks.part(first, size, state.device)
        state.student.begin_pass(config.seed, state.step, num_images=size, first_image=first, share=share)
        with _no_sync(state, last=part == num_parts - 1):
            with state.autocast():
                outputs: Outputs = state.parallel_student(rows, masked)
            parts = {}
            if aims.targets is not None:
                assert outputs.crops is not None
                parts["class"] = objective.loss(outputs.crops.unflatten(0, (-1, size)), aims.targets, first)
            if aims.patches is not None:
                assert aims.masks is not None and outputs.patches is not None
                own = aims.patches
                if num_parts > 1:
                    own = own.of(aims.masks.members(first, size, state.device))
                parts["patch"] = objective.patch_loss(outputs.patches, own) * num_parts
            if config.loss.koleo_weight:
                parts["koleo"] = objective.koleo(outputs.features[: groups[0].shape[0] // num_parts], size)
            loss = objective.weighted(parts) / num_parts
            state.scaler.scale(loss).backward()
        total += loss.detach()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach() / num_parts
    return Losses(total, sums)


def _no_sync(state: TrainState, *, last: bool) -> AbstractContextManager[None]:
    """Gradients are averaged over the ranks once, in the last backward pass."""
    if state.is_sharded:
        set_gradient_sync(state.student, last)
    if last or not isinstance(state.parallel_student, DistributedDataParallel):
        return nullcontext()
    return state.parallel_student.no_sync()


def backward_through_both_sides(state: TrainState, groups: Sequence[Tensor], num_images: int) -> tuple[Losses, Taught]:
    """As `backward_in_parts` where the student is its own teacher: the outputs of the global crops are the targets."""
    state.student.begin_pass(state.config.seed, state.step, num_images=num_images, share=num_images)
    with state.autocast():
        found: Outputs = state.parallel_student(groups)
    assert found.crops is not None
    outputs = found.crops.unflatten(0, (-1, num_images))  # [S, B, K]
    num_global = groups[0].shape[0]
    num_teacher = num_global // num_images
    loss, targets = state.objective(outputs, outputs[:num_teacher], state.schedules.teacher_temp(state.step))
    parts = {"class": loss}
    if state.config.loss.koleo_weight:
        parts["koleo"] = state.objective.koleo(found.features[:num_global], num_images)
    total = state.objective.weighted(parts)
    state.scaler.scale(total).backward()
    losses = Losses(total.detach(), {name: value.detach() for name, value in parts.items()})
    aims = Aims(Targets(targets.values.detach(), None))
    return losses, Taught(found.features[:num_global].detach(), outputs[:num_teacher].detach(), aims)
