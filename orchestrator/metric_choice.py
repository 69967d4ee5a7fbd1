"""By what trials are compared, and why: k-NN where there are labels, else a score that needs none, never a loss whose
scale the trials themselves change. Imports neither ray nor torch.

`docs/evaluation.md` says what the scores can tell and what was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dino_core.config import ConfigError, IBOTConfig, MaskConfig

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.trials import TrialSummary

Mode = Literal["max", "min"]

KNN = "eval/knn_top1"
RANKME = "eval/rankme"
LIDAR = "eval/lidar"
ALPHA_REQ = "eval/alpha_req"
LABEL_FREE = (RANKME, LIDAR, ALPHA_REQ)
"""Logged at every evaluation, with labels or without."""

_SMALLER_IS_BETTER = frozenset(
    (
        *("train/loss", "train/kl", "train/grad_norm", "train/data_wait_share", "train/center_norm"),
        *("train/class_loss", "train/patch_loss", "train/koleo", "train/patch_kl", "train/patch_center_norm"),
    )
)

_OF_THE_TARGETS = frozenset(
    f"train/{name}"
    for name in (
        *("loss", "kl", "teacher_entropy", "loss_below_uniform", "grad_norm"),
        *("target_std", "prototype_usage", "center_norm", "class_loss", "patch_loss", "koleo", "patch_center_norm"),
        *("patch_kl", "patch_teacher_entropy", "patch_loss_below_uniform", "patch_prototype_usage", "masked_share"),
    )
)
"""What measures the student against its targets, or the targets themselves."""

_MAKE_THE_TARGETS = (
    *(f"pretrain.teacher.{name}" for name in ("temp", "warmup_temp", "warmup_temp_epochs", "sharpening", "centering")),
    *(f"pretrain.teacher.{name}" for name in ("center_momentum", "sinkhorn_iters", "update", "stop_gradient")),
    *("pretrain.student.temp", "pretrain.head.num_prototypes", "pretrain.loss.name", "pretrain.loss.queue_size"),
    *(f"pretrain.loss.{name}" for name in ("weight", "koleo_weight", "koleo_crops", "koleo_group_size")),
    *(f"pretrain.ibot.{item.name}" for item in dataclasses.fields(IBOTConfig)),
    *(f"pretrain.mask.{item.name}" for item in dataclasses.fields(MaskConfig)),
    *(f"pretrain.crops.{name}" for name in ("num_local_crops", "global_size", "local_size", "local_scale")),
)
_MAKE_THE_VIEWS = (
    *("global_scale", "flip_prob", "jitter_prob", "brightness", "contrast", "saturation", "hue", "grayscale_prob"),
    *("blur_prob", "invert_blur_prob", "blur_sigma", "solarize_prob"),
)


@dataclass(frozen=True)
class MetricChoice:
    """What trials are compared by."""

    metric: str
    mode: Mode
    """Whether a larger or a smaller value is better."""
    why: str


def choose_metric(has_labels: bool) -> MetricChoice:
    """The metric of a sweep that names none.

    Args:
        has_labels: whether the source of every trial has labels and a test split.
    """
    if has_labels:
        return MetricChoice(KNN, "max", "there are labels and a test split, and it measures features as they are used")
    return MetricChoice(
        RANKME,
        "max",
        "there are no labels or no test split; it needs none, and unlike the loss its scale does not follow "
        "temperatures, prototypes or crops",
    )


def best_mode(metric: str) -> Mode:
    """Whether a larger or a smaller value of a metric is better."""
    return "min" if metric in _SMALLER_IS_BETTER else "max"


def resolve_metric(metric: str | None, mode: Mode | None, *, has_labels: bool) -> MetricChoice:
    """The choice for `Sweep.metric` and `Sweep.mode`, of which either may be None."""
    choice = (
        choose_metric(has_labels) if metric is None else MetricChoice(metric, best_mode(metric), "it was asked for")
    )
    return replace(choice, mode=mode or choice.mode)


def choice_for_sweep(
    metric: str | None, mode: Mode | None, configs: Iterable[RunConfig], *, has_labels: bool
) -> MetricChoice:
    """As `resolve_metric`, after a look at the trials.

    Raises:
        ConfigError: a trial would not log the metric.
    """
    choice = resolve_metric(metric, mode, has_labels=has_labels)
    problems = dict.fromkeys(line for config in configs for line in _not_logged(choice.metric, config))
    if problems:
        raise ConfigError("\n".join(problems))
    return choice


def _not_logged(metric: str, config: RunConfig) -> list[str]:
    settings = config.pretrain.eval
    reason = f"trials are ranked by {metric}"
    if metric in LABEL_FREE and not settings.num_label_free:
        return [f"pretrain.eval.num_label_free = 0: must be >= 1, {reason}"]
    if metric == LIDAR and not settings.num_lidar_images:
        return [f"pretrain.eval.num_lidar_images = 0: must be >= 1, {reason}"]
    return []


def metric_problems(metric: str | None, mode: Mode | None) -> list[str]:
    """What is wrong with a sweep's metric and mode by themselves, a line each."""
    if metric is None and mode is not None:
        return [f"mode = {mode}: must be none beside sweep.metric = none, which chooses both"]
    if metric == ALPHA_REQ:
        return [
            f"metric = {ALPHA_REQ}: cannot rank, it is best near 1 and neither when large nor when small; "
            f"must be {RANKME} or {LIDAR}, or none to have it chosen"
        ]
    return []


def comparison_problems(metric: str | None, configs: Sequence[RunConfig]) -> list[str]:
    """Why trials of these configurations cannot be ranked by a metric: it would rank the settings' own scale."""
    keys, reason = _scale_of(metric)
    varied = [key for key in keys if len({_value(config, key) for config in configs}) > 1]
    if not varied:
        return []
    return [
        f"sweep.metric = {metric}: cannot compare trials with different {_enumerate(varied)}, which {reason}; must be "
        f"{KNN} or, without labels, {RANKME}, or none to have it chosen"
    ]


def comparison_caution(metric: str, trials: Sequence[TrialSummary]) -> list[str]:
    """The same of recorded trials, for people who ask for such a ranking all the same: a sentence, or nothing."""
    keys, reason = _scale_of(metric)
    varied = [key for key in keys if len({trial.params.get(key) for trial in trials}) > 1]
    if not varied:
        return []
    return [f"Beware: {metric} cannot compare trials with different {_enumerate(varied)}, which {reason}."]


def _scale_of(metric: str | None) -> tuple[tuple[str, ...], str]:
    """The keys whose values move a metric by themselves, and what they do."""
    views = tuple(f"pretrain.crops.{name}" for name in _MAKE_THE_VIEWS)
    if metric in _OF_THE_TARGETS:
        return (*_MAKE_THE_TARGETS, *views), (
            "move the targets that it measures: a smaller value says that they are easier to meet, not that the "
            "features are better"
        )
    if metric == LIDAR:
        return views, "move the views whose spread it measures: milder ones give a higher value to the same features"
    return (), ""


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _enumerate(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def choice_for_trials(trials: Sequence[TrialSummary], definition: Mapping[str, Any] | None = None) -> MetricChoice:
    """What recorded trials are ranked by: the metric of their sweep, else k-NN where any trial has it, else a
    label-free score.

    Args:
        definition: the sweep's (`sweep.json`), if the trials are of one.
    """
    if definition is not None and "metric" in definition:
        metric, mode = definition["metric"], definition["mode"]
        # Sweeps written before there was a choice do not say why.
        return MetricChoice(metric, mode, definition.get("metric_why", "the sweep says so"))
    if not any(KNN in trial.curves for trial in trials) and any(RANKME in trial.curves for trial in trials):
        return choose_metric(has_labels=False)
    return choose_metric(has_labels=True)
