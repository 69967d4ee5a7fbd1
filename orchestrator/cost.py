"""What a training step costs, counted before anything runs: parameters, memory and floating-point operations.

torch builds student, teacher and objective without memory (on its meta device), and one forward and backward pass over
them is counted, so whatever timm can build can be counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dino_core.config import PretrainConfig
from orchestrator.config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from dino_core.masking import MaskedPatches
    from dino_core.networks import CropNetwork, Outputs
    from dino_core.objectives import Objective

MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}
"""Values that the optimiser keeps for each parameter."""

_FLOAT = 4
_TEMP = 0.04  # of a teacher that is only counted


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one image of the batch: 2 for each multiplication with its addition.

    Of matrix products, convolutions and attention alone, as is the custom; memory limits the rest, not arithmetic."""

    teacher: float
    """Forward pass of the teacher over the global crops, and the targets."""
    student: float
    """Forward pass of the student over all crops, and the loss."""
    backward: float
    """Its backward pass: twice the forward less the gradient of the pixels, and what is computed again where
    `activation_checkpointing` is on."""
    backbone: float
    """Forward pass of the backbone over one global crop: an image of an evaluation."""

    @property
    def total(self) -> float:
        """Of a training step, for each image."""
        return self.teacher + self.student + self.backward


@dataclass(frozen=True)
class StepCost:
    """Parameters and arithmetic of one run, and bytes of memory that one of its workers needs for a step."""

    backbone: int
    """Parameters of the student's backbone."""
    head: int
    """Parameters of the student's head, or heads."""
    weights: int
    """Bytes: student, its gradients, the optimiser's moments, teacher, frozen teacher, queue of negatives. With several
    workers and `parallel_strategy` = fsdp a worker's part of all but frozen teacher and queue, besides the heads, which
    are whole from forward to backward pass, and with `accumulate_steps` the gradients, which are until the last
    part."""
    activations: int
    """Bytes that autograd holds between the student's forward and backward pass, in fp32."""
    logits: int
    """Bytes: logits of student and teacher, of masked patches too, their softmax, and the gradient."""
    checkpoint: int
    """Bytes of one checkpoint on disk: all weights and moments, and the queue."""
    flops: Flops
    """For one image."""

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.weights + self.activations + self.logits


def cost_key(config: RunConfig) -> tuple[object, ...]:
    """Equal for runs whose steps cost the same."""
    pretrain, crops = config.pretrain, config.pretrain.crops
    sizes = (pretrain.batch_size, pretrain.accumulate_steps, pretrain.loss, pretrain.optim.name, pretrain.precision)
    shapes = (crops.num_local_crops, crops.global_size, crops.local_size)
    spread = (config.cluster.num_workers, pretrain.parallel_strategy)
    patches = (pretrain.ibot, pretrain.mask, pretrain.teacher.centering) if pretrain.ibot.weight else ()
    teacher = (pretrain.teacher.stop_gradient, pretrain.teacher.checkpoint)
    parts = (pretrain.model, pretrain.head, pretrain.predictor, *teacher)
    return (*parts, *sizes, *shapes, *spread, *patches)


def measure(config: RunConfig) -> StepCost:
    """Build the run's networks on torch's meta device and count. Raises ConfigError if model and crops do not fit."""
    import torch

    from dino_core.distillation import build_frozen_teacher
    from dino_core.networks import build_student, build_teacher
    from dino_core.objectives import Objective
    from orchestrator.runs import with_teacher

    pretrain = with_teacher(config).pretrain
    with torch.device("meta"):
        student = build_student(pretrain)
        teacher = targets_from = build_teacher(student, pretrain)
        if pretrain.teacher.checkpoint is not None:
            targets_from = build_frozen_teacher(pretrain, student)
        objective = Objective(student.head.out_dim, pretrain)
    backbone = sum(p.numel() for p in student.backbone.parameters())
    everything = sum(p.numel() for p in student.parameters())
    of_teacher = sum(p.numel() for p in teacher.parameters())
    frozen = 0 if targets_from is teacher else sum(p.numel() for p in targets_from.parameters())
    heads = [part for part in (student.head, student.patch_head) if part is not None]
    head = sum(p.numel() for part in heads for p in part.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    per_worker = pretrain.batch_size // config.cluster.num_workers
    per_pass = per_worker // pretrain.accumulate_steps
    num_crops = 2 + pretrain.crops.num_local_crops
    num_outputs = pretrain.head.num_prototypes or pretrain.head.bottleneck_dim
    queue = (pretrain.loss.queue_size or 0) * num_outputs
    compared = 0  # outputs that each output of the student is told from
    if pretrain.loss.name == "info_nce":
        compared = pretrain.loss.queue_size or 2 * pretrain.batch_size
    masks = _masks(student, pretrain, per_pass)
    num_masked = 0 if masks is None else len(masks.rows)
    of_patches = student.head_of_patches.out_dim * num_masked * (3 + 2 * pretrain.accumulate_steps)
    num_compared = num_outputs if student.class_outputs else 0
    activations, flops = _one_step(student, teacher, targets_from, objective, pretrain, per_pass, masks)
    kept = everything + of_teacher + trained * MOMENTS[pretrain.optim.name] + queue
    held = kept + trained
    if pretrain.parallel_strategy == "fsdp" and config.cluster.num_workers > 1:
        whole = queue + head + (trained if pretrain.accumulate_steps > 1 else 0)
        held = -(-(held - queue) // config.cluster.num_workers) + whole
    return StepCost(
        backbone=backbone,
        head=head,
        weights=_FLOAT * (held + frozen),
        activations=activations,
        # student, of one pass: logits, log-softmax, gradient; teacher, of the whole batch: logits, softmax
        # and for info_nce the similarities, their exponentials and gradient
        logits=_FLOAT
        * (
            num_compared * (3 * num_crops * per_pass + 2 * 2 * per_worker)
            + 3 * num_crops * per_pass * compared
            + of_patches
        ),
        checkpoint=_FLOAT * kept,
        flops=flops,
    )


def _masks(student: CropNetwork, config: PretrainConfig, num_images: int) -> MaskedPatches | None:
    """Masks of one pass; how many patches they hide changes little from step to step."""
    import numpy as np
    import torch

    from dino_core.masking import Masks, all_patches, draw_masks

    if student.grid is None:
        return None
    if config.ibot.patches == "all":
        return all_patches(student.grid, num_images, config.ibot.divisor).part(0, num_images, torch.device("meta"))
    images = np.arange(num_images)
    found = draw_masks(config.mask, student.grid, seed=config.seed, step=0, batch_size=num_images, images=images)
    return Masks(found, config.ibot.divisor).part(0, num_images, torch.device("meta"))


def _one_step(
    student: CropNetwork,
    teacher: CropNetwork,
    targets_from: CropNetwork,
    objective: Objective,
    config: PretrainConfig,
    num_images: int,
    masks: MaskedPatches | None,
) -> tuple[int, Flops]:
    """Of a step over so many images: bytes of the tensors that the forward pass saves for the backward pass, without
    the parameters themselves, and the operations for each image."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    from dino_core.stochastic_depth import remove_stochastic_depth

    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[StorageWeakRef(storage).cdata] = storage.nbytes()
        return tensor

    crops = config.crops
    shapes = [(2 * num_images, crops.global_size)]
    if crops.num_local_crops:
        shapes.append((crops.num_local_crops * num_images, crops.local_size))
    groups = [torch.empty(count, 3, size, size, device="meta") for count, size in shapes]
    parameters = {StorageWeakRef(p.untyped_storage()).cdata for p in student.parameters()}

    def look_at() -> None:
        with torch.no_grad():
            teacher.backbone(groups[0])

    def aim() -> None:
        if not config.teacher.stop_gradient:
            return
        with torch.no_grad():
            if masks is None:
                outputs = targets_from([groups[0]])
            else:
                outputs, tokens = targets_from.look_at_patches(groups[0], masks)
                if objective.patch_centering == "center" and config.ibot.center_over == "all":
                    targets_from.embed_patches(tokens.flatten(0, 1))
            if outputs.crops is not None:
                targets["class"] = objective.targets(outputs.crops.unflatten(0, (-1, num_images)), _TEMP)
            if outputs.patches is not None:
                weights = torch.empty(len(outputs.patches), device="meta")
                targets["patch"] = objective.patch_targets(outputs.patches, weights, _TEMP)

    def compare() -> None:
        found, parts = made[0], {}
        if found.crops is not None:
            outputs = found.crops.unflatten(0, (-1, num_images))
            two_sided = not config.teacher.stop_gradient
            of_class = objective(outputs, outputs[:2], _TEMP).loss if two_sided else None
            parts["class"] = objective.loss(outputs, targets["class"]) if of_class is None else of_class
        if found.patches is not None:
            parts["patch"] = objective.patch_loss(found.patches, targets["patch"])
        if config.loss.koleo_weight:
            parts["koleo"] = objective.koleo(found.features[: 2 * num_images], num_images)
        losses.append(objective.weighted(parts))

    def forward() -> None:
        student.begin_pass(config.seed, 0, num_images=num_images, share=num_images)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made.append(student(groups, masks))

    made: list[Outputs] = []
    losses: list[Tensor] = []
    targets: dict[str, Any] = {}
    backbone, of_teacher, of_student = _count(look_at), _count(aim), _count(forward)
    # everything saved is alive until here, so that no storage was counted under the name of another
    activations = sum(size for storage, size in saved.items() if storage not in parameters)
    if config.model.activation_checkpointing:  # what is computed again would look for the masks of its own pass
        remove_stochastic_depth(student.backbone)
        made[:] = [student(groups, masks)]
    of_loss = _count(compare)
    backward = _count(losses[0].backward)
    return activations, Flops(
        teacher=of_teacher / num_images,
        student=(of_student + of_loss) / num_images,
        backward=backward / num_images,
        backbone=backbone / (2 * num_images),
    )


def _count(run: Callable[[], object]) -> int:
    """Floating-point operations of what it runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
