"""Ray itself: which cluster, what it can hold, and the environment that every process of ours in it needs.

Ray is imported only inside functions, so that asking whether a run fits costs nothing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dino_core.config import ConfigError
from orchestrator.config import ClusterConfig, Launcher, RunConfig
from orchestrator.errors import RunFailed

logger = logging.getLogger(__name__)

MIN_LOCAL_CPUS = 4
"""Logical CPUs of a Ray started here, whatever the machine has, so that data tasks never wait for the trainers."""

HEAD_RESOURCE = "node:__internal_head__"
DRIVER_RESOURCES = {HEAD_RESOURCE: 0.001}
"""What a trial that only launches a TorchTrainer asks for. A fraction of a CPU would silently take a whole slot, and no
resource at all is refused by Tune."""

SUBMISSION_ID_ENV = "ORCHESTRATOR_RAY_SUBMISSION_ID"
"""Tells the processes that Ray starts for a submitted job what its submission was called."""

CHILD_ENV = {
    # A report waits for the controller's next poll; at the default of 2 s a trial that logs often would crawl.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Run folders are given as absolute paths; a relative `data.source` must keep its meaning.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of every process that Ray starts for us; set in the driver too, for what Ray reads there."""

DRIVER_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal is the record: no CSV, JSON or TensorBoard copies
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Not every report holds the sweep's metric: k-NN comes less often than the loss.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner at any verbosity
    # Of a Ray that is started here. Workers that it starts in advance lack our environment and are never used.
    "RAY_prestart_worker_first_driver": "0",
}


def resolve_launcher(cluster: ClusterConfig, *, in_sweep: bool) -> Launcher:
    """`cluster.launcher`, or its default: one-worker trials of a sweep train in their own actor, all else in a
    TorchTrainer."""
    if cluster.launcher is not None:
        return cluster.launcher
    return "trial" if in_sweep and cluster.num_workers == 1 else "train"


def cluster_address(cluster: ClusterConfig) -> str | None:
    """The existing cluster to use, or None to start one here."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or None


@dataclass(frozen=True)
class Capacity:
    """The most that a cluster can ever hold (with an autoscaler, after growing)."""

    cpus: float
    gpus: float

    @classmethod
    def of_this_machine(cls) -> Capacity:
        """What a Ray started here would have."""
        return cls(cpus=max(MIN_LOCAL_CPUS, len(os.sched_getaffinity(0))), gpus=_local_gpus())

    @classmethod
    def of_connected_cluster(cls) -> Capacity:
        import ray
        from ray._private.state import state

        now = ray.cluster_resources()
        # The autoscaler's limits have no public call; without an autoscaler there are none.
        limits = state.get_max_resources_from_cluster_config() or {}
        return cls(cpus=max(now.get("CPU", 0), limits.get("CPU", 0)), gpus=max(now.get("GPU", 0), limits.get("GPU", 0)))


def _local_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


@dataclass(frozen=True)
class Demand:
    """What one run asks for at once."""

    workers: int
    cpus: int
    """All training processes together."""
    gpus: int
    data_cpus: int
    """`cluster.data_cpus`, in equal whole shares of at least one for each worker."""

    @classmethod
    def of(cls, config: RunConfig) -> Demand:
        cluster = config.cluster
        return cls(
            workers=cluster.num_workers,
            cpus=cluster.num_workers * cluster.cpus_per_worker,
            gpus=cluster.num_workers if cluster.use_gpu else 0,
            data_cpus=cluster.num_workers * max(1, cluster.data_cpus // cluster.num_workers),
        )


def check_fits(config: RunConfig, capacity: Capacity, where: str) -> None:
    """Raise `ConfigError` if `capacity` can never hold one run.

    One CPU is kept for the data tasks: when the workers hold them all, Ray Data waits for ever without an error.
    """
    demand = Demand.of(config)
    if demand.gpus > capacity.gpus:
        raise ConfigError(
            f"cluster.num_workers = {demand.workers} with cluster.use_gpu = True: "
            f"needs {demand.gpus} GPUs, but {where} has at most {capacity.gpus:g}"
        )
    if demand.cpus + 1 > capacity.cpus:
        raise ConfigError(
            f"cluster.num_workers = {demand.workers} with cluster.cpus_per_worker = {config.cluster.cpus_per_worker}: "
            f"needs {demand.cpus} CPUs and one more for the data, but {where} has at most {capacity.cpus:g}"
        )


def plan_concurrency(config: RunConfig, capacity: Capacity, num_trials: int, num_streams: int | None = None) -> int:
    """Trials that run at once: as many as fit with their data tasks, at most `cluster.max_concurrent_trials`, at
    least 1.

    Args:
        config: Of any trial; they share the `cluster` part.
        capacity: Of the cluster.
        num_trials: Trials to run.
        num_streams: Different streams of crops among them, where trials of one stream share its data tasks.
    """
    demand = Demand.of(config)
    fitting = int(capacity.cpus // (demand.cpus + demand.data_cpus))
    if num_streams is not None:
        fitting = max(fitting, int((capacity.cpus - num_streams * demand.data_cpus) // demand.cpus))
    if demand.gpus:
        fitting = min(fitting, int(capacity.gpus // demand.gpus))
    fitting = max(1, min(fitting, num_trials))
    wanted = config.cluster.max_concurrent_trials
    if wanted is None:
        return fitting
    if wanted > fitting:
        logger.warning(
            "cluster.max_concurrent_trials = %d, but only %d trials fit at once; running %d", wanted, fitting, fitting
        )
    return min(wanted, fitting)


def check_fits_before_start(config: RunConfig) -> None:
    """`check_fits` against this machine when no cluster is named; a named cluster is asked once connected."""
    if cluster_address(config.cluster) is None:
        check_fits(config, Capacity.of_this_machine(), "this machine")


def _set_up_process() -> Callable[[], None]:
    """What runs in every Ray process of ours before anything else: name the cluster that it belongs to.

    Ray Train's placement-group cleaner asks the dashboard of whatever cluster it finds; with two clusters on a machine
    it would find none, or the wrong one, and leave the placement groups of stopped trials behind.
    """

    def set_up() -> None:  # not at the module's top: there it would be sent by name, and not every process has us
        import os

        import ray

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address

    return set_up


def connect(config: RunConfig, *, dashboard: bool, meanwhile: str | None = None) -> Capacity:
    """Connect to the cluster that `config` names, or start one here; `disconnect` ends either.

    Args:
        config: A run whose `cluster` part says which cluster, and which must fit.
        dashboard: Start the dashboard of a local Ray; trials that are TorchTrainers need it to be cleaned up after.
        meanwhile: A module that is needed next and takes seconds to import, as Ray does to start.

    Raises:
        ConfigError: The cluster can never hold the run.
        RunFailed: Ray did not start, or the named cluster could not be reached.
    """
    for name, value in {**CHILD_ENV, **DRIVER_ENV}.items():
        os.environ.setdefault(name, value)
    import ray

    for name in ("ray.tune", "ray.train", "ray.data"):  # our table replaces their progress talk
        logging.getLogger(name).setLevel(logging.ERROR)
    if meanwhile is not None:
        threading.Thread(target=_import, args=(meanwhile,), name="import", daemon=True).start()
    address = cluster_address(config.cluster)
    runtime_env: dict[str, Any] = {"env_vars": _child_env(), "worker_process_setup_hook": _set_up_process()}
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": runtime_env}
    if address is None:
        capacity = Capacity.of_this_machine()
        _start_local(num_cpus=int(capacity.cpus), include_dashboard=dashboard, **common)
    else:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError) as error:
            raise RunFailed(f"no connection to the Ray cluster {address}: {error}") from error
        capacity = Capacity.of_connected_cluster()
    check_fits(config, capacity, "this machine" if address is None else f"the cluster {address}")
    return capacity


def _import(module: str) -> None:
    with contextlib.suppress(Exception):  # whoever needs it imports it again, and is told
        importlib.import_module(module)


_started_here: list[psutil.Process] = []
"""The servers of the Ray that `_start_local` started: children of this process, parents of Ray's workers and agents."""
_leaving = threading.Lock()

EXIT_S = 5.0
"""How long a process of a Ray that was told to end may take."""


def disconnect() -> None:
    """End the connection, and the cluster if it was started here. Does nothing where there is none.

    Of a cluster started here no process is left: Ray's agents notice the end of their node by themselves and, on a
    busy machine, sometimes do not end for minutes. Where nothing went wrong, call this in the thread that connected:
    Ray's servers die with the thread that started them, and Ray's own shutdown then waits 15 s for the dead.
    """
    with _leaving:
        family = [process for server in _started_here for process in _with_descendants(server)]
        _started_here.clear()
        if "ray" in sys.modules:
            ray = sys.modules["ray"]
            with _no_garbage() if ray.is_initialized() else contextlib.nullcontext():
                ray.shutdown()
        end_processes(family, EXIT_S)


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Nothing is collected meanwhile, by no thread.

    Behind a traceback, references to Ray's objects stand in cycles. Where the collector frees one while Ray shuts down,
    in whichever thread, Ray ends the whole process with nothing but a line in a log file of its own ("The core worker
    has already been shutdown").
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def end_processes(processes: Sequence[psutil.Process], patience_s: float) -> None:
    """Kill those of `processes` that have not ended by themselves after `patience_s` seconds."""
    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=EXIT_S)


def _with_descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _start_local(**options: Any) -> None:
    """`ray.init` of a new cluster, up to three times: on a busy machine the node misses Ray's fixed limit of 30 s."""
    import ray

    before = set(psutil.Process().children())
    for tries_left in (2, 1, 0):
        try:
            ray.init(address="local", **options)
            _started_here.extend(set(psutil.Process().children()) - before)
            return
        except Exception as error:  # Ray raises the bare class here
            _started_here.extend(set(psutil.Process().children()) - before)
            if "timed out during startup" not in str(error):
                raise
            disconnect()
            load = os.getloadavg()[0]
            if not tries_left:
                raise RunFailed(f"Ray did not start on this machine in three tries (load {load:.1f})") from error
            logger.warning("Ray did not start within 30 s (load %.1f); trying again", load)


def _child_env() -> dict[str, str]:
    """`CHILD_ENV` and the job's name, less what the submitted job already sets: Ray refuses a variable set twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    already = (job.get("runtime_env") or {}).get("env_vars") or {}
    submission = (job.get("metadata") or {}).get("job_submission_id")
    wanted = CHILD_ENV | ({SUBMISSION_ID_ENV: submission} if submission else {})
    return {name: value for name, value in wanted.items() if name not in already}


def describe_resources() -> str:
    """What the connected cluster has free and who waits, for the message of a stalled run."""
    import ray
    from ray.util import placement_group_table

    if not ray.is_initialized():
        return "Ray has not started yet"
    free: Mapping[str, float] = ray.available_resources()
    total: Mapping[str, float] = ray.cluster_resources()
    waiting = [group for group in placement_group_table().values() if group["state"] == "PENDING"]
    parts = [f"{name} {free.get(name, 0):g} of {total[name]:g} free" for name in ("CPU", "GPU") if name in total]
    return f"{', '.join(parts)}; {len(waiting)} placement groups waiting"
