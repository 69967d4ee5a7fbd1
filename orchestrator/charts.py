"""Line charts as inline SVG: no script, no file and no request beside the page they stand in.

Colours are classes (`s0` to `s9`, `ink`, `grid`, `band`, `level`, ...) that the page's style sheet defines, so a chart
follows the page from light to dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.trials import Curve

NUM_COLOURS = 10
_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 34, 40
_MAX_POINTS = 400  # of a line; more cannot be told apart on the page
_MAX_MARKERS = 40


@dataclass(frozen=True)
class Line:
    """One trial's curve."""

    label: str
    points: Curve
    style: int
    """Position among the trials: gives colour and, beyond the tenth, dashes."""


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    label: str
    value: float


@dataclass(frozen=True)
class Band:
    """A range of values to stay out of."""

    label: str
    low: float
    high: float


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    levels: Sequence[Level] = (),
    bands: Sequence[Band] = (),
    y_range: tuple[float, float] | None = None,
    from_zero: bool = False,
) -> str:
    """An SVG element; values that are not finite leave a gap. All text is escaped."""
    finite = [(step, value) for line in lines for step, value in line.points if math.isfinite(value)]
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
    parts = [head, f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>']
    if not finite:
        parts.append(f'<text class="ink" x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">nothing logged</text>')
        return "".join([*parts, "</svg>"])
    values = [value for _, value in finite] + [level.value for level in levels] + ([0.0] if from_zero else [])
    low, high = y_range or _padded(values)
    last = max(step for step, _ in finite) or 1
    x = _scale(0, last, _LEFT, _WIDTH - _RIGHT)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts += [_band(band, y) for band in bands]
    parts += _axes(x, y, ticks(0, last), ticks(low, high), unit)
    parts += [_level(level, y) for level in levels]
    parts += [_line(line, x, y, unit) for line in reversed(lines)]  # the first ends on top
    return "".join([*parts, "</svg>"])


Scale = Callable[[float], float]


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _padded(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return (0.0 if 0 <= low < margin else low - margin), high + margin


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], about as many as asked."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, end = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, end + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _axes(x: Scale, y: Scale, x_ticks: list[float], y_ticks: list[float], unit: str) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text class="ink" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in x_ticks:
        parts.append(f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(
            f'<text class="ink" x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="ink" x="{right}" y="{_HEIGHT - 6}" text-anchor="end">step</text>')
    if unit:
        parts.append(f'<text class="ink" x="{right}" y="18" text-anchor="end">{escape(unit)}</text>')
    return parts


def _band(band: Band, y: Scale) -> str:
    top, bottom = y(band.high), y(band.low)
    return (
        f'<rect class="band" x="{_LEFT}" width="{_WIDTH - _LEFT - _RIGHT}" y="{top:.1f}" '
        f'height="{max(bottom - top, 2):.1f}"><title>{escape(band.label)}</title></rect>'
    )


def _level(level: Level, y: Scale) -> str:
    place, right = y(level.value), _WIDTH - _RIGHT
    label = f"{level.label} {_number(level.value)}"
    return (
        f'<line class="level" x1="{_LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>'
        f'<text class="ink halo" x="{right}" y="{place - 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _line(line: Line, x: Scale, y: Scale, unit: str) -> str:
    points = thin(line.points, _MAX_POINTS)
    dashes = line.style // NUM_COLOURS
    dash = f' stroke-dasharray="{8 - 2 * (dashes % 3)} {2 + dashes}"' if dashes else ""
    parts = [f'<g class="line s{line.style % NUM_COLOURS}"><title>{escape(line.label)}</title>']
    for segment in _segments(points):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in segment)
        parts.append(f'<polyline points="{path}"{dash}/>')
    for step, value in _markers(points):
        name = f"{line.label}\nstep {step:,}: {_number(value)} {unit}".rstrip()
        kind = "dot" if len(points) <= _MAX_MARKERS else "spot"
        parts.append(f'<circle class="{kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="{3 if kind == "dot" else 6}">')
        parts.append(f"<title>{escape(name)}</title></circle>")
    return "".join([*parts, "</g>"])


def _segments(points: Curve) -> list[Curve]:
    segments: list[Curve] = [[]]
    for step, value in points:
        if math.isfinite(value):
            segments[-1].append((step, value))
        elif segments[-1]:
            segments.append([])
    return [segment for segment in segments if segment]


def _markers(points: Curve) -> Curve:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    every = -(-len(finite) // _MAX_MARKERS)
    return [*finite[: -1 : every or 1], *finite[-1:]]


def thin(points: Curve, limit: int) -> Curve:
    """At most `limit` points that keep the shape: both ends and, of equal shares, the lowest, the highest and a gap."""
    if len(points) <= limit:
        return points
    num_shares, inner = (limit - 2) // 3, points[1:-1]
    kept = {points[0], points[-1]}
    for i in range(num_shares):
        share = inner[i * len(inner) // num_shares : (i + 1) * len(inner) // num_shares]
        finite = [point for point in share if math.isfinite(point[1])]
        kept.update([min(finite, key=_value), max(finite, key=_value)] if finite else [])
        kept.update([point for point in share if not math.isfinite(point[1])][:1])
    return sorted(kept, key=lambda point: point[0])


def _value(point: tuple[int, float]) -> float:
    return point[1]
