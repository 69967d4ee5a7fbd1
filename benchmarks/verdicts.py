"""How often the verdicts of a comparison are right, by simulation.

    python -m benchmarks.verdicts [--sweeps 200] [--json]

simulates sweeps of 6 configurations with 3, 5 and 10 shared seeds under five kinds of noise and takes each through
`orchestrator.statistics.paired_differences`, as `compare` does. It prints

- A/A: with all configurations equal, the share of sweeps with any false verdict (family-wise; 5 % is stated), and the
  share of single intervals that cover the truth; beside it a percentile bootstrap with Bonferroni's correction;
- the same where the reference is the observed best, with and without the correction for having chosen it;
- power: how often the one configuration that is better by so many standard deviations of a run is found;
- the seeds that `seeds_to_resolve` asks for, and the power that they have;
- pairing: the variance it saves, by the correlation between configurations.

docs/statistics.md has figures. 200 sweeps take about a minute of one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.statistics import Difference, paired_differences, pairing, seeds_to_resolve

Array = NDArray[np.float64]

NUM_CONFIGURATIONS = 6
SEEDS = (3, 5, 10)
EFFECTS = (0.5, 1.0, 2.0, 3.0, 4.0)
CORRELATIONS = (0.0, 0.25, 0.5, 0.75, 0.9)
NUM_DRAWS = 1999
"""Of each bootstrap, fewer than `compare` takes, for speed."""


def _lognormal(generator: np.random.Generator, shape: tuple[int, int]) -> Array:
    deviation = np.sqrt((np.e - 1) * np.e)
    return (np.exp(0.5) - generator.lognormal(size=shape)) / deviation


def _one_varies(place: int) -> Callable[[np.random.Generator, tuple[int, int]], Array]:
    def noise(generator: np.random.Generator, shape: tuple[int, int]) -> Array:
        drawn = generator.standard_normal(shape)
        drawn[place] *= 3
        return drawn

    return noise


NOISE: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "heavy tails (t, 3 df)": lambda generator, shape: generator.standard_t(3, shape) / np.sqrt(3),
    "skewed (log-normal, to the bad)": _lognormal,
    "one configuration, sd x 3": _one_varies(1),
    "the reference, sd x 3": _one_varies(0),
}
"""Of standard deviation 1, [configurations, seeds]; what all configurations of a seed share comes on top."""


def simulate(noise: str, num_seeds: int, generator: np.random.Generator, effect: float = 0.0) -> Array:
    """The metric of one sweep, [configurations, seeds]; the last configuration is better by `effect`."""
    values = NOISE[noise](generator, (NUM_CONFIGURATIONS, num_seeds))
    values += generator.standard_normal(num_seeds)  # what a seed does to all of them
    values[-1] += effect
    return values


def verdicts(values: Array, reference: int = 0, *, chosen: bool = False) -> dict[int, Difference]:
    """What `compare` makes of a sweep."""
    runs = {i: dict(enumerate(map(float, row))) for i, row in enumerate(values)}
    return paired_differences(runs, reference, chosen=chosen, num_draws=NUM_DRAWS)


def percentile_intervals(values: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """What we do not do: the percentile bootstrap of each mean difference, by Bonferroni's correction."""
    differences = values[1:] - values[0]
    places = generator.integers(values.shape[1], size=(1999, values.shape[1]))
    means = differences[:, places].mean(axis=-1)
    tail = 0.025 / len(differences)
    low, high = np.quantile(means, [tail, 1 - tail], axis=1)
    return low, high


def equal_configurations(noise: str, num_seeds: int, num_sweeps: int) -> dict[str, float]:
    """Shares of A/A sweeps with a false verdict, and of intervals that cover the truth."""
    generator = np.random.default_rng([num_seeds, list(NOISE).index(noise)])
    false = covered = percentile = 0
    for _ in range(num_sweeps):
        values = simulate(noise, num_seeds, generator)
        found = verdicts(values).values()
        false += any(difference.verdict != "not resolved" for difference in found)
        covered += sum(d.low is not None and d.high is not None and d.low <= 0 <= d.high for d in found)
        low, high = percentile_intervals(values, generator)
        percentile += bool(((low > 0) | (high < 0)).any())
    intervals = num_sweeps * (NUM_CONFIGURATIONS - 1)
    return {
        "false_verdicts": false / num_sweeps,
        "coverage": covered / intervals,
        "false_verdicts_of_percentile_bootstrap": percentile / num_sweeps,
    }


def against_the_winner(num_seeds: int, num_sweeps: int) -> dict[str, float]:
    """Shares of A/A sweeps with a false verdict when everything is compared with the observed best."""
    generator = np.random.default_rng([num_seeds, 99])
    false = {"corrected": 0, "not_corrected": 0}
    for _ in range(num_sweeps):
        values = simulate("normal", num_seeds, generator)
        best = int(values.mean(axis=1).argmax())
        for name in false:
            found = verdicts(values, best, chosen=name == "corrected").values()
            false[name] += any(difference.verdict != "not resolved" for difference in found)
    return {name: count / num_sweeps for name, count in false.items()}


def power(effect: float, num_seeds: int, num_sweeps: int, noise: str = "normal") -> float:
    """The share of sweeps in which the one better configuration is found to be better."""
    generator = np.random.default_rng([num_seeds, round(100 * effect)])
    last = NUM_CONFIGURATIONS - 1
    found = (verdicts(simulate(noise, num_seeds, generator, effect))[last].verdict for _ in range(num_sweeps))
    return sum(verdict == "better" for verdict in found) / num_sweeps


def planned(effect: float, num_sweeps: int) -> dict[str, float]:
    """The seeds that a true effect is said to need, and the power with as many."""
    paired_sd = float(np.sqrt(2))
    num_seeds = seeds_to_resolve(effect, paired_sd, NUM_CONFIGURATIONS - 1, NUM_CONFIGURATIONS)
    return {"effect": effect, "seeds": num_seeds, "power": power(effect, num_seeds, num_sweeps)}


def variance_saved(correlation: float, num_seeds: int, num_sweeps: int) -> dict[str, float]:
    """The variance of a mean difference without shared seeds over that with them: simulated, and as `pairing` says."""
    generator = np.random.default_rng([num_seeds, round(100 * correlation)])
    shape = (num_sweeps, NUM_CONFIGURATIONS, num_seeds)
    shared = generator.standard_normal((num_sweeps, 1, num_seeds))
    own = generator.standard_normal(shape)
    paired = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    alone = generator.standard_normal(shape)
    means = [(values[:, 1] - values[:, 0]).mean(axis=-1) for values in (alone, paired)]
    told = []
    for values in paired:
        found = pairing({i: dict(enumerate(map(float, row))) for i, row in enumerate(values)})
        assert found is not None
        told.append(found.variance_ratio)
    return {
        "correlation": correlation,
        "expected": 1 / (1 - correlation),
        "simulated": float(means[0].var() / means[1].var()),
        "estimated_median": float(np.median(told)),
    }


def measure(num_sweeps: int) -> dict[str, Any]:
    """All figures."""
    return {
        "sweeps": num_sweeps,
        "equal": {noise: {n: equal_configurations(noise, n, num_sweeps) for n in SEEDS} for noise in NOISE},
        "winner": {n: against_the_winner(n, num_sweeps) for n in SEEDS},
        "power": {effect: {n: power(effect, n, num_sweeps) for n in SEEDS} for effect in EFFECTS},
        "planned": [planned(effect, num_sweeps) for effect in (0.75, 1.0, 1.5, 2.0)],
        "pairing": [variance_saved(correlation, 5, num_sweeps) for correlation in CORRELATIONS],
    }


def _print(figures: dict[str, Any]) -> None:
    columns = "".join(f" {n:>4} seeds" for n in SEEDS)

    def line(name: str, shares: list[float]) -> None:
        print(f"{name:<34}" + "".join(f"{100 * share:>9.1f}%" for share in shares))

    for key, title in (
        ("false_verdicts", "A/A: any false verdict"),
        ("coverage", "A/A: single intervals that cover"),
        ("false_verdicts_of_percentile_bootstrap", "A/A: percentile bootstrap instead"),
    ):
        print(f"\n{title:<34}{columns}")
        for noise, found in figures["equal"].items():
            line(noise, [found[n][key] for n in SEEDS])
    print(f"\n{'A/A against the observed best':<34}{columns}")
    for name in ("corrected", "not_corrected"):
        line(name.replace("_", " "), [figures["winner"][n][name] for n in SEEDS])
    print(f"\n{'power, effect in sd of a run':<34}{columns}")
    for effect, found in figures["power"].items():
        line(str(effect), list(found.values()))
    print("\neffect  seeds asked for  power with them")
    for row in figures["planned"]:
        print(f"{row['effect']:>6}  {row['seeds']:>15}  {100 * row['power']:>14.1f}%")
    print("\ncorrelation  variance ratio: expected  simulated  median estimate")
    for row in figures["pairing"]:
        print(f"{row['correlation']:>11}  {row['expected']:>24.2f}  {row['simulated']:>9.2f}", end="")
        print(f"  {row['estimated_median']:>15.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=200, help="simulated sweeps of each case")
    parser.add_argument("--json", action="store_true", help="end with the figures as one line of JSON")
    arguments = parser.parse_args()
    figures = measure(arguments.sweeps)
    _print(figures)
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
