from __future__ import annotations

import math

import pytest

from orchestrator.compare import KNN_METRIC, compare
from orchestrator.regret import preference, regrets
from orchestrator.tables import regret_table, render
from orchestrator.trials import Curve, TrialSummary


def trial(name: str, **last: float) -> TrialSummary:
    curves: dict[str, Curve] = {f"eval/{metric}": [(0, 1.0), (10, value)] for metric, value in last.items()}
    return TrialSummary(name, name, "finished", {"a": name}, 0, curves)


def test_regret_is_the_knn_lost_by_following_a_score() -> None:
    comparison = compare(
        [
            trial("good", knn_top1=80.0, rankme=90.0, lidar=10.0, alpha_req=1.4),
            trial("middle", knn_top1=75.0, rankme=100.0, lidar=20.0, alpha_req=0.9),
            trial("bad", knn_top1=60.0, rankme=50.0, lidar=30.0, alpha_req=2.0),
        ]
    )
    rank, lidar, alpha = regrets(comparison)
    assert (rank.chosen.trial.name, rank.best.trial.name, rank.regret, rank.num_trials) == ("middle", "good", 5.0, 3)
    assert rank.correlation == pytest.approx(0.5)  # one swap of neighbours among three
    assert (lidar.chosen.trial.name, lidar.regret, lidar.correlation) == ("bad", 20.0, pytest.approx(-1.0))
    assert (alpha.chosen.trial.name, alpha.regret) == ("middle", 5.0)  # the nearest to 1, from below
    table = regret_table(comparison)
    assert [row[:5] for row in table.rows] == [
        ("RankMe", "middle", "75.00", "80.00", "5.00"),
        ("LiDAR", "bad", "60.00", "80.00", "20.00"),
        ("alpha-ReQ", "middle", "75.00", "80.00", "5.00"),
    ]
    assert "Choosing without labels" in render(comparison, "markdown")


def test_it_does_not_matter_which_metric_ranks() -> None:
    trials = [trial("a", knn_top1=70.0, rankme=2.0), trial("b", knn_top1=71.0, rankme=1.0)]
    (by_rank,) = regrets(compare(trials, "eval/rankme"))
    (by_knn,) = regrets(compare(trials, KNN_METRIC))
    assert by_rank.regret == by_knn.regret == 1.0


def test_ties_are_broken_against_the_score_and_have_no_order() -> None:
    trials = [trial("a", knn_top1=70.0, rankme=2.0), trial("b", knn_top1=71.0, rankme=2.0)]
    (found,) = regrets(compare(trials))
    assert (found.chosen.trial.name, found.regret, found.correlation) == ("a", 1.0, None)


def test_trials_without_both_do_not_count() -> None:
    trials = [
        trial("a", knn_top1=70.0, rankme=2.0),
        trial("b", knn_top1=71.0),
        trial("c", rankme=9.0),
        trial("d", knn_top1=math.nan, rankme=9.0),
    ]
    assert regrets(compare(trials)) == ()
    assert "Choosing without labels" not in render(compare(trials), "table")


@pytest.mark.parametrize(("value", "better"), [(1.0, 1.1), (0.95, 1.1), (1.1, 0.8)])
def test_alpha_is_best_at_one(value: float, better: float) -> None:
    assert preference("eval/alpha_req", value) > preference("eval/alpha_req", better)
    assert preference("eval/rankme", 5.0) < preference("eval/rankme", 6.0)
