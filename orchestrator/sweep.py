"""What a sweep is: named rows and a grid of changes of one configuration, times seeds. Imports neither ray nor torch.

`SWEEP = Sweep(base="quickstart", space={"pretrain.teacher.temp": [0.04, 0.07]})` in a Python file is a complete sweep;
`orchestrator.sweep_file` finds it there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dino_core.config import CheckedConfig, ConfigError, number
from dino_core.methods import METHODS, changes_of, check_method
from orchestrator.catalog import load_recipe
from orchestrator.config import RunConfig
from orchestrator.metric_choice import LABEL_FREE, comparison_problems, metric_problems
from orchestrator.overrides import (
    ALTERNATIVES,
    Key,
    check_values,
    config_keys,
    did_you_mean,
    merge_changes,
    override,
    show,
    unknown_key,
)
from orchestrator.preflight import model_problems
from orchestrator.runs import Trial, check_name
from orchestrator.schedulers import SchedulerName, scheduler_problems

METRICS = (
    "eval/knn_top1",
    *LABEL_FREE,
    *(f"train/{name}" for name in ("loss", "teacher_entropy", "kl", "grad_norm", "feature_std", "images_per_s")),
    *(f"train/{name}" for name in ("lr", "weight_decay", "teacher_momentum", "teacher_temp", "epoch")),
    *(f"train/{name}" for name in ("feature_rank", "target_std", "loss_below_uniform", "prototype_usage")),
    *("train/center_norm", "train/loss_scale", "train/data_wait_share"),
)
"""What a run logs, and so what trials can be compared by."""

PAPER_ONLY = ("eval/linear_top1", "cost/hours", "cost/gpu_memory_gb")
"""What papers give and no run logs yet: linear probe in per cent, time of the whole run, peak memory of one GPU."""

MAX_TRIALS = 10_000
SEED = "pretrain.seed"
UNNAMED = "sweep"

_SHARED = ("cluster.", "tracking.")
"""What all trials of a sweep have in common. It changes no number, so there would be nothing to compare."""
_MAX_LABEL = 80
_ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A named point of a sweep, such as a row of a paper's table."""

    method: str | None = None
    """A name in `dino_core.methods.METHODS`, whose changes come before `changes`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What sets this row apart, by dotted key."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's numbers for this row, by metric: one of `METRICS` or `PAPER_ONLY`."""


@dataclass(frozen=True, kw_only=True)
class Sweep(CheckedConfig):
    """Every row with every combination of the values in `space`, each with `seeds` seeds."""

    path: ClassVar[str] = "sweep"

    base: RunConfig | str
    """What all trials start from: a configuration, or a recipe's name."""
    method: str | None = None
    """A method of `dino_core.methods.METHODS` whose changes `base` gets before all others; not beside rows."""
    rows: Mapping[str, Row] = field(default_factory=dict)
    """Named points, each crossed with `space`; a trial's name begins with its row's. What a row sets wins over
    `changes`, and `space` cannot vary it."""
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """The values that each varied dotted key takes."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes of `base` for all trials, by dotted key; refused where every row sets its own. They are checked together
    with those of each trial."""
    name: str = UNNAMED
    """Name of the sweep and, where `tracking.experiment` is none, of its MLflow experiment."""
    paper_setting: str = ""
    """What the numbers in `Row.paper` were measured with: data, backbone, epochs. Shown beside them."""
    seeds: int = number(1, ge=1)
    """Trials of each combination: with the seeds of `base`, that + 1, and so on; the same for all combinations."""
    metric: str | None = None
    """What trials are compared by; None: k-NN where there are labels and a test split, else RankMe."""
    mode: Literal["max", "min"] | None = None
    """Whether a larger or a smaller metric is better; None: as the metric says."""
    scheduler: SchedulerName = "none"
    """`none` runs every trial to its end; `asha` stops those that fall behind early (arXiv 1810.05934); `median` those
    whose best value is below the median of the others' means so far (Google Vizier); `hyperband` is `asha` with several
    `brackets`; `pbt` is refused, with the reason."""
    grace_steps: int | None = number(None, ge=1)
    """asha, median, hyperband: steps that every trial gets before it can be stopped."""
    reduction_factor: int = number(4, ge=2)
    """asha, hyperband: one trial in this many goes on, at grace_steps, at grace_steps x reduction_factor, and so on."""
    brackets: int = number(1, ge=1)
    """hyperband: groups that trials are dealt to; each is judged first reduction_factor times later than the one
    before."""
    stop_collapsed: bool = False
    """End a trial when two agreeing signals have said at two logged steps in a row that it has collapsed."""

    @property
    def recipe(self) -> str:
        """Name of the recipe it starts from; `custom` for a configuration of its own."""
        return self.base if isinstance(self.base, str) else "custom"

    def _problems(self) -> list[str]:
        if not isinstance(self.rows, Mapping) or not all(isinstance(row, Row) for row in self.rows.values()):
            return ["rows: must be a mapping from names to Row(method=..., changes={...}, paper={...})"]
        problems = []
        try:
            check_name(self.name)
        except ConfigError as error:
            problems.append(str(error))
        if self.metric is not None and self.metric not in METRICS:
            hint = did_you_mean(self.metric, METRICS)
            problems.append(f"metric = {self.metric}: no run logs it{hint}; must be one of {', '.join(METRICS)}")
        problems += metric_problems(self.metric, self.mode)
        if self.method is not None:
            try:
                check_method(self.method)
            except ConfigError as error:
                problems.append(f"method: {error}")
            if self.rows:
                problems.append(
                    f"method = {self.method}: must be none for a sweep with rows, which say themselves what they are"
                )
        return problems + scheduler_problems(self.scheduler, self.grace_steps, self.brackets)


def setting_keys() -> dict[str, Key]:
    """The sweep's own settings by dotted key (`sweep.seeds`, ...)."""
    contents = ("sweep.base", "sweep.rows", "sweep.space", "sweep.changes")
    return {key: found for key, found in config_keys(Sweep, "sweep.").items() if key not in contents}


def expand(sweep: Sweep) -> list[Trial]:
    """All trials: every row and combination with the first seed, then with the second, and so on.

    Raises ConfigError with all problems of all trials: unknown keys, wrong values, settings that do not go together,
    more than `MAX_TRIALS` trials.
    """
    base = load_recipe(sweep.base) if isinstance(sweep.base, str) else sweep.base
    shared, problems = check_values(config_keys(), sweep.changes)
    rows, more = _check_rows(sweep)
    space, still_more = _check_space(sweep)
    problems += [*more, *still_more, *_conflicts(sweep, rows)]
    count = len(rows) * math.prod(len(values) for values in space.values()) * sweep.seeds
    if not problems and count > MAX_TRIALS:
        problems.append(f"sweep.space: makes {count} trials; must be at most {MAX_TRIALS}")
    if problems:
        raise ConfigError("\n".join(problems))
    for method in (sweep.method, *(row.method for row in sweep.rows.values())):
        if method is not None:
            changes_of(method, base.pretrain)
    whole = METHODS[sweep.method] if sweep.method else {}
    names = short_names(list(space))
    wrong: dict[str, list[str]] = {}
    trials: dict[str, Trial] = {}
    points = itertools.product(rows, itertools.product(*space.values()))
    for offset, (row, values) in itertools.product(range(sweep.seeds), points):
        varied = dict(zip(space, values, strict=True))
        changes = rows[row] | varied
        label = _label(row, names, varied)
        try:
            config = override(base, merge_changes(whole, shared, changes))
            config = override(config, {SEED: config.pretrain.seed + offset})
            _check_trial(sweep, config)
        except ConfigError as error:
            for line in str(error).splitlines():
                wrong.setdefault(line, []).append(label)
            continue
        seed = config.pretrain.seed
        trial_id = "-".join(filter(None, [label, f"s{seed}"]))
        if trial_id in trials:
            wrong[f"sweep.rows.{row}: must be called otherwise, two trials would be {trial_id}"] = [label]
        named = sweep.rows.get(row, Row(method=sweep.method))
        trials[trial_id] = Trial(trial_id, changes, seed, config, row or None, named.method, dict(named.paper))
    for line in comparison_problems(sweep.metric, [trial.config for trial in trials.values()]):
        wrong[line] = list(trials)
    if wrong:
        raise ConfigError("\n".join(line + _in_trials(labels, count) for line, labels in wrong.items()))
    return list(trials.values())


def _check_trial(sweep: Sweep, config: RunConfig) -> None:
    problems = model_problems(config)
    if config.cluster.launcher == "local":
        problems.append("cluster.launcher = local: is without Ray, which runs a sweep's trials; use trial or train")
    by_evaluation = sweep.metric is None or sweep.metric.startswith("eval/")
    if sweep.scheduler != "none" and by_evaluation and config.pretrain.eval.every_steps is None:
        problems.append(
            f"pretrain.eval.every_steps = None: must be a whole number >= 1 when sweep.scheduler = {sweep.scheduler}, "
            f"which judges trials by {sweep.metric or 'an evaluation'} while they run"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def with_settings(sweep: Sweep, assignments: Mapping[str, Any]) -> Sweep:
    """The sweep after changes by dotted key: `sweep.*` its own settings, all others for all its trials.

    Raises ConfigError; keys of the trials are only checked by `expand`.
    """
    settings = {key: value for key, value in assignments.items() if key.split(".")[0] == "sweep"}
    typed, problems = check_values(setting_keys(), settings)
    if problems:
        raise ConfigError("\n".join(problems))
    own = {key.removeprefix("sweep."): value for key, value in typed.items()}
    rest = {key: value for key, value in assignments.items() if key not in settings}
    return dataclasses.replace(sweep, changes=merge_changes(sweep.changes, rest), **own)


def with_vary(sweep: Sweep, vary: Mapping[str, Sequence[Any]]) -> Sweep:
    """The sweep with more varied keys; those that it varies or sets already take the new values."""
    given = {rival for key in vary for rival in _rivals(key)}
    space = {key: values for key, values in sweep.space.items() if key not in given or key in vary}
    changes = {key: value for key, value in sweep.changes.items() if key not in given}
    return dataclasses.replace(sweep, space={**space, **vary}, changes=changes)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other has: `temp`, or `teacher.temp` beside `student.temp`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [other for other in keys if other != key]
        names[key] = next((e for e in ends if not any(f".{other}".endswith(f".{e}") for other in others)), key)
    return names


def _check_space(sweep: Sweep) -> tuple[dict[str, list[Any]], list[str]]:
    """The varied values with their types, and what is wrong with them."""
    known = config_keys()
    space: dict[str, list[Any]] = {}
    problems = []
    for key, values in sweep.space.items():
        if key not in known:
            problems.append(unknown_key(key, known))
        elif isinstance(values, str) or not isinstance(values, Sequence) or not values:
            problems.append(f"{key} = {show(values)}: must be a list of values to vary, such as [1, 2]")
        elif key.startswith(_SHARED):
            problems.append(f"{key}: is the same for all trials of a sweep and cannot vary")
        elif key == SEED and sweep.seeds > 1:
            problems.append(f"{key}: cannot vary while sweep.seeds = {sweep.seeds}; use one of the two")
        else:
            space[key] = []
            for value in values:
                typed, lines = check_values(known, {key: value})
                problems += lines
                if key in typed and typed[key] in space[key]:
                    problems.append(f"{key} = {show(value)}: given twice among the values to vary")
                space[key] += typed.values()
    return space, problems


def _check_rows(sweep: Sweep) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What each row sets, with types, and what is wrong with the rows; one row of no name where there are none."""
    if not sweep.rows:
        return {"": {}}, []
    rows: dict[str, dict[str, Any]] = {}
    problems = []
    for name, row in sweep.rows.items():
        rows[name], lines = _check_row(name, row, sweep.seeds)
        problems += [f"sweep.rows.{name}: {line}" for line in lines]
    return rows, problems


def _check_row(name: str, row: Row, seeds: int) -> tuple[dict[str, Any], list[str]]:
    problems = []
    if not _ROW_NAME.fullmatch(name):
        problems.append("must be called by 1 to 40 letters, digits, '.', '_' or '-', and open with no mark")
    method: Mapping[str, Any] = {}
    try:
        if row.method is not None:
            check_method(row.method)
            method = METHODS[row.method]
    except ConfigError as error:
        problems.append(str(error))
    typed, lines = check_values(config_keys(), row.changes)
    problems += lines
    for key in typed:
        if key.startswith(_SHARED):
            problems.append(f"{key}: is the same for all trials of a sweep and cannot be set by a row")
        elif key == SEED and seeds > 1:
            problems.append(f"{key}: cannot be set by a row while sweep.seeds = {seeds}; use one of the two")
    for metric, value in row.paper.items():
        if metric not in (*METRICS, *PAPER_ONLY):
            problems.append(f"paper {metric}: unknown metric{did_you_mean(metric, (*METRICS, *PAPER_ONLY))}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            problems.append(f"paper {metric} = {show(value)}: must be a number")
    return merge_changes(method, typed), problems


def _conflicts(sweep: Sweep, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys for which more than one value is asked for, so that one would be without effect."""
    problems = []
    for key, value in sweep.changes.items():
        for varied in (rival for rival in _rivals(key) if rival in sweep.space):
            problems.append(f"{key} = {show(value)}: the sweep varies {varied}; choose its values by --vary")
        if all(_sets(changes, key) for changes in rows.values()):
            problems.append(f"{key} = {show(value)}: every row of the sweep sets its own")
    for key in sweep.space:
        setting = [name for name, changes in rows.items() if _sets(changes, key)]
        if setting:
            problems.append(
                f"{key}: cannot vary, it is set by {'row' if len(setting) == 1 else 'rows'} {_few(setting)}"
            )
    return problems


def _sets(changes: Mapping[str, Any], key: str) -> bool:
    return any(rival in changes for rival in _rivals(key))


def _rivals(key: str) -> tuple[str, ...]:
    """The keys that a change of this one would clear, with itself."""
    return ALTERNATIVES if key in ALTERNATIVES else (key,)


def _label(row: str, names: Mapping[str, str], varied: Mapping[str, Any]) -> str:
    """Row and varied values as a part of a file name. What it cannot spell is told apart by eight digits of a hash."""
    exact = "-".join(filter(None, [row, *(f"{names[key]}_{_text(value)}" for key, value in varied.items())]))
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", exact)
    if label == exact and len(label) <= _MAX_LABEL:
        return label
    return f"{label[: _MAX_LABEL - 9].rstrip('-')}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "_".join(map(str, value))
    return "none" if value is None else str(value)


def _in_trials(labels: Sequence[str], count: int) -> str:
    """Which trials a problem is about; nothing where it is all of them."""
    if len(labels) == count:
        return ""
    return f" ({_few(list(dict.fromkeys(labels)))})"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
