"""What a sweep is: named rows and a design over a space of changes of one configuration, times seeds. No ray, no torch.

`SWEEP = Sweep(base="quickstart", space={"pretrain.teacher.temp": [0.04, 0.07]})` in a Python file is a complete sweep;
`orchestrator.sweep_file` finds it there.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from dino_core.config import CheckedConfig, ConfigError, number
from dino_core.methods import METHODS, changes_of, check_method
from orchestrator.catalog import load_recipe
from orchestrator.config import RunConfig
from orchestrator.designs import (
    DRAWN,
    Design,
    Point,
    design_problems,
    factorial_design,
    factorial_points,
    grid_size,
    one_at_a_time,
    parse_interactions,
    parse_objectives,
    qmc_points,
    random_points,
)
from orchestrator.factorial import Factorial, Resolution
from orchestrator.labels import few, in_trials, label
from orchestrator.metric_choice import LABEL_FREE, comparison_problems, metric_problems
from orchestrator.overrides import (
    ALTERNATIVES,
    Key,
    check_values,
    config_keys,
    did_you_mean,
    flatten,
    merge_changes,
    override,
    show,
)
from orchestrator.population import first_generation, launcher_problems, population_problems, space_problems
from orchestrator.preflight import model_problems
from orchestrator.runs import Trial, check_name
from orchestrator.schedulers import SchedulerName, scheduler_problems
from orchestrator.space import Range, Space, check_space

METRICS = (
    "eval/knn_top1",
    *LABEL_FREE,
    *(f"train/{name}" for name in ("loss", "teacher_entropy", "kl", "grad_norm", "feature_std", "images_per_s")),
    *(f"train/{name}" for name in ("lr", "weight_decay", "teacher_momentum", "teacher_temp", "epoch")),
    *(f"train/{name}" for name in ("feature_rank", "target_std", "loss_below_uniform", "prototype_usage")),
    *(f"train/{name}" for name in ("class_loss", "patch_loss", "koleo", "masked_share", "patch_temp")),
    *(f"train/patch_{name}" for name in ("teacher_entropy", "kl", "prototype_usage", "loss_below_uniform")),
    *("train/center_norm", "train/patch_center_norm", "train/loss_scale", "train/data_wait_share", "cost/device_hours"),
)
"""What a run logs, and so what trials can be compared by."""

PAPER_ONLY = ("eval/linear_top1", "cost/hours", "cost/gpu_memory_gb")
"""What papers give and no run logs yet: linear probe in per cent, time of the whole run, peak memory of one GPU."""

MAX_TRIALS = 10_000
SEED = "pretrain.seed"
UNNAMED = "sweep"

_SHARED = ("cluster.", "tracking.")
"""What all trials of a sweep have in common. It changes no number, so there would be nothing to compare."""
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
    """Every row with every configuration that `design` makes of `space`, each with `seeds` seeds."""

    path: ClassVar[str] = "sweep"

    base: RunConfig | str
    """What all trials start from: a configuration, or a recipe's name."""
    method: str | None = None
    """A method of `dino_core.methods.METHODS` whose changes `base` gets before all others; not beside rows."""
    rows: Mapping[str, Row] = field(default_factory=dict)
    """Named points, each crossed with `space`; a trial's name begins with its row's. What a row sets wins over
    `changes`, and `space` cannot vary it."""
    space: Mapping[str, Sequence[Any] | Range | Mapping[str, Any]] = field(default_factory=dict)
    """What each varied dotted key takes: a list of values, or a range (`orchestrator.space`)."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes of `base` for all trials, by dotted key; refused where every row sets its own. They are checked together
    with those of each trial."""
    design: Design = "grid"
    """Which configurations of the space are tried: all combinations (`grid`), independent draws (`random`), draws that
    fill it evenly (`qmc`), the base and each single change of it (`one_at_a_time`), a balanced part of the combinations
    of two values each (`fractional_factorial`), or what earlier results make promising (`optuna`, by TPE)."""
    num_trials: int | None = number(None, ge=1)
    """random, qmc, optuna: configurations, of each row; every one has `seeds` trials."""
    design_seed: int = number(0, ge=0, le=2**32 - 1)
    """random, qmc, optuna: of the draws. It has no influence on the trials themselves."""
    num_startup_trials: int = number(10, ge=1)
    """optuna: configurations that are drawn at random before results guide the search."""
    resolution: Resolution | None = None
    """fractional_factorial: III keeps main effects apart from one another, IV also from interactions of two keys, V
    those interactions too."""
    interactions: Sequence[tuple[str, str]] = ()
    """fractional_factorial: pairs of varied keys whose interaction is to be kept apart from all main effects and from
    the others named here."""
    conditions: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    """By varied key: the keys that decide whether it varies, each with the values for which it does."""
    objectives: Mapping[str, Literal["max", "min"]] = field(default_factory=dict)
    """optuna: metrics to search by and whether larger or smaller is better; several look for the best trade-offs. None
    here is `metric` alone."""
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
    `brackets`; `pbt` is population-based training (arXiv 1711.09846): each configuration of the design is a member, and
    bad ones go on from the weights of good ones with changed settings."""
    grace_steps: int | None = number(None, ge=1)
    """asha, median, hyperband: steps that every trial gets before it can be stopped."""
    reduction_factor: int = number(4, ge=2)
    """asha, hyperband: one trial in this many goes on, at grace_steps, at grace_steps x reduction_factor, and so on."""
    brackets: int = number(1, ge=1)
    """hyperband: groups that trials are dealt to; each is judged first reduction_factor times later than the one
    before."""
    generation_steps: int | None = number(None, ge=1)
    """pbt: steps after which the members are compared, each time."""
    exploit_quantile: float = number(0.25, gt=0, le=0.5)
    """pbt: share of the members, the last ones, that go on from one of as many first ones."""
    resample_prob: float = number(0.25, ge=0, le=1)
    """pbt: probability with which a setting of theirs is drawn anew instead of moved a little."""
    stop_collapsed: bool = False
    """End a trial when two agreeing signals have said at two logged steps in a row that it has collapsed."""

    @property
    def recipe(self) -> str:
        """Name of the recipe it starts from; `custom` for a configuration of its own."""
        return self.base if isinstance(self.base, str) else "custom"

    def _problems(self) -> list[str]:
        if not isinstance(self.rows, Mapping) or not all(isinstance(row, Row) for row in self.rows.values()):
            return ["rows: must be a mapping from names to Row(method=..., changes={...}, paper={...})"]
        problems = [
            f"{name} = {show(getattr(self, name))}: must be a mapping from dotted keys or metrics"
            for name in ("space", "conditions", "objectives")
            if not isinstance(getattr(self, name), Mapping)
        ]
        if isinstance(self.interactions, str) or not all(map(_is_pair, self.interactions)):
            problems.append(f"interactions = {show(self.interactions)}: must be a list of pairs of dotted keys")
        if problems:
            return problems
        try:
            check_name(self.name)
        except ConfigError as error:
            problems.append(str(error))
        if self.metric is not None and self.metric not in METRICS:
            hint = did_you_mean(self.metric, METRICS)
            problems.append(f"metric = {self.metric}: no run logs it{hint}; must be one of {', '.join(METRICS)}")
        problems += metric_problems(self.metric, self.mode)
        problems += self._design_problems()
        if self.method is not None:
            try:
                check_method(self.method)
            except ConfigError as error:
                problems.append(f"method: {error}")
            if self.rows:
                problems.append(
                    f"method = {self.method}: must be none for a sweep with rows, which say themselves what they are"
                )
        problems += population_problems(self) if self.scheduler == "pbt" else []
        return problems + scheduler_problems(self.scheduler, self.grace_steps, self.brackets)

    def _design_problems(self) -> list[str]:
        problems = design_problems(
            self.design,
            num_trials=self.num_trials,
            resolution=self.resolution,
            interactions=self.interactions,
            objectives=self.objectives,
            rows=self.rows,
        )
        for metric, mode in self.objectives.items():
            if metric not in METRICS:
                problems.append(f"objectives.{metric}: no run logs it{did_you_mean(metric, METRICS)}")
            problems += [f"objectives.{line.removeprefix('metric = ')}" for line in metric_problems(metric, mode)]
            if mode not in ("max", "min"):
                problems.append(f"objectives.{metric} = {show(mode)}: must be max or min")
        if len(self.objectives) > 1 and self.scheduler != "none":
            problems.append(
                f"scheduler = {self.scheduler}: must be none with several sweep.objectives, it stops by one metric"
            )
        return problems


WHOLE = ("conditions", "interactions", "objectives")
CONTENTS = ("base", "rows", "space", "changes", *WHOLE)
"""Fields of `Sweep` that hold more than one value, so that they are no settings of one value each."""

_WRITTEN: Mapping[str, Callable[[str], Any]] = {"objectives": parse_objectives, "interactions": parse_interactions}
"""Those that can be written on the command line."""


def setting_keys() -> dict[str, Key]:
    """The sweep's own settings by dotted key (`sweep.seeds`, ...)."""
    contents = {f"sweep.{name}" for name in CONTENTS}
    return {key: found for key, found in config_keys(Sweep, "sweep.").items() if key not in contents}


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep whose definition is right, with its types: what every trial is made from."""

    sweep: Sweep
    base: RunConfig
    shared: Mapping[str, Any]
    """What method and `changes` set for all trials."""
    rows: Mapping[str, Mapping[str, Any]]
    """What each row sets; one row of no name where there are none."""
    space: Space

    def fixed(self, row: str) -> dict[str, Any]:
        """Every value that the trials of a row have where nothing varies."""
        return merge_changes(flatten(self.base), self.shared, self.rows[row])

    def trial(self, row: str, point: Point, seed_offset: int) -> Trial:
        """One trial. Raises ConfigError if its settings do not go together."""
        changes = {**self.rows[row], **point}
        config = override(self.base, merge_changes(self.shared, changes))
        config = override(config, {SEED: config.pretrain.seed + seed_offset})
        _check_trial(self.sweep, config)
        seed = config.pretrain.seed
        named = self.sweep.rows.get(row, Row(method=self.sweep.method))
        trial_id = "-".join(filter(None, [self.label(row, point), f"s{seed}"]))
        return Trial(trial_id, changes, seed, config, row or None, named.method, dict(named.paper))

    def label(self, row: str, point: Point) -> str:
        """What a configuration is called: its row and its varied values."""
        if self.sweep.design == "one_at_a_time" and not point:
            return "-".join(filter(None, [row, "base"]))
        return label(row, self._names, point)

    @cached_property
    def _names(self) -> dict[str, str]:
        return short_names(list(self.space.values))

    @cached_property
    def factorial(self) -> Factorial | None:
        """The two-level design, if the sweep is one. Raises ConfigError if its space does not suit it."""
        if self.sweep.design != "fractional_factorial":
            return None
        return factorial_design(self.space, self.sweep.resolution, self.sweep.interactions)

    def points(self, row: str) -> list[Point]:
        """The configurations of a row; for optuna those that come before the first result.

        Raises ConfigError: the space does not suit the design, or makes more than `MAX_TRIALS` trials.
        """
        fixed, count, seed = self.fixed(row), self.sweep.num_trials or 0, self.sweep.design_seed
        if self.sweep.design == "random":
            return random_points(self.space, count, seed, fixed)
        if self.sweep.design == "qmc":
            return qmc_points(self.space, count, seed, fixed)
        if self.sweep.design == "one_at_a_time":
            return one_at_a_time(self.space, fixed)
        if self.factorial is not None:
            return factorial_points(self.space, self.factorial)
        if self.sweep.design == "optuna":
            from orchestrator.search import first_points

            return first_points(self)
        return list(self.space.grid(fixed))


def check(sweep: Sweep) -> CheckedSweep:
    """The sweep with its types. Raises ConfigError with all problems but those of single trials."""
    base = load_recipe(sweep.base) if isinstance(sweep.base, str) else sweep.base
    shared, problems = check_values(config_keys(), sweep.changes)
    rows, more = _check_rows(sweep)
    fixed_keys = dict.fromkeys(_SHARED, "is the same for all trials of a sweep and cannot vary")
    if sweep.seeds > 1:
        fixed_keys[SEED] = f"cannot vary while sweep.seeds = {sweep.seeds}; use one of the two"
    space, still_more = check_space(sweep.space, sweep.conditions, fixed_keys)
    problems += [*more, *still_more, *_conflicts(sweep, rows)]
    problems += space_problems(space) if sweep.scheduler == "pbt" else []
    if sweep.design not in DRAWN:
        problems += [
            f"{key} = {values}: is a range, from which sweep.design = {sweep.design} cannot choose; give a list of "
            f"values, or draw from it by sweep.design = {', '.join(DRAWN[:-1])} or {DRAWN[-1]} with sweep.num_trials"
            for key, values in space.values.items()
            if isinstance(values, Range)
        ]
    if sweep.design != "grid" and not sweep.space:
        problems.append(f"sweep.space: varies nothing; sweep.design = {sweep.design} needs keys to vary")
    if problems:
        raise ConfigError("\n".join(problems))
    for method in (sweep.method, *(row.method for row in sweep.rows.values())):
        if method is not None:
            changes_of(method, base.pretrain)
    whole = METHODS[sweep.method] if sweep.method else {}
    checked = CheckedSweep(sweep, base, merge_changes(whole, shared), rows, space)
    per_row = sweep.num_trials or max(grid_size(space, checked.fixed(row), MAX_TRIALS) for row in rows)
    if sweep.design in (*DRAWN, "grid") and len(rows) * per_row * sweep.seeds > MAX_TRIALS:
        where = "sweep.num_trials" if sweep.num_trials else "sweep.space"
        raise ConfigError(f"{where}: makes {len(rows) * per_row * sweep.seeds} trials; must be at most {MAX_TRIALS}")
    return checked


def expand(sweep: Sweep) -> list[Trial]:
    """All trials: every row and configuration with the first seed, then with the second, and so on.

    Of a search (`design = optuna`) and a population (`scheduler = pbt`) those are returned that are known before the
    first result.

    Raises ConfigError with all problems of all trials: unknown keys, wrong values, settings that do not go together,
    more than `MAX_TRIALS` trials.
    """
    checked = check(sweep)
    points = [(row, point) for row in checked.rows for point in checked.points(row)]
    wrong: dict[str, list[str]] = {}
    trials: dict[str, Trial] = {}
    for offset, (row, point) in itertools.product(range(sweep.seeds), points):
        called = checked.label(row, point)
        try:
            trial = checked.trial(row, point, offset)
        except ConfigError as error:
            for line in str(error).splitlines():
                wrong.setdefault(line, []).append(called)
            continue
        if trial.trial_id in trials:
            wrong[f"sweep.rows.{row}: must be called otherwise, two trials would be {trial.trial_id}"] = [called]
        trials[trial.trial_id] = trial
    for metric in dict.fromkeys([sweep.metric, *sweep.objectives]):
        for line in comparison_problems(metric, [trial.config for trial in trials.values()]):
            wrong[line] = list(trials)
    if wrong:
        count = len(points) * sweep.seeds
        raise ConfigError("\n".join(line + in_trials(labels, count) for line, labels in wrong.items()))
    return list(trials.values()) if sweep.scheduler != "pbt" else first_generation(sweep, list(trials.values()))


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(key, str) for key in value)


def _check_trial(sweep: Sweep, config: RunConfig) -> None:
    problems = model_problems(config)
    if config.cluster.launcher == "local":
        problems.append("cluster.launcher = local: is without Ray, which runs a sweep's trials; use trial or train")
    if sweep.scheduler == "pbt":
        problems += launcher_problems(config.cluster.launcher, config.cluster.num_workers)
    by_evaluation = sweep.metric is None or sweep.metric.startswith("eval/")
    if sweep.scheduler not in ("none", "pbt") and by_evaluation and config.pretrain.eval.every_steps is None:
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
    parts = {name: settings.pop(f"sweep.{name}") for name in WHOLE if f"sweep.{name}" in settings}
    parts = {n: _WRITTEN[n](value) if isinstance(value, str) and n in _WRITTEN else value for n, value in parts.items()}
    typed, problems = check_values(setting_keys(), settings)
    if problems:
        raise ConfigError("\n".join(problems))
    own = {key.removeprefix("sweep."): value for key, value in typed.items()} | parts
    rest = {key: value for key, value in assignments.items() if key.split(".")[0] != "sweep"}
    return dataclasses.replace(sweep, changes=merge_changes(sweep.changes, rest), **own)


def with_vary(sweep: Sweep, vary: Mapping[str, Sequence[Any] | Mapping[str, Any]]) -> Sweep:
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
            problems.append(f"{key}: cannot vary, it is set by {'row' if len(setting) == 1 else 'rows'} {few(setting)}")
    return problems


def _sets(changes: Mapping[str, Any], key: str) -> bool:
    return any(rival in changes for rival in _rivals(key))


def _rivals(key: str) -> tuple[str, ...]:
    """The keys that a change of this one would clear, with itself."""
    return ALTERNATIVES if key in ALTERNATIVES else (key,)
