"""Charts of differences and effects with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.compare import Comparison, Group
from orchestrator.effects import Analysis, Effect, Importances
from orchestrator.report.charts import Chart, drawn_text, layout
from orchestrator.report.style import BAD, GOOD, LINES, SOFT
from orchestrator.statistics import Difference
from orchestrator.tables import metric_title

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MAX_GROUPS = 40
_MAX_KEYS = 12
_MAX_PAIRS = 4
_RESOLVED = 0.05
"""p-value of an interaction from which it is drawn."""
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


def effect_charts(comparison: Comparison, analysis: Analysis) -> list[Chart]:
    """The metric at each value of each key, averaged over the other keys; then the interactions that stand out."""
    title = metric_title(comparison.metric)
    # One scale for all, so that a key that does little is seen to do little.
    ends = [end for effects in analysis.main.values() for effect in effects for end in (effect.low, effect.high)]
    margin = 0.06 * (max(ends) - min(ends)) if ends else 0.0
    scale = {"range": [min(ends) - margin, max(ends) + margin]} if margin else {}
    charts = []
    for i, (key, effects) in enumerate(list(analysis.main.items())[:_MAX_KEYS]):
        figure = _lines([("", [(effect.value, effect) for effect in effects])], title, scale)
        charts.append(Chart(f"effect-{i}", _plain(key), figure, "averaged over the other keys"))
    pairs = sorted(analysis.interactions.items(), key=lambda item: item[1].p_value)
    for i, ((one, other), found) in enumerate(pairs[:_MAX_PAIRS]):
        if found.p_value >= _RESOLVED:
            break
        seconds = dict.fromkeys(second for _, second in found.cells)
        lines = [
            (f"{_plain(other)} {value}", [(a, effect) for (a, b), effect in found.cells.items() if b == value])
            for value in seconds
        ]
        aliases = "".join(f", or {_plain(a)} with {_plain(b)}" for a, b in found.aliases)
        chart = f"{_plain(one)} with {_plain(other)}{aliases}"
        charts.append(Chart(f"interaction-{i}", chart, _lines(lines, title, {}), f"p = {found.p_value:.2g}"))
    return charts


def effect_words(analysis: Analysis) -> list[str]:
    """Why keys and pairs have no effect of their own, a sentence each."""
    return [f"{' x '.join(map(_plain, key.split(' x ')))}: {why}." for key, why in analysis.refused.items()]


def importance_chart(importances: Importances) -> Chart | None:
    """How much of the variation each key explains, by both estimates; None where they are refused."""
    from plotly.graph_objects import Figure

    if importances.reason:
        return None
    keys = sorted(importances.fanova, key=lambda key: importances.fanova[key])[-2 * _MAX_KEYS :]
    names = [drawn_text(_short(_plain(key))) for key in keys]
    figure = Figure(
        layout=layout(
            x="share", showlegend=True, bargap=0.25, yaxis={"tickvals": list(range(len(keys))), "ticktext": names}
        )
    )
    estimates = {"fANOVA": importances.fanova, "PED-ANOVA": importances.ped_anova}
    for colour, (name, shares) in zip(LINES, estimates.items(), strict=False):
        figure.add_bar(
            x=[shares.get(key) for key in keys],
            y=list(range(len(keys))),
            orientation="h",
            name=name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"{name} %{{x:.3f}}<extra></extra>",
        )
    unit = f"share of the metric's variation, from {importances.num_configurations} configurations"
    return Chart("importance", "Importance", figure, unit, height_px=110 + 34 * len(keys), full_width=True)


def _lines(lines: Sequence[tuple[str, Sequence[tuple[str, Effect]]]], title: str, scale: dict[str, Any]) -> Figure:
    """A line for each name through the effects at its values, with their intervals."""
    from plotly.graph_objects import Figure

    values = list(dict.fromkeys(value for _, effects in lines for value, _ in effects))
    ticks: dict[str, Any] = {"tickvals": list(range(len(values)))}
    ticks |= {"ticktext": [drawn_text(_short(value)) for value in values], "ticklabeloverflow": "allow"}
    form = layout(y=title, showlegend=len(lines) > 1, xaxis=ticks | {"range": [-0.5, len(values) - 0.5]}, yaxis=scale)
    figure = Figure(layout=form)
    for i, (name, effects) in enumerate(lines):
        means = [effect.mean for _, effect in effects]
        words = [f"{value}: {e.mean:.4g} [{e.low:.4g}, {e.high:.4g}], {e.num_trials} trials" for value, e in effects]
        shift = 0.06 * (i - (len(lines) - 1) / 2)  # intervals stand beside one another
        figure.add_scatter(
            x=[values.index(value) + shift for value, _ in effects],
            y=means,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [effect.high - effect.mean for _, effect in effects],
                "arrayminus": [effect.mean - effect.low for _, effect in effects],
                "thickness": 1.5,
                "width": 4,
            },
            mode="lines+markers",
            name=drawn_text(name),
            line={"color": LINES[i % len(LINES)], "width": 2},
            marker={"size": 8},
            text=[drawn_text(text) for text in words],
            hovertemplate="%{text}<extra></extra>",
        )
    return figure


def _plain(key: str) -> str:
    return key.removeprefix("pretrain.")


def _short(name: str) -> str:
    return name if len(name) <= 44 else f"{name[:40]} ..."
