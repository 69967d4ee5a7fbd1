"""`PretrainConfig`: every choice that can change a number of a pre-training run.

Nothing here imports torch, so a configuration can be built, checked and printed at once. The parts are frozen
dataclasses; each field's docstring gives its unit and its names elsewhere as ``(DINO flag | DINOv2 key)``, with ``-``
where there is none. A value out of range raises `ConfigError` when the object is built, naming the dotted key, the
value and what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dino_core.config_checks import CheckedConfig as CheckedConfig
from dino_core.config_checks import ConfigError as ConfigError
from dino_core.config_checks import allowed_range as allowed_range
from dino_core.config_checks import in_range as in_range
from dino_core.config_checks import number as number
from dino_core.config_patches import IBOTConfig as IBOTConfig
from dino_core.config_patches import MaskConfig as MaskConfig
from dino_core.config_problems import combination_problems
from dino_core.config_stages import StageConfig as StageConfig
from dino_core.config_stages import StageCropsConfig as StageCropsConfig
from dino_core.config_stages import StageOptimConfig as StageOptimConfig
from dino_core.config_stages import StageTeacherConfig as StageTeacherConfig
from dino_core.config_stages import stage_problems

Shape = Literal["cosine", "linear", "constant"]
"""How a value goes from that of the first step to its final one over a run; `constant` stays at the former."""


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
    num_register_tokens: int | None = number(None, ge=0)
    """Register tokens of a ViT (- | student.num_register_tokens)."""
    pooling: Literal["token", "avg"] | None = None
    """Features of a ViT: the class token, or the mean of the patches; None keeps the model's own (- | -)."""
    swiglu: bool = False
    """SwiGLU with 2/3 of the hidden width, rounded up to a multiple of 8, in place of a ViT's feed-forward layers
    (- | student.ffn_layer)."""
    layer_scale: float | None = number(None, gt=0)
    """Initial value of LayerScale of a ViT; None keeps the model's own, in most of them none at all
    (- | student.layerscale)."""
    drop_path: float = number(0.1, ge=0, le=0.99)
    """Stochastic depth rate of the last block; student only (--drop_path_rate | student.drop_path_rate)."""
    drop_path_schedule: Literal["linear", "uniform"] = "linear"
    """Over the blocks the rate rises from 0, or is the same in all of them (- | student.drop_path_uniform)."""
    drop_path_mode: Literal["mask", "sub_batch"] = "mask"
    """Each branch is computed for all crops and dropped for some, or, in blocks with a rate above 0.1, computed only
    for an exact number of them: faster and in less memory by that rate (- | always sub_batch)."""
    drop_path_group_size: int | None = number(None, ge=1)
    """sub_batch: that number is exact in each group of this many images that follow each other in the global batch, and
    must divide the images of a worker's pass; DINOv2's code takes those of one GPU. None: the global batch, by one
    worker in one pass (- | -)."""
    packing: bool = False
    """Run global and local crops through a ViT in one pass of their tokens instead of one per size; same numbers to
    rounding (- | always)."""
    activation_checkpointing: bool = False
    """Recompute the student's blocks in the backward pass instead of keeping their activations: less memory, about a
    third more time, the same numbers (- | train.activation_checkpointing)."""
    compile: bool = False
    """Run the backbones through `torch.compile`: faster on GPUs after a long first step; numbers change in the last
    digits (- | train.compile)."""

    def _problems(self) -> list[str]:
        problems = []
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            problems.append(f"embed_dim = {self.embed_dim}: must be a multiple of num_heads = {self.num_heads}")
        if self.drop_path_mode == "sub_batch" and self.drop_path <= 0.1:
            problems.append(
                f"drop_path_mode = sub_batch: must be mask with drop_path = {self.drop_path:g}; it begins above 0.1"
            )
        if self.drop_path_group_size is not None and self.drop_path_mode != "sub_batch":
            problems.append(
                f"drop_path_group_size = {self.drop_path_group_size}: must be none with drop_path_mode = mask, which "
                "draws for each crop alone"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class HeadConfig(CheckedConfig):
    """Projection head: an MLP with an L2-normalised bottleneck, then a weight-normed layer of prototypes.

    Without prototypes the head ends with the bottleneck, as in BYOL, SimSiam, SimCLR and MoCo.
    """

    path: ClassVar[str] = "pretrain.head"

    num_prototypes: int | None = number(65536, ge=2)
    """K, outputs of the last layer; None has no such layer (--out_dim | dino.head_n_prototypes)."""
    num_layers: int = number(3, ge=1)
    """Linear layers of the MLP (- | dino.head_nlayers)."""
    hidden_dim: int = number(2048, ge=1)
    """Width of the hidden layers (- | dino.head_hidden_dim)."""
    bottleneck_dim: int = number(256, ge=1)
    """Width in front of the prototypes or, without them, of the output (- | dino.head_bottleneck_dim)."""
    bottleneck_norm: bool = True
    """L2-normalise the bottleneck (- | -)."""
    norm_last_layer: bool = True
    """Keep the prototypes at unit length; False learns their lengths (--norm_last_layer | -)."""
    batch_norm: bool = False
    """Batch norm after the hidden layers, of which a single layer has none (--use_bn_in_head | -)."""
    output_batch_norm: bool = False
    """Batch norm without scale and shift after the bottleneck, before its L2 norm (- | -)."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Between the layers of head and predictor (- | -)."""


@dataclass(frozen=True, kw_only=True)
class PredictorConfig(CheckedConfig):
    """An MLP on the student's side alone, after the bottleneck (and before the prototypes, which stay a layer of unit
    length on both sides)."""

    path: ClassVar[str] = "pretrain.predictor"

    num_layers: int = number(0, ge=0)
    """Linear layers; 0 has no predictor (- | -)."""
    hidden_dim: int = number(4096, ge=1)
    """Width between them (- | -)."""
    batch_norm: bool = True
    """Batch norm after the hidden layers (- | -)."""


@dataclass(frozen=True, kw_only=True)
class LossConfig(CheckedConfig):
    """What compares student and teacher, over all pairs of different crops of an image."""

    path: ClassVar[str] = "pretrain.loss"

    name: Literal["cross_entropy", "mse", "info_nce"] = "cross_entropy"
    """Cross-entropy of the student's softmax against the teacher's; squared distance of L2-normalised outputs; or the
    teacher's output of the same image told apart from those of others (- | -)."""
    queue_size: int | None = number(None, ge=1)
    """info_nce: the newest this many teacher outputs of earlier steps are the negatives; None takes the other images of
    the global batch (- | -)."""
    weight: float = number(1.0, ge=0)
    """Weight of this loss; 0 leaves the patches' loss alone (--lambda1 | dino.loss_weight)."""
    koleo_weight: float = number(0.0, ge=0)
    """Weight of KoLeo, which spreads the student's features of the global crops, in front of the head
    (- | dino.koleo_loss_weight)."""
    koleo_crops: Literal["both", "first"] = "both"
    """Over the sum of both global crops, each for itself (DINOv2's code), or the first alone (its paper) (- | -)."""
    koleo_group_size: int | None = number(None, ge=2)
    """Neighbours are looked for among this many images that follow each other in the global batch; DINOv2's code looks
    among those of one GPU. None: among all images of the global batch (- | -)."""

    def _problems(self) -> list[str]:
        if self.queue_size is not None and self.name != "info_nce":
            return [f"queue_size = {self.queue_size}: must be none, loss.name = {self.name} has no negatives"]
        return []


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(CheckedConfig):
    """The teacher: where its weights come from, and how its outputs are centred and sharpened."""

    path: ClassVar[str] = "pretrain.teacher"

    checkpoint: str | None = None
    """The folder of a checkpoint, whose teacher with its heads, frozen, gives the targets, as in DINOv2's distillation
    of smaller models; or a run, whose newest is meant. The average of the student's weights is then kept beside, is
    evaluated and exported. None: that average gives the targets (- | -)."""
    update: Literal["ema", "student_copy", "previous_step", "previous_epoch"] = "ema"
    """Where its weights come from after each step: the moving average of the student's, the student's as they are,
    those before the step, or those at the end of the last epoch (- | -)."""
    stop_gradient: bool = True
    """False trains through the teacher's side too, which must be the student itself, as in SimCLR (- | -)."""
    mode: Literal["train", "eval"] = "train"
    """Whether its batch norms use the statistics of the batch or the running ones (- | -)."""
    ema_buffers: bool = False
    """Move its running statistics as its weights instead of by its own forward passes (- | -)."""
    sharpening: Literal["softmax", "argmax", "none"] = "softmax"
    """cross_entropy: targets are the softmax at `temp`, one at the largest and 0 elsewhere (the limit of temperature
    0), or the softmax at the student's temperature (- | -)."""
    temp: float = number(0.04, gt=0)
    """Temperature after the warm-up (--teacher_temp | teacher.teacher_temp)."""
    warmup_temp: float = number(0.04, gt=0)
    """Temperature of the first step (--warmup_teacher_temp | teacher.warmup_teacher_temp)."""
    warmup_temp_epochs: float = number(0.0, ge=0)
    """Epochs over which the temperature goes linearly from one to the other
    (--warmup_teacher_temp_epochs | teacher.warmup_teacher_temp_epochs)."""
    temp_by_epoch: bool = False
    """Hold the temperature within an epoch, as the authors' DINO code does; False moves it every step (- | -)."""
    momentum: float = number(0.996, ge=0, le=1)
    """EMA momentum at the first step (--momentum_teacher | teacher.momentum_teacher)."""
    final_momentum: float = number(1.0, ge=0, le=1)
    """EMA momentum that the schedule approaches at the end (- | teacher.final_momentum_teacher)."""
    momentum_schedule: Shape = "cosine"
    """The way from one to the other over the run; `constant` stays at `momentum` (- | -)."""
    momentum_reference_batch_size: int | None = number(None, ge=1)
    """Use momentum ^ (batch_size / this) at every step, the EMA scaling rule of Busbridge et al. (arXiv 2307.13813);
    None uses the momentum as it is (- | -)."""
    centering: Literal["center", "softmax", "sinkhorn_knopp", "none"] = "center"
    """EMA centre subtracted from the teacher's outputs, softmax over the batch, Sinkhorn-Knopp, or nothing
    (- | train.centering)."""
    sinkhorn_iters: int = number(3, ge=1)
    """Iterations of Sinkhorn-Knopp (- | -)."""
    center_momentum: float = number(0.9, ge=0, le=1)
    """EMA momentum of the centre (- | -)."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(CheckedConfig):
    """The student's side of the loss."""

    path: ClassVar[str] = "pretrain.student"

    temp: float = number(0.1, gt=0)
    """Temperature of the student's softmax or, for info_nce, of that over positive and negatives (- | -)."""


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
    invert_blur_prob: bool = False
    """Blur with 1 - `blur_prob`, as the released code of DINOv2 and DINOv3 does with the printed values (- | -)."""
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
    """Optimiser and its schedules: linear warm-up, then cosine or stable and decay for lr; cosine for weight decay."""

    path: ClassVar[str] = "pretrain.optim"

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimiser (--optimizer | -)."""
    lr: float = number(5e-4, gt=0)
    """Peak learning rate at `lr_reference_batch_size` images per step (--lr | optim.base_lr)."""
    lr_reference_batch_size: int | None = number(256, ge=1)
    """The peak becomes lr x batch_size / this; None uses `lr` as it is (- | optim.scaling_rule)."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """Power of batch_size / lr_reference_batch_size: 1, or 1/2 as in DINOv2 (- | optim.scaling_rule)."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up: a cosine over the whole run, or `wsd`, stable at its peak and then down over the
    last `decay_fraction` of the run by 1 - sqrt (arXiv 2405.18392), so that earlier steps do not depend on the length
    of the run (- | -)."""
    decay_fraction: float = number(0.2, ge=0, le=1)
    """wsd: share of the run's steps in which the learning rate falls (- | -)."""
    min_lr: float = number(1e-6, ge=0)
    """Learning rate that the schedule approaches at the end, not scaled (--min_lr | optim.min_lr)."""
    warmup_epochs: float = number(10.0, ge=0)
    """Linear warm-up from 0 (--warmup_epochs | optim.warmup_epochs)."""
    weight_decay: float = number(0.04, ge=0)
    """At the first step; biases and 1-D parameters have none (--weight_decay | optim.weight_decay)."""
    decay_tokens: bool = True
    """Decay class, register and mask tokens and position embeddings, as both references do (- | -)."""
    final_weight_decay: float = number(0.4, ge=0)
    """Approached at the end (--weight_decay_end | optim.weight_decay_end)."""
    weight_decay_schedule: Shape = "cosine"
    """The way from one to the other over the run; `constant` stays at `weight_decay` (- | -)."""
    clip_grad: float | None = number(3.0, gt=0)
    """Largest L2 norm of a gradient; None does not clip (--clip_grad | optim.clip_grad)."""
    clip_mode: Literal["parameter", "module", "global"] = "parameter"
    """Whose norm that is: each parameter's (DINO), that of backbone, head and predictor each (DINOv2), or that of all
    together (- | -)."""
    layer_decay: float = number(1.0, gt=0, le=1)
    """Learning rate of each block of the backbone as a multiple of the next one's; 1 is the same everywhere
    (- | optim.layerwise_decay)."""
    patch_embed_lr_mult: float = number(1.0, ge=0)
    """Multiple of the learning rate for a ViT's patch embedding (- | optim.patch_embed_lr_mult)."""
    freeze_last_layer_epochs: float = number(1.0, ge=0)
    """Epochs in which the prototypes get no update (--freeze_last_layer | optim.freeze_last_layer_epochs)."""
    freeze_last_layer_by: Literal["gradient", "lr"] = "gradient"
    """Take their gradient away, so that the optimiser does not know them (DINO), or set their learning rate to 0, so
    that its moments run (DINOv2) (- | -)."""
    clip_before_freeze: bool = True
    """Whether the norm that is clipped counts the prototypes' gradient when that is taken away; matters unless
    clip_mode = parameter (- | -)."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(CheckedConfig):
    """Evaluations of the teacher's backbone while training: k-NN where there are labels and a test split, scores that
    need no label, and pictures."""

    path: ClassVar[str] = "pretrain.eval"

    every_steps: int | None = number(None, ge=1)
    """Steps between evaluations, besides those before the first and after the last step; None: only those two."""
    max_share: float | None = number(None, gt=0, le=1)
    """Largest share of the time between those two that other evaluations, pictures included, may take: one that would
    take more is left out. Which ones then depends on the machine's speed, what is trained does not. None: all are
    made."""
    knn_k: int = number(20, ge=1)
    """Neighbours that vote."""
    knn_temperature: float = number(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""
    num_gallery: int | None = number(None, ge=1)
    """Training images used as the gallery, a fixed random choice; None uses all."""
    num_queries: int | None = number(None, ge=1)
    """Test images used as queries, a fixed random choice; None uses all."""
    num_label_free: int = number(2048, ge=0)
    """Training images, at most, for RankMe and alpha-ReQ: the first of the gallery's choice; 0 leaves both and LiDAR
    out."""
    num_lidar_images: int = number(256, ge=0)
    """How many of them, at most, are augmented for LiDAR; 0 leaves it out."""
    num_lidar_views: int = number(8, ge=2)
    """Global crops of each of those, an even number, by the augmentation of `pretrain.crops`."""
    crop_fraction: float = number(0.875, gt=0, le=1)
    """Share of the resized image's side that the centre crop keeps (0.875: resize to 256, crop 224)."""
    batch_size: int = number(256, ge=1)
    """Images per forward pass and worker."""
    num_pictures: int = number(4, ge=0, le=16)
    """Training images that are drawn, a fixed choice: their crops, attention and features; 0 draws nothing."""
    pictures_every_steps: int | None = number(None, ge=1)
    """Steps between evaluations that draw pictures, a multiple of `every_steps`; None: only after the last step."""

    def _problems(self) -> list[str]:
        problems = []
        if 0 < self.num_label_free < self.num_lidar_images:
            problems.append(
                f"num_lidar_images = {self.num_lidar_images}: must be at most pretrain.eval.num_label_free = "
                f"{self.num_label_free}, from whose images they are taken"
            )
        if self.num_lidar_views % 2:
            problems.append(
                f"num_lidar_views = {self.num_lidar_views}: must be even, global crops are made two at a time"
            )
        if self.pictures_every_steps and (self.every_steps is None or self.pictures_every_steps % self.every_steps):
            problems.append(
                f"pictures_every_steps = {self.pictures_every_steps}: must be a multiple of "
                f"pretrain.eval.every_steps = {self.every_steps}; pictures are drawn at evaluations"
            )
        return problems


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
    accumulate_steps: int = number(1, ge=1)
    """Forward and backward passes of the student per step, each over this part of the batch. Targets are made from the
    whole batch, so without batch norm nothing changes but the memory needed (- | -)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run forward passes under autocast; weights, loss and optimiser stay fp32. fp16 scales the loss and
    skips a step whose gradient overflows (--use_fp16 | compute_precision)."""
    parallel_strategy: Literal["ddp", "fsdp"] = "ddp"
    """What each of several workers holds: the whole state, and gradients are averaged (DDP); or a part of every weight,
    gradient, moment and teacher weight, and blocks are gathered while they compute (FSDP2): less memory, more traffic,
    in fp32 the same numbers to rounding; in bf16 and fp16 all of a block is at that precision, its norms and residuals
    too. A resumed run may change it (- | compute_precision.student.backbone.sharding_strategy)."""
    log_every_steps: int = number(10, ge=1)
    """Steps between logged metrics (- | -)."""
    checkpoint_every_steps: int | None = number(None, ge=1)
    """Steps between checkpoints, besides the one at the end; None: only that one
    (--saveckp_freq | evaluation.eval_period_iterations)."""
    stages: tuple[StageConfig, ...] = field(default=(), metadata={"listed": True})
    """Stages that follow the first, which `steps` or `epochs` is the length of (- | -)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    ibot: IBOTConfig = field(default_factory=IBOTConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def _problems(self) -> list[str]:
        problems = []
        if (self.steps is None) == (self.epochs is None):
            problems.append(f"steps = {self.steps}, pretrain.epochs = {self.epochs}: set exactly one of the two")
        if self.batch_size % self.accumulate_steps:
            problems.append(
                f"accumulate_steps = {self.accumulate_steps}: must divide pretrain.batch_size = {self.batch_size}"
            )
        return problems + (combination_problems(self) or stage_problems(self))
