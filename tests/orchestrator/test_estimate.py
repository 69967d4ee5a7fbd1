"""Hours from rates, by arithmetic; what does not fit; a measured rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dino_core.config import ConfigError
from orchestrator import calibrate, estimate
from orchestrator.config import DataConfig, RunConfig
from orchestrator.cost import Flops, StepCost
from orchestrator.data.sources import open_source
from orchestrator.estimate import (
    Amount,
    Rate,
    assumed_rate,
    run_seconds,
    share_that_runs,
    wall_seconds,
    what_does_not_fit,
)
from orchestrator.gpus import gpu_called
from orchestrator.overrides import override
from orchestrator.sweep import Sweep
from sweeps.recipes import quickstart

FLOPS = Flops(teacher=1e9, student=2e9, backward=4e9, backbone=0.5e9)
COST = StepCost(1, 1, weights=10**9, activations=4 * 10**9, logits=10**9, checkpoint=10**9, flops=FLOPS)


def changed(**changes: Any) -> RunConfig:
    return override(quickstart(), {key.replace("__", "."): value for key, value in changes.items()})


def test_amounts_count_training_and_evaluation() -> None:
    source = open_source(DataConfig())
    config = changed(pretrain__batch_size=64, pretrain__eval__every_steps=50, pretrain__eval__num_lidar_images=10)
    config = override(config, {"pretrain.eval.num_lidar_views": 4, "pretrain.eval.num_label_free": 100})
    amount = Amount.of(config, source, 200, COST)
    assert amount.images == 200 * 64
    # before step 0, at 50, 100 and 150, and after the last step
    assert amount.evaluated == 5 * (1438 + 359 + 4 * 10)
    assert amount.flops == 200 * 64 * 7e9 + 5 * 1837 * 0.5e9
    limits = {"num_gallery": 100, "num_queries": 1000, "every_steps": None}
    limited = override(config, {f"pretrain.eval.{name}": value for name, value in limits.items()})
    assert Amount.of(limited, source, 200, COST).evaluated == 2 * (100 + 359 + 4 * 10)
    unlabelled = dataclasses.replace(source, test=None)
    assert Amount.of(limited, unlabelled, 200, COST).evaluated == 2 * (100 + 4 * 10)
    nothing = override(limited, {"pretrain.eval.num_lidar_images": 0, "pretrain.eval.num_label_free": 0})
    assert Amount.of(nothing, unlabelled, 200, COST).evaluated == 0


def test_an_assumed_rate_is_a_share_of_the_published_peak() -> None:
    config = changed(
        pretrain__precision="bf16", pretrain__batch_size=128, cluster__num_workers=2, cluster__use_gpu=True
    )
    h100 = gpu_called("NVIDIA H100 80GB HBM3")
    assert h100 is not None
    rate = assumed_rate(config, COST, h100)
    assert rate is not None
    assert rate.step_s == pytest.approx(64 * 7e9 / (0.25 * 989e12))
    v100 = gpu_called("Tesla V100-SXM2-16GB")
    assert v100 is not None
    assert assumed_rate(config, COST, v100) is None, "it has no bf16"


@pytest.mark.parametrize(
    ("rate", "changes", "at_once", "cores", "step_s"),
    [
        (Rate(2.0, 1.0, 0.0), {}, 1, None, 2.0),
        (Rate(2.0, 9.0, 0.0), {"cluster.data_cpus": 3}, 1, None, 3.0),  # waits for the data
        (Rate(2.0, 1.0, 0.0), {"cluster.data_cpus": 3}, 1, 2, 2.0),
        (Rate(2.0, 1.0, 0.0), {}, 2, 2, 3.0),  # (2 + 1) s of CPU of two runs on two cores
        (Rate(2.0, 0.5, 0.0), {"cluster.cpus_per_worker": 4}, 1, 2, 4.25),
        (Rate(2.0, 1.0, 0.0), {"cluster.use_gpu": True}, 4, 8, 2.0),  # the steps need no core
        (Rate(2.0, 5.0, 0.0), {"cluster.use_gpu": True, "cluster.data_cpus": 4}, 4, 8, 2.5),
    ],
)
def test_a_step_takes_as_long_as_what_is_scarcest(
    rate: Rate, changes: dict[str, Any], at_once: int, cores: int | None, step_s: float
) -> None:
    amount = Amount(steps=10, images=640, evaluated=100, flops=0)
    config = override(quickstart(), changes)
    assert run_seconds(config, amount, rate, at_once, cores) == pytest.approx(10 * step_s)
    slow = dataclasses.replace(rate, eval_s=0.5)
    assert run_seconds(config, amount, slow, at_once, cores) == pytest.approx(10 * step_s + 50)


def test_devices_are_gpus_or_cores() -> None:
    assert changed(cluster__num_workers=4, cluster__cpus_per_worker=3).cluster.num_devices == 12
    assert changed(cluster__num_workers=4, cluster__cpus_per_worker=3, cluster__use_gpu=True).cluster.num_devices == 4


def test_runs_take_the_first_free_place() -> None:
    assert wall_seconds([3, 1, 1, 1], 2) == 3
    assert wall_seconds([1, 1, 1, 3], 2) == 4
    assert wall_seconds([2, 2, 2], 1) == 6
    assert wall_seconds([2], 4) == 2


def test_asha_takes_the_expected_share_of_the_steps() -> None:
    asha = Sweep(base="quickstart", scheduler="asha", grace_steps=10, reduction_factor=2)
    # all take 10 steps, half of them 10 more, a quarter 20 more, an eighth the last 10 of 50
    assert share_that_runs(asha, 50) == pytest.approx((10 + 5 + 5 + 10 / 8) / 50)
    assert share_that_runs(asha, 10) == 1
    assert share_that_runs(Sweep(base="quickstart"), 50) == 1


def problems(config: RunConfig, **changes: Any) -> list[str]:
    arguments: dict[str, Any] = {"at_once": 1, "gpu_bytes": None, "on_this_machine": True, **changes}
    return what_does_not_fit({"a": (config, COST, arguments.pop("measured", None))}, **arguments)


def test_what_does_not_fit_into_a_gpu_is_told() -> None:
    single = changed(cluster__use_gpu=True)
    half = changed(cluster__use_gpu=True, pretrain__precision="bf16")
    assert problems(single, gpu_bytes=6.5e9) == []
    assert "will not fit into the 5.0 GB of a GPU" in problems(single, gpu_bytes=5e9)[0]
    assert "may not fit" in problems(half, gpu_bytes=5e9)[0]
    assert "will not fit" in problems(half, gpu_bytes=3e9)[0]
    assert problems(half, gpu_bytes=5e9, measured=4 * 10**9) == []
    assert "takes 5.5 GB, which will not" in problems(half, gpu_bytes=5e9, measured=int(5.5e9))[0]


def test_what_does_not_fit_into_the_machine_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = changed(cluster__storage=str(tmp_path / "runs" / "deeper"), cluster__keep_checkpoints=2)
    memory = psutil.virtual_memory()._replace(total=15 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert problems(config, at_once=2) == []
    (line,) = problems(config, at_once=3)  # 3 x (6 + 1.2) GB
    assert "3 processes with about 7.2 GB each will not fit into the 15.0 GB" in line
    assert problems(config, at_once=3, on_this_machine=False) == []
    disk = estimate.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda folder: type(disk)(disk.total, disk.used, 10 * 10**9))
    assert problems(config, num_trials=4) == []
    assert "up to 11.0 GB of checkpoints will not fit into the 10.0 GB" in problems(config, num_trials=5)[0]


@pytest.fixture(scope="module")
def small() -> RunConfig:
    return changed(pretrain__batch_size=16, pretrain__model__depth=1, pretrain__steps=3)


def test_a_few_steps_are_measured(small: RunConfig) -> None:
    import torch

    source = open_source(small.data)
    threads = torch.get_num_threads()
    rate = calibrate.calibrate(small, source)
    assert torch.get_num_threads() == threads
    assert rate.peak_bytes is None
    for seconds in (rate.step_s, rate.batch_cpu_s, rate.eval_s):
        assert 0 < seconds < 5
    more = override(small, {"pretrain.crops.num_local_crops": 10, "pretrain.model.depth": 8, "pretrain.batch_size": 64})
    assert calibrate.calibrate(more, source).step_s > 4 * rate.step_s  # some 80 times the arithmetic
    shared = override(more, {"cluster.num_workers": 16})
    assert calibrate.calibrate(shared, source).batch_cpu_s < rate.batch_cpu_s + 1, "of a batch of four"


def test_few_steps_are_enough_where_they_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    calls: list[float] = []

    def step(seconds: Callable[[int], float]) -> Callable[[], None]:
        def run() -> None:
            now[0] += seconds(len(calls))
            calls.append(now[0])

        return run

    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    cpu = type("device", (), {"type": "cpu"})()
    assert calibrate._median_s(step(lambda call: 1.0 if call > 1 else 9.0), cpu) == 1.0
    assert len(calls) == 7
    calls.clear()
    assert calibrate._median_s(step(lambda call: 20.0 if call else 25.0), cpu) == 20.0
    assert len(calls) == 2


def test_a_run_for_gpus_is_not_measured_on_a_cpu(small: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = override(small, {"cluster.use_gpu": True})
    with pytest.raises(ConfigError, match=r"--calibrate: cluster\.use_gpu = True, but this machine has no GPU"):
        calibrate.calibrate(config, open_source(config.data))
