"""`dino evaluate`. Imports what it needs when it runs, so that help and errors answer at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from rich.progress import TaskID

    from orchestrator.evaluate.record import Evaluation


class _Evaluate(click.Command):
    """Its help lists the suites."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from orchestrator.evaluate.suite import SUITES

        with formatter.section("Suites"):
            formatter.write_dl(list(SUITES.items()))


def _complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from orchestrator.evaluate.settings import setting_keys
    from orchestrator.evaluate.suite import SUITES, load_suite
    from orchestrator.overrides import complete_keys

    names = [CompletionItem(name, help=text) for name, text in SUITES.items() if name.startswith(incomplete)]
    keys = complete_keys(incomplete, setting_keys([load_suite(name) for name in SUITES])) if incomplete else []
    items = names + [CompletionItem(f"{key}=", help=allowed) for key, allowed in keys]
    return items or [CompletionItem(incomplete, type="file")]


@click.command(cls=_Evaluate)
@click.argument("words", nargs=-1, required=True, metavar="SUITE... TARGET [KEY=VALUE]...", shell_complete=_complete)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(),
    help="YAML or JSON file of settings, applied before KEY=VALUE.",
)
@click.option("--local", is_flag=True, help="In this process, without Ray (short for cluster.launcher=local).")
@click.option(
    "--as",
    "label",
    metavar="LABEL",
    help="Log the metrics as evaluate/LABEL/SUITE/..., apart from those of other images or options.",
)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def evaluate(words: tuple[str, ...], config_file: str | None, local: bool, label: str | None, form: str) -> None:
    """Evaluate a frozen backbone by SUITE.

    TARGET is a run in the storage folder or the path of one, a checkpoint's folder, a file of weights that DINO or
    DINOv2 released, a timm model with its pretrained weights, random:NAME for an architecture with random weights, or
    pixels. A run is evaluated on its own images unless data.source says otherwise. Settings: features.*, SUITE.*,
    data.*, cluster.*, tracking.*; docs/evaluation.md has them all.

    \b
    dino evaluate knn runs/quickstart-20260101-120000-ab12
    dino evaluate knn vit_small_patch16_224.dino data.source=/path/to/imagenet knn.k=10,20 --format json
    """
    from orchestrator.config_file import load_file
    from orchestrator.evaluate.driver import evaluate as run_suites
    from orchestrator.overrides import merge_changes, parse_assignments

    settings = [word for word in words if "=" in word and not Path(word).exists()]
    names = [word for word in words if word not in settings]
    if len(names) < 2:
        missing = "TARGET" if names else "SUITE"
        raise click.UsageError(f"Missing argument '{missing}': name one or more suites, then what to evaluate.")
    *suites, target = names
    changes = merge_changes(load_file(config_file) if config_file else {}, parse_assignments(settings))

    def tell(line: str) -> None:
        click.echo(line, err=True)

    with _progress() as progress:
        found = run_suites(suites, target, changes, label=label, local=local, tell=tell, progress=progress)
    click.echo(json.dumps(as_json(target, found), indent=2) if form == "json" else as_table(found))


@contextmanager
def _progress() -> Generator[Callable[[str, int, int], None]]:
    """A bar on the terminal, if there is one, for each set of images whose features are taken."""
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[tuple[str, int], TaskID] = {}

        def advance(name: str, done: int, total: int) -> None:
            task = tasks.get((name, total))
            if task is None:
                task = tasks[name, total] = bar.add_task(f"{name} features", total=total)
            bar.update(task, completed=done)

        yield advance


def as_json(target: str, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The results in one object."""
    return {
        "target": target,
        "metrics": {name: value for found in evaluations for name, value in found.metrics.items()},
        "results": [found.content | {"folder": str(found.folder)} for found in evaluations],
    }


def as_table(evaluations: Sequence[Evaluation]) -> str:
    """A line for each number, and for each note."""
    metrics = {name: value for found in evaluations for name, value in found.metrics.items()}
    width = max(map(len, metrics), default=0)
    lines = [f"{name:<{width}}  {value:>10.4g}" for name, value in metrics.items()]
    lines += [f"note: {found.suite}: {note}" for found in evaluations for note in found.content["notes"]]
    bad = max(found.content["unreadable_images"] for found in evaluations)
    return "\n".join([*lines, *([f"note: {bad} images could not be read and are left out"] if bad else [])])
