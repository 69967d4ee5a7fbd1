"""What trains: the same function in every launcher, once per worker.

A worker reads what to do from its run folder, builds the state (from the newest checkpoint if there is one), streams
its rows of the global batches, and leaves metrics in the run's journal. Only rank 0 writes. Modules that import torch
are imported inside the functions: Tune loads this module in processes that never train.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dino_core.config import ConfigError
from orchestrator.config import Launcher, RunConfig
from orchestrator.errors import RunFailed
from orchestrator.lean_imports import without_compiler
from orchestrator.lineage import lineage_curves
from orchestrator.overrides import override
from orchestrator.records import CHECKPOINTS_DIR, RUN_FILE, Journal, RunRecord, write_json
from orchestrator.run_clock import EvaluationBudget, RunClock
from orchestrator.stoppers import STOPPED_FILE, Collapsed, CollapseStopper, first_judged_step, stop_of
from orchestrator.system_metrics import recorded_machine

if TYPE_CHECKING:
    from dino_core.crops import MultiCrop
    from dino_core.train import Evaluate, TrainState
    from orchestrator.data.loaders import Loader
    from orchestrator.data.split import Source
    from orchestrator.data.stream import Batch
    from orchestrator.pictures import Pictures

FAILURE_FILE = "failure.json"
"""Why a run cannot succeed however often it is tried. The driver removes it before it starts the run anew."""

_NO_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"

Found = TypeVar("Found")
Report = Callable[[dict[str, float]], None]
"""Takes the newest value of every metric, with `step`. Called by every rank at the same steps."""


def read_failure(run_dir: Path) -> str | None:
    """The reason that the last attempt left, or None."""
    path = run_dir / FAILURE_FILE
    return str(json.loads(path.read_text())["reason"]) if path.exists() else None


@dataclass(frozen=True)
class Place:
    """Where a worker stands."""

    launcher: Launcher
    device: str
    rank: int = 0
    world: int = 1


def run_worker(run_dir: Path, place: Place, report: Report) -> None:
    """Train one run as one of its workers; the process group, if there are several, is there already.

    A failure that another attempt would only repeat (numbers that are not finite, too many unreadable images, no memory
    or disk space, a configuration that does not fit) is left in the run's failure file, where later attempts and the
    driver find it. So is how a run was ended whose record asks for it to be stopped when it has collapsed
    (`orchestrator.stoppers`); it is no failure.

    Raises:
        FileNotFoundError: The run folder is not visible on this machine.
        Exception: With several workers, any failure: the others may wait for this one, and the launcher must end them.
    """
    began = time.perf_counter()
    if not (run_dir / RUN_FILE).exists():
        raise FileNotFoundError(
            f"{run_dir}: not visible on this machine; cluster.storage must be a folder that all machines share"
        )
    if read_failure(run_dir) is not None or (run_dir / STOPPED_FILE).exists():
        return
    config = override(RunConfig(), RunRecord.read(run_dir).config)
    import torch

    with nullcontext() if config.pretrain.model.compile else without_compiler():
        from dino_core.checkpoint import CheckpointError
        from dino_core.train import NonFiniteLossError
        from orchestrator.data.stream import TooManyBadSamples

    torch.set_num_threads(config.cluster.cpus_per_worker)
    try:
        with recorded_machine(run_dir, place):
            _train(run_dir, config, place, report, began)
    except (
        *(ConfigError, RunFailed, NonFiniteLossError, CheckpointError),
        *(TooManyBadSamples, torch.OutOfMemoryError, MemoryError),
    ) as error:
        write_json(run_dir / FAILURE_FILE, {"reason": f"{type(error).__name__}: {error}"})
        if place.world > 1:
            raise
    except RuntimeError as error:
        if _NO_HOST_MEMORY in str(error):  # torch has no class for this one
            write_json(run_dir / FAILURE_FILE, {"reason": f"OutOfMemoryError: {str(error).splitlines()[0]}"})
        if _NO_HOST_MEMORY not in str(error) or place.world > 1:
            raise


def _train(run_dir: Path, config: RunConfig, place: Place, report: Report, began: float) -> None:
    from dino_core.checkpoint import (
        checkpoint_path,
        latest_checkpoint,
        load_checkpoint,
        prune_checkpoints,
        save_checkpoint,
    )
    from dino_core.train import TrainState, train
    from orchestrator.data.bad_samples import BadSampleLog
    from orchestrator.data.loaders import make_loader
    from orchestrator.data.sources import open_source

    pretrain = config.pretrain
    source = open_source(config.data)
    record = RunRecord.read(run_dir)
    digest = record.data_digest
    loader = make_loader(config, source, "train", digest)
    state = TrainState.create(pretrain, len(source.train), place.device)
    checkpoints = run_dir / CHECKPOINTS_DIR
    newest = _same_on_all_ranks(latest_checkpoint(checkpoints) if place.rank == 0 else None, place)
    if newest is None and record.segment is not None and record.segment.parent is not None:
        newest = checkpoint_path(run_dir.parent / record.segment.parent / CHECKPOINTS_DIR, record.segment.start_step)
    if newest is not None:
        load_checkpoint(state, newest)
    bad = BadSampleLog(run_dir, source.train, config.data)
    clock = RunClock(run_dir if place.rank == 0 else None, config.cluster.num_devices, began)
    journal = Journal(run_dir) if place.rank == 0 else None
    stopper = None
    if record.stop_collapsed:
        stopper = CollapseStopper(pretrain, first_judged_step(pretrain, state.schedules), lineage_curves(run_dir))
    latest: dict[str, float] = {}

    def on_log(step: int, metrics: dict[str, float]) -> None:
        num_bad = bad.check()
        metrics = metrics | clock.device_hours()
        if num_bad:
            metrics = {**metrics, "data/unreadable_images": num_bad}
        if journal is not None:
            journal.log(step, metrics)
        latest.update(metrics)
        with clock.during("report"):
            report({**latest, "step": step, "total_steps": state.schedules.total_steps})
        if stopper is not None:
            found = _same_on_all_ranks(stopper.observe(step, metrics), place)
            if found is not None:
                raise Collapsed(step, found)

    def on_checkpoint(state: TrainState) -> None:
        with clock.during("checkpoint"):
            save_checkpoint(state, checkpoints)
            if place.rank == 0:
                prune_checkpoints(checkpoints, config.cluster.keep_checkpoints)

    try:
        with closing(_batches(config, source, loader, state, record.last_step, place)) as batches:
            finished = (crops.finish(bad.note(batch), place.device) for crops, batch in clock.waiting_for(batches))
            evaluate = _evaluation(config, source, loader, run_dir, digest, place)
            if evaluate is not None:
                evaluate = _timed(evaluate, clock, place, record.last_step)
            clock.started()
            train(
                state,
                finished,
                on_log=on_log,
                on_checkpoint=on_checkpoint,
                evaluate=evaluate,
                stop_step=record.last_step,
            )
            if evaluate is None:  # else the last evaluation told that the run is complete
                report({**latest, "step": state.step, "total_steps": state.schedules.total_steps})
    except Collapsed as collapse:
        if place.rank == 0:
            stop_of(run_dir, "collapse", collapse.step, collapse.diagnosis).write(run_dir)
    finally:
        if journal is not None:
            journal.close()


def _evaluation(
    config: RunConfig, source: Source, loader: Loader, run_dir: Path, digest: str | None, place: Place
) -> Evaluate | None:
    """What is evaluated and drawn, with the crops of the stage that the state is in; None if nothing is."""
    from orchestrator.evaluation import make_evaluate
    from orchestrator.pictures import Pictures

    def of(config: RunConfig) -> Evaluate | None:
        evaluate = make_evaluate(config, source, digest)
        if not config.pretrain.eval.num_pictures:
            return evaluate
        pictures = Pictures(config, source, loader, run_dir) if place.rank == 0 else None
        return _with_pictures(evaluate, pictures, place)

    if not config.pretrain.stages:
        return of(config)
    made: dict[int, Evaluate | None] = {}

    def evaluate(state: TrainState) -> dict[str, float]:
        if state.stage not in made:
            made.clear()  # with the images that it keeps
            made[state.stage] = of(replace(config, pretrain=state.config))
        of_stage = made[state.stage]
        return of_stage(state) if of_stage is not None else {}

    return evaluate


def _timed(evaluate: Evaluate, clock: RunClock, place: Place, last_step: int) -> Evaluate:
    """An evaluation that also says where the time of the run went, its own included; left out where it would take more
    of it than `pretrain.eval.max_share`."""
    budget: EvaluationBudget | None = None

    def timed(state: TrainState) -> dict[str, float]:
        nonlocal budget
        max_share = state.config.eval.max_share
        budget = budget or EvaluationBudget(max_share)
        is_between = 0 < state.step < last_step
        if is_between and max_share is not None and not _same_on_all_ranks(budget.allows(), place):
            return {"time/evaluations_left_out": budget.num_left_out}
        with clock.during("evaluation"), budget.another() if is_between else budget.first():
            metrics = evaluate(state)
        return metrics | clock.parts()

    return timed


def _with_pictures(evaluate: Evaluate | None, pictures: Pictures | None, place: Place) -> Evaluate:
    """The evaluation, which draws as well where `pictures` are given: by rank 0; the others may hold parts of the
    backbone."""

    def evaluate_and_draw(state: TrainState) -> dict[str, float]:
        metrics = evaluate(state) if evaluate is not None else {}
        is_due = pictures is not None and pictures.is_due(state)
        if state.is_sharded:
            is_due = _same_on_all_ranks(is_due, place)
        if is_due:
            backbone = state.teacher_backbone()
            if pictures is not None:
                pictures.draw(state, backbone)
        return metrics

    return evaluate_and_draw


def _same_on_all_ranks(found: Found, place: Place) -> Found:
    """What rank 0 found: on a shared file system a machine may see a new or deleted file later than another."""
    if place.world == 1:
        return found
    import torch.distributed as dist

    objects = [found]
    dist.broadcast_object_list(objects)
    return objects[0]


def _batches(
    config: RunConfig, source: Source, loader: Loader, state: TrainState, stop_step: int, place: Place
) -> Generator[tuple[MultiCrop, Batch]]:
    """This worker's rows of every global batch from the state's step on, each with what has made its crops; by Ray Data
    wherever there is Ray. Every stage has a stream of its own, which begins when that before it has ended."""
    from dino_core.crops import MultiCrop
    from orchestrator.data.plan import index_plan
    from orchestrator.data.shelf import find_shelf
    from orchestrator.data.stream import Batches, local_batches, ray_batches

    share = max(1, config.cluster.data_cpus // place.world)
    for stage in state.stages:
        start, stop = max(state.step, stage.start), min(stop_step, stage.stop)
        if start >= stop:
            continue
        own = replace(config, pretrain=stage.config)
        batches = Batches(
            split=source.train,
            loader=loader,
            crops=MultiCrop(own.pretrain.crops, own.pretrain.seed),
            plan=index_plan(own, source.train),
            start_step=start,
            stop_step=stop,
            rank=place.rank,
            world_size=place.world,
        )
        if place.launcher == "local":
            stream = local_batches(batches, num_threads=share)
        else:
            stream = ray_batches(batches, data_cpus=share, shelf=find_shelf(own, place.rank, ahead=share))
        with closing(stream):
            for batch in stream:
                yield batches.crops, batch
