"""What the collapse stopper does to runs that collapse by construction and to runs that do not.

    python -m benchmarks.collapse_stopper [--curves FILE] [--steps 200] [--json]

trains each of `BAD` and `GOOD` to its end on the digits, in one process without Ray, keeps the curves in FILE (those
that are there already are not trained again), replays them to the stopper report by report, and prints when it would
have ended each run, precision, recall, and the share of all steps that would have been saved.
docs/diagnosis.md has the figures, and tests/orchestrator/collapse_curves.json the curves behind them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.digits_runs import Curves, DigitsRuns, configured
from dino_core.schedules import build_schedules
from orchestrator import stoppers
from orchestrator.records import write_json
from orchestrator.stoppers import CollapseStopper, first_judged_step

_TEACHER = "pretrain.teacher."
BAD: dict[str, dict[str, Any]] = {
    "no_centering": {_TEACHER + "centering": "none"},
    "no_sharpening": {_TEACHER + "sharpening": "none"},
    "student_copy": {_TEACHER + "update": "student_copy"},
    "center_momentum_0.999": {_TEACHER + "center_momentum": 0.999},
    "previous_step": {_TEACHER + "update": "previous_step"},
    "equal_temps": {_TEACHER + "temp": 0.2, _TEACHER + "warmup_temp": 0.2},
    "no_batch_norm": {"pretrain.head.batch_norm": False},
    "lr_0.1": {"pretrain.optim.lr": 0.1},
}
"""What collapses on the digits: rows of `sweeps/collapse.py`, and changes that docs/diagnosis.md knows."""
GOOD: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "student_copy_sinkhorn": {_TEACHER + "update": "student_copy", _TEACHER + "centering": "sinkhorn_knopp"},
    "student_copy_softmax": {_TEACHER + "update": "student_copy", _TEACHER + "centering": "softmax"},
    "temp_0.08": {_TEACHER + "temp": 0.08, _TEACHER + "warmup_temp": 0.08},
    "momentum_0.9": {_TEACHER + "momentum": 0.9},
    "wsd": {"pretrain.optim.schedule": "wsd"},
    "lr_3e-3": {"pretrain.optim.lr": 3e-3},
    "info_nce": {"pretrain.loss.name": "info_nce", _TEACHER + "centering": "none"},
    "mse": {"pretrain.loss.name": "mse"},
}
SEEDS = {0: (*BAD, *GOOD), 1: (*list(BAD)[:4], *list(GOOD)[:5])}
NUM_DIGITS = 1437
"""Training images of the source `digits`."""
_KEPT = (
    *("loss", "grad_norm", "feature_std", "feature_rank", "target_std", "teacher_entropy", "kl", "prototype_usage"),
    "loss_below_uniform",
)


@dataclass(frozen=True)
class Outcome:
    """What the stopper did to a run."""

    name: str
    is_bad: bool
    steps: int
    stopped_at: int | None
    verdict: str
    knn_top1: float
    """At the end of the run, which was not stopped."""


def record(steps: int, curves: Path | None) -> dict[str, Any]:
    """The curves of all runs by name, every logged step."""
    runs: dict[str, Any] = json.loads(curves.read_text()) if curves and curves.exists() else {}
    trainer = DigitsRuns()
    for seed, names in SEEDS.items():
        for name in names:
            run = f"{name}-s{seed}"
            if run in runs:
                continue
            changes = (BAD | GOOD)[name] | {"pretrain.seed": seed, "pretrain.steps": steps}
            found, reason = trainer.train(configured({**changes, "pretrain.eval.every_steps": None}))
            if reason:
                raise RuntimeError(f"{run}: {reason}")
            runs[run] = _compact(found)
            print(f"{run}: k-NN {runs[run]['knn_top1']:.1f} %", file=sys.stderr, flush=True)
            if curves:
                write_json(curves, runs)
    return runs


def _compact(curves: Curves) -> dict[str, Any]:
    steps = [step for step, _ in curves["train/loss"]]
    names = [f"train/{name}" for name in _KEPT if f"train/{name}" in curves]
    return {
        "steps": steps,
        "knn_top1": round(curves["eval/knn_top1"][-1][1], 2),
        "metrics": {name: [float(f"{value:.4g}") for _, value in curves[name]] for name in names},
    }


def replay(name: str, run: Mapping[str, Any]) -> Outcome:
    """Report after report of a recorded run, until the stopper ends it."""
    row, _, seed = name.rpartition("-s")
    steps = run["steps"][-1] + 1
    config = configured({**(BAD | GOOD)[row], "pretrain.seed": int(seed), "pretrain.steps": steps}).pretrain
    stopper = CollapseStopper(config, first_judged_step(config, build_schedules(config, NUM_DIGITS)))
    stopped_at, verdict = None, ""
    for index, step in enumerate(run["steps"]):
        found = stopper.observe(step, {metric: values[index] for metric, values in run["metrics"].items()})
        if found is not None:
            stopped_at, verdict = step, found.verdict
            break
    return Outcome(name, row in BAD, steps, stopped_at, verdict, run["knn_top1"])


def figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Precision and recall of stopping, steps until then (median, largest), and shares of steps saved."""
    bad = [outcome for outcome in outcomes if outcome.is_bad]
    stopped = [outcome for outcome in outcomes if outcome.stopped_at is not None]
    caught = [outcome for outcome in stopped if outcome.is_bad]
    at = [outcome.stopped_at for outcome in caught if outcome.stopped_at is not None]
    saved = sum(o.steps - o.stopped_at - 1 for o in caught if o.stopped_at is not None)
    return {
        "num_bad": len(bad),
        "num_good": len(outcomes) - len(bad),
        "false_alarms": len(stopped) - len(caught),
        "precision": len(caught) / len(stopped) if stopped else 1.0,
        "recall": len(caught) / len(bad),
        "median_steps": statistics.median(at),
        "largest_steps": max(at),
        "saved_of_bad": saved / sum(outcome.steps for outcome in bad),
        "saved_of_all": saved / sum(outcome.steps for outcome in outcomes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--curves", type=Path, help="file of the curves, read and written")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    runs = record(options.steps, options.curves)
    for num_reports in (1, 2, 3):
        stoppers.NUM_REPORTS = num_reports
        outcomes = [replay(name, run) for name, run in runs.items()]
        if num_reports == 2:
            print("| run | k-NN % at the end | stopped at | verdict |\n|---|---|---|---|")
            for outcome in outcomes:
                step = "" if outcome.stopped_at is None else outcome.stopped_at
                print(
                    f"| `{outcome.name}` | {outcome.knn_top1:.1f} | {step} | {outcome.verdict or 'runs to its end'} |"
                )
        found = figures(outcomes)
        print(f"{num_reports} reports: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
        if options.json and num_reports == 2:
            last = found
    if options.json:
        print(json.dumps(last))


if __name__ == "__main__":
    main()
