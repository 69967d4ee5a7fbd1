"""Charts of what the trials say together: parameters, collapse, choice without labels, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.compare import KNN_METRIC, Comparison, Row
from orchestrator.effects import finite_number
from orchestrator.regret import LABEL_FREE, regrets
from orchestrator.report.charts import (
    Chart,
    colour_of,
    drawn_text,
    finite,
    label_of,
    layout,
)
from orchestrator.report.curves import HOURS
from orchestrator.report.style import CARD, HIGH, INK, LINES, LOW, MIDDLE, SOFT
from orchestrator.tables import metric_title
from orchestrator.trials import Curve

MAX_KEYS = 10
"""Of the parallel coordinates; more axes than this cannot be followed."""
_DECADES = 1.5  # from which numbers are spread on a log scale
_MAX_TICKS = 12
_MAX_STRIPS = 60
_NUM_COLUMNS = 240


def parallel_coordinates(comparison: Comparison) -> Chart | None:
    """Every scored trial as a line through its values of the varied keys to the metric; None where nothing varies.

    Plotly's own kind of this chart makes programs from text, which the page forbids; so these are plain lines.
    """
    from plotly.graph_objects import Figure

    scored = [(i, row) for i, row in enumerate(comparison.rows) if row.value is not None]
    keys = [key for key in comparison.keys if len({row.params[key] for _, row in scored}) > 1]
    if not keys or len(scored) < 2:
        return None
    axes = [scale(key.removeprefix("pretrain."), [row.params[key] for _, row in scored]) for key in keys[:MAX_KEYS]]
    values = [row.value for _, row in scored if row.value is not None]
    axes.append(metric_scale(metric_title(comparison.metric), values))
    figure = Figure(
        layout=layout(
            margin={"l": 70, "r": 70, "t": 44, "b": 14},
            dragmode="select",
            selectdirection="v",
            xaxis={
                "tickvals": list(range(len(axes))),
                "ticktext": [f"<b>{drawn_text(axis.title)}</b>" for axis in axes],
                "side": "top",
                "ticks": "",
                "showline": False,
                "range": [-0.15, len(axes) - 0.85],
                "fixedrange": True,
            },
            yaxis={"range": [-0.06, 1.06], "visible": False, "fixedrange": True},
        )
    )
    for n, (i, row) in reversed(list(enumerate(scored))):  # the best ends on top
        own = i < len(LINES)
        figure.add_scatter(
            x=list(range(len(axes))),
            y=[axis.places[n] for axis in axes],
            customdata=[drawn_text(f"{axis.title} {axis.texts[n]}") for axis in axes],
            mode="lines+markers",
            line={"color": colour_of(i), "width": 2 if own else 1},
            marker={"size": 6},
            opacity=1.0 if own else 0.45,
            text=drawn_text(row.trial.name),
            hovertemplate="%{text}<br>%{customdata}<extra></extra>",
            meta=i,
        )
    for x, axis in enumerate(axes):
        figure.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, line={"color": SOFT, "width": 1}, layer="below")
        for place, text in axis.ticks.items():
            form = {"showarrow": False, "xanchor": "right", "xshift": -7, "bgcolor": CARD, "borderpad": 1}
            figure.add_annotation(x=x, y=place, text=drawn_text(text), **form)
    left_out = len(keys) + 1 - len(axes)
    words = "draw a box over values to pick the trials that have them; a double click shows all again"
    words += f"; {left_out} more keys are left out" if left_out else ""
    return Chart("parallel-coordinates", "Parameters and metric", figure, words, height_px=360, full_width=True)


@dataclass(frozen=True)
class Scale:
    """An axis of the parallel coordinates, from 0 at its lower end to 1."""

    title: str
    places: list[float]
    """Of each trial."""
    texts: list[str]
    """What each trial's place stands for."""
    ticks: dict[float, str]


def scale(title: str, texts: Sequence[str]) -> Scale:
    """The values of a key: numbers, on a log scale where they span decades, else categories, evenly spaced."""
    numbers = [finite_number(text) for text in texts]
    told = [number for number in numbers if number is not None]
    if len(told) < len(numbers):
        categories = sorted(set(texts))
        places = _from_0_to_1([float(categories.index(text)) for text in texts])
        return Scale(title, places, list(texts), _ticks(places, [_short(text or "-", 20) for text in texts]))
    logarithmic = min(told) > 0 and math.log10(max(told) / min(told)) >= _DECADES
    places = _from_0_to_1([math.log10(number) for number in told] if logarithmic else told)
    return Scale(f"{title} (log)" if logarithmic else title, places, list(texts), _ticks(places, texts))


def metric_scale(title: str, values: Sequence[float]) -> Scale:
    """The values of the metric, with a tick at each quarter."""
    low, high = min(values), max(values)
    ticks = {i / 4: f"{low + (high - low) * i / 4:.4g}" for i in range(5)} if high > low else {0.5: f"{low:.4g}"}
    return Scale(title, _from_0_to_1(values), [f"{value:.4g}" for value in values], ticks)


def _ticks(places: Sequence[float], texts: Sequence[str]) -> dict[float, str]:
    """All places, or where they are many those that keep a distance from one another."""
    kept: dict[float, str] = {}
    for place, text in sorted(dict(zip(places, texts, strict=True)).items()):
        if not kept or place - next(reversed(kept)) >= 1 / _MAX_TICKS:
            kept[place] = text
    return kept


def _from_0_to_1(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def regret_charts(comparison: Comparison) -> list[Chart]:
    """k-NN against each label-free score, and what choosing by the latter would have cost."""
    from plotly.graph_objects import Figure

    charts = []
    for found in regrets(comparison):
        title = LABEL_FREE[found.score]
        both = [
            (i, row, finite(row.trial.last(found.score)), finite(row.trial.last(KNN_METRIC)))
            for i, row in enumerate(comparison.rows)
        ]
        points = [point for point in both if point[2] is not None and point[3] is not None]
        figure = Figure(layout=layout(x=title, y=metric_title(KNN_METRIC)))
        figure.add_scatter(
            x=[score for _, _, score, _ in points],
            y=[knn for _, _, _, knn in points],
            mode="markers",
            marker={"size": 10, "color": [colour_of(i) for i, _, _, _ in points], "line": {"color": CARD, "width": 1}},
            text=[drawn_text(label_of(row)) for _, row, _, _ in points],
            hovertemplate=f"%{{text}}<br>{title} %{{x:.4~g}}, k-NN %{{y:.4~g}} %<extra></extra>",
        )
        alike = "" if found.correlation is None else f"; rank correlation {found.correlation:.2f}"
        unit = f"choosing by it costs {found.regret:.2f} points of k-NN{alike}"
        name = found.score.rpartition("/")[2].replace("_", "-")
        charts.append(Chart(f"regret-{name}", f"k-NN and {title}", figure, unit))
    return charts


def collapse_timeline(comparison: Comparison) -> Chart | None:
    """The teacher's entropy of every trial over its steps, as a strip of colour, with the verdicts where they begin."""
    from plotly.graph_objects import Figure

    found = [(i, row, row.trial.entropy_shares) for i, row in enumerate(comparison.rows) if row.trial.entropy_shares]
    if not found:
        return None
    # Where there are too many, those that went wrong are shown first.
    kept = sorted(found, key=lambda item: not item[1].trial.diagnosis.is_bad)[:_MAX_STRIPS]
    kept.sort(key=lambda item: item[0])
    last = max(curve[-1][0] for _, _, curve in kept)
    steps = [round(i * last / (_NUM_COLUMNS - 1)) for i in range(_NUM_COLUMNS)] if last >= _NUM_COLUMNS else []
    steps = steps or list(range(last + 1))
    names = [drawn_text(_short(row.trial.name)) for _, row, _ in kept]
    figure = Figure(
        layout=layout(
            x="step",
            margin={"l": 60, "r": 20, "t": 26, "b": 42},
            yaxis={
                "autorange": "reversed",
                "tickvals": list(range(len(kept))),
                "ticktext": names,
                "showgrid": False,
                "title": {"text": ""},
            },
        )
    )
    figure.add_heatmap(
        x=steps,
        y=list(range(len(kept))),
        z=[strip(curve, steps) for _, _, curve in kept],
        text=[[drawn_text(label_of(row))] * len(steps) for _, row, _ in kept] if len(kept) <= 12 else None,
        zmin=0.0,
        zmax=1.0,
        colorscale=[[0.0, LOW], [0.15, MIDDLE], [0.85, MIDDLE], [1.0, HIGH]],
        ygap=3 if len(kept) <= 30 else 1,
        hovertemplate="step %{x}: %{z:.3f} of ln K<extra></extra>",
        colorbar={
            "thickness": 12,
            "outlinewidth": 0,
            "tickvals": [0, 0.5, 1],
            "ticktext": ["0, one-hot", "0.5", "1, uniform"],
        },
    )
    bad = [(place, row) for place, (_, row, _) in enumerate(kept) if row.trial.diagnosis.is_bad]
    figure.add_scatter(
        x=[row.trial.diagnosis.step for _, row in bad],
        y=[place for place, _ in bad],
        mode="markers",
        marker={"symbol": "x", "size": 10, "color": INK, "line": {"color": CARD, "width": 1}},
        text=[drawn_text(f"{row.trial.name}: {row.trial.diagnosis.verdict}") for _, row in bad],
        hovertemplate="%{text} from step %{x}<extra></extra>",
    )
    hidden = len(found) - len(kept)
    unit = "of ln K; x marks from where a verdict held" + (f"; {hidden} more trials are left out" if hidden else "")
    height = max(190, 90 + min(len(kept) * (26 if len(kept) <= 20 else 14), 840))
    return Chart("collapse-timeline", "Teacher entropy", figure, unit, height_px=height, full_width=True)


def strip(curve: Curve, steps: Sequence[int]) -> list[float | None]:
    """A curve's newest value at each step; None before its first, behind its last, and where it is not finite."""
    values: list[float | None] = []
    at = -1
    for step in steps:
        while at + 1 < len(curve) and curve[at + 1][0] <= step:
            at += 1
        ended = at == len(curve) - 1 and step > _end(curve)
        value = None if at < 0 or ended else finite(curve[at][1])
        values.append(None if value is None else round(value, 4))
    return values


def _end(curve: Curve) -> int:
    """The last step that a curve speaks for: its last point holds as long as the one before it did."""
    return curve[-1][0] + (curve[-1][0] - curve[-2][0] if len(curve) > 1 else 0)


def _short(name: str, length: int = 36) -> str:
    return name if len(name) <= length else f"{name[: length - 4]} ..."


def cost_charts(comparison: Comparison) -> list[Chart]:
    """Device-hours and images per second of every trial, in the order of the ranking."""
    rows = comparison.rows
    hours = [finite(row.trial.last(HOURS)) for row in rows]
    speeds = [row.trial.images_per_s for row in rows]
    charts = []
    if any(value is not None for value in hours):
        charts.append(_bars("cost-hours", "Device-hours", rows, hours, "GPUs, or CPU cores without GPUs, times hours"))
    if any(value is not None for value in speeds):
        charts.append(_bars("cost-speed", "Images per second", rows, speeds, "median over the run"))
    return charts


def _bars(name: str, title: str, rows: Sequence[Row], values: Sequence[float | None], unit: str) -> Chart:
    from plotly.graph_objects import Figure

    places = list(range(1, len(rows) + 1))
    figure = Figure(layout=layout(x="place in the ranking", bargap=0.15, xaxis={"dtick": 1} if len(rows) <= 20 else {}))
    figure.add_bar(
        x=places,
        y=list(values),
        marker={"color": [colour_of(i) for i in range(len(rows))], "line": {"width": 0}},
        text=[drawn_text(label_of(row)) for row in rows],
        textposition="none",
        hovertemplate="%{text}<br>%{y:.4~g}<extra></extra>",
    )
    return Chart(name, title, figure, unit, height_px=240)
