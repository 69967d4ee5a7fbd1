"""Runs and sweeps on a real Ray cluster: the same numbers as without it, and nothing left behind."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from ray.job_submission import JobSubmissionClient
from ray.util import placement_group_table

from orchestrator import cli, ray_cluster, run_sweep
from orchestrator.catalog import load_recipe
from orchestrator.compare import compare
from orchestrator.config import RunConfig
from orchestrator.overrides import override
from orchestrator.pretrain import pretrain
from orchestrator.records import read_curves, read_lines, read_states
from orchestrator.stoppers import read_stop
from orchestrator.sweep import Row, Sweep
from orchestrator.trials import load_from_disk

pytestmark = pytest.mark.ray

TINY: dict[str, Any] = {
    "pretrain.steps": 20,
    "pretrain.batch_size": 16,
    "pretrain.log_every_steps": 1,
    "pretrain.checkpoint_every_steps": 10,
    "pretrain.eval.every_steps": 10,
    "pretrain.model.depth": 1,
    "pretrain.head.num_prototypes": 64,
    "cluster.max_failures": 1,
}


@pytest.fixture
def tiny(ray_head: Any, tmp_path: Path) -> RunConfig:
    where = {
        "cluster.address": ray_head.address,
        "cluster.storage": str(tmp_path / "runs"),
        "tracking.uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    return override(load_recipe("quickstart"), TINY | where)


def losses(folder: Path) -> list[float]:
    curve = read_curves(folder)["train/loss"]
    assert [step for step, _ in curve] == list(range(TINY["pretrain.steps"]))
    return [loss for _, loss in curve]


def test_every_launcher_computes_the_same_losses(tiny: RunConfig) -> None:
    alone = pretrain(tiny, recipe="alone", local=True)
    one = pretrain(tiny, recipe="one")
    two = pretrain(override(tiny, {"cluster.num_workers": 2}), recipe="two")
    assert losses(one.folder) == pytest.approx(losses(alone.folder), rel=1e-5)
    assert losses(two.folder) == pytest.approx(losses(alone.folder), rel=1e-3)
    assert len(set(losses(alone.folder))) == TINY["pretrain.steps"], "nothing was learned, nothing was compared"
    assert two.metrics["eval/knn_top1"] == pytest.approx(alone.metrics["eval/knn_top1"], abs=1.5)


@pytest.fixture
def left_behind(ray_head: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What of a sweep is still in the cluster when all its trials have ended, before its driver goes."""
    found: dict[str, list[Any]] = {}

    def look_and_disconnect() -> None:
        from ray.util.state import list_actors

        if not ray.is_initialized():  # it was looked at before
            return
        deadline = time.monotonic() + 100
        while True:
            groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
            ours = ("ImplicitFunc", "TrainController", "RayTrainWorker", "PlacementGroupCleaner", "tune_trial")
            actors = [actor for actor in list_actors(address=ray_head.dashboard, limit=1000) if actor.state != "DEAD"]
            found["groups"] = groups
            found["actors"] = [a.class_name for a in actors if a.class_name.startswith(ours)]
            if not (found["groups"] or found["actors"]) or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        ray_cluster.disconnect()

    monkeypatch.setattr(run_sweep, "disconnect", look_and_disconnect)
    return found


def statuses(uri: str, experiment: str) -> dict[str, str]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return {run.info.run_name: run.info.status for run in client.search_runs([found.experiment_id])}


@pytest.mark.parametrize("num_workers", [1, 2], ids=["in the trial's actor", "a TorchTrainer of two workers"])
def test_asha_stops_trials_and_leaves_nothing(
    tiny: RunConfig, left_behind: dict[str, list[Any]], num_workers: int
) -> None:
    # One after the other, so that it is known who has to be stopped: the second, judged by a rate that is always lower.
    base = override(tiny, {"cluster.num_workers": num_workers, "cluster.max_concurrent_trials": 1})
    sweep = Sweep(
        name="asha",
        base=base,
        space={"pretrain.optim.lr": [1e-3, 1e-5]},
        metric="train/lr",
        scheduler="asha",
        grace_steps=2,
        reduction_factor=2,
    )
    result = run_sweep.run_sweep(sweep)
    assert result.ok
    assert left_behind == {"groups": [], "actors": []}
    ends = {run.split(".", 1)[1]: state.event for run, state in read_states(result.folder).items() if "." in run}
    assert ends["lr_0.001-s0"] == "finished"
    assert ends["lr_1e-05-s0"] == "stopped"
    stop = read_stop(result.folder / "trials" / "lr_1e-05-s0")
    assert stop is not None and stop.by == "asha" and stop.step < stop.total_steps == TINY["pretrain.steps"]
    for trial, event in ends.items():
        steps = [step for step, _ in read_curves(result.folder / "trials" / trial)["train/loss"]]
        assert (max(steps) == TINY["pretrain.steps"] - 1) == (event == "finished")
        launched_trainer = (result.folder / "trials" / trial / "ray").exists()
        assert launched_trainer == (num_workers == 2)
    assert tiny.tracking.uri is not None
    assert set(statuses(tiny.tracking.uri, "asha").values()) == {"FINISHED"}


def test_stopped_and_failing_trials_do_not_end_the_sweep(tiny: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """The median rule, a run that diverges, and one that asks for more memory than there is; the others finish."""
    lr = "pretrain.optim.lr"
    changes = {
        "pretrain.steps": 6,
        "pretrain.eval.every_steps": None,
        "cluster.max_concurrent_trials": 1,  # one after the other, so that it is known who is judged by whom
    }
    rows = {
        "first": Row(changes={lr: 3e-3}),
        "second": Row(changes={lr: 2e-3}),
        "third": Row(changes={lr: 1e-3}),
        "slow": Row(changes={lr: 1e-5}),
        # 2 TB of prototypes
        "too_large": Row(changes={"pretrain.head.num_prototypes": 2**33}),
        "diverging": Row(changes={lr: 1e30, "pretrain.optim.clip_grad": None}),
    }
    sweep = Sweep(
        name="faults",
        base=override(tiny, changes),
        rows=rows,
        metric="train/lr",
        scheduler="median",
        grace_steps=2,
    )
    result = run_sweep.run_sweep(sweep)
    assert not result.ok, "which is exit code 1"
    assert set(result.failed) == {"too_large-s0", "diverging-s0"}
    assert result.failed["too_large-s0"].startswith("OutOfMemoryError: ")
    assert result.failed["diverging-s0"].startswith("NonFiniteLossError: the loss of step")
    states = {run.split(".", 1)[1]: state for run, state in read_states(result.folder).items() if "." in run}
    ends = {trial.removesuffix("-s0"): state.event for trial, state in states.items()}
    assert ends == {
        **dict.fromkeys(("first", "second", "third"), "finished"),
        "slow": "stopped",
        **dict.fromkeys(("too_large", "diverging"), "failed"),
    }
    starts = [entry["run"] for _, entry in read_lines(result.folder / "ledger.jsonl") if entry["event"] == "started"]
    assert len(starts) == len(set(starts)), "what would only fail again is not tried again"
    assert states["slow-s0"].reason.startswith("by the scheduler (median) at step ")
    stop = read_stop(result.folder / "trials" / "slow-s0")
    assert stop is not None and stop.device_hours_saved > 0
    assert states["slow-s0"].numbers == {"cost/device_hours_saved": stop.device_hours_saved}

    trials = load_from_disk(result.folder)
    ranked = {row.trial.name: row.rank for row in compare(trials, "eval/knn_top1").rows}
    assert trials[[trial.name for trial in trials].index("diverging-s0")].at("eval/knn_top1", 0) is not None
    assert {name for name, rank in ranked.items() if rank is None} == {"too_large-s0", "diverging-s0"}
    assert "follow a schedule" in capsys.readouterr().out, "the median rule with a cosine is noted"
    assert tiny.tracking.uri is not None
    found = statuses(tiny.tracking.uri, "faults")
    assert sorted(found.values()) == ["FAILED"] * 3 + ["FINISHED"] * 4, "two trials and their sweep; the other trials"


def test_a_sweep_whose_driver_was_killed_ends_as_if_it_had_not_been(tiny: RunConfig, tmp_path: Path) -> None:
    """SIGKILL in the middle of a trial, behind a checkpoint, with another trial finished and a third to come."""
    settings = {"pretrain.steps": 60, "cluster.max_concurrent_trials": 1, "cluster.max_failures": 0}
    base = override(tiny, settings)
    space = {"pretrain.teacher.temp": [0.04, 0.05, 0.07]}
    whole = run_sweep.run_sweep(Sweep(name="whole", base=base, space=space))
    (tmp_path / "killed.json").write_text(json.dumps({"base": "quickstart", "space": space}))
    changes = {**TINY, **settings, "cluster.address": tiny.cluster.address, "cluster.storage": tiny.cluster.storage}
    changes |= {"tracking.uri": tiny.tracking.uri}
    command = [sys.executable, "-m", "orchestrator", "sweep", str(tmp_path / "killed.json")]
    command += [f"{key}={value}" for key, value in changes.items()]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=TestJobs.root, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 200
        while not any(last_step(run_dir) >= 15 for run_dir in tmp_path.glob("runs/killed-*/trials/temp_0.05-s0")):
            assert time.monotonic() < deadline and driver.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
    finally:
        driver.kill()
        driver.wait()
    (folder,) = tmp_path.glob("runs/killed-*")
    events = {run.partition(".")[2]: state.event for run, state in read_states(folder).items()}
    assert events == {"": "started", "temp_0.04-s0": "finished", "temp_0.05-s0": "started"}
    assert cli.main(["sweep", "--resume", folder.name, f"cluster.storage={tiny.cluster.storage}"]) == 0

    ends = Counter(r["run"] for _, r in read_lines(folder / "ledger.jsonl") if r["event"] == "finished")
    trials = [f"temp_{temp}-s0" for temp in ("0.04", "0.05", "0.07")]
    assert ends == dict.fromkeys([folder.name, *(f"{folder.name}.{trial}" for trial in trials)], 1)
    client = MlflowClient(tiny.tracking.uri)
    experiment = client.get_experiment_by_name("killed")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted([folder.name, *trials])
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if run.info.run_name == folder.name:
            continue
        curves = read_curves(folder / "trials" / run.info.run_name)
        expected = read_curves(whole.folder / "trials" / run.info.run_name)
        for metric in ("train/loss", "train/teacher_entropy", "eval/knn_top1"):
            assert curves[metric] == expected[metric], f"{run.info.run_name}: {metric}"
            history = client.get_metric_history(run.info.run_id, metric)
            assert sorted((point.step, point.value) for point in history) == curves[metric]
        assert len(curves["train/loss"]) == 60
        assert [entry.tags[0].value for entry in run.inputs.dataset_inputs] == ["training", "evaluation"]
        assert {"host", "device", "ray_job_id", "version/torch"} <= run.data.tags.keys()


def last_step(run_dir: Path) -> int:
    return max((record["step"] for _, record in read_lines(run_dir / "metrics.jsonl")), default=-1)


def num_tracked(database: Path) -> int:
    """Runs in MLflow's store, which is not there at first. Asked without MLflow, which would create it too."""
    if not database.exists():
        return 0
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])
        except sqlite3.OperationalError:  # its tables are being made
            return 0


class TestJobs:
    """`ray job submit`, as in the README, from the root of the project."""

    root = Path(__file__).resolve().parents[2]

    @pytest.fixture(autouse=True)
    def agent(self, ray_head: Any) -> None:
        """The head's job agent comes up some seconds after its dashboard."""
        client = JobSubmissionClient(ray_head.dashboard)
        deadline = time.monotonic() + 200
        while True:
            try:
                client.submit_job(entrypoint="true")
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def command(self, ray_head: Any, tmp_path: Path, **changes: Any) -> list[str]:
        settings = TINY | {"cluster.storage": str(tmp_path / "runs")} | changes
        environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
        return [
            str(Path(sys.executable).with_name("ray")),
            *("job", "submit", "--address", ray_head.dashboard, "--working-dir", "."),
            *("--runtime-env-json", json.dumps({"env_vars": environment}), "--submission-id", tmp_path.name),
            *("--", "python", "-m", "orchestrator", "sweep", "quickstart"),
            *(f"{key}={value}" for key, value in settings.items()),
        ]

    def test_a_job_succeeds_and_its_log_streams(self, ray_head: Any, tmp_path: Path) -> None:
        command = self.command(ray_head, tmp_path)
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "temp_0.04-momentum_0.99-s0: running" in done.stdout
        assert "same backbone, random weights" in done.stdout
        found = statuses(f"sqlite:///{tmp_path / 'mlflow.db'}", "quickstart")
        assert len(found) == 5
        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        jobs = [run.data.tags.get("ray_submission_id") for run in client.search_runs(["1"])]
        assert jobs.count(tmp_path.name) == 4, "that of every trial; the parent is of no job alone"
        assert set(found.values()) == {"FINISHED"}

    def test_stopping_a_job_leaves_its_runs_killed_and_nothing_running(self, ray_head: Any, tmp_path: Path) -> None:
        command = self.command(ray_head, tmp_path, **{"pretrain.steps": 100_000})
        with (tmp_path / "job.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=self.root, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 200
            while "loss" not in (tmp_path / "job.log").read_text() or num_tracked(tmp_path / "mlflow.db") < 2:
                assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "job.log").read_text()
                time.sleep(1)
            stop = [command[0], "job", "stop", "--address", ray_head.dashboard, tmp_path.name]
            subprocess.run(stop, check=True, capture_output=True, timeout=100)
            process.wait(100)
        finally:
            process.kill()
            process.wait()
        (folder,) = (tmp_path / "runs").iterdir()
        events = [state.event for state in read_states(folder).values()]
        assert len(events) >= 2
        assert set(events) == {"interrupted"}
        # A stopped driver delivers for two seconds; what it does not get done, the next one does.
        found = statuses(f"sqlite:///{tmp_path / 'mlflow.db'}", "quickstart")
        assert len(found) >= 2
        assert "KILLED" in found.values()
        assert set(found.values()) <= {"KILLED", "RUNNING"}
        ray.init(address=ray_head.address, log_to_driver=False)
        try:
            deadline = time.monotonic() + 100
            while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
                assert time.monotonic() < deadline, ray.available_resources()
                time.sleep(0.5)
        finally:
            ray.shutdown()
        assert os.listdir(tmp_path / "runs"), "the records are kept, to resume from"
