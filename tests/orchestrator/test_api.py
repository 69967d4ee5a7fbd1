"""The Python interface, and the script that shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import api
from orchestrator.records import Journal, Ledger, RunRecord
from orchestrator.trials import CompareError

ROOT = Path(__file__).parents[2]


def make_run(folder: Path, seed: int, temp: float, accuracy: float) -> None:
    config = api.flatten(api.override(api.RunConfig(), {"pretrain.seed": seed, "pretrain.teacher.temp": temp}))
    record = RunRecord(run_id=folder.name, experiment="e", recipe="r", seed=seed, config=config)
    record.write(folder)
    journal, ledger = Journal(folder), Ledger(folder)
    journal.log(0, {"eval/knn_top1": 10.0, "train/loss": 5.0})
    journal.log(9, {"eval/knn_top1": accuracy, "train/loss": 4.0})
    ledger.record(record.run_id, "finished")
    journal.close()
    ledger.close()


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    for seed in (0, 1, 2):
        make_run(tmp_path / f"cold-s{seed}", seed, 0.04, 60.0 + seed)
        make_run(tmp_path / f"warm-s{seed}", seed, 0.07, 50.0 + seed + 0.1 * (seed == 1))
    return tmp_path


def test_frames_of_runs_by_name_path_and_folder(storage: Path) -> None:
    names = [f"{name}-s{seed}" for name in ("cold", "warm") for seed in (0, 1, 2)]
    for given in (names, [storage / name for name in names], [storage]):
        comparison = api.compare(*given, storage=str(storage), reference="warm-s0")
        frame = comparison.configurations_frame()
        assert list(frame["pretrain.teacher.temp"]) == [0.04, 0.07]
        assert list(frame["mean"]) == pytest.approx([61.0, 51.0 + 0.1 / 3])
        assert frame["difference_mean"][0] == pytest.approx(10.0 - 0.1 / 3)
        assert frame["verdict"][0] == "better"
        assert comparison.frame()["pretrain.seed"].tolist() == [2, 1, 0, 2, 1, 0]


def test_curves_are_tidy(storage: Path) -> None:
    comparison = api.compare(storage / "cold-s0", storage / "warm-s0")
    frame = api.curves(comparison, ["eval/knn_top1"])
    assert frame.values.tolist() == [
        ["cold-s0", "eval/knn_top1", 0, 10.0],
        ["cold-s0", "eval/knn_top1", 9, 60.0],
        ["warm-s0", "eval/knn_top1", 0, 10.0],
        ["warm-s0", "eval/knn_top1", 9, 50.0],
    ]
    assert set(api.curves(comparison)["metric"]) == {"eval/knn_top1", "train/loss"}


def test_what_is_not_there_is_said_with_what_is(storage: Path, tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="no such folder"):
        api.compare("cold-s9", storage=str(storage), uri=f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(CompareError, match="eval/knn_top2: no trial logged it; there is eval/knn_top1"):
        api.compare(storage, metric="eval/knn_top2")
    with pytest.raises(CompareError, match="cold-s7"):
        api.compare(storage, reference="cold-s7")


@pytest.mark.ray
def test_the_script_of_the_docs_runs(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "notebook.py"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "temp_0.04-s0', 'temp_0.07-s0', 'temp_0.04-s1', 'temp_0.07-s1'" in done.stdout
    assert "not resolved" in done.stdout
    (page,) = tmp_path.glob("runs/notebook-*/notebook.html")
    assert page.stat().st_size > 1 << 20, "with plotly's code inside"
