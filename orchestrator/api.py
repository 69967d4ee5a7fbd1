"""For notebooks and scripts: what the commands `sweep`, `pretrain`, `evaluate` and `compare` do, as functions.

    from orchestrator.api import Sweep, compare, run_sweep

    result = run_sweep(Sweep(base="quickstart", space={"pretrain.teacher.temp": [0.04, 0.07]}, seeds=3))
    compare(result).configurations_frame()

`docs/notebook.py` goes through it. Neither torch nor Ray is imported before something runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.catalog import load_recipe
from orchestrator.compare import Comparison
from orchestrator.compare import compare as compare_trials
from orchestrator.config import RunConfig
from orchestrator.evaluate.driver import evaluate
from orchestrator.metric_choice import choice_for_trials, resolve_metric
from orchestrator.overrides import flatten, override
from orchestrator.pretrain import PretrainResult, pretrain, resume
from orchestrator.report import write_report
from orchestrator.run_sweep import SweepResult, resume_sweep, run_sweep
from orchestrator.sweep import Row, Sweep, expand
from orchestrator.sweep_file import load_sweep
from orchestrator.trials import Mode, check_metric, common_definition, load_trials

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "Comparison",
    "PretrainResult",
    "Row",
    "RunConfig",
    "Sweep",
    "SweepResult",
    "compare",
    "curves",
    "evaluate",
    "expand",
    "flatten",
    "load_recipe",
    "load_sweep",
    "override",
    "pretrain",
    "resume",
    "resume_sweep",
    "run_sweep",
    "write_report",
]


def compare(
    *experiments: str | Path | SweepResult | PretrainResult,
    metric: str | None = None,
    mode: Mode | None = None,
    reference: str | None = None,
    storage: str = "./runs",
    uri: str | None = None,
) -> Comparison:
    """Rank the trials of sweeps and runs, and compare configurations over the seeds that they share.

    Args:
        experiments: Results of `run_sweep` and `pretrain`, names of sweeps and runs in `storage`, paths of their
            folders, MLflow experiments, or ids of MLflow runs.
        metric: What to rank by; None takes what the sweep was defined with, else k-NN accuracy where it was measured,
            else a score without labels.
        mode: Whether a larger (`max`) or a smaller (`min`) value is better; None as the metric says.
        reference: The configuration, row or trial that others are compared with, or `best`; None as
            `orchestrator.compare.compare` chooses.
        storage: Folder of runs and sweeps (`cluster.storage`).
        uri: MLflow's store (`tracking.uri`); asked for what is no folder.

    Raises:
        CompareError: There is no such experiment, trial, metric or reference; names the nearest.
    """
    names = [str(given.folder if isinstance(given, SweepResult | PretrainResult) else given) for given in experiments]
    trials = load_trials(names, storage=storage, uri=uri)
    definition = common_definition(trials)
    choice = choice_for_trials(trials, definition)
    if metric is not None:
        check_metric(metric, trials)
        choice = resolve_metric(metric, mode, has_labels=True)
    base = (definition or {}).get("base")
    return compare_trials(trials, choice.metric, mode or choice.mode, reference=reference, base=base, why=choice.why)


def curves(comparison: Comparison, metrics: Sequence[str] | None = None) -> DataFrame:
    """What the trials logged, a row per point: `trial`, `metric`, `step`, `value`; for pandas, seaborn or plotly.

    Args:
        metrics: Those to take, in this order; None takes all.
    """
    from pandas import DataFrame

    found = []
    for row in comparison.rows:
        logged = row.trial.curves
        for metric in logged if metrics is None else metrics:
            found += [(row.trial.name, metric, step, value) for step, value in logged.get(metric, [])]
    return DataFrame(found, columns=["trial", "metric", "step", "value"])
