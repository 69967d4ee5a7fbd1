"""The collapse stopper on recorded curves, and on a run that really collapses."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.collapse_stopper import BAD, GOOD, NUM_DIGITS
from dino_core.config import ConfigError, PretrainConfig
from dino_core.diagnosis import Diagnosis
from dino_core.schedules import build_schedules
from orchestrator import worker
from orchestrator.config import RunConfig
from orchestrator.data.sources import open_source
from orchestrator.launch import launch_local
from orchestrator.overrides import override
from orchestrator.records import Journal, Ledger, RunRecord, read_curves, read_states
from orchestrator.runs import prepare_run
from orchestrator.stoppers import CollapseStopper, Stop, first_judged_step, read_stop, stop_of
from sweeps.recipes import quickstart

DIGITS = quickstart().pretrain
LN_K = math.log(256)

HEALTHY = {"train/loss": 4.5, "train/teacher_entropy": 0.6 * LN_K, "train/kl": 1.0, "train/prototype_usage": 90.0}
UNIFORM = {"train/loss": LN_K, "train/teacher_entropy": LN_K, "train/kl": 0.0, "train/prototype_usage": 256.0}
ONE_HOT = {"train/loss": 0.05, "train/teacher_entropy": 0.0, "train/kl": 0.05, "train/prototype_usage": 1.0}


def watch(stopper: CollapseStopper, *reports: dict[str, float], first: int = 0) -> list[Diagnosis | None]:
    return [stopper.observe(first + 10 * index, metrics) for index, metrics in enumerate(reports)]


def test_a_verdict_must_be_made_at_two_reports_in_a_row() -> None:
    found = watch(CollapseStopper(DIGITS), *[UNIFORM] * 4)
    # Three logged points make the first verdict, the fourth repeats it.
    assert [diagnosis is not None for diagnosis in found] == [False, False, False, True]
    assert found[3] is not None and found[3].verdict == "uniform collapse"
    assert len(found[3].evidence) >= 2


def test_a_run_that_recovers_goes_on() -> None:
    stopper = CollapseStopper(DIGITS)
    # Each point is the median of three: the second healthy one undoes the first verdict before it is repeated.
    assert watch(stopper, UNIFORM, UNIFORM, HEALTHY, HEALTHY, UNIFORM, HEALTHY, UNIFORM) == [None] * 7


def test_another_collapse_begins_the_count_again() -> None:
    stopper = CollapseStopper(DIGITS)
    stopper.observe(0, UNIFORM)
    stopper.observe(10, UNIFORM)
    assert stopper.observe(20, UNIFORM) is None
    found = watch(stopper, *[ONE_HOT] * 6, first=30)
    stopped = [diagnosis for diagnosis in found if diagnosis is not None]
    assert stopped[0].verdict in ("uniform collapse", "one-hot collapse")
    one_hot = next(index for index, diagnosis in enumerate(found) if diagnosis and diagnosis.verdict.startswith("one"))
    assert one_hot >= 4, "one-hot needs points, and reports, of its own"


def test_evaluations_are_no_reports_and_early_steps_are_not_judged() -> None:
    stopper = CollapseStopper(DIGITS, first_step=40)
    assert [stopper.observe(step, {"eval/knn_top1": 10.0}) for step in range(9)] == [None] * 9
    found = watch(stopper, *[UNIFORM] * 6)
    assert [diagnosis is not None for diagnosis in found] == [False] * 5 + [True], "steps 40 and 50 are the first two"


def test_the_first_step_that_is_judged_is_behind_warmup_and_freeze() -> None:
    def first(warmup: float, freeze: float) -> int:
        optim = dataclasses.replace(DIGITS.optim, warmup_epochs=warmup, freeze_last_layer_epochs=freeze)
        config = dataclasses.replace(DIGITS, optim=optim)
        return first_judged_step(config, build_schedules(config, 640))  # 10 steps per epoch

    assert (first(0, 1), first(2, 1), first(0, 0), first(0.5, 3)) == (10, 20, 0, 30)


def test_repeated_steps_of_a_resumed_run_are_not_counted_again() -> None:
    before = {name: [(step, value) for step in (0, 10, 20)] for name, value in UNIFORM.items()}
    stopper = CollapseStopper(DIGITS, curves=before)
    assert [stopper.observe(step, UNIFORM) for step in (0, 10, 20)] == [None] * 3
    assert stopper.observe(30, UNIFORM) is None, "the first verdict of this attempt"
    assert stopper.observe(40, UNIFORM) is not None


# --- what is booked ---------------------------------------------------------------------------------------------------


def record_of(config: RunConfig, **changes: Any) -> RunRecord:
    source = open_source(config.data)
    prepared = prepare_run(
        config, source, run_id="run", recipe="quickstart", experiment="x", data_digest=source.digest(), commit=None
    )
    return dataclasses.replace(prepared, **changes)


def test_hours_are_steps_times_seconds_times_devices(tmp_path: Path) -> None:
    config = override(quickstart(), {"pretrain.steps": 100, "cluster.num_workers": 2, "cluster.cpus_per_worker": 3})
    record_of(config).write(tmp_path)
    journal = Journal(tmp_path)
    journal.log(0, {"train/images_per_s": 1.0})  # the first step, start-up and all
    for step, speed in ((10, 128.0), (20, 128.0), (30, 32.0), (40, 256.0)):
        journal.log(step, {"train/images_per_s": speed})
    stop = stop_of(tmp_path, "asha", 40)
    # 64 images at 128 per second are 0.5 s a step; 6 cores
    assert stop.device_hours_saved == pytest.approx(60 * 0.5 * 6 / 3600)
    assert stop.device_hours == pytest.approx(40 * 0.5 * 6 / 3600)
    journal.log(40, {"cost/device_hours": 7.0})
    assert stop_of(tmp_path, "asha", 40).device_hours == 7.0, "what was measured comes before what is estimated"
    gpus = override(config, {"cluster.use_gpu": True})
    record_of(gpus).write(tmp_path)
    assert stop_of(tmp_path, "asha", 40).device_hours_saved == pytest.approx(60 * 0.5 * 2 / 3600)
    journal.close()


def test_a_stop_is_kept_on_disk_and_in_the_ledger(tmp_path: Path) -> None:
    stop = Stop(
        by="collapse",
        step=60,
        total_steps=500,
        device_hours=0.25,
        device_hours_saved=1.5,
        verdict="one-hot collapse",
        since_step=30,
        evidence=("teacher entropy 0.000 of ln K", "1.0 of 256 prototypes in use"),
        cause="no centring",
    )
    assert read_stop(tmp_path) is None
    stop.write(tmp_path)
    assert read_stop(tmp_path) == stop
    assert stop.reason == (
        "one-hot collapse since step 30, ended at step 60 of 500: teacher entropy 0.000 of ln K; 1.0 of 256 prototypes "
        "in use; 0.25 device-hours taken, about 1.5 saved"
    )
    by_asha = dataclasses.replace(stop, by="asha", verdict="")
    assert by_asha.reason == "by the scheduler (asha) at step 60 of 500; 0.25 device-hours taken, about 1.5 saved"
    ledger = Ledger(tmp_path)
    ledger.record("run", "stopped", stop.reason, stop.numbers)
    ledger.record("other", "failed", "why")
    ledger.close()
    assert read_states(tmp_path)["run"].numbers == {"cost/device_hours_saved": 1.5}
    assert read_states(tmp_path)["other"].numbers == {}
    (tmp_path / "stopped.json").write_text("{")
    with pytest.raises(ConfigError, match=r"stopped.json: damaged"):
        read_stop(tmp_path)


# --- in a worker ------------------------------------------------------------------------------------------------------

COLLAPSING: dict[str, Any] = {
    "pretrain.steps": 400,
    "pretrain.teacher.sharpening": "none",
    "pretrain.log_every_steps": 5,
    "pretrain.eval.every_steps": None,
    "pretrain.eval.num_gallery": 50,
    "pretrain.eval.num_queries": 50,
}


def test_a_run_that_collapses_ends_itself_and_stays_ended(tmp_path: Path) -> None:
    record_of(override(quickstart(), COLLAPSING), stop_collapsed=True).write(tmp_path)
    launch_local(tmp_path)
    stop = read_stop(tmp_path)
    assert stop is not None
    assert (stop.by, stop.verdict, stop.total_steps) == ("collapse", "uniform collapse", 400)
    curves = read_curves(tmp_path)
    assert curves["train/loss"][-1][0] == stop.step < 100
    assert 0 < stop.device_hours < stop.device_hours_saved
    assert stop.since_step is not None and stop.since_step < stop.step
    launch_local(tmp_path)  # another attempt, as after a driver that died before it had noted the end
    assert read_curves(tmp_path) == curves


def one_rank(rank: int, folder: str) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    steps: list[float] = []
    place = worker.Place("local", "cpu", rank, 2)
    worker.run_worker(Path(folder, "run"), place, lambda found: steps.append(found["step"]))
    dist.destroy_process_group()
    Path(folder, f"{rank}.txt").write_text(str(int(steps[-1])))


def test_of_several_workers_all_end_at_the_same_step(tmp_path: Path) -> None:
    record_of(override(quickstart(), COLLAPSING), stop_collapsed=True).write(tmp_path / "run")
    mp.start_processes(one_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    stop = read_stop(tmp_path / "run")
    assert stop is not None
    assert stop.verdict == "uniform collapse"
    assert [int((tmp_path / f"{rank}.txt").read_text()) for rank in range(2)] == [stop.step] * 2
    assert read_curves(tmp_path / "run")["train/loss"][-1][0] == stop.step < 100


# --- failures that are none of the cluster's --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "OutOfMemoryError: CUDA out of"),
        (MemoryError("no host memory"), "MemoryError: no host memory"),
        (None, "OutOfMemoryError: [enforce fail at alloc_cpu.cpp"),
    ],
    ids=["GPU", "Python", "torch on the CPU"],
)
def test_no_memory_is_a_reason_that_no_other_attempt_would_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, reason: str
) -> None:
    def fail(*arguments: Any) -> None:
        if error is None:
            torch.empty(1 << 50)  # really refused by the allocator
        else:
            raise error

    monkeypatch.setattr(worker, "_train", fail)
    record_of(override(quickstart(), {"pretrain.steps": 5})).write(tmp_path)
    launch_local(tmp_path)
    assert str(worker.read_failure(tmp_path)).startswith(reason)


def test_other_errors_of_torch_are_raised_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("NCCL error: remote process exited")

    monkeypatch.setattr(worker, "_train", fail)
    record_of(override(quickstart(), {"pretrain.steps": 5})).write(tmp_path)
    with pytest.raises(RuntimeError, match="NCCL"):
        launch_local(tmp_path)
    assert worker.read_failure(tmp_path) is None


# --- recorded runs ----------------------------------------------------------------------------------------------------


def replay(config: PretrainConfig, steps: list[int], metrics: dict[str, list[float]], samples: int) -> Diagnosis | None:
    stopper = CollapseStopper(config, first_judged_step(config, build_schedules(config, samples)))
    for index, step in enumerate(steps):
        found = stopper.observe(step, {name: values[index] for name, values in metrics.items()})
        if found is not None:
            return found
    return None


def test_recorded_runs_end_as_documented() -> None:
    """200 steps each on the digits, by benchmarks/collapse_stopper.py; docs/diagnosis.md shows the table."""
    runs = json.loads(Path(__file__).with_name("collapse_curves.json").read_text())
    stopped = {}
    for name, run in runs.items():
        changes = (BAD | GOOD)[name.removesuffix("-s0")]
        config = override(quickstart(), changes | {"pretrain.steps": 200}).pretrain
        found = replay(config, run["steps"], run["metrics"], NUM_DIGITS)
        if found is not None:
            stopped[name.removesuffix("-s0")] = found.verdict
    assert stopped == {
        "no_centering": "one-hot collapse",
        "no_sharpening": "uniform collapse",
        "student_copy": "dimensional collapse",
        "center_momentum_0.999": "one-hot collapse",
        "previous_step": "dimensional collapse",
        "equal_temps": "uniform collapse",
        "no_batch_norm": "uniform collapse",
        "lr_0.1": "dimensional collapse",
        "momentum_0.9": "dimensional collapse",
    }
    assert len(runs) == 17
    assert runs["momentum_0.9-s0"]["knn_top1"] < runs["quickstart-s0"]["knn_top1"] - 10, "that one collapsed indeed"


def test_curves_of_older_runs() -> None:
    """Those of the diagnosis, which were not made for the stopper."""
    runs = json.loads((Path(__file__).parents[1] / "dino_core" / "diagnosis_curves.json").read_text())
    verdicts = {}
    for name in ("healthy", "no_centring", "no_sharpening", "no_batch_norm", "lr_100"):
        config = override(quickstart(), {"pretrain.optim.lr": 0.1} if name == "lr_100" else {}).pretrain
        found = replay(config, runs[name]["steps"], runs[name]["metrics"], 1437)
        verdicts[name] = found and found.verdict
    assert verdicts == {
        "healthy": None,
        "no_centring": "one-hot collapse",
        "no_sharpening": "uniform collapse",
        "no_batch_norm": "uniform collapse",
        "lr_100": "dimensional collapse",
    }
