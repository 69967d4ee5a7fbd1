"""The driver's side of a run: what is shown, and what happens when a run hangs or breaks."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.config import TrackingConfig
from orchestrator.errors import RunFailed
from orchestrator.progress import Progress, RunProgress
from orchestrator.records import Journal, Ledger, RunRecord, read_states
from orchestrator.supervisor import supervise
from orchestrator.tracking import Target


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run-1"
    RunRecord(
        run_id="run-1",
        experiment="test",
        recipe="quickstart",
        seed=0,
        config={"pretrain.batch_size": 10, "pretrain.head.num_prototypes": 100},
        derived={"total_steps": 50.0},
    ).write(folder)
    return folder


@pytest.fixture
def ledger(run: Path) -> Iterator[Ledger]:
    ledger = Ledger(run)
    yield ledger
    ledger.close()


def test_plain_lines_say_where_a_run_stands(run: Path, ledger: Ledger) -> None:
    output = io.StringIO()
    with Progress(run, [RunProgress.of(run, "quickstart")], output) as progress:
        progress.update()
        assert output.getvalue() == "", "nothing has started"
        ledger.record("run-1", "started")
        journal = Journal(run)
        journal.log(10, {"train/loss": 4.5, "train/teacher_entropy": 2.3026, "train/images_per_s": 4.0})
        journal.log(10, {"eval/knn_top1": 61.25})
        journal.close()
        progress.update()
        progress.update()
        ledger.record("run-1", "stopped")
    lines = output.getvalue().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "quickstart: running, step 10/50, loss 4.500, k-NN % 61.2, entropy 2.30 (50 %), images/s 4, 1:40 left",
        "quickstart: stopped, step 10/50, loss 4.500, k-NN % 61.2, entropy 2.30 (50 %), images/s 4",
    ]


def test_a_run_without_prototypes_shows_no_entropy(tmp_path: Path) -> None:
    RunRecord(
        run_id="run-2",
        experiment="test",
        recipe="quickstart",
        seed=0,
        config={"pretrain.batch_size": 10, "pretrain.head.num_prototypes": None},
        derived={"total_steps": 50.0},
    ).write(tmp_path)
    journal = Journal(tmp_path)
    journal.log(10, {"train/loss": 1.5, "train/target_std": 0.9})
    journal.close()
    run = RunProgress.of(tmp_path, "byol")
    run.refresh()
    assert run.cells() == ["10/50", "1.500", "", "", "", ""]


def supervise_run(run: Path, ledger: Ledger, launch: object, start_timeout_s: float = 60.0) -> None:
    supervise(
        launch,  # type: ignore[arg-type]
        ledger=ledger,
        folder=run,
        runs=[RunProgress.of(run, "quickstart")],
        experiment="test",
        # Nothing listens there: what is tested does not depend on delivery.
        target=Target.of(TrackingConfig(uri="http://127.0.0.1:9")),
        start_timeout_s=start_timeout_s,
        describe_cluster=lambda: "CPU 0 of 4 free",
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.supervisor.FINAL_DELIVERY_S", 1.0)


def test_a_run_that_hangs_is_given_up_with_a_reason(run: Path, ledger: Ledger) -> None:
    hanging = threading.Event()

    def launch() -> None:
        ledger.record("run-1", "started")
        hanging.wait(60)

    try:
        with pytest.raises(RunFailed, match=r"run-1: no first step within 0.5 s \(cluster: CPU 0 of 4 free\)"):
            supervise_run(run, ledger, launch, start_timeout_s=0.5)
    finally:
        hanging.set()
    state = read_states(run)["run-1"]
    assert state.event == "failed"
    assert "no first step" in state.reason


def test_delivery_begins_when_a_run_has_started(run: Path, ledger: Ledger) -> None:
    delivering: list[bool] = []
    before = set(threading.enumerate())  # other tests' may still wait for a server

    def is_delivering() -> bool:
        return any(thread.name == "mlflow-delivery" for thread in set(threading.enumerate()) - before)

    def launch() -> None:
        time.sleep(0.8)  # as Ray takes to start
        delivering.append(is_delivering())
        ledger.record("run-1", "started")
        deadline = time.monotonic() + 30
        while not is_delivering() and time.monotonic() < deadline:
            time.sleep(0.05)
        delivering.append(is_delivering())
        ledger.record("run-1", "finished")

    supervise_run(run, ledger, launch)
    assert delivering == [False, True]


def test_what_breaks_the_launch_is_raised_and_written_down(run: Path, ledger: Ledger) -> None:
    def launch() -> None:
        ledger.record("run-1", "started")
        raise OSError("the node is gone")

    with pytest.raises(OSError, match="the node is gone"):
        supervise_run(run, ledger, launch)
    assert read_states(run)["run-1"].reason == "OSError: the node is gone"
