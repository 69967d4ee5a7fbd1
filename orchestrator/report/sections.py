"""The report's sections in words and tables. Every word that comes from a run is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from orchestrator.compare import KNN_METRIC, Comparison, Row
from orchestrator.report.charts import label_of
from orchestrator.report.style import LINES
from orchestrator.tables import (
    PAPER,
    Table,
    configuration_table,
    html_table,
    metric_title,
    number,
    schedule_table,
    trial_table,
)
from orchestrator.trials import TrialSummary

SAVED = "cost/device_hours_saved"
_MANY = 24
"""Rows of a table from which it scrolls by itself."""
_FEW = 3
"""Trials of one verdict that are all told at once."""


def section(name: str, title: str, *parts: str) -> str:
    """A section of the page; "" if there is nothing in it."""
    content = "".join(parts)
    return f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def tiles(comparison: Comparison) -> str:
    """The four numbers to see first."""
    rows = comparison.rows
    best = rows[0]
    ended = sum(row.trial.status in ("finished", "stopped") for row in rows)
    bad = sum(row.trial.diagnosis.is_bad for row in rows)
    found = [
        (metric_title(comparison.metric), number(best.value, 2), f"best: {best.trial.name}", ""),
        ("over random weights", number(best.gain, 2, sign=True), "same backbone, same protocol", ""),
        ("trials ended", f"{ended} of {len(rows)}", "finished or stopped early", "" if ended == len(rows) else "bad"),
        ("collapsed or diverged", str(bad), "by signals that agree to the end", "bad" if bad else "good"),
    ]
    cards = (
        f'<div class="tile {kind}"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(more)}</small></div>'
        for name, value, more, kind in found
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def ranking_tables(comparison: Comparison, differences: str = "") -> list[str]:
    """The configurations, where seeds repeat them, with the chart of their differences, and the trials; each trial
    opens to what its numbers come from; of a population also the best member's schedule."""
    trials = [_ranking_table(comparison)]
    schedule = schedule_table(comparison)
    trials += [wide(html_table(schedule), len(schedule.rows))] if schedule is not None else []
    if not comparison.has_seeds:
        return trials
    configurations = html_table(configuration_table(comparison), _mark_configuration)
    return [wide(configurations, len(comparison.groups)), differences, *trials]


def _mark_configuration(_index: int, header: str, cell: str) -> str:
    if header == "verdict":
        return "tag " + {"better": "good", "worse": "bad"}.get(cell, "")
    return "name" if header in ("row", "configuration") else ""


def _ranking_table(comparison: Comparison) -> str:
    table = trial_table(comparison)
    heads = "".join(
        f"<th{' class=number' if numeric else ''}>{_breakable(header.removeprefix('pretrain.'))}</th>"
        for header, numeric in zip(table.headers, table.numeric, strict=True)
    )
    lines = "\n".join(_ranking_row(comparison, table, index) for index in range(len(table.rows)))
    caption = f"{escape(table.title)}; a name opens to the run, configuration, commit and data behind its numbers"
    return wide(
        f"<table>\n<caption>{caption}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>",
        len(table.rows),
    )


def _ranking_row(comparison: Comparison, table: Table, index: int) -> str:
    row = comparison.rows[index]
    cells = []
    for header, numeric, cell in zip(table.headers, table.numeric, table.rows[index], strict=True):
        classes = " ".join(filter(None, ["number" if numeric else "", _mark(comparison, index, header, cell)]))
        text = escape(cell)
        if header == "trial":
            text = f'<button type="button" aria-expanded="false" aria-controls="more-{index}">{text}</button>'
        cells.append(f'<td class="{classes}">{text}</td>' if classes else f"<td>{text}</td>")
    facts = provenance(row)
    told = "\n".join(f"{name}: {value}" for name, value in facts.items() if name != "record")
    more = "".join(f"<dt>{escape(name)}</dt><dd>{_linked(value)}</dd>" for name, value in facts.items())
    return (
        f'<tr title="{escape(told)}">{"".join(cells)}</tr>\n'
        f'<tr class="more" id="more-{index}" hidden><td colspan="{len(cells)}"><dl class="facts">{more}</dl></td></tr>'
    )


def provenance(row: Row) -> dict[str, str]:
    """What stands behind the numbers of a trial, in words."""
    trial = row.trial
    facts = {
        "run": trial.run_id,
        "measured at": f"step {row.step:,}" if row.step is not None else "",
        "seed": "" if trial.seed is None else str(trial.seed),
        "configuration": ", ".join(f"{key} = {value}" for key, value in row.params.items()),
        "commit": trial.git_commit or "",
        "data": trial.data_digest or "",
        "experiment": trial.experiment,
        "record": trial.uri,
    }
    return {name: value or "not recorded" for name, value in facts.items()}


def _breakable(key: str) -> str:
    return escape(key).replace(".", ".<wbr>")


def _linked(value: str) -> str:
    if value.startswith(("http://", "https://")):
        return f'<a href="{escape(value)}" rel="noreferrer">{escape(value)}</a>'
    return f"<code>{escape(value)}</code>"


def _mark(comparison: Comparison, index: int, header: str, cell: str) -> str:
    if header == "#":
        return key_class(index)
    if header == "trial":
        return "name"
    if header == "health":
        return "tag " + ("good" if cell == "healthy" else "" if cell == "unknown" else "bad")
    if header == "status":
        return "tag " + ("bad" if cell in ("failed", "interrupted") else "")
    if header.startswith(PAPER):
        return "paper"
    return "main" if header == metric_title(comparison.metric) else ""


def key_class(index: int) -> str:
    """Classes of the coloured square of the trial at a place in the ranking; beyond the first ones all have one."""
    return f"key s{index}" if index < len(LINES) else "key"


def wide(table: str, num_rows: int = 0) -> str:
    """A table that scrolls by itself where it is wider than the page, or long."""
    return f'<div class="wide{" tall" if num_rows > _MANY else ""}">{table}</div>'


def legend(comparison: Comparison) -> str:
    """The trials that have a colour; a click on one hides its lines."""
    rows = comparison.rows
    items = "".join(
        f'<li><button type="button" class="{key_class(i)}" aria-pressed="true" data-trial="{i}">'
        f"{escape(label_of(row))}</button></li>"
        for i, row in enumerate(rows[: len(LINES)])
    )
    rest = len(rows) - len(LINES)
    more = f'<li class="key">{rest} more trials, by name under the pointer</li>' if rest > 0 else ""
    return f'<ul class="legend">{items}{more}</ul>'


def axis_switch(axes: Sequence[str], names: Mapping[str, str]) -> str:
    """Buttons for what curves are drawn over; none where there is no choice."""
    if len(axes) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-axis="{axis}" aria-pressed="{"true" if axis == "step" else "false"}">'
        f"{escape(names[axis])}</button>"
        for axis in axes
    )
    return f'<div class="switch" role="group" aria-label="horizontal axis">{buttons}</div>'


def diagnoses(comparison: Comparison) -> str:
    """What collapsed or diverged, on what evidence, and the likely cause, told once of the trials that share it."""
    by_cause: dict[tuple[str, str], list[TrialSummary]] = {}
    for trial in (row.trial for row in comparison.rows if row.trial.diagnosis.is_bad):
        by_cause.setdefault((trial.diagnosis.verdict, trial.diagnosis.cause), []).append(trial)
    parts = []
    for (verdict, cause), trials in by_cause.items():
        lines = "".join(
            f'<dt>{escape(trial.name)}: <span class="bad">{escape(verdict)}</span> from step '
            f"{trial.diagnosis.step}</dt><dd>{escape('; '.join(trial.diagnosis.evidence))}.</dd>"
            for trial in trials
        )
        if len(trials) > _FEW:
            lines = (
                f'<dt><span class="bad">{escape(verdict)}</span>: {len(trials)} trials</dt>'
                f"<dd><details><summary>which, and why</summary><dl>{lines}</dl></details></dd>"
            )
        parts.append(f"{lines}<dd>Likely cause: {escape(cause)}.</dd>")
    return f"<dl>{''.join(parts)}</dl>" if parts else ""


def failures(comparison: Comparison) -> str:
    """Why trials failed or were interrupted."""
    return section("failures", "What went wrong", _reasons(comparison, lambda trial: trial.status != "stopped"))


def refusals(sentences: Sequence[str]) -> str:
    """What these trials cannot tell, and why."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<details><summary>What these trials cannot tell</summary><ul>{items}</ul></details>" if items else ""


def early_stops(comparison: Comparison) -> str:
    """Why trials were stopped early."""
    found = _reasons(comparison, lambda trial: trial.status == "stopped")
    saved = [hours for row in comparison.rows if (hours := row.trial.last(SAVED)) is not None]
    words = (
        f"<p>About {sum(saved):.3g} device-hours were saved by ending {len(saved)} trials early.</p>" if saved else ""
    )
    return f"<h3>Stopped early</h3>{words}{found}" if found else ""


def _reasons(comparison: Comparison, wanted: Callable[[TrialSummary], bool]) -> str:
    trials = [row.trial for row in comparison.rows if row.trial.reason and wanted(row.trial)]
    items = "".join(f"<dt>{escape(trial.name)}</dt><dd><pre>{escape(trial.reason)}</pre></dd>" for trial in trials)
    return f"<dl>{items}</dl>" if items else ""


def baselines(comparison: Comparison, values: Mapping[str, float]) -> str:
    """The best trial beside what was not learned."""
    best = comparison.rows[0]
    bars = [(name, value, "") for name, value in values.items() if math.isfinite(value)]
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
    return section("baselines", "Beside baselines", f'<table class="bars"><caption>{title}</caption>{rows}</table>')


def parameters(comparison: Comparison) -> str:
    """The settings that differ, a row for each trial, and those that all share."""
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
        heads = "".join(f"<th class='number'>{_breakable(key)}</th>" for key, _ in differing)
        lines = "".join(
            f'<tr><td class="name">{escape(trial.name)}</td>'
            + "".join(f'<td class="number">{escape(values[i])}</td>' for _, values in differing)
            + "</tr>"
            for i, trial in enumerate(trials)
        )
        table = f"<table><caption>What differs</caption><thead><tr><th>trial</th>{heads}</tr></thead>{lines}</table>"
        parts.append(wide(table, len(trials)))
    if shared:
        lines = "".join(
            f"<tr><td><code>{escape(key)}</code></td><td>{escape(value)}</td></tr>" for key, value in shared
        )
        summary = f"The {len(shared)} that all trials share"
        parts.append(f"<details><summary>{summary}</summary>{wide(f'<table>{lines}</table>')}</details>")
    return section("parameters", "Parameters", *parts)


def commands(lines: Mapping[str, str]) -> str:
    """What to type next, by what it does."""
    items = "".join(f"<dt>{escape(what)}</dt><dd><pre>{escape(line)}</pre></dd>" for what, line in lines.items())
    return section("next", "Next", f"<dl>{items}</dl>" if items else "")
