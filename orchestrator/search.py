"""Adaptive search: which configuration to try next, given what became of the earlier ones. Imports no ray.

`suggest` is a function of the space, the design's seed and the history alone: the study of Optuna is made anew from the
history each time, and the sampler's seed follows from the number of the suggestion. So the records on disk are all that
a search is, and a resumed one goes on as it would have. TPE: Bergstra et al. (2011); with several objectives: Ozaki et
al. (2022).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dino_core.config import ConfigError
from orchestrator.designs import Point
from orchestrator.metric_choice import MetricChoice, Mode
from orchestrator.overrides import check_values, config_keys
from orchestrator.records import TRIALS_DIR, AppendOnly, RunRecord, RunState, read_curves, read_lines, read_states
from orchestrator.runs import Trial
from orchestrator.space import IntUniform, LogUniform, Space, Values

if TYPE_CHECKING:
    import optuna

    from orchestrator.sweep import CheckedSweep

SEARCH_FILE = "search.jsonl"
"""Every suggestion of a sweep's search, in order; appended before its trials are written."""

MAX_REFUSED = 100
"""Suggestions in a row that repeat an earlier one or make no sense, after which a search ends."""

Outcome = Literal["open", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Asked:
    """A suggestion and what became of it."""

    point: Point
    trials: tuple[str, ...] = ()
    """Ids of its trials, one per seed; none if it was refused."""
    refused: str = ""
    """Why it was not tried."""
    outcome: Outcome = "open"
    values: tuple[float, ...] = ()
    """By objective, the mean over its seeds of the last value; of those that are finished or stopped."""


def suggest(
    space: Space,
    fixed: Mapping[str, Any],
    modes: Sequence[Mode],
    history: Sequence[Asked],
    *,
    seed: int,
    num_startup: int,
) -> Point:
    """The next configuration.

    Args:
        space: What varies; keys under a condition are asked for only where they vary.
        fixed: Values of the other keys, by which conditions may decide.
        modes: Of each objective.
        history: All earlier suggestions, in order.
        seed: The design's.
        num_startup: Configurations with results before they guide the search; until then it draws at random.
    """
    import numpy as np
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    maximize, minimize = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
    directions = [maximize if mode == "max" else minimize for mode in modes]
    own_seed = int(np.random.SeedSequence([seed, len(history)]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=own_seed, n_startup_trials=num_startup)
    study = optuna.create_study(directions=directions, sampler=sampler)
    for asked in history:
        study.add_trial(_frozen(space, asked, len(modes)))
    trial = study.ask()

    def choose(key: str, values: Values) -> Any:
        if isinstance(values, list):
            return values[trial.suggest_categorical(key, range(len(values)))]
        if isinstance(values, IntUniform):
            return trial.suggest_int(key, values.low, values.high, log=values.log, step=values.step)
        return values.rounded(trial.suggest_float(key, values.low, values.high, log=isinstance(values, LogUniform)))

    return space.pick(choose, fixed)


def _frozen(space: Space, asked: Asked, num_objectives: int) -> optuna.trial.FrozenTrial:
    """A suggestion as Optuna knows it. A failed one has no value: it is no bad score, and teaches nothing."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    params: dict[str, Any] = {}
    distributions: dict[str, Any] = {}
    for key, value in asked.point.items():
        values = space.values[key]
        if isinstance(values, list):
            params[key], distributions[key] = values.index(value), CategoricalDistribution(range(len(values)))
        elif isinstance(values, IntUniform):
            distributions[key] = IntDistribution(values.low, values.high, log=values.log, step=values.step)
            params[key] = value
        else:
            distributions[key] = FloatDistribution(values.low, values.high, log=isinstance(values, LogUniform))
            params[key] = value
    known: dict[str, Any] = {}
    if asked.refused or asked.outcome == "failed":
        known["state"] = TrialState.FAIL
    elif asked.outcome == "open":
        known["state"] = TrialState.RUNNING
    elif asked.outcome == "stopped" and num_objectives == 1:  # ranked behind all that ran to their end
        known |= {"state": TrialState.PRUNED, "intermediate_values": {0: asked.values[0]}, "value": asked.values[0]}
    else:
        known |= {"state": TrialState.COMPLETE, "values": list(asked.values)}
    return create_trial(params=params, distributions=distributions, **known)


def propose(checked: CheckedSweep, modes: Sequence[Mode], history: Sequence[Asked]) -> tuple[Asked, list[Trial]]:
    """The next suggestion of a sweep, and its trials: none where it was refused."""
    sweep = checked.sweep
    (row,) = checked.rows
    point = suggest(
        checked.space,
        checked.fixed(row),
        modes,
        history,
        seed=sweep.design_seed,
        num_startup=sweep.num_startup_trials,
    )
    if any(asked.point == point for asked in history):
        return Asked(point, refused="was suggested before"), []
    try:
        trials = [checked.trial(row, point, offset) for offset in range(sweep.seeds)]
    except ConfigError as error:
        return Asked(point, refused=str(error)), []
    return Asked(point, tuple(trial.trial_id for trial in trials)), trials


def first_suggestions(checked: CheckedSweep, modes: Sequence[Mode]) -> list[Asked]:
    """What a search tries before its first result, the refused ones included."""
    count = min(checked.sweep.num_trials or 0, checked.sweep.num_startup_trials)
    history: list[Asked] = []
    while _num_tried(history) < count and not is_exhausted(history):
        history.append(propose(checked, modes, history)[0])
    if not _num_tried(history):
        raise ConfigError(f"sweep.space: no suggestion out of {len(history)} could be tried\n{history[-1].refused}")
    return history


def first_points(checked: CheckedSweep) -> list[Point]:
    """The configurations that a search tries before its first result."""
    modes: list[Mode] = list(checked.sweep.objectives.values()) or ["max"]  # which, makes no difference yet
    return [asked.point for asked in first_suggestions(checked, modes) if not asked.refused]


def objectives_of(objectives: Mapping[str, Mode], choice: MetricChoice) -> dict[str, Mode]:
    """The metrics that a sweep searches by: `Sweep.objectives`, or the one that its trials are compared by."""
    return dict(objectives) or {choice.metric: choice.mode}


def is_exhausted(history: Sequence[Asked]) -> bool:
    """Whether the last suggestions were all refused, so that the next would most likely be too."""
    return len(history) >= MAX_REFUSED and all(asked.refused for asked in history[-MAX_REFUSED:])


def _num_tried(history: Sequence[Asked]) -> int:
    return sum(not asked.refused for asked in history)


@dataclass
class Search:
    """The search of a sweep in its folder: the records there are its state."""

    checked: CheckedSweep
    folder: Path
    objectives: dict[str, Mode]
    prepare: Callable[[Trial], RunRecord]
    """The record of a new trial. Raises ConfigError if it cannot run."""
    unit: ClassVar[str] = "configurations to be searched for"
    """What `left` counts."""
    _ended: dict[int, Asked] = field(default_factory=dict)
    """By number, suggestions whose outcome stands."""

    def history(self) -> list[Asked]:
        """All suggestions with what became of them, from the records on disk."""
        states = read_states(self.folder)
        history = []
        for number, (_, line) in enumerate(read_lines(self.folder / SEARCH_FILE)):
            if number not in self._ended:
                asked = _read(line)
                asked = asked if asked.refused else outcome_of(asked, self.folder, list(self.objectives), states)
                if asked.refused or asked.outcome in ("finished", "stopped"):
                    self._ended[number] = asked
                history.append(asked)
            else:
                history.append(self._ended[number])
        return history

    def begin(self, asked: Sequence[Asked]) -> None:
        """Write down what was suggested before the first result."""
        self._append(asked)

    def ask(self) -> list[tuple[Trial, RunRecord]]:
        """The trials of the next configuration with their records, noted but not yet written; none at the end.

        What is noted is tried: `lost` finds it where the driver died before it had written the records.
        """
        history = self.history()
        while _num_tried(history) < (self.checked.sweep.num_trials or 0) and not is_exhausted(history):
            asked, trials = propose(self.checked, list(self.objectives.values()), history)
            try:
                records = [self.prepare(trial) for trial in trials]
            except ConfigError as error:
                asked, trials, records = Asked(asked.point, refused=str(error)), [], []
            self._append([asked])
            if trials:
                return list(zip(trials, records, strict=True))
            history.append(asked)
        return []

    def lost(self, known: Collection[str]) -> list[tuple[Trial, RunRecord]]:
        """Trials that were noted and are not among the `known` ids, with their records."""
        (row,) = self.checked.rows
        found = []
        for asked in self.history():
            for offset, trial_id in enumerate(asked.trials):
                if trial_id not in known:
                    trial = self.checked.trial(row, asked.point, offset)
                    found.append((trial, self.prepare(trial)))
        return found

    def left(self) -> int:
        """How many configurations are still to be suggested."""
        return max(0, (self.checked.sweep.num_trials or 0) - _num_tried(self.history()))

    def describe(self) -> str:
        """What was suggested and refused, in a line."""
        history = self.history()
        refused = [asked.refused for asked in history if asked.refused]
        text = f"search: {len(history) - len(refused)} configurations"
        return text + (
            f", {len(refused)} suggestions refused, the last: {refused[-1].splitlines()[0]}" if refused else ""
        )

    def _append(self, asked: Sequence[Asked]) -> None:
        file = AppendOnly(self.folder / SEARCH_FILE)
        for one in asked:
            file.append({k: v for k, v in asdict(one).items() if k in ("point", "trials", "refused")}, durable=True)
        file.close()


def _read(line: Mapping[str, Any]) -> Asked:
    typed, problems = check_values(config_keys(), line["point"])
    if problems:
        raise ConfigError("\n".join(f"{SEARCH_FILE}: {problem}" for problem in problems))
    return Asked(typed, tuple(line["trials"]), line["refused"])


def outcome_of(asked: Asked, folder: Path, metrics: Sequence[str], states: Mapping[str, RunState]) -> Asked:
    """A suggestion with what became of it: its values are the means over its seeds.

    It failed if one of its trials did, or has no value: the mean of the others would favour what sometimes fails. It
    was stopped if one of them was ended early.
    """
    events = [states.get(f"{folder.name}.{trial}") for trial in asked.trials]
    if any(state is not None and state.event == "failed" for state in events):
        return Asked(asked.point, asked.trials, outcome="failed")
    if not all(state is not None and state.event in ("finished", "stopped") for state in events):
        return Asked(asked.point, asked.trials)
    curves = [read_curves(folder / TRIALS_DIR / trial) for trial in asked.trials]
    if not all(curve.get(metric) and math.isfinite(curve[metric][-1][1]) for curve in curves for metric in metrics):
        return Asked(asked.point, asked.trials, outcome="failed")
    stopped = any(state is not None and state.event == "stopped" for state in events)
    values = tuple(statistics.fmean(curve[metric][-1][1] for curve in curves) for metric in metrics)
    return Asked(asked.point, asked.trials, outcome="stopped" if stopped else "finished", values=values)
