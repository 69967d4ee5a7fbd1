"""The report of a comparison: one HTML file that needs nothing else, not even a network.

Every word that comes from a run is escaped, and the page forbids itself scripts and requests.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from dino_core.diagnosis import ONE_HOT_SHARE, UNIFORM_SHARE
from orchestrator.charts import NUM_COLOURS, Band, Level, Line, line_chart
from orchestrator.compare import KNN_METRIC, ROW, Comparison, Row
from orchestrator.tables import PAPER, configuration_table, html_table, metric_title, number, trial_table
from orchestrator.trials import TrialSummary

SMOKE_TEST = (
    "The digits are a smoke test, not a benchmark: raw pixels are nearly perfect on them. "
    "What counts here is the distance from random weights and that no trial collapsed."
)
RANK = "train/feature_rank"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


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
        notes: sentences to read before the numbers; that digits are a smoke test and what the paper's numbers are is
            added here.
        commands: what to type next, by what it does.
    """
    baselines = baselines or {}
    digits = any(row.trial.params.get("data.source") == "digits" for row in comparison.rows)
    paper = [comparison.paper_note] if comparison.paper_note else []
    notes = list(dict.fromkeys([*([SMOKE_TEST] if digits else []), *paper, *notes]))
    sections = [
        f"<header><h1>{escape(title)}</h1>{_tiles(comparison)}</header>",
        "".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        _ranking(comparison),
        _diagnoses(comparison),
        _failures(comparison),
        _baselines(comparison, baselines),
        _curves(comparison, baselines),
        _parameters(comparison),
        _commands(commands or {}),
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M %Z')}.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _tiles(comparison: Comparison) -> str:
    rows = comparison.rows
    best = rows[0]
    ended = sum(row.trial.status in ("finished", "stopped") for row in rows)
    bad = sum(row.trial.diagnosis.is_bad for row in rows)
    tiles = [
        (metric_title(comparison.metric), number(best.value, 2), f"best: {best.trial.name}", ""),
        ("over random weights", number(best.gain, 2, sign=True), "same backbone, same protocol", ""),
        ("trials ended", f"{ended} of {len(rows)}", "finished or stopped early", "" if ended == len(rows) else "bad"),
        ("collapsed or diverged", str(bad), "by signals that agree to the end", "bad" if bad else "good"),
    ]
    cards = (
        f'<div class="tile {kind}"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(more)}</small></div>'
        for name, value, more, kind in tiles
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def _ranking(comparison: Comparison) -> str:
    def mark(index: int, header: str, cell: str) -> str:
        if header == "#":
            return _key(index)
        if header == "health":
            return "tag " + ("good" if cell == "healthy" else "" if cell == "unknown" else "bad")
        if header == "status":
            return "tag " + ("bad" if cell in ("failed", "interrupted") else "")
        if header.startswith(PAPER):
            return "paper"
        return "main" if header == metric_title(comparison.metric) else ""

    parts = [_wide(html_table(trial_table(comparison), mark))]
    if comparison.has_seeds:
        parts.insert(0, _wide(html_table(configuration_table(comparison))))
    return "<section><h2>Ranking</h2>" + "".join(parts) + "</section>"


def _key(index: int) -> str:
    """Classes of the coloured square of the trial at a place in the ranking; colours repeat with another square."""
    return f"key s{index % NUM_COLOURS}" + (" again" if index >= NUM_COLOURS else "")


def _wide(table: str) -> str:
    return f'<div class="wide">{table}</div>'


def _diagnoses(comparison: Comparison) -> str:
    items = "".join(_diagnosis(row.trial) for row in comparison.rows if row.trial.diagnosis.is_bad)
    return f"<section><h2>Collapsed or diverged</h2><dl>{items}</dl></section>" if items else ""


def _diagnosis(trial: TrialSummary) -> str:
    found = trial.diagnosis
    evidence = "; ".join(found.evidence)
    return (
        f'<dt>{escape(trial.name)}: <span class="bad">{found.verdict}</span> from step {found.step}</dt>'
        f"<dd>{escape(evidence)}.</dd><dd>Likely cause: {escape(found.cause)}.</dd>"
    )


def _failures(comparison: Comparison) -> str:
    failed = [row.trial for row in comparison.rows if row.trial.reason]
    if not failed:
        return ""
    items = "".join(f"<dt>{escape(trial.name)}</dt><dd><pre>{escape(trial.reason)}</pre></dd>" for trial in failed)
    return f"<section><h2>What went wrong</h2><dl>{items}</dl></section>"


def _baselines(comparison: Comparison, baselines: Mapping[str, float]) -> str:
    best = comparison.rows[0]
    bars = [(name, value, "") for name, value in baselines.items() if math.isfinite(value)]
    if not bars:
        return ""
    if best.value is not None:
        bars.append((f"best trial: {best.trial.name}", best.value, "s0"))
    bars.sort(key=lambda bar: bar[1], reverse=comparison.mode == "max")
    top = max(100.0 if comparison.metric == KNN_METRIC else 0.0, *(value for _, value, _ in bars))
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{value:.2f}</td>'
        f'<td class="bar"><i class="{kind}" style="width:{max(0.0, 100 * value / (top or 1)):.1f}%"></i></td></tr>'
        for name, value, kind in bars
    )
    title = escape(metric_title(comparison.metric))
    return f'<section><h2>Beside baselines</h2><table class="bars"><caption>{title}</caption>{rows}</table></section>'


def _curves(comparison: Comparison, baselines: Mapping[str, float]) -> str:
    rows = comparison.rows
    levels = [Level(name, value) for name, value in baselines.items() if math.isfinite(value)]
    bands = [
        Band("uniform collapse", UNIFORM_SHARE, 1.0),
        Band("one-hot collapse, where few prototypes are in use", 0.0, ONE_HOT_SHARE),
    ]
    charts = [
        line_chart(metric_title(comparison.metric), _lines(rows, comparison.metric), levels=levels),
        line_chart("Loss", _lines(rows, "train/loss"), unit="nats"),
        line_chart("Teacher entropy", _entropy(rows), unit="share of ln K", bands=bands, y_range=(0.0, 1.02)),
        line_chart("Throughput", _lines(rows, "train/images_per_s"), unit="images/s", from_zero=True),
    ]
    if any(RANK in row.trial.curves for row in rows):
        charts.append(line_chart("Rank of the features", _lines(rows, RANK), unit="directions", from_zero=True))
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts)
    return f'<section><h2>Curves</h2>{_legend(rows)}<div class="charts">{figures}</div></section>'


def _label(row: Row) -> str:
    told = {key: value for key, value in row.params.items() if key != ROW}  # the name begins with the row
    changes = ", ".join(f"{key.removeprefix('pretrain.')} {value}" for key, value in told.items())
    return f"{row.trial.name}: {changes}" if changes else row.trial.name


def _lines(rows: Sequence[Row], metric: str) -> list[Line]:
    return [Line(_label(row), row.trial.curves.get(metric, []), i) for i, row in enumerate(rows)]


def _entropy(rows: Sequence[Row]) -> list[Line]:
    return [Line(_label(row), row.trial.entropy_shares, i) for i, row in enumerate(rows)]


def _legend(rows: Sequence[Row]) -> str:
    items = "".join(f'<li class="{_key(i)}">{escape(_label(row))}</li>' for i, row in enumerate(rows))
    return f'<ul class="legend">{items}</ul>'


def _parameters(comparison: Comparison) -> str:
    trials = [row.trial for row in comparison.rows]
    keys = sorted({key for trial in trials for key in trial.params if not key.startswith("paper/")})
    shared, differing = [], []
    for key in keys:
        values = [trial.params.get(key, "-") for trial in trials]
        if len(set(values)) == 1:
            shared.append((key, values[0]))
        else:
            differing.append((key, values))
    parts = []
    if differing:
        names = "".join(f"<th class='number'>{escape(trial.name)}</th>" for trial in trials)
        lines = "".join(
            f"<tr><td><code>{escape(key)}</code></td>"
            + "".join(f'<td class="number">{escape(value)}</td>' for value in values)
            + "</tr>"
            for key, values in differing
        )
        table = f"<table><caption>What differs</caption><thead><tr><th>key</th>{names}</tr></thead>{lines}</table>"
        parts.append(_wide(table))
    if shared:
        lines = "".join(
            f"<tr><td><code>{escape(key)}</code></td><td>{escape(value)}</td></tr>" for key, value in shared
        )
        summary = f"The {len(shared)} that all trials share"
        parts.append(f"<details><summary>{summary}</summary>{_wide(f'<table>{lines}</table>')}</details>")
    return f"<section><h2>Parameters</h2>{''.join(parts)}</section>" if parts else ""


def _commands(commands: Mapping[str, str]) -> str:
    if not commands:
        return ""
    items = "".join(f"<dt>{escape(what)}</dt><dd><pre>{escape(line)}</pre></dd>" for what, line in commands.items())
    return f"<section><h2>Next</h2><dl>{items}</dl></section>"


_LIGHT = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#dc2626", "#65a30d", "#92400e", "#64748b")
_DARK = ("#60a5fa", "#fbbf24", "#34d399", "#f472b6", "#a78bfa", "#22d3ee", "#f87171", "#a3e635", "#d6a06b", "#94a3b8")


def _variables(colours: Sequence[str], **more: str) -> str:
    named = {f"s{i}": colour for i, colour in enumerate(colours)} | more
    return ":root{" + "".join(f"--{name}:{value};" for name, value in named.items()) + "}"


_STYLE = (
    _variables(
        _LIGHT,
        page="#f7f8fa",
        card="#fff",
        ink="#1a202c",
        soft="#5b6675",
        rule="#e3e7ee",
        good="#047857",
        bad="#b91c1c",
        warn="#fff7e6",
        edge="#f0b429",
    )
    + "@media (prefers-color-scheme:dark){"
    + _variables(
        _DARK,
        page="#10141b",
        card="#181e28",
        ink="#e6eaf0",
        soft="#98a4b5",
        rule="#2a3342",
        good="#34d399",
        bad="#f87171",
        warn="#2a2413",
        edge="#b7791f",
    )
    + "}"
    + "".join(f".s{i}{{--own:var(--s{i})}}" for i in range(NUM_COLOURS))
    + """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 24px 48px;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
h1{margin:0 0 18px;font-size:26px;line-height:1.25;overflow-wrap:anywhere}
h2{margin:0 0 12px;font-size:17px}
section{margin-top:22px;padding:20px 22px;background:var(--card);border:1px solid var(--rule);border-radius:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px}
.tile{padding:14px 18px;background:var(--card);border:1px solid var(--rule);border-radius:12px}
.tile span,.tile small{display:block;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.tile b{display:block;font-size:27px;line-height:1.3;font-variant-numeric:tabular-nums}
.tile.good b,.good{color:var(--good)} .tile.bad b,.bad{color:var(--bad)}
.note{margin:18px 0 0;padding:11px 16px;background:var(--warn);border-left:4px solid var(--edge);border-radius:6px}
.wide{overflow-x:auto} .wide+.wide,.wide+details{margin-top:18px}
table{border-collapse:collapse;width:100%;font-size:14px}
caption{padding:0 0 6px;text-align:left;color:var(--soft);font-size:13px}
th,td{padding:7px 9px;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600;font-size:13px;vertical-align:bottom}
th:first-child,td:first-child{padding-left:0} th:last-child,td:last-child{padding-right:0}
tr:last-child>td{border-bottom:0}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th.number{white-space:normal} td:nth-child(2){white-space:nowrap}
td.main{font-weight:700} td.paper{color:var(--soft)} td.tag{white-space:nowrap}
td.key{white-space:nowrap}
.key::before{content:"";display:inline-block;width:11px;height:11px;margin-right:7px;border-radius:3px;
 background:var(--own)}
.again::before{width:5px;height:5px;background:none;border:3px solid var(--own)}
.bars{width:100%} .bars td:first-child{white-space:nowrap} .bars .bar{width:70%;padding:10px 0 0}
.bar i{display:block;height:13px;border-radius:4px;background:var(--own,var(--soft));min-width:2px}
.legend{display:flex;flex-wrap:wrap;gap:4px 22px;margin:0 0 10px;padding:0;list-style:none;font-size:13px}
.legend li{overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:14px 22px}
figure{margin:0} svg{display:block;width:100%;height:auto;font:12px system-ui,sans-serif;overflow:visible}
svg .title{fill:var(--ink);font-size:14px;font-weight:600} svg .ink{fill:var(--soft)}
svg .halo{stroke:var(--card);stroke-width:4px;paint-order:stroke}
svg .grid{stroke:var(--rule)} svg .axis{stroke:var(--soft)}
svg .level{stroke:var(--soft);stroke-dasharray:4 4} svg .band{fill:var(--bad);opacity:.16}
svg .line polyline{fill:none;stroke:var(--own);stroke-width:2;stroke-linejoin:round}
svg .line:hover polyline{stroke-width:4} svg .dot{fill:var(--own)} svg .spot{fill:transparent}
details summary{cursor:pointer;color:var(--soft)} details[open] summary{margin-bottom:8px}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{margin:0;padding:9px 13px;overflow-x:auto;background:var(--page);border:1px solid var(--rule);border-radius:8px;
 user-select:all}
dl{margin:0} dt{margin-top:10px;color:var(--soft)} dt:first-child{margin-top:0} dd{margin:4px 0 0}
footer{margin-top:20px;color:var(--soft);font-size:13px}
@media print{body{max-width:none} section{break-inside:avoid}}
"""
)
