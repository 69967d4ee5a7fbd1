"""What a run or sweep would do, in numbers, without starting anything: its configuration, size and cost.

Everything that can be refused is refused before torch is imported. What is printed about cost is counted by
`orchestrator.cost` and turned into hours by `orchestrator.estimate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dino_core.schedules import build_schedules
from dino_core.stages import stages_of
from orchestrator.config import RunConfig
from orchestrator.cost import MOMENTS, StepCost
from orchestrator.cost_table import CostTable, bytes_in_words, number_of
from orchestrator.data.shelf import num_streams
from orchestrator.definition import design_lines
from orchestrator.estimate import share_that_runs
from orchestrator.metric_choice import choice_for_sweep
from orchestrator.overrides import flatten, show
from orchestrator.population import GENERATIONS_KEPT, describe_population, generations_of
from orchestrator.preflight import open_sources
from orchestrator.ray_cluster import Capacity, Demand, cluster_address, plan_concurrency, resolve_launcher
from orchestrator.runs import Trial
from orchestrator.schedulers import describe_scheduler
from orchestrator.sweep import Sweep, check, short_names
from orchestrator.tracking import Target

_MAX_TRIALS_SHOWN = 100
_MAX_VALUES_SHOWN = 20
_LAUNCHERS = {
    "local": "local: this process, no Ray",
    "trial": "trial: the Tune trial's own process",
    "train": "train: a Ray TorchTrainer",
}


def print_run(config: RunConfig, recipe: str, write: Callable[[str], None] = print, *, calibrate: bool = False) -> None:
    """Print one run; `calibrate` takes a few of its steps to know its speed. Raises ConfigError if it cannot run."""
    source = open_sources([config])[config.data]
    schedules = build_schedules(config.pretrain, source.num_samples)
    steps = schedules.total_steps
    table = CostTable.of([(recipe, config, steps)], {config.data: source}, measure_steps=calibrate, write=write)
    write(f"{recipe}: dry run, nothing is started\n")
    _print_config(config, {}, write)
    launcher = resolve_launcher(config.cluster, in_sweep=False)
    here = _is_here(config)
    lines = {
        "launcher": _LAUNCHERS[launcher],
        "needs": _demand(config),
        "data": source.describe(),
        "steps": f"{steps:,} = {steps / schedules.steps_per_epoch:,.4g} epochs",
        **_stage_lines(config, source.num_samples),
        "images": f"{steps * config.pretrain.batch_size:,}, {_crops([config])}",
        "learning rate": f"{schedules.peak_lr:g} at its peak",
        **_size_lines(config, table.largest.cost),
        **_record_lines(config, recipe, recipe),
    }
    _print_lines("Plan", lines, write)
    write("")
    _print_lines("Cost", {**_flop_lines(table.largest.cost), **table.lines(1, here=here)}, write)
    _print_problems(table.problems(1, here=here), write)


def print_sweep(
    sweep: Sweep, trials: Sequence[Trial], write: Callable[[str], None] = print, *, calibrate: bool = False
) -> None:
    """Print a sweep that was expanded; `calibrate` as in `print_run`. Raises ConfigError if a trial cannot run."""
    sources = open_sources(trial.config for trial in trials)
    labelled = all(source.has_test_labels for source in sources.values())
    choice = choice_for_sweep(sweep.metric, sweep.mode, (trial.config for trial in trials), has_labels=labelled)
    steps = [build_schedules(t.config.pretrain, sources[t.config.data].num_samples).total_steps for t in trials]
    runs = [(trial.trial_id, trial.config, count) for trial, count in zip(trials, steps, strict=True)]
    table = CostTable.of(runs, sources, measure_steps=calibrate, write=write)
    largest = table.largest
    images = sum(count * t.config.pretrain.batch_size for count, t in zip(steps, trials, strict=True))
    write(f"{sweep.name}: dry run of a sweep, nothing is started\n")
    config = trials[0].config
    _print_config(config, _varied(sweep, trials), write)
    _print_rows(sweep, write)
    _print_trials(sweep, trials, write)
    combinations = len(trials) // sweep.seeds
    each = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"
    lines = {
        "trials": f"{len(trials)} = {number_of(combinations, 'combination')} x {number_of(sweep.seeds, 'seed')}",
        **design_lines(check(sweep), trials, choice),
        "compared by": f"{choice.metric}, {choice.mode}: {choice.why}",
        **({"the paper's": sweep.paper_setting} if sweep.paper_setting else {}),
        "scheduler": _scheduler(sweep, trials, min(steps)),
        "launcher": _LAUNCHERS[resolve_launcher(config.cluster, in_sweep=True)],
        "each trial needs": _demand(config),
        "at once": _at_once([trial.config for trial in trials]),
        "data": "; ".join(source.describe() for source in sources.values()),
        "steps": f"{each} per trial, {sum(steps):,} in all",
        "images": f"{images:,} in all, {_crops([trial.config for trial in trials])}",
        **_size_lines(largest.config, largest.cost, f"{largest.name}: " if len(table.kinds) > 1 else ""),
        **_record_lines(config, sweep.name, sweep.name),
    }
    _print_lines("Plan", lines, write)
    write("")
    _print_cost(sweep, table, [trial.config for trial in trials], sum(steps) / len(steps), write)


def _stage_lines(config: RunConfig, num_samples: int) -> dict[str, str]:
    """What is other in each stage of a run that has several."""
    if not config.pretrain.stages:
        return {}
    set_by = [{"crops.global_size": config.pretrain.crops.global_size}, *flatten(config)["pretrain.stages"]]
    lines = {}
    for stage, changes in zip(stages_of(config.pretrain, num_samples), set_by, strict=True):
        shown = ", ".join(f"{key}={show_value(value)}" for key, value in changes.items() if key != "steps")
        lines[f"  stage {stage.index + 1}"] = f"steps {stage.start:,} to {stage.stop - 1:,}: {shown or 'no change'}"
    return lines


def _scheduler(sweep: Sweep, trials: Sequence[Trial], steps: int) -> str:
    if sweep.scheduler != "pbt":
        return describe_scheduler(sweep.scheduler, sweep.grace_steps, sweep.reduction_factor, sweep.brackets)
    generations_of(sweep, steps)
    return describe_population(sweep, len(trials))


def _print_cost(
    sweep: Sweep, table: CostTable, configs: Sequence[RunConfig], mean_steps: float, write: Callable[[str], None]
) -> None:
    here = _is_here(table.config)
    at_once = _num_at_once(configs)
    _print_table("Cost of a trial", table.rows(at_once, here=here), write)
    expected = share_that_runs(sweep, round(mean_steps))
    stops = sweep.scheduler not in ("none", "pbt")
    _print_lines("Cost in all", table.lines(at_once, here=here, expected=expected, stops=stops), write)
    folders = GENERATIONS_KEPT if sweep.scheduler == "pbt" else 1
    _print_problems(table.problems(at_once, here=here, folders=folders), write)


def _print_config(config: RunConfig, space: Mapping[str, Sequence[Any]], write: Callable[[str], None]) -> None:
    flat = flatten(config)
    width = max(map(len, flat))
    write("Configuration")
    for key, value in flat.items():
        varied = space.get(key, ())
        shown = "varies: " + _values_in_words(varied) if len(varied) > 1 else show_value(value)
        write(f"  {key:<{width}}  {shown}")
    write("")


def _values_in_words(values: Sequence[Any]) -> str:
    shown = ", ".join(map(show_value, values[:_MAX_VALUES_SHOWN]))
    left_out = len(values) - _MAX_VALUES_SHOWN
    return f"{shown} and {left_out} more" if left_out > 0 else shown


def _varied(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """The values that each key takes over the trials, of the keys that rows set or the space varies."""
    flat = [flatten(trial.config) for trial in trials]
    keys = {*sweep.space, *(key for trial in trials for key in trial.changes)}
    found: dict[str, list[Any]] = {key: [] for key in keys}
    for values in flat:
        for key in keys:
            if values[key] not in found[key]:
                found[key].append(values[key])
    return found


def _print_rows(sweep: Sweep, write: Callable[[str], None]) -> None:
    """What each row sets, and the paper's numbers for it."""
    lines = {}
    for name, row in sweep.rows.items():
        parts = [f"method {row.method}"] if row.method else []
        parts += [f"{key}={show_value(value)}" for key, value in row.changes.items()]
        numbers = ", ".join(f"{metric} {value:g}" for metric, value in row.paper.items())
        lines[name] = ", ".join(parts or ["the base as it is"]) + (f"; paper: {numbers}" if numbers else "")
    if lines:
        _print_lines("Rows", lines, write)
        write("")


def _print_trials(sweep: Sweep, trials: Sequence[Trial], write: Callable[[str], None]) -> None:
    names = short_names(list(sweep.space))
    rows = [["trial", *names.values(), "seed"]]
    rows += [[t.trial_id, *(_shown(t, key) for key in names), str(t.seed)] for t in trials]
    left_out = len(trials) - _MAX_TRIALS_SHOWN
    if left_out > 1:
        half = _MAX_TRIALS_SHOWN // 2
        rows[1 + half : -half] = [[f"... and {left_out} more", *[""] * (len(rows[0]) - 1)]]
    _print_table("Trials", rows, write)


def _print_table(title: str, rows: Sequence[Sequence[str]], write: Callable[[str], None]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    write(title)
    for row in rows:
        write("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    write("")


def _print_problems(problems: Sequence[str], write: Callable[[str], None]) -> None:
    if problems:
        write("\nWill not fit")
        for problem in problems:
            write(f"  {problem}")


def _shown(trial: Trial, key: str) -> str:
    """The value of a varied key; a dash where the trial has the base's."""
    return show_value(trial.changes[key]) if key in trial.changes else "-"


def _print_lines(title: str, lines: Mapping[str, str], write: Callable[[str], None]) -> None:
    width = max(map(len, lines))
    write(title)
    for name, text in lines.items():
        write(f"  {name:<{width}}  {text}")


def show_value(value: Any) -> str:
    """A value as it would be given on the command line."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {show_value(element)}" for name, element in value.items()) + "}"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return show(value)


def _demand(config: RunConfig) -> str:
    demand = Demand.of(config)
    gpus = number_of(demand.gpus, "GPU") if demand.gpus else "no GPU"
    return (
        f"{number_of(demand.workers, 'worker')}: {number_of(demand.cpus, 'CPU')} and {gpus}; "
        f"{number_of(demand.data_cpus, 'CPU')} for the data"
    )


def _at_once(trials: Sequence[RunConfig]) -> str:
    config = trials[0]
    address = cluster_address(config.cluster)
    if address is not None:
        most = config.cluster.max_concurrent_trials
        return f"as many as fit on the cluster {address}" + (f", at most {most}" if most else "")
    here = Capacity.of_this_machine()
    streams = num_streams(trials) if config.cluster.share_crops else None
    count = plan_concurrency(config, here, len(trials), streams)
    demand = Demand.of(config)
    gpus = f" and {number_of(count * demand.gpus, 'GPU')}" if demand.gpus else ""
    cpus = count * demand.cpus + min(count, streams or count) * demand.data_cpus
    return f"{number_of(count, 'trial')} on this machine, {cpus} of {here.cpus:g} CPUs{gpus}"


def _is_here(config: RunConfig) -> bool:
    """Whether it runs on this machine, alone or by a Ray that is started here."""
    return config.cluster.launcher == "local" or cluster_address(config.cluster) is None


def _num_at_once(configs: Sequence[RunConfig]) -> int:
    """Trials that run at once on this machine; on a cluster that is not asked before the start, the most allowed."""
    if not _is_here(configs[0]):
        return configs[0].cluster.max_concurrent_trials or 1
    streams = num_streams(configs) if configs[0].cluster.share_crops else None
    return plan_concurrency(configs[0], Capacity.of_this_machine(), len(configs), streams)


def _crops(configs: Sequence[RunConfig]) -> str:
    counts = sorted({config.pretrain.crops.num_local_crops for config in configs})
    shown = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"each as 2 global{f' and {shown} local' if counts[-1] else ''} crops"


def _flop_lines(cost: StepCost) -> dict[str, str]:
    flops = cost.flops
    parts = (("teacher", flops.teacher), ("student", flops.student), ("backward", flops.backward))
    shown = ", ".join(f"{name} {value / 1e9:,.4g}" for name, value in parts)
    return {"each image": f"{flops.total / 1e9:,.4g} GFLOP: {shown}"}


def _size_lines(config: RunConfig, size: StepCost, which: str = "") -> dict[str, str]:
    moments = MOMENTS[config.pretrain.optim.name]
    share = config.pretrain.batch_size // config.cluster.num_workers
    held = "in fp32, at most" if config.pretrain.precision == "fp32" else "counted in fp32, so less with bf16"
    return {
        "parameters": f"{which}backbone {_count(size.backbone)} + head {_count(size.head)}, student and teacher each",
        "memory": f"{which}about {bytes_in_words(size.total)} per worker for a step of {share} images:",
        "  weights": f"{bytes_in_words(size.weights)}  student, gradients, {moments} optimiser moments, teacher, queue",
        "  activations": f"{bytes_in_words(size.activations)}  kept for the backward pass, {held} (attention unfused)",
        "  logits": f"{bytes_in_words(size.logits)}  of all crops, their softmax and gradient",
        "  not included": "Python, torch, CUDA and Ray themselves (1 to 2.5 GB per process), and images in Ray's store",
    }


def _record_lines(config: RunConfig, name: str, experiment: str) -> dict[str, str]:
    return {
        "records": f"{config.cluster.storage}/{name}-<time>",
        "MLflow": f"experiment {config.tracking.experiment or experiment} at {Target.of(config.tracking).shown}",
    }


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M"
