"""What is sampled of the machine while a run trains, and what is written down of what it trains with."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from orchestrator.records import read_lines
from orchestrator.system_metrics import _Gpu, recorded_machine
from orchestrator.worker import Place


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_lines(run_dir / "system.jsonl")]


def test_samples_go_on_counting_in_the_next_attempt_and_end_with_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        with recorded_machine(tmp_path, Place("local", "cpu"), every_s=0.02):
            deadline = time.monotonic() + 20
            known = len(samples(tmp_path))
            while len(samples(tmp_path)) < known + 3 and time.monotonic() < deadline:
                sum(range(100_000))
    found = samples(tmp_path)
    assert [record["step"] for record in found] == list(range(len(found)))
    assert len(found) >= 6
    total = psutil.virtual_memory().total / 1e6
    for record in found:
        assert time.time() - 60 < record["time"] <= time.time()
        metrics = record["metrics"]
        assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
        assert 0 < metrics["system/process_memory_usage_megabytes"] < metrics["system/system_memory_usage_megabytes"]
        share = 100 * metrics["system/system_memory_usage_megabytes"] / total
        assert metrics["system/system_memory_usage_percentage"] == pytest.approx(share, abs=0.1)
    assert max(record["metrics"]["system/process_cpu_utilization_percentage"] for record in found) > 0
    time.sleep(0.1)
    assert samples(tmp_path) == found, "it goes on after the run"
    assert "system-metrics" not in {thread.name for thread in threading.enumerate()}


def test_sampling_costs_next_to_nothing() -> None:
    """In processor time; there is one sample in 10 s."""
    from orchestrator.system_metrics import sample

    process = psutil.Process()
    begin = time.thread_time()
    for _ in range(20):
        sample(process)
    assert (time.thread_time() - begin) / 20 < 0.01, "more than a thousandth of one core"


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with recorded_machine(tmp_path, Place("train", "cpu", rank=1, world=2), every_s=0.01):
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_written_down(tmp_path: Path) -> None:
    with recorded_machine(tmp_path, Place("local", "cpu", world=3)):
        found = json.loads((tmp_path / "environment.json").read_text())
    assert found["host"] == socket.gethostname()
    assert found["device"].startswith("cpu")
    assert (found["launcher"], found["num_workers"]) == ("local", "3")
    assert found["version/torch"] == importlib.metadata.version("torch")


class NVMLError(Exception):
    """As the library's own."""


def test_a_gpu_tells_what_it_can_by_the_names_that_mlflow_gives_it() -> None:
    """Stands in for NVIDIA's driver, which needs a GPU: a device that does not tell its power, as a slice of one."""

    def refuse(handle: str) -> None:
        raise NVMLError(handle)

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {b"GPU-1-2": "handle"}[uuid],
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87, memory=3),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=2_000_000_000, total=8_000_000_000),
        nvmlDeviceGetPowerUsage=refuse,
    )
    assert _Gpu(nvml, "GPU-1-2").sample() == {  # type: ignore[arg-type]
        "system/gpu_0_utilization_percentage": 87.0,
        "system/gpu_0_memory_usage_megabytes": 2000.0,
        "system/gpu_0_memory_usage_percentage": 25.0,
    }
