"""What a comparison needs of a trial, read from its record on disk or from MLflow. Imports neither ray nor torch."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dino_core.config import ConfigError
from dino_core.diagnosis import Diagnosis, Verdict, diagnose
from orchestrator import records, tracking
from orchestrator.config import RunConfig, TrackingConfig
from orchestrator.overrides import config_keys, override

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Curve = list[tuple[int, float]]
Mode = Literal["max", "min"]

SEED_KEY = "pretrain.seed"
PROTOTYPES_KEY = "pretrain.head.num_prototypes"
ENTROPY = "train/teacher_entropy"
_PRETRAIN = "pretrain."

_STATUS_OF_MLFLOW = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted", "RUNNING": "running"}
_SYSTEM = "system/"
_MLFLOW_INFINITY = 1.7976931348623157e308  # what MLflow stores in place of infinity


class CompareError(ValueError):
    """Nothing to compare: no such experiment, folder, or trial."""


@dataclass(frozen=True)
class TrialSummary:
    """One trial as its record tells it."""

    run_id: str
    name: str
    status: str
    """running | finished | stopped | failed | interrupted | not started"""
    params: dict[str, str] = field(default_factory=dict)
    """The complete configuration as text, by dotted key; what was computed from it under `derived/`; the paper's
    numbers under `paper/`; `row` and `method` of a sweep's trial."""
    seed: int | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    """(step, value) pairs of each metric, by step."""
    reason: str = ""
    """Why it failed or was interrupted, where that is known."""

    @property
    def row(self) -> str | None:
        """The sweep's row that the trial belongs to."""
        return self.params.get("row")

    @property
    def paper(self) -> dict[str, float]:
        """The paper's numbers for this trial, by metric."""
        numbers = {key.removeprefix("paper/"): value for key, value in self.params.items() if key.startswith("paper/")}
        return {metric: float(value) for metric, value in numbers.items() if metric != "setting"}

    @property
    def paper_setting(self) -> str:
        """What those numbers were measured with; empty where there are none."""
        return self.params.get("paper/setting", "")

    def last(self, metric: str) -> float | None:
        """The metric's newest value, or None if it was never logged."""
        curve = self.curves.get(metric)
        return curve[-1][1] if curve else None

    def best(self, metric: str, mode: Mode = "max") -> float | None:
        """The metric's best finite value, or None if it has none."""
        values = [value for _, value in self.curves.get(metric, []) if math.isfinite(value)]
        return (max if mode == "max" else min)(values, default=None)

    def at(self, metric: str, step: int) -> float | None:
        """The metric's value at one step, or None."""
        return dict(self.curves.get(metric, [])).get(step)

    @property
    def last_step(self) -> int | None:
        return max((curve[-1][0] for curve in self.curves.values() if curve), default=None)

    @property
    def entropy_shares(self) -> Curve:
        """The teacher's entropy as a share of ln K; empty for a loss without prototypes."""
        prototypes = self.params.get(PROTOTYPES_KEY, "None")
        if prototypes.casefold() == "none":
            return []
        return [(step, value / math.log(int(prototypes))) for step, value in self.curves.get(ENTROPY, [])]

    @property
    def entropy_share(self) -> float | None:
        """The newest of `entropy_shares`: 1 is uniform, 0 is one prototype for each image."""
        shares = self.entropy_shares
        return shares[-1][1] if shares else None

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Whether it learned or collapsed, since when, and the likely cause."""
        known = {key: value for key, value in self.params.items() if key in config_keys() and key.startswith(_PRETRAIN)}
        try:
            config = override(RunConfig(), known).pretrain
        except ConfigError as error:
            return Diagnosis("unknown", evidence=(f"its configuration is of another version: {error}",))
        return diagnose(self.curves, config, reason=self.reason)

    @property
    def health(self) -> Verdict:
        return self.diagnosis.verdict

    @property
    def images_per_s(self) -> float | None:
        """Median over the run: the first steps and evaluations do not count for more than they are."""
        values = [value for _, value in self.curves.get("train/images_per_s", []) if math.isfinite(value)]
        return statistics.median(values) if values else None


def load_from_disk(folder: Path | str) -> list[TrialSummary]:
    """The trials of a sweep's folder, the one run of a run's folder, or all runs of a folder that holds some.

    Raises CompareError, naming the folder, if there is no record of a run.
    """
    folder = Path(folder)
    if (folder / records.RUN_FILE).is_file():
        return [_read_run(folder, records.read_states(folder))]
    if (folder / records.SWEEP_FILE).is_file():
        states = records.read_states(folder)
        return [_read_run(run, states) for run in _run_dirs(folder / records.TRIALS_DIR, folder)]
    return [_read_run(run, records.read_states(run)) for run in _run_dirs(folder, folder)]


def _run_dirs(parent: Path, asked: Path) -> list[Path]:
    found = sorted(path.parent for path in parent.glob(f"*/{records.RUN_FILE}"))
    if not found:
        reason = "holds no record of a run" if asked.is_dir() else "no such folder"
        raise CompareError(f"{asked}: {reason}")
    return found


def _read_run(run_dir: Path, states: dict[str, records.RunState]) -> TrialSummary:
    record = records.RunRecord.read(run_dir)
    state = states.get(record.run_id)
    params = {key: str(value) for key, value in record.config.items()}
    params |= {key: str(value) for key, value in record.labels.items()}
    params |= {f"derived/{key}": str(value) for key, value in record.derived.items()}
    return TrialSummary(
        run_id=record.run_id,
        name=run_dir.name,
        status=_status(state),
        params=params,
        seed=record.seed,
        curves=records.read_curves(run_dir),
        reason=state.reason if state else "",
    )


def _status(state: records.RunState | None) -> str:
    if state is None:
        return "not started"
    return "running" if state.event == "started" else state.event


def load_from_mlflow(experiment: str, uri: str | None = None) -> list[TrialSummary]:
    """The runs of an MLflow experiment, without the parent runs of its sweeps.

    `uri` None is `tracking.Target`'s default. Raises CompareError if the store or the experiment does not exist (naming
    the nearest), cannot be read, or holds no run.
    """
    target = tracking.Target.of(TrackingConfig(uri=uri))
    if target.uri.startswith("sqlite:///") and not Path(target.uri.removeprefix("sqlite:///")).is_file():
        raise CompareError(
            f"{experiment}: no such folder of a run or sweep, and no MLflow store at {target.shown} yet; "
            "the first run creates it"
        )
    from mlflow.exceptions import MlflowException

    try:
        client = tracking.connect(target)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise CompareError(_unknown_experiment(client, experiment))
        runs = list(_search_runs(client, found.experiment_id))
        parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
        trials = [_read_mlflow_run(client, run) for run in runs if not _is_parent(run, parents)]
    except MlflowException as error:
        raise CompareError(f"cannot read experiment {experiment!r} from {target.shown}: {error.message}") from error
    if not trials:
        raise CompareError(f"experiment {experiment!r} has no runs yet")
    return trials


def _is_parent(run: Run, parents: set[str | None]) -> bool:
    # A sweep that has no trial yet is known by its tag.
    return run.info.run_id in parents or run.data.tags.get("kind") == "sweep"


def _unknown_experiment(client: MlflowClient, name: str) -> str:
    names = [experiment.name for experiment in client.search_experiments()]
    near = difflib.get_close_matches(name, names, n=3) or sorted(names)[:10]
    return f"no experiment {name!r}; " + (f"there is {', '.join(map(repr, near))}" if near else "there is none yet")


def _search_runs(client: MlflowClient, experiment_id: str) -> Iterator[Run]:
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _read_mlflow_run(client: MlflowClient, run: Run) -> TrialSummary:
    params = dict(run.data.params)
    curves = {}
    for metric in run.data.metrics:
        if metric.startswith(_SYSTEM):  # of the machine, and by the clock rather than by steps
            continue
        points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, metric)}
        curves[metric] = sorted(
            (step, math.copysign(math.inf, value) if abs(value) >= _MLFLOW_INFINITY else value)
            for step, value in points.items()
        )
    seed = params.get(SEED_KEY)
    status = _STATUS_OF_MLFLOW.get(run.info.status, "not started")
    if status == "finished" and run.data.tags.get("ended") == "stopped":
        status = "stopped"
    return TrialSummary(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=status,
        params=params,
        seed=int(seed) if seed is not None else None,
        curves=curves,
        reason=run.data.tags.get("reason", "") if status not in ("finished", "running") else "",
    )
