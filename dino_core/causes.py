"""Which setting is the likely cause of a collapse: a table of conditions and words, most specific first. No torch here.

Percentages are top-1 accuracies on ImageNet in the tables and figures of DINO (arXiv 2104.14294); 0.1 % is chance.
"""

from __future__ import annotations

from collections.abc import Callable

from dino_core.config import PretrainConfig

UNSTABLE_TEMP_RATIO = 0.75
"""Teacher temperature as a share of the student's above which the targets are hardly sharper than what they teach. With
0.1 for the student, 0.06 and a rise to 0.07 train and 0.08 collapses (DINO, appendix)."""
SLOW_CENTER_MOMENTUM = 0.999
"""DINO, appendix: 69.4 % at 0.99, 0.1 % at 0.999."""
HIGH_ADAMW_LR = 5e-3
"""Peak learning rate of AdamW beyond which warm-up and clipping do not help. DINO's largest is 2e-3, at 1024 images."""
LOW_MOMENTUM = 0.9
"""Teacher momentum below which it is nearly a copy of the student."""

Condition = Callable[[PretrainConfig], bool]


def likely_cause(verdict: str, config: PretrainConfig) -> str:
    """The first cause in the table of the verdict that the configuration meets, in words; "" if it is no collapse."""
    for condition, words in _CAUSES.get(verdict, ()):
        if condition(config):
            return words.format(c=config, peak_lr=_peak_lr(config))
    return ""


def _peak_lr(config: PretrainConfig) -> float:
    optim = config.optim
    ratio = config.batch_size / (optim.lr_reference_batch_size or config.batch_size)
    return optim.lr * (ratio if optim.lr_scaling == "linear" else ratio**0.5)


def _uses_prototypes(c: PretrainConfig) -> bool:
    return c.loss.name == "cross_entropy"


def _copies_student(c: PretrainConfig) -> bool:
    return c.teacher.update in ("student_copy", "previous_step")


def _balances_batch(c: PretrainConfig) -> bool:
    return c.teacher.centering in ("softmax", "sinkhorn_knopp")


def _has_batch_norm(c: PretrainConfig) -> bool:
    return (c.head.batch_norm and c.head.num_layers > 1) or c.head.output_batch_norm


_COPY = (
    lambda c: _copies_student(c) and not _balances_batch(c) and _uses_prototypes(c),
    "the student's weights as teacher without Sinkhorn-Knopp or a softmax over the batch (pretrain.teacher.update = "
    "{c.teacher.update}, pretrain.teacher.centering = {c.teacher.centering}; 0.1 % in the paper, 71.8 % and 72.2 % "
    "with them): try pretrain.teacher.update=ema, or pretrain.teacher.centering=sinkhorn_knopp",
)
_SLOW_CENTER = (
    lambda c: c.teacher.centering == "center" and c.teacher.center_momentum >= SLOW_CENTER_MOMENTUM,
    "the centre follows too slowly (pretrain.teacher.center_momentum = {c.teacher.center_momentum:g}; 0.1 % at 0.999 "
    "in the paper, 69.7 % at 0.9): try pretrain.teacher.center_momentum=0.9",
)
_FAST_TEACHER = (
    lambda c: c.teacher.update == "ema" and c.teacher.momentum < LOW_MOMENTUM and not _balances_batch(c),
    "the teacher is nearly the student (pretrain.teacher.momentum = {c.teacher.momentum:g}; a copy of the student gave "
    "0.1 % in the paper): try pretrain.teacher.momentum=0.996",
)
_NO_BOTTLENECK_NORM = (
    lambda c: not c.head.bottleneck_norm and c.head.num_layers >= 3 and _uses_prototypes(c),
    "a deep head without the L2-normalised bottleneck (pretrain.head.bottleneck_norm = false, "
    "pretrain.head.num_layers = {c.head.num_layers}; 0.1 % in the paper with 3 or 4 layers): try "
    "pretrain.head.bottleneck_norm=true",
)
_HIGH_LR = (
    lambda c: c.optim.name == "adamw" and _peak_lr(c) > HIGH_ADAMW_LR,
    "a learning rate too high for AdamW (pretrain.optim.lr = {c.optim.lr:g}, {peak_lr:g} at its peak; the paper's "
    "largest is 0.002): try a tenth of it",
)
_NO_BATCH_NORM = (
    lambda c: not _has_batch_norm(c),
    "the head has no batch norm, without which a small network may give all images the same output "
    "(pretrain.head.batch_norm = false): try true or, for a large network, a lower pretrain.optim.lr (now "
    "{c.optim.lr:g})",
)
_NO_WARMUP = (
    lambda c: c.optim.warmup_epochs == 0,
    "no warm-up of the learning rate (pretrain.optim.warmup_epochs = 0, pretrain.optim.lr = {c.optim.lr:g}): try "
    "pretrain.optim.warmup_epochs=10 or, in a short run, a tenth of its epochs",
)

_UNIFORM = (
    _COPY,
    (
        lambda c: _uses_prototypes(c) and c.teacher.sharpening == "none",
        "no sharpening (pretrain.teacher.sharpening = none): the centre alone pulls all targets to uniform; try "
        "pretrain.teacher.sharpening=softmax with pretrain.teacher.temp=0.04",
    ),
    (
        lambda c: _uses_prototypes(c) and c.teacher.sharpening == "softmax" and c.teacher.temp >= c.student.temp,
        "no sharpening (pretrain.teacher.temp = {c.teacher.temp:g} is not below pretrain.student.temp = "
        "{c.student.temp:g}): try pretrain.teacher.temp=0.04 with pretrain.student.temp=0.1",
    ),
    (
        lambda c: (
            _uses_prototypes(c)
            and c.teacher.sharpening == "softmax"
            and max(c.teacher.temp, c.teacher.warmup_temp) > UNSTABLE_TEMP_RATIO * c.student.temp
        ),
        "too little sharpening (pretrain.teacher.temp = {c.teacher.temp:g} after {c.teacher.warmup_temp_epochs:g} "
        "epochs from pretrain.teacher.warmup_temp = {c.teacher.warmup_temp:g}, against pretrain.student.temp = "
        "{c.student.temp:g}; the paper's own run collapses at 0.08 against 0.1): try 0.04, or a warm-up from 0.04 to "
        "0.07 over pretrain.teacher.warmup_temp_epochs=30",
    ),
    _SLOW_CENTER,
    _NO_BOTTLENECK_NORM,
    (
        lambda c: c.loss.name == "mse" and c.predictor.num_layers == 0 and c.teacher.centering == "none",
        "nothing keeps both sides from agreeing on a constant (pretrain.loss.name = mse, "
        "pretrain.predictor.num_layers = 0, pretrain.teacher.centering = none; 0.1 % in the paper even with batch norm "
        "in the head, 71.4 % with a predictor too): try pretrain.predictor.num_layers=2 with "
        "pretrain.head.batch_norm=true",
    ),
    (
        lambda c: (
            c.loss.name == "mse" and not (c.predictor.num_layers and c.predictor.batch_norm) and not _has_batch_norm(c)
        ),
        "mean squared error without batch norm (pretrain.head.batch_norm = false, pretrain.predictor.num_layers = "
        "{c.predictor.num_layers}): try pretrain.head.batch_norm=true and pretrain.predictor.batch_norm=true",
    ),
    (
        lambda c: c.loss.name == "info_nce" and c.student.temp > 0.5,
        "a temperature too high to tell images apart (pretrain.student.temp = {c.student.temp:g}): try 0.1 or 0.2",
    ),
    _FAST_TEACHER,
    _HIGH_LR,
    _NO_BATCH_NORM,
    _NO_WARMUP,
    (
        lambda c: True,
        "no setting is far from the paper's; try a lower pretrain.optim.lr (now {c.optim.lr:g}) or "
        "pretrain.teacher.temp (now {c.teacher.temp:g})",
    ),
)

_ONE_HOT = (
    _COPY,
    (
        lambda c: c.teacher.centering == "none",
        "no centring (pretrain.teacher.centering = none): one prototype wins every image; try "
        "pretrain.teacher.centering=center or sinkhorn_knopp",
    ),
    _SLOW_CENTER,
    _NO_BOTTLENECK_NORM,
    _FAST_TEACHER,
    _HIGH_LR,
    (
        lambda c: True,
        "the centre does not hold against the sharpening (pretrain.teacher.temp = {c.teacher.temp:g}, "
        "pretrain.teacher.centering = {c.teacher.centering}): try a higher temperature, or "
        "pretrain.teacher.centering=sinkhorn_knopp",
    ),
)

_DIMENSIONAL = (
    _COPY,
    _HIGH_LR,
    _FAST_TEACHER,
    (
        lambda c: c.loss.name == "info_nce" and c.student.temp > 0.5,
        "a temperature too high to tell similar images apart (pretrain.student.temp = {c.student.temp:g}): try 0.1 or "
        "0.2",
    ),
    _NO_BATCH_NORM,
    _NO_WARMUP,
    (
        lambda c: True,
        "the task is solved with few directions: try stronger crops (pretrain.crops.global_scale = "
        "{c.crops.global_scale[0]:g} to {c.crops.global_scale[1]:g}, pretrain.crops.num_local_crops = "
        "{c.crops.num_local_crops}) or a lower pretrain.optim.lr (now {c.optim.lr:g})",
    ),
)

_DIVERGED = (
    (
        lambda c: c.precision == "fp16",
        "half precision (pretrain.precision = fp16) ends at 65504: try pretrain.precision=bf16 or fp32",
    ),
    _HIGH_LR,
    (
        lambda c: c.optim.clip_grad is None,
        "gradients are not clipped (pretrain.optim.clip_grad = none): try pretrain.optim.clip_grad=3.0",
    ),
    _NO_BOTTLENECK_NORM,
    _NO_WARMUP,
    (
        lambda c: c.optim.freeze_last_layer_epochs == 0 and _uses_prototypes(c),
        "the prototypes move from the first step (pretrain.optim.freeze_last_layer_epochs = 0): try 1",
    ),
    (
        lambda c: not c.head.norm_last_layer and _uses_prototypes(c),
        "the lengths of the prototypes are learned (pretrain.head.norm_last_layer = false): try true",
    ),
    (
        lambda c: True,
        "no setting stands out: try a lower pretrain.optim.lr (now {c.optim.lr:g}) and pretrain.optim.clip_grad (now "
        "{c.optim.clip_grad:g})",
    ),
)

_CAUSES: dict[str, tuple[tuple[Condition, str], ...]] = {
    "uniform collapse": _UNIFORM,
    "one-hot collapse": _ONE_HOT,
    "dimensional collapse": _DIMENSIONAL,
    "diverged": _DIVERGED,
}
