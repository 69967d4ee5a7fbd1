"""Charts of differences and effects with their intervals."""

from __future__ import annotations

from orchestrator.compare import Comparison, Group
from orchestrator.report.charts import Chart, drawn_text, layout
from orchestrator.report.style import BAD, GOOD, SOFT
from orchestrator.statistics import Difference
from orchestrator.tables import metric_title

_MAX_GROUPS = 40
_COLOURS = {"better": GOOD, "worse": BAD, "not resolved": SOFT}


def difference_chart(comparison: Comparison) -> Chart | None:
    """Each configuration's difference from the reference, with its interval and verdict; None where none has one."""
    from plotly.graph_objects import Figure

    found: list[tuple[Group, Difference, float]] = []
    for group in comparison.groups:
        apart = group.difference
        if apart is not None and apart.mean is not None and apart.low is not None:
            found.append((group, apart, apart.mean))
    if not found or comparison.reference is None:
        return None
    shown = found[:_MAX_GROUPS]
    places = list(range(len(shown)))
    figure = Figure(
        layout=layout(
            x=f"{metric_title(comparison.metric)}, difference",
            yaxis={
                "autorange": "reversed",
                "tickvals": places,
                "ticktext": [drawn_text(_short(group.name)) for group, _, _ in shown],
                "showgrid": False,
            },
        )
    )
    figure.add_vline(x=0, line={"color": SOFT, "width": 1})
    for verdict, colour in _COLOURS.items():
        part = [(place, *shown[place]) for place in places if shown[place][1].verdict == verdict]
        figure.add_scatter(
            x=[mean for _, _, _, mean in part],
            y=[place for place, _, _, _ in part],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [(apart.high if apart.high is not None else mean) - mean for _, _, apart, mean in part],
                "arrayminus": [mean - (apart.low if apart.low is not None else mean) for _, _, apart, mean in part],
                "thickness": 2,
                "width": 4,
            },
            mode="markers",
            marker={"size": 9, "color": colour},
            text=[drawn_text(_words(group, apart)) for _, group, apart, _ in part],
            hovertemplate="%{text}<extra></extra>",
        )
    left_out = len(found) - len(shown)
    unit = f"from {comparison.reference.name}, with intervals that hold for all together"
    unit += f"; {left_out} more are left out" if left_out else ""
    height = 90 + 26 * len(shown)
    return Chart("differences", "Differences", figure, unit, height_px=max(height, 160), full_width=True)


def _words(group: Group, apart: Difference) -> str:
    words = f"{group.name}: {apart.mean:+.2f} [{apart.low:+.2f}, {apart.high:+.2f}], {apart.verdict}"
    needed = f"; {apart.seeds_needed} seeds would resolve it" if apart.seeds_needed is not None else ""
    return f"{words} over {apart.num_seeds} seeds{needed}"


def _short(name: str) -> str:
    return name if len(name) <= 44 else f"{name[:40]} ..."
