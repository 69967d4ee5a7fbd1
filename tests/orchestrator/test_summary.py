"""The closing words: what they say of a trial that collapsed."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import TrackingConfig
from orchestrator.records import REPORT_FILE, Journal, Ledger, RunRecord
from orchestrator.summary import Summary
from orchestrator.tracking import Target


def write_run(folder: Path, entropy: float, loss: float) -> None:
    config = {"pretrain.head.num_prototypes": 100, "pretrain.teacher.centering": "none"}
    RunRecord(run_id=folder.name, experiment="e", recipe="quickstart", seed=0, config=config).write(folder)
    journal = Journal(folder)
    for step in range(0, 50, 10):
        journal.log(step, {"train/loss": loss, "train/teacher_entropy": entropy})
    journal.close()
    ledger = Ledger(folder)
    ledger.record(folder.name, "finished")
    ledger.close()


@pytest.mark.parametrize(("entropy", "loss", "num_lines"), [(0.001, 0.05, 1), (2.3, 3.0, 0)])
def test_a_collapsed_run_gets_one_line_with_the_cause(
    entropy: float, loss: float, num_lines: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run-1", entropy, loss)
    summary = Summary.of(tmp_path / "run-1", Target.of(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")))
    summary.print()
    summary.write_report()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run-1: ")]
    assert len(said) == num_lines
    assert all(line.startswith("run-1: one-hot collapse from step 0: no centring (") for line in said)
    page = (tmp_path / "run-1" / REPORT_FILE).read_text()
    assert ("one-hot collapse</span> from step 0" in page) == bool(num_lines)
