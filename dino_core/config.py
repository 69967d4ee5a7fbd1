"""`PretrainConfig`: every choice that can change a number of a pre-training run.

Nothing here imports torch, so a configuration can be built, checked and printed at once. The parts are frozen
dataclasses; each field's docstring gives its unit and its names elsewhere as ``(DINO flag | DINOv2 key)``, with ``-``
where there is none. A value out of range raises `ConfigError` when the object is built, naming the dotted key, the
value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


class ConfigError(ValueError):
    """A configuration that cannot run. The message holds one line per problem, each opening with the dotted key."""


def number(default: Any, *, gt: float | None = None, ge: float | None = None, le: float | None = None) -> Any:
    """A field whose value (or each element of a tuple value) must lie in the given range; None is left alone."""
    limits = {name: limit for name, limit in (("gt", gt), ("ge", ge), ("le", le)) if limit is not None}
    return field(default=default, metadata=limits)


_SYMBOLS = {"gt": ">", "ge": ">=", "le": "<="}


def allowed_range(item: dataclasses.Field[Any]) -> str:
    """The range of a field in words, such as `> 0 and <= 1`; empty where it has none."""
    return " and ".join(f"{_SYMBOLS[name]} {limit}" for name, limit in item.metadata.items())


def in_range(item: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a value (each element of a tuple; None always) lies in the field's range."""
    limits = dict(item.metadata)
    values = value if isinstance(value, tuple) else (value,)
    return not limits or all(_in_range(v, limits) for v in values if v is not None)


def _in_range(value: float, limits: dict[str, float]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return not (
        ("gt" in limits and value <= limits["gt"])
        or ("ge" in limits and value < limits["ge"])
        or ("le" in limits and value > limits["le"])
    )


class CheckedConfig:
    """Range checks shared by all parts: each field against the limits in its metadata, then `_problems`."""

    path: ClassVar[str] = ""
    """The dotted prefix of this part's keys, for error messages."""

    def __post_init__(self) -> None:
        problems = []
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if not in_range(item, value):
                problems.append(f"{self.path}.{item.name} = {value}: must be {allowed_range(item)}")
        problems += [f"{self.path}.{problem}" for problem in self._problems()] if not problems else []
        if problems:
            raise ConfigError("\n".join(problems))

    def _problems(self) -> list[str]:
        """What is wrong between fields, each line opening with a field's name. Called when every field is in range."""
        return []


@dataclass(frozen=True, kw_only=True)
class ModelConfig(CheckedConfig):
    """The backbone, any timm model that gives features. The four sizes replace a ViT's own; None keeps them."""

    path: ClassVar[str] = "pretrain.model"

    backbone: str = "vit_small_patch16_224"
    """timm model name (--arch | student.arch)."""
    patch_size: int | None = number(None, ge=1)
    """Pixels per side of a ViT patch (--patch_size | student.patch_size)."""
    embed_dim: int | None = number(None, ge=1)
    """Width of a ViT (- | -)."""
    depth: int | None = number(None, ge=1)
    """Number of transformer blocks of a ViT (- | -)."""
    num_heads: int | None = number(None, ge=1)
    """Attention heads per block of a ViT (- | -)."""
    drop_path: float = number(0.1, ge=0, le=0.99)
    """Stochastic depth rate of the last block, rising linearly from 0; student only
    (--drop_path_rate | student.drop_path_rate)."""

    def _problems(self) -> list[str]:
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            return [f"embed_dim = {self.embed_dim}: must be a multiple of num_heads = {self.num_heads}"]
        return []


@dataclass(frozen=True, kw_only=True)
class HeadConfig(CheckedConfig):
    """Projection head: an MLP with an L2-normalised bottleneck, then a weight-normed layer of prototypes."""

    path: ClassVar[str] = "pretrain.head"

    num_prototypes: int = number(65536, ge=2)
    """K, outputs of the last layer (--out_dim | dino.head_n_prototypes)."""
    num_layers: int = number(3, ge=1)
    """Linear layers of the MLP (- | dino.head_nlayers)."""
    hidden_dim: int = number(2048, ge=1)
    """Width of the hidden layers (- | dino.head_hidden_dim)."""
    bottleneck_dim: int = number(256, ge=1)
    """Width in front of the prototypes (- | dino.head_bottleneck_dim)."""
    norm_last_layer: bool = True
    """Keep the prototypes at unit length; False learns their lengths (--norm_last_layer | -)."""
    batch_norm: bool = False
    """Batch norm after the hidden layers (--use_bn_in_head | -)."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(CheckedConfig):
    """The teacher: its temperature (sharpening), its momentum (EMA of the student) and its centring."""

    path: ClassVar[str] = "pretrain.teacher"

    temp: float = number(0.04, gt=0)
    """Temperature after the warm-up (--teacher_temp | teacher.teacher_temp)."""
    warmup_temp: float = number(0.04, gt=0)
    """Temperature of the first step (--warmup_teacher_temp | teacher.warmup_teacher_temp)."""
    warmup_temp_epochs: float = number(0.0, ge=0)
    """Epochs over which the temperature goes linearly from one to the other
    (--warmup_teacher_temp_epochs | teacher.warmup_teacher_temp_epochs)."""
    momentum: float = number(0.996, ge=0, le=1)
    """EMA momentum at the first step (--momentum_teacher | teacher.momentum_teacher)."""
    final_momentum: float = number(1.0, ge=0, le=1)
    """EMA momentum that the cosine schedule approaches at the end (- | teacher.final_momentum_teacher)."""
    centering: Literal["center", "none"] = "center"
    """EMA centre subtracted from the teacher's logits, or nothing (- | train.centering)."""
    center_momentum: float = number(0.9, ge=0, le=1)
    """EMA momentum of the centre (- | -)."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(CheckedConfig):
    """The student's side of the loss."""

    path: ClassVar[str] = "pretrain.student"

    temp: float = number(0.1, gt=0)
    """Temperature of the student's softmax (- | -)."""


@dataclass(frozen=True, kw_only=True)
class CropsConfig(CheckedConfig):
    """Multi-crop augmentation: two global crops and `num_local_crops` local ones per image."""

    path: ClassVar[str] = "pretrain.crops"

    num_local_crops: int = number(8, ge=0)
    """Local crops per image (--local_crops_number | crops.local_crops_number)."""
    global_size: int = number(224, ge=1)
    """Pixels per side (- | crops.global_crops_size)."""
    local_size: int = number(96, ge=1)
    """Pixels per side (- | crops.local_crops_size)."""
    global_scale: tuple[float, float] = number((0.4, 1.0), gt=0, le=1)
    """Smallest and largest share of the image's area (--global_crops_scale | crops.global_crops_scale)."""
    local_scale: tuple[float, float] = number((0.05, 0.4), gt=0, le=1)
    """Smallest and largest share of the image's area (--local_crops_scale | crops.local_crops_scale)."""
    flip_prob: float = number(0.5, ge=0, le=1)
    """Probability of a horizontal flip (- | -)."""
    jitter_prob: float = number(0.8, ge=0, le=1)
    """Probability of colour jitter (- | -)."""
    brightness: float = number(0.4, ge=0)
    """Colour jitter: the factor is drawn from [max(0, 1 - x), 1 + x] (- | -)."""
    contrast: float = number(0.4, ge=0)
    """As `brightness` (- | -)."""
    saturation: float = number(0.2, ge=0)
    """As `brightness` (- | -)."""
    hue: float = number(0.1, ge=0, le=0.5)
    """Colour jitter: the shift is drawn from [-x, x] turns of the colour wheel (- | -)."""
    grayscale_prob: float = number(0.2, ge=0, le=1)
    """Probability of dropping the colour (- | -)."""
    blur_prob: tuple[float, float, float] = number((1.0, 0.1, 0.5), ge=0, le=1)
    """Probability of Gaussian blur for the first global, second global and local crops (- | -)."""
    blur_sigma: tuple[float, float] = number((0.1, 2.0), gt=0)
    """Range of the blur's standard deviation, pixels (- | -)."""
    solarize_prob: float = number(0.2, ge=0, le=1)
    """Probability of inverting values of 128 and more, second global crop only (- | -)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Normalisation: mean of red, green, blue on the scale 0 to 1."""
    std: tuple[float, float, float] = number((0.229, 0.224, 0.225), gt=0)
    """Normalisation: standard deviation of red, green, blue on the scale 0 to 1."""
    device: Literal["cpu", "accelerator"] = "cpu"
    """Where colour, blur and solarisation run: in the data tasks, or batched beside the model. Same parameters
    either way."""

    def _problems(self) -> list[str]:
        problems = []
        for name in ("global_scale", "local_scale", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                problems.append(f"{name} = {[low, high]}: the first value must not exceed the second")
        return problems


@dataclass(frozen=True, kw_only=True)
class OptimConfig(CheckedConfig):
    """Optimiser and its schedules: linear warm-up then cosine for lr, cosine for weight decay."""

    path: ClassVar[str] = "pretrain.optim"

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimiser (--optimizer | -)."""
    lr: float = number(5e-4, gt=0)
    """Peak learning rate at `lr_reference_batch_size` images per step (--lr | optim.base_lr)."""
    lr_reference_batch_size: int | None = number(256, ge=1)
    """The peak becomes lr x batch_size / this; None uses `lr` as it is (- | optim.scaling_rule)."""
    min_lr: float = number(1e-6, ge=0)
    """Learning rate that the cosine approaches at the end, not scaled (--min_lr | optim.min_lr)."""
    warmup_epochs: float = number(10.0, ge=0)
    """Linear warm-up from 0 (--warmup_epochs | optim.warmup_epochs)."""
    weight_decay: float = number(0.04, ge=0)
    """At the first step; biases and 1-D parameters have none (--weight_decay | optim.weight_decay)."""
    final_weight_decay: float = number(0.4, ge=0)
    """Approached by a cosine at the end (--weight_decay_end | optim.weight_decay_end)."""
    clip_grad: float | None = number(3.0, gt=0)
    """Largest L2 norm of each parameter's gradient; None does not clip (--clip_grad | optim.clip_grad)."""
    freeze_last_layer_epochs: float = number(1.0, ge=0)
    """Epochs in which the prototypes get no update (--freeze_last_layer | optim.freeze_last_layer_epochs)."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(CheckedConfig):
    """k-NN on the teacher's backbone while training; needs labels and a test split."""

    path: ClassVar[str] = "pretrain.eval"

    every_steps: int | None = number(None, ge=1)
    """Steps between evaluations, besides those before the first and after the last step; None: only those two."""
    knn_k: int = number(20, ge=1)
    """Neighbours that vote."""
    knn_temperature: float = number(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""
    num_gallery: int | None = number(None, ge=1)
    """Training images used as the gallery, a fixed random choice; None uses all."""
    num_queries: int | None = number(None, ge=1)
    """Test images used as queries, a fixed random choice; None uses all."""
    crop_fraction: float = number(0.875, gt=0, le=1)
    """Share of the resized image's side that the centre crop keeps (0.875: resize to 256, crop 224)."""
    batch_size: int = number(256, ge=1)
    """Images per forward pass and worker."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(CheckedConfig):
    """One pre-training run. Batch size is global: the number of workers never changes a number."""

    path: ClassVar[str] = "pretrain"

    seed: int = number(0, ge=0, le=2**32 - 1)
    """Fixes initial weights, order, crops and stochastic depth (--seed | train.seed)."""
    steps: int | None = number(None, ge=1)
    """Length of the run in optimiser steps. Exactly one of `steps` and `epochs` is set (- | -)."""
    epochs: float | None = number(100.0, gt=0)
    """Length of the run in passes over the data (--epochs | optim.epochs)."""
    batch_size: int = number(1024, ge=1)
    """Images per step over all workers (--batch_size_per_gpu x GPUs | train.batch_size_per_gpu x GPUs)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs forward passes under autocast; weights, loss and optimiser stay fp32
    (--use_fp16 | compute_precision)."""
    log_every_steps: int = number(10, ge=1)
    """Steps between logged metrics (- | -)."""
    checkpoint_every_steps: int | None = number(None, ge=1)
    """Steps between checkpoints, besides the one at the end; None: only that one
    (--saveckp_freq | evaluation.eval_period_iterations)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def _problems(self) -> list[str]:
        if (self.steps is None) == (self.epochs is None):
            return [f"steps = {self.steps}, pretrain.epochs = {self.epochs}: set exactly one of the two"]
        return []
