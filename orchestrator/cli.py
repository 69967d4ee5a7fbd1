"""The command line: `python -m orchestrator` and `dino`.

Commands import what they need when they run, so that help, completion and every bad input answer at once, without
torch, ray or mlflow. Exit codes: 0 done, 1 a run failed, 2 bad usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from dino_core.config import ConfigError
from dino_core.export import FORMATS, NETWORKS
from orchestrator.data_commands import data
from orchestrator.errors import RunFailed
from orchestrator.evaluate.command import evaluate

if TYPE_CHECKING:
    from orchestrator.run_sweep import SweepResult
    from orchestrator.sweep import Sweep

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_EPILOG = """\b
Settings are KEY=VALUE with one dotted vocabulary: pretrain.optim.lr=1e-3, data.source=/path, cluster.num_workers=4.
--dry-run prints all of them with their values.

\b
Completion of names and keys, for the command `dino`:
  bash:  eval "$(_DINO_COMPLETE=bash_source dino)"
  zsh:   eval "$(_DINO_COMPLETE=zsh_source dino)"
  fish:  _DINO_COMPLETE=fish_source dino | source

\b
Exit codes: 0 done, 1 a run failed, 2 bad usage or configuration, 130 interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; the arguments are by default the process's own."""
    try:
        cli.main(args=arguments, standalone_mode=False)
    except click.UsageError as error:
        error.show()
        _hint_at_setting(error)
        return BAD_INPUT
    except ConfigError as error:
        _complain(str(error))
        return BAD_INPUT
    except RunFailed as error:
        _complain(str(error))
        return FAILED
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    return DONE


@click.group(
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
def cli() -> None:
    """Self-supervised pre-training by self-distillation on Ray, with sweeps, recorded in MLflow."""


cli.add_command(data)
cli.add_command(evaluate)


def _complete_recipes(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from orchestrator.catalog import recipes, summary

    return [CompletionItem(n, help=summary(made)) for n, made in recipes().items() if n.startswith(incomplete)]


def _complete_sweeps(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from orchestrator.catalog import summary, sweep_module, sweep_names

    names = [name for name in sweep_names() if name.startswith(incomplete)]
    items = [CompletionItem(name, help=summary(sweep_module(name))) for name in names]
    items += [item for item in _complete_recipes(ctx, param, incomplete) if item.value not in names]
    return items or [CompletionItem(incomplete, type="file")]


def _complete_settings(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from orchestrator.overrides import complete_keys, config_keys
    from orchestrator.sweep import setting_keys

    keys = config_keys() | (setting_keys() if ctx.info_name == "sweep" else {})
    return [CompletionItem(f"{key}=", help=allowed) for key, allowed in complete_keys(incomplete, keys)]


def _complete_methods(incomplete: str) -> list[CompletionItem]:
    from dino_core.methods import METHODS

    return [CompletionItem(name) for name in METHODS if name.startswith(incomplete)]


_settings = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=_complete_settings)
_config_file = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(),
    help="YAML or JSON file of settings, applied before KEY=VALUE.",
)
_method = click.option(
    "--method",
    metavar="NAME",
    help="Turn the recipe into this method (byol, swav, ...), before other changes.",
    shell_complete=lambda _ctx, _param, incomplete: _complete_methods(incomplete),
)
_register = click.option(
    "--register",
    "model",
    metavar="MODEL",
    help="When it is done, register the best backbone in MLflow as a version of MODEL.",
)
_dry_run = click.option(
    "--dry-run", is_flag=True, help="Check everything, print what would run and what it costs; start nothing."
)
_calibrate = click.option(
    "--calibrate", is_flag=True, help="With --dry-run: take a few steps here, to measure what is assumed else."
)


@cli.command()
@click.argument("recipe", required=False, shell_complete=_complete_recipes)
@_settings
@_config_file
@_method
@click.option("--local", is_flag=True, help="Train in this process, without Ray (short for cluster.launcher=local).")
@click.option("--resume", "run", metavar="RUN_ID", help="Go on with an earlier run; needs no RECIPE.")
@_register
@_dry_run
@_calibrate
def pretrain(
    recipe: str | None,
    settings: tuple[str, ...],
    config_file: str | None,
    method: str | None,
    local: bool,
    run: str | None,
    model: str | None,
    dry_run: bool,
    calibrate: bool,
) -> None:
    """Pre-train a backbone by RECIPE.

    \b
    dino pretrain quickstart
    dino pretrain cifar10_tiny data.source=cifar10.parquet pretrain.epochs=10
    """
    _check_calibrate(dry_run, calibrate)
    recipe, changes = _name_and_changes(recipe, settings, config_file)
    _check_model_name(model)
    if local and changes.setdefault("cluster.launcher", "local") != "local":
        raise ConfigError(f"cluster.launcher = {changes['cluster.launcher']}: must be local with --local")
    if run is not None:
        _refuse_with_resume({"--method": method, "--dry-run": dry_run})
        _resume_run(run, recipe, changes, model)
        return
    if recipe is None:
        raise click.UsageError("Missing argument 'RECIPE'; `recipes` lists what there is.")
    from dino_core.methods import changes_of
    from orchestrator.catalog import load_recipe
    from orchestrator.overrides import merge_changes, override
    from orchestrator.preflight import check_launcher, check_model

    base = load_recipe(recipe)
    config = override(base, merge_changes(changes_of(method, base.pretrain) if method else {}, changes))
    check_launcher(config)
    check_model(config)
    if dry_run:
        from orchestrator.dry_run import print_run

        print_run(config, recipe, click.echo, calibrate=calibrate)
        return
    from orchestrator.pretrain import pretrain as run_pretrain

    _register_best(run_pretrain(config, recipe=recipe, method=method).folder, model)


@cli.command()
@click.argument("sweep", required=False, metavar="SWEEP|FILE", shell_complete=_complete_sweeps)
@_settings
@_config_file
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=V1,V2",
    help="Vary a key over these values; repeat for a grid.",
    shell_complete=_complete_settings,
)
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="Seeds of each combination.")
@click.option("--base", metavar="RECIPE", help="Start from another recipe.", shell_complete=_complete_recipes)
@_method
@click.option("--resume", "name", metavar="NAME", help="Finish an earlier sweep; its finished trials stay as they are.")
@_register
@_dry_run
@_calibrate
def sweep(
    sweep: str | None,
    settings: tuple[str, ...],
    config_file: str | None,
    vary: tuple[str, ...],
    seeds: int | None,
    base: str | None,
    method: str | None,
    name: str | None,
    model: str | None,
    dry_run: bool,
    calibrate: bool,
) -> None:
    """Run an ablation and compare its trials.

    Each row of the sweep with each combination of the values that it varies is a trial. SWEEP|FILE is a built-in
    sweep, a FILE.py that defines SWEEP, a FILE.yaml, or a recipe together with --vary. The sweep's own settings have
    keys too: sweep.scheduler=asha sweep.grace_steps=100 sweep.metric=eval/rankme ...

    \b
    dino sweep quickstart
    dino sweep temperature --base dino_vits16 data.source=/path/to/imagenet
    dino sweep cifar10_tiny --vary pretrain.optim.lr=5e-4,1e-3 --vary pretrain.crops.num_local_crops=2,6 --seeds 3
    """
    _check_calibrate(dry_run, calibrate)
    sweep, changes = _name_and_changes(sweep, settings, config_file)
    _check_model_name(model)
    if name is not None:
        given = {"--vary": vary, "--seeds": seeds, "--base": base, "--method": method, "--dry-run": dry_run}
        _refuse_with_resume(given)
        _resume_sweep(name, sweep, changes, model)
        return
    if sweep is None:
        raise click.UsageError("Missing argument 'SWEEP|FILE'; `sweeps` lists what there is.")
    defined = _define_sweep(sweep, changes, vary, seeds, base, method)
    from orchestrator.sweep import expand

    trials = expand(defined)
    if dry_run:
        from orchestrator.dry_run import print_sweep

        print_sweep(defined, trials, click.echo, calibrate=calibrate)
        return
    from orchestrator.run_sweep import run_sweep

    _end_sweep(run_sweep(defined), model)


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="EXPERIMENT... [KEY=VALUE]...")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "markdown", "latex", "csv", "html"]),
    default="table",
    show_default=True,
)
@click.option("--output", metavar="FILE", type=click.Path(dir_okay=False), help="Write to a file.")
@click.option("--metric", help="What to rank by; default: as the sweep says, else k-NN, without labels RankMe.")
@click.option("--mode", type=click.Choice(["max", "min"]), help="Which is better; default: as the metric says.")
@click.option(
    "--reference",
    metavar="NAME",
    help="Row, configuration or trial that the others are compared with, or best; default: the base, else best.",
)
def compare(
    names: tuple[str, ...], form: Any, output: str | None, metric: str | None, mode: Any, reference: str | None
) -> None:
    """Rank the trials of one or several EXPERIMENTs.

    EXPERIMENT is a sweep or run in the storage folder, the path of one, an MLflow experiment, the id of an MLflow run,
    or the name of a run or sweep in MLflow. They can be mixed. Settings: cluster.storage, tracking.uri.

    \b
    dino compare quickstart
    dino compare temperature momentum --metric eval/rankme
    dino compare quickstart --format html --output quickstart.html tracking.uri=http://mlflow.example:5000
    """
    from orchestrator.api import compare as compare_experiments
    from orchestrator.config import RunConfig
    from orchestrator.overrides import override, parse_assignments
    from orchestrator.tables import render, rich_tables
    from orchestrator.trials import CompareError

    experiments = [name for name in names if "=" not in name or Path(name).exists()]
    settings = [name for name in names if name not in experiments]
    if not experiments:
        raise click.UsageError("Missing argument 'EXPERIMENT'.")
    config = override(RunConfig(), parse_assignments(settings))
    try:
        comparison = compare_experiments(
            *experiments,
            metric=metric,
            mode=mode,
            reference=reference,
            storage=config.cluster.storage,
            uri=config.tracking.uri,
        )
    except CompareError as error:
        raise ConfigError(str(error)) from error
    if form == "table" and output is None and sys.stdout.isatty():
        from rich.console import Console

        Console().print(*rich_tables(comparison))
        return
    if form == "html":
        from orchestrator.report import render_report
        from orchestrator.summary import baselines

        text = render_report(comparison, title=", ".join(experiments), baselines=baselines(comparison))
    else:
        text = render(comparison, form)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from error


@cli.command()
@click.argument("run", metavar="RUN|CHECKPOINT")
@click.option(
    "--to", "form", type=click.Choice(FORMATS), required=True, help="What to write; docs/weights.md has more."
)
@click.argument("folder", metavar="DIR")
@click.option("--network", type=click.Choice(NETWORKS), default="teacher", show_default=True, help="Whose backbone.")
def export(run: str, form: Any, folder: str, network: Any) -> None:
    """Export the backbone of RUN to the folder DIR.

    For use elsewhere: by timm, Hugging Face or ONNX, or as plain safetensors.

    RUN is a run in the storage folder, the path of one, or the folder of a checkpoint; of a run, the newest whole
    checkpoint is taken.

    \b
    dino export runs/quickstart-20260101-120000-ab12 --to hf my_backbone
    dino export runs/quickstart-20260101-120000-ab12/checkpoints/step_00000200 --to onnx my_onnx
    """
    from orchestrator.export import export as export_run

    written = export_run(run, form, Path(folder), network)
    click.echo(f"{written.checkpoint}\n-> {written.folder}: {', '.join(written.files)}\n\n{written.usage}")


@cli.command()
@click.argument("name", metavar="SWEEP|RUN")
@click.argument("model")
@_settings
def register(name: str, model: str, settings: tuple[str, ...]) -> None:
    """Register the best backbone in MLflow.

    That of the run, or of the sweep's best trial, becomes a version of MODEL. The best is the first healthy trial of
    the sweep's comparison. What MLflow has not got of the record is delivered before. As --register of `sweep` and
    `pretrain`, at a later time.

    \b
    dino register quickstart-20260101-120000-ab12 my_backbone
    """
    from orchestrator.registry import find_records

    _check_model_name(model)
    changes, storage = _storage_changes(settings)
    _register_best(find_records(name, storage), model, changes)


@cli.command()
@click.argument("name", metavar="SWEEP|RUN")
@_settings
def deliver(name: str, settings: tuple[str, ...]) -> None:
    """Deliver to MLflow what it does not have of SWEEP or RUN.

    For records that were kept on disk while the tracking server was down, or to fill another store:
    tracking.uri=http://other:5000
    """
    from orchestrator.registry import deliver_all, find_records, target_of

    changes, storage = _storage_changes(settings)
    folder = find_records(name, storage)
    target = target_of(folder, changes)
    left_out = deliver_all(folder, target)
    click.echo("\n".join([*left_out, f"MLflow at {target.shown} has the record of {folder.name}"]))


@cli.command()
def recipes() -> None:
    """List the recipes."""
    from orchestrator.catalog import recipes as all_recipes
    from orchestrator.catalog import summary

    _list({name: summary(recipe) for name, recipe in all_recipes().items()})


@cli.command()
def sweeps() -> None:
    """List the built-in sweeps."""
    from orchestrator.catalog import summary, sweep_module, sweep_names

    _list({name: summary(sweep_module(name)) for name in sweep_names()})


def _list(lines: dict[str, str]) -> None:
    width = max(map(len, lines))
    for name, text in lines.items():
        click.echo(f"{name:<{width}}  {text}")


def _name_and_changes(
    name: str | None, settings: Sequence[str], config_file: str | None
) -> tuple[str | None, dict[str, Any]]:
    """The recipe or sweep, unless a setting stands in its place, and the changes of file and command line together."""
    from orchestrator.config_file import load_file
    from orchestrator.overrides import merge_changes, parse_assignments

    if name is not None and "=" in name:
        settings = [name, *settings]
        name = None
    of_file = load_file(config_file) if config_file is not None else {}
    return name, merge_changes(of_file, parse_assignments(settings))


def _define_sweep(
    name: str, changes: dict[str, Any], vary: Sequence[str], seeds: int | None, base: str | None, method: str | None
) -> Sweep:
    """The sweep that the command line asks for."""
    from dino_core.methods import check_method
    from orchestrator.catalog import load_recipe
    from orchestrator.sweep import with_settings, with_vary
    from orchestrator.sweep_file import load_sweep, parse_vary

    if method is not None:
        check_method(method)
    if seeds is not None and "sweep.seeds" in changes:
        raise ConfigError(f"sweep.seeds: given twice, as --seeds {seeds} and {changes['sweep.seeds']}")
    defined = load_sweep(name)
    if base is not None:
        load_recipe(base)
        defined = dataclasses.replace(defined, base=base)
    if method is not None:
        defined = dataclasses.replace(defined, method=method)
    defined = with_settings(with_vary(defined, parse_vary(vary)), changes)
    if seeds is not None:
        defined = dataclasses.replace(defined, seeds=seeds)
    if not defined.rows and not defined.space and defined.seeds == 1:
        raise ConfigError(f"{name}: varies nothing; give --vary KEY=V1,V2 or --seeds N, or use `pretrain`")
    return defined


def _resume_sweep(name: str, given: str | None, changes: dict[str, Any], model: str | None) -> None:
    from orchestrator.records import SWEEP_FILE, read_json
    from orchestrator.runs import find_folder
    from orchestrator.sweep_file import load_sweep

    changes, storage = _resume_changes(changes)
    begun = read_json(find_folder(name, storage, "sweep") / SWEEP_FILE)["sweep"]
    if given is not None and load_sweep(given).name != begun:
        raise ConfigError(f"--resume {name}: is a run of the sweep {begun!r}, not of {given!r}")
    from orchestrator.run_sweep import resume_sweep

    _end_sweep(resume_sweep(name, changes, storage=storage), model)


def _resume_run(run: str, recipe: str | None, changes: dict[str, Any], model: str | None) -> None:
    from orchestrator.records import RunRecord
    from orchestrator.runs import find_folder

    changes, storage = _resume_changes(changes)
    begun = RunRecord.read(find_folder(run, storage, "run")).recipe
    if recipe is not None and recipe != begun:
        raise ConfigError(f"--resume {run}: is a run of the recipe {begun!r}, not of {recipe!r}")
    from orchestrator.pretrain import resume

    _register_best(resume(run, changes, storage=storage).folder, model)


def _storage_changes(settings: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Settings of where records are and go; no others."""
    from orchestrator.overrides import parse_assignments

    changes, storage = _resume_changes(parse_assignments(settings))
    wrong = [key for key in changes if not key.startswith(("cluster.storage", "tracking."))]
    if wrong:
        raise ConfigError(f"{wrong[0]}: is of the record already; cluster.storage and tracking.* can be given here")
    return changes, storage


def _resume_changes(changes: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The changes with their types, and the storage in which to look."""
    from orchestrator.config import RunConfig
    from orchestrator.overrides import check_values, config_keys

    typed, problems = check_values(config_keys(), changes)
    if problems:
        raise ConfigError("\n".join(problems))
    return typed, typed.get("cluster.storage", RunConfig().cluster.storage)


def _refuse_with_resume(options: dict[str, Any]) -> None:
    wrong = [name for name, value in options.items() if value]
    if wrong:
        raise click.UsageError(f"--resume goes on with what was begun, and cannot be combined with {wrong[0]}.")


def _check_calibrate(dry_run: bool, calibrate: bool) -> None:
    if calibrate and not dry_run:
        raise click.UsageError("--calibrate measures for --dry-run, and cannot be given without it.")


def _end_sweep(result: SweepResult, model: str | None) -> None:
    """Register the best trial if that is wished. Raise RunFailed if trials failed."""
    _register_best(result.folder, model)
    if not result.ok:
        failed = result.failed
        reasons = "\n".join(f"{trial}: {reason}" for trial, reason in failed.items())
        raise RunFailed(f"{len(failed)} {'trial' if len(failed) == 1 else 'trials'} failed\n{reasons}")


def _check_model_name(model: str | None) -> None:
    if model is not None:
        from orchestrator.registry import check_model_name

        check_model_name(model)


def _register_best(folder: Path, model: str | None, changes: Mapping[str, Any] | None = None) -> None:
    from orchestrator.launch import torchrun_world

    if model is None or torchrun_world()[0] > 0:
        return
    from orchestrator.registry import register_best, target_of

    click.echo(register_best(folder, model, target_of(folder, changes)).describe())


def _complain(message: str) -> None:
    first, *rest = message.splitlines()
    click.echo(f"error: {first}", err=True)
    for line in rest:
        click.echo(f"       {line}", err=True)


def _hint_at_setting(error: click.UsageError) -> None:
    """Say how settings are given where one was written like an option."""
    if isinstance(error, click.NoSuchOption) and "." in error.option_name:
        click.echo(f"Settings have no dashes: {error.option_name.lstrip('-')}=VALUE", err=True)
