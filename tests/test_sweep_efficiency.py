"""The arithmetic of `benchmarks/sweep_efficiency.py`, on records made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sweep_efficiency
from benchmarks.sweep_efficiency import Span, bare_loop, breakdown, read_spans
from orchestrator.overrides import override
from orchestrator.records import Ledger
from orchestrator.run_sweep import SweepResult, _write_plan
from orchestrator.sweep import Sweep
from orchestrator.worker import Place, run_worker
from sweeps.recipes import quickstart

PARTS = {"steps": 18.0, "start": 4.0, "data_wait": 3.0, "evaluation": 2.0, "checkpoint": 1.0, "report": 2.0}


def span(started: float) -> Span:
    return Span(started, started + 5, started + 35, started + 36, dict(PARTS))


def test_every_second_of_every_place_is_accounted_for() -> None:
    spans = [span(110), span(112), span(147), span(150)]  # the third takes the first place, which is free at 146
    found = breakdown(spans, 100, 200, at_once=2)
    assert sum(found.values()) == 2 * 100
    assert found["training steps"] == 4 * 18
    assert found["actor start"] == 4 * 5
    assert found["end of a trial"] == 4 * 1
    assert found["before the first trial: plan, Ray"] == 10 + 12
    assert found["between trials"] == 1 + 2
    assert found["after the last: report, MLflow, Ray's end"] == (200 - 183) + (200 - 186)


def test_places_that_no_trial_took_count_as_lost() -> None:
    found = breakdown([span(110)], 100, 150, at_once=2)
    assert sum(found.values()) == 2 * 50


def test_spans_are_read_from_the_records(tmp_path: Path) -> None:
    events = [("sweep", "started", 90.0), ("sweep.a", "started", 100.0), ("sweep.a", "finished", 140.0)]
    lines = [{"time": when, "run": run, "event": event, "reason": ""} for run, event, when in events]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trial = tmp_path / "trials" / "a"
    trial.mkdir(parents=True)
    metrics = {f"time/{part}_s": value for part, value in PARTS.items() if part != "steps"}
    journal = [
        {"step": 0, "time": 112.0, "metrics": {"cost/device_hours": 7 / 3600}},
        {"step": 9, "time": 135.0, "metrics": {"cost/device_hours": 30 / 3600, **metrics}},
    ]
    (trial / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    (found,) = read_spans(tmp_path, quickstart())
    assert (found.started, found.last_record, found.finished) == (100, 135, 140)
    assert found.entered == pytest.approx(105)
    assert found.parts == pytest.approx(PARTS)


def test_a_bare_loop_trains() -> None:
    config = override(quickstart(), {"pretrain.batch_size": 4, "pretrain.model.depth": 1})
    short, long = bare_loop(config, 2), bare_loop(config, 30)
    assert 0 < short.cpu_s < long.cpu_s


def test_the_whole_comparison_adds_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With bare loops and trials in this process: all but Ray."""
    trained = []

    def run(sweep: Sweep) -> SweepResult:
        plan = _write_plan(sweep)
        ledger = Ledger(plan.folder)
        for trial, record in plan.records.items():
            ledger.record(record.run_id, "started")
            run_worker(plan.run_dir(trial), Place("local", "cpu"), report=lambda metrics: None)
            ledger.record(record.run_id, "finished")
            trained.append(record.seed)
        ledger.close()
        return SweepResult(plan.folder)

    monkeypatch.setattr(sweep_efficiency, "run_sweep", run)
    monkeypatch.setattr(sweep_efficiency, "bare_loops", lambda pool, config, steps, count: [bare_loop(config, steps)])
    monkeypatch.setattr(sweep_efficiency, "_PROBED_STEPS", 4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tiny = ["pretrain.batch_size=4", "pretrain.model.depth=1", "pretrain.eval.num_gallery=20"]
    tiny += ["pretrain.eval.num_queries=20", "pretrain.eval.num_label_free=0", "pretrain.eval.num_lidar_images=0"]
    tiny += ["pretrain.eval.num_pictures=0"]
    sweep_efficiency.main([*tiny, "--trials", "2", "--at-once", "1", "--seconds", "0.01", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert trained == [0, 1]
    assert result["steps"] == 40
    assert result["efficiency"] == pytest.approx(result["bare_s"] / result["wall_s"], rel=0.01)
    assert result["bare_s"] == pytest.approx(2 * sum(result["bare_loops_s"]) / 2, rel=0.1, abs=0.02)
    assert sum(result["places_s"].values()) == pytest.approx(result["wall_s"], rel=0.02, abs=0.1)
    assert result["places_s"]["training steps"] > 0
    assert result["cpu_s"]["driver"] > 0
    assert not list(tmp_path.iterdir()), "its records are removed"
