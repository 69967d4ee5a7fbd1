"""A comparison as text: tables for a terminal, Markdown, LaTeX, CSV and HTML."""

from __future__ import annotations

import csv
import html
import io
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from orchestrator.compare import KNN_METRIC, ROW, Comparison, Group, Row
from orchestrator.lineage import in_words
from orchestrator.regret import LABEL_FREE, Regret, regrets
from orchestrator.statistics import Difference
from orchestrator.trials import SEED_KEY, TrialSummary

if TYPE_CHECKING:
    from rich.table import Table as RichTable

T = TypeVar("T")
Format = Literal["table", "markdown", "latex", "csv", "html"]

PAPER = "paper"
"""Title of the column of the paper's numbers."""

_TITLES = {
    KNN_METRIC: "k-NN %",
    "eval/linear_top1": "linear %",
    "cost/device_hours": "GPU-hours or core-hours",
    "cost/hours": "hours",
    "cost/gpu_memory_gb": "GB per GPU",
}


@dataclass(frozen=True)
class Table:
    """A comparison as text, for any renderer."""

    title: str
    headers: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(comparison: Comparison) -> list[Table]:
    """The ranked trials; before them, when they were repeated with other seeds, the configurations; behind them, where
    both exist, what choosing by a score without labels would have lost. Of a population also how its best member's
    settings changed."""
    found = [configuration_table(comparison)] if comparison.has_seeds else []
    found.append(trial_table(comparison))
    schedule = schedule_table(comparison)
    found += [schedule] if schedule is not None else []
    regret = regret_table(comparison)
    return [*found, regret] if regret.rows else found


def trial_table(comparison: Comparison) -> Table:
    with_seed = len({row.trial.seed for row in comparison.rows}) > 1
    columns: list[tuple[str, bool, Callable[[Row], str]]] = [
        ("#", True, lambda row: number(row.rank, 0)),
        ("trial", False, lambda row: row.trial.name),
        # A trial's name begins with its row.
        *((key, True, lambda row, key=key: row.params[key] or "-") for key in comparison.keys if key != ROW),
        *([("seed", True, lambda row: number(row.trial.seed, 0))] if with_seed else []),
        (metric_title(comparison.metric), True, lambda row: number(row.value, 2)),
        *_paper_columns(comparison),
        ("vs random", True, lambda row: number(row.gain, 2, sign=True)),
        ("loss", True, lambda row: number(row.trial.last("train/loss"), 3)),
        ("entropy / ln K", True, lambda row: number(row.trial.entropy_share, 3)),
        ("health", False, lambda row: row.trial.health),
        ("status", False, lambda row: row.trial.status),
        ("step", True, lambda row: number(row.trial.last_step, 0)),
        ("images/s", True, lambda row: number(row.trial.images_per_s, 0)),
        *([("weights from", False, lambda row: in_words(row.trial) or "-")] if comparison.has_members else []),
    ]
    return _table("Trials", columns, comparison.rows)


def schedule_table(comparison: Comparison) -> Table | None:
    """The settings of the best member of a population, generation by generation; None where no trial has several."""
    best = next((row.trial for row in comparison.rows if row.trial.lineage), None)
    if best is None:
        return None
    segments = (*best.lineage, best)
    changed = [key for key in comparison.keys if key != ROW and len({each.params.get(key) for each in segments}) > 1]
    columns: list[tuple[str, bool, Callable[[TrialSummary], str]]] = [
        ("steps", True, lambda each: f"{each.segment.start_step}-{each.segment.stop_step}" if each.segment else "-"),
        ("trained as", False, lambda each: each.name),
        *((key, True, lambda each, key=key: each.params.get(key, "-")) for key in changed),
        (f"{metric_title(comparison.metric)} at its end", True, lambda each: number(each.last(comparison.metric), 2)),
    ]
    return _table(f"Schedule of {best.name}", columns, segments)


def configuration_table(comparison: Comparison) -> Table:
    title = metric_title(comparison.metric)
    columns: list[tuple[str, bool, Callable[[Group], str]]] = [
        ("#", True, lambda group: number(group.rank, 0)),
        *((key, key != ROW, lambda group, key=key: group.params[key] or "-") for key in comparison.keys),
        (f"{title}, mean", True, lambda group: number(group.mean, 2)),
        ("sd", True, lambda group: number(group.sd, 2)),
        *_paper_columns(comparison),
        *_difference_columns(comparison),
        ("seeds", True, lambda group: str(len(group.values))),
        ("runs", True, lambda group: str(len(group.rows))),
    ]
    return _table("Configurations", columns, comparison.groups)


def _difference_columns(comparison: Comparison) -> Iterator[tuple[str, bool, Callable[[Group], str]]]:
    """How far each configuration is from the reference, and whether that is more than noise."""
    if comparison.reference is None:
        return
    yield f"vs {comparison.reference.name}", True, lambda group: _cell(group, lambda d: number(d.mean, 2, sign=True))
    yield "95 % CI", True, lambda group: _cell(group, interval)
    yield "verdict", False, lambda group: "reference" if group is comparison.reference else _cell(group, verdict)


def _cell(group: Group, text: Callable[[Difference], str]) -> str:
    return "-" if group.difference is None else text(group.difference)


def interval(difference: Difference) -> str:
    """`-0.42 to +1.10`; "-" where there is none."""
    if difference.low is None or difference.high is None:
        return "-"
    return f"{difference.low:+.2f} to {difference.high:+.2f}"


def verdict(difference: Difference) -> str:
    """better, worse, or not resolved with the seeds that would, or with what stands in the way."""
    if difference.verdict != "not resolved":
        return difference.verdict
    if difference.seeds_needed is None:
        return f"not resolved: {difference.reason or 'no difference'}"
    seeds = "over 1000" if difference.seeds_needed > 1000 else str(difference.seeds_needed)
    return f"not resolved: {seeds} seeds would"


def regret_table(comparison: Comparison) -> Table:
    """k-NN lost by choosing the trial that a label-free score ranks first; no rows where nothing logged both."""
    columns: list[tuple[str, bool, Callable[[Regret], str]]] = [
        ("score", False, lambda found: LABEL_FREE[found.score]),
        ("chooses", False, lambda found: found.chosen.trial.name),
        (metric_title(KNN_METRIC), True, lambda found: number(found.chosen_knn, 2)),
        ("best", True, lambda found: number(found.best_knn, 2)),
        ("regret", True, lambda found: number(found.regret, 2)),
        ("Spearman", True, lambda found: number(found.correlation, 2, sign=True)),
        ("trials", True, lambda found: str(found.num_trials)),
    ]
    return _table("Choosing without labels", columns, regrets(comparison))


def _paper_columns(comparison: Comparison) -> Iterator[tuple[str, bool, Callable[[Row | Group], str]]]:
    """The paper's number of the metric beside ours, then what else the paper gives; nothing where it gives nothing."""
    for metric in comparison.paper_metrics:
        yield PAPER if metric == comparison.metric else f"{PAPER}, {metric_title(metric)}", True, _paper_cell(metric)


def _paper_cell(metric: str) -> Callable[[Row | Group], str]:
    return lambda item: number(item.paper(metric), 1)


def _table(title: str, columns: list[tuple[str, bool, Callable[[T], str]]], items: Iterable[T]) -> Table:
    rows = tuple(tuple(text(item) for _, _, text in columns) for item in items)
    return Table(title, tuple(name for name, _, _ in columns), tuple(numeric for _, numeric, _ in columns), rows)


def metric_title(metric: str) -> str:
    return _TITLES.get(metric, metric)


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """A number for a reader; "-" for one that is not there."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def render(comparison: Comparison, form: Format) -> str:
    """The comparison as plain text, Markdown, an HTML fragment, CSV (trials only, full precision, with what each came
    from) or LaTeX (configurations only, as papers print them)."""
    if form == "csv":
        return _csv(comparison)
    if form == "latex":
        return latex_table(comparison)
    draw = {"table": _plain, "markdown": _markdown, "html": html_table}[form]
    text = "\n".join(draw(table) for table in tables(comparison))
    notes = (f"<p>{html.escape(note)}</p>\n" if form == "html" else f"\n{note}\n" for note in comparison.notes)
    return text + "".join(notes)


def _plain(table: Table) -> str:
    lines = [table.headers, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.headers))]
    pad = [str.rjust if numeric else str.ljust for numeric in table.numeric]
    lines.insert(1, tuple("-" * width for width in widths))
    texts = ("  ".join(pad[i](cell, widths[i]) for i, cell in enumerate(line)).rstrip() for line in lines)
    return f"{table.title}\n" + "\n".join(texts) + "\n"


def _markdown(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---:" if numeric else "---" for numeric in table.numeric) + "|"
    return "\n".join([f"**{table.title}**", "", line(table.headers), rule, *map(line, table.rows)]) + "\n"


def html_table(table: Table, mark: Callable[[int, str, str], str] = lambda index, header, cell: "") -> str:
    """An HTML table of escaped text. Cells of numbers have the class `number`; `mark(index of the row, header, cell)`
    gives those of the body further classes, separated by blanks."""

    def line(tag: str, index: int, cells: Iterable[str]) -> str:
        texts = []
        for header, numeric, cell in zip(table.headers, table.numeric, cells, strict=True):
            marks = ("number " if numeric else "") + (mark(index, header, cell) if tag == "td" else "")
            classes = f' class="{marks.strip()}"' if marks else ""
            text = html.escape(cell)
            texts.append(f"<{tag}{classes}>{text.replace('.', '.<wbr>') if tag == 'th' else text}</{tag}>")
        return f"<tr>{''.join(texts)}</tr>"

    body = "\n".join(line("td", index, row) for index, row in enumerate(table.rows))
    head = line("th", 0, table.headers)
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f"<table>\n{caption}\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"


_PROVENANCE = ("experiment", "git_commit", "data_digest")


def _csv(comparison: Comparison) -> str:
    papers = comparison.paper_metrics
    own = (comparison.metric, f"{comparison.metric} of random weights", *(f"paper/{metric}" for metric in papers))
    own = (*own, "train/loss", "teacher_entropy_share")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    told = ("health", "status", "step", "images_per_s")
    writer.writerow(("rank", "run_id", "trial", *comparison.keys, SEED_KEY, *own, *told, *_PROVENANCE))
    for row in comparison.rows:
        trial = row.trial
        values = (row.value, row.random_weights, *map(row.paper, papers), trial.last("train/loss"), trial.entropy_share)
        end: tuple[object, ...] = (trial.health, trial.status, trial.last_step, trial.images_per_s)
        end += (trial.experiment, trial.git_commit, trial.data_digest)
        writer.writerow((row.rank, trial.run_id, trial.name, *row.params.values(), trial.seed, *values, *end))
    return text.getvalue()


def latex_table(comparison: Comparison) -> str:
    """A table for a paper, of one row per configuration; needs the package booktabs.

    The best is bold only where it is resolved from what it is compared with; a dagger marks what is not.
    """
    repeated, reference = comparison.has_seeds, comparison.reference
    title = metric_title(comparison.metric)
    papers = [title for title, _, _ in _paper_columns(comparison)]
    heads = [*(key.removeprefix("pretrain.") for key in comparison.keys), title, *papers]
    if repeated and reference is not None:
        heads += [f"vs {reference.name}", "95 % CI"]
    lines = [_latex_line(heads), r"\midrule"]
    for group in comparison.groups:
        texts = [latex_escape(group.params[key] or "-") for key in comparison.keys]
        texts.append(_latex_value(group, bold=repeated and _is_resolved_best(comparison, group)))
        texts += [latex_escape(text(group)) for _, _, text in _paper_columns(comparison)]
        if repeated and reference is not None:
            texts += _latex_difference(group, group is reference)
        lines.append(" & ".join(texts) + r" \\")
    left, right = "l" * len(comparison.keys), "r" * (len(heads) - len(comparison.keys))
    body = "\n".join(lines)
    notes = " ".join(latex_escape(note) for note in (*_latex_notes(comparison), *comparison.notes))
    return (
        "\\begin{table}\n\\centering\n"
        f"\\begin{{tabular}}{{{left}{right}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
        f"\\caption{{{notes}}}\n\\end{{table}}\n"
    ).replace("†", r"$^\dagger$")


def _latex_line(texts: Iterable[str]) -> str:
    return " & ".join(map(latex_escape, texts)) + r" \\"


def _latex_value(group: Group, *, bold: bool) -> str:
    text = number(group.mean, 2) + (f" $\\pm$ {group.sd:.2f}" if group.sd is not None else "")
    return rf"\textbf{{{text}}}" if bold else text


def _latex_difference(group: Group, is_reference: bool) -> list[str]:
    if is_reference or group.difference is None or group.difference.mean is None:
        return ["--", "--"]
    found = group.difference
    low, high = found.low, found.high
    dagger = "" if found.verdict != "not resolved" else r"$^\dagger$"
    return [f"${found.mean:+.2f}${dagger}", "--" if low is None or high is None else f"$[{low:+.2f}, {high:+.2f}]$"]


def _is_resolved_best(comparison: Comparison, group: Group) -> bool:
    if group is not comparison.groups[0] or comparison.reference is None:
        return False
    if group is comparison.reference:
        others = [other.difference for other in comparison.groups if other is not group]
        return all(difference is not None and difference.verdict == "worse" for difference in others)
    return group.difference is not None and group.difference.verdict == "better"


def _latex_notes(comparison: Comparison) -> Iterator[str]:
    if not comparison.has_seeds:
        yield "One seed each: nothing tells a difference from noise, so nothing is bold."
        return
    yield "Mean ± standard deviation over seeds."
    if comparison.reference is not None:
        name = comparison.reference.name
        yield f"Bold: the best, where it is resolved from {name}. †: not resolved from {name}."


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"}


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(mark, mark) for mark in " ".join(text.split()))


_FIRST_TO_GO = ("step", "images/s", "status", "loss", "runs", "seeds")


def rich_tables(comparison: Comparison, width: int | None = None) -> list[RichTable]:
    """The comparison for a terminal: `rich.print(*rich_tables(comparison))`.

    Columns that do not fit into `width` characters (None: those of the terminal) are left out and named.
    """
    width = width or shutil.get_terminal_size().columns
    from rich.markup import escape

    drawn = [_rich_table(table, width) for table in tables(comparison)]
    drawn[-1].caption = "\n".join(filter(None, [str(drawn[-1].caption or ""), *map(escape, comparison.notes)])) or None
    return drawn


def _rich_table(table: Table, width: int) -> RichTable:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table as RichTable

    # Keys break at their dots, so that narrow columns of values stay narrow.
    names = {header: header.removeprefix("pretrain.").replace(".", ". ") for header in table.headers}
    headers = {header: textwrap.wrap(name, 8, break_long_words=False) for header, name in names.items()}
    widths = {
        header: 3 + max(map(len, [*headers[header], *(row[i] for row in table.rows)]))
        for i, header in enumerate(table.headers)
    }
    left_out = []
    # The paper's other numbers go before any of ours.
    first = [header for header in table.headers if header.startswith(f"{PAPER}, ")]
    for header in (*first, *_FIRST_TO_GO):
        if header in widths and sum(widths.values()) > width:
            left_out.append(header)
            del widths[header]
    shown = [i for i, header in enumerate(table.headers) if header in widths]
    remarks = [f"left out for want of width: {', '.join(left_out)}"] if left_out else []
    if any(header.startswith("pretrain.") for header in table.headers):
        remarks.append("keys are shown without their prefix pretrain.")
    caption = "\n".join(remarks) or None
    rich = RichTable(
        title=table.title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    fits = sum(widths.values()) <= width
    for i in shown:
        justify: Literal["left", "right"] = "right" if table.numeric[i] else "left"
        name = escape("\n".join(headers[table.headers[i]]))
        rich.add_column(name, justify=justify, vertical="top", overflow="fold", no_wrap=fits)
    health = table.headers.index("health") if "health" in table.headers else None
    for row in table.rows:
        bad = health is not None and row[health] not in ("healthy", "unknown")
        rich.add_row(*(escape(row[i]) for i in shown), style="red" if bad else "bold" if row[0] == "1" else "")
    return rich
