"""What a run leaves on disk, and nothing else: the truth from which MLflow, reports and resumes are made.

::

    <storage>/<run>/                 one run                <storage>/<sweep>/         one sweep
        run.json      what it is (RunRecord)                    sweep.json     what it is
        metrics.jsonl the journal of its metrics                ledger.jsonl   what became of its trials
        ledger.jsonl  what became of it                         report.html
        system.jsonl  its machine, by the clock                 comparison.md, comparison.csv, summary.json
        environment.json  what it trains with                   trials/<trial>/   one run each, no ledger of its own
        pictures/step_00000200/*.png
        checkpoints/step_00000200/
        evaluations/  metrics.jsonl and a folder of each result (orchestrator.evaluate)

A target of `evaluate` that is no run has a folder with `target.json`, a ledger and `evaluations/`.

Every file is either written whole (`write_json`) or append-only (`Journal`, `Ledger`); a line cut short by a crash is
ignored by the readers and removed by the next writer.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dino_core.config import ConfigError

RUN_FILE = "run.json"
TARGET_FILE = "target.json"
SWEEP_FILE = "sweep.json"
METRICS_FILE = "metrics.jsonl"
LEDGER_FILE = "ledger.jsonl"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
SYSTEM_FILE = "system.jsonl"
ENVIRONMENT_FILE = "environment.json"
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
COMPARISON_FILES: dict[Literal["markdown", "csv"], str] = {"markdown": "comparison.md", "csv": "comparison.csv"}
CHECKPOINTS_DIR = "checkpoints"
PICTURES_DIR = "pictures"
EVALUATIONS_DIR = "evaluations"
TRIALS_DIR = "trials"

Event = Literal["started", "finished", "stopped", "failed", "interrupted"]
"""`stopped`: ended early, by the sweep's scheduler or since it had collapsed. `interrupted`: by the user or with the
driver; it can be resumed."""

FINAL_EVENTS: frozenset[str] = frozenset({"finished", "stopped"})
"""Events after which a resumed sweep leaves a trial alone."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: It holds something else, as after a disk that was full or hands that edited it.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: damaged: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: damaged: must hold a JSON object")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a crash leaves either the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """The complete records of an append-only file from byte `offset`, each with the offset behind it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, json.loads(line)


class AppendOnly:
    """A file of JSON lines to which one process appends."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        end = max((offset for offset, _ in read_lines(path)), default=0)
        self.path = path
        self._file = path.open("ab")
        if self._file.tell() != end:  # a crash cut the last line short
            self._file.truncate(end)

    def append(self, record: Mapping[str, Any], *, durable: bool = False) -> None:
        """Add one record; `durable` returns only when the disk has it."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Journal:
    """The metrics of one run, in the order they came. A (step, metric) pair is written once.

    A run that resumes from a checkpoint repeats the steps behind it; what was already written of them stays as it is,
    so that whatever was delivered from the journal stays true. They leave records without metrics: signs of life.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / METRICS_FILE
        self._file = AppendOnly(path)
        self._written = {(r["step"], name) for _, r in read_lines(path) for name in r["metrics"]}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        new = {name: float(value) for name, value in metrics.items() if (step, name) not in self._written}
        self._file.append({"step": step, "time": time.time(), "metrics": new})
        self._written.update((step, name) for name in new)

    def close(self) -> None:
        self._file.close()


def read_evaluations(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What was measured of a run afterwards (`orchestrator.evaluate`): as `read_curves`, the newest value of a step."""
    curves: dict[str, dict[int, float]] = {}
    for _, record in read_lines(run_dir / EVALUATIONS_DIR / METRICS_FILE):
        for name, value in record["metrics"].items():
            curves.setdefault(name, {})[record["step"]] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def read_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a run as (step, value) pairs, by step."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, record in read_lines(run_dir / METRICS_FILE):
        for name, value in record["metrics"].items():
            curves.setdefault(name, []).append((record["step"], value))
    return {name: sorted(points) for name, points in curves.items()}


class Ledger:
    """What became of the trials of a sweep (or of one run): events in order, on disk before they are acted upon."""

    def __init__(self, folder: Path) -> None:
        """Open for writing. Raises ConfigError while another process has it open: a run has one driver."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / f".{LEDGER_FILE}.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ConfigError(
                f"{folder.name}: another process is working on it; wait for its end, or stop it"
            ) from error
        self._file = AppendOnly(folder / LEDGER_FILE)

    def record(self, run_id: str, event: Event, reason: str = "", numbers: Mapping[str, float] | None = None) -> None:
        """Add an event; `numbers` are figures that belong to it, under the names of metrics."""
        entry: dict[str, Any] = {"time": time.time(), "run": run_id, "event": event, "reason": reason}
        if numbers:
            entry["numbers"] = dict(numbers)
        self._file.append(entry, durable=True)

    def close(self) -> None:
        self._file.close()
        self._lock.close()


@dataclass(frozen=True)
class RunState:
    """The last word on a run."""

    event: Event
    reason: str
    time: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Figures of the event: `cost/device_hours_saved` of a run that was stopped early."""


def read_states(folder: Path) -> dict[str, RunState]:
    """The newest state of each run that the ledger in `folder` names."""
    states = {}
    for _, entry in read_lines(folder / LEDGER_FILE):
        states[entry["run"]] = RunState(entry["event"], entry["reason"], entry["time"], entry.get("numbers", {}))
    return states


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The part of a run that a trial of a population trains: one generation of one member."""

    member: int
    generation: int
    start_step: int
    stop_step: int
    """Training ends before this step; schedules are those of the whole run."""
    parent: str | None = None
    """Trial whose checkpoint at `start_step` it goes on from; None in the first generation."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is; written before it starts."""

    run_id: str
    experiment: str
    recipe: str
    seed: int
    config: dict[str, Any]
    """The complete configuration under its dotted keys (`orchestrator.overrides.flatten`)."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Which keys this trial sets, by its row and of those that the sweep varies; empty outside a sweep."""
    derived: dict[str, float] = field(default_factory=dict)
    """What was computed from the configuration: scaled lr, total steps, parameters, ..."""
    sweep: str | None = None
    row: str | None = None
    """The sweep's row that this trial belongs to."""
    method: str | None = None
    """The named method whose changes the recipe got first."""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's numbers for this trial, by metric."""
    paper_setting: str = ""
    """What those numbers were measured with."""
    stop_collapsed: bool = False
    """Whether the run is ended when it has collapsed."""
    segment: Segment | None = None
    """Of a trial in population-based training: which part of a run it is."""
    git_commit: str | None = None
    """With "-dirty" behind it if files differed."""
    data_digest: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    """What the data set is: `kind`, `num_train`, `num_test`, `num_classes`. Empty in records of earlier releases."""
    created_at: float = field(default_factory=time.time)

    @property
    def labels(self) -> dict[str, Any]:
        """What else than its configuration tells this run from others: row, method, and the paper's numbers."""
        labels: dict[str, Any] = {"row": self.row, "method": self.method}
        labels |= {f"paper/{metric}": value for metric, value in self.paper.items()}
        labels["paper/setting"] = self.paper_setting if self.paper else None
        return {name: value for name, value in labels.items() if value is not None and value != ""}

    @property
    def last_step(self) -> int:
        """The step before which its training ends."""
        return self.segment.stop_step if self.segment is not None else int(self.derived["total_steps"])

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / RUN_FILE, asdict(self))

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord:
        """Raises:
        ConfigError: The file is damaged.
        """
        path = run_dir / RUN_FILE
        try:
            content = read_json(path)
            if content.get("segment") is not None:
                content["segment"] = Segment(**content["segment"])
            return cls(**content)
        except TypeError as error:  # fields that are missing, or that nobody knows
            raise ConfigError(f"{path}: damaged: {error}") from error
