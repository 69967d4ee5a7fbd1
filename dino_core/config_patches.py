"""The parts of `PretrainConfig` for masked patches: which are masked, and what their loss is. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dino_core.config_checks import CheckedConfig, number


@dataclass(frozen=True, kw_only=True)
class MaskConfig(CheckedConfig):
    """Which patches of the student's global crops are masked, where `pretrain.ibot.weight` is not 0. Local crops never
    are. A mask is a function of seed, step, place in the global batch and crop."""

    path: ClassVar[str] = "pretrain.mask"

    shape: Literal["block", "random"] = "block"
    """Rectangles that overlap until about the wanted number of patches is covered (BEiT), or exactly
    floor(ratio x patches) single ones (- | -)."""
    sampler: Literal["ibot", "dinov2"] = "dinov2"
    """How crops and ratios are drawn. ibot: each crop for itself, and blocks of at least a ninth of the crop. dinov2:
    exactly floor(`prob` x crops) crops of the global batch, their ratios spread evenly over `ratio`, and blocks of at
    least 4 patches (- | -)."""
    prob: float = number(0.5, gt=0, le=1)
    """Share of the global crops that are masked (- | ibot.mask_sample_probability)."""
    ratio: tuple[float, float] = number((0.1, 0.5), gt=0, le=1)
    """Smallest and largest share of a masked crop's patches (- | ibot.mask_ratio_min_max)."""

    def _problems(self) -> list[str]:
        low, high = self.ratio
        return [f"ratio = {[low, high]}: the first value must not exceed the second"] if low > high else []


@dataclass(frozen=True, kw_only=True)
class IBOTConfig(CheckedConfig):
    """Self-distillation of masked patches: the student, whose crop is masked, tells what the teacher sees there."""

    path: ClassVar[str] = "pretrain.ibot"

    weight: float = number(0.0, ge=0)
    """Weight of the patches' loss; 0 masks nothing (--lambda2 | ibot.loss_weight)."""
    patches: Literal["masked", "all"] = "masked"
    """Which are compared: those that the student does not see, or, with nothing masked, all of the global crops, as in
    DINOv2's distillation from a frozen teacher (- | -)."""
    head: Literal["shared", "shared_mlp", "untied"] = "shared"
    """Patches go through the class token's head, through its MLP to prototypes of their own (iBOT's code without
    --shared_head), or through a head of their own (--shared_head | ibot.separate_head)."""
    num_prototypes: int | None = number(None, ge=2)
    """Their own ones; None: as many as `pretrain.head` has (--patch_out_dim | ibot.head_n_prototypes)."""
    bottleneck_dim: int | None = number(None, ge=1)
    """Of a head of their own; None as `pretrain.head` (- | ibot.head_bottleneck_dim)."""
    student_temp: float | None = number(None, gt=0)
    """Temperature of the student's patches; None as `pretrain.student.temp` (- | -)."""
    temp: float | None = number(None, gt=0)
    """Temperature of the teacher's patches after the warm-up; None as `pretrain.teacher.temp`
    (--teacher_patch_temp | -)."""
    warmup_temp: float | None = number(None, gt=0)
    """The same in the first step; None as `pretrain.teacher.warmup_temp`. The warm-up is as long as that of the class
    token (--warmup_teacher_patch_temp | -)."""
    centering: Literal["center", "softmax", "sinkhorn_knopp", "none"] | None = None
    """Of the teacher's patches, apart from the class token's; None: by the same means (- | train.centering)."""
    center_momentum: float = number(0.9, ge=0, le=1)
    """EMA momentum of the patches' centre (- | -)."""
    center_over: Literal["all", "masked"] = "all"
    """The patches' centre is the mean of all patches of the global crops (iBOT), or of the masked ones (DINOv2)
    (- | -)."""
    divisor: Literal["crops", "masked_crops", "masked_patches"] = "crops"
    """What the loss is the mean over. crops: all global crops, each with the mean over its masked patches, or 0 where
    none are masked (the code of iBOT and of DINOv2). masked_crops: those with a mask. masked_patches: all masked
    patches, so that crops count by what is masked of them (- | -)."""
    class_view: Literal["masked", "full"] = "masked"
    """The student's class tokens of global crops are those of the masked crops (the code of iBOT and of DINOv2), or of
    another pass over the full ones (- | -)."""
