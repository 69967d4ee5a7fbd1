"""Does population-based training find better features than random search at the same number of steps? On the digits.

    python -m benchmarks.population --storage DIR [--seeds 3] [--steps 200] [--json]

trains `sweeps/population.py` in one process without Ray, and beside it its first generation to the end as it is, which
is random search over the same space with as many steps. Each seed is one of weights, data and draws. Prints the best
k-NN of both, and the schedule that was found. A run of 200 steps takes about 15 s of CPU time, a seed has 12.
DIR keeps the records as those of any sweep; what is there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.compare import Comparison, compare
from orchestrator.launch import launch_local
from orchestrator.overrides import merge_changes
from orchestrator.records import SUMMARY_FILE, Ledger, read_json, write_json
from orchestrator.run_sweep import _Plan, _write_plan
from orchestrator.sweep import Sweep
from orchestrator.sweep_file import load_sweep
from orchestrator.tables import render
from orchestrator.trials import load_from_disk
from orchestrator.worker import read_failure

KNN_ONLY: dict[str, Any] = {
    "pretrain.eval.every_steps": None,
    "pretrain.eval.num_label_free": 0,
    "pretrain.eval.num_lidar_images": 0,
    "pretrain.eval.num_pictures": 0,
}
"""What is evaluated: k-NN at the beginning and where training ends."""


def train(plan: _Plan) -> None:
    """Every trial, and those that follow from them, one after the other in this process."""
    ledger = Ledger(plan.folder)
    open_trials = plan.open_trials()
    while open_trials:
        for trial_id in open_trials:
            run_id = plan.records[trial_id].run_id
            ledger.record(run_id, "started")
            launch_local(plan.run_dir(trial_id))
            failure = read_failure(plan.run_dir(trial_id))
            ledger.record(run_id, "failed" if failure else "finished", failure or "")
        open_trials = plan.ask()
    ledger.close()


def comparison_of(sweep: Sweep, folder: Path) -> Comparison:
    """The sweep's comparison, after its training; its records are in `folder`."""
    done = folder / SUMMARY_FILE
    if not done.exists():
        plan = _write_plan(replace(sweep, changes=merge_changes(sweep.changes, {"cluster.storage": str(folder)})))
        train(plan)
        write_json(done, {"sweep": plan.folder.name})
    return compare(load_from_disk(folder / read_json(done)["sweep"]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, required=True, help="folder of the records")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    best: dict[str, list[float]] = {"pbt": [], "none": []}
    for seed in range(options.seeds):
        changes = KNN_ONLY | {"pretrain.seed": seed, "pretrain.steps": options.steps}
        base = load_sweep("population")
        length = {"generation_steps": options.steps // 5, "changes": merge_changes(base.changes, changes)}
        base = replace(base, design_seed=seed, **length)
        for scheduler, values in best.items():
            found = comparison_of(replace(base, scheduler=scheduler), options.storage / f"{scheduler}-s{seed}")
            print(f"\nseed {seed}, scheduler {scheduler}\n{render(found, 'markdown')}", flush=True)
            values.append(found.rows[0].value or 0.0)
    apart = [one - other for one, other in zip(best["pbt"], best["none"], strict=True)]
    print("| seed | population | random search | difference |\n|---:|---:|---:|---:|")
    for seed, (one, other, difference) in enumerate(zip(best["pbt"], best["none"], apart, strict=True)):
        print(f"| {seed} | {one:.2f} | {other:.2f} | {difference:+.2f} |")
    print(f"mean difference of the best k-NN: {statistics.fmean(apart):+.2f} points")
    if options.json:
        print(json.dumps({"pbt": best["pbt"], "random": best["none"], "difference": statistics.fmean(apart)}))


if __name__ == "__main__":
    main()
