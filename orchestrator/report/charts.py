"""What the report's charts have in common: form, colours, labels, and lines of a length that a page can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from orchestrator.compare import ROW, Row
from orchestrator.report.style import CARD, DARK, FAINT, FONT, INK, LINES, RULE, SOFT
from orchestrator.trials import Curve

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

AXES = {"step": "step", "epoch": "epoch", "hours": "device-hours"}
"""What curves can be drawn over, by the word that the page's script knows it by."""
MAX_POINTS = 1000
"""Of a line; a screen has no more columns for it."""
_MAX_POINTS_OF_CHART = 24_000  # of all its lines together: what a browser draws without a pause
_LABEL_CHARS = 120


@dataclass(frozen=True)
class Chart:
    """A figure and its place in the page."""

    id: str
    title: str
    figure: Figure
    unit: str = ""
    height_px: int = 300
    full_width: bool = False
    axes: Mapping[str, list[list[float | None]]] = field(default_factory=dict)
    """The x of every trace over each of `AXES`; empty where they cannot be changed."""

    def html(self) -> str:
        """Its place in the page, empty until the script draws it."""
        unit = f"<small>{escape(self.unit)}</small>" if self.unit else ""
        return (
            f"<figure{' class=all' if self.full_width else ''}><figcaption>{escape(self.title)}{unit}</figcaption>"
            f'<div class="plot" id="{self.id}" style="height:{self.height_px}px"></div></figure>'
        )


def embedded(charts: Sequence[Chart]) -> str:
    """The charts as JSON for the page's script. No text in it can end the element that it stands in."""
    content = {
        "dark": DARK,
        "axes": AXES,
        "own": len(LINES),
        "charts": [
            {
                "id": chart.id,
                "axes": chart.axes,
                **{part: value for part, value in chart.figure.to_plotly_json().items() if part in ("data", "layout")},
            }
            for chart in charts
        ],
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, default=list)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def layout(*, x: str = "", y: str = "", **more: Any) -> dict[str, Any]:
    """The form of every chart, with the titles of its axes."""
    axis = {"gridcolor": RULE, "zeroline": False, "linecolor": SOFT, "automargin": True, "tickcolor": SOFT}
    both = {
        "xaxis": axis | {"title": {"text": x, "standoff": 6}, "showgrid": False, "ticks": "outside", "showline": True},
        "yaxis": axis | {"title": {"text": y, "standoff": 6}},
    }
    for name in both:
        both[name] |= more.pop(name, {})
    return {
        "template": {},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": SOFT},
        "margin": {"l": 52, "r": 14, "t": 26, "b": 42},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": FAINT, "activecolor": SOFT},
        "hovermode": "closest",
        "showlegend": False,
        "hoverlabel": {"bgcolor": CARD, "bordercolor": SOFT, "font": {"color": INK, "family": FONT}, "align": "left"},
        **both,
        **more,
    }


def nothing_logged(figure: Figure) -> Figure:
    """The figure with words in place of data."""
    figure.add_annotation(text="nothing logged", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)


def colour_of(index: int) -> str:
    """Of the trial at a place in the ranking: its own for the first ones, the same faint one for the rest."""
    return LINES[index] if index < len(LINES) else FAINT


def label_of(row: Row) -> str:
    """A trial by its name and what it changes."""
    told = {key: value for key, value in row.params.items() if key != ROW}  # the name begins with the row
    changes = ", ".join(f"{key.removeprefix('pretrain.')} {value}" for key, value in told.items())
    label = f"{row.trial.name}: {changes}" if changes else row.trial.name
    return label if len(label) <= _LABEL_CHARS else f"{label[: _LABEL_CHARS - 4]} ..."


def drawn_text(text: str) -> str:
    """Text that plotly draws as it stands: it takes <b>, <a> and the like for marks."""
    return escape(text, quote=False)


def finite(value: float | None) -> float | None:
    """The value, or None, which leaves a gap, for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def points_per_line(num_lines: int) -> int:
    """How many points each of so many lines of a chart may have."""
    return max(50, min(MAX_POINTS, _MAX_POINTS_OF_CHART // max(num_lines, 1)))


def thin(points: Curve, limit: int) -> Curve:
    """At most `limit` points that keep the shape: both ends and, of equal shares, the lowest, the highest and a gap."""
    if len(points) <= limit:
        return points
    num_shares, inner = (limit - 2) // 3, points[1:-1]
    kept = {points[0], points[-1]}
    for i in range(num_shares):
        share = inner[i * len(inner) // num_shares : (i + 1) * len(inner) // num_shares]
        whole = [point for point in share if math.isfinite(point[1])]
        kept.update([min(whole, key=_value), max(whole, key=_value)] if whole else [])
        kept.update([point for point in share if not math.isfinite(point[1])][:1])
    return sorted(kept, key=lambda point: point[0])


def _value(point: tuple[int, float]) -> float:
    return point[1]
