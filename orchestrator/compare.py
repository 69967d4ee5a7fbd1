"""Comparison of trials: which differences are worth looking at.

`compare` ranks trials (`orchestrator.trials`) and compares configurations with a reference over shared seeds
(`orchestrator.statistics`); `orchestrator.tables` writes the result, `Comparison.frame` hands it to a notebook.
"""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from orchestrator.lineage import in_words
from orchestrator.metric_choice import comparison_caution
from orchestrator.statistics import Difference, paired_differences
from orchestrator.trials import SEED_KEY, CompareError, Mode, TrialSummary

if TYPE_CHECKING:
    from pandas import DataFrame

T = TypeVar("T")

KNN_METRIC = "eval/knn_top1"
ROW = "row"
"""Stands in place of all keys that a sweep's rows set."""
BASE = "base"
"""Name of the row, or of the trials, that a sweep varies around."""
BEST = "best"
"""As a reference, the configuration that is ranked first."""
_EARLY = ("running", "stopped", "interrupted")
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
    difference: Difference | None = None
    """From the comparison's reference; None for the reference itself, and where there is none."""

    @property
    def name(self) -> str:
        """That of its trials without their seeds; of trials called otherwise, what sets the configuration apart."""
        names = {row.trial.name.removesuffix(f"-s{row.trial.seed}") for row in self.rows}
        if len(names) == 1:
            return names.pop()
        changes = (value if key == ROW else f"{key.rpartition('.')[2]} {value}" for key, value in self.params.items())
        return ", ".join(changes) or "all"

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
    reference: Group | None = None
    """What `Group.difference` is the difference from; None where there is one configuration."""
    reference_why: str = ""
    """How the reference was chosen."""
    why: str = ""
    """Why this metric ranks."""

    @property
    def has_seeds(self) -> bool:
        """Whether a configuration was run with more than one seed."""
        return any(len({row.trial.seed for row in group.rows}) > 1 for group in self.groups)

    @property
    def has_members(self) -> bool:
        """Whether some trials are members of a population, whose settings changed on the way."""
        return any(row.trial.segment is not None for row in self.rows)

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

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the numbers, each in a line."""
        why = f"Ranked by {self.metric}: {self.why}." if self.why else ""
        caution = comparison_caution(self.metric, [row.trial for row in self.rows])
        notes = (why, *caution, self.reference_note, self.early_note, self.members_note, self.paper_note)
        return tuple(filter(None, notes))

    @property
    def early_note(self) -> str:
        """That trials which did not reach their end count with what they had; empty where there are none."""
        early = [row.trial.status for row in self.rows if row.value is not None and row.trial.status in _EARLY]
        statuses = ", ".join(dict.fromkeys(early))
        if not early:
            return ""
        return f"{len(early)} of {len(self.rows)} trials count with their last value before the end ({statuses})."

    @property
    def members_note(self) -> str:
        """What the trials of a population are; empty where there are none."""
        if not self.has_members:
            return ""
        return (
            "A member of a population stands there with the settings of its newest segment; its weights and curves "
            "went through all of its lineage."
        )

    @property
    def reference_note(self) -> str:
        """What the differences are, in a line; empty where no configuration was repeated."""
        if self.reference is None or not self.has_seeds:
            return ""
        many = sum(group.difference is not None and group.difference.low is not None for group in self.groups)
        seeds = {len(group.values) for group in self.groups}
        together = "all pairs" if self.reference_why == _WINNER else f"all {many} comparisons"
        span = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else str(max(seeds))
        return (
            f"Differences are from {self.reference.name} ({self.reference_why}), over the seeds that both have "
            f"({span} each); the 95 % intervals hold for {together} together."
        )

    def frame(self) -> DataFrame:
        """One row per trial, best first: rank, names, varied keys, seed, values, health, and where they come from."""
        from pandas import DataFrame

        named = {id(row): group.name for group in self.groups for row in group.rows}
        rows = []
        for row in self.rows:
            trial = row.trial
            found: dict[str, object] = {"rank": row.rank, "trial": trial.name, "configuration": named[id(row)]}
            found |= row.params | {SEED_KEY: trial.seed, self.metric: row.value, "step": row.step}
            found |= {"random_weights": row.random_weights, "gain": row.gain}
            found |= {f"paper/{metric}": row.paper(metric) for metric in self.paper_metrics}
            found |= {"health": trial.health, "status": trial.status, "run_id": trial.run_id}
            found |= {"lineage": in_words(trial)} if self.has_members else {}
            found |= {"experiment": trial.experiment, "git_commit": trial.git_commit, "data_digest": trial.data_digest}
            rows.append(found)
        return _typed(DataFrame(rows), self.keys)

    def configurations_frame(self) -> DataFrame:
        """One row per configuration, best first: mean and deviation over seeds, difference from the reference."""
        from pandas import DataFrame

        rows = []
        for group in self.groups:
            found: dict[str, object] = {"rank": group.rank, "configuration": group.name, **group.params}
            found |= {"mean": group.mean, "sd": group.sd, "num_seeds": len(group.values), "num_runs": len(group.rows)}
            found |= {f"paper/{metric}": group.paper(metric) for metric in self.paper_metrics}
            apart = group.difference
            found |= {"reference": self.reference.name if self.reference else None}
            for name in ("mean", "low", "high", "p_value", "verdict", "seeds_needed", "reason"):
                column = f"difference_{name}" if name in ("mean", "low", "high") else name
                found[column] = getattr(apart, name) if apart is not None else None
            rows.append(found)
        return _typed(DataFrame(rows), self.keys)


def compare(
    trials: Sequence[TrialSummary],
    metric: str = KNN_METRIC,
    mode: Mode = "max",
    *,
    reference: str | None = None,
    base: Mapping[str, object] | None = None,
    why: str = "",
) -> Comparison:
    """Rank trials by the last value of `metric`; those without a finite value come last, in their given order.

    Args:
        reference: what the configurations are compared with: the name of a row, a configuration or a trial, or `best`.
            None is the row or the trials called `base`, else the configuration that equals `base`, else the best.
        base: the configuration that the trials' sweep varies, by dotted key.
        why: why this metric, for the reader.

    Raises CompareError if there is no trial, or no such reference (naming the nearest).
    """
    if not trials:
        raise CompareError("no trials to compare")
    keys = differing_keys(trials)
    rows = [_row(trial, keys, metric) for trial in trials]
    ranked = _ranked(rows, lambda row: row.value, mode)
    rows = [Row(rank, row.trial, row.params, row.value, row.step, row.random_weights) for rank, row in ranked]
    by_params: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        # What a member of a population ended with is not all that its weights have seen: it stands for itself.
        alone = row.trial.run_id if row.trial.segment is not None else None
        by_params.setdefault((alone, *row.params.values()), []).append(row)
    groups = [Group(None, members[0].params, tuple(members), _by_seed(members)) for members in by_params.values()]
    ordered = _ranked(groups, lambda group: group.mean, mode)
    groups = [replace(group, rank=rank) for rank, group in ordered]
    if len(groups) < 2 and reference is None:
        return Comparison(metric, mode, keys, tuple(rows), tuple(groups), why=why)
    place, how = find_reference(groups, reference, base or {})
    values = {
        i: {seed: value for seed, value in group.values.items() if seed is not None} for i, group in enumerate(groups)
    }
    differences = paired_differences(values, place, mode, chosen=how == _WINNER)
    groups = [replace(group, difference=differences.get(i)) for i, group in enumerate(groups)]
    return Comparison(metric, mode, keys, tuple(rows), tuple(groups), groups[place], how, why)


_WINNER = "the winner, chosen after the fact"


def find_reference(groups: Sequence[Group], name: str | None, base: Mapping[str, object]) -> tuple[int, str]:
    """The place of the configuration to compare with, and how it was chosen; see `compare`. Groups come best first."""
    if name is not None:
        for known in (_row_of, lambda group: {group.name}, lambda group: {row.trial.name for row in group.rows}):
            found = [i for i, group in enumerate(groups) if name in known(group)]
            if len(found) == 1:
                return found[0], "as asked"
            if found:
                several = ", ".join(groups[i].name for i in found)
                raise CompareError(f"--reference {name}: stands for several configurations: {several}")
        if name == BEST:
            return 0, _WINNER
        names = [*dict.fromkeys(group.name for group in groups), BEST]
        # Names hold numbers with points, which are no dotted keys.
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CompareError(f"--reference {name}: no such configuration{hint}; there is {', '.join(names)}")
    named = [i for i, group in enumerate(groups) if group.name == BASE or _row_of(group) == {BASE}]
    if len(named) == 1:
        return named[0], "the sweep's base"
    texts = {key: str(value) for key, value in base.items()}
    equal = [i for i, group in enumerate(groups) if _equals(group, texts)]
    if len(equal) == 1:
        return equal[0], "it has the values of the sweep's base"
    return 0, _WINNER


def _row_of(group: Group) -> set[str]:
    return {group.params[ROW]} if ROW in group.params else set()


def _equals(group: Group, base: Mapping[str, str]) -> bool:
    """Whether the configuration has the base's values, of all keys if its sweep has rows and hides some."""
    first = group.rows[0].trial.params
    keys = [key for key in base if key in first and _matters(key)] if ROW in group.params else list(group.params)
    return bool(keys) and all(base.get(key) == first.get(key) for key in keys)


def _matters(key: str) -> bool:
    return key not in _UNSEEN_KEYS and key != SEED_KEY and not key.startswith(_UNSEEN_PREFIXES)


def _typed(frame: DataFrame, keys: Sequence[str]) -> DataFrame:
    """The frame with numbers in place of their texts in those columns where all are numbers."""
    from pandas import to_numeric

    for key in keys:
        numbers = to_numeric(frame[key], errors="coerce")
        if numbers.notna().all():
            frame[key] = numbers
    return frame


def differing_keys(trials: Sequence[TrialSummary]) -> tuple[str, ...]:
    """Dotted keys whose values are not the same in all trials, without the seed and what cannot change a result.

    Where all trials belong to rows of a sweep, `row` comes first and the keys that are the same within each row are
    left out.
    """
    keys = {key for trial in trials for key in trial.params if _matters(key)}
    differing = sorted(key for key in keys if len({trial.params.get(key) for trial in trials}) > 1)
    if not all(trial.row for trial in trials):
        return tuple(differing)
    pairs = {key: {(trial.row, trial.params.get(key)) for trial in trials} for key in differing}
    num_rows = len({trial.row for trial in trials})
    return (ROW, *(key for key in differing if len(pairs[key]) > num_rows))


def _row(trial: TrialSummary, keys: Sequence[str], metric: str) -> Row:
    curve = trial.curves.get(metric, [])
    step, value = curve[-1] if curve else (None, None)
    # What a trial had reached before it ran out of memory or diverged is no result.
    finite = value if value is not None and math.isfinite(value) and trial.status != "failed" else None
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
