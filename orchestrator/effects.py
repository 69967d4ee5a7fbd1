"""What each key of a sweep does: main effects, two-way interactions, and importance.

Effects come from a linear model by least squares of all trials: seeds are blocks, each value of each key is a level. A
key's effect is its least-squares means: the metric at each of its values, averaged over all values of the other keys
with equal weight (Searle, Speed and Milliken 1980). In a balanced grid or factorial these are plain means; where trials
are missing they are not drawn towards the keys that happened to go with a value. What a design cannot tell apart is
refused with the reason, found from the rank of the model; aliases of a fractional factorial are named.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.compare import Comparison, Row
from orchestrator.statistics import holm

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LEVEL = 0.95
MIN_CONFIGURATIONS = 20
"""Below this many, fANOVA and PED-ANOVA contradict each other and themselves."""
_MANY_VALUES = 8
"""A key of more values, most of them in one configuration only, was drawn from a range."""
_MIN_GOOD = 5
"""Configurations that PED-ANOVA calls good, at least."""
_DECADES = 1.5
"""Numbers that span more are seen on a log scale."""
_TINY = 1e-8


@dataclass(frozen=True)
class Effect:
    """A key at one of its values."""

    key: str
    value: str
    mean: float
    """The least-squares mean of the metric."""
    low: float
    """Of the interval of this value's distance from the average of the key's values, put at `mean`. What all values
    share, as the noise of the seeds, is not in it. All values of the key are covered together (Bonferroni)."""
    high: float
    num_trials: int


@dataclass(frozen=True)
class Interaction:
    """Two keys together, beyond the sum of what each does."""

    keys: tuple[str, str]
    cells: dict[tuple[str, str], Effect]
    """By the values of both keys."""
    p_value: float
    """Of the F test that there is none, corrected for the number of pairs tested (Holm 1979)."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Other pairs that this design cannot tell from this one: it is their sum that is seen."""


@dataclass(frozen=True)
class Analysis:
    """The effects that a comparison supports."""

    main: dict[str, tuple[Effect, ...]]
    interactions: dict[tuple[str, str], Interaction]
    refused: dict[str, str]
    """Why a key, or a pair `one x other`, has none."""
    num_trials: int


_CHANGED = "changed within the runs of a population"


def main_effects(comparison: Comparison) -> dict[str, tuple[Effect, ...]]:
    """The main effect of each key that the design supports; `analyse` says why others have none."""
    return analyse(comparison).main


def interactions(comparison: Comparison) -> dict[tuple[str, str], Interaction]:
    """The two-way interactions that the design supports; `analyse` says why others are missing."""
    return analyse(comparison).interactions


def analyse(comparison: Comparison) -> Analysis:
    """Main effects and two-way interactions, or why there are none."""
    rows = [row for row in comparison.rows if row.value is not None]
    if comparison.has_members:
        return Analysis({}, {}, dict.fromkeys(comparison.keys, _CHANGED), len(rows))
    levels = {key: _levels(key, rows) for key in comparison.keys}
    refused = {key: "takes one value in all trials that have the metric" for key in levels if len(levels[key]) < 2}
    num_points = len({tuple(row.params.values()) for row in rows})
    varied = len(levels) - len(refused)
    for key, found in levels.items():
        drawn = varied > 1 and len(found) > _MANY_VALUES and 2 * len(found) > num_points
        if drawn or (len(found) > 2 and 2 * len(found) > len(rows)):
            refused[key] = f"takes {len(found)} values, each about once; its importance can be estimated instead"
    keys = [key for key in levels if key not in refused]
    pairs = list(itertools.combinations(keys, 2))
    if not keys:
        return Analysis({}, {}, refused, len(rows))
    model = _Model(rows, {key: levels[key] for key in keys})
    refused |= {key: why for key in keys if (why := model.why_not(key))}
    model = model.without_aliases([key for key in keys if key in refused])
    main = {}
    for key in (key for key in keys if key not in refused):
        if model.has_means(key):
            main[key] = model.main(key)
        else:
            refused[key] = "the trials do not tell its average over the other keys"
    extra = {pair: model.beyond(*pair) for pair in pairs if pair[0] in main and pair[1] in main}
    tested: dict[tuple[str, str], tuple[dict[tuple[str, str], Effect], float]] = {}
    for pair, columns in extra.items():
        answer = model.interaction(pair, columns)
        if isinstance(answer, str):
            refused[" x ".join(pair)] = answer
        else:
            tested[pair] = answer
    corrected = holm([p_value for _, p_value in tested.values()])
    found_pairs = {
        pair: Interaction(pair, cells, p_value, _aliases(pair, extra))
        for (pair, (cells, _)), p_value in zip(tested.items(), corrected, strict=True)
    }
    return Analysis(main, found_pairs, refused, len(rows))


def _levels(key: str, rows: Sequence[Row]) -> list[str]:
    """The values of a key, numbers by size."""
    found = {row.params[key] for row in rows}
    return sorted(
        found, key=lambda text: (number, "") if (number := finite_number(text)) is not None else (math.inf, text)
    )


def finite_number(text: str) -> float | None:
    """The number that a text spells; None for another text, and for what is not finite."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _rank(matrix: Array) -> int:
    import numpy as np

    return int(np.linalg.matrix_rank(matrix, tol=_TINY * max(1.0, float(np.abs(matrix).max(initial=0.0))) * 10))


def _aliases(pair: tuple[str, str], extra: dict[tuple[str, str], Array]) -> tuple[tuple[str, str], ...]:
    import numpy as np

    own = _rank(extra[pair])
    return tuple(
        other
        for other, columns in extra.items()
        if other != pair and own and _rank(columns) == own == _rank(np.hstack([extra[pair], columns]))
    )


class _Model:
    """Seeds and main effects, by least squares."""

    def __init__(self, rows: Sequence[Row], levels: dict[str, list[str]]) -> None:
        import numpy as np

        self.rows = rows
        self.levels = levels
        self.values = np.array([row.value for row in rows], dtype=np.float64)
        seeds = sorted({row.trial.seed for row in rows}, key=str)
        blocks = np.array([[row.trial.seed == seed for seed in seeds] for row in rows], dtype=np.float64)
        self.columns = {key: self._dummies(key) for key in levels}
        self.design = np.hstack([blocks, *self.columns.values()])
        self.num_blocks = len(seeds)

    def _dummies(self, key: str) -> Array:
        import numpy as np

        return np.array([[row.params[key] == value for value in self.levels[key]] for row in self.rows], np.float64)

    def _place(self, key: str, value: int | None) -> Array:
        """The model's row for a value of a key; None is the average of its values."""
        import numpy as np

        size = len(self.levels[key])
        return np.full(size, 1 / size) if value is None else np.eye(size)[value]

    def _means(self, chosen: dict[str, int]) -> Array:
        """The model's row for some keys at chosen values, averaged over all else."""
        import numpy as np

        parts = [self._place(key, chosen.get(key)) for key in self.levels]
        return np.concatenate([np.full(self.num_blocks, 1 / self.num_blocks), *parts])

    def why_not(self, key: str) -> str:
        """Why the effect of a key cannot be estimated; empty if it can."""
        if len(self.values) <= _rank(self.design):
            return "there are no more trials than values to estimate; repeat them with other seeds"
        average = self._means({})
        contrasts = [self._means({key: i}) - average for i in range(len(self.levels[key]))]
        if _are_estimable(self.design, contrasts):
            return ""
        for other in self.levels:
            together = {(row.params[key], row.params[other]) for row in self.rows}
            if other != key and len(together) == max(len(self.levels[key]), len(self.levels[other])):
                return f"changes together with {other}"
        return "the trials do not tell it from the other keys together"

    def without_aliases(self, refused: Sequence[str]) -> _Model:
        """The model that fits the same without those keys whose columns follow from others."""
        model = self
        for key in reversed(refused):
            smaller = _Model(self.rows, {other: found for other, found in model.levels.items() if other != key})
            if _rank(smaller.design) == _rank(self.design):
                model = smaller
        return model

    def has_means(self, key: str) -> bool:
        return _are_estimable(self.design, [self._means({key: i}) for i in range(len(self.levels[key]))])

    def main(self, key: str) -> tuple[Effect, ...]:
        counts = Counter(row.params[key] for row in self.rows)
        places = [self._means({key: i}) for i in range(len(self.levels[key]))]
        effects = _effects(self.design, self.values, places)
        found = zip(self.levels[key], effects, strict=True)
        return tuple(Effect(key, value, *numbers, counts[value]) for value, numbers in found)

    def beyond(self, one: str, other: str) -> Array:
        """The columns of an interaction, without what the model has already."""
        import numpy as np

        products = _products(self.columns[one], self.columns[other])
        left: Array = products - self.design @ np.linalg.lstsq(self.design, products, rcond=None)[0]
        return left

    def interaction(self, pair: tuple[str, str], beyond: Array) -> tuple[dict[tuple[str, str], Effect], float] | str:
        """Least-squares means of all cells and the p-value of the F test; or why there is none."""
        import numpy as np
        from scipy.stats import f

        one, other = pair
        counts = Counter((row.params[one], row.params[other]) for row in self.rows)
        cells = list(itertools.product(self.levels[one], self.levels[other]))
        empty = sum(cell not in counts for cell in cells)
        if empty:
            return f"{empty} of {len(cells)} combinations were not tried"
        freedom = (len(self.levels[one]) - 1) * (len(self.levels[other]) - 1)
        if _rank(beyond) < freedom:
            return "the design does not tell it from main effects"
        design = np.hstack([self.design, _products(self.columns[one], self.columns[other])])
        left = len(self.values) - _rank(design)
        if left < 1:
            return "there are no more trials than values to estimate; repeat them with other seeds"
        without, within = (_residual(matrix, self.values) for matrix in (self.design, design))
        noise = within / left
        scale = (_TINY * float(np.abs(self.values).max())) ** 2
        if noise > scale:
            p_value = float(f.sf((without - within) / freedom / noise, freedom, left))
        else:
            p_value = 0.0 if without - within > scale else 1.0
        sizes = len(self.levels[one]), len(self.levels[other])
        products = np.eye(len(cells))
        places = [
            np.concatenate([self._means({one: n // sizes[1], other: n % sizes[1]}), products[n]])
            for n in range(len(cells))
        ]
        effects = _effects(design, self.values, places)
        names = f"{one} x {other}"
        found = zip(cells, effects, strict=True)
        return {cell: Effect(names, ", ".join(cell), *numbers, counts[cell]) for cell, numbers in found}, p_value


def _products(one: Array, other: Array) -> Array:
    products: Array = (one[:, :, None] * other[:, None, :]).reshape(len(one), -1)
    return products


def _residual(design: Array, values: Array) -> float:
    import numpy as np

    return float(((values - design @ np.linalg.lstsq(design, values, rcond=None)[0]) ** 2).sum())


def _are_estimable(design: Array, places: Sequence[Array]) -> bool:
    """Whether sums of coefficients have one value for all solutions of least squares: they are rows of the design."""
    import numpy as np

    projection = np.linalg.pinv(design) @ design
    return all(np.abs(place @ projection - place).max() < _TINY for place in places)


def _effects(design: Array, values: Array, places: Sequence[Array]) -> list[tuple[float, float, float]]:
    """Mean, low and high of each place, the interval that of its distance from the average of all places."""
    import numpy as np
    from scipy.stats import t

    inverse = np.linalg.pinv(design)
    coefficients = inverse @ values
    freedom = len(values) - _rank(design)
    sd = math.sqrt(_residual(design, values) / freedom)
    average = np.mean(places, axis=0)
    critical = float(t.ppf(1 - (1 - LEVEL) / (2 * len(places)), freedom))
    found = []
    for place in places:
        mean = float(place @ coefficients)
        half = critical * sd * float(np.linalg.norm((place - average) @ inverse))
        found.append((mean, mean - half, mean + half))
    return found


@dataclass(frozen=True)
class Importances:
    """How much of the metric's variation each key explains; two estimates, which agree where there is enough to see."""

    num_configurations: int
    fanova: dict[str, float] = field(default_factory=dict)
    """Functional ANOVA of a random forest (Hutter, Hoos and Leyton-Brown 2014): shares of the variation over the whole
    space. They add up to 1."""
    ped_anova: dict[str, float] = field(default_factory=dict)
    """PED-ANOVA (arXiv 2304.10255): how unlike the values of the best configurations are to those of all. They add up
    to 1."""
    reason: str = ""
    """Why there is none; empty where there is."""


def importance(comparison: Comparison) -> Importances:
    """Importance of each key by optuna's evaluators, over the configurations' means over seeds.

    Refused below `MIN_CONFIGURATIONS`, where a forest of so few points says nothing.
    """
    groups = [group for group in comparison.groups if group.mean is not None]
    keys = [key for key in comparison.keys if len({group.params[key] for group in groups}) > 1]
    count = len(groups)
    if comparison.has_members:
        return Importances(count, reason=f"the settings {_CHANGED}")
    if count < MIN_CONFIGURATIONS:
        return Importances(count, reason=f"{count} configurations; at least {MIN_CONFIGURATIONS} are needed")
    if not keys:
        return Importances(count, reason="no key varies")
    if len({group.mean for group in groups}) == 1:
        return Importances(count, reason="all configurations have the same mean")
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize" if comparison.mode == "max" else "minimize")
        axes = {key: _axis([group.params[key] for group in groups]) for key in keys}
        for i, group in enumerate(groups):
            study.add_trial(
                optuna.trial.create_trial(
                    params={key: axes[key][1][i] for key in keys},
                    distributions={key: axes[key][0] for key in keys},
                    value=group.mean,
                )
            )
        # The share of the best must hold enough configurations to have a distribution.
        good = PedAnovaImportanceEvaluator(target_quantile=max(0.1, _MIN_GOOD / count))
        found = [
            {key: float(share) for key, share in get_param_importances(study, evaluator=evaluator).items()}
            for evaluator in (FanovaImportanceEvaluator(seed=0), good)
        ]
    finally:
        optuna.logging.set_verbosity(verbosity)
    return Importances(count, fanova=found[0], ped_anova=found[1])


def _axis(texts: Sequence[str]) -> tuple[Any, list[Any]]:
    """Optuna's distribution of a key and its values: numbers where all are, on a log scale where they span decades."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    numbers = [number for text in texts if (number := finite_number(text)) is not None]
    if len(numbers) < len(texts):
        return CategoricalDistribution(tuple(sorted(set(texts)))), list(texts)
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=low > 0 and math.log10(high / low) >= _DECADES), numbers
