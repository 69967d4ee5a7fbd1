"""Comparison of trials: which differences are worth looking at.

`compare` ranks trials (`orchestrator.trials`); `orchestrator.tables` writes the result.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.trials import KNN_METRIC as KNN_METRIC
from orchestrator.trials import SEED_KEY, CompareError, Mode, TrialSummary

T = TypeVar("T")

ROW = "row"
"""Stands in place of all keys that a sweep's rows set."""
_UNSEEN_PREFIXES = ("tracking.", "derived/", "paper/")
_UNSEEN_KEYS = frozenset(
    f"cluster.{name}"
    for name in ("address", "keep_checkpoints", "max_concurrent_trials", "max_failures", "start_timeout_s", "storage")
)


@dataclass(frozen=True)
class Row:
    """One trial in a comparison."""

    rank: int | None
    """1 is best; None if the trial has no finite value of the metric."""
    trial: TrialSummary
    params: dict[str, str]
    """Only the keys of the comparison."""
    value: float | None
    step: int | None
    """Where `value` was measured."""
    random_weights: float | None
    """The metric of the same backbone at step 0, before any training."""

    @property
    def gain(self) -> float | None:
        """`value` minus that of random weights."""
        return self.value - self.random_weights if self.value is not None and self.random_weights is not None else None

    def paper(self, metric: str) -> float | None:
        """The paper's number for this trial."""
        return self.trial.paper.get(metric)


@dataclass(frozen=True)
class Group:
    """One configuration over its seeds."""

    rank: int | None
    params: dict[str, str]
    rows: tuple[Row, ...]
    values: dict[int | None, float]
    """The metric by seed; runs that repeat a seed count once, with their mean."""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None below two seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def paper(self, metric: str) -> float | None:
        """The paper's number for this configuration."""
        return self.rows[0].paper(metric)


@dataclass(frozen=True)
class Comparison:
    """Trials ranked by a metric, and their configurations ranked by its mean over seeds."""

    metric: str
    mode: Mode
    keys: tuple[str, ...]
    """Dotted keys that differ between the trials, with `row` in place of those that follow from a sweep's row; the seed
    is never one of them."""
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]

    @property
    def has_seeds(self) -> bool:
        """Whether a configuration was run with more than one seed."""
        return any(len({row.trial.seed for row in group.rows}) > 1 for group in self.groups)

    @property
    def random_weights(self) -> float | None:
        """The metric at step 0, mean over the trials that have it."""
        values = [row.random_weights for row in self.rows if row.random_weights is not None]
        return statistics.fmean(values) if values else None

    @property
    def paper_metrics(self) -> tuple[str, ...]:
        """What the paper gives numbers of, that which is compared first."""
        found = dict.fromkeys(metric for row in self.rows for metric in sorted(row.trial.paper))
        return tuple(sorted(found, key=lambda metric: metric != self.metric))

    @property
    def paper_note(self) -> str:
        """What the paper's numbers are, in a line; empty where there are none."""
        if not self.paper_metrics:
            return ""
        settings = dict.fromkeys(row.trial.paper_setting for row in self.rows if row.trial.paper)
        return f"The paper's numbers are at its own scale: {'; '.join(filter(None, settings)) or 'not told'}."


def compare(trials: Sequence[TrialSummary], metric: str = KNN_METRIC, mode: Mode = "max") -> Comparison:
    """Rank trials by the last value of `metric`; those without a finite value come last, in their given order.

    Raises CompareError if there is no trial.
    """
    if not trials:
        raise CompareError("no trials to compare")
    keys = differing_keys(trials)
    rows = [_row(trial, keys, metric) for trial in trials]
    ranked = _ranked(rows, lambda row: row.value, mode)
    rows = [Row(rank, row.trial, row.params, row.value, row.step, row.random_weights) for rank, row in ranked]
    by_params: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_params.setdefault(tuple(row.params.values()), []).append(row)
    groups = [Group(None, members[0].params, tuple(members), _by_seed(members)) for members in by_params.values()]
    ordered = _ranked(groups, lambda group: group.mean, mode)
    groups = [Group(rank, group.params, group.rows, group.values) for rank, group in ordered]
    return Comparison(metric, mode, keys, tuple(rows), tuple(groups))


def differing_keys(trials: Sequence[TrialSummary]) -> tuple[str, ...]:
    """Dotted keys whose values are not the same in all trials, without the seed and what cannot change a result.

    Where all trials belong to rows of a sweep, `row` comes first and the keys that are the same within each row are
    left out.
    """
    keys = {key for trial in trials for key in trial.params} - _UNSEEN_KEYS - {SEED_KEY}
    keys = {key for key in keys if not key.startswith(_UNSEEN_PREFIXES)}
    differing = sorted(key for key in keys if len({trial.params.get(key) for trial in trials}) > 1)
    if not all(trial.row for trial in trials):
        return tuple(differing)
    pairs = {key: {(trial.row, trial.params.get(key)) for trial in trials} for key in differing}
    num_rows = len({trial.row for trial in trials})
    return (ROW, *(key for key in differing if len(pairs[key]) > num_rows))


def _row(trial: TrialSummary, keys: Sequence[str], metric: str) -> Row:
    curve = trial.curves.get(metric, [])
    step, value = curve[-1] if curve else (None, None)
    finite = value if value is not None and math.isfinite(value) else None
    return Row(None, trial, {key: trial.params.get(key, "") for key in keys}, finite, step, trial.at(metric, 0))


def _ranked(items: Sequence[T], value: Callable[[T], float | None], mode: Mode) -> list[tuple[int | None, T]]:
    sign = -1 if mode == "max" else 1

    def place(item: T) -> tuple[bool, float]:
        number = value(item)
        return number is None, sign * (number or 0.0)

    return [(None if place(item)[0] else rank, item) for rank, item in enumerate(sorted(items, key=place), 1)]


def _by_seed(rows: Iterable[Row]) -> dict[int | None, float]:
    values: dict[int | None, list[float]] = {}
    for row in rows:
        if row.value is not None:
            values.setdefault(row.trial.seed, []).append(row.value)
    return {seed: statistics.fmean(repeats) for seed, repeats in values.items()}
