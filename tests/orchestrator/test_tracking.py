"""Delivery of records to a real MLflow store: complete, in order, once, and never in a run's way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.data import get_source
from mlflow.entities import Run

from dino_core.config import ConfigError
from orchestrator.config import TrackingConfig
from orchestrator.mlflow_trials import read_trials
from orchestrator.records import AppendOnly, Journal, Ledger, RunRecord, read_lines, write_json
from orchestrator.tracking import RUN_ID_TAG, Target, connect, deliver


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A SQLite store of its own for this module; making one costs seconds."""
    folder = tmp_path_factory.mktemp("mlruns")
    return Target.of(TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}"))


@pytest.fixture(scope="module")
def client(target: Target) -> MlflowClient:
    return connect(target)


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Callable[[Path], tuple[Journal, Ledger]]]:
    """Opens a folder's journal and ledger, and closes them at the end of the test."""
    with ExitStack() as stack:

        def open_both(folder: Path) -> tuple[Journal, Ledger]:
            return stack.enter_context(closing(Journal(folder))), stack.enter_context(closing(Ledger(folder)))

        yield open_both


Writers = Callable[[Path], tuple[Journal, Ledger]]


def make_run(folder: Path, **changes: object) -> RunRecord:
    fields = {
        "run_id": folder.name,
        "experiment": "test",
        "recipe": "quickstart",
        "seed": 3,
        "config": {"pretrain.teacher.temp": 0.04, "data.source": "digits"},
        "derived": {"total_steps": 20.0},
    }
    record = RunRecord(**(fields | changes))  # type: ignore[arg-type]
    record.write(folder)
    return record


def make_sweep(folder: Path, trials: list[str]) -> list[RunRecord]:
    records = [
        make_run(folder / "trials" / trial, run_id=f"{folder.name}.{trial}", sweep=folder.name) for trial in trials
    ]
    definition = {"sweep": "quickstart", "recipe": "quickstart", "space": {"pretrain.seed": [0, 1]}, "seeds": 1}
    write_json(folder / "sweep.json", definition | {"metric": "m", "trials": [{"trial_id": t} for t in trials]})
    return records


def runs_of(client: MlflowClient, experiment: str) -> dict[str, Run]:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def test_a_run_arrives_complete(tmp_path: Path, client: MlflowClient, target: Target, writers: Writers) -> None:
    folder = tmp_path / "run-a"
    record = make_run(folder)
    journal, ledger = writers(folder)
    ledger.record(record.run_id, "started")
    for step in range(3):
        journal.log(step, {"train/loss": 5.0 - step, "eval/knn_top1": 60.0 + step})
    deliver(client, folder, "complete", target)
    run = runs_of(client, "complete")["run-a"]
    assert run.info.status == "RUNNING"
    assert run.data.params == {
        "pretrain.teacher.temp": "0.04",
        "data.source": "digits",
        "derived/total_steps": "20.0",
    }
    assert run.data.tags["recipe"] == "quickstart"
    assert run.data.tags["seed"] == "3"
    assert run.data.tags["checkpoints"].endswith("run-a/checkpoints")
    ledger.record(record.run_id, "finished")
    deliver(client, folder, "complete", target)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(0, 5.0), (1, 4.0), (2, 3.0)]
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["run.json"]
    assert client.get_run(run.info.run_id).info.start_time == run.info.start_time
    assert run.info.start_time == int(next(read_lines(folder / "ledger.jsonl"))[1]["time"] * 1000)


def test_delivering_again_duplicates_nothing(
    tmp_path: Path, client: MlflowClient, target: Target, writers: Writers
) -> None:
    folder = tmp_path / "run-b"
    record = make_run(folder)
    journal, ledger = writers(folder)
    ledger.record(record.run_id, "started")
    journal.log(0, {"train/loss": 1.0})
    deliver(client, folder, "again", target)
    (folder / "mlflow.json").unlink()  # the driver died before it noted what it had delivered
    journal.log(1, {"train/loss": 2.0})
    deliver(client, folder, "again", target)
    runs = runs_of(client, "again")
    assert len(runs) == 1
    history = client.get_metric_history(runs["run-b"].info.run_id, "train/loss")
    assert [point.step for point in history] == [0, 1]


def test_a_sweep_is_a_parent_with_children_and_their_ends(
    tmp_path: Path, client: MlflowClient, target: Target, writers: Writers
) -> None:
    folder = tmp_path / "sweep-a"
    records = make_sweep(folder, ["t0", "t1", "t2", "t3", "t4"])
    _, ledger = writers(folder)
    ledger.record("sweep-a", "started")
    for record, event in zip(records[:4], ("finished", "stopped", "failed", "interrupted"), strict=True):
        ledger.record(record.run_id, "started")
        numbers = {"cost/device_hours_saved": 0.5} if event == "stopped" else None
        ledger.record(record.run_id, event, "a reason" if event != "finished" else "", numbers)
    ledger.record("sweep-a", "failed", "t2")
    deliver(client, folder, "family", target)
    runs = runs_of(client, "family")
    assert set(runs) == {"sweep-a", "t0", "t1", "t2", "t3"}, "a trial that never started has no run"
    parent = runs.pop("sweep-a")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {name: run.info.status for name, run in runs.items()} == {
        "t0": "FINISHED",
        "t1": "FINISHED",
        "t2": "FAILED",
        "t3": "KILLED",
    }
    assert runs["t1"].data.tags["ended"] == "stopped"
    assert runs["t1"].data.metrics == {"cost/device_hours_saved": 0.5}
    assert runs["t2"].data.tags["reason"] == "a reason"
    assert parent.info.status == "FAILED"
    ledger.record(records[3].run_id, "started")
    deliver(client, folder, "family", target)
    resumed = runs_of(client, "family")["t3"]
    assert resumed.info.status == "RUNNING"
    assert "ended" not in resumed.data.tags and "reason" not in resumed.data.tags


def test_hundreds_of_points_and_params_arrive(
    tmp_path: Path, client: MlflowClient, target: Target, writers: Writers
) -> None:
    folder = tmp_path / "run-c"
    record = make_run(folder, config={f"pretrain.key{i}": i for i in range(230)})
    journal, ledger = writers(folder)
    for step in range(300):
        journal.log(step, {f"train/m{i}": float(step) for i in range(7)})
    ledger.record(record.run_id, "started")
    deliver(client, folder, "many", target)
    run = runs_of(client, "many")["run-c"]
    assert len(run.data.params) == 231
    assert all(len(client.get_metric_history(run.info.run_id, f"train/m{i}")) == 300 for i in range(7))


def test_what_a_run_trained_with_and_on_is_there(
    tmp_path: Path, client: MlflowClient, target: Target, writers: Writers
) -> None:
    folder = tmp_path / "run-e"
    record = make_run(
        folder,
        git_commit=f"{'a' * 40}-dirty",
        data_digest="d" * 32,
        config={"data.source": "s3://bucket/birds.parquet", "data.train_split": "train", "data.test_split": "val"},
        data={"kind": "parquet", "num_train": 900, "num_test": 100, "num_classes": 7},
    )
    _, ledger = writers(folder)
    ledger.record(record.run_id, "started")
    write_json(folder / "environment.json", {"host": "node-1", "device": "NVIDIA H200", "version/torch": "2.15.0"})
    deliver(client, folder, "inputs", target)
    (folder / "mlflow.json").unlink()
    write_json(folder / "environment.json", {"host": "node-2", "device": "NVIDIA H200", "version/torch": "2.15.0"})
    deliver(client, folder, "inputs", target)  # by another driver, after the run was restarted elsewhere
    run = runs_of(client, "inputs")["run-e"]
    expected = {"git_commit": f"{'a' * 40}-dirty", "git_dirty": "True", "mlflow.source.git.commit": "a" * 40}
    expected |= {"host": "node-2", "device": "NVIDIA H200", "version/torch": "2.15.0", "data_digest": "d" * 32}
    assert expected.items() <= run.data.tags.items()
    found = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert len(run.inputs.dataset_inputs) == 2, "once each"
    assert {context: dataset.name for context, dataset in found.items()} == {
        "training": "birds.parquet/train",
        "evaluation": "birds.parquet/val",
    }
    assert {dataset.digest for dataset in found.values()} == {"d" * 32}
    assert json.loads(found["training"].profile) == {"num_rows": 900, "num_classes": 7}
    source = get_source(found["training"])  # MLflow can make something of it
    assert source.uri == "s3://bucket/birds.parquet"  # type: ignore[attr-defined]


def test_system_metrics_and_pictures_arrive_once(
    tmp_path: Path, client: MlflowClient, target: Target, writers: Writers
) -> None:
    folder = tmp_path / "run-f"
    record = make_run(folder)
    journal, ledger = writers(folder)
    ledger.record(record.run_id, "started")
    journal.log(7, {"train/loss": 1.0})
    samples = AppendOnly(folder / "system.jsonl")
    for i in range(3):
        samples.append({"step": i, "time": 1000.0 + i, "metrics": {"system/cpu_utilization_percentage": 10.0 * i}})
    samples.close()
    picture = folder / "pictures" / "step_00000500" / "attention.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"first")
    (picture.parent / ".crops.png.tmp").write_bytes(b"not whole yet")
    deliver(client, folder, "pictures", target)
    run_id = runs_of(client, "pictures")["run-f"].info.run_id
    history = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert [(p.step, p.timestamp, p.value) for p in history] == [(i, 1_000_000 + 1000 * i, 10.0 * i) for i in range(3)]
    assert [a.path for a in client.list_artifacts(run_id, "pictures/step_00000500")] == [
        "pictures/step_00000500/attention.png"
    ]
    (trial,) = read_trials("pictures", target.uri)
    assert trial.curves == {"train/loss": [(7, 1.0)]}, "a comparison is of what was trained, by its steps"
    before = json.loads((folder / "mlflow.json").read_text())
    deliver(client, folder, "pictures", target)
    assert json.loads((folder / "mlflow.json").read_text()) == before, "nothing was new"
    picture.write_bytes(b"drawn again")
    os.utime(picture, (2e9, 2e9))
    deliver(client, folder, "pictures", target)
    copy = client.download_artifacts(run_id, "pictures/step_00000500/attention.png", str(tmp_path))
    assert Path(copy).read_bytes() == b"drawn again"


def test_a_run_deleted_in_mlflow_is_left_alone_and_holds_up_no_other(
    tmp_path: Path, client: MlflowClient, target: Target, writers: Writers
) -> None:
    folder = tmp_path / "sweep-b"
    records = make_sweep(folder, ["t0", "t1"])
    _, ledger = writers(folder)
    for name in ("sweep-b", *(record.run_id for record in records)):
        ledger.record(name, "started")
    assert deliver(client, folder, "deleted", target) == []
    deleted = runs_of(client, "deleted")["t0"].info.run_id
    client.delete_run(deleted)
    for trial in ("t0", "t1"):
        with closing(Journal(folder / "trials" / trial)) as journal:
            journal.log(0, {"train/loss": 1.0})
    (told,) = deliver(client, folder, "deleted", target)
    assert told.startswith("t0 was deleted in MLflow; its record is kept in ")
    runs = runs_of(client, "deleted")
    assert set(runs) == {"sweep-b", "t1"}, "it did not come back"
    assert runs["t1"].data.metrics == {"train/loss": 1.0}
    client.restore_run(deleted)
    assert deliver(client, folder, "deleted", target) == []
    assert runs_of(client, "deleted")["t0"].data.metrics == {"train/loss": 1.0}


def test_a_deleted_experiment_does_not_come_back_while_the_sweep_runs(
    tmp_path: Path, client: MlflowClient, target: Target, writers: Writers
) -> None:
    folder = tmp_path / "run-g"
    record = make_run(folder)
    journal, ledger = writers(folder)
    ledger.record(record.run_id, "started")
    deliver(client, folder, "gone", target)
    experiment = client.get_experiment_by_name("gone")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    journal.log(0, {"train/loss": 1.0})
    assert len(deliver(client, folder, "gone", target)) == 1
    other = tmp_path / "run-h"  # a new run of that experiment needs it again: its name is taken for ever
    make_run(other)
    writers(other)[1].record("run-h", "started")
    deliver(client, other, "gone", target)
    assert set(runs_of(client, "gone")) >= {"run-h"}


def test_an_emptied_store_gets_everything_again(
    tmp_path: Path, client: MlflowClient, target: Target, writers: Writers
) -> None:
    folder = tmp_path / "sweep-c"
    records = make_sweep(folder, ["t0"])
    _, ledger = writers(folder)
    for name in ("sweep-c", records[0].run_id):
        ledger.record(name, "started")
    with closing(Journal(folder / "trials" / "t0")) as journal:
        journal.log(0, {"train/loss": 1.0})
    deliver(client, folder, "emptied", target)
    for place in (folder, folder / "trials" / "t0"):  # as it would be noted of runs of a store that was thrown away
        noted = json.loads((place / "mlflow.json").read_text())
        write_json(place / "mlflow.json", noted | {"run_id": "0" * 32})
    for run in runs_of(client, "emptied").values():
        client.delete_tag(run.info.run_id, RUN_ID_TAG)
        client.delete_run(run.info.run_id)
    deliver(client, folder, "emptied", target, first=True)
    runs = runs_of(client, "emptied")
    assert set(runs) == {"sweep-c", "t0"}
    assert runs["t0"].data.metrics == {"train/loss": 1.0}
    assert runs["t0"].data.tags["mlflow.parentRunId"] == runs["sweep-c"].info.run_id


def test_params_that_changed_on_resuming_stop_nothing(
    tmp_path: Path, client: MlflowClient, target: Target, writers: Writers
) -> None:
    """MLflow refuses another value of a param. It is asked if a driver died before it noted that they are there."""
    folder = tmp_path / "run-i"
    record = make_run(folder, config={"cluster.address": "old:6379", "pretrain.seed": 1})
    _, ledger = writers(folder)
    ledger.record(record.run_id, "started")
    deliver(client, folder, "resumed", target)
    (folder / "mlflow.json").unlink()
    make_run(folder, config={"cluster.address": "new:6379", "pretrain.seed": 1})
    deliver(client, folder, "resumed", target)
    assert runs_of(client, "resumed")["run-i"].data.params["cluster.address"] == "old:6379"


def test_no_password_is_shown_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://me:hush/hush@db:5432/mlflow?password=hush")
    target = Target.of(TrackingConfig())
    assert target.shown == "postgresql+psycopg://me:***@db:5432/mlflow?password=***"
    assert "hush" not in target.open_command()
    with pytest.raises(ConfigError, match=r"tracking.uri = https://...@host: holds a password"):
        TrackingConfig(uri="https://me:hush@host")
