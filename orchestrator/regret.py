"""What it costs to choose a trial without labels: k-NN lost by following a label-free score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.compare import KNN_METRIC, Comparison, Row

LABEL_FREE = {"eval/rankme": "RankMe", "eval/lidar": "LiDAR", "eval/alpha_req": "alpha-ReQ"}
"""Scores of frozen features: RankMe (arXiv 2210.02885) and LiDAR (arXiv 2312.04000), of which more is better, and
alpha-ReQ (Agrawal et al. 2022), which is best at 1."""


@dataclass(frozen=True)
class Regret:
    """One label-free score beside k-NN, over the trials that have both."""

    score: str
    chosen: Row
    """The trial that the score ranks first; of equal ones that of the lowest k-NN."""
    chosen_knn: float
    best: Row
    best_knn: float
    correlation: float | None
    """Spearman's, of the score's ranking with that of k-NN; None where one of them has no order."""
    num_trials: int

    @property
    def regret(self) -> float:
        """Points of k-NN lost by choosing by the score; 0 is none."""
        return self.best_knn - self.chosen_knn


def preference(score: str, value: float) -> float:
    """A label-free score's value as a number of which more is better."""
    return -abs(value - 1) if score == "eval/alpha_req" else value


def regrets(comparison: Comparison) -> tuple[Regret, ...]:
    """Each label-free score that at least two trials logged beside k-NN, by their last finite values of both."""
    found = []
    for score in LABEL_FREE:
        points = []
        for row in comparison.rows:
            value, knn = row.trial.last(score), row.trial.last(KNN_METRIC)
            if value is not None and knn is not None and math.isfinite(value) and math.isfinite(knn):
                points.append((preference(score, value), knn, row))
        if len(points) > 1:
            found.append(_regret(score, points))
    return tuple(found)


def _regret(score: str, points: Sequence[tuple[float, float, Row]]) -> Regret:
    _, chosen_knn, chosen = max(points, key=lambda point: (point[0], -point[1]))
    _, best_knn, best = max(points, key=lambda point: point[1])
    preferences, knns = [point[0] for point in points], [point[1] for point in points]
    correlation = None
    if len(set(preferences)) > 1 and len(set(knns)) > 1:
        from scipy.stats import spearmanr

        correlation = float(spearmanr(preferences, knns).statistic)
    return Regret(score, chosen, chosen_knn, best, best_knn, correlation, len(points))
