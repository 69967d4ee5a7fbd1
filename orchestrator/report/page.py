"""The report of a comparison: one HTML file that needs nothing else, not even a network.

It holds plotly.js and a script of its own (`script.py`), and forbids itself, by their digests, any other script, and
every request.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from orchestrator.compare import Comparison
from orchestrator.effects import analyse, importance
from orchestrator.report import sections
from orchestrator.report.analysis import collapse_timeline, cost_charts, parallel_coordinates, regret_charts
from orchestrator.report.charts import AXES, MAX_POINTS, Chart, embedded, points_per_line
from orchestrator.report.curves import axes_of, curve_charts
from orchestrator.report.effects import difference_chart, effect_charts, effect_words, importance_chart
from orchestrator.report.pictures import gallery
from orchestrator.report.script import SCRIPT
from orchestrator.report.style import STYLE

SMOKE_TEST = (
    "The digits are a smoke test, not a benchmark: raw pixels are nearly perfect on them. "
    "What counts here is the distance from random weights and that no trial collapsed."
)


def write_report(
    path: Path,
    comparison: Comparison,
    *,
    title: str,
    baselines: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    commands: Mapping[str, str] | None = None,
) -> Path:
    """Write `render_report` to `path`, whole or not at all, and return the path."""
    page = render_report(comparison, title=title, baselines=baselines, notes=notes, commands=commands)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def render_report(
    comparison: Comparison,
    *,
    title: str,
    baselines: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    commands: Mapping[str, str] | None = None,
) -> str:
    """The page as text.

    Args:
        baselines: the metric of what was not learned (random weights, raw pixels), by name.
        notes: sentences to read before the numbers; that digits are a smoke test, and the comparison's own notes, are
            added here.
        commands: what to type next, by what it does.
    """
    baselines = baselines or {}
    digits = any(row.trial.params.get("data.source") == "digits" for row in comparison.rows)
    notes = list(dict.fromkeys([*([SMOKE_TEST] if digits else []), *comparison.notes, *notes]))
    charts: list[Chart] = []
    found = [
        _ranking(comparison, charts),
        _collapse(comparison, charts),
        sections.failures(comparison),
        sections.baselines(comparison, baselines),
        _curves(comparison, baselines, charts),
        _effects(comparison, charts),
        _choice(comparison, charts),
        gallery(comparison),
        _cost(comparison, charts),
        sections.parameters(comparison),
        sections.commands(commands or {}),
    ]
    body = [
        f"<header><h1>{escape(title)}</h1>{sections.tiles(comparison)}{_contents(found)}</header>",
        "".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        "<noscript><p class=note>The charts of this page are drawn by its own scripts.</p></noscript>",
        *found,
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M %Z')}. {_about_lines(comparison)}</footer>",
    ]
    return _document(title, "\n".join(part for part in body if part), charts)


def _document(title: str, body: str, charts: Sequence[Chart]) -> str:
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), SCRIPT]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    # Plotly writes styles into the page and makes pictures of charts that the reader saves.
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    library, own = (f"<script>{script}</script>" for script in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="figures">{embedded(charts)}</script>\n'
        f"{library}\n{own}\n</body>\n</html>\n"
    )


def _digest(script: str) -> str:
    """SHA-256 as a Content-Security-Policy names a script. A browser takes it of the text between the marks."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _contents(parts: Sequence[str]) -> str:
    names = [found.groups() for part in parts if (found := re.match(r'<section id="([a-z]+)"><h2>([^<]+)</h2>', part))]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in names)
    return f"<nav>{links}</nav>"


def _placed(found: Sequence[Chart], charts: list[Chart]) -> str:
    """The places of some charts in the page; notes them among those to be drawn."""
    charts += found
    return f'<div class="charts">{"".join(chart.html() for chart in found)}</div>' if found else ""


def _ranking(comparison: Comparison, charts: list[Chart]) -> str:
    differences = difference_chart(comparison)
    placed = _placed([differences] if differences else [], charts)
    return sections.section("ranking", "Ranking", *sections.ranking_tables(comparison, placed))


def _collapse(comparison: Comparison, charts: list[Chart]) -> str:
    words, timeline = sections.diagnoses(comparison), collapse_timeline(comparison)
    title = "Collapsed or diverged" if words else "Collapse"
    return sections.section("collapse", title, words, _placed([timeline] if timeline else [], charts))


def _curves(comparison: Comparison, baselines: Mapping[str, float], charts: list[Chart]) -> str:
    switch = sections.axis_switch(axes_of(comparison), AXES)
    placed = _placed(curve_charts(comparison, baselines), charts)
    return sections.section("curves", "Curves", switch, sections.legend(comparison), placed)


def _effects(comparison: Comparison, charts: list[Chart]) -> str:
    if len(comparison.groups) < 2:
        return ""
    analysis, importances = analyse(comparison), importance(comparison)
    coordinates, shares = parallel_coordinates(comparison), importance_chart(importances)
    found = [chart for chart in (coordinates, *effect_charts(comparison, analysis), shares) if chart is not None]
    refused = effect_words(analysis)
    refused += [f"Importance: {importances.reason}."] if importances.reason and found else []
    return sections.section("effects", "What the parameters do", _placed(found, charts), sections.refusals(refused))


def _choice(comparison: Comparison, charts: list[Chart]) -> str:
    return sections.section("choice", "Choosing without labels", _placed(regret_charts(comparison), charts))


def _cost(comparison: Comparison, charts: list[Chart]) -> str:
    placed = _placed(cost_charts(comparison), charts)
    return sections.section("cost", "Cost", placed, sections.early_stops(comparison))


def _about_lines(comparison: Comparison) -> str:
    limit = points_per_line(len(comparison.rows))
    longest = max((len(curve) for row in comparison.rows for curve in row.trial.curves.values()), default=0)
    if longest <= limit:
        return "Lines are drawn with all their points."
    why = "" if limit == MAX_POINTS else ", as there are many of them"
    return (
        f"Lines have {limit:,} points at most{why}: both ends and, of equal shares of the rest, the lowest and highest."
    )
