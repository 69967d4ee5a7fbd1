from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.multitest import multipletests

from orchestrator import statistics as module
from orchestrator.statistics import holm, paired_differences, pairing, seeds_to_resolve

Values = dict[str, dict[int, float]]


def table(rows: np.ndarray) -> Values:
    return {"abcdefghijkl"[i]: dict(enumerate(map(float, row))) for i, row in enumerate(rows)}


def noise(configurations: int, seeds: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return 70 + generator.standard_normal((configurations, seeds)) + 3 * generator.standard_normal(seeds)


# ------------------------------------------------------------------------------------------- against known procedures


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_one_comparison_is_the_paired_t_test(seeds: int) -> None:
    rows = noise(2, seeds)
    found = paired_differences(table(rows), "a")["b"]
    expected = stats.ttest_rel(rows[1], rows[0])
    interval = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(rows[1].mean() - rows[0].mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.num_seeds == seeds


@pytest.mark.parametrize(("configurations", "seeds"), [(3, 3), (6, 3)])
def test_equal_variances_give_dunnetts_quantile_but_for_the_larger_of_two_variances(
    configurations: int, seeds: int
) -> None:
    """|t| of max(pooled, own) is at most that of the pooled variance, whose quantile is Dunnett's (1955): several
    differences from one control, correlation 1/2, on the degrees of freedom of a block design."""
    freedom = (configurations - 1) * (seeds - 1)
    correlation = np.full((configurations - 1,) * 2, 0.5) + 0.5 * np.eye(configurations - 1)
    distribution = stats.multivariate_t(shape=correlation, df=freedom, seed=0)
    design = module._Design(np.ones((configurations, seeds), dtype=bool), False)
    maxima = design.maxima(None, 9999)
    for level in (0.8, 0.95):
        quantile = np.quantile(maxima, level)
        # The share of Dunnett's statistic below that quantile.
        bound = np.full(configurations - 1, quantile)
        share = distribution.cdf(bound, lower_limit=-bound)
        assert share < level + 0.01
        assert share > level - 0.05

    pooled_only = _pooled_maxima(configurations, seeds)
    bound = np.full(configurations - 1, np.quantile(pooled_only, 0.95))
    assert distribution.cdf(bound, lower_limit=-bound) == pytest.approx(0.95, abs=0.006)


def _pooled_maxima(configurations: int, seeds: int) -> np.ndarray:
    design = module._Design(np.ones((configurations, seeds), dtype=bool), False)
    tables = np.random.default_rng(1).standard_normal((20_000, configurations, seeds))
    means, _ = design.differences(tables, 0)
    return (np.abs(means) / np.sqrt(design.pooled(tables)[:, None] / seeds)).max(axis=1)


def test_the_pooled_variance_is_that_of_a_block_design_also_with_missing_trials() -> None:
    rows = noise(4, 5)
    known = np.ones(rows.shape, dtype=bool)
    known[1, 3] = known[2, 0] = known[3, 4] = False
    design = module._Design(known, False)
    i, j = np.nonzero(known)
    dummies = np.hstack([i[:, None] == np.arange(4), j[:, None] == np.arange(1, 5)]).astype(float)
    fitted = OLS(rows[known], dummies).fit()
    assert design.freedom == fitted.df_resid
    assert design.pooled(np.where(known, rows, 0.0)[None])[0] == pytest.approx(2 * fitted.mse_resid)


def test_deviations_are_grubbs_estimates() -> None:
    """Unbiased for unequal variances (Grubbs 1948): their mean over many tables is what was put in."""
    true = np.array([1.0, 2.0, 1.0, 1.5])
    design = module._Design(np.ones((4, 12), dtype=bool), False)
    generator = np.random.default_rng(0)
    squares = [design.deviations(generator.standard_normal((4, 12)) * true[:, None]) ** 2 for _ in range(2000)]
    assert np.mean(squares, axis=0) == pytest.approx(true**2, rel=0.06)


def test_corrected_p_values_lie_between_the_raw_and_bonferronis() -> None:
    rows = noise(6, 10, seed=3)
    rows[1] += 1.2
    found = paired_differences(table(rows), "a")
    raw = [stats.ttest_rel(rows[i], rows[0]).pvalue for i in range(1, 6)]
    bonferroni = multipletests(raw, method="bonferroni")[1]
    for difference, low, high in zip(found.values(), raw, bonferroni, strict=True):
        assert difference.p_value is not None
        # Not the same test: variances are pooled here.
        assert low / 5 < difference.p_value <= min(1.0, 5 * high)
    assert all((d.p_value <= 0.05) == (d.verdict != "not resolved") for d in found.values() if d.p_value is not None)


def test_holm_is_statsmodels_holm() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 7, 30):
        p_values = generator.uniform(size=size) ** 3
        assert holm(list(p_values)) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert holm([0.02, 0.02, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert holm([]) == []


# ------------------------------------------------------------------------------------------------------------ verdicts


def test_the_verdict_follows_the_interval_and_the_mode() -> None:
    rows = noise(4, 5)
    rows[1] += 10
    rows[2] -= 10
    values = table(rows)
    larger = paired_differences(values, "a")
    assert [larger[key].verdict for key in "bcd"] == ["better", "worse", "not resolved"]
    smaller = paired_differences(values, "a", "min")
    assert [smaller[key].verdict for key in "bcd"] == ["worse", "better", "not resolved"]
    assert (larger["b"].low, larger["b"].mean) == (smaller["b"].low, smaller["b"].mean)
    assert larger["b"].low is not None
    assert larger["b"].low > 0
    assert larger["b"].seeds_needed is None
    assert "a" not in larger
    assert paired_differences(values, "a") == larger  # the bootstrap has a fixed seed


def test_a_shift_of_each_seed_changes_nothing() -> None:
    rows = noise(5, 4)
    shifted = rows + np.array([0.0, 100.0, -50.0, 7.0])
    for one, other in zip(
        paired_differences(table(rows), "b").values(), paired_differences(table(shifted), "b").values(), strict=True
    ):
        assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))


def test_only_shared_seeds_count() -> None:
    values = table(noise(4, 6))
    del values["b"][0], values["c"][1], values["c"][2]
    values["d"] = {3: 70.0, 17: 99.0}
    found = paired_differences(values, "a")
    assert [found[key].num_seeds for key in "bcd"] == [5, 4, 1]
    expected = np.mean([values["c"][seed] - values["a"][seed] for seed in (0, 3, 4, 5)])
    assert found["c"].mean == pytest.approx(expected)
    assert (found["d"].low, found["d"].verdict, found["d"].seeds_needed) == (None, "not resolved", None)
    assert found["d"].reason == "one shared seed gives no interval"
    without = paired_differences({key: values[key] for key in "abc"}, "a")
    assert without["c"] == found["c"]  # what cannot be compared does not widen the others' intervals


def test_without_a_shared_seed_there_is_nothing() -> None:
    found = paired_differences({"a": {0: 1.0, 1: 2.0}, "b": {2: 5.0, 3: 6.0}, "c": {}}, "a")
    for key in "bc":
        assert (found[key].mean, found[key].num_seeds, found[key].verdict) == (None, 0, "not resolved")
        assert found[key].reason == "shares no seed with the reference"


def test_no_noise_at_all_is_not_certainty() -> None:
    same = {0: 70.0, 1: 71.5, 2: 69.0}
    found = paired_differences({"a": same, "b": dict(same), "c": {seed: v + 0.1 for seed, v in same.items()}}, "a")
    assert (found["b"].mean, found["b"].verdict, found["b"].reason) == (0.0, "not resolved", "equal for every seed")
    assert (found["c"].verdict, found["c"].low) == ("not resolved", None)
    assert "no estimate of the noise" in found["c"].reason
    # With noise elsewhere, a copy of the reference is just not different.
    other = paired_differences({"a": same, "b": dict(same), "c": {0: 71.0, 1: 71.0, 2: 69.5}}, "a")
    assert (other["b"].verdict, other["b"].p_value, other["b"].seeds_needed) == ("not resolved", 1.0, None)


def test_a_configuration_that_varies_more_has_the_wider_interval() -> None:
    rows = noise(6, 5)
    rows[2] += 8 * np.random.default_rng(5).standard_normal(5)
    found = paired_differences(table(rows), "a")
    widths = {key: d.high - d.low for key, d in found.items() if d.low is not None and d.high is not None}
    assert widths["c"] > 1.5 * max(width for key, width in widths.items() if key != "c")


def test_choosing_the_reference_after_the_fact_widens_the_intervals() -> None:
    values = table(noise(6, 4))
    for key, planned in paired_differences(values, "c").items():
        chosen = paired_differences(values, "c", chosen=True)[key]
        assert chosen.mean == planned.mean
        assert chosen.low is not None and planned.low is not None
        assert chosen.low < planned.low


def test_an_unknown_reference_is_an_error() -> None:
    with pytest.raises(KeyError):
        paired_differences({"a": {0: 1.0}}, "z")


# --------------------------------------------------------------------------------------------------------------- seeds


def test_the_number_of_seeds_solves_its_equation() -> None:
    for difference, sd, comparisons, configurations in ((0.5, 1.0, 1, 2), (0.3, 1.0, 5, 6), (2.0, 1.0, 9, 10)):
        n = seeds_to_resolve(difference, sd, comparisons, configurations)

        def needed(n: int, tail: float = 0.025 / comparisons, k: int = configurations) -> float:
            freedom = (k - 1) * (n - 1)
            return float(stats.t.ppf(1 - tail, freedom) + stats.t.ppf(0.8, freedom))

        assert n >= (needed(n) * sd / difference) ** 2
        assert n == 2 or n - 1 < (needed(n - 1) * sd / difference) ** 2
    assert seeds_to_resolve(-0.5, 1.0, 1, 2) == seeds_to_resolve(0.5, 1.0, 1, 2)


def test_the_number_of_seeds_is_that_of_a_textbook_power_analysis() -> None:
    from statsmodels.stats.power import TTestPower

    for effect in (0.3, 0.5, 1.0):
        exact = TTestPower().solve_power(effect_size=effect, power=0.8, alpha=0.05)
        assert seeds_to_resolve(effect, 1.0, 1, 2) == pytest.approx(exact, abs=2)


# ------------------------------------------------------------------------------------------------------------- pairing


def test_what_pairing_saves() -> None:
    rows = noise(5, 400)  # variance 9 shared, 1 own
    found = pairing(table(rows))
    assert found is not None
    assert found.variance_ratio == pytest.approx(10, rel=0.2)
    assert found.correlation == pytest.approx(0.9, abs=0.02)
    assert (found.num_configurations, found.num_seeds) == (5, 400)
    two = {"a": {0: 1.0, 1: 2.0, 2: 4.0}, "b": {0: 2.0, 1: 2.5, 2: 6.0}}
    by_hand = (np.var([1, 2, 4], ddof=1) + np.var([2, 2.5, 6], ddof=1)) / np.var([1, 0.5, 2], ddof=1)
    assert pairing(two) is not None
    assert pairing(two).variance_ratio == pytest.approx(by_hand)  # type: ignore[union-attr]


def test_pairing_needs_two_of_each() -> None:
    assert pairing({}) is None
    assert pairing({"a": {0: 1.0, 1: 2.0}}) is None
    assert pairing({"a": {0: 1.0, 1: 2.0}, "b": {1: 2.0, 2: 3.0}}) is None
    assert pairing({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.5}}) is None  # nothing varies but the seeds


# ---------------------------------------------------------------------------------------------------------- simulation


@pytest.mark.parametrize("kind", ["normal", "one configuration, sd x 3"])
def test_equal_configurations_are_told_apart_in_five_sweeps_of_a_hundred(kind: str) -> None:
    """200 sweeps of 6 equal configurations and 3 seeds. At 5 % more than 21 false ones have a probability of 0.1 %,
    as `scipy.stats.binom.isf(0.001, 200, 0.05)` says."""
    from benchmarks.verdicts import equal_configurations

    assert stats.binom.isf(0.001, 200, 0.05) == 21
    figures = equal_configurations(kind, 3, 200)
    assert figures["false_verdicts"] <= 21 / 200
    assert figures["coverage"] > 0.96
    # What would happen otherwise, and that a false verdict is possible at all.
    assert figures["false_verdicts_of_percentile_bootstrap"] > 0.5


def test_a_true_effect_is_found_with_the_power_that_was_planned() -> None:
    """An effect of 2 standard deviations of a run with the seeds asked for; 100 sweeps, within three deviations."""
    from benchmarks.verdicts import planned

    figures = planned(2.0, 100)
    assert figures["power"] == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / 100))


def test_neither_numpy_nor_scipy_is_imported_with_the_module() -> None:
    code = "import sys, orchestrator.effects, orchestrator.tables, orchestrator.regret\n"
    code += "assert not {'numpy', 'scipy', 'pandas', 'optuna', 'torch', 'ray'} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
