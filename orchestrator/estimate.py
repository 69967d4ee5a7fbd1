"""How long runs and sweeps will take and what of the machine they need, before anything runs.

Times are assumed (a share of a GPU's published peak) or measured by `orchestrator.calibrate`; without either there are
none. Not in any of them: starting Ray and the processes, writing checkpoints, delivering the record.
"""

from __future__ import annotations

import heapq
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.config import RunConfig
from orchestrator.cost import StepCost
from orchestrator.gpus import ASSUMED_SHARE, Gpu

if TYPE_CHECKING:
    from orchestrator.data.split import Source
    from orchestrator.sweep import Sweep

PROCESS_BYTES = 1.2e9
"""Of a training process beside the step itself: Python, torch, Ray (measured: 0.9 to 1.5 GB)."""


@dataclass(frozen=True)
class Rate:
    """How fast one worker of a run is."""

    step_s: float
    """A step on its share of the batch."""
    batch_cpu_s: float
    """CPU time to decode and crop that share; 0 where it is not known."""
    eval_s: float
    """One image of an evaluation."""
    peak_bytes: int | None = None
    """Memory of the GPU that the step took, where that was measured."""


@dataclass(frozen=True)
class Amount:
    """What a run does from beginning to end."""

    steps: int
    images: int
    """Trained on, each time that one is."""
    evaluated: int
    """Images of evaluations, likewise."""
    flops: float

    @classmethod
    def of(
        cls, config: RunConfig, source: Source, steps: int, cost: StepCost, *, start: int = 0, ends: bool = True
    ) -> Amount:
        """Of the `steps` steps from `start` on, with which the run `ends` or goes on in another stage."""
        images = steps * config.pretrain.batch_size
        evaluated = _num_evaluations(config, start, start + steps, ends) * _images_of_evaluation(config, source)
        return cls(steps, images, evaluated, images * cost.flops.total + evaluated * cost.flops.backbone)


def _num_evaluations(config: RunConfig, start: int, stop: int, ends: bool) -> int:
    """Before the first step of the run, between its steps, and after the last."""
    every = config.pretrain.eval.every_steps
    between = (stop - 1) // every - max(0, start - 1) // every if every else 0
    return (start == 0) + between + ends


def _images_of_evaluation(config: RunConfig, source: Source) -> int:
    settings, num = config.pretrain.eval, len(source.train)
    free = min(num, settings.num_label_free)
    views = min(num, settings.num_lidar_images) * settings.num_lidar_views if free else 0
    if source.test is None or not source.has_test_labels:
        return free + views
    gallery, queries = settings.num_gallery or num, settings.num_queries or len(source.test)
    return max(free, min(num, gallery)) + min(len(source.test), queries) + views


def assumed_rate(config: RunConfig, cost: StepCost, gpu: Gpu) -> Rate | None:
    """On a GPU, by the assumed share of its published peak; None if it does not know the precision."""
    peak = gpu.peak(config.pretrain.precision)
    if peak is None:
        return None
    per_s = peak * 1e12 * ASSUMED_SHARE[config.pretrain.precision]
    share = config.pretrain.batch_size / config.cluster.num_workers
    return Rate(share * cost.flops.total / per_s, 0.0, cost.flops.backbone / per_s)


def device_word(config: RunConfig) -> str:
    return "GPU" if config.cluster.use_gpu else "core"


def run_seconds(config: RunConfig, amount: Amount, rate: Rate, at_once: int = 1, cores: int | None = None) -> float:
    """Seconds of training and evaluation.

    Args:
        at_once: Runs that share the machine.
        cores: CPU cores of that machine. A step then takes at least the CPU time of all these runs' steps and crops
            over the cores; None where the runs have machines of their own.
    """
    cluster = config.cluster
    data_s = rate.batch_cpu_s / max(1, cluster.data_cpus // cluster.num_workers)
    step_s = max(rate.step_s, data_s)
    if cores is not None:
        busy_s = rate.batch_cpu_s + (0.0 if cluster.use_gpu else rate.step_s * cluster.cpus_per_worker)
        step_s = max(step_s, at_once * cluster.num_workers * busy_s / cores)
    return amount.steps * step_s + amount.evaluated * rate.eval_s / cluster.num_workers


def wall_seconds(seconds: Sequence[float], at_once: int) -> float:
    """From the first start to the last end, each run starting in order as soon as one of `at_once` places is free."""
    places = [0.0] * at_once
    for length in seconds:
        heapq.heappush(places, heapq.heappop(places) + length)
    return max(places)


def share_that_runs(sweep: Sweep, steps: int) -> float:
    """Share of a trial's steps that it takes on average when ASHA stops all but one in `reduction_factor` of the trials
    that reach a rung, rung after rung. As trials come to a rung one by one, and early ones have few to be compared
    with, some more go on."""
    if sweep.scheduler != "asha" or sweep.grace_steps is None:
        return 1.0
    taken, going_on, rung = 0.0, 1.0, 0
    end = sweep.grace_steps
    while rung < steps:
        taken += going_on * (min(end, steps) - rung)
        rung, end, going_on = end, end * sweep.reduction_factor, going_on / sweep.reduction_factor
    return taken / steps


def what_does_not_fit(
    runs: Mapping[str, tuple[RunConfig, StepCost, int | None]],
    at_once: int,
    gpu_bytes: float | None,
    *,
    on_this_machine: bool,
    num_trials: int = 1,
) -> list[str]:
    """A line for each thing that this machine has too little of.

    Args:
        runs: By the name of one of them, runs that cost the same, and the memory that a step took where measured.
        at_once: How many run at once.
        gpu_bytes: Memory of one of the GPUs that are meant, if any is known.
        on_this_machine: Whether they train here, so that its memory counts.
        num_trials: All runs, each of which leaves its checkpoints.
    """
    problems = []
    for name, (config, cost, measured) in runs.items():
        if config.cluster.use_gpu:
            if gpu_bytes is None:
                continue
            least, most = _step_bytes(config, cost, measured)
            if most > gpu_bytes:
                certain = "will not" if least > gpu_bytes else "may not"
                problems.append(
                    f"{name}: a step takes {'' if measured else 'about '}{most / 1e9:.1f} GB, which {certain} fit into "
                    f"the {gpu_bytes / 1e9:.1f} GB of a GPU; pretrain.accumulate_steps, "
                    "pretrain.model.activation_checkpointing, cluster.num_workers and, with several of them, "
                    "pretrain.parallel_strategy = fsdp make it less"
                )
        elif on_this_machine:
            import psutil

            there = psutil.virtual_memory().total
            needed = at_once * config.cluster.num_workers * (cost.total + PROCESS_BYTES)
            if needed > there:
                problems.append(
                    f"{name}: {at_once * config.cluster.num_workers} processes with about "
                    f"{(cost.total + PROCESS_BYTES) / 1e9:.1f} GB each will not fit into the {there / 1e9:.1f} GB of "
                    "this machine; cluster.max_concurrent_trials or pretrain.batch_size make it less"
                )
    return problems + _disk_problems(runs, num_trials)


def _step_bytes(config: RunConfig, cost: StepCost, measured: int | None) -> tuple[float, float]:
    """The least and the most that a step can take: in half precision activations are between half and all of what is
    counted in fp32."""
    if measured is not None:
        return measured, measured
    half = config.pretrain.precision != "fp32"
    return cost.total - (cost.activations / 2 if half else 0), cost.total


def _disk_problems(runs: Mapping[str, tuple[RunConfig, StepCost, int | None]], num_trials: int) -> list[str]:
    config = next(iter(runs.values()))[0]
    folder = os.path.abspath(config.cluster.storage)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    largest = max(cost.checkpoint for _, cost, _ in runs.values())
    needed = largest * (num_trials * config.cluster.keep_checkpoints + 1)  # one more while the next is written
    if needed <= free:
        return []
    return [
        f"cluster.storage = {config.cluster.storage}: up to {needed / 1e9:.1f} GB of checkpoints will not fit into the "
        f"{free / 1e9:.1f} GB that are free; cluster.keep_checkpoints makes it less"
    ]
