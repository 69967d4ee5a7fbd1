"""The main job as a user runs it: the quickstart sweep on a Ray of its own, interrupted by Ctrl-C and resumed.

Also pins the recipe: every trial must learn and none may collapse.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.records import read_curves, read_lines, read_states
from orchestrator.trials import load_from_disk

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, with its output in `folder`/log."""
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "sweep", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not re.search(pattern, (folder / "log").read_text()):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.3)


def session_members(leader: int) -> list[str]:
    """Command lines of the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append((stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def statuses(folder: Path) -> Counter[str]:
    client = MlflowClient(f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("quickstart")
    assert experiment is not None
    return Counter(run.info.status for run in client.search_runs([experiment.experiment_id]))


@dataclass
class Interrupted:
    """A sweep that was interrupted while its second pair of trials trained, and then resumed to its end."""

    folder: Path
    exit_code: int
    log: str
    left: list[str]
    statuses: Counter[str]
    resumed_exit_code: int
    resumed_log: str
    sweep: Path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interrupted]:
    folder = tmp_path_factory.mktemp("quickstart")
    process = start(folder, "quickstart")
    try:
        wait_for(folder, r"temp_0\.07\S+: running, step [1-9]", process, 400)
        process.send_signal(signal.SIGINT)
        exit_code = process.wait(200)
        deadline = time.monotonic() + 100
        while (left := session_members(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.5)
        log = (folder / "log").read_text()
        after = statuses(folder)
        (sweep,) = (folder / "runs").iterdir()
        (folder / "log").unlink()
        process = start(folder, "--resume", sweep.name)
        resumed = process.wait(400)
        yield Interrupted(folder, exit_code, log, left, after, resumed, (folder / "log").read_text(), sweep)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_ctrl_c_leaves_no_process_and_killed_runs(interrupted: Interrupted) -> None:
    assert interrupted.exit_code == 130, interrupted.log
    assert interrupted.left == []
    assert interrupted.statuses["RUNNING"] == 0
    assert interrupted.statuses["KILLED"] >= 2, "the sweep and at least one trial were under way"
    assert f"python -m orchestrator sweep --resume {interrupted.sweep.name}" in interrupted.log
    assert "Traceback" not in interrupted.log


def test_resuming_finishes_without_repeating(interrupted: Interrupted) -> None:
    assert interrupted.resumed_exit_code == 0, interrupted.resumed_log
    entries = [entry for _, entry in read_lines(interrupted.sweep / "ledger.jsonl")]
    starts = Counter(entry["run"] for entry in entries if entry["event"] == "started")
    ends = {run: state.event for run, state in read_states(interrupted.sweep).items()}
    assert set(ends.values()) == {"finished"}
    ctrl_c = next(i for i, entry in enumerate(entries) if entry["event"] == "interrupted")
    before = [entry["run"] for entry in entries[:ctrl_c] if entry["event"] == "finished"]
    assert before, "the second pair began when one of the first had ended"
    assert [starts[run] for run in before] == [1] * len(before), "it was finished before"
    assert statuses(interrupted.folder) == {"FINISHED": 5}
    for trial in (interrupted.sweep / "trials").iterdir():
        steps = [step for step, _ in read_curves(trial)["train/loss"]]
        assert steps == sorted(set(steps))
        assert steps[-1] == 499


def test_every_trial_learns_and_none_collapses(interrupted: Interrupted) -> None:
    trials = load_from_disk(interrupted.sweep)
    assert len(trials) == 4
    for trial in trials:
        learned, random = trial.last("eval/knn_top1"), trial.at("eval/knn_top1", 0)
        assert learned is not None and random is not None
        assert learned > random + 15, trial.name
        loss = trial.last("train/loss")
        assert loss is not None and loss < 0.97 * math.log(256), trial.name
        assert trial.health == "healthy", trial.name


def test_the_comparison_is_printed_and_written(interrupted: Interrupted) -> None:
    log = interrupted.resumed_log
    assert "same backbone, random weights" in log
    assert "raw pixels" in log
    assert "smoke test" in log
    assert "mlflow server --backend-store-uri sqlite:///mlruns/mlflow.db" in log
    report = interrupted.sweep / "report.html"
    assert str(report) in log
    page = report.read_text()
    assert all(trial.name in page for trial in load_from_disk(interrupted.sweep))
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page, "it asks nobody for anything"
