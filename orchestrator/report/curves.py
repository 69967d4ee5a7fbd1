"""Curves of the metrics over step, epoch or device-hours."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dino_core.diagnosis import ONE_HOT_SHARE, UNIFORM_SHARE
from orchestrator.compare import Comparison, Row
from orchestrator.report.charts import (
    AXES,
    Chart,
    colour_of,
    drawn_text,
    label_of,
    layout,
    nothing_logged,
    points_per_line,
    thin,
)
from orchestrator.report.style import BAD, LINES, SOFT
from orchestrator.tables import metric_title
from orchestrator.trials import ENTROPY, Curve, TrialSummary

HOURS = "cost/device_hours"
STEPS_PER_EPOCH = "derived/steps_per_epoch"
_MAX_MARKERS = 40


@dataclass(frozen=True)
class _Shown:
    """A metric that gets a chart."""

    title: str
    unit: str = ""
    always: bool = False
    from_zero: bool = False


_METRICS = {
    "eval/knn_top1": _Shown("k-NN", "%"),
    "eval/linear_top1": _Shown("Linear probe", "%"),
    "eval/rankme": _Shown("RankMe", "directions in use; needs no labels"),
    "eval/lidar": _Shown("LiDAR", "directions that tell images apart; needs no labels"),
    "eval/alpha_req": _Shown("Alpha-ReQ", "slope of the spectrum; needs no labels"),
    "train/loss": _Shown("Loss", "nats; compares only equal temperatures and prototypes", always=True),
    ENTROPY: _Shown("Teacher entropy", "share of ln K", always=True),
    "train/feature_rank": _Shown("Rank of the features", "directions", from_zero=True),
    "train/images_per_s": _Shown("Throughput", "images/s", always=True, from_zero=True),
}


def curve_charts(comparison: Comparison, baselines: Mapping[str, float]) -> list[Chart]:
    """The metric compared, then every main metric that a trial logged; some say that nothing was."""
    shown = {comparison.metric: _Shown(metric_title(comparison.metric), always=True)} | _METRICS
    if comparison.metric in _METRICS:
        shown = {comparison.metric: _METRICS[comparison.metric], **shown}
    charts = []
    for metric, how in shown.items():
        curves = [_curve(row.trial, metric) for row in comparison.rows]
        if any(curves) or how.always or metric == comparison.metric:
            levels = baselines if metric == comparison.metric else {}
            charts.append(_chart(metric, how, comparison.rows, curves, levels))
    return charts


def axes_of(comparison: Comparison) -> list[str]:
    """The axes over which at least one trial can be drawn."""
    known = {"step": True, "epoch": False, "hours": False}
    for row in comparison.rows:
        known["epoch"] |= _steps_per_epoch(row.trial) is not None
        known["hours"] |= bool(row.trial.curves.get(HOURS))
    return [axis for axis, there in known.items() if there]


def _curve(trial: TrialSummary, metric: str) -> Curve:
    return trial.entropy_shares if metric == ENTROPY else trial.curves.get(metric, [])


def _chart(
    metric: str, how: _Shown, rows: Sequence[Row], curves: Sequence[Curve], levels: Mapping[str, float]
) -> Chart:
    from plotly.graph_objects import Figure

    y_axis: dict[str, Any] = {"range": [0.0, 1.02]} if metric == ENTROPY else {}
    if how.from_zero:
        y_axis["rangemode"] = "tozero"
    figure = Figure(layout=layout(x=AXES["step"], yaxis=y_axis))
    name = metric.replace("/", "-").replace("_", "-")
    chart = Chart(f"curve-{name}" if name.replace("-", "").isalnum() else "curve-compared", how.title, figure, how.unit)
    if not any(math.isfinite(value) for curve in curves for _, value in curve):
        nothing_logged(figure)
        return chart
    drawn = [i for i in range(len(rows) - 1, -1, -1) if curves[i]]  # the best ends on top
    limit = points_per_line(len(drawn))
    lines = {i: thin(curves[i], limit) for i in drawn}
    for i, points in lines.items():
        figure.add_scatter(**_trace(i, label_of(rows[i]), points, crowded=len(rows) > len(LINES)))
    if metric == ENTROPY:
        for low, high in ((UNIFORM_SHARE, 1.0), (0.0, ONE_HOT_SHARE)):
            figure.add_hrect(y0=low, y1=high, fillcolor=BAD, opacity=0.16, line_width=0)
    for label, value in levels.items():
        if math.isfinite(value):
            words = {"annotation_text": f"{drawn_text(label)} {value:.4g}", "annotation_position": "top right"}
            figure.add_hline(y=value, line={"color": SOFT, "dash": "dash", "width": 1}, **words)
    axes = {axis: [places(rows[i].trial, points, axis) for i, points in lines.items()] for axis in AXES}
    return Chart(chart.id, chart.title, figure, chart.unit, axes=axes)


def _trace(index: int, label: str, points: Curve, *, crowded: bool) -> dict[str, Any]:
    own = index < len(LINES)
    return {
        "x": [step for step, _ in points],
        "y": [float(f"{value:.7g}") if math.isfinite(value) else None for _, value in points],
        "mode": "lines+markers" if len(points) <= _MAX_MARKERS and not crowded else "lines",
        "line": {"color": colour_of(index), "width": 2 if own else 1},
        "marker": {"size": 5},
        "opacity": 1.0 if own else 0.45,
        "text": drawn_text(label),
        "hovertemplate": "%{text}<br>%{x:.6~g}: %{y:.4~g}<extra></extra>",
        "meta": index,
    }


def places(trial: TrialSummary, points: Curve, axis: str) -> list[float | None]:
    """Where a trial's points stand on an axis; None, which draws nothing, where the trial does not tell."""
    steps = [step for step, _ in points]
    if axis == "step":
        return list(steps)
    if axis == "epoch":
        per_epoch = _steps_per_epoch(trial)
        return [float(f"{step / per_epoch:.6g}") if per_epoch else None for step in steps]
    curve = [point for point in trial.curves.get(HOURS, []) if math.isfinite(point[1])]
    return [_hours_at(curve, step) for step in steps]


def _steps_per_epoch(trial: TrialSummary) -> float | None:
    try:
        number = float(trial.params.get(STEPS_PER_EPOCH, ""))
    except ValueError:
        return None
    return number if number > 0 and math.isfinite(number) else None


def _hours_at(curve: Curve, step: int) -> float | None:
    """Device-hours that were spent by a step, between the logged ones in proportion; none were before the first."""
    if not curve:
        return None
    after = bisect.bisect_left(curve, step, key=lambda point: point[0])
    if after == len(curve):
        return float(f"{curve[-1][1]:.6g}")
    right, hours = curve[after]
    left, before = curve[after - 1] if after else (0, 0.0)
    share = 1.0 if right <= left else (step - left) / (right - left)
    return float(f"{before + share * (hours - before):.6g}")
