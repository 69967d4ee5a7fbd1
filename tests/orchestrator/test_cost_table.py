from __future__ import annotations

from typing import Any

import pytest

from orchestrator import cost_table
from orchestrator.config import RunConfig
from orchestrator.cost_table import CostTable, bytes_in_words, flops_in_words, hours_in_words
from orchestrator.data.sources import open_source
from orchestrator.estimate import Rate
from orchestrator.gpus import gpu_called
from orchestrator.overrides import override
from sweeps.recipes import quickstart

TINY = {"pretrain.model.depth": 1, "pretrain.batch_size": 8, "pretrain.head.num_prototypes": 16}


def runs(*changes: dict[str, Any], steps: int = 100) -> list[tuple[str, RunConfig, int]]:
    return [(f"t{place}", override(quickstart(), TINY | change), steps) for place, change in enumerate(changes)]


def table(*changes: dict[str, Any], **arguments: Any) -> CostTable:
    found = runs(*changes)
    source = open_source(found[0][1].data)
    return CostTable.of(found, {config.data: source for _, config, _ in found}, write=lambda line: None, **arguments)


def test_runs_that_cost_the_same_are_one_kind() -> None:
    lr, crops = "pretrain.optim.lr", "pretrain.crops.num_local_crops"
    counted = table({lr: 1e-3}, {lr: 1e-4}, {crops: 6}, {lr: 2e-3})
    assert [(kind.name, kind.num_runs) for kind in counted.kinds] == [("t0", 3), ("t2", 1)]
    assert counted.order == (0, 0, 1, 0)
    assert counted.largest.name == "t2"
    header, first, second = counted.rows(1, here=True)
    assert header == ["trial", "trials", "steps", "images", "GFLOP/image", "TFLOP", "memory"], "no hours are known"
    assert first[:4] == ["t0", "3", "100", "800"]
    assert float(second[4]) > float(first[4])
    lines = counted.lines(1, here=True)
    assert "3,200 images of training" in lines["arithmetic"]
    assert "--calibrate" in lines["core-hours"]
    assert lines["GPU-hours"].startswith("if it ran on GPUs: H200 ")


def test_the_stages_of_a_run_add_up() -> None:
    stages = [{"steps": 20, "crops.global_size": 24, "crops.local_size": 12}]
    evaluated = {"pretrain.eval.every_steps": 50}
    (name, config, _), (_, plain, _) = runs({"pretrain.stages": stages, "pretrain.steps": 100} | evaluated, evaluated)
    source = open_source(config.data)
    counted = CostTable.of([(name, config, 120)], {config.data: source}, write=lambda line: None)
    alone = CostTable.of([(name, plain, 100)], {config.data: source}, write=lambda line: None)
    first, second = counted.kinds
    assert (first.name, second.name) == ("t0, stage 1", "t0, stage 2")
    assert (first.cost, first.amount.images) == (alone.kinds[0].cost, 800)
    assert (second.config.pretrain.crops.global_size, second.amount.images) == (24, 160)
    assert second.cost.flops.total > 2 * first.cost.flops.total
    once = alone.kinds[0].amount.evaluated / 3
    assert (first.amount.evaluated, second.amount.evaluated) == (2 * once, 2 * once), "at 0 and 50; at 100 and the end"
    assert "960 images of training" in counted.lines(1, here=True)["arithmetic"]
    assert counted.num_folders == 1


def test_measured_kinds_are_scaled_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def calibrate(config: RunConfig, source: object) -> Rate:
        asked.append(config.pretrain.crops.num_local_crops)
        return Rate(step_s=float(config.pretrain.crops.num_local_crops), batch_cpu_s=0.0, eval_s=0.0)

    monkeypatch.setattr(cost_table, "calibrate", calibrate)
    monkeypatch.setattr(cost_table, "MAX_CALIBRATED", 2)
    counted = table(*({"pretrain.crops.num_local_crops": number} for number in (2, 4, 9, 10)), measure_steps=True)
    assert asked == [2, 10], "the smallest and the largest"
    rates = [kind.rate.step_s for kind in counted.kinds if kind.rate]
    assert rates[0] == 2 and rates[3] == 10
    work = [kind.cost.flops.total for kind in counted.kinds]
    assert rates[1] == pytest.approx(2 * work[1] / work[0])
    assert rates[2] == pytest.approx(10 * work[2] / work[3])
    hours = counted.device_hours(1, here=False)
    assert hours == pytest.approx(100 * sum(rates) / 3600)
    assert [row[-1] for row in counted.rows(1, here=False)[1:]] == ["measured", "scaled", "scaled", "measured"]
    lines = counted.lines(2, here=False, expected=0.25)
    assert lines["core-hours"].startswith("at most ")
    assert "scaled to 2 more" in lines["core-hours"]
    longest = max(100 * (rates[0] + rates[2]), 100 * (rates[1] + rates[3])) / 3600
    assert lines["wall time"] == f"at most {hours_in_words(longest)} with 2 trials at once"
    assert lines["expected"].startswith("about 25 % of that")


def test_a_known_gpu_gives_assumed_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_table, "gpu_here", lambda: "NVIDIA H100 80GB HBM3")
    counted = table({"cluster.use_gpu": True}, {"cluster.use_gpu": True, "pretrain.crops.num_local_crops": 0})
    assert counted.gpu == gpu_called("NVIDIA H100 80GB HBM3")
    assert [row[-1] for row in counted.rows(1, here=True)[1:]] == ["assumed", "assumed"]
    assert "50 % of the 67 TFLOP/s that are published for H100" in counted.lines(1, here=True)["GPU-hours"]


def test_of_many_kinds_some_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_table, "MAX_KINDS", 3)
    monkeypatch.setattr(cost_table, "gpu_here", lambda: "NVIDIA H200")
    changes = [{"pretrain.head.num_prototypes": 16 * number, "cluster.use_gpu": True} for number in range(1, 8)]
    some = table(*changes)
    assert [kind.name for kind in some.kinds] == ["t0", "t3", "t6"]
    lines = some.lines(1, here=True)
    assert lines["counted"].startswith("3 of 7 kinds of trial")
    assert "5,600 images" in lines["arithmetic"]
    monkeypatch.setattr(cost_table, "MAX_KINDS", 40)
    everything = table(*changes).device_hours(1)
    assert everything is not None
    assert some.device_hours(1) == pytest.approx(everything, rel=1e-6), "it grows evenly with K"


def test_slow_data_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_table, "calibrate", lambda config, source: Rate(0.1, 0.35, 0.0))
    assert "cluster.data_cpus = 4 would keep up" in table({}, measure_steps=True).lines(1, here=False)["data"]
    enough = table({"cluster.data_cpus": 4}, measure_steps=True)
    assert "data" not in enough.lines(1, here=False)


def test_numbers_are_told_in_words() -> None:
    assert [hours_in_words(hours) for hours in (100, 3, 0.5, 0.01)] == ["4.2 days", "3.0 h", "30.0 min", "36.0 s"]
    assert [flops_in_words(x) for x in (2.5e18, 3e15, 4e12, 5e9)] == ["2.5 EFLOP", "3 PFLOP", "4 TFLOP", "5 GFLOP"]
    assert [bytes_in_words(x) for x in (2 * 10**9, 3 * 10**6)] == ["2.00 GB", "3.0 MB"]
