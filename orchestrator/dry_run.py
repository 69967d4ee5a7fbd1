"""What a run or sweep would do, in numbers, without starting anything: its configuration, size and needs.

Everything that can be refused is refused before torch is imported; torch then builds each model without memory (on its
meta device) to count parameters and what autograd would hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dino_core.config import PretrainConfig
from dino_core.schedules import build_schedules
from orchestrator.config import RunConfig
from orchestrator.data.shelf import num_streams
from orchestrator.definition import design_lines
from orchestrator.metric_choice import choice_for_sweep
from orchestrator.overrides import flatten, show
from orchestrator.preflight import open_sources
from orchestrator.ray_cluster import Capacity, Demand, cluster_address, plan_concurrency, resolve_launcher
from orchestrator.runs import Trial
from orchestrator.schedulers import describe_scheduler
from orchestrator.sweep import Sweep, check, short_names
from orchestrator.tracking import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

_FLOAT = 4
_MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}
"""Values that the optimiser keeps for each parameter."""
_LAUNCHERS = {
    "local": "local: this process, no Ray",
    "trial": "trial: the Tune trial's own process",
    "train": "train: a Ray TorchTrainer",
}


@dataclass(frozen=True)
class ModelSize:
    """Parameters of one run, and bytes of memory that one of its workers needs for them and for a step."""

    backbone: int
    """Parameters of the student's backbone."""
    head: int
    """Parameters of the student's head."""
    weights: int
    """Bytes: student, its gradients, the optimiser's moments, teacher, queue of negatives."""
    activations: int
    """Bytes that autograd holds between the student's forward and backward pass, in fp32."""
    logits: int
    """Bytes: logits of student and teacher, their softmax, and the gradient."""

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.logits


def print_run(config: RunConfig, recipe: str, write: Callable[[str], None] = print) -> None:
    """Print one run. Raises ConfigError if it cannot run."""
    source = open_sources([config])[config.data]
    size = measure(config)
    write(f"{recipe}: dry run, nothing is started\n")
    _print_config(config, {}, write)
    launcher = resolve_launcher(config.cluster, in_sweep=False)
    schedules = build_schedules(config.pretrain, source.num_samples)
    steps = schedules.total_steps
    lines = {
        "launcher": _LAUNCHERS[launcher],
        "needs": _demand(config),
        "data": source.describe(),
        "steps": f"{steps:,} = {steps / schedules.steps_per_epoch:,.4g} epochs",
        "images": f"{steps * config.pretrain.batch_size:,}, {_crops([config])}",
        "learning rate": f"{schedules.peak_lr:g} at its peak",
        **_size_lines(config, size),
        **_record_lines(config, recipe, recipe),
    }
    _print_lines("Plan", lines, write)


def print_sweep(sweep: Sweep, trials: Sequence[Trial], write: Callable[[str], None] = print) -> None:
    """Print a sweep that was expanded. Raises ConfigError if one of its trials cannot run."""
    sources = open_sources(trial.config for trial in trials)
    labelled = all(source.has_test_labels for source in sources.values())
    choice = choice_for_sweep(sweep.metric, sweep.mode, (trial.config for trial in trials), has_labels=labelled)
    sizes: dict[tuple[object, ...], ModelSize] = {}
    for trial in trials:
        relevant = _what_counts(trial.config)
        if relevant not in sizes:
            sizes[relevant] = measure(trial.config)
    largest = max(trials, key=lambda trial: sizes[_what_counts(trial.config)].total)
    steps = [build_schedules(t.config.pretrain, sources[t.config.data].num_samples).total_steps for t in trials]
    images = sum(count * t.config.pretrain.batch_size for count, t in zip(steps, trials, strict=True))
    write(f"{sweep.name}: dry run of a sweep, nothing is started\n")
    config = trials[0].config
    _print_config(config, _varied(sweep, trials), write)
    _print_rows(sweep, write)
    _print_trials(sweep, trials, write)
    combinations = len(trials) // sweep.seeds
    each = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"
    lines = {
        "trials": f"{len(trials)} = {_number(combinations, 'combination')} x {_number(sweep.seeds, 'seed')}",
        **design_lines(check(sweep), trials, choice),
        "compared by": f"{choice.metric}, {choice.mode}: {choice.why}",
        **({"the paper's": sweep.paper_setting} if sweep.paper_setting else {}),
        "scheduler": describe_scheduler(sweep.scheduler, sweep.grace_steps, sweep.reduction_factor, sweep.brackets),
        "launcher": _LAUNCHERS[resolve_launcher(config.cluster, in_sweep=True)],
        "each trial needs": _demand(config),
        "at once": _at_once([trial.config for trial in trials]),
        "data": "; ".join(source.describe() for source in sources.values()),
        "steps": f"{each} per trial, {sum(steps):,} in all",
        "images": f"{images:,} in all, {_crops([trial.config for trial in trials])}",
        **_size_lines(largest.config, sizes[_what_counts(largest.config)], "largest trial: " if len(sizes) > 1 else ""),
        **_record_lines(config, sweep.name, sweep.name),
    }
    _print_lines("Plan", lines, write)


def measure(config: RunConfig) -> ModelSize:
    """Build the run's student on torch's meta device and count. Raises ConfigError if model and crops do not fit."""
    import torch

    from dino_core.networks import build_student, build_teacher

    pretrain = config.pretrain
    with torch.device("meta"):
        student = build_student(pretrain)
        build_teacher(student, pretrain)
    backbone, head = (sum(p.numel() for p in part.parameters()) for part in (student.backbone, student.head))
    everything = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    per_worker = pretrain.batch_size // config.cluster.num_workers
    per_pass = per_worker // pretrain.accumulate_steps
    num_crops = 2 + pretrain.crops.num_local_crops
    num_outputs = pretrain.head.num_prototypes or pretrain.head.bottleneck_dim
    queue = (pretrain.loss.queue_size or 0) * num_outputs
    compared = 0  # outputs that each output of the student is told from
    if pretrain.loss.name == "info_nce":
        compared = pretrain.loss.queue_size or 2 * pretrain.batch_size
    return ModelSize(
        backbone=backbone,
        head=head,
        weights=_FLOAT * (everything + backbone + head + trained * (1 + _MOMENTS[pretrain.optim.name]) + queue),
        activations=_held_by_autograd(student, pretrain, per_pass),
        # student, of one pass: logits, log-softmax, gradient; teacher, of the whole batch: logits, softmax
        # and for info_nce the similarities, their exponentials and gradient
        logits=_FLOAT
        * (num_outputs * (3 * num_crops * per_pass + 2 * 2 * per_worker) + 3 * num_crops * per_pass * compared),
    )


def _held_by_autograd(student: nn.Module, config: PretrainConfig, num_images: int) -> int:
    """Bytes of the tensors that a forward pass saves for the backward pass, without the parameters themselves."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    from dino_core.networks import CropNetwork

    assert isinstance(student, CropNetwork)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[StorageWeakRef(storage).cdata] = storage.nbytes()
        return tensor

    crops = config.crops
    shapes = [(2 * num_images, crops.global_size)]
    if crops.num_local_crops:
        shapes.append((crops.num_local_crops * num_images, crops.local_size))
    groups = [torch.empty(count, 3, size, size, device="meta") for count, size in shapes]
    student.begin_pass(config.seed, 0, num_images=num_images, share=num_images)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = student(groups)
    parameters = {StorageWeakRef(p.untyped_storage()).cdata for p in student.parameters()}
    del outputs  # everything saved is alive until here, so that no storage was counted under the name of another
    return sum(size for storage, size in saved.items() if storage not in parameters)


def _what_counts(config: RunConfig) -> tuple[object, ...]:
    """A key under which runs with models and steps of one size are measured once."""
    pretrain, crops = config.pretrain, config.pretrain.crops
    sizes = (pretrain.batch_size, pretrain.accumulate_steps, pretrain.loss.queue_size, pretrain.optim.name)
    shapes = (crops.num_local_crops, crops.global_size, crops.local_size)
    return (pretrain.model, pretrain.head, pretrain.predictor, *sizes, *shapes)


def _print_config(config: RunConfig, space: Mapping[str, Sequence[Any]], write: Callable[[str], None]) -> None:
    flat = flatten(config)
    width = max(map(len, flat))
    write("Configuration")
    for key, value in flat.items():
        shown = (
            "varies: " + ", ".join(map(show_value, space[key])) if len(space.get(key, ())) > 1 else show_value(value)
        )
        write(f"  {key:<{width}}  {shown}")
    write("")


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    write("Trials")
    for row in rows:
        write("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    write("")


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
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return show(value)


def _demand(config: RunConfig) -> str:
    demand = Demand.of(config)
    gpus = _number(demand.gpus, "GPU") if demand.gpus else "no GPU"
    return (
        f"{_number(demand.workers, 'worker')}: {_number(demand.cpus, 'CPU')} and {gpus}; "
        f"{_number(demand.data_cpus, 'CPU')} for the data"
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
    gpus = f" and {_number(count * demand.gpus, 'GPU')}" if demand.gpus else ""
    cpus = count * demand.cpus + min(count, streams or count) * demand.data_cpus
    return f"{_number(count, 'trial')} on this machine, {cpus} of {here.cpus:g} CPUs{gpus}"


def _crops(configs: Sequence[RunConfig]) -> str:
    counts = sorted({config.pretrain.crops.num_local_crops for config in configs})
    shown = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"each as 2 global{f' and {shown} local' if counts[-1] else ''} crops"


def _size_lines(config: RunConfig, size: ModelSize, which: str = "") -> dict[str, str]:
    moments = _MOMENTS[config.pretrain.optim.name]
    share = config.pretrain.batch_size // config.cluster.num_workers
    held = "in fp32, at most" if config.pretrain.precision == "fp32" else "counted in fp32, so less with bf16"
    return {
        "parameters": f"{which}backbone {_count(size.backbone)} + head {_count(size.head)}, student and teacher each",
        "memory": f"{which}about {_bytes(size.total)} per worker for a step of {share} images:",
        "  weights": f"{_bytes(size.weights)}  student, gradients, {moments} optimiser moments, teacher, queue if any",
        "  activations": f"{_bytes(size.activations)}  kept for the backward pass, {held} (attention unfused)",
        "  logits": f"{_bytes(size.logits)}  of all crops, their softmax and gradient",
        "  not included": "Python, torch, CUDA and Ray themselves (1 to 2.5 GB per process), and images in Ray's store",
    }


def _record_lines(config: RunConfig, name: str, experiment: str) -> dict[str, str]:
    return {
        "records": f"{config.cluster.storage}/{name}-<time>",
        "MLflow": f"experiment {config.tracking.experiment or experiment} at {Target.of(config.tracking).uri}",
    }


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
