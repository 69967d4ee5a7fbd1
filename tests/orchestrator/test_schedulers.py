"""Tune's real schedulers, made from a sweep's definition and fed with results; no cluster is needed for that."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dino_core.config import ConfigError
from orchestrator.overrides import override
from orchestrator.run_sweep import _write_plan
from orchestrator.schedulers import (
    describe_scheduler,
    last_first_rung,
    make_scheduler,
    rungs,
    scheduler_notes,
)
from orchestrator.sweep import Sweep
from sweeps.recipes import quickstart


def scheduler(name: str, longest: int = 100, **settings: Any) -> Any:
    definition = {"scheduler": name, "metric": "eval/knn_top1", "mode": "max", "grace_steps": 10}
    return make_scheduler({**definition, "reduction_factor": 2, "brackets": 1, **settings}, longest)


@dataclass(frozen=True)
class Trial:
    trial_id: str


class Trials:
    """Results of trials by name, as Tune would hand them on. A scheduler knows a trial by its id alone."""

    def __init__(self, scheduler: Any, names: str) -> None:
        self.scheduler = scheduler
        self.trials = {name: Trial(name) for name in names}
        for trial in self.trials.values():
            scheduler.on_trial_add(None, trial)

    def report(self, name: str, step: int, value: float) -> str:
        result = {"step": step, "eval/knn_top1": value, "training_iteration": 1}
        return str(self.scheduler.on_trial_result(None, self.trials[name], result))


@pytest.mark.parametrize("name", ["none", "pbt"])
def test_tune_has_no_scheduler_where_every_trial_runs_to_its_end(name: str) -> None:
    assert scheduler(name) is None


def test_asha_judges_at_our_own_steps() -> None:
    trials = Trials(scheduler("asha"), "abc")
    assert trials.report("a", 10, 50.0) == "CONTINUE"
    assert trials.report("b", 9, 1.0) == "CONTINUE"
    assert trials.report("b", 10, 40.0) == "STOP"
    assert trials.report("c", 10, 60.0) == "CONTINUE"
    assert trials.report("a", 101, 50.0) == "STOP", "only behind the last step"
    assert trials.report("c", 100, 60.0) == "CONTINUE"


def test_median_stops_whose_best_is_below_the_median_of_means() -> None:
    trials = Trials(scheduler("median"), "abcde")
    for name, value in (("a", 10.0), ("b", 20.0), ("c", 30.0)):
        for step in (10, 20):
            assert trials.report(name, step, value) == "CONTINUE", "fewer than 3 others to be judged by"
    assert trials.report("d", 9, 0.0) == "CONTINUE", "within the steps that every trial gets"
    assert trials.report("d", 10, 19.0) == "STOP"
    assert trials.report("e", 10, 21.0) == "CONTINUE"


def test_median_never_pauses_a_trial_for_another_to_begin() -> None:
    """A pause would cost the steps since the trial's last checkpoint."""
    trials = Trials(scheduler("median", longest=10**6), "ab")
    waiting = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])
    for step in (10, 10**5, 10**6):
        result = {"step": step, "eval/knn_top1": 1.0}
        assert trials.scheduler.on_trial_result(waiting, trials.trials["a"], result) == "CONTINUE"


def test_hyperband_judges_each_bracket_first_a_factor_later() -> None:
    np.random.seed(0)  # Tune draws a trial's bracket from numpy's own numbers
    made = scheduler("hyperband", brackets=2)
    trials = Trials(made, [chr(ord("a") + number) for number in range(20)])  # type: ignore[arg-type]
    assert {trials.report(name, 9, 1.0) for name in trials.trials} == {"CONTINUE"}
    falling = [float(100 - number) for number in range(20)]
    early = [trials.report(name, 10, value) for name, value in zip(trials.trials, falling, strict=True)]
    late = [trials.report(name, 20, value) for name, value in zip(trials.trials, falling, strict=True)]
    first = [name for name, action in zip(trials.trials, early, strict=True) if action == "STOP"]
    assert 0 < len(first) < 18, "one bracket is judged at 10, the other is not"
    second = [name for name, action in zip(trials.trials, late, strict=True) if action == "STOP"]
    assert set(second) - set(first), "it is at 20"


@pytest.mark.parametrize(
    ("name", "brackets", "step"), [("asha", 1, 10), ("median", 1, 10), ("hyperband", 2, 20), ("hyperband", 3, 40)]
)
def test_when_every_trial_has_been_judged(name: str, brackets: int, step: int) -> None:
    assert last_first_rung(name, 10, 2, brackets) == step


def test_rungs() -> None:
    assert rungs(10, 4, 500) == [10, 40, 160]
    assert rungs(125, 2, 500) == [125, 250]
    assert rungs(500, 2, 500) == []


def test_in_words() -> None:
    assert describe_scheduler("none", None, 4, 1) == "none: every trial runs to its end"
    assert describe_scheduler("asha", 10, 4, 1) == "asha: 1 in 4 goes on, first judged after 10 steps"
    assert "below the median of the others" in describe_scheduler("median", 10, 4, 1)
    assert describe_scheduler("hyperband", 10, 4, 3).startswith("hyperband: 3 brackets of asha")


STABLE = {
    "pretrain.optim.schedule": "wsd",
    "pretrain.optim.weight_decay_schedule": "constant",
    "pretrain.teacher.momentum_schedule": "constant",
}


def test_what_a_rung_cannot_compare_fairly_is_said() -> None:
    base = quickstart()
    assert scheduler_notes("none", [base]) == []
    (note,) = scheduler_notes("asha", [base, base])
    for key in STABLE:
        assert key in note
    assert scheduler_notes("median", [override(base, STABLE)]) == []
    (note,) = scheduler_notes("hyperband", [override(base, STABLE | {"pretrain.optim.schedule": "cosine"})])
    assert "pretrain.optim.schedule follows" in note
    equal = {"pretrain.teacher.final_momentum": 0.99, "pretrain.optim.final_weight_decay": 0.04}
    (note,) = scheduler_notes("asha", [override(base, equal)])  # a cosine between equal values stands still
    assert "pretrain.optim.schedule follows" in note


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"scheduler": "median", "grace_steps": 500}, "sweep.grace_steps = 500: no trial could be stopped"),
        (
            {"scheduler": "hyperband", "grace_steps": 50, "brackets": 3},
            "sweep.grace_steps = 50: no trial of bracket 3, judged at 800, could be stopped; must be less than the 500",
        ),
    ],
)
def test_a_rung_behind_the_end_is_refused(tmp_path: Any, settings: dict[str, Any], line: str) -> None:
    base = override(quickstart(), {"cluster.storage": str(tmp_path)})
    with pytest.raises(ConfigError) as caught:
        _write_plan(Sweep(base=base, **settings))
    assert str(caught.value).startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_reading_about_schedulers_imports_no_ray() -> None:
    code = "import sys, orchestrator.schedulers, orchestrator.stoppers, orchestrator.sweep\n"
    code += "print(sorted({'torch', 'ray', 'mlflow', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
