"""The table of what a run or the trials of a sweep cost, for `--dry-run`: images, arithmetic, memory, hours."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dino_core.stages import stages_of
from orchestrator.calibrate import calibrate, check_can_calibrate
from orchestrator.config import DataConfig, RunConfig
from orchestrator.cost import StepCost, cost_key, measure
from orchestrator.data.split import Source
from orchestrator.estimate import (
    Amount,
    Rate,
    assumed_rate,
    device_word,
    run_seconds,
    wall_seconds,
    what_does_not_fit,
)
from orchestrator.gpus import ASSUMED_SHARE, GPUS, SHOWN, Gpu, gpu_called, gpu_here

MAX_KINDS = 40
"""Kinds of trial that are counted, at one or two seconds each; of more, so many spread evenly stand for all."""
MAX_CALIBRATED = 8
"""Kinds that are measured; the others are scaled by their arithmetic from the nearest of these."""
_MAX_ROWS = 40


@dataclass(frozen=True)
class Kind:
    """Runs that cost the same from beginning to end."""

    name: str
    """Of the first of them."""
    config: RunConfig
    amount: Amount
    cost: StepCost
    num_runs: int
    rate: Rate | None = None
    measured: bool = False


@dataclass(frozen=True)
class CostTable:
    """What some runs cost, by kind."""

    kinds: tuple[Kind, ...]
    order: tuple[int, ...]
    """The kind of each run that was counted, in the order in which they start. Each stage is one of its own."""
    num_runs: int
    """All runs, of which those in `order` were counted; a run of several stages counts as that many."""
    num_kinds: int
    gpu: Gpu | None
    """What `Kind.rate` is about, where that was assumed."""
    num_folders: int
    """Runs, whatever their stages: each keeps its checkpoints."""

    @classmethod
    def of(
        cls,
        runs: Sequence[tuple[str, RunConfig, int]],
        sources: Mapping[DataConfig, Source],
        *,
        measure_steps: bool = False,
        write: Callable[[str], None] = print,
    ) -> CostTable:
        """Count (name, configuration, steps) of all runs, each of their stages for itself; `measure_steps` also takes a
        few steps of each kind here.

        Raises:
            ConfigError: A model cannot be built, or the runs cannot be measured here.
        """
        if measure_steps:
            check_can_calibrate(runs[0][1])
        num_folders = len(runs)
        parts = [part for run in runs for part in _stages(*run, sources)]
        places: dict[tuple[object, ...], list[int]] = {}
        for place, (_, config, stage) in enumerate(parts):
            key = (*cost_key(config), config.data, config.pretrain.eval, stage)
            places.setdefault(key, []).append(place)
        groups = _spread(list(places.values()), MAX_KINDS)
        costs: dict[tuple[object, ...], StepCost] = {}
        kinds = []
        for group in groups:
            name, config, (start, stop, ends) = parts[group[0]]
            key = cost_key(config)
            if key not in costs:
                costs[key] = measure(config)
            amount = Amount.of(config, sources[config.data], stop - start, costs[key], start=start, ends=ends)
            kinds.append(Kind(name, config, amount, costs[key], len(group)))
        kind_of = {place: index for index, group in enumerate(groups) for place in group}
        order = tuple(kind_of[place] for place in sorted(kind_of))
        gpu = None
        if measure_steps:
            kinds = _measured(kinds, sources, write)
        elif runs[0][1].cluster.use_gpu and (gpu := gpu_called(gpu_here() or "")) is not None:
            kinds = [replace(kind, rate=assumed_rate(kind.config, kind.cost, gpu)) for kind in kinds]
        return cls(tuple(kinds), order, len(parts), len(places), gpu, num_folders)

    @property
    def largest(self) -> Kind:
        """The kind whose step needs most memory."""
        return max(self.kinds, key=lambda kind: kind.cost.total)

    @property
    def config(self) -> RunConfig:
        """Of any run; all share the `cluster` part."""
        return self.kinds[0].config

    @property
    def _scale(self) -> float:
        """All runs for each that was counted."""
        return self.num_runs / len(self.order)

    def seconds(self, kind: Kind, at_once: int, *, here: bool = True) -> float | None:
        if kind.rate is None:
            return None
        cores = len(os.sched_getaffinity(0)) if here else None
        return run_seconds(kind.config, kind.amount, kind.rate, at_once, cores)

    def device_hours(self, at_once: int, *, here: bool = True) -> float | None:
        """Of all runs together."""
        seconds = [self.seconds(kind, at_once, here=here) for kind in self.kinds]
        total = 0.0
        for kind, each in zip(self.kinds, seconds, strict=True):
            if each is None:
                return None
            total += kind.num_runs * each * kind.config.cluster.num_devices / 3600
        return total * self._scale

    def rows(self, at_once: int, *, here: bool) -> list[list[str]]:
        """A header and a row for each kind."""
        word = device_word(self.config)
        timed = self.kinds[0].rate is not None
        header = ["trial", "trials", "steps", "images", "GFLOP/image", "TFLOP", "memory"]
        rows = [[*header, f"{word}-hours", "by"] if timed else header]
        for kind in self.kinds[:_MAX_ROWS]:
            amount, cost = kind.amount, kind.cost
            row = [kind.name, str(kind.num_runs), f"{amount.steps:,}", f"{amount.images:,}"]
            row += [f"{cost.flops.total / 1e9:,.4g}", f"{amount.flops / 1e12:,.4g}", bytes_in_words(cost.total)]
            seconds = self.seconds(kind, at_once, here=here)
            if seconds is not None:
                hours = seconds * kind.config.cluster.num_devices / 3600
                row += [f"{hours:,.3g}", "measured" if kind.measured else "scaled" if self.gpu is None else "assumed"]
            rows.append(row)
        return rows

    def lines(self, at_once: int, *, here: bool, expected: float = 1.0, stops: bool = False) -> dict[str, str]:
        """What all runs cost together.

        Args:
            at_once: How many run at once.
            here: Whether this machine is what they share.
            expected: Share of the steps that are taken on average where some runs are stopped early.
            stops: Whether some are, however many.
        """
        flops = self._scale * sum(kind.num_runs * kind.amount.flops for kind in self.kinds)
        images = self._scale * sum(kind.num_runs * kind.amount.images for kind in self.kinds)
        evaluated = self._scale * sum(kind.num_runs * kind.amount.evaluated for kind in self.kinds)
        bound = "at most " if stops or expected < 1 else ""
        lines = {"arithmetic": f"{bound}{flops_in_words(flops)}: {images:,.0f} images of training"}
        lines["arithmetic"] += f", {evaluated:,.0f} of evaluations" if evaluated else ""
        word = device_word(self.config)
        hours = self.device_hours(at_once, here=here)
        if hours is None:
            lines |= self._hours_elsewhere()
        else:
            lines[f"{word}-hours"] = f"{bound}{hours:,.3g}, {self._source()}"
            if self.num_folders > 1 or at_once > 1:
                wall = self._wall_hours(at_once, here=here)
                lines["wall time"] = f"{bound}{hours_in_words(wall)} with {number_of(at_once, 'trial')} at once"
            else:
                lines["wall time"] = hours_in_words(hours / self.config.cluster.num_devices)
        if expected < 1:
            lines["expected"] = f"about {100 * expected:.0f} % of that, as trials are stopped early"
        if len(self.kinds) < self.num_kinds:
            lines["counted"] = f"{len(self.kinds)} of {self.num_kinds} kinds of trial, spread evenly, stand for all"
        waiting = [kind for kind in self.kinds if kind.rate and _waits_for_data(kind.config, kind.rate)]
        if waiting:
            kind = waiting[0]
            lines["data"] = f"{kind.name}: {_data_in_words(kind)}"
        return lines

    def problems(self, at_once: int, *, here: bool, folders: int = 1) -> list[str]:
        """What will not fit; `folders` with checkpoints are kept of each run."""
        memory = None
        if self.config.cluster.use_gpu:
            memory = _memory_of_visible_gpu() if here else None
        runs = {kind.name: (kind.config, kind.cost, kind.rate.peak_bytes if kind.rate else None) for kind in self.kinds}
        found = what_does_not_fit(runs, at_once, memory, on_this_machine=here, num_trials=folders * self.num_folders)
        if self.config.cluster.use_gpu and memory is None:
            small = [gpu.name for gpu in GPUS if gpu.memory_gb * 1e9 < self.largest.cost.total]
            if small:
                found.append(
                    f"{self.largest.name}: a step takes up to {bytes_in_words(self.largest.cost.total)}, more than the "
                    f"memory of {', '.join(small)}"
                )
        return found

    def _wall_hours(self, at_once: int, *, here: bool) -> float:
        seconds = [self.seconds(self.kinds[index], at_once, here=here) or 0.0 for index in self.order]
        return self._scale * wall_seconds(seconds, at_once) / 3600

    def _source(self) -> str:
        if self.gpu is not None:
            precision = self.config.pretrain.precision
            share = 100 * ASSUMED_SHARE[precision]
            return (
                f"assumed: {share:.0f} % of the {self.gpu.peak(precision):g} TFLOP/s that are published for "
                f"{self.gpu.name}; --calibrate measures it"
            )
        scaled = sum(not kind.measured for kind in self.kinds)
        measured = f"measured here on {number_of(len(self.kinds) - scaled, 'kind')} of run"
        return f"{measured}, scaled to {scaled} more by their arithmetic" if scaled else measured

    def _hours_elsewhere(self) -> dict[str, str]:
        precision = self.config.pretrain.precision
        found = []
        for gpu in GPUS:
            rates = [assumed_rate(kind.config, kind.cost, gpu) for kind in self.kinds]
            if gpu.name in SHOWN and all(rates):
                known = replace(self, kinds=tuple(replace(k, rate=r) for k, r in zip(self.kinds, rates, strict=True)))
                on_gpus = [
                    k.num_runs * (known.seconds(k, 1, here=False) or 0) * k.config.cluster.num_workers
                    for k in known.kinds
                ]
                found.append(f"{gpu.name} {self._scale * sum(on_gpus) / 3600:,.2g}")
        share = f"{100 * ASSUMED_SHARE[precision]:.0f} % of their published {precision} peaks"
        lines = {"GPU-hours": f"{', '.join(found)}, assumed: {share}"}
        if not self.config.cluster.use_gpu:
            lines["core-hours"] = "not known before they are measured: --calibrate takes a few steps here"
            lines["GPU-hours"] = f"if it ran on GPUs: {lines['GPU-hours']}"
        return lines


def _stages(
    name: str, config: RunConfig, steps: int, sources: Mapping[DataConfig, Source]
) -> list[tuple[str, RunConfig, tuple[int, int, bool]]]:
    """A run, or each of its stages: name, configuration, first step, the step behind its last, whether the run ends."""
    if not config.pretrain.stages:
        return [(name, config, (0, steps, True))]
    stages = stages_of(config.pretrain, sources[config.data].num_samples)
    return [
        (
            f"{name}, stage {stage.index + 1}",
            replace(config, pretrain=stage.config),
            (stage.start, stage.stop, stage.stop == steps),
        )
        for stage in stages
    ]


def _spread(groups: list[list[int]], most: int) -> list[list[int]]:
    """At most so many of them, evenly spread."""
    if len(groups) <= most:
        return groups
    return [groups[round(place * (len(groups) - 1) / (most - 1))] for place in range(most)]


def _measured(kinds: Sequence[Kind], sources: Mapping[DataConfig, Source], write: Callable[[str], None]) -> list[Kind]:
    """The kinds with their rates: measured for up to `MAX_CALIBRATED` different steps, scaled for the rest."""
    keys = list(dict.fromkeys(cost_key(kind.config) for kind in kinds))
    first = {key: next(kind for kind in kinds if cost_key(kind.config) == key) for key in keys}
    by_work = sorted(first.values(), key=_work)
    chosen = [by_work[place] for (place,) in _spread([[place] for place in range(len(by_work))], MAX_CALIBRATED)]
    rates: dict[tuple[object, ...], tuple[Rate, float]] = {}
    for kind in chosen:
        write(f"measuring a few steps of {kind.name} ...")
        rates[cost_key(kind.config)] = (calibrate(kind.config, sources[kind.config.data]), _work(kind))
    found = []
    for kind in kinds:
        key = cost_key(kind.config)
        if key in rates:
            found.append(replace(kind, rate=rates[key][0], measured=True))
            continue
        rate, work = min(rates.values(), key=lambda other, of=kind: abs(other[1] - _work(of)))  # type: ignore[misc]
        ratio = _work(kind) / work
        scaled = Rate(rate.step_s * ratio, rate.batch_cpu_s * ratio, rate.eval_s)
        found.append(replace(kind, rate=scaled))
    write("")
    return found


def _work(kind: Kind) -> float:
    """Operations of one worker's step."""
    return kind.cost.flops.total * kind.config.pretrain.batch_size / kind.config.cluster.num_workers


def _waits_for_data(config: RunConfig, rate: Rate) -> bool:
    return rate.batch_cpu_s > rate.step_s * max(1, config.cluster.data_cpus // config.cluster.num_workers)


def _data_in_words(kind: Kind) -> str:
    assert kind.rate is not None
    workers = kind.config.cluster.num_workers
    needed = -(-kind.rate.batch_cpu_s // kind.rate.step_s) * workers
    return (
        f"a batch takes {1000 * kind.rate.batch_cpu_s:,.0f} ms of CPU and a step {1000 * kind.rate.step_s:,.0f} ms, so "
        f"the steps wait for data; cluster.data_cpus = {needed:.0f} would keep up"
    )


def _memory_of_visible_gpu() -> float | None:
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def number_of(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def bytes_in_words(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def flops_in_words(number: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if number >= size:
            return f"{number / size:,.4g} {unit}"
    return f"{number / 1e9:,.4g} GFLOP"


def hours_in_words(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} h" if hours >= 2 else f"{60 * hours:.1f} min" if hours >= 1 / 30 else f"{3600 * hours:.1f} s"
