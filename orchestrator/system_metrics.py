"""What the machine of a run does while it trains, and what the run trains with; left on disk for MLflow.

Samples go to a file of their own, `system.jsonl`: they belong to moments, not to optimiser steps, they are no sign that
training goes on, and nothing is decided by them. Their names are those of MLflow's own monitor, whose pages show them
in a tab of their own; that monitor itself would have every worker talk to the tracking server.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil

from orchestrator.ray_cluster import SUBMISSION_ID_ENV
from orchestrator.records import ENVIRONMENT_FILE, SYSTEM_FILE, AppendOnly, read_lines, write_json

if TYPE_CHECKING:
    from orchestrator.worker import Place

logger = logging.getLogger(__name__)

SAMPLE_EVERY_S = 10.0
FIRST_SAMPLE_S = 1.0
"""After the start; a run of a few seconds has a sample too."""
PACKAGES = (
    *("dino-orchestrator", "torch", "torchvision", "timm", "ray", "mlflow", "numpy"),
    *("pillow", "simplejpeg", "opencv-python-headless"),
)
"""Whose versions are recorded: what computes, and what makes pixels of files."""
_MEGABYTE = 1e6  # as in MLflow's monitor


@contextmanager
def recorded_machine(run_dir: Path, place: Place, *, every_s: float = SAMPLE_EVERY_S) -> Iterator[None]:
    """While it is open, a thread of rank 0 samples the machine into the run's `system.jsonl`; other ranks do nothing.

    What the run trains with is written down before, anew for each attempt: a restarted run may stand elsewhere.
    """
    if place.rank > 0:
        yield
        return
    write_json(run_dir / ENVIRONMENT_FILE, environment(place))
    stop = threading.Event()
    arguments = (run_dir / SYSTEM_FILE, _Gpu.of(place.device), stop, every_s)
    thread = threading.Thread(target=_sample, args=arguments, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5.0)


def environment(place: Place) -> dict[str, str]:
    """What a run trains with, by the names of the tags that MLflow gets."""
    import torch

    cuda = place.device.startswith("cuda")
    found = {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(place.device) if cuda else f"cpu ({platform.machine()})",
        "launcher": place.launcher,
        "num_workers": str(place.world),
        "version/python": platform.python_version(),
    }
    if cuda and torch.version.cuda:
        found["version/cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[f"version/{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
            continue
    return found | _ray_job(place)


def _ray_job(place: Place) -> dict[str, str]:
    if place.launcher == "local":
        return {}
    import ray

    found = {"ray_job_id": ray.get_runtime_context().get_job_id()} if ray.is_initialized() else {}
    submission = os.environ.get(SUBMISSION_ID_ENV)
    return found | ({"ray_submission_id": submission} if submission else {})


def _sample(path: Path, gpu: _Gpu | None, stop: threading.Event, every_s: float) -> None:
    process = psutil.Process()
    psutil.cpu_percent()  # percentages are of the time since the call before
    process.cpu_percent()
    pause = min(FIRST_SAMPLE_S, every_s)
    try:
        step = sum(1 for _ in read_lines(path))  # an earlier attempt's samples come before
        file = AppendOnly(path)
        while not stop.wait(pause):
            metrics = sample(process) | (gpu.sample() if gpu else {})
            file.append({"step": step, "time": time.time(), "metrics": metrics})
            step, pause = step + 1, every_s
        file.close()
    except OSError as error:  # a full disk ends the run by itself if it matters there
        logger.warning("%s: system metrics end: %s", path, error)


def sample(process: psutil.Process) -> dict[str, float]:
    """The machine's processors and memory, and this process's share of them."""
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": round(memory.used / _MEGABYTE, 1),
        "system/system_memory_usage_percentage": round(100 * memory.used / memory.total, 1),
        # Trials share a machine: these tell them apart. 100 % is one core.
        "system/process_cpu_utilization_percentage": process.cpu_percent(),
        "system/process_memory_usage_megabytes": round(process.memory_info().rss / _MEGABYTE, 1),
    }


class _Gpu:
    """The GPU that this process trains on, as the driver's own library (NVML) sees it."""

    def __init__(self, nvml: ModuleType, uuid: str) -> None:
        nvml.nvmlInit()
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid.encode())

    @classmethod
    def of(cls, device: str) -> _Gpu | None:
        """None without a GPU, or where NVML knows nothing of it (another maker's)."""
        if not device.startswith("cuda"):
            return None
        import torch

        # The copy that Ray ships is the one that Ray's own dashboard reads GPUs with.
        from ray._private.thirdparty import pynvml as nvml

        try:
            # Not by number: CUDA_VISIBLE_DEVICES numbers the GPUs of a process anew.
            return cls(nvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except nvml.NVMLError as error:
            logger.warning("no GPU metrics: %s", error)
            return None

    def sample(self) -> dict[str, float]:
        """Use, memory and power; what this GPU (a slice of one, say) does not tell is left out."""
        nvml, found = self._nvml, dict[str, float]()

        def ask(call: str) -> Any:
            try:
                return getattr(nvml, call)(self._handle)
            except nvml.NVMLError:
                return None

        if (use := ask("nvmlDeviceGetUtilizationRates")) is not None:
            found["utilization_percentage"] = float(use.gpu)
        if (memory := ask("nvmlDeviceGetMemoryInfo")) is not None:
            found["memory_usage_megabytes"] = round(memory.used / _MEGABYTE, 1)
            found["memory_usage_percentage"] = round(100 * memory.used / memory.total, 1)
        if (milliwatts := ask("nvmlDeviceGetPowerUsage")) is not None:
            found["power_usage_watts"] = milliwatts / 1000
        return {f"system/gpu_0_{name}": value for name, value in found.items()}
