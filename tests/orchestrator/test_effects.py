from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from scipy import stats
from statsmodels.regression.linear_model import OLS

from orchestrator.compare import KNN_METRIC, Comparison, compare
from orchestrator.effects import analyse, importance, interactions, main_effects
from orchestrator.trials import Mode, TrialSummary

Point = Mapping[str, object]


def sweep(
    points: Sequence[Point], metric: Callable[[Point], float], seeds: int = 2, noise: float = 0.1, mode: Mode = "max"
) -> Comparison:
    generator = np.random.default_rng(0)
    trials = []
    for i, point in enumerate(points):
        for seed in range(seeds):
            value = metric(point) + 2.0 * seed + noise * float(generator.standard_normal())
            params = {key: str(setting) for key, setting in point.items()}
            trials.append(
                TrialSummary(f"{i}.{seed}", f"t{i}-s{seed}", "finished", params, seed, {KNN_METRIC: [(1, value)]})
            )
    return compare(trials, mode=mode)


def grid(**values: Sequence[object]) -> list[Point]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def scored(comparison: Comparison) -> tuple[np.ndarray, list[dict[str, str]]]:
    rows = [row for row in comparison.rows if row.value is not None]
    points = [row.params | {"seed": str(row.trial.seed)} for row in rows]
    return np.array([row.value for row in rows], dtype=float), points


def dummies(points: Sequence[Mapping[str, str]], key: str) -> np.ndarray:
    values = sorted({point[key] for point in points})[1:]
    return np.array([[float(point[key] == value) for value in values] for point in points])


def test_in_a_balanced_grid_effects_are_plain_means() -> None:
    comparison = sweep(grid(a=(1, 2, 10), b=(0.1, 0.2), c=("x", "y")), lambda p: 2.0 * int(str(p["a"])))
    values, points = scored(comparison)
    effects = main_effects(comparison)
    assert [effect.value for effect in effects["a"]] == ["1", "2", "10"]  # by size, not as text
    for key, found in effects.items():
        for effect in found:
            own = [value for value, point in zip(values, points, strict=True) if point[key] == effect.value]
            assert effect.mean == pytest.approx(np.mean(own))
            assert effect.num_trials == len(own)
    assert analyse(comparison).refused == {}


def test_an_interval_is_that_of_the_distance_from_the_average() -> None:
    """Two values: half the difference of their means, whose deviation is sd / sqrt(N); Bonferroni for the two."""
    comparison = sweep(grid(a=("x", "y"), b=(1, 2)), lambda p: 1.0, seeds=3)
    values, points = scored(comparison)
    design = np.hstack([np.ones((12, 1)), *(dummies(points, key) for key in ("a", "b", "seed"))])
    fitted = OLS(values, design).fit()
    half = stats.t.ppf(1 - 0.05 / 4, fitted.df_resid) * math.sqrt(fitted.mse_resid / 12)
    for effect in main_effects(comparison)["a"]:
        assert (effect.mean - effect.low, effect.high - effect.mean) == pytest.approx((half, half))


def test_missing_trials_do_not_draw_the_means_to_what_went_with_them() -> None:
    """a does nothing and b much; a = x was mostly tried with the good b. Plain means are fooled."""
    points = [p for p in grid(a=("x", "y"), b=(0, 1, 2), d=(0, 1)) if p != {"a": "x", "b": 0, "d": 0}]
    points.remove({"a": "x", "b": 0, "d": 1})
    comparison = sweep(points, lambda p: 10.0 * int(str(p["b"])))
    values, table = scored(comparison)
    effects = {effect.value: effect for effect in main_effects(comparison)["a"]}
    plain = [np.mean([v for v, p in zip(values, table, strict=True) if p["a"] == name]) for name in "xy"]
    assert plain[0] - plain[1] > 4
    assert effects["x"].mean - effects["y"].mean == pytest.approx(0, abs=0.15)
    design = np.hstack([np.ones((len(values), 1)), *(dummies(table, key) for key in ("a", "b", "d", "seed"))])
    fitted = OLS(values, design).fit()
    assert effects["y"].mean - effects["x"].mean == pytest.approx(fitted.params[1])


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(2)
    missed, count = 0, 120
    for _ in range(count):
        trials = [
            TrialSummary(f"{a}{b}{s}", f"{a}{b}-s{s}", "finished", {"a": a, "b": b}, s, {KNN_METRIC: [(1, value)]})
            for a, b, s in itertools.product("xyz", "12", range(3))
            for value in [float(generator.standard_normal())]
        ]
        effects = main_effects(compare(trials))["a"]
        average = np.mean([effect.mean for effect in effects])
        missed += any(not effect.low <= average <= effect.high for effect in effects)
    assert missed <= stats.binom.isf(0.001, count, 0.05)
    assert missed > 0


def test_an_interaction_is_found_and_has_the_p_value_of_its_f_test() -> None:
    comparison = sweep(
        grid(a=(1, 2, 3), b=(1, 2), c=("x", "y")),
        lambda p: 1.0 if (p["a"], p["b"]) == (3, 2) else 0.0,
        noise=0.5,
    )
    found = interactions(comparison)
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    values, points = scored(comparison)
    main = np.hstack([np.ones((len(values), 1)), *(dummies(points, key) for key in ("a", "b", "c", "seed"))])
    p_values = {}
    for one, other in found:
        products = np.stack([x * y for x in dummies(points, one).T for y in dummies(points, other).T], axis=1)
        with_it = OLS(values, np.hstack([main, products])).fit()
        p_values[one, other] = with_it.compare_f_test(OLS(values, main).fit())[1]
    smallest = min(p_values, key=lambda pair: p_values[pair])
    assert smallest == ("a", "b")
    assert found[smallest].p_value == pytest.approx(3 * p_values[smallest])  # Holm's first step of three
    assert found[smallest].p_value < 0.05
    assert found["b", "c"].p_value > 0.05
    cells = found["a", "b"].cells
    own = [v for v, p in zip(values, points, strict=True) if (p["a"], p["b"]) == ("3", "2")]
    assert cells["3", "2"].mean == pytest.approx(np.mean(own))
    assert cells["3", "2"].num_trials == 4


def test_a_half_fraction_names_its_aliases() -> None:
    """2^(4-1) with d = abc, of resolution IV: ab is seen together with cd, main effects are clear."""
    points = [{"a": a, "b": b, "c": c, "d": a * b * c} for a, b, c in itertools.product((-1, 1), repeat=3)]
    comparison = sweep(points, lambda p: int(str(p["a"])) * (1.0 + int(str(p["b"]))))
    found = interactions(comparison)
    assert {pair: interaction.aliases for pair, interaction in found.items()} == {
        ("a", "b"): (("c", "d"),),
        ("c", "d"): (("a", "b"),),
        ("a", "c"): (("b", "d"),),
        ("b", "d"): (("a", "c"),),
        ("a", "d"): (("b", "c"),),
        ("b", "c"): (("a", "d"),),
    }
    assert found["a", "b"].p_value < 0.001
    assert found["a", "c"].p_value > 0.05
    low, high = main_effects(comparison)["a"]
    assert high.mean - low.mean == pytest.approx(2.0, abs=0.2)


def test_a_fraction_of_resolution_three_has_no_interactions() -> None:
    points = [{"a": a, "b": b, "c": a * b} for a, b in itertools.product((-1, 1), repeat=2)]
    analysis = analyse(sweep(points, lambda p: 1.0))
    assert set(analysis.main) == {"a", "b", "c"}
    assert analysis.interactions == {}
    assert analysis.refused["a x b"] == "the design does not tell it from main effects"


def test_one_change_at_a_time_has_main_effects_only() -> None:
    points = [{"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 2, "b": 0}, {"a": 0, "b": 1}]
    analysis = analyse(sweep(points, lambda p: 1.0 * int(str(p["a"]))))
    steps = [effect.mean for effect in analysis.main["a"]]
    assert np.diff(steps) == pytest.approx([1, 1], abs=0.3)
    assert analysis.refused == {"a x b": "2 of 6 combinations were not tried"}


def test_what_cannot_be_told_apart_is_refused_with_the_reason() -> None:
    together = [{"a": a, "b": b, "c": f"c{a}"} for a, b in itertools.product((-1, 1), repeat=2)]
    analysis = analyse(sweep(together, lambda p: 1.0))
    assert set(analysis.main) == {"b"}
    assert analysis.refused == {"a": "changes together with c", "c": "changes together with a"}
    saturated = analyse(sweep(grid(a=(1, 2)), lambda p: 1.0, seeds=1))
    assert saturated.main == {}
    assert "repeat them with other seeds" in saturated.refused["a"]
    generator = np.random.default_rng(0)
    drawn = [{"lr": float(generator.uniform()), "m": "xy"[i % 2]} for i in range(20)]
    analysis = analyse(sweep(drawn, lambda p: 1.0))
    assert set(analysis.main) == {"m"}
    assert analysis.refused == {"lr": "takes 20 values, each about once; its importance can be estimated instead"}


def test_a_sweep_of_one_key_needs_seeds() -> None:
    comparison = sweep([{"temp": temp} for temp in (0.04, 0.05, 0.06, 0.07)], lambda p: 100 * float(str(p["temp"])))
    assert [effect.num_trials for effect in main_effects(comparison)["temp"]] == [2, 2, 2, 2]
    assert analyse(compare([TrialSummary("i", "n", "finished")])).main == {}


@pytest.mark.parametrize("mode", ["max", "min"])
def test_importance_finds_the_key_that_matters_and_names_both_estimates(mode: Mode) -> None:
    generator = np.random.default_rng(0)
    points = [
        {"lr": 10 ** float(generator.uniform(-4, -2)), "m": "xyz"[int(generator.integers(3))], "n": 2 ** (i % 3)}
        for i in range(30)
    ]
    comparison = sweep(points, lambda p: 5 * math.log10(float(str(p["lr"]))), seeds=1, mode=mode)
    found = importance(comparison)
    assert (found.num_configurations, found.reason) == (30, "")
    for shares in (found.fanova, found.ped_anova):
        assert set(shares) == {"lr", "m", "n"}
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["lr"] > 0.6
    assert found == importance(comparison)


def test_importance_is_refused_where_it_would_be_a_guess() -> None:
    few = importance(sweep(grid(a=range(19)), lambda p: float(str(p["a"])), seeds=2))
    assert (few.fanova, few.ped_anova, few.num_configurations) == ({}, {}, 19)
    assert few.reason == "19 configurations; at least 20 are needed"
    flat = importance(sweep(grid(a=range(20)), lambda p: 1.0, seeds=1, noise=0.0))
    assert flat.reason == "all configurations have the same mean"
