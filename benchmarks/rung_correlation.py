"""How well does the order of trials at a rung tell their order at the end? For cosine and for wsd schedules.

    python -m benchmarks.rung_correlation [--results FILE] [--steps 200] [--seeds 2] [--json]

trains every configuration of `GRID` under both schedules on the digits, in one process without Ray, with k-NN at 1/4
and 1/2 of the steps and at the end, and prints Spearman's rank correlation of the k-NN at each rung with that at the
end, and which share of the best quarter at the end is in the better half at the rung. FILE keeps the k-NN of the runs;
those that are there are not trained again. docs/sweeps.md has the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.digits_runs import DigitsRuns, configured
from orchestrator.records import write_json

GRID: dict[str, list[Any]] = {
    "pretrain.optim.lr": [3e-4, 1e-3, 3e-3, 1e-2],
    "pretrain.teacher.temp": [0.04, 0.1],
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "wsd": {
        "pretrain.optim.schedule": "wsd",
        "pretrain.optim.weight_decay_schedule": "constant",
        "pretrain.teacher.momentum_schedule": "constant",
    },
}
BATCH_SIZE = 32
"""Half of the recipe's, which trains as many steps in half of the time."""
RUNGS = (4, 2)
"""Fractions of the run, as divisors of its steps."""


def record(steps: int, seeds: int, results: Path | None) -> dict[str, dict[str, float]]:
    """k-NN in per cent by step, of each run by name: schedule, seed, values."""
    runs: dict[str, dict[str, float]] = json.loads(results.read_text()) if results and results.exists() else {}
    trainer = DigitsRuns()
    for seed, schedule, values in itertools.product(range(seeds), SCHEDULES, itertools.product(*GRID.values())):
        name = f"{schedule}/s{seed}/" + ",".join(map(str, values))
        if name in runs:
            continue
        changes = SCHEDULES[schedule] | dict(zip(GRID, values, strict=True))
        changes["pretrain.teacher.warmup_temp"] = changes["pretrain.teacher.temp"]
        changes |= {"pretrain.seed": seed, "pretrain.steps": steps, "pretrain.batch_size": BATCH_SIZE}
        changes["pretrain.eval.every_steps"] = steps // RUNGS[0]
        curves, reason = trainer.train(configured(changes))
        # A run that diverged has no value at the end; it is last there, and at rungs behind its end.
        runs[name] = {str(step): value for step, value in curves["eval/knn_top1"]}
        if reason:
            runs[name][str(steps)] = 0.0
        print(name, runs[name], reason, file=sys.stderr, flush=True)
        if results:
            write_json(results, runs)
    return runs


def correlations(runs: Mapping[str, Mapping[str, float]], steps: int, schedule: str) -> dict[str, dict[str, float]]:
    """By rung: Spearman's correlation with the end (mean over seeds), and how much of the best would survive."""
    from scipy.stats import spearmanr

    by_seed: dict[str, list[Mapping[str, float]]] = {}
    for name, knn in runs.items():
        kind, seed, _ = name.split("/")
        if kind == schedule:
            by_seed.setdefault(seed, []).append(knn)
    found = {}
    for rung in RUNGS:
        rhos, kept = [], []
        for trials in by_seed.values():
            early = [trial.get(str(steps // rung), 0.0) for trial in trials]
            final = [trial[str(steps)] for trial in trials]
            rhos.append(float(spearmanr(early, final).statistic))
            order = sorted(range(len(trials)), key=lambda index: -early[index])[: len(trials) // 2]
            best = sorted(range(len(trials)), key=lambda index: -final[index])[: max(1, len(trials) // 4)]
            kept.append(len(set(best) & set(order)) / len(best))
        found[f"1/{rung}"] = {
            "spearman": sum(rhos) / len(rhos),
            "lowest": min(rhos),
            "best_quarter_kept": sum(kept) / len(kept),
            "num_seeds": len(rhos),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="file of the k-NN of the runs, read and written")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    runs = record(options.steps, options.seeds, options.results)
    tables = {schedule: correlations(runs, options.steps, schedule) for schedule in SCHEDULES}
    print("| schedule | rung | Spearman | lowest seed | best quarter kept |\n|---|---|---|---|---|")
    for schedule, rungs in tables.items():
        for rung, found in rungs.items():
            share = f"{100 * found['best_quarter_kept']:.0f} %"
            print(f"| {schedule} | {rung} | {found['spearman']:.2f} | {found['lowest']:.2f} | {share} |")
    if options.json:
        print(json.dumps(tables))


if __name__ == "__main__":
    main()
