"""What an evaluation leaves on disk, from which MLflow is told.

::

    <storage>/<run>/evaluations/                    of a run; of another target in a folder of its own
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
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_core.config import CheckedConfig
from orchestrator.evaluate.suite import SuiteResult
from orchestrator.overrides import flatten
from orchestrator.records import EVALUATIONS_DIR, METRICS_FILE, AppendOnly, read_lines, write_json

if TYPE_CHECKING:
    from orchestrator.evaluate.job import Job

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Evaluation:
    """A suite's result, as it is on disk."""

    suite: str
    folder: Path
    metrics: dict[str, float]
    """By the names that they have in MLflow: `evaluate/<suite>/...`."""
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
def record_result(job: Job, suite: str, options: CheckedConfig) -> Iterator[Pending]:
    """A folder for the suite's files, which takes its final name with the result, at the end of the block."""
    home = results_dir(job)
    asked = {
        "target": job.target.describe(),
        "data": _data(job),
        "features": flatten(job.settings),
        "options": flatten(options),
    }
    final = home / _name(suite, asked)
    partial = home / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pending = Pending(partial)
    began = time.perf_counter()
    try:
        yield pending
        result = pending.result
        assert result is not None
        metrics = {f"evaluate/{suite}/{name}": float(value) for name, value in result.metrics.items()}
        content = {"suite": suite, "metrics": metrics, "notes": list(result.notes), **asked}
        content |= {"unreadable_images": job.num_unreadable(), "seconds": round(time.perf_counter() - began, 3)}
        for name, rows in result.tables.items():
            _write_table(partial / f"{name}.csv", rows)
        write_json(partial / RESULT_FILE, content)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _log(home, final.name, job.target.step, metrics)
    pending.evaluation = Evaluation(suite, final, metrics, content)


def results_dir(job: Job) -> Path:
    """Where results of the target are: in its run's folder, or in one of its own, known by its name and weights."""
    target = job.target
    storage = Path(job.config.cluster.storage).resolve()
    if target.run_dir is not None:
        return target.run_dir / EVALUATIONS_DIR
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in target.name).strip("-.")
    return storage / f"evaluate-{name[-60:]}-{target.digest[:8]}" / EVALUATIONS_DIR


def _data(job: Job) -> dict[str, Any] | None:
    """What images were taken; None where no suite has asked for those of `data.source`."""
    if not job.has_opened_source:
        return None
    source = job.source
    known: dict[str, Any] = {key: value for key, value in flatten(job.config).items() if key.startswith("data.")}
    return known | {"kind": source.kind, "digest": job.data_digest}


def _name(suite: str, asked: Mapping[str, Any]) -> str:
    """Of the folder of a result: the same for the same question."""
    matters = {name: asked[name] for name in ("target", "data", "features", "options")}
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()
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
