"""Which configurations a sweep tries: the points of each `sweep.design`, made from its checked space.

Each is a function of the space and the design's seed alone, and more trials of a drawn design begin with the same ones.
scipy and numpy are imported where they are needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from dino_core.config import ConfigError
from orchestrator.factorial import MAX_FACTORS, Effect, Factorial, Resolution, find_design
from orchestrator.overrides import did_you_mean, show
from orchestrator.space import Space, Values, in_words

Design = Literal["grid", "random", "qmc", "one_at_a_time", "fractional_factorial", "optuna"]

DRAWN: tuple[Design, ...] = ("random", "qmc", "optuna")
"""Designs that draw `sweep.num_trials` configurations, so that a key may have a range."""

Point = dict[str, Any]
"""Values of the keys that vary in one configuration."""

_MAX_DRAWS = 1000
"""Draws for each new configuration that may repeat an old one, before the space is taken to hold no more."""


def design_problems(
    design: Design,
    *,
    num_trials: int | None,
    resolution: Resolution | None,
    interactions: Sequence[Any],
    objectives: Mapping[str, Any],
    rows: Mapping[str, Any],
) -> list[str]:
    """A line for each setting of a sweep that its design lacks, or that is for another design."""
    drawn, factorial, searched = design in DRAWN, design == "fractional_factorial", design == "optuna"
    problems = []
    if drawn and num_trials is None:
        problems.append(
            f"num_trials = None: must be a whole number >= 1 when sweep.design = {design}, the number of configurations"
        )
    if factorial and resolution is None and not interactions:
        problems.append(
            "resolution = None: must be III, IV or V when sweep.design = fractional_factorial and sweep.interactions "
            "names none"
        )
    if searched and rows:
        problems.append("design = optuna: must be another one for a sweep with rows; it searches one space")
    for name, given, fits, designs in (
        ("num_trials", num_trials, drawn, ", ".join(DRAWN)),
        ("resolution", resolution, factorial, "fractional_factorial"),
        ("interactions", interactions, factorial, "fractional_factorial"),
        ("objectives", objectives, searched, "optuna"),
    ):
        if given and not fits:
            problems.append(f"{name}: must be none when sweep.design = {design}, it is for {designs}")
    return problems


def parse_objectives(text: str) -> dict[str, str]:
    """`metric:max,metric:min` as `Sweep.objectives`. Raises ConfigError."""
    pairs = [part.strip().rpartition(":") for part in text.split(",")]
    if not all(metric and mode in ("max", "min") for metric, _, mode in pairs):
        raise ConfigError(f"sweep.objectives = {show(text)}: must be metric:max or metric:min, with commas between")
    return {metric: mode for metric, _, mode in pairs}


def parse_interactions(text: str) -> list[tuple[str, str]]:
    """`key*key,key*key` as `Sweep.interactions`. Raises ConfigError."""
    pairs = [tuple(key.strip() for key in part.split("*")) for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ConfigError(f"sweep.interactions = {show(text)}: must be key*key, with commas between")
    return [(first, second) for first, second in pairs]


def draw(values: Values, share: float) -> Any:
    """One of the values by a number from 0 to 1: from a range the one with that share below it."""
    if isinstance(values, list):
        return values[min(len(values) - 1, int(share * len(values)))]
    return values.at(share)


def grid_size(space: Space, fixed: Mapping[str, Any], most: int) -> int:
    """How many combinations a grid has; with conditions, no more than `most` + 1 are counted."""
    if not space.conditions:
        return math.prod(len(values) for values in space.values.values() if isinstance(values, list))
    return sum(1 for _ in itertools.islice(space.grid(fixed), most + 1))


def random_points(space: Space, count: int, seed: int, fixed: Mapping[str, Any]) -> list[Point]:
    """`count` different configurations, each key drawn by itself. Raises ConfigError if there are fewer."""
    import numpy as np

    generator = np.random.default_rng(seed)
    rows = (generator.random(len(space.values)).tolist() for _ in itertools.count())
    return _distinct(space, count, rows, fixed)


def qmc_points(space: Space, count: int, seed: int, fixed: Mapping[str, Any]) -> list[Point]:
    """`count` different configurations that fill the space evenly: a Sobol sequence, scrambled by the seed.

    Sobol (1967); Owen (1998) for the scrambling. Raises ConfigError if there are fewer.
    """
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(space.values), scramble=True, rng=seed)

    def rows() -> Iterator[Sequence[float]]:
        for doubling in itertools.count():  # scipy warns of numbers that are no power of 2, so take these
            yield from sequence.random(2 ** max(0, doubling - 1)).tolist()

    return _distinct(space, count, rows(), fixed)


def _distinct(space: Space, count: int, rows: Iterator[Sequence[float]], fixed: Mapping[str, Any]) -> list[Point]:
    _check_enough(space, count, fixed)
    points: dict[tuple[Any, ...], Point] = {}
    for row in itertools.islice(rows, _MAX_DRAWS * count):
        shares = dict(zip(space.values, row, strict=True))
        point = space.pick(lambda key, values, shares=shares: draw(values, shares[key]), fixed)  # type: ignore[misc]
        points.setdefault(tuple(point.items()), point)
        if len(points) == count:
            return list(points.values())
    raise ConfigError(f"sweep.num_trials = {count}: only {len(points)} different configurations were found")


def _check_enough(space: Space, count: int, fixed: Mapping[str, Any]) -> None:
    """Raise ConfigError if there are fewer configurations than asked for, as far as they can be counted."""
    if not all(isinstance(values, list) for values in space.values.values()):
        return
    there = grid_size(space, fixed, count)
    if there < count:
        raise ConfigError(f"sweep.num_trials = {count}: the space holds only {there} different configurations")


def one_at_a_time(space: Space, fixed: Mapping[str, Any]) -> list[Point]:
    """The base, then for each key each value other than the base's with everything else as it is there.

    Raises ConfigError: a key that the base gives no other value, or that its condition keeps from varying there.
    """
    points: list[Point] = [{}]
    problems = []
    for key, values in space.values.items():
        assert isinstance(values, list)
        others = [value for value in values if value != fixed[key]]
        if not others:
            problems.append(f"{key} = {in_words(values)}: has no other value than the base's")
        elif not all(fixed[decider] in allowed for decider, allowed in space.conditions.get(key, {}).items()):
            problems.append(f"{key}: does not vary around the base, where its condition does not hold")
        points += [{key: value} for value in others]
    if problems:
        raise ConfigError("\n".join(problems))
    return points


def factorial_design(space: Space, resolution: Resolution | None, interactions: Sequence[Sequence[str]]) -> Factorial:
    """The smallest two-level design for the keys of the space, which are its factors in their order.

    Raises ConfigError: a key without exactly two values, an interaction of keys that do not vary, too many keys.
    """
    keys = list(space.values)
    problems = [
        f"{key} = {in_words(values)}: must have two values for sweep.design = fractional_factorial"
        for key, values in space.values.items()
        if not isinstance(values, list) or len(values) != 2
    ]
    if space.conditions:
        problems.append("sweep.conditions: must be none for sweep.design = fractional_factorial, whose keys all vary")
    if not 2 <= len(keys) <= MAX_FACTORS:
        problems.append(f"sweep.space: must vary 2 to {MAX_FACTORS} keys by fractional_factorial, not {len(keys)}")
    pairs = []
    for pair in interactions:
        names = list(pair) if not isinstance(pair, str) else [pair]
        unknown = [name for name in names if name not in keys]
        problems += [f"sweep.interactions: {show(name)} does not vary{did_you_mean(name, keys)}" for name in unknown]
        if not unknown and (len(names) != 2 or names[0] == names[1]):
            problems.append(f"sweep.interactions: {show(' x '.join(names))}: must be of two different keys")
        elif not unknown:
            first, second = sorted(map(keys.index, names))
            pairs.append((first, second))
    if problems:
        raise ConfigError("\n".join(problems))
    return find_design(len(keys), resolution, list(dict.fromkeys(pairs)))


def factorial_points(space: Space, design: Factorial) -> list[Point]:
    """The runs of a two-level design in standard order; the second of a key's values is the high level."""
    points = []
    for run in range(design.num_runs):
        levels = zip(space.values.items(), design.levels(run), strict=True)
        points.append({key: values[high] for (key, values), high in levels})  # type: ignore[index]
    return points


def alias_structure(design: Factorial, names: Sequence[str]) -> dict[str, Any]:
    """What a two-level design can and cannot tell apart, for the sweep's definition.

    `generators` by the factor made from others, the `defining_relation`, and `aliases`: groups of main effects and
    two-factor interactions of which only the sum is measured.
    """

    def spell(effect: Effect) -> str:
        return " x ".join(names[factor] for factor in effect)

    return {
        "runs": design.num_runs,
        "resolution": design.resolution,
        "generators": {names[factor]: spell(basic) for factor, basic in design.generators.items()},
        "defining_relation": [spell(word) for word in design.words],
        "aliases": [[spell(effect) for effect in group] for group in design.aliases],
    }
