"""The three launchers: this process, a Tune trial's actor, a Ray TorchTrainer (alone or inside a Tune trial).

All run `orchestrator.worker.run_worker`; they differ in who starts it, how many of it, and whom it reports to. This
module is loaded by Tune's trial actors and imports neither torch nor ray by itself.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from dino_core.config import ConfigError
from orchestrator.config import ClusterConfig, Launcher, RunConfig
from orchestrator.errors import RunFailed
from orchestrator.overrides import override
from orchestrator.records import RunRecord
from orchestrator.worker import Place, read_failure, run_worker


def _config_of(run_dir: Path) -> RunConfig:
    return override(RunConfig(), RunRecord.read(run_dir).config)


def torchrun_world() -> tuple[int, int]:
    """(rank, world size) as `torchrun` set them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_torchrun_world(config: RunConfig) -> None:
    """Raise `ConfigError` if `torchrun` started another number of processes than the run has workers."""
    _, world = torchrun_world()
    if world != config.cluster.num_workers:
        raise ConfigError(
            f"cluster.num_workers = {config.cluster.num_workers}: this launch has {world} processes; a local run with "
            f"several workers is started by torchrun --nproc-per-node={config.cluster.num_workers} with "
            "cluster.launcher=local, for torchrun takes --local for an option of its own"
        )


def join_process_group(config: RunConfig) -> None:
    """Join the process group that `torchrun` laid out. Does nothing without it, or a second time."""
    import torch
    import torch.distributed as dist

    _, world = torchrun_world()
    if world > 1 and not dist.is_initialized():
        if config.cluster.use_gpu:  # else all ranks would exchange objects by way of the first GPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if config.cluster.use_gpu else "gloo")


def launch_local(run_dir: Path, stopped: threading.Event | None = None) -> None:
    """Train in this process, without Ray; under `torchrun`, as one of its processes.

    Raises:
        KeyboardInterrupt: `stopped` was set; noticed whenever metrics are logged.
    """
    config = _config_of(run_dir)
    join_process_group(config)
    rank, world = torchrun_world()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if config.cluster.use_gpu else "cpu"

    def report(metrics: dict[str, float]) -> None:
        if stopped is not None and stopped.is_set():
            raise KeyboardInterrupt

    run_worker(run_dir, Place("local", device, rank, world), report)


def launch_torch_trainer(run_dir: Path, *, in_trial: bool = False) -> None:
    """Train in a Ray TorchTrainer and wait for its end.

    Args:
        in_trial: Called inside a Tune trial; what the workers report then also reaches Tune's scheduler.

    Raises:
        RunFailed: Workers failed or were lost more often than `cluster.max_failures`.
    """
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.tune.integration.ray_train import TuneReportCallback

    cluster = _config_of(run_dir).cluster
    callbacks: list[Any] = [TuneReportCallback()] if in_trial else []
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"run_dir": str(run_dir)},
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=_process_resources(cluster),
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        run_config=RayRunConfig(
            # A name that was used before would make Ray Train resume by its own files; ours decide (checkpoints/).
            name=f"attempt-{time.time_ns()}",
            storage_path=str(run_dir / "ray"),
            # Inside a trial, Tune counts the failures.
            failure_config=FailureConfig(max_failures=0 if in_trial else cluster.max_failures),
            callbacks=callbacks,
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if read_failure(run_dir) is None:  # else the driver finds the reason there, and Tune need not try again
            raise RunFailed(str(error)) from error


def _train_loop(loop_config: dict[str, Any]) -> None:
    """One worker of a TorchTrainer."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    place = Place("train", str(get_device()), context.get_world_rank(), context.get_world_size())
    run_worker(Path(loop_config["run_dir"]), place, report=ray.train.report)


def tune_trial(params: dict[str, Any]) -> None:
    """Tune's function trainable: one trial, by the launcher that its sweep chose."""
    run_dir, launcher = Path(params["run_dir"]), params["launcher"]
    if launcher == "train":
        launch_torch_trainer(run_dir, in_trial=True)
        return
    from ray import tune

    device = "cuda:0" if _config_of(run_dir).cluster.use_gpu else "cpu"
    run_worker(run_dir, Place("trial", device), report=tune.report)


def _process_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What one training process reserves."""
    return {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if cluster.use_gpu else {})


def trial_resources(config: RunConfig, launcher: Launcher) -> dict[str, float]:
    """What Tune reserves for a trial: the training process, or next to nothing for one that only launches others."""
    from orchestrator.ray_cluster import DRIVER_RESOURCES

    if launcher == "train":
        return dict(DRIVER_RESOURCES)
    return _process_resources(config.cluster)
