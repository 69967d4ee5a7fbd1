"""What fits where, before any Ray starts."""

from __future__ import annotations

import gc
import subprocess
import weakref

import psutil
import pytest

from dino_core.config import ConfigError
from orchestrator import ray_cluster
from orchestrator.config import ClusterConfig, RunConfig
from orchestrator.overrides import override
from orchestrator.ray_cluster import (
    Capacity,
    check_fits,
    cluster_address,
    end_processes,
    plan_concurrency,
    resolve_launcher,
)


def config(**cluster: object) -> RunConfig:
    return override(RunConfig(), {f"cluster.{name}": value for name, value in cluster.items()})


@pytest.mark.parametrize(
    ("cluster", "capacity", "num_trials", "expected"),
    [
        ({"data_cpus": 1}, Capacity(4, 0), 4, 2),
        ({"data_cpus": 1}, Capacity(4, 0), 1, 1),
        ({"data_cpus": 8}, Capacity(4, 0), 4, 1),  # fewer data tasks at a time, but it runs
        ({"data_cpus": 2, "num_workers": 2}, Capacity(16, 0), 9, 4),
        ({"data_cpus": 2, "num_workers": 2, "use_gpu": True}, Capacity(64, 5), 9, 2),
        ({"data_cpus": 1, "max_concurrent_trials": 1}, Capacity(4, 0), 4, 1),
    ],
)
def test_as_many_trials_at_once_as_fit(
    cluster: dict[str, object], capacity: Capacity, num_trials: int, expected: int
) -> None:
    assert plan_concurrency(config(**cluster), capacity, num_trials) == expected


def test_more_trials_at_once_than_fit_are_lowered_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert plan_concurrency(config(data_cpus=1, max_concurrent_trials=3), Capacity(4, 0), 4) == 2
    assert "cluster.max_concurrent_trials = 3, but only 2 trials fit" in caplog.text


def test_one_cpu_is_kept_for_the_data() -> None:
    check_fits(config(num_workers=4), Capacity(5, 0), "here")
    with pytest.raises(
        ConfigError, match=r"cluster.num_workers = 4 .* needs 4 CPUs and one more .* here has at most 4"
    ):
        check_fits(config(num_workers=4), Capacity(4, 0), "here")


def test_gpus_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="needs 2 GPUs, but here has at most 1"):
        check_fits(config(num_workers=2, use_gpu=True), Capacity(64, 1), "here")


def test_a_local_ray_has_four_cpus_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert Capacity.of_this_machine() == Capacity(4, 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Capacity.of_this_machine() == Capacity(96, 0)


@pytest.mark.parametrize(
    ("cluster", "in_sweep", "expected"),
    [
        ({}, True, "trial"),
        ({}, False, "train"),
        ({"num_workers": 2}, True, "train"),
        ({"launcher": "train"}, True, "train"),
        ({"launcher": "local"}, False, "local"),
    ],
)
def test_the_launcher_follows_from_workers_and_sweep(cluster: dict[str, object], in_sweep: bool, expected: str) -> None:
    assert resolve_launcher(config(**cluster).cluster, in_sweep=in_sweep) == expected


def test_the_cluster_is_the_one_named_then_that_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster_address(ClusterConfig()) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address(ClusterConfig()) == "10.0.0.1:6379"
    assert cluster_address(ClusterConfig(address="auto")) == "auto"


def test_processes_that_do_not_end_by_themselves_are_killed() -> None:
    children = [subprocess.Popen(["sleep", seconds]) for seconds in ("0.1", "600")]
    processes = [psutil.Process(child.pid) for child in children]
    end_processes(processes, patience_s=1.0)
    assert not any(process.is_running() for process in processes)
    for child in children:
        child.wait(1)


def test_ray_goes_when_the_garbage_is_gone_and_none_is_collected() -> None:
    class Reference:
        pass

    reference = Reference()
    gone = weakref.ref(reference)
    cycle = [reference]
    cycle.append(cycle)  # type: ignore[arg-type]
    del cycle, reference
    with ray_cluster._no_garbage():
        assert gone() is None
        assert not gc.isenabled()
    assert gc.isenabled()
