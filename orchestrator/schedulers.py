"""Tune's schedulers for `Sweep.scheduler`, and what can be said of them before anything starts. Imports no ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.config import RunConfig

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

SchedulerName = Literal["none", "asha", "median", "hyperband", "pbt"]


def scheduler_problems(scheduler: str, grace_steps: int | None, brackets: int) -> list[str]:
    """What is wrong with a sweep's choice of scheduler, each line opening with the setting; of `pbt`
    `population.population_problems` says more."""
    problems = []
    if scheduler not in ("none", "pbt") and grace_steps is None:
        problems.append(
            f"grace_steps = None: must be a whole number >= 1 when sweep.scheduler = {scheduler}, "
            "the steps that every trial gets before it can be stopped"
        )
    if brackets > 1 and scheduler != "hyperband":
        problems.append(f"brackets = {brackets}: must be 1 with sweep.scheduler = {scheduler}; hyperband has several")
    elif brackets < 2 and scheduler == "hyperband":
        problems.append("brackets = 1: must be >= 2 with sweep.scheduler = hyperband; a single one is asha")
    return problems


def last_first_rung(scheduler: str, grace_steps: int, reduction_factor: int, brackets: int) -> int:
    """The step by which a trial of every bracket has been judged for the first time."""
    return grace_steps * (reduction_factor ** (brackets - 1) if scheduler == "hyperband" else 1)


def rungs(grace_steps: int, reduction_factor: int, total_steps: int) -> list[int]:
    """The steps at which asha, or the first bracket of hyperband, judges trials of `total_steps`."""
    count = math.ceil(math.log(total_steps / grace_steps, reduction_factor) - 1e-9) if total_steps > grace_steps else 0
    return [grace_steps * reduction_factor**power for power in range(count)]


def describe_scheduler(scheduler: str, grace_steps: int | None, reduction_factor: int, brackets: int) -> str:
    """In a line."""
    if scheduler == "none":
        return "none: every trial runs to its end"
    if scheduler == "median":
        return f"median: a trial below the median of the others goes, first judged after {grace_steps} steps"
    what = f"1 in {reduction_factor} goes on, first judged after {grace_steps} steps"
    if scheduler == "asha":
        return f"asha: {what}"
    return f"hyperband: {brackets} brackets of asha; in the first {what}, in each next one x {reduction_factor} later"


def scheduler_notes(scheduler: str, configs: Iterable[RunConfig]) -> list[str]:
    """What may surprise: trials that are judged early by schedules that have not come down yet."""
    if scheduler == "none":
        return []
    unfair = sorted({key for config in configs for key in _following_the_length(config)})
    if not unfair:
        return []
    return [
        f"sweep.scheduler = {scheduler}: compares trials long before the end to which {', '.join(unfair)} "
        f"{'follows' if len(unfair) == 1 else 'follow'} a schedule; with pretrain.optim.schedule = wsd and constant "
        "momentum and weight decay a trial is judged as a run of that length (docs/sweeps.md, Stopping early)"
    ]


def _following_the_length(config: RunConfig) -> list[str]:
    """The keys of values that, early in the run, depend on how long it will be."""
    optim, teacher = config.pretrain.optim, config.pretrain.teacher
    keys = ["pretrain.optim.schedule"] if optim.schedule == "cosine" else []
    if optim.weight_decay_schedule != "constant" and optim.weight_decay != optim.final_weight_decay:
        keys.append("pretrain.optim.weight_decay_schedule")
    moves = teacher.momentum_schedule != "constant" and teacher.momentum != teacher.final_momentum
    if teacher.update == "ema" and moves:
        keys.append("pretrain.teacher.momentum_schedule")
    return keys


def make_scheduler(definition: Mapping[str, Any], longest: int) -> TrialScheduler | None:
    """Tune's scheduler for a sweep's definition (`sweep.json`); None runs every trial to its end, as the segments of a
    population do, of which `orchestrator.population` decides.

    All count in our own optimiser steps: Tune's `training_iteration` starts again when a trial is restarted.

    HyperBand is the asynchronous one, ASHA with brackets, which Ray recommends before its `HyperBandScheduler`: that
    one pauses trials until all others of a bracket have come as far, by a checkpoint that Tune keeps. Ours are on disk,
    so a trial goes on from the newest of them: what it trained since would be trained twice.

    Args:
        longest: Steps of the longest trial.
    """
    name = definition["scheduler"]
    if name in ("none", "pbt"):
        return None
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    judged_by = {"time_attr": "step", "metric": definition["metric"], "mode": definition["mode"]}
    if name == "median":
        return MedianStoppingRule(
            **judged_by,
            grace_period=definition["grace_steps"],
            # While there are too few results to judge by, Tune would pause a trial after this many steps for another
            # to begin, which costs the steps since its last checkpoint. It compares with minus infinity at first.
            min_time_slice=math.inf,  # type: ignore[arg-type]
        )
    return ASHAScheduler(
        **judged_by,
        grace_period=definition["grace_steps"],
        reduction_factor=definition["reduction_factor"],
        brackets=definition.get("brackets", 1),  # sweeps written before there were brackets have none
        # A trial ends by itself; at max_t ASHA would cut its last evaluation off.
        max_t=longest + 1,
    )
