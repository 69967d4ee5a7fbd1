"""What a step tells of itself: the diagnostics of `diagnostics.py` over what teacher and student gave in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dino_core.diagnostics import (
    center_norm,
    distance_to_uniform,
    feature_rank,
    feature_std,
    kl_to_student,
    prototype_usage,
    target_std,
    teacher_entropy,
)
from dino_core.distributed import all_reduce_mean_, all_reduce_sum_, world_size
from dino_core.objectives import Targets
from dino_core.passes import Aims, Losses

if TYPE_CHECKING:
    from dino_core.train import TrainState


@torch.no_grad()
def step_metrics(state: TrainState, loss: Tensor, losses: Losses, features: Tensor, aims: Aims) -> dict[str, Tensor]:
    """What tells whether the run collapses, of the global batch and before the update, each [].

    Always train/feature_std and train/feature_rank (teacher's backbone); with a loss of class tokens train/target_std
    (teacher's head, or its probabilities); for cross_entropy train/teacher_entropy, train/kl, train/loss_below_uniform
    (nats) and train/prototype_usage; for info_nce train/loss_below_uniform (nats); with a centre train/center_norm; in
    fp16 train/loss_scale. With several losses each of them, train/class_loss, train/patch_loss and train/koleo; with
    masked patches those of `_patch_metrics`.

    Args:
        loss: the total of all ranks.
        features: of the teacher's global crops, [T * B, D].
    """
    metrics = {"train/feature_std": feature_std(features), "train/feature_rank": feature_rank(features)}
    config = state.config
    alone = losses.parts.keys() == {"class"} and config.loss.weight == 1
    means = {"class": loss} if alone else {name: all_reduce_mean_(part.clone()) for name, part in losses.parts.items()}
    if aims.targets is not None:
        metrics |= _class_metrics(state, means["class"], aims.targets)
    if aims.patches is not None:
        metrics |= _patch_metrics(state, means["patch"], aims)
    if not alone:
        metrics |= {f"train/{name}" if name == "koleo" else f"train/{name}_loss": mean for name, mean in means.items()}
    if state.scaler.is_enabled():
        metrics["train/loss_scale"] = torch.tensor(state.scaler.get_scale(), device=state.device)
    return metrics


def _class_metrics(state: TrainState, loss: Tensor, targets: Targets) -> dict[str, Tensor]:
    values = targets.values
    metrics = {"train/target_std": target_std(values)}
    name = state.config.loss.name
    if name == "cross_entropy":
        entropy = all_reduce_mean_(teacher_entropy(values))
        metrics["train/teacher_entropy"] = entropy
        metrics["train/kl"] = kl_to_student(loss, entropy)
        metrics["train/prototype_usage"] = prototype_usage(values)
        metrics["train/loss_below_uniform"] = distance_to_uniform(loss, values.shape[-1])
    elif name == "info_nce":
        in_batch = values.shape[0] * (values.shape[1] * world_size() - 1)
        metrics["train/loss_below_uniform"] = distance_to_uniform(loss, 1 + (state.objective.num_negatives or in_batch))
    if state.config.teacher.centering == "center":
        metrics["train/center_norm"] = center_norm(state.objective.center)
    return metrics


def _patch_metrics(state: TrainState, loss: Tensor, aims: Aims) -> dict[str, Tensor]:
    """As `_class_metrics` of the masked patches, each by its weight in the loss; NaN in a step without any.

    train/patch_teacher_entropy, train/patch_kl, train/patch_loss_below_uniform (nats), train/patch_prototype_usage,
    train/masked_share (of all patches of the global crops) and, with a centre, train/patch_center_norm.
    """
    assert aims.patches is not None and aims.masks is not None
    (probs, weights), masks = aims.patches, aims.masks.values
    entropies = torch.special.entr(probs).sum(dim=-1)  # [M]
    num_hidden = 0.0 if aims.masks.visible else float(masks.sum())
    counts = torch.tensor([num_hidden, float(masks.size)], device=probs.device)
    sums = torch.stack([weights.sum(), weights @ entropies])
    sums = all_reduce_sum_(torch.cat([sums, counts, weights @ probs]))  # [4 + K]
    entropy = sums[1] / sums[0]
    cross_entropy = loss * world_size() / sums[0]
    metrics = {
        "train/patch_teacher_entropy": entropy,
        "train/patch_kl": kl_to_student(cross_entropy, entropy),
        "train/patch_loss_below_uniform": distance_to_uniform(cross_entropy, probs.shape[-1]),
        "train/patch_prototype_usage": torch.special.entr(sums[4:] / sums[0]).sum().exp(),
        "train/masked_share": sums[2] / sums[3],
    }
    if state.objective.patch_centering == "center":
        metrics["train/patch_center_norm"] = center_norm(state.objective.patch_center)
    return metrics
