"""By what trials are compared, and why: k-NN where there are labels, else a score that needs none, never a loss whose
scale the trials themselves change. Imports neither ray nor torch.

`docs/evaluation.md` says what the scores can tell and what was measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dino_core.config import ConfigError

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
    ("train/loss", "train/kl", "train/grad_norm", "train/data_wait_share", "train/center_norm")
)

_OF_THE_TARGETS = frozenset(
    f"train/{name}"
    for name in (
        *("loss", "kl", "teacher_entropy", "loss_below_uniform", "grad_norm"),
        *("target_std", "prototype_usage", "center_norm"),
    )
)
"""What measures the student against its targets, or the targets themselves."""

_MAKE_THE_TARGETS = (
    *(f"pretrain.teacher.{name}" for name in ("temp", "warmup_temp", "warmup_temp_epochs", "sharpening", "centering")),
    *(f"pretrain.teacher.{name}" for name in ("center_momentum", "sinkhorn_iters", "update", "stop_gradient")),
    *("pretrain.student.temp", "pretrain.head.num_prototypes", "pretrain.loss.name", "pretrain.loss.queue_size"),
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

    @property
    def sentence(self) -> str:
        """For people, beside every ranking."""
        better = "larger" if self.mode == "max" else "smaller"
        return f"Trials are ranked by {self.metric}, {better} is better: {self.why}."


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
    if metric in _OF_THE_TARGETS:
        keys = (*_MAKE_THE_TARGETS, *(f"pretrain.crops.{name}" for name in _MAKE_THE_VIEWS))
        reason = (
            "makes the targets that it measures: a smaller value says that they are easier to meet, not that the "
            "features are better"
        )
        instead = f"{KNN} or, without labels, {RANKME}"
    elif metric == LIDAR:
        keys = tuple(f"pretrain.crops.{name}" for name in _MAKE_THE_VIEWS)
        reason = "makes the views whose spread it measures: milder ones give a higher value to the same features"
        instead = f"{KNN} or, without labels, {RANKME}"
    else:
        return []
    varied = [key for key in keys if len({_value(config, key) for config in configs}) > 1]
    if not varied:
        return []
    verb = "makes" if len(varied) == 1 else "make"
    return [
        f"sweep.metric = {metric}: cannot compare trials with different {_enumerate(varied)}, which "
        f"{verb}{reason.removeprefix('makes')}; must be {instead}, or none to have it chosen"
    ]


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


@dataclass(frozen=True)
class Agreement:
    """What ranking by a label-free score would have cost, where labels tell."""

    score: str
    picked: str
    """The trial that is best by the score."""
    knn: float
    """Its k-NN top-1, per cent."""
    regret: float
    """How far that is below the best trial's, in points."""
    correlation: float | None
    """Spearman's, between score and k-NN over the trials; None where either is the same in all."""
    num_trials: int

    @property
    def sentence(self) -> str:
        how = "" if self.correlation is None else f", rank correlation {self.correlation:+.2f}"
        return (
            f"By {self.score} alone one would have picked {self.picked}: {self.knn:.1f} % k-NN, {self.regret:.1f} "
            f"below the best{how} over {self.num_trials} trials."
        )


def label_free_agreement(trials: Sequence[TrialSummary]) -> tuple[Agreement, ...]:
    """One for each label-free score that at least three trials have beside k-NN.

    alpha-ReQ picks the trial nearest to 1; its correlation is that of -|alpha - 1|.
    """
    found = []
    for score in LABEL_FREE:
        both = [(trial.name, trial.last(score), trial.last(KNN)) for trial in trials]
        rows = [(name, x, y) for name, x, y in both if x is not None and y is not None]
        rows = [(name, x, y) for name, x, y in rows if math.isfinite(x) and math.isfinite(y)]
        if len(rows) < 3:
            continue
        goodness = [-abs(x - 1) if score == ALPHA_REQ else x for _, x, _ in rows]
        accuracy = [y for _, _, y in rows]
        picked = max(range(len(rows)), key=goodness.__getitem__)
        regret = max(accuracy) - accuracy[picked]
        correlation = spearman(goodness, accuracy)
        found.append(Agreement(score, rows[picked][0], accuracy[picked], regret, correlation, len(rows)))
    return tuple(found)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of the ranks, ties by their mean rank; None where x or y is the same everywhere.

    By hand, since a command that prints a table must not wait for scipy.
    """
    a, b = ([rank - (len(values) + 1) / 2 for rank in _ranks(values)] for values in (x, y))
    scale = math.sqrt(sum(v * v for v in a) * sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b, strict=True)) / scale if scale else None


def _ranks(values: Sequence[float]) -> list[float]:
    ascending = sorted(values)
    return [(1 + bisect_left(ascending, value) + bisect_right(ascending, value)) / 2 for value in values]
