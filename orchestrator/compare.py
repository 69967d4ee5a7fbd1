"""Comparison of trials: which differences are worth looking at.

`compare` ranks trials (`orchestrator.trials`) and `render` writes the result. With several seeds per configuration a
second table gives mean and standard deviation; `Group.values` holds the value of every seed, which is what paired
statistics will start from.
"""

from __future__ import annotations

import csv
import html
import io
import math
import shutil
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from orchestrator.trials import SEED_KEY, CompareError, Mode, TrialSummary

if TYPE_CHECKING:
    from rich.table import Table as RichTable

T = TypeVar("T")
Format = Literal["table", "markdown", "csv", "html"]

KNN_METRIC = "eval/knn_top1"
ROW = "row"
"""Stands in place of all keys that a sweep's rows set."""
PAPER = "paper"
"""Title of the column of the paper's numbers."""

_TITLES = {
    KNN_METRIC: "k-NN %",
    "eval/linear_top1": "linear %",
    "cost/hours": "hours",
    "cost/device_hours": "GPU-hours or core-hours",
    "cost/gpu_memory_gb": "GB per GPU",
}
_UNSEEN_PREFIXES = ("tracking.", "derived/", "paper/")
_UNSEEN_KEYS = frozenset(
    f"cluster.{name}"
    for name in ("address", "keep_checkpoints", "max_concurrent_trials", "max_failures", "start_timeout_s", "storage")
)


@dataclass(frozen=True)
class Row:
    """One trial in a comparison."""

    rank: int | None
    """1 is best; None if the trial has no finite value of the metric."""
    trial: TrialSummary
    params: dict[str, str]
    """Only the keys of the comparison."""
    value: float | None
    step: int | None
    """Where `value` was measured."""
    random_weights: float | None
    """The metric of the same backbone at step 0, before any training."""

    @property
    def gain(self) -> float | None:
        """`value` minus that of random weights."""
        return self.value - self.random_weights if self.value is not None and self.random_weights is not None else None

    def paper(self, metric: str) -> float | None:
        """The paper's number for this trial."""
        return self.trial.paper.get(metric)


@dataclass(frozen=True)
class Group:
    """One configuration over its seeds."""

    rank: int | None
    params: dict[str, str]
    rows: tuple[Row, ...]
    values: dict[int | None, float]
    """The metric by seed; runs that repeat a seed count once, with their mean."""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None below two seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def paper(self, metric: str) -> float | None:
        """The paper's number for this configuration."""
        return self.rows[0].paper(metric)


@dataclass(frozen=True)
class Comparison:
    """Trials ranked by a metric, and their configurations ranked by its mean over seeds."""

    metric: str
    mode: Mode
    keys: tuple[str, ...]
    """Dotted keys that differ between the trials, with `row` in place of those that follow from a sweep's row; the seed
    is never one of them."""
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]

    @property
    def has_seeds(self) -> bool:
        """Whether a configuration was run with more than one seed."""
        return any(len({row.trial.seed for row in group.rows}) > 1 for group in self.groups)

    @property
    def random_weights(self) -> float | None:
        """The metric at step 0, mean over the trials that have it."""
        values = [row.random_weights for row in self.rows if row.random_weights is not None]
        return statistics.fmean(values) if values else None

    @property
    def paper_metrics(self) -> tuple[str, ...]:
        """What the paper gives numbers of, that which is compared first."""
        found = dict.fromkeys(metric for row in self.rows for metric in sorted(row.trial.paper))
        return tuple(sorted(found, key=lambda metric: metric != self.metric))

    @property
    def paper_note(self) -> str:
        """What the paper's numbers are, in a line; empty where there are none."""
        if not self.paper_metrics:
            return ""
        settings = dict.fromkeys(row.trial.paper_setting for row in self.rows if row.trial.paper)
        return f"The paper's numbers are at its own scale: {'; '.join(filter(None, settings)) or 'not told'}."


def compare(trials: Sequence[TrialSummary], metric: str = KNN_METRIC, mode: Mode = "max") -> Comparison:
    """Rank trials by the last value of `metric`; those without a finite value come last, in their given order.

    Raises CompareError if there is no trial.
    """
    if not trials:
        raise CompareError("no trials to compare")
    keys = differing_keys(trials)
    rows = [_row(trial, keys, metric) for trial in trials]
    ranked = _ranked(rows, lambda row: row.value, mode)
    rows = [Row(rank, row.trial, row.params, row.value, row.step, row.random_weights) for rank, row in ranked]
    by_params: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_params.setdefault(tuple(row.params.values()), []).append(row)
    groups = [Group(None, members[0].params, tuple(members), _by_seed(members)) for members in by_params.values()]
    ordered = _ranked(groups, lambda group: group.mean, mode)
    groups = [Group(rank, group.params, group.rows, group.values) for rank, group in ordered]
    return Comparison(metric, mode, keys, tuple(rows), tuple(groups))


def differing_keys(trials: Sequence[TrialSummary]) -> tuple[str, ...]:
    """Dotted keys whose values are not the same in all trials, without the seed and what cannot change a result.

    Where all trials belong to rows of a sweep, `row` comes first and the keys that are the same within each row are
    left out.
    """
    keys = {key for trial in trials for key in trial.params} - _UNSEEN_KEYS - {SEED_KEY}
    keys = {key for key in keys if not key.startswith(_UNSEEN_PREFIXES)}
    differing = sorted(key for key in keys if len({trial.params.get(key) for trial in trials}) > 1)
    if not all(trial.row for trial in trials):
        return tuple(differing)
    pairs = {key: {(trial.row, trial.params.get(key)) for trial in trials} for key in differing}
    num_rows = len({trial.row for trial in trials})
    return (ROW, *(key for key in differing if len(pairs[key]) > num_rows))


def _row(trial: TrialSummary, keys: Sequence[str], metric: str) -> Row:
    curve = trial.curves.get(metric, [])
    step, value = curve[-1] if curve else (None, None)
    finite = value if value is not None and math.isfinite(value) else None
    return Row(None, trial, {key: trial.params.get(key, "") for key in keys}, finite, step, trial.at(metric, 0))


def _ranked(items: Sequence[T], value: Callable[[T], float | None], mode: Mode) -> list[tuple[int | None, T]]:
    sign = -1 if mode == "max" else 1

    def place(item: T) -> tuple[bool, float]:
        number = value(item)
        return number is None, sign * (number or 0.0)

    return [(None if place(item)[0] else rank, item) for rank, item in enumerate(sorted(items, key=place), 1)]


def _by_seed(rows: Iterable[Row]) -> dict[int | None, float]:
    values: dict[int | None, list[float]] = {}
    for row in rows:
        if row.value is not None:
            values.setdefault(row.trial.seed, []).append(row.value)
    return {seed: statistics.fmean(repeats) for seed, repeats in values.items()}


@dataclass(frozen=True)
class Table:
    """A comparison as text, for any renderer."""

    title: str
    headers: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(comparison: Comparison) -> list[Table]:
    """The ranked trials and, when configurations were repeated with other seeds, before them the configurations."""
    trials = trial_table(comparison)
    return [configuration_table(comparison), trials] if comparison.has_seeds else [trials]


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
    ]
    return _table("Trials", columns, comparison.rows)


def configuration_table(comparison: Comparison) -> Table:
    title = metric_title(comparison.metric)
    columns: list[tuple[str, bool, Callable[[Group], str]]] = [
        ("#", True, lambda group: number(group.rank, 0)),
        *((key, key != ROW, lambda group, key=key: group.params[key] or "-") for key in comparison.keys),
        (f"{title}, mean", True, lambda group: number(group.mean, 2)),
        ("sd", True, lambda group: number(group.sd, 2)),
        *_paper_columns(comparison),
        ("seeds", True, lambda group: str(len(group.values))),
        ("runs", True, lambda group: str(len(group.rows))),
    ]
    return _table("Configurations", columns, comparison.groups)


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
    """The comparison as plain text, Markdown, CSV (trials only, full precision) or an HTML fragment."""
    if form == "csv":
        return _csv(comparison)
    draw = {"table": _plain, "markdown": _markdown, "html": html_table}[form]
    text = "\n".join(draw(table) for table in tables(comparison))
    note = comparison.paper_note
    return text + (f"<p>{html.escape(note)}</p>\n" if form == "html" else f"\n{note}\n") if note else text


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


def _csv(comparison: Comparison) -> str:
    papers = comparison.paper_metrics
    own = (comparison.metric, f"{comparison.metric} of random weights", *(f"paper/{metric}" for metric in papers))
    own = (*own, "train/loss", "teacher_entropy_share")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("rank", "run_id", "trial", *comparison.keys, SEED_KEY, *own, "health", "status", "step", "images_per_s")
    )
    for row in comparison.rows:
        trial = row.trial
        values = (row.value, row.random_weights, *map(row.paper, papers), trial.last("train/loss"), trial.entropy_share)
        end = (trial.health, trial.status, trial.last_step, trial.images_per_s)
        writer.writerow((row.rank, trial.run_id, trial.name, *row.params.values(), trial.seed, *values, *end))
    return text.getvalue()


_FIRST_TO_GO = ("step", "images/s", "status", "loss")


def rich_tables(comparison: Comparison, width: int | None = None) -> list[RichTable]:
    """The comparison for a terminal: `rich.print(*rich_tables(comparison))`.

    Columns that do not fit into `width` characters (None: those of the terminal) are left out and named.
    """
    width = width or shutil.get_terminal_size().columns
    return [_rich_table(table, width, comparison.paper_note) for table in tables(comparison)]


def _rich_table(table: Table, width: int, note: str = "") -> RichTable:
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
    remarks = [note] if note else []
    remarks += [f"left out for want of width: {', '.join(left_out)}"] if left_out else []
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
