"""How much of a sweep's wall time is training: eight equal trials beside the same training without Ray and MLflow.

    python -m benchmarks.sweep_efficiency [--quick] [--json]

runs bare loops (`dino_core.train` on the same data, batches made in the loop, one process and one core each, as many at
a time as trials run), then a sweep of trials that differ by their seed alone, then the bare loops again, and prints

    efficiency = (trials x mean seconds of a bare loop / trials at once) / wall seconds of `run_sweep`

with where the rest of the time of all places for trials went, and the CPU time of the sweep's processes. README.md has
figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import psutil

from orchestrator.catalog import load_recipe
from orchestrator.config import RunConfig
from orchestrator.overrides import override, parse_assignments
from orchestrator.records import LEDGER_FILE, METRICS_FILE, read_lines
from orchestrator.run_clock import DEVICE_HOURS, PARTS
from orchestrator.run_sweep import run_sweep
from orchestrator.sweep import Sweep

_PROBED_STEPS = 30


@dataclass(frozen=True)
class Loop:
    """A bare loop."""

    seconds: float
    cpu_s: float


def bare_loop(config: RunConfig, steps: int) -> Loop:
    """Train so many steps in this process on one core, making each batch when it is needed."""
    import torch

    from dino_core.crops import CropBatch, MultiCrop
    from dino_core.train import TrainState, train
    from orchestrator.data.loaders import make_loader
    from orchestrator.data.plan import index_plan
    from orchestrator.data.sources import open_source
    from orchestrator.data.stream import Batches, as_tensors

    torch.set_num_threads(1)
    source = open_source(config.data)
    crops = MultiCrop(config.pretrain.crops, config.pretrain.seed)
    batches = Batches(
        split=source.train,
        loader=make_loader(config, source, "train", None),
        crops=crops,
        plan=index_plan(config, source.train),
        start_step=0,
        stop_step=steps,
    )

    def make(step: int) -> CropBatch:
        return crops.finish(as_tensors(batches.make(step)), torch.device("cpu"))

    def loop(steps: int) -> None:
        state = TrainState.create(override(config, {"pretrain.steps": steps}).pretrain, len(source.train))
        train(state, map(make, range(steps)), on_log=lambda *_: None, on_checkpoint=lambda _: None)

    loop(3)  # what is imported or made at the first use is no part of a loop
    began, cpu = time.perf_counter(), time.process_time()
    loop(steps)
    return Loop(time.perf_counter() - began, time.process_time() - cpu)


def bare_loops(pool: Pool, config: RunConfig, steps: int, at_once: int) -> list[Loop]:
    return pool.starmap(bare_loop, [(config, steps)] * at_once, chunksize=1)


class CpuWatch(threading.Thread):
    """CPU seconds of this process and of all that it starts, by what they are."""

    _ROLES = (
        (r"ray::(ImplicitFunc|tune_trial|_?bundle_reservation|.*[tT]rain)", "trials"),
        (r"ray::(Map|_?[mM]ap|ReadRange|.*make)", "data tasks"),
        (r"ray::", "other Ray workers"),
        (r"raylet|gcs_server|dashboard|agent|monitor|log_monitor|runtime_env", "Ray's servers"),
    )

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._seen: dict[tuple[int, float], dict[str, float]] = {}
        own = psutil.Process().cpu_times()
        self._before = own.user + own.system

    def run(self) -> None:
        while not self._done.wait(1.0):
            self._look()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                name = " ".join(process.cmdline()) or process.name()
                times, key = process.cpu_times(), (process.pid, process.create_time())
            except psutil.Error:  # it has just ended
                continue
            total, parts = times.user + times.system, self._seen.setdefault(key, {})
            role = next((role for pattern, role in self._ROLES if re.search(pattern, name)), "other processes")
            # a worker is renamed by what it runs: each role gets what was used since the last look
            parts[role] = parts.get(role, 0.0) + total - sum(parts.values())

    def finish(self) -> dict[str, float]:
        self._done.set()
        self.join()
        own = psutil.Process().cpu_times()
        found = {"driver": own.user + own.system - self._before}
        for parts in self._seen.values():
            for role, seconds in parts.items():
                found[role] = found.get(role, 0.0) + seconds
        return found


@dataclass(frozen=True)
class Span:
    """One trial; times are Unix seconds."""

    started: float
    """Tune started it."""
    entered: float
    """Its worker began."""
    last_record: float
    finished: float
    """The ledger has its end."""
    parts: dict[str, float]
    """Seconds of the worker by `time/*`, and of the rest as `steps`."""


def read_spans(folder: Path, config: RunConfig) -> list[Span]:
    """The trials of a sweep, in the order of their starts."""
    times: dict[str, dict[str, float]] = {}
    for _, entry in read_lines(folder / LEDGER_FILE):
        if "." in entry["run"]:
            times.setdefault(entry["run"].split(".", 1)[1], {})[entry["event"]] = entry["time"]
    spans = []
    for trial, events in times.items():
        records = [record for _, record in read_lines(folder / "trials" / trial / METRICS_FILE)]
        metrics: dict[str, float] = {}
        for record in records:
            metrics |= record["metrics"]
        seconds = metrics[DEVICE_HOURS] * 3600 / config.cluster.num_devices
        parts: dict[str, float] = {part: metrics[f"time/{part}_s"] for part in PARTS}
        parts["steps"] = seconds - sum(parts.values())
        end = records[-1]["time"]
        spans.append(Span(events["started"], end - seconds, end, events["finished"], parts))
    return sorted(spans, key=lambda span: span.started)


def breakdown(spans: Sequence[Span], began: float, ended: float, at_once: int) -> dict[str, float]:
    """Seconds of all `at_once` places for trials from `began` to `ended`, by what they went into."""
    free = [began] * at_once
    before, between = 0.0, 0.0
    for span in spans:
        place = min(range(at_once), key=free.__getitem__)
        if free[place] == began:
            before += span.started - began
        else:
            between += span.started - free[place]
        free[place] = span.finished
    parts = {part: sum(span.parts[part] for span in spans) for part in ("steps", *PARTS)}
    return {
        "training steps": parts["steps"],
        "waiting for data": parts["data_wait"],
        "evaluation": parts["evaluation"],
        "checkpoint": parts["checkpoint"],
        "reports to Tune": parts["report"],
        "worker start: imports, data, network": parts["start"],
        "actor start": sum(span.entered - span.started for span in spans),
        "end of a trial": sum(span.finished - span.last_record for span in spans),
        "between trials": between,
        "before the first trial: plan, Ray": before,
        "after the last: report, MLflow, Ray's end": sum(ended - at for at in free),
    }


def make_config(options: argparse.Namespace, storage: Path) -> RunConfig:
    changes: dict[str, Any] = {
        "cluster.storage": str(storage / "runs"),
        "cluster.max_concurrent_trials": options.at_once,
        "cluster.data_cpus": 1,
        "tracking.uri": f"sqlite:///{storage / 'mlflow.db'}",
    }
    return override(load_recipe(options.recipe), changes | parse_assignments(options.settings))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changes of the recipe")
    parser.add_argument("--recipe", default="quickstart", help="what the trials are (quickstart)")
    parser.add_argument("--seconds", type=float, help="of a bare loop (60)")
    parser.add_argument("--trials", type=int, default=8, help="trials of the sweep (8)")
    parser.add_argument("--at-once", type=int, default=len(os.sched_getaffinity(0)), help="trials at once (the cores)")
    parser.add_argument("--quick", action="store_true", help="loops of 8 s: to try it, not to measure")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    options = parser.parse_args(arguments)
    seconds = options.seconds or (8.0 if options.quick else 60.0)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="sweep-efficiency-") as folder:
        result = _compare(make_config(options, Path(folder)), seconds, options.trials, options.at_once)
    if options.json:
        print(json.dumps(result))


def _compare(config: RunConfig, seconds: float, num_trials: int, at_once: int) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(at_once) as pool:
        probe = statistics.mean(loop.seconds for loop in bare_loops(pool, config, _PROBED_STEPS, at_once))
        steps = max(40, round(seconds * _PROBED_STEPS / probe / 20) * 20)
        print(f"bare: {at_once} loops of {steps} steps at once", flush=True)
        loops = bare_loops(pool, config, steps, at_once)
    quarter = {f"pretrain.{key}_every_steps": steps // 4 for key in ("checkpoint",)}
    config = override(config, {"pretrain.steps": steps, "pretrain.eval.every_steps": steps // 4} | quarter)
    watch = CpuWatch()
    watch.start()
    began, start = time.time(), time.perf_counter()
    done = run_sweep(Sweep(base=config, name="efficiency", seeds=num_trials))
    wall, ended = time.perf_counter() - start, time.time()
    cpu = watch.finish()
    if not done.ok:
        raise SystemExit(f"trials failed: {done.failed}")
    spans = read_spans(done.folder, config)
    with spawn.Pool(at_once) as pool:
        loops += bare_loops(pool, config, steps, at_once)
    bare = num_trials * statistics.mean(loop.seconds for loop in loops)
    result: dict[str, Any] = {
        "efficiency": round(bare / at_once / wall, 4),
        "wall_s": round(wall, 2),
        "bare_s": round(bare, 2),
        "bare_loops_s": [round(loop.seconds, 2) for loop in loops],
        "trials": num_trials,
        "at_once": at_once,
        "steps": steps,
        "cpu_efficiency": round(num_trials * statistics.mean(loop.cpu_s for loop in loops) / sum(cpu.values()), 4),
        "places_s": {name: round(value, 2) for name, value in breakdown(spans, began, ended, at_once).items()},
        "cpu_s": {name: round(value, 2) for name, value in sorted(cpu.items())},
    }
    _print(result)
    return result


def _print(result: dict[str, Any]) -> None:
    whole = result["wall_s"] * result["at_once"]
    print(f"\n{result['trials']} trials of {result['steps']} steps, {result['at_once']} at once")
    print(f"bare loops {', '.join(map(str, result['bare_loops_s']))} s; sweep {result['wall_s']} s")
    print(f"\nwhere {whole:.1f} s of {result['at_once']} places went")
    for name, value in result["places_s"].items():
        print(f"  {name:<42} {value:8.1f} s {100 * value / whole:6.1f} %")
    print(f"  {'(the bare loops took)':<42} {result['bare_s']:8.1f} s {100 * result['bare_s'] / whole:6.1f} %")
    total = sum(result["cpu_s"].values())
    print(f"\nCPU time of the sweep, {total:.1f} s")
    for name, value in result["cpu_s"].items():
        print(f"  {name:<42} {value:8.1f} s {100 * value / total:6.1f} %")
    print(f"\nCPU time of the bare loops / of the sweep {result['cpu_efficiency']:.3f}")
    print(f"efficiency {result['efficiency']:.3f}")


if __name__ == "__main__":
    main()
