"""One pre-training run, from a configuration to a trained backbone and its record."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.errors import RunFailed
from orchestrator.launch import (
    check_torchrun_world,
    join_process_group,
    launch_local,
    launch_torch_trainer,
    torchrun_world,
)
from orchestrator.overrides import override
from orchestrator.preflight import check_launcher, check_model, open_sources
from orchestrator.progress import RunProgress
from orchestrator.ray_cluster import connect, describe_resources, disconnect
from orchestrator.records import CHECKPOINTS_DIR, Ledger, RunRecord, read_curves
from orchestrator.registry import upload_when_asked
from orchestrator.runs import (
    check_same_images,
    find_folder,
    git_commit,
    length_in_words,
    new_name,
    prepare_run,
    resume_command,
    resumed_record,
)
from orchestrator.summary import Summary
from orchestrator.supervisor import supervise
from orchestrator.tracking import Target
from orchestrator.worker import FAILURE_FILE, read_failure


@dataclass(frozen=True)
class PretrainResult:
    """How a run ended, and where its record and its checkpoints are."""

    run_id: str
    folder: Path
    metrics: dict[str, float]
    """The last value of every metric."""

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS_DIR


def pretrain(config: RunConfig, *, recipe: str, method: str | None = None, local: bool = False) -> PretrainResult:
    """Pre-train a backbone; blocks until it is done.

    Args:
        config: The complete run.
        recipe: What to call it.
        method: The named method whose changes are already in `config`, for the record.
        local: In this process without Ray (`cluster.launcher = local`); under `torchrun`, as one of its processes.

    Raises:
        ConfigError: The run cannot start; nothing was started.
        RunFailed: The run failed for a reason that the message gives.
        KeyboardInterrupt: Stopped by the user or the cluster; the records allow resuming.
    """
    if local:
        config = override(config, {"cluster.launcher": "local"})
    if config.cluster.launcher == "local":
        check_torchrun_world(config)
    check_launcher(config)
    check_model(config)
    source = open_sources([config])[config.data]
    run_id = _agree_on_name(recipe, config)
    experiment = config.tracking.experiment or recipe
    record = prepare_run(
        config,
        source,
        run_id=run_id,
        recipe=recipe,
        experiment=experiment,
        data_digest=source.digest(),
        commit=git_commit(),
        method=method,
    )
    folder = Path(config.cluster.storage).resolve() / run_id
    return _run(record, folder)


def resume(run: str, changes: Mapping[str, Any] | None = None, storage: str = "./runs") -> PretrainResult:
    """Continue an earlier run from its newest checkpoint that verifies; from the start if it has none.

    Args:
        run: The run's id in `storage`, or the path of its folder.
        changes: New values of `cluster.*` and `tracking.*` keys.

    Raises:
        As `pretrain`; ConfigError also if names, sizes or number of the images have changed.
    """
    folder = find_folder(run, storage, "run")
    record = resumed_record(RunRecord.read(folder), changes or {})
    config = override(RunConfig(), record.config)
    if config.cluster.launcher == "local":
        check_torchrun_world(config)
    source = open_sources([config])[config.data]
    check_same_images(record, source.digest())
    return _run(record, folder)


def _agree_on_name(recipe: str, config: RunConfig) -> str:
    """A new run id; the processes of one `torchrun` agree on rank 0's."""
    _, world = torchrun_world()
    if config.cluster.launcher != "local" or world == 1:
        return new_name(recipe)
    import torch.distributed as dist

    join_process_group(config)
    names = [new_name(recipe)]
    dist.broadcast_object_list(names)
    return names[0]


def _run(record: RunRecord, folder: Path) -> PretrainResult:
    config = override(RunConfig(), record.config)
    rank, world = torchrun_world()
    local = config.cluster.launcher == "local"
    if not local or rank == 0:
        record.write(folder)
        (folder / FAILURE_FILE).unlink(missing_ok=True)
    if local and world > 1:
        from dino_core.distributed import barrier

        join_process_group(config)
        barrier()  # the record is there for all from here on
        if rank > 0:  # rank 0 keeps the record; the others only train
            _train(record, folder, launch_local)
            return PretrainResult(record.run_id, folder, {})
    _supervised(record, folder, config)
    return PretrainResult(record.run_id, folder, {name: c[-1][1] for name, c in read_curves(folder).items()})


def _train(record: RunRecord, folder: Path, launcher: Callable[[Path], None]) -> None:
    """Let the launcher train to the end.

    Raises:
        RunFailed: The workers left a reason; several of them also raise what it was, or what came of it.
    """
    try:
        launcher(folder)
    finally:
        reason = read_failure(folder)
        if reason is not None:
            raise RunFailed(f"{record.run_id}: {reason}")


def _supervised(record: RunRecord, folder: Path, config: RunConfig) -> None:
    local = config.cluster.launcher == "local"
    target = Target.of(config.tracking)
    print(f"run {record.run_id}: {length_in_words(record)}; records in {folder}", flush=True)
    ledger = Ledger(folder)
    stopped = threading.Event()

    def launch() -> None:
        if not local:
            connect(config, dashboard=False)
        ledger.record(record.run_id, "started")
        _train(record, folder, partial(launch_local, stopped=stopped) if local else launch_torch_trainer)
        disconnect()
        Summary.of(folder, target).write_report()
        ledger.record(record.run_id, "finished")

    try:
        supervise(
            launch,
            ledger=ledger,
            folder=folder,
            runs=[RunProgress.of(folder, record.recipe)],
            experiment=record.experiment,
            target=target,
            start_timeout_s=config.cluster.start_timeout_s,
            describe_cluster=(lambda: "no Ray") if local else describe_resources,
            stop=stopped.set if local else None,
        )
    except KeyboardInterrupt:
        print(f"\ninterrupted; resume with: {resume_command('run', folder)}", flush=True)
        raise
    finally:
        ledger.close()  # before Ray goes: what its end does to the run must not be written down as its own
        disconnect()
    upload_when_asked(folder, config, target)
    Summary.of(folder, target).print()
