"""The numbers that the report draws, against those of the comparison and against arithmetic by hand."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from typing import Any

import pytest

from orchestrator.compare import KNN_METRIC, Comparison, compare
from orchestrator.report.analysis import (
    MAX_KEYS,
    collapse_timeline,
    cost_charts,
    metric_scale,
    parallel_coordinates,
    regret_charts,
    scale,
    strip,
)
from orchestrator.report.charts import MAX_POINTS, embedded, points_per_line, thin
from orchestrator.report.curves import axes_of, curve_charts, places
from orchestrator.trials import Curve, TrialSummary

LN_K = math.log(64)


def trial(i: int, knn: float | None = None, **curves: Curve) -> TrialSummary:
    params = {
        "pretrain.head.num_prototypes": "64",
        "pretrain.optim.lr": str(10.0**-i),
        "pretrain.teacher.centering": ("center", "none")[i % 2],
        "derived/steps_per_epoch": "25.0",
    }
    found: dict[str, Curve] = {
        "train/loss": [(step, 4.0 - 0.001 * step * i) for step in range(0, 100, 10)],
        "train/teacher_entropy": [(step, 0.5 * LN_K) for step in range(0, 100, 10)],
        "train/images_per_s": [(0, 10.0), (10, 100.0 + i), (20, 102.0 + i)],
        "cost/device_hours": [(10, 0.1), (20, 0.3), (90, 1.0 + i)],
        KNN_METRIC: [(0, 30.0), (100, 50.0 + i if knn is None else knn)],
    }
    found |= {name.replace("__", "/"): curve for name, curve in curves.items()}
    return TrialSummary(f"id{i}", f"trial-{i}", "finished", params, 0, found)


@pytest.fixture
def comparison() -> Comparison:
    scores = (10.0, 30.0, 20.0, 25.0)
    return compare([trial(i, eval__rankme=[(0, 1.0), (100, score)]) for i, score in enumerate(scores)])


def figures(comparison: Comparison) -> dict[str, Any]:
    charts = [*curve_charts(comparison, {}), *regret_charts(comparison), *cost_charts(comparison)]
    charts += [chart for chart in (parallel_coordinates(comparison), collapse_timeline(comparison)) if chart]
    return {chart["id"]: chart for chart in json.loads(embedded(charts))["charts"]}


# ------------------------------------------------------------------------------------------ equal to the comparison


def test_every_number_that_is_drawn_is_the_comparisons(comparison: Comparison) -> None:
    drawn = figures(comparison)
    rows = comparison.rows
    assert [row.trial.name for row in rows] == ["trial-3", "trial-2", "trial-1", "trial-0"]
    for name, metric in (("eval-knn-top1", KNN_METRIC), ("train-loss", "train/loss"), ("eval-rankme", "eval/rankme")):
        lines = {line["meta"]: line for line in drawn[f"curve-{name}"]["data"]}
        assert sorted(lines) == [0, 1, 2, 3]
        for place, row in enumerate(rows):
            steps, values = zip(*row.trial.curves[metric], strict=True)
            assert lines[place]["x"] == list(steps)
            assert lines[place]["y"] == pytest.approx(values, rel=1e-6)
            assert row.trial.name in lines[place]["text"]
    last = {line["meta"]: line["y"][-1] for line in drawn["curve-eval-knn-top1"]["data"]}
    assert last == {place: row.value for place, row in enumerate(rows)}
    (points,) = drawn["regret-rankme"]["data"]
    assert points["y"] == [row.value for row in rows]
    assert points["x"] == [row.trial.last("eval/rankme") for row in rows] == [25.0, 20.0, 30.0, 10.0]
    assert drawn["cost-hours"]["data"][0]["y"] == [row.trial.last("cost/device_hours") for row in rows]
    assert drawn["cost-speed"]["data"][0]["y"] == [row.trial.images_per_s for row in rows] == [103, 102, 101, 100]
    strips, _ = drawn["collapse-timeline"]["data"]
    assert strips["z"][0][0] == rows[0].trial.entropy_shares[0][1] == pytest.approx(0.5)


def test_parallel_coordinates_hold_each_trials_values(comparison: Comparison) -> None:
    drawn = figures(comparison)["parallel-coordinates"]
    assert drawn["layout"]["xaxis"]["ticktext"] == [
        "<b>optim.lr (log)</b>",
        "<b>teacher.centering</b>",
        "<b>k-NN %</b>",
    ]
    lines = {line["meta"]: line for line in drawn["data"]}
    for place, row in enumerate(comparison.rows):
        lr, centering = row.params["pretrain.optim.lr"], row.params["pretrain.teacher.centering"]
        texts = [f"optim.lr (log) {lr}", f"teacher.centering {centering}", f"k-NN % {row.value:.4g}"]
        assert lines[place]["customdata"] == texts
        i = int(row.trial.run_id.removeprefix("id"))
        assert lines[place]["y"] == pytest.approx([(3 - i) / 3, i % 2, i / 3])  # by powers of ten, category, k-NN


# ------------------------------------------------------------------------------------------------------------- axes


def test_epochs_and_device_hours_of_a_step() -> None:
    points = [(step, 0.0) for step in (0, 5, 15, 20, 90, 120)]
    assert places(trial(1), points, "step") == [0, 5, 15, 20, 90, 120]
    assert places(trial(1), points, "epoch") == pytest.approx([0, 0.2, 0.6, 0.8, 3.6, 4.8])
    # Between logged steps in proportion, from nothing at step 0, and no more than the last.
    assert places(trial(1), points, "hours") == pytest.approx([0, 0.05, 0.2, 0.3, 2.0, 2.0])


def test_a_trial_that_did_not_log_its_cost_is_not_drawn_over_it() -> None:
    old = TrialSummary("id", "old", "finished", {}, 0, {"train/loss": [(0, 1.0), (10, 0.5)]})
    assert places(old, [(0, 1.0), (10, 0.5)], "hours") == [None, None]
    assert places(old, [(0, 1.0), (10, 0.5)], "epoch") == [None, None]
    assert axes_of(compare([old])) == ["step"]
    assert axes_of(compare([old, trial(0)])) == ["step", "epoch", "hours"]


@pytest.mark.parametrize(
    ("texts", "title", "expected"),
    [
        (["0.1", "0.001", "0.01"], "lr (log)", [1.0, 0.0, 0.5]),
        (["2", "6", "10"], "lr", [0.0, 0.5, 1.0]),
        (["0", "1000", "500"], "lr", [0.0, 1.0, 0.5]),  # no logarithm of zero
        (["-1", "1000", "500"], "lr", [0.0, 1.0, 501 / 1001]),
        (["b", "a", "c"], "lr", [0.5, 0.0, 1.0]),
        (["1", "None", "1"], "lr", [0.0, 1.0, 0.0]),
        (["nan", "1", "2"], "lr", [1.0, 0.0, 0.5]),  # as words
        (["7", "7"], "lr", [0.5, 0.5]),
    ],
)
def test_scales_of_numbers_decades_and_categories(texts: list[str], title: str, expected: list[float]) -> None:
    found = scale("lr", texts)
    assert found.title == title
    assert found.places == pytest.approx(expected)
    assert set(found.ticks.values()) == set(texts)


def test_ticks_of_a_crowded_scale_keep_their_distance() -> None:
    ticks = list(scale("lr", [str(i / 100) for i in range(100)]).ticks)
    assert 8 <= len(ticks) <= 13
    assert min(after - before for before, after in itertools.pairwise(ticks)) > 0.08
    assert metric_scale("k-NN", [40.0, 60.0]).ticks == {0.0: "40", 0.25: "45", 0.5: "50", 0.75: "55", 1.0: "60"}


def test_nothing_that_varies_or_one_score_has_no_parallel_coordinates() -> None:
    assert parallel_coordinates(compare([trial(0), trial(0)])) is None
    assert parallel_coordinates(compare([trial(0), trial(1, math.nan)])) is None


def test_more_keys_than_axes_are_counted() -> None:
    trials = [trial(i) for i in range(2)]
    for i, item in enumerate(trials):
        item.params.update({f"pretrain.key{key:02}": str(i) for key in range(20)})
    chart = parallel_coordinates(compare(trials))
    assert chart is not None
    assert len(chart.figure.data[0].x) == MAX_KEYS + 1
    assert chart.unit.endswith("12 more keys are left out")


# ----------------------------------------------------------------------------------------------------------- choice


def test_regret_is_what_the_choice_by_a_label_free_score_costs(comparison: Comparison) -> None:
    (chart,) = regret_charts(comparison)
    # Trial 1 has the highest rank, trial 3 the best k-NN; of the ranks 1, 4, 2, 3 and 1, 2, 3, 4 rho is 0.4.
    assert chart.unit == "choosing by it costs 2.00 points of k-NN; rank correlation 0.40"


# --------------------------------------------------------------------------------------------------------- collapse


def test_a_strip_holds_the_newest_value_and_ends_with_its_curve() -> None:
    curve = [(10, 0.5), (20, math.nan), (30, 0.25)]
    assert strip(curve, [0, 9, 10, 19, 20, 29, 30, 40, 41]) == [None, None, 0.5, 0.5, None, None, 0.25, 0.25, None]
    assert strip([(0, 1.0)], [0, 1]) == [1.0, None]


def test_a_verdict_is_marked_where_it_begins() -> None:
    low = [(step, 0.0 if step >= 40 else 0.5 * LN_K) for step in range(0, 100, 10)]
    collapsed = trial(1, train__teacher_entropy=low, train__loss=[(step, 0.01) for step, _ in low])
    comparison = compare([collapsed, trial(0), trial(2)])
    chart = collapse_timeline(comparison)
    assert chart is not None
    _, marks = chart.figure.data
    place = [row.trial.name for row in comparison.rows].index("trial-1")
    assert list(marks.y) == [place]
    assert list(marks.x) == [collapsed.diagnosis.step]
    assert list(marks.text) == ["trial-1: one-hot collapse"]
    assert 40 <= marks.x[0] <= 50


def test_of_many_trials_those_that_went_wrong_have_a_strip() -> None:
    low = [(step, 0.0) for step in range(0, 100, 10)]
    bad = trial(1, 0.0, train__teacher_entropy=low, train__loss=[(step, 0.01) for step, _ in low])
    chart = collapse_timeline(compare([*(trial(2) for _ in range(100)), bad]))
    assert chart is not None
    assert len(chart.figure.data[0].z) == 60
    assert chart.figure.data[0].z[-1][0] == 0.0
    assert chart.unit.endswith("41 more trials are left out")


# ------------------------------------------------------------------------------------------------------ long curves


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    points = [(step, math.sin(step / 300)) for step in range(10_000)]
    points[4321] = (4321, 9.0)
    points[7000] = (7000, -9.0)
    points[8000] = (8000, math.nan)
    kept = thin(points, 300)
    assert len(kept) <= 300
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert {0, 4321, 7000, 8000, 9999} <= {step for step, _ in kept}
    assert thin(points[:300], 300) == points[:300]


def test_long_curves_are_thinned_and_gaps_stay() -> None:
    long = [(step, math.inf if step == 777 else math.cos(step)) for step in range(50_000)]
    (chart,) = [c for c in curve_charts(compare([trial(0, train__loss=long)]), {}) if c.id == "curve-train-loss"]
    (line,) = chart.figure.data
    assert 0.6 * MAX_POINTS <= len(line.x) <= MAX_POINTS
    assert line.y[list(line.x).index(777)] is None
    assert [len(axis) for axis in (chart.axes["epoch"][0], chart.axes["hours"][0])] == [len(line.x)] * 2


def test_a_chart_holds_so_many_points_however_many_lines() -> None:
    assert points_per_line(1) == points_per_line(24) == MAX_POINTS
    assert points_per_line(200) * 200 == 24_000
    assert points_per_line(10_000) == 50


def test_speed_is_the_median(comparison: Comparison) -> None:
    (speed,) = [chart for chart in cost_charts(comparison) if chart.id == "cost-speed"]
    assert speed.figure.data[0].y[0] == statistics.median([10.0, 103.0, 105.0])
