"""What an evaluation leaves on disk, from which MLflow is told.

::

    <storage>/<run>/evaluations/                    of another target in a folder of its own, <storage>/evaluate-.../
        metrics.jsonl                               every figure, as it was found
        knn-step_00000200-1f0c.../result.json       target, data, options, metrics, tables
                                 /per_class.csv     a table
                                 /...               files of the suite

The name of a result follows from what was asked: the same question writes into the same folder, and adds figures to
the journal only if they have changed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_core.config import CheckedConfig, ConfigError
from orchestrator.config import RunConfig
from orchestrator.errors import RunFailed
from orchestrator.evaluate.suite import SuiteResult
from orchestrator.overrides import flatten
from orchestrator.records import (
    EVALUATIONS_DIR,
    METRICS_FILE,
    TARGET_FILE,
    TRIALS_DIR,
    AppendOnly,
    Ledger,
    read_lines,
    write_json,
)
from orchestrator.registry import deliver_all
from orchestrator.runs import deliver_command
from orchestrator.tracking import Target

if TYPE_CHECKING:
    from orchestrator.evaluate.job import Job
    from orchestrator.evaluate.targets import Target as EvaluatedTarget

RESULT_FILE = "result.json"
_NO_DATA = ("data.shuffle", "data.shuffle_window", "data.max_bad_fraction", "data.root", "data.download")
_NO_FEATURES = ("batch_size", "cache_gb")
"""Settings that change no number."""


@dataclass(frozen=True)
class Evaluation:
    """A suite's result, as it is on disk."""

    suite: str
    folder: Path
    metrics: dict[str, float]
    """By the names that they have in MLflow: `evaluate/<suite>/...`, or with the label before the suite."""
    content: dict[str, Any]
    """Of `result.json`."""


@dataclass
class Pending:
    """A result that is being made."""

    folder: Path
    """Where the suite writes its files."""
    result: SuiteResult | None = None
    evaluation: Evaluation = field(init=False)


@contextmanager
def record_result(job: Job, suite: str, options: CheckedConfig, label: str | None = None) -> Iterator[Pending]:
    """A folder for the suite's files, which takes its final name with the result, at the end of the block.

    Args:
        label: What keeps the metrics apart from others of the suite: `evaluate/<label>/<suite>/...`.
    """
    prefix = "/".join(["evaluate", *([label] if label else []), suite])
    home = home_of(job.target, job.config) / EVALUATIONS_DIR
    partial = home / f".partial-{suite}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pending = Pending(partial)
    began = time.perf_counter()
    try:
        yield pending
        result = pending.result
        assert result is not None
        metrics = {f"{prefix}/{name}": float(value) for name, value in result.metrics.items()}
        asked = {"label": label, **_asked(job, options)}
        content: dict[str, Any] = {"suite": suite, "metrics": metrics, "notes": list(result.notes), **asked}
        content |= {"unreadable_images": job.num_left_out, "seconds": round(time.perf_counter() - began, 3)}
        final = home / _name(suite, asked)
        for name, rows in result.tables.items():
            _write_table(partial / f"{name}.csv", rows)
        write_json(partial / RESULT_FILE, content)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _log(home, final.name, job.target.step, metrics)
    pending.evaluation = Evaluation(suite, final, metrics, content)


def home_of(target: EvaluatedTarget, config: RunConfig) -> Path:
    """The folder to which the results belong: its run's, or one of the target's own, known by its name and weights."""
    if target.run_dir is not None:
        return target.run_dir
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in target.name).strip("-.")
    return Path(config.cluster.storage).resolve() / f"evaluate-{name[-60:]}-{target.digest[:8]}"


def open_home(target: EvaluatedTarget, config: RunConfig) -> None:
    """Make the folder of the results, and write down what is evaluated where it is no run.

    Raises:
        ConfigError: Nothing can be written there.
    """
    home = home_of(target, config)
    try:
        (home / EVALUATIONS_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{home}: results cannot be written there: {error.strerror}") from error
    if target.run_dir is not None or (home / TARGET_FILE).exists():
        return
    tracking = {key: value for key, value in flatten(config).items() if key.startswith("tracking.")}
    experiment = config.tracking.experiment or "evaluate"
    ledger = Ledger(home)
    try:
        write_json(home / TARGET_FILE, {"target": target.describe(), "tracking": tracking, "experiment": experiment})
        ledger.record(home.name, "started")
        ledger.record(home.name, "finished")
    finally:
        ledger.close()


def deliver_results(target: EvaluatedTarget, config: RunConfig) -> str | None:
    """Bring MLflow up to date with the results. Returns why it is not, or None."""
    home = home_of(target, config)
    # Trials are delivered with their sweep, whose run in MLflow is that of their parent.
    folder = home.parent.parent if home.parent.name == TRIALS_DIR else home
    later = f"later: {deliver_command(folder)}"
    try:
        ledger = Ledger(folder)
    except ConfigError:
        return f"{folder.name} is being worked on by another process, which delivers to MLflow; {later}"
    try:
        left_out = deliver_all(folder, Target.of(config.tracking))
    except RunFailed as error:
        return f"{error}; {later}"
    finally:
        ledger.close()
    return "; ".join(left_out) or None


def _asked(job: Job, options: CheckedConfig) -> dict[str, Any]:
    """The question to which a result is the answer."""
    data = None
    if job.uses_source:
        data = {key: value for key, value in flatten(job.config.data, "data.").items() if key not in _NO_DATA}
        data |= {"kind": job.source.kind, "digest": job.data_digest}
    features = {key: value for key, value in flatten(job.settings).items() if key not in _NO_FEATURES}
    return {"target": job.target.describe(), "data": data, "features": features, "options": flatten(options)}


def _name(suite: str, asked: Mapping[str, Any]) -> str:
    """Of the folder of a result: the same for the same question."""
    data = {key: value for key, value in (asked["data"] or {}).items() if key != "data.source"}  # it may have moved
    digest = hashlib.sha256(json.dumps({**asked, "data": data}, sort_keys=True).encode()).hexdigest()
    return f"{suite}-step_{asked['target']['step']:08d}-{digest[:12]}"


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _log(home: Path, result: str, step: int, metrics: Mapping[str, float]) -> None:
    """Add to the journal what is new or has changed since the same question was last asked."""
    last: dict[str, float] = {}
    for _, record in read_lines(home / METRICS_FILE):
        last = record["metrics"] if record["result"] == result else last
    if last != metrics:
        journal = AppendOnly(home / METRICS_FILE)
        try:
            journal.append(
                {"step": step, "time": time.time(), "result": result, "metrics": dict(metrics)}, durable=True
            )
        finally:
            journal.close()
