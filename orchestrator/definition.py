"""A sweep's definition on disk, and the sweep again from it, by which a resumed search goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.designs import alias_structure
from orchestrator.factorial import Factorial
from orchestrator.metric_choice import MetricChoice
from orchestrator.overrides import flatten, override
from orchestrator.pairing import describe_pairing, pairing, varied_keys
from orchestrator.runs import Trial, with_absolute_paths
from orchestrator.search import objectives_of
from orchestrator.space import to_json
from orchestrator.sweep import CheckedSweep, Sweep, short_names

_NOT_STORED = frozenset({"base", "rows", "changes", "name", "space"})
_SHARED = ("cluster.", "tracking.")
_PATHS = ("data.source", "data.root")


def design_definition(checked: CheckedSweep, trials: Sequence[Trial], choice: MetricChoice) -> dict[str, Any]:
    """The part of `sweep.json` that says which configurations the sweep tries, and how far its trials are pairs."""
    sweep, factorial = checked.sweep, checked.factorial
    keys = [*checked.space.values, *(key for key in varied_keys(trials) if key not in checked.space.values)]
    absolute = flatten(with_absolute_paths(trials[0].config))
    return {
        "space": {key: to_json(values) for key, values in checked.space.values.items()},
        "conditions": {key: dict(deciders) for key, deciders in checked.space.conditions.items()},
        "design": sweep.design,
        "num_trials": sweep.num_trials,
        "num_startup_trials": sweep.num_startup_trials,
        "design_seed": sweep.design_seed,
        "resolution": sweep.resolution,
        "interactions": [list(pair) for pair in sweep.interactions],
        "objectives": objectives_of(sweep.objectives, choice) if sweep.design == "optuna" else {},
        "generation_steps": sweep.generation_steps,
        "exploit_quantile": sweep.exploit_quantile,
        "resample_prob": sweep.resample_prob,
        "factorial": alias_structure(factorial, list(checked.space.values)) if factorial else None,
        "paired": pairing(keys),
        "base": flatten(with_absolute_paths(checked.base)),
        "changes": {key: absolute[key] if key in _PATHS else checked.shared[key] for key in sweep.changes},
    }


def sweep_of(definition: Mapping[str, Any], config: Mapping[str, Any]) -> Sweep:
    """The sweep that `sweep.json` defines, on the cluster and with the tracking of one of its records.

    Raises ConfigError if the definition is damaged or of another version.
    """
    fields = {item.name for item in dataclasses.fields(Sweep)} - _NOT_STORED
    shared = {key: value for key, value in config.items() if key.startswith(_SHARED)}
    own = {name: value for name, value in definition.items() if name in fields}
    return Sweep(
        base=override(RunConfig(), definition["base"]),
        name=definition["sweep"],
        space=definition["space"],
        changes={**definition["changes"], **shared},
        **own,
    )


def design_lines(checked: CheckedSweep, trials: Sequence[Trial], choice: MetricChoice) -> dict[str, str]:
    """What a dry run says about the design: titles and texts."""
    sweep = checked.sweep
    lines: dict[str, str] = {"design": sweep.design}
    if sweep.design in ("random", "qmc"):
        lines["design"] += f": {sweep.num_trials} configurations, drawn with sweep.design_seed = {sweep.design_seed}"
    if sweep.design == "optuna":
        objectives = objectives_of(sweep.objectives, choice)
        goals = ", ".join(f"{metric} {mode}" for metric, mode in objectives.items())
        lines["design"] += f": {sweep.num_trials} configurations by {goals}; those above come first"
    if checked.factorial is not None:
        lines |= _factorial_lines(checked.factorial, list(short_names(list(checked.space.values)).values()))
    return lines | {"pairing": describe_pairing(varied_keys(trials))}


def _factorial_lines(factorial: Factorial, names: Sequence[str]) -> dict[str, str]:
    structure = alias_structure(factorial, names)
    made = ", ".join(f"{name} = {basic}" for name, basic in structure["generators"].items())
    size = f"{factorial.num_runs} of {2 ** len(names)} combinations, resolution {factorial.resolution}"
    return {
        "design": f"fractional_factorial: {size}" + (f" ({made})" if made else ""),
        "aliased": "; ".join(" = ".join(group) for group in structure["aliases"]) or "no effects of one or two keys",
    }
