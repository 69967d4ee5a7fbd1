"""The arithmetic of `benchmarks/sweep_efficiency.py`, on records made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.sweep_efficiency import Span, bare_loop, breakdown, read_spans
from orchestrator.overrides import override
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
