"""What a comparison needs of a trial, read from its record on disk or from MLflow. Imports neither ray nor torch."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from dino_core.config import ConfigError
from dino_core.diagnosis import Diagnosis, Verdict, diagnose
from orchestrator import records, tracking
from orchestrator.config import RunConfig
from orchestrator.lineage import newest_segments
from orchestrator.overrides import config_keys, override

Curve = list[tuple[int, float]]
Mode = Literal["max", "min"]

SEED_KEY = "pretrain.seed"
PROTOTYPES_KEY = "pretrain.head.num_prototypes"
ENTROPY = "train/teacher_entropy"
_PRETRAIN = "pretrain."


class CompareError(ValueError):
    """Nothing to compare: no such experiment, folder, or trial."""


@dataclass(frozen=True)
class Pictures:
    """What a run drew at one of its evaluations."""

    step: int
    files: dict[str, bytes]
    """PNG files by their names without the ending: `attention`, `crops`, `features`."""


PICTURES_DIR = "pictures"
_PNG = b"\x89PNG\r\n\x1a\n"


def png_files(folder: Path) -> dict[str, bytes]:
    """The PNG files in a folder, by name without the ending; what only calls itself so is left out."""
    files = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    return {name: content for name, content in files.items() if content.startswith(_PNG)}


def picture_step(name: str) -> int:
    """The step in the name of a folder of pictures (`step_00000500`); -1 for other names."""
    number = name.removeprefix("step_")
    return int(number) if number != name and number.isdigit() else -1


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
    """Why it failed, was stopped or was interrupted, where that is known."""
    experiment: str = ""
    """The MLflow experiment that it belongs to."""
    sweep: str = ""
    """The sweep that it is a trial of; empty outside one."""
    git_commit: str | None = None
    """The commit that it ran, with `-dirty` behind it if files differed."""
    data_digest: str | None = None
    """Digest of the images that it was trained on."""
    uri: str = ""
    """Where the record is: a folder, or the tracking server; for a server with pages, that of the run."""
    record_name: str = ""
    """A name that is the same on disk and in MLflow, by which a run that was asked for twice is known."""
    definition: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    """That of its sweep (`sweep.json`), the same object for all its trials; None outside a sweep."""
    load_pictures: Callable[[], Pictures | None] | None = field(default=None, repr=False, compare=False)
    segment: records.Segment | None = None
    """Of a trial in population-based training: which part of a run it is."""
    lineage: tuple[TrialSummary, ...] = field(default=(), repr=False, compare=False)
    """The segments before it that its weights went through, oldest first; `curves` are then those of all of them."""

    @cached_property
    def pictures(self) -> Pictures | None:
        """Its newest pictures, read when they are first asked for; None where there are none."""
        return self.load_pictures() if self.load_pictures is not None else None

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


def load_trials(names: Iterable[str], *, storage: str = "./runs", uri: str | None = None) -> list[TrialSummary]:
    """The trials of experiments, sweeps and runs, in the order given; one that is named twice comes once.

    Args:
        names: Each the path of a folder of a run or sweep, the name of one in `storage`, or in MLflow the name of an
            experiment (all its sweeps and runs), the id of a run, or the name of a run or sweep; looked for in this
            order.
        storage: `cluster.storage`.
        uri: Of the tracking server; None is `tracking.Target`'s default.

    Raises:
        CompareError: There is none of that name (naming the nearest), or it cannot be read or holds no run.
    """
    found: dict[str, TrialSummary] = {}
    for name in names:
        folder = next((path for path in (Path(name), Path(storage) / name) if path.is_dir()), None)
        for trial in load_from_disk(folder) if folder is not None else load_from_mlflow(name, uri):
            found.setdefault(trial.record_name or trial.run_id, trial)
    return list(found.values())


def load_from_mlflow(name: str, uri: str | None = None) -> list[TrialSummary]:
    """The trials of an MLflow experiment, or of a run or sweep by its id or name. Raises CompareError."""
    from orchestrator.mlflow_trials import read_trials

    return read_trials(name, uri)


def common_definition(trials: Iterable[TrialSummary]) -> Mapping[str, Any] | None:
    """What the sweeps of the trials say together: the metric and mode on which they agree, and the base that is the
    same in all; None for trials of no sweep, or of several that are ranked by different metrics."""
    found = list({id(trial.definition): trial.definition for trial in trials if trial.definition is not None}.values())
    if not found or len({(each.get("metric"), each.get("mode")) for each in found}) > 1:
        return None
    first = found[0]
    return (
        first
        if len(found) == 1
        else {key: first[key] for key in first if all(key in each and each[key] == first[key] for each in found)}
    )


def check_metric(metric: str, trials: Sequence[TrialSummary]) -> None:
    """Raise CompareError, naming the nearest, if no trial logged the metric."""
    logged = sorted({name for trial in trials for name in trial.curves})
    if metric not in logged:
        near = difflib.get_close_matches(metric, logged, n=3) or logged[:10]
        there = f"; there is {', '.join(near)}" if near else "; nothing was logged"
        raise CompareError(f"--metric {metric}: no trial logged it{there}")


def load_from_disk(folder: Path | str) -> list[TrialSummary]:
    """The trials of a sweep's folder, the one run of a run's folder, or all runs of a folder that holds some. Of a
    population each member's newest segment, with its lineage.

    Raises CompareError, naming the folder, if there is no record of a run.
    """
    folder = Path(folder)
    if (folder / records.RUN_FILE).is_file():
        # A sweep's trial has no ledger of its own.
        sweep = folder.parent.parent if folder.parent.name == records.TRIALS_DIR else folder
        return [_read_run(folder, records.read_states(sweep), _definition_of(sweep))]
    if (folder / records.SWEEP_FILE).is_file():
        states, definition = records.read_states(folder), _definition_of(folder)
        runs = _run_dirs(folder / records.TRIALS_DIR, folder)
        return newest_segments(_read_run(run, states, definition) for run in runs)
    return [_read_run(run, records.read_states(run)) for run in _run_dirs(folder, folder)]


def _definition_of(folder: Path) -> dict[str, Any] | None:
    """The definition of a sweep, of its folder; None of the folder of a lone run."""
    path = folder / records.SWEEP_FILE
    return records.read_json(path) if path.is_file() else None


def _run_dirs(parent: Path, asked: Path) -> list[Path]:
    found = sorted(path.parent for path in parent.glob(f"*/{records.RUN_FILE}"))
    if not found:
        reason = "holds no record of a run" if asked.is_dir() else "no such folder"
        raise CompareError(f"{asked}: {reason}")
    return found


def _read_run(
    run_dir: Path, states: dict[str, records.RunState], definition: Mapping[str, Any] | None = None
) -> TrialSummary:
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
        curves=_curves(run_dir, state),
        reason=state.reason if state else "",
        experiment=record.experiment,
        sweep=record.sweep or "",
        git_commit=record.git_commit,
        data_digest=record.data_digest,
        uri=str(run_dir.resolve()),
        record_name=tracking.unique_name(run_dir.resolve()),
        definition=definition,
        load_pictures=partial(_pictures_on_disk, run_dir),
        segment=record.segment,
    )


def _curves(run_dir: Path, state: records.RunState | None) -> dict[str, Curve]:
    """The journal's, those of evaluations, and the figures of the run's end as MLflow has them, at step 0."""
    ended = {name: [(0, value)] for name, value in (state.numbers if state else {}).items()}
    return records.read_curves(run_dir) | records.read_evaluations(run_dir) | ended


def _pictures_on_disk(run_dir: Path) -> Pictures | None:
    folders = sorted((run_dir / PICTURES_DIR).glob("step_*"), key=lambda path: picture_step(path.name), reverse=True)
    return next((Pictures(picture_step(path.name), files) for path in folders if (files := png_files(path))), None)


def _status(state: records.RunState | None) -> str:
    if state is None:
        return "not started"
    return "running" if state.event == "started" else state.event
