"""Delivery of records to a real MLflow store: complete, in order, once, and never in a run's way."""

from __future__ import annotations

import multiprocessing
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.config import TrackingConfig
from orchestrator.records import Journal, Ledger, RunRecord, write_json
from orchestrator.tracking import RUN_ID_TAG, Delivery, Target, connect, deliver, ensure_experiment


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


def runs_of(client: MlflowClient, experiment: str) -> dict[str, object]:
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
    history = client.get_metric_history(runs["run-b"].info.run_id, "train/loss")  # type: ignore[attr-defined]
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
        ledger.record(record.run_id, event, "a reason" if event != "finished" else "")
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
    assert runs["t2"].data.tags["reason"] == "a reason"
    assert parent.info.status == "FAILED"
    ledger.record(records[3].run_id, "started")
    deliver(client, folder, "family", target)
    assert runs_of(client, "family")["t3"].info.status == "RUNNING", "resumed"


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


def _connect_and_create(uri: str) -> None:
    target = Target.of(TrackingConfig(uri=uri))
    ensure_experiment(connect(target), "raced", target)


def test_processes_that_start_on_a_fresh_store_do_not_race(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'fresh' / 'mlflow.db'}"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_connect_and_create, args=(uri,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert MlflowClient(uri).get_experiment_by_name("raced") is not None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def late_server(tmp_path: Path) -> Iterator[tuple[str, object]]:
    """The address of a server, and a function that starts it."""
    port = free_port()
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
        command += ["--artifacts-destination", str(tmp_path / "artifacts")]
        with (tmp_path / "server.log").open("wb") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError((tmp_path / "server.log").read_text())

    yield f"http://127.0.0.1:{port}", start
    for process in started:
        process.terminate()
        process.wait(30)


def test_a_dead_server_blocks_nothing_and_gets_everything_when_it_is_back(
    tmp_path: Path, late_server: tuple[str, object], writers: Writers
) -> None:
    uri, start = late_server
    target = Target.of(TrackingConfig(uri=uri))
    folder = tmp_path / "run-d"
    record = make_run(folder)
    journal, ledger = writers(folder)
    ledger.record(record.run_id, "started")
    delivery = Delivery(folder, "late", target, every_s=0.2)
    delivery.start()
    seconds = []
    for step in range(40):
        begin = time.perf_counter()
        journal.log(step, {"train/loss": float(step)})
        seconds.append(time.perf_counter() - begin)
        time.sleep(0.05)
    # A busy machine can hold up any step; waiting for attempts, one each 0.2 s, would hold up one in four.
    assert sorted(seconds)[-4] < 0.25, "steps waited for a server that is not there"
    deadline = time.monotonic() + 100
    while delivery.problem is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert delivery.problem is not None
    problem = delivery.finish(2.0)
    assert problem is not None, "nobody was told that the record is not delivered"

    start()  # type: ignore[operator]
    ledger.record(record.run_id, "finished")
    delivery = Delivery(folder, "late", target, every_s=0.2)
    delivery.start()
    assert delivery.finish(200.0) is None
    run = runs_of(MlflowClient(uri), "late")["run-d"]
    assert run.info.status == "FINISHED"  # type: ignore[attr-defined]
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "train/loss")  # type: ignore[attr-defined]
    assert sorted(point.step for point in history) == list(range(40))
    assert run.data.tags[RUN_ID_TAG].startswith("run-d-")  # type: ignore[attr-defined]
