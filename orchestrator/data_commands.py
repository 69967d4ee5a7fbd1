"""`dino data`: looking at images and converting them. Like all commands these import what they need when they run."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from dino_core.config import ConfigError

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.data.split import Source
    from orchestrator.data.tools.convert import Converted, ConvertOptions
    from orchestrator.overrides import Key

_GROUPS = {"inspect": ("data.", "pretrain.crops."), "convert": ("data.",)}
"""The settings of each command."""


class _Megabytes(click.FloatRange):
    """At least a kilobyte, and a number: click's own ranges let `nan` through."""

    def __init__(self) -> None:
        super().__init__(min=0.001)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        size = super().convert(value, param, ctx)
        return size if math.isfinite(size) else self.fail(f"{value!r} is not a finite number.", param, ctx)


@click.group()
def data() -> None:
    """Look at images, or convert them to files that stream fast."""


def _keys(command: str | None) -> dict[str, Key]:
    from orchestrator.overrides import config_keys

    groups = _GROUPS[command or "inspect"]
    return {key: kind for key, kind in config_keys().items() if key.startswith(groups)}


def _complete_settings(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from orchestrator.overrides import complete_keys

    return [CompletionItem(f"{key}=", help=allowed) for key, allowed in complete_keys(incomplete, _keys(ctx.info_name))]


def _complete_path(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


_source = click.argument("source", shell_complete=_complete_path)
_settings = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=_complete_settings)
_threads = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="That read and decode; by default one per CPU core."
)


@data.command()
@_source
@_settings
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every broken image and duplicate.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Look at N evenly spread images of each split.")
@_threads
def inspect(source: str, settings: tuple[str, ...], as_json: bool, limit: int | None, threads: int | None) -> None:
    """Say what SOURCE holds and what is wrong with it.

    Every image is read and decoded. Sizes, formats, classes; images that are broken, or there twice, or both in
    training and test split; how many images a second one core can decode and crop, and what would help.

    \b
    dino data inspect /path/to/imagenet
    dino data inspect photos.parquet data.image_column=jpg pretrain.crops.global_size=518 --limit 10000
    """
    config, opened = _open("inspect", source, settings)
    from orchestrator.data.tools import inspect_text
    from orchestrator.data.tools.inspect import inspect as look

    crops = config.pretrain.crops
    total = sum(min(len(split), limit or len(split)) for split in (opened.train, opened.test) if split is not None)
    with _progress("looking", total) as advance:
        found = look(opened, config.data, crops, limit=limit, threads=threads, advance=advance)
    if as_json:
        click.echo(json.dumps(inspect_text.as_json(found, config.data, crops), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        console.print(*inspect_text.as_rich(found, config.data, crops), sep="\n")
    else:
        click.echo(inspect_text.as_text(found, config.data, crops))
    if found.interrupted:
        raise KeyboardInterrupt


@data.command()
@_source
@click.argument("dest", shell_complete=_complete_path)
@_settings
@click.option(
    "--shorter-side",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Shrink images whose shorter side is longer (JPEG, quality 95); by default images are copied byte for byte.",
)
@click.option(
    "--shuffle",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    show_default=True,
    metavar="SEED",
    help="Of the order.",
)
@click.option("--keep-order", is_flag=True, help="Store the images in the order of SOURCE.")
@click.option("--row-group-mb", type=_Megabytes(), default=8, show_default=True, metavar="MB")
@click.option("--shard-mb", type=_Megabytes(), default=256, show_default=True, metavar="MB")
@click.option("--no-check", is_flag=True, help="Do not decode the images to leave out the broken ones.")
@_threads
def convert(
    source: str,
    dest: str,
    settings: tuple[str, ...],
    shorter_side: int | None,
    shuffle: int,
    keep_order: bool,
    row_group_mb: float,
    shard_mb: float,
    no_check: bool,
    threads: int | None,
) -> None:
    """Write the images of SOURCE to DEST as Parquet files that stream fast.

    DEST is a new folder, or the URL of one (s3://, gs://, ...). The images are stored in random order, so that
    data.shuffle=windowed, which reads one after the other, mixes them well. Broken images are left out and listed in
    left_out.jsonl.

    \b
    dino data convert /path/to/imagenet /fast/imagenet
    dino data convert photos/ s3://bucket/photos --shorter-side 512
    """
    config, opened = _open("convert", source, settings)
    from orchestrator.data.tools.convert import ConvertOptions
    from orchestrator.data.tools.convert import convert as write

    options = ConvertOptions(
        row_group_mb=row_group_mb,
        shard_mb=shard_mb,
        shuffle=None if keep_order else shuffle,
        shorter_side=shorter_side,
        check=not no_check,
        **({} if threads is None else {"threads": threads}),
    )
    total = len(opened.train) + (0 if opened.test is None else len(opened.test))
    with _progress("converting", total) as advance:
        done = write(opened, dest, config.data, options, advance)
    click.echo("\n".join(_summary(done, options)))


def _open(command: str, source: str, settings: Sequence[str]) -> tuple[RunConfig, Source]:
    """The configuration that the arguments stand for, and its source. Raises ConfigError."""
    from orchestrator.config import RunConfig
    from orchestrator.overrides import check_values, override, parse_assignments, show

    changes: Mapping[str, Any] = parse_assignments(settings)
    typed, problems = check_values(_keys(command), changes)
    if "data.source" in changes:
        problems.append(f"data.source: given twice, as {show(source)} and {show(changes['data.source'])}")
    if problems:
        raise ConfigError("\n".join(problems))
    config = override(RunConfig(), {"data.source": source, **typed})
    from orchestrator.data.sources import open_source

    return config, open_source(config.data)


def _summary(done: Converted, options: ConvertOptions) -> list[str]:
    from orchestrator.data.tools.convert import LEFT_OUT_FILE
    from orchestrator.data.tools.scan import show_bytes

    images = " and ".join(f"{count:,} {name}" for name, count in done.images.items())
    lines = [f"{done.address}: {images} images in {done.files:,} {'file' if done.files == 1 else 'files'}, "]
    lines[0] += f"{show_bytes(done.size)}"
    if done.left_out:
        lines.append(f"left out: {len(done.left_out):,} unusable, listed in {LEFT_OUT_FILE}")
    lines += [f"note: {note}" for note in done.notes]
    if options.shorter_side is not None:
        kept = sum(done.images.values()) - done.shrunk
        lines.append(
            f"shrunk to a shorter side of {options.shorter_side}: {done.shrunk:,} images, which are no longer those of "
            f"the source; {kept:,} are unchanged"
        )
    setting = shlex.quote(f"data.source={done.address}")
    return [*lines, "", f"python -m orchestrator pretrain RECIPE {setting}"]


@contextmanager
def _progress(what: str, total: int) -> Generator[Callable[[int], None]]:
    """A bar on the terminal, if there is one, for as long as the block runs; told by a call how many more are done."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
